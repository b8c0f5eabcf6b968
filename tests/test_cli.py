"""The command line as a user meets it: the whole way on a tiny teacher, and every kind of bad input."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import metrics, recipe_values, run_command, tree_digest, write_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> Path:
    """recipe.yaml, store, run and student, made by the commands."""
    folder = tmp_path_factory.mktemp("world")
    recipe = write_recipe(folder / "recipe.yaml", recipe_values(tiny_teacher_folder, prompts_file))
    for arguments in (
        ("simulate", recipe, "--out", folder / "store"),
        ("train", recipe, "--pairs", folder / "store", "--out", folder / "run"),
        ("export", folder / "run", folder / "student", "--dtype", "float32"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    return folder


def test_the_run_leaves_what_one_looks_for(world: Path) -> None:
    rows = metrics(world / "run")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    assert any("validation_mse" in r for r in rows)
    assert (world / "run" / "samples" / "held-out-00000012.png").exists()
    assert (world / "run" / "recipe.yaml").exists()
    assert (world / "run" / "pairs.json").exists()


def test_generate_and_compare(world: Path, tiny_teacher_folder: Path) -> None:
    done = run_command("generate", world / "student", "red heart", "--seed", 7, "-n", 4, "-o", world / "out.png")
    assert done.returncode == 0, done.stderr
    assert "seeds 7 to 10" in done.stdout
    assert Image.open(world / "out.png").size[0] > 4 * 16
    done = run_command(
        "compare", world / "student", "cat", "sun", "--teacher", tiny_teacher_folder, "--steps", 2, "-n", 2, "-o", world / "c.png"
    )
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout


def test_pairs_commands(world: Path) -> None:
    done = run_command("pairs", "check", world / "store")
    assert done.returncode == 0, done.stderr
    assert "pairs: 24" in done.stdout
    done = run_command("pairs", "show", world / "store", world / "recipe.yaml", "-n", 4, "-o", world / "pairs.png")
    assert done.returncode == 0, done.stderr
    done = run_command("pairs", "store-noise", world / "store", "--out", world / "noisy")
    assert done.returncode == 0, done.stderr
    run = ("train", world / "recipe.yaml", "--pairs", world / "noisy", "--out", world / "run2", "--set", "training.steps=3")
    assert run_command(*run).returncode == 0
    # The stored noise is the drawn noise: the first steps have the same losses.
    strip = {"images_per_second"}
    first = [{k: v for k, v in r.items() if k not in strip} for r in metrics(world / "run")][:2]
    assert [{k: v for k, v in r.items() if k not in strip} for r in metrics(world / "run2")][:2] == first


def _assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffusion2gan: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


def test_bad_input_is_one_line_and_exit_code_2(world: Path, tmp_path: Path) -> None:
    recipe, store = world / "recipe.yaml", world / "store"
    before = tree_digest(world)
    _assert_one_line(run_command("simulate", "no-such-recipe", "--out", tmp_path / "s"), "no such file or built-in recipe")
    _assert_one_line(
        run_command("simulate", recipe, "--out", tmp_path / "s", "--set", "pairs.cuont=3"), "unknown key pairs.cuont", "did you mean count"
    )
    _assert_one_line(
        run_command("simulate", recipe, "--out", store, "--set", "pairs.ode.guidance=5.0"),
        "ode.guidance is 2.0 there and 5.0 in the recipe",
    )
    _assert_one_line(
        run_command("train", recipe, "--pairs", store, "--out", tmp_path / "r", "--set", "pairs.ode.guidance=5.0"),
        "pairs.ode.guidance: the store", "has 2.0, the recipe 5.0",
    )  # fmt: skip
    _assert_one_line(run_command("train", recipe, "--pairs", tmp_path, "--out", tmp_path / "r"), "no pair store here")
    _assert_one_line(
        run_command("train", recipe, "--pairs", store, "--out", world / "run", "--set", "training.seed=9"),
        "training.seed is 0 there and 9 now",
    )
    _assert_one_line(run_command("export", tmp_path, tmp_path / "x"), "no run here")
    _assert_one_line(run_command("generate", tmp_path, "cat"), "no student here")
    _assert_one_line(
        run_command("simulate", recipe, "--out", tmp_path / "s", "--set", f"teacher.source={tmp_path}"), "is not a Stable Diffusion folder"
    )
    assert tree_digest(world) == before
    assert not (tmp_path / "r").exists()


def _small_disk(path: Path) -> bool:
    path.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(path)], capture_output=True, check=False).returncode == 0


def test_full_disk(world: Path, tmp_path: Path) -> None:
    """A real full file system: the store's shards fit one by one until they don't."""
    disk = tmp_path / "disk"
    if not _small_disk(disk):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        command = ("train", world / "recipe.yaml", "--pairs", world / "store", "--out", disk / "run")
        _assert_one_line(run_command(*command), "the disk is full")
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_command(*command).returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        _assert_one_line(run_command(*command, "--set", "training.steps=14"), "cannot write here")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_import_is_light() -> None:
    started = time.perf_counter()
    code = "import sys, diffusion2gan; assert 'torch' not in sys.modules; print(diffusion2gan.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0.")
    assert time.perf_counter() - started < 5


def test_every_public_name_resolves() -> None:
    import diffusion2gan

    for name in diffusion2gan.__all__:
        assert getattr(diffusion2gan, name) is not None
    with pytest.raises(AttributeError):
        diffusion2gan.nothing  # noqa: B018
