"""ZeRO in two processes, where DeepSpeed is installed (`DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`; DS_ACCELERATOR=cpu
without a GPU): the same run as without it, and checkpoints that either goes on from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.run import train_recipe
from diffusion2gan.training.state import checkpoint_path, load_state
from tests.helpers import metrics, recipe_values, run_command, trained_from_scratch, write_recipe

with_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Path]:
    """A recipe of two micro-batches a process and step, its store and its run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    values = recipe_values(tiny_teacher_folder, prompts_file)
    values["training"] |= {"micro_batch_size": 1, "gradient_clip": 1.01}
    trained_from_scratch(values, folder)
    return {"recipe": write_recipe(folder / "recipe.yaml", values), "store": folder / "store", "run": folder / "run"}


def in_two_processes(*arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "diffusion2gan"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_near(run: Path, other: Path) -> None:
    ours, theirs = (load_state(checkpoint_path(r / "checkpoints", 12)) for r in (run, other))
    for a, b in ((ours.model, theirs.model), (ours.ema, theirs.ema)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            torch.testing.assert_close(a[name], value, atol=3e-4, rtol=1e-3)
    assert ours.gradient_scale == pytest.approx(theirs.gradient_scale, rel=1e-3)
    for mine, other_s in zip(ours.optimizer["state"].values(), theirs.optimizer["state"].values(), strict=True):
        assert mine["step"] == other_s["step"] == 12
        for key in ("exp_avg", "exp_avg_sq"):
            scale = other_s[key].abs().max().item()
            torch.testing.assert_close(mine[key], other_s[key], atol=1e-2 * scale + 1e-12, rtol=1e-2)
    first, second = ({r["step"]: r["loss"] for r in metrics(r) if "loss" in r} for r in (run, other))
    assert first == pytest.approx(second, rel=1e-3)


@with_deepspeed
@pytest.mark.parametrize(("stage", "offload"), [(1, "false"), (2, "false"), (2, "true")])
def test_two_processes_with_zero_train_as_one_without(stage: int, offload: str, whole: dict[str, Path], tmp_path: Path) -> None:
    settings = ("--set", f"training.zero={stage}", "--set", f"training.zero_offload={offload}")
    in_two_processes("train", whole["recipe"], "--pairs", whole["store"], "--out", tmp_path / "run", *settings)
    assert_near(tmp_path / "run", whole["run"])


@with_deepspeed
@pytest.mark.parametrize(("stage", "offload"), [(1, "false"), (2, "true")])
def test_either_goes_on_from_the_others_checkpoint(stage: int, offload: str, whole: dict[str, Path], tmp_path: Path) -> None:
    zero = ("--set", f"training.zero={stage}", "--set", f"training.zero_offload={offload}")
    half = ("--set", "training.steps=6")
    command = ("train", whole["recipe"], "--pairs", whole["store"], "--out")
    in_two_processes(*command, tmp_path / "begun", *zero, *half)
    assert run_command(*command, tmp_path / "begun").returncode == 0
    assert_near(tmp_path / "begun", whole["run"])
    assert run_command(*command, tmp_path / "ended", *half).returncode == 0
    in_two_processes(*command, tmp_path / "ended", *zero)
    assert_near(tmp_path / "ended", whole["run"])


@with_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_a_split_run_goes_on_with_zero(stage: int, whole: dict[str, Path], tmp_path: Path) -> None:
    command = ("train", whole["recipe"], "--pairs", whole["store"], "--out", tmp_path / "run")
    in_two_processes(*command, "--set", "training.shard=true", "--set", "training.steps=6")
    in_two_processes(*command, "--set", f"training.zero={stage}")
    assert_near(tmp_path / "run", whole["run"])


_NOT_FINITE = """
import math, sys, torch
from accelerate import Accelerator
from diffusion2gan.training.optimizer import adamw
from diffusion2gan.training.zero import ZeroDescent

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
network = torch.nn.Linear(4, 4)
optimizer = adamw("adamw", network.parameters(), 1e-3, (0.9, 0.999), 0.0)
descent = ZeroDescent(network, optimizer, 2.0, Accelerator(cpu=True, mixed_precision="bf16"), 1, int(sys.argv[2]), False)
seen = []
network.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
with descent.exchanging(True):
    descent.backward((descent.trained(torch.ones(1, 4)).float() * torch.tensor([1.0, 1.0, 1.0, math.nan])).sum())
assert seen == [torch.bfloat16], seen
assert not math.isfinite(descent.norm())
"""


@with_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_is_seen_and_precision_is_the_trainers(stage: int, tmp_path: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", _NOT_FINITE, str(tmp_path / "meeting"), str(stage)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_what_it_needs_it_is_refused(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    values = yaml.safe_load(whole["recipe"].read_text())
    values["training"]["zero"] = 2
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="needs DeepSpeed: pip install --no-build-isolation deepspeed"):
        train_recipe(parse_recipe(values, "zero"), whole["store"], tmp_path / "run", progress=False)
    for section, key, value, said in (
        ("training", "shard", True, "training.shard is True with training.zero, expected False"),
        ("training", "compile", True, "training.compile is True with training.zero"),
        ("generator", "lora_rank", 4, "generator.lora_rank is set with training.zero"),
        ("adversarial", "steps", 4, "it is for phase 1 alone"),
    ):
        with pytest.raises(UserError, match=said):
            parse_recipe(values | {section: values.get(section, {}) | {key: value}}, "zero")
    values["training"] |= {"zero": 0, "zero_offload": True}
    with pytest.raises(UserError, match="training.zero is 0, expected 1 or 2"):
        parse_recipe(values, "zero")
