"""The clockwork of the speed protocols: what is counted, what is left out. No test asks how fast anything is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.models import Model, ModelOptions, load_model
from diffusion2gan.evaluation.speed import extra_memory, latency, latency_line, loss_cost, train_throughput
from diffusion2gan.recipe import load_recipe
from diffusion2gan.run import simulate_recipe
from tests.helpers import recipe_values, write_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("steps", [1, 4])
def test_latency_counts_evaluations_and_orders_its_parts(tiny_teacher_folder: Path, steps: int) -> None:
    model = load_model(f"teacher:{tiny_teacher_folder}", ModelOptions(steps=steps, guidance=2.0, batch_size=2))
    drawn: list[tuple] = []

    def counted(prompts: list[str], seeds: list[int]) -> np.ndarray:
        drawn.append((tuple(prompts), tuple(seeds)))
        return model.draw(prompts, seeds)

    found = latency(
        Model(model.name, model.identity, counted, modules=model.modules), batch=2, warmup=2, runs=3, prompts=("cat", "sun", "dog")
    )
    assert len(drawn) == 5 and len({seeds for _, seeds in drawn}) == 5
    assert drawn[0][0] != drawn[1][0]  # another prompt each time
    assert found["evaluations"] == steps
    assert 0 < found["t_network"] < found["t_e2e"] < found["t_e2e_host"]
    assert found["t_e2e_p10"] <= found["t_e2e"] <= found["t_e2e_p90"]
    assert found["machine"]["device"].startswith("cpu") and found["runs"] == 3
    # Nothing stays attached.
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (model.modules["text"], model.modules["decoder"]))


def test_pictures_have_no_latency() -> None:
    with pytest.raises(UserError, match="only pictures"):
        latency(Model("folder", {}, lambda p, s: np.zeros((1, 2, 2, 3), np.uint8)))


def test_the_published_latencies_lie_on_a_line() -> None:
    """DMD's rows without guidance, 1, 2 and 4 steps: 90, 120 and 190 ms."""
    line = latency_line([(1, 0.090), (2, 0.120), (4, 0.190)])
    assert line["fixed"] == pytest.approx(0.055, abs=5e-4) and line["per_step"] == pytest.approx(0.0336, abs=5e-4)
    with pytest.raises(UserError, match="two step counts"):
        latency_line([(1, 0.1), (1, 0.2)])


def test_loss_cost_runs_forward_and_backward_and_counts_weights() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1024, 256), requires_grad=False)
            self.calls = 0

        def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
            assert x0.requires_grad and not x1.requires_grad
            self.calls += 1
            return ((x0 - x1) ** 2).flatten(1).mean(1)

    distance = Distance()
    found = loss_cost(distance, (4, 8, 8), CPU, batch=3, warmup=2, runs=4)
    assert distance.calls == 2 + 4 + 1
    assert found["weight_mb"] == 1.0 and found["batch"] == 3 and found["ms"] > 0


def test_extra_memory_is_the_peak_of_the_call() -> None:
    def act() -> None:
        a = torch.ones(1 << 20)  # 4 MB
        b = torch.ones(1 << 19)
        del a, b
        torch.ones(1 << 18)

    assert extra_memory(act, CPU) == pytest.approx(6, abs=0.1)


def test_throughput_is_of_the_trainer_itself(tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    values = recipe_values(tiny_teacher_folder, prompts_file)
    recipe = load_recipe(str(write_recipe(tmp_path / "recipe.yaml", values)))
    store = tmp_path / "store"
    simulate_recipe(recipe, store, progress=False)
    found = train_throughput(recipe, store, warmup=2, steps=4)
    assert (found["steps"], found["batch"], found["processes"]) == (4, 4, 1)
    assert found["images_per_second"] == pytest.approx(4 / found["seconds_per_step"])
    assert found["step_memory_mb"] > 0
    with pytest.raises(UserError, match="expected at least 1"):
        train_throughput(recipe, store, steps=0)
