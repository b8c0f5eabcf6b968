"""Kill the program at named points and at random times; the same command again must give what an unbroken run gives."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion2gan.training.state import checkpoint_path, checkpoint_step, checkpoints, load_state
from tests.conftest import tiny_pixel_pipeline
from tests.helpers import ROOT, Command, metrics, recipe_values, run_command, tree_digest, write_recipe

KILLED = -signal.SIGKILL


def _unbroken(folder: Path, values: dict[str, Any]) -> dict[str, Path]:
    recipe = write_recipe(folder / "recipe.yaml", values)
    for arguments in (
        ("simulate", recipe, "--out", folder / "store"),
        ("train", recipe, "--pairs", folder / "store", "--out", folder / "run"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
    return {"recipe": recipe, "store": folder / "store", "run": folder / "run"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> dict[str, Path]:
    """A recipe, its unbroken store and its unbroken run."""
    return _unbroken(tmp_path_factory.mktemp("unbroken"), recipe_values(tiny_teacher_folder, prompts_file))


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Path]) -> dict[str, Path]:
    """The same with a second phase: D from the sixth step on, R1 every third step on one sample of each half of the batch."""
    folder = tmp_path_factory.mktemp("gan")
    values = yaml.safe_load(world["recipe"].read_text())
    values["training"]["steps"] = 5
    values["adversarial"] = {
        "steps": 7,
        "weight": 0.5,
        "r1_every": 3,
        "r1_count": 2,
        "learning_rate": 1e-3,
        "discriminator_learning_rate": 1e-3,
    }
    recipe = write_recipe(folder / "recipe.yaml", values)
    done = run_command("train", recipe, "--pairs", world["store"], "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return {"recipe": recipe, "store": world["store"], "run": folder / "run"}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Path]) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    settings = ("--set", "generator.lora_rank=2", "--set", "training.steps=3")
    done = run_command("train", world["recipe"], "--pairs", world["store"], "--out", run, *settings)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def pixel(tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> dict[str, Path]:
    """An EDM network of pixels by Heun's method: no text, no autoencoder, noise of another scale; both phases."""
    folder = tmp_path_factory.mktemp("pixel")
    tiny_pixel_pipeline(edm=True).save_pretrained(folder / "teacher")
    ode = {"solver": "heun", "steps": 3, "spacing": "linspace", "guidance": 1.0}
    values = recipe_values(folder / "teacher", prompts_file, pairs__ode=ode)
    values["teacher"]["family"] = "pixel"
    values["training"]["steps"] = 6
    values["adversarial"] = {"steps": 6, "learning_rate": 1e-4, "discriminator_learning_rate": 1e-4, "r1_every": 3}
    return _unbroken(folder, values)


def _kill_at(point: str, number: int, *arguments: object) -> None:
    killed = Command(*arguments, kill_at=(point, number)).wait()
    assert killed.returncode == KILLED, f"{point} {number} was never reached: {killed.stderr}"


def _start_slowly(*arguments: object) -> Command:
    """Starts a slowed command and returns when its work has begun."""
    command = Command(*arguments, slow=0.1)
    started = time.monotonic()
    while "slow: started" not in command.stderr:
        assert time.monotonic() - started < 60, command.stderr
        time.sleep(0.01)
    return command


def _final_weights(run: Path) -> dict[str, torch.Tensor]:
    saved = load_state(checkpoint_path(run / "checkpoints", 12))
    parts = {"model": saved.model, "ema": saved.ema, "discriminator": saved.adversary["model"] if saved.adversary else {}}
    return {f"{name}.{k}": v for name, part in parts.items() for k, v in part.items()}


def _assert_same_run(run: Path, unbroken: Path) -> None:
    ours, theirs = _final_weights(run), _final_weights(unbroken)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    strip = ("images_per_second",)
    assert [{k: v for k, v in r.items() if k not in strip} for r in metrics(run)] == [
        {k: v for k, v in r.items() if k not in strip} for r in metrics(unbroken)
    ]


