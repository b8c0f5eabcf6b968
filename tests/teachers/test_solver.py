"""OdeSolver: the same solution in another precision, compiled, and for batches of any size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig, can_solve
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.conftest import tiny_pipeline

CONFIG = SolverConfig(steps=4, guidance=3.0)
PROMPTS = ["red heart", "blue cat", "", "green tree", "sun"]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return draw_noise(range(5), (4, 8, 8))


def test_any_number_of_pairs(tiny_teacher: StableDiffusionTeacher, noise: np.ndarray) -> None:
    whole = OdeSolver(tiny_teacher, CONFIG, batch_size=5).solve(noise, PROMPTS)
    parts = OdeSolver(tiny_teacher, CONFIG, batch_size=2).solve(noise, PROMPTS)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_precision_is_of_the_network_alone(tiny_teacher: StableDiffusionTeacher, noise: np.ndarray) -> None:
    exact = OdeSolver(tiny_teacher, CONFIG).solve(noise, PROMPTS)
    solver = OdeSolver(tiny_teacher, CONFIG, precision="bfloat16")
    rounded = solver.solve(noise, PROMPTS)
    assert rounded.dtype == torch.float32
    assert tiny_teacher.dtype == torch.float32
    error = ((rounded - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 0 < error < 0.05


def test_in_place_is_the_same_without_a_second_network(tiny_teacher: StableDiffusionTeacher, noise: np.ndarray) -> None:
    expected = OdeSolver(tiny_teacher, CONFIG, precision="bfloat16", negative_prompt="sun").solve(noise, PROMPTS)
    spent = copy.deepcopy(tiny_teacher)
    solver = OdeSolver(spent, CONFIG, precision="bfloat16", negative_prompt="sun", in_place=True)
    torch.testing.assert_close(solver.solve(noise, PROMPTS), expected, atol=0, rtol=0)
    assert solver.network is spent.network and spent.dtype == torch.bfloat16


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Compiling without code generation; the graphs that are made."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        found.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compile_(model, dynamic=dynamic, backend=backend))
    torch._dynamo.reset()
    return found


def _rows_of_convolutions(graph: torch.fx.GraphModule) -> list[int]:
    convolutions = (torch.conv2d, torch.nn.functional.conv2d)
    return [len(n.meta["example_value"]) for n in graph.graph.nodes if n.op == "call_function" and n.target in convolutions]


def test_compiled(tiny_teacher: StableDiffusionTeacher, noise: np.ndarray, graphs: list[torch.fx.GraphModule]) -> None:
    """One graph for all batches, the short one padded; the same numbers; the prefix on one half of the guidance batch."""
    expected = OdeSolver(tiny_teacher, CONFIG, batch_size=5).solve(noise, PROMPTS)
    found = OdeSolver(tiny_teacher, CONFIG, batch_size=3, compiled=True).solve(noise, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
    rows = _rows_of_convolutions(graphs[0])
    assert rows[0] == 3 and rows[-1] == 6
    # The teacher's own network is left as it was.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_teacher.network.modules())


def test_compiled_solvers_do_not_share_graphs(
    tiny_teacher: StableDiffusionTeacher, noise: np.ndarray, graphs: list[torch.fx.GraphModule]
) -> None:
    """With guidance 2 pairs make 4 rows of which the prefix sees 2; without it 4 pairs make 4 rows: the same shapes."""
    unguided = SolverConfig(steps=4, guidance=1.0)
    expected = OdeSolver(tiny_teacher, unguided).solve(noise[:4], PROMPTS[:4])
    OdeSolver(tiny_teacher, CONFIG, batch_size=2, compiled=True).solve(noise[:2], PROMPTS[:2])
    found = OdeSolver(tiny_teacher, unguided, batch_size=4, compiled=True).solve(noise[:4], PROMPTS[:4])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


def test_the_teachers_own_precision_needs_no_copy(tiny_teacher: StableDiffusionTeacher) -> None:
    assert OdeSolver(tiny_teacher, CONFIG, precision="float32").network is None


def test_no_compiler_is_one_clear_line(tiny_teacher: StableDiffusionTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="pairs.compile is true.*C\\+\\+ compiler.*set pairs.compile=false"):
        OdeSolver(tiny_teacher, CONFIG, compiled=True)


def test_a_solver_without_the_teachers_schedule_is_refused() -> None:
    pipeline = tiny_pipeline("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    teacher = StableDiffusionTeacher.from_pipeline(pipeline)
    assert [can_solve(teacher, name) for name in ("ddim", "dpmpp", "unipc", "heun")] == [True, True, True, False]
    with pytest.raises(UserError, match="solver is heun, which knows no schedule that ends without signal"):
        OdeSolver(teacher, SolverConfig(solver="heun", steps=4, spacing="trailing", guidance=1.0)).solve(draw_noise([0], (4, 8, 8)), ["a"])
