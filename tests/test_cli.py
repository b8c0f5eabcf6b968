"""The command line as a user meets it: the whole way on a tiny teacher, and every kind of bad input."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from diffusion2gan import cli
from diffusion2gan.recipe import load_recipe
from diffusion2gan.training.state import checkpoints, load_state
from tests.conftest import tiny_pipeline
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
    assert (world / "run" / "inputs.json").exists()
    assert "12 of 12" in (world / "run" / "report.html").read_text()


def test_which_weights_are_exported(world: Path) -> None:
    state = load_state(checkpoints(world / "run" / "checkpoints")[-1])
    done = run_command("export", world / "run", world / "last", "--dtype", "float32", "--last")
    assert done.returncode == 0, done.stderr
    assert any(not torch.equal(v, state.model[k]) for k, v in state.ema.items())
    for name, weights in (("student", state.ema), ("last", state.model)):
        exported = UNet2DConditionModel.from_pretrained(world / name / "unet").state_dict()
        for key, value in exported.items():
            assert torch.equal(value, weights[f"network.{key}"]), (name, key)


def test_recipes_are_listed() -> None:
    done = run_command("recipes")
    assert done.returncode == 0, done.stderr
    assert {"emoji", "demo", "ablations/mse"} <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}


def test_generate_and_compare(world: Path, tiny_teacher_folder: Path) -> None:
    done = run_command("generate", world / "student", "red heart", "--seed", 7, "-n", 4, "-o", world / "out.png")
    assert done.returncode == 0, done.stderr
    assert "seeds 7 to 10" in done.stdout
    assert Image.open(world / "out.png").size[0] > 4 * 16
    # A single picture is written as it is.
    assert run_command("generate", world / "student", "red heart", "-o", world / "one.png").returncode == 0
    assert Image.open(world / "one.png").size == (16, 16)
    teacher = f"teacher:{tiny_teacher_folder}"
    done = run_command(
        "compare", teacher, f"ours={world / 'student'}", "--prompt", "cat", "sun", "--steps", 2, "-n", 2, "-o", world / "c.png"
    )
    assert done.returncode == 0, done.stderr
    assert "times as fast as the first" in done.stdout and "| ours |" in done.stdout
    assert f"{teacher} draws with guidance 3, and ours was distilled with 2; give --guidance 2" in done.stderr
    assert Image.open(world / "c.png").height > 4 * 96  # two prompts, a row for each model


def test_evaluate_speed_and_compare_reports(world: Path, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from tests.evaluation.test_evaluate import small_coco
    from tests.evaluation.test_extractors import tiny_clip

    small_coco(tmp_path / "data")
    tiny_clip(tmp_path / "weights")
    inputs = ("--data", tmp_path / "data", "--weights", tmp_path / "weights", "--shared", tmp_path / "shared", "--count", 6)
    teacher = f"teacher:{tiny_teacher_folder}"
    for name, model, settings in (("student", world / "student", ()), ("teacher", teacher, ("--steps", 2, "--guidance", 2))):
        done = run_command("evaluate", model, "--protocol", "clip5k_coco17", "--out", tmp_path / name, *inputs, *settings)
        assert done.returncode == 0, done.stderr
        assert "CLIP score (partial)" in done.stdout
    done = run_command("compare", tmp_path / "student", f"its teacher={tmp_path / 'teacher'}", "-o", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "its teacher" in (tmp_path / "report" / "report.md").read_text()
    unread = (
        ("emoji10k-v1", ("--save-pictures",), "the published protocols"), ("emoji10k-v1", ("--teacher", "x"), "dreamsim5k"),
        ("latency", ("--count", 3), "protocols of pictures"), ("latency", ("--list", "validation"), "emoji10k-v1"),
        ("latency", ("--block", 1), "the published protocols"), ("clip5k_coco17", ("--captions", "x"), "a folder of pictures"),
        ("clip5k_coco17", ("--teacher-steps", 3), "dreamsim5k"),
    )  # fmt: skip
    for protocol, option, of in unread:
        refused = run_command("evaluate", world / "student", "--protocol", protocol, "--out", tmp_path / "unread", *option)
        _assert_one_line(refused, f"{option[0]}: is of {of}", "leave it out")
    assert not (tmp_path / "unread").exists()
    (tmp_path / "student" / "mine.json").write_text("{")
    done = run_command("compare", tmp_path / "student", f"its teacher={tmp_path / 'teacher'}", "-o", tmp_path / "report")
    assert done.returncode == 0 and "mine.json: no result of `diffusion2gan evaluate`, left out" in done.stderr
    # What cannot run is said at the end, with the exit code of bad input; what can has been written.
    done = run_command("evaluate", world / "student", "--protocol", "clip5k_coco17,fid5k_coco17", "--out", tmp_path / "student", *inputs)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "diffusion2gan: fid5k_coco17: not everything could run" in done.stderr.splitlines()[-1]
    assert "inception-2015-12-05.pt" in done.stderr and "CLIP score" in done.stdout
    done = run_command(
        "speed", "latency", teacher, "--steps", 1, 3, "--guidance", 2, "--warmup", 1, "--runs", 2, "-o", tmp_path / "speed.json"
    )
    assert done.returncode == 0, done.stderr
    assert "ms an evaluation of the network" in done.stdout
    measured = ("--pairs", world / "store", "--warmup", 1, "--steps", 3, "-o", tmp_path / "training.json")
    done = run_command("speed", "training", world / "recipe.yaml", *measured, "--beside-mse")
    assert done.returncode == 0, done.stderr
    assert "of the squared error's images a second" in done.stdout
    found = json.loads((tmp_path / "training.json").read_text())
    assert [r["distance"] for r in found["results"]] == ["mse", load_recipe(str(world / "recipe.yaml")).loss.distance]
    mse, own = (r["step_memory_mb"] for r in found["results"])
    assert min(mse, own) > 0.1  # the tiny network's activations
    done = run_command(
        "speed", "loss", "embedded", "--side", 8, "--batches", 1, 2, "--decoder", tiny_teacher_folder, "-o", tmp_path / "loss.json"
    )
    assert done.returncode == 0, done.stderr
    assert "4x8x8" in done.stdout
    rows = json.loads((tmp_path / "loss.json").read_text())["results"]
    assert [(r["distance"], r["batch"]) for r in rows] == [(d, b) for b in (1, 2) for d in ("e_latent_lpips", "decode + lpips")]
    # VGG16 at full width is 56 MB, and the decoder comes on top.
    assert all(r["weight_mb"] > 56 for r in rows if r["distance"] == "decode + lpips")


def test_a_preference_study_by_commands(tmp_path: Path) -> None:
    from diffusion2gan.evaluation.preference import load_study, simulate_votes, write_votes

    for k, name in enumerate(("ours", "theirs")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * k, 50 * i, 90)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "ours" / "captions.txt").write_text("a cat\na dog\na red bus\ntwo trees\n")
    study = tmp_path / "study"
    folders = [f"{name}={tmp_path / name}" for name in ("ours", "theirs")]
    done = run_command("preference", "make", *folders, "--out", study, "--votes", 2)
    assert done.returncode == 0, done.stderr
    assert "sheets in" in done.stdout
    write_votes(tmp_path / "votes.jsonl", simulate_votes(load_study(study), {"ours": 1.0, "theirs": 0.0}, seed=0))
    done = run_command("preference", "analyse", study, "--out", tmp_path / "out", "--votes", tmp_path / "votes.jsonl", "--published")
    assert done.returncode == 0, done.stderr
    assert "SIMULATED" in (tmp_path / "out" / "human_2afc-simulated.md").read_text()
    _assert_one_line(run_command("preference", "make", "ours", "--out", study), "expected NAME=FOLDER")
    _assert_one_line(run_command("preference", "serve", tmp_path), "study.json")
    missing = ("preference", "make", *folders, "--out", tmp_path / "other", "--consent", tmp_path / "no-such-file")
    _assert_one_line(run_command(*missing), "--consent", "expected a text file")


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
    _assert_one_line(run_command("generate", tmp_path, "cat", "-o", "cat.jpg"), "expected a name that ends in .png")
    _assert_one_line(
        run_command("simulate", recipe, "--out", tmp_path / "s", "--set", f"teacher.source={tmp_path}"),
        "is not a diffusers folder or hub id of family stable_diffusion",
    )
    _assert_one_line(run_command("simulate", recipe, "--out", recipe), "a file is in the way")
    _assert_one_line(
        run_command("train", recipe, "--pairs", store, "--out", tmp_path / "r", "--set", "training.betas=[1.5, 0.9]"), "training.betas"
    )
    _assert_one_line(run_command("evaluate", tmp_path, "--out", tmp_path / "e"), "emoji10k-v1 scores `embedded`")
    _assert_one_line(run_command("evaluate", tmp_path, "--protocol", "fid", "--out", tmp_path / "e"), "protocol 'fid'")
    _assert_one_line(run_command("evaluate", "embedded", "--quantiser", "trunc", "--out", tmp_path / "e"), "emoji10k-v1 rounds")
    captions = ("--coco17-captions", "amd", "--out", tmp_path / "e")
    _assert_one_line(run_command("evaluate", "embedded", *captions), "no protocol of COCO 2017 is asked for")
    _assert_one_line(run_command("evaluate", world / "run" / "samples", "--protocol", "clip5k_coco17", *captions), "captions of its own")
    _assert_one_line(run_command("compare", world / "student", world / "student"), "holds no evaluation")
    bad = ("compare", f"teacher:{world / 'student'}", "--prompt", "cat", "--guidance", "0.5")
    _assert_one_line(run_command(*bad), "guidance")
    _assert_one_line(run_command("demo", "--out", tmp_path / "d", "--minutes", "1"), "--minutes is 1")
    alike = ("compare", f"s={world / 'student'}", f"s={world / 'student'}", "--prompt", "cat", "-o", tmp_path / "alike.png")
    _assert_one_line(run_command(*alike), "s is the name of two models")
    # Nobody would follow them.
    for idle in (
        ("compare", world / "student", world / "run" / "samples", "--prompt", "cat", "--steps", "4", "-o", tmp_path / "c.png"),
        ("evaluate", "embedded", "--guidance", "3", "--out", tmp_path / "e"),
        ("speed", "latency", world / "student", "--steps", "1", "4"),
    ):
        _assert_one_line(run_command(*idle), "is a student or a folder of pictures, which takes none")
    _assert_one_line(run_command("generate", world / "student", b"caf\xe9".decode(errors="surrogateescape")), "expected text in UTF-8")
    _assert_one_line(run_command("plan", tmp_path / ("long" * 70)), "file name too long; check the path")
    assert tree_digest(world) == before
    assert not (tmp_path / "r").exists()


def test_what_cannot_go_on_does_not_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupted(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusion2gan.pipeline.OneStepPipeline.from_pretrained", interrupted)
    monkeypatch.setattr("diffusion2gan.run.simulate_recipe", interrupted)
    monkeypatch.setattr("diffusion2gan.pairs.maintain.store_noise", interrupted)
    monkeypatch.setattr("diffusion2gan.embedded.build.run_stage", interrupted)
    simulate, store = ["simulate", "demo", "--out", str(tmp_path / "store")], str(tmp_path)
    for arguments in (["generate", "embedded", "cat"], ["embedded", "pack"], ["embedded", "calibrate"]):
        assert cli.main(arguments) == 130
        assert capsys.readouterr().err == "\ndiffusion2gan: interrupted\n", arguments
    for arguments in (simulate, ["embedded", "teacher"], ["pairs", "store-noise", store, "--out", store]):
        assert cli.main(arguments) == 130
        assert capsys.readouterr().err.endswith("interrupted; run the same command again to go on where it stopped\n"), arguments


def test_numbers_that_are_none_name_no_function_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("generate", "embedded", "cat", "-n", "abc"), ("generate", "embedded", "cat", "--seed", "-1")):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{arguments[-1]}: expected a whole number" in said
        assert "_positive" not in said


def _small_disk(path: Path) -> bool:
    path.mkdir()
    return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(path)], capture_output=True, check=False).returncode == 0


def test_full_disk(world: Path, tmp_path: Path) -> None:
    """A real full file system: a checkpoint that does not fit, and shards that fit one by one until they don't."""
    disk = tmp_path / "disk"
    if not _small_disk(disk):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        command = ("train", world / "recipe.yaml", "--pairs", world / "store", "--out", disk / "run")
        _assert_one_line(run_command(*command), "the disk is full")
        simulate = ("simulate", world / "recipe.yaml", "--out", disk / "store", "--set", "pairs.count=240")
        _assert_one_line(run_command(*simulate), "the disk is full")
        assert list((disk / "store").glob("shard-*.arrow"))
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_command(*command).returncode == 0
        assert run_command(*simulate).returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        _assert_one_line(run_command(*command, "--set", "training.steps=14"), "cannot write here")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def _too_large(_: object) -> None:
    torch.empty(1 << 58, dtype=torch.uint8)