# Renames of a simulation: settings, three shards, dataset_info, state, manifest.
@pytest.mark.parametrize(
    ("point", "number"),
    [("mid-shard", 1), ("mid-shard", 4), ("before-rename", 1), ("after-rename", 1), ("before-rename", 3), ("after-rename", 3)]
    + [(p, n) for p in ("before-rename", "after-rename") for n in (5, 6, 7)],
)
def test_simulate_killed_at(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    command = ("simulate", world["recipe"], "--out", tmp_path / "store")
    _kill_at(point, number, *command)
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    assert tree_digest(tmp_path / "store") == tree_digest(world["store"])


def test_pixels_killed_at_simulate(tmp_path: Path, pixel: dict[str, Path]) -> None:
    test_simulate_killed_at("mid-shard", 2, tmp_path, pixel)


@pytest.mark.parametrize(("point", "number"), [("step", 5), ("mid-write", 3)])
def test_pixels_killed_at_train(point: str, number: int, tmp_path: Path, pixel: dict[str, Path]) -> None:
    _kill_a_training_at(point, number, tmp_path / "run", pixel)


@pytest.mark.parametrize(("point", "number"), [("before-rename", 2), ("after-rename", 3), ("before-rename", 5)])
def test_store_noise_killed_at(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    for name in ("unbroken", "killed"):
        command = ("pairs", "store-noise", world["store"], "--out", tmp_path / name)
        if name == "killed":
            _kill_at(point, number, *command)
        done = run_command(*command)
        assert done.returncode == 0, done.stderr
    assert tree_digest(tmp_path / "killed") == tree_digest(tmp_path / "unbroken")


def _export(run: Path, out: Path, *settings: object) -> tuple[object, ...]:
    out.parent.mkdir(exist_ok=True)
    return ("export", run, out, "--dtype", "float32", *settings)


# A folder is put in place by two moves, the second of them that of the new one.
@pytest.mark.parametrize(
    ("point", "number"), [("before-rename", 1), ("before-rename", 3), ("before-move", 1), ("after-move", 1), ("after-move", 2)]
)
def test_export_killed_while_it_replaces_a_student(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    """The old student or the new one stands there, whole, or in the moment between both the old one beside it; again it is the new one."""
    old, new, killed = (tmp_path / n / "student" for n in ("old", "new", "killed"))
    for out, settings in ((old, ("--last",)), (new, ()), (killed, ("--last",))):
        done = run_command(*_export(world["run"], out, *settings))
        assert done.returncode == 0, done.stderr
    assert tree_digest(old) != tree_digest(new)
    _kill_at(point, number, *_export(world["run"], killed))
    expected = new if (point, number) == ("after-move", 2) else old
    assert tree_digest(killed.with_name(".student.old") if (point, number) == ("after-move", 1) else killed) == tree_digest(expected)
    again = run_command(*_export(world["run"], killed))
    assert again.returncode == 0, again.stderr
    assert tree_digest(killed.parent) == tree_digest(new.parent)


@pytest.mark.parametrize(
    ("kind", "point"),
    [("single-file", "before-rename"), ("single-file", "after-rename"), ("lora", "before-rename"), ("lora", "before-move")],
)
def test_export_killed_in_other_forms(kind: str, point: str, tmp_path: Path, world: dict[str, Path], lora_run: Path) -> None:
    run, name = (lora_run, "student") if kind == "lora" else (world["run"], "student.safetensors")
    done = run_command(*_export(run, tmp_path / "unbroken" / name, "--format", kind))
    assert done.returncode == 0, done.stderr
    command = _export(run, tmp_path / "killed" / name, "--format", kind)
    _kill_at(point, 1, *command)
    if point == "after-rename":
        assert "is there already" in run_command(*command).stderr
    else:
        assert not (tmp_path / "killed" / name).exists()
        again = run_command(*command)
        assert again.returncode == 0, again.stderr
    assert tree_digest(tmp_path / "killed") == tree_digest(tmp_path / "unbroken")


def _kill_a_training_at(point: str, number: int, run: Path, unbroken: dict[str, Path]) -> None:
    """Killed there and repeated, a training of `unbroken`'s recipe ends as its own run did."""
    command = ("train", unbroken["recipe"], "--pairs", unbroken["store"], "--out", run)
    _kill_at(point, number, *command)
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    _assert_same_run(run, unbroken["run"])
    assert not list(run.rglob("*.tmp"))


# Renames of a training: recipe (1), inputs.json (2), picture (3), checkpoint of step 3 (4), picture (5), checkpoints of steps 6
# and 9 (6, 7), picture (8), checkpoint of step 12 (9).
@pytest.mark.parametrize(
    ("point", "number"),
    [("step", 1), ("step", 5), ("step", 11), ("mid-write", 1), ("mid-write", 3)]
    + [(p, n) for p in ("before-rename", "after-rename") for n in (1, 2, 3, 4, 6, 9)],
)
def test_train_killed_at(point: str, number: int, tmp_path: Path, world: dict[str, Path]) -> None:
    _kill_a_training_at(point, number, tmp_path / "run", world)


# Steps 3 and 7 lie in either phase; phase 2 begins with a checkpoint of its own.
@pytest.mark.parametrize(("point", "number"), [("step", 3), ("step", 7), ("before-rename", 7), ("after-rename", 7), ("mid-write", 4)])
def test_train_with_a_discriminator_killed_at(point: str, number: int, tmp_path: Path, gan: dict[str, Path]) -> None:
    _kill_a_training_at(point, number, tmp_path / "run", gan)


def _kill_five_times(command: tuple[object, ...], finished_parts: Callable[[], int]) -> None:
    """Five SIGKILLs of one piece of work, each a random while after another part was finished; every one lands before the end."""
    chance = random.Random(7)
    for done in range(5):
        running = _start_slowly(*command)
        started = time.monotonic()
        while finished_parts() < done:
            assert time.monotonic() - started < 60, running.stderr
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait().returncode == KILLED, "the run had already ended"
    again = run_command(*command)
    assert again.returncode == 0, again.stderr


def test_simulate_killed_at_random_times(tmp_path: Path, world: dict[str, Path]) -> None:
    more = ("--set", "pairs.count=96")
    assert run_command("simulate", world["recipe"], "--out", tmp_path / "unbroken", *more).returncode == 0
    store = tmp_path / "store"
    _kill_five_times(("simulate", world["recipe"], "--out", store, *more), lambda: len(list(store.glob("shard-*"))))
    assert tree_digest(store) == tree_digest(tmp_path / "unbroken")


def test_train_killed_at_random_times(tmp_path: Path, world: dict[str, Path]) -> None:
    run = tmp_path / "run"
    often = ("--set", "training.checkpoint_every=1")
    command = ("train", world["recipe"], "--pairs", world["store"], "--out", run, *often)
    _kill_five_times(command, lambda: max((checkpoint_step(c) for c in checkpoints(run / "checkpoints")), default=0))
    _assert_same_run(run, world["run"])


def _under_torchrun(*arguments: object) -> None:
    """Runs the command line in two processes, as its users do."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffusion2gan"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def _in_two_processes(*arguments: object, kill: tuple[int, str, int] | None = None) -> None:
    """The same with torchrun's part played here, which saves its start. kill: the rank that is killed, and where (`sabotage.kill_at`)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        Command(
            *arguments,
            kill_at=kill[1:] if kill and kill[0] == r else None,
            environment=meeting | {"RANK": str(r), "LOCAL_RANK": str(r)},
            lane=r,
        )
        for r in (0, 1)
    ]
    if kill is None:
        for done in [rank.wait() for rank in ranks]:
            assert done.returncode == 0, done.stderr
        return
    killed = ranks[kill[0]].wait()
    assert killed.returncode == KILLED, f"{kill} was never reached: {killed.stderr}"
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[1 - kill[0]].pid, signal.SIGTERM)
    assert ranks[1 - kill[0]].wait().returncode != 0


def test_two_torchrun_workers_make_the_same_store(tmp_path: Path, world: dict[str, Path]) -> None:
    # Enough work that neither worker is done before the other has begun.
    settings = ("--set", "pairs.count=64", "--set", "pairs.ode.steps=40")
    _under_torchrun("simulate", world["recipe"], "--out", tmp_path / "two", *settings)
    assert run_command("simulate", world["recipe"], "--out", tmp_path / "one", *settings).returncode == 0
    assert tree_digest(tmp_path / "two") == tree_digest(tmp_path / "one")
    ranks = {json.loads(line)["rank"] for line in (tmp_path / "two.log.jsonl").read_text().splitlines()}
    assert ranks == {0, 1}


def test_workers_join_die_and_come_back(tmp_path: Path, world: dict[str, Path]) -> None:
    """Elastic: no rendezvous, only RANK and WORLD_SIZE, which need not even agree. One worker is killed, a third joins late."""
    settings = ("--set", "pairs.count=64", "--set", "pairs.ode.steps=20")
    store = tmp_path / "elastic"

    def start(rank: int, size: int, lane: int) -> Command:
        environment = {"RANK": str(rank), "WORLD_SIZE": str(size)}
        return Command("simulate", world["recipe"], "--out", store, *settings, environment=environment, lane=lane)

    second, first = start(1, 2, 1), start(0, 2, 0)  # the lane that may not be open yet comes first
    deadline = time.monotonic() + 120
    while not list(store.glob("shard-*.arrow")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait().returncode == KILLED
    assert not (store / "manifest.json").exists(), "killed after the end"
    third = start(2, 3, 0)
    assert second.wait().returncode == 0
    assert third.wait().returncode == 0
    assert run_command("simulate", world["recipe"], "--out", tmp_path / "one", *settings).returncode == 0
    assert tree_digest(store) == tree_digest(tmp_path / "one")


@pytest.mark.parametrize("two_first", [True, False])
def test_a_run_goes_on_with_another_number_of_processes(two_first: bool, tmp_path: Path, world: dict[str, Path]) -> None:
    """A checkpoint holds nothing that belongs to a process. One process alone is killed, and two go on."""
    command = ("train", world["recipe"], "--pairs", world["store"], "--out", tmp_path / "run")
    if two_first:
        _in_two_processes(*command, "--set", "training.steps=6")
        done = run_command(*command)
        assert "processes was 2 and is 1 now" in done.stderr
        assert done.returncode == 0
    else:
        _kill_at("step", 8, *command)
        _in_two_processes(*command)
    one = {r["step"]: r["loss"] for r in metrics(world["run"]) if "loss" in r}
    assert {r["step"]: r["loss"] for r in metrics(tmp_path / "run") if "loss" in r} == pytest.approx(one, rel=1e-3)
    ours = _final_weights(tmp_path / "run")
    for name, value in _final_weights(world["run"]).items():
        torch.testing.assert_close(ours[name], value, atol=3e-4, rtol=1e-3)


def test_two_processes_train_as_one(tmp_path: Path, world: dict[str, Path]) -> None:
    """DDP over gloo: the same losses and weights as one process with the whole batch, and the same again after a resume."""
    run = tmp_path / "run"
    command = ("train", world["recipe"], "--pairs", world["store"], "--out", run)
    _in_two_processes(*command, "--set", "training.steps=6")
    _in_two_processes(*command)
    one = {r["step"]: r["loss"] for r in metrics(world["run"]) if "loss" in r}
    two = {r["step"]: r["loss"] for r in metrics(run) if "loss" in r}
    assert two == pytest.approx(one, rel=1e-3)
    ours = _final_weights(run)
    for name, value in _final_weights(world["run"]).items():
        torch.testing.assert_close(ours[name], value, atol=3e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Path]) -> dict[str, Any]:
    """A student and its unbroken evaluation, with a metric that has its weights and one that has not."""
    pytest.importorskip("open_clip")
    from tests.evaluation.test_evaluate import small_coco
    from tests.evaluation.test_extractors import tiny_clip

    folder = tmp_path_factory.mktemp("evaluated")
    small_coco(folder / "data")
    tiny_clip(folder / "weights")
    assert run_command("export", world["run"], folder / "student", "--dtype", "float32").returncode == 0
    inputs = ("--data", folder / "data", "--weights", folder / "weights", "--protocol", "clip5k_coco17")
    done = run_command("evaluate", folder / "student", *inputs, "--out", folder / "scores")
    assert done.returncode == 0, done.stderr
    return {"student": folder / "student", "scores": folder / "scores", "inputs": inputs}