def _too_large_for_the_gpu(_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"recipe": "emoji"}, "lower pairs.batch_size or training.micro_batch_size"),
        ({"encode_batch": 32, "batch_size": 64, "resolution": 512}, "lower --encode-batch while it encodes, or --batch-size"),
        ({"batch_size": 32, "count": 4}, "; lower --batch-size"),
        ({"bapps": "x", "resolution": 64}, "; lower --resolution"),
        ({"images": []}, "; give fewer or smaller --images"),
        ({}, "; use a device that has more"),
    ],
)
@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_too_large, "out of host memory (288230376151711744 bytes more were asked for)"),
        (_too_large_for_the_gpu, "out of GPU memory (20.00 GiB more were asked for)"),
    ],
)
def test_too_little_memory_is_one_line(
    work: Callable[[object], None],
    said: str,
    given: dict[str, object],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Parser:
        def parse_args(self, _: object) -> argparse.Namespace:
            return argparse.Namespace(function=work, **given)

    monkeypatch.setattr(cli, "_parser", Parser)
    assert cli.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert advice in line


def test_a_run_stays_with_its_teacher(world: Path, tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    """A teacher retrained in the same folder is another teacher: neither its pairs nor an export may be mixed with the old run."""
    folder = tmp_path / "teacher"
    tiny_pipeline().save_pretrained(folder)
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(folder, prompts_file))
    train = ("train", recipe, "--pairs", tmp_path / "store", "--out", tmp_path / "run")
    assert run_command("simulate", recipe, "--out", tmp_path / "store").returncode == 0
    assert run_command(*train).returncode == 0
    tiny_pipeline(seed=5).save_pretrained(folder)
    _assert_one_line(run_command("simulate", recipe, "--out", tmp_path / "store"), "teacher.weights")
    _assert_one_line(run_command(*train), "pairs.teacher.weights")
    _assert_one_line(run_command("export", tmp_path / "run", tmp_path / "student"), "trained for teacher weights")
    assert run_command("simulate", recipe, "--out", tmp_path / "store2").returncode == 0
    _assert_one_line(run_command("train", recipe, "--pairs", tmp_path / "store2", "--out", tmp_path / "run"), "this run was begun with")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_teachers_make_float32_students(dtype: str, tmp_path: Path, tiny_teacher_folder: Path, prompts_file: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(tiny_teacher_folder, prompts_file, teacher__dtype=dtype))
    assert run_command("simulate", recipe, "--out", tmp_path / "store").returncode == 0
    done = run_command("train", recipe, "--pairs", tmp_path / "store", "--out", tmp_path / "run", "--set", "training.steps=3")
    assert done.returncode == 0, done.stderr
    # The pairs serve a float32 recipe of the same teacher too.
    other = ("--set", "teacher.dtype=float32", "--set", "training.steps=3")
    done = run_command("train", recipe, "--pairs", tmp_path / "store", "--out", tmp_path / "run32", *other)
    assert done.returncode == 0, done.stderr
    assert run_command("export", tmp_path / "run", tmp_path / "student").returncode == 0
    done = run_command("generate", tmp_path / "student", "cat", "-o", tmp_path / "o.png", "--dtype", dtype)
    assert done.returncode == 0, done.stderr


def test_decay_is_not_undone_by_more_steps(world: Path, tmp_path: Path) -> None:
    train = ("train", world / "recipe.yaml", "--pairs", world / "store", "--out", tmp_path / "run", "--set", "training.decay_steps=6")
    assert run_command(*train).returncode == 0
    _assert_one_line(run_command(*train, "--set", "training.steps=20"), "already falling")


def test_import_is_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import diffusion2gan, sys; print(time.perf_counter() - t); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1


def test_every_public_name_resolves() -> None:
    import diffusion2gan

    for name in diffusion2gan.__all__:
        assert getattr(diffusion2gan, name) is not None
    with pytest.raises(AttributeError):
        diffusion2gan.nothing  # noqa: B018


def test_a_crash_of_a_library_says_where() -> None:
    code = (
        "import os, signal; from diffusion2gan import cli\n"
        "def simulate(_): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "cli._simulate = simulate; cli.entry()"
    )
    crashed = subprocess.run(
        [sys.executable, "-c", code, "simulate", "emoji", "--out", "store"], capture_output=True, text=True, check=False
    )
    assert crashed.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in crashed.stderr and "in simulate" in crashed.stderr