def test_two_processes_evaluate_as_one(tmp_path: Path, evaluated: dict[str, Any]) -> None:
    _in_two_processes("evaluate", evaluated["student"], *evaluated["inputs"], "--out", tmp_path / "two")
    two, one = (json.loads((f / "clip5k_coco17.json").read_text()) for f in (tmp_path / "two", evaluated["scores"]))
    for result in (two, one):
        result.pop("seconds_per_image"), result["versions"].pop("torch_threads")
    assert two == one


@pytest.mark.parametrize(("point", "number"), [("before-rename", 1), ("after-rename", 2), ("before-rename", 6), ("after-rename", 8)])
def test_evaluate_killed_at(point: str, number: int, tmp_path: Path, evaluated: dict[str, Any]) -> None:
    command = ("evaluate", evaluated["student"], *evaluated["inputs"], "--out", tmp_path / "scores")
    _kill_at(point, number, *command)
    again = run_command(*command)
    assert again.returncode == 0, again.stderr
    ours, theirs = (json.loads((f / "clip5k_coco17.json").read_text()) for f in (tmp_path / "scores", evaluated["scores"]))
    for result in (ours, theirs):
        result.pop("seconds_per_image")
    assert ours == theirs
    assert sorted(p.relative_to(tmp_path / "scores") for p in (tmp_path / "scores").rglob("*")) == sorted(
        p.relative_to(evaluated["scores"]) for p in evaluated["scores"].rglob("*")
    )


def _assert_near(run: Path, expected: Path, relative: float = 2e-3) -> None:
    """Losses, R1, D's statistics and the weights of both networks."""
    rows = {(r["step"], "loss" in r): r for r in metrics(run)}
    for theirs in metrics(expected):
        # A run that was broken off was also validated there.
        ours = rows[theirs["step"], "loss" in theirs]
        for key, value in theirs.items():
            if key == "discriminator":
                for kind in value.keys() - {"columns"}:
                    assert ours[key][kind]["count"] == value[kind]["count"]
                    assert ours[key][kind]["logit"] == pytest.approx(value[kind]["logit"], abs=2e-3)
            elif key != "images_per_second":
                assert ours[key] == pytest.approx(value, rel=relative, abs=1e-6), (theirs["step"], key)
    weights = _final_weights(run)
    assert any(name.startswith("discriminator.") for name in weights)
    for name, value in _final_weights(expected).items():
        torch.testing.assert_close(weights[name], value, atol=5e-4, rtol=1e-3)


def test_two_processes_play_as_one(tmp_path: Path, gan: dict[str, Path]) -> None:
    """D and G over gloo, as in one process with the whole batch."""
    _in_two_processes("train", gan["recipe"], "--pairs", gan["store"], "--out", tmp_path / "run")
    _assert_near(tmp_path / "run", gan["run"])


SPLIT = ("--set", "training.shard=true", "--set", "adversarial.r1=finite_difference")


@pytest.fixture(scope="module")
def split_gan(tmp_path_factory: pytest.TempPathFactory, gan: dict[str, Path]) -> Path:
    """What split processes are compared with: the run of one, whose R1 is by finite differences."""
    run = tmp_path_factory.mktemp("split") / "run"
    done = run_command("train", gan["recipe"], "--pairs", gan["store"], *SPLIT, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


def _rows_of_the_second(path: Path) -> dict[str, torch.Tensor]:
    """What the second process saved of the average."""
    return {k: v["rows of this process"] for k, v in torch.load(path, weights_only=True)["ema"].items()}


def test_two_processes_with_split_weights_train_as_one(tmp_path: Path, gan: dict[str, Path], split_gan: Path) -> None:
    """FSDP2 over gloo, five steps and more of each phase, against one process with the whole batch."""
    _in_two_processes("train", gan["recipe"], "--pairs", gan["store"], *SPLIT, "--out", tmp_path / "two")
    # Rounding differs, and the game magnifies it.
    _assert_near(tmp_path / "two", split_gan, 1e-2)


def test_two_processes_with_split_weights_go_on_from_one(tmp_path: Path, gan: dict[str, Path], split_gan: Path) -> None:
    split = ("train", gan["recipe"], "--pairs", gan["store"], *SPLIT, "--out", tmp_path / "two")
    alone = run_command(*split, "--set", "adversarial.steps=3")
    assert alone.returncode == 0, alone.stderr
    _in_two_processes(*split)
    folder = tmp_path / "two" / "checkpoints"
    assert load_state(checkpoints(folder)[-1]).environment["memory_format"] == "split"
    # Each process wrote its own half of it.
    rows = sorted(folder.glob("rows-step-*.pt"))
    assert int(rows[-1].name[10:18]) == checkpoint_step(checkpoints(folder)[-1])
    mine, everything = (
        sum(t.numel() for t in m.values()) for m in (_rows_of_the_second(rows[-1]), load_state(checkpoints(folder)[-1]).ema)
    )
    assert 0.4 < mine / everything < 0.6
    # Nor does a process hold more than its rows of what it read.
    last = torch.load(sorted(folder.glob("rows-step-*.pt"))[-1], weights_only=True)
    for optimizer in (last["optimizer"], last["adversary"]["optimizer"]):
        moments = [m[k]["rows of this process"] for m in optimizer["state"].values() for k in ("exp_avg", "exp_avg_sq")]
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in moments)
    _assert_near(tmp_path / "two", split_gan, 1e-2)


# Of the first process: recipe (1), inputs.json (2), picture (3), checkpoint of step 3 (4), picture (5), checkpoints of step 5 (6) and of
# the start of phase 2 (7), of the same step. Of the second, its rows of the same checkpoints (1, 2, 3).
@pytest.mark.parametrize(
    ("kill", "shard", "two_again"),
    [
        ((0, "step", 7), False, True),
        ((1, "step", 3), False, False),
        ((1, "mid-write", 2), True, False),
        ((0, "before-rename", 7), True, False),
    ],
)
def test_one_of_two_processes_killed(
    kill: tuple[int, str, int], shard: bool, two_again: bool, tmp_path: Path, gan: dict[str, Path], split_gan: Path
) -> None:
    """Whole or split weights; the same command again, in as many processes or in one."""
    form = SPLIT if shard else ()
    command = ("train", gan["recipe"], "--pairs", gan["store"], "--out", tmp_path / "run", *form)
    _in_two_processes(*command, kill=kill)
    folder = tmp_path / "run" / "checkpoints"
    if kill[1] == "before-rename":
        # The end of phase 1 is whole, and beside it lies half of the start of phase 2.
        assert load_state(checkpoint_path(folder, 5)).guard is None
        assert len(list(folder.glob("rows-step-00000005-*"))) == 2
    if two_again:
        _in_two_processes(*command)
    else:
        done = run_command(*command)
        assert done.returncode == 0, done.stderr
        if shard:
            assert "memory_format was split and is channels_last now" in done.stderr
    _assert_near(tmp_path / "run", split_gan if shard else gan["run"], 1e-2)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    named = [torch.load(c, weights_only=True).get("parts", []) for c in checkpoints(folder)]
    assert sorted(p.name for p in folder.glob("rows-*")) == sorted(name for names in named for name in names)


def test_terminate_saves_before_it_stops(tmp_path: Path, world: dict[str, Path]) -> None:
    run = tmp_path / "run"
    command = ["train", world["recipe"], "--pairs", world["store"], "--out", run]
    running = _start_slowly(*command)
    time.sleep(0.4)
    os.kill(running.pid, signal.SIGTERM)
    done = running.wait()
    assert done.returncode == 130, done.stderr
    assert "go on where it stopped" in done.stderr
    steps = metrics(run)[-1]["step"]
    assert 0 < steps < 12
    assert (run / "checkpoints" / f"step-{steps:08d}.pt").exists()
    assert run_command(*command).returncode == 0
    ours = _final_weights(run)
    for name, value in _final_weights(world["run"]).items():
        assert torch.equal(value, ours[name]), name
