"""The scripts of `benchmarks/` run, and what they compute from measurements is right."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.recipe import load_recipe, parse_recipe
from diffusion2gan.run import simulate_recipe
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.training.adversarial import Adversary
from diffusion2gan.training.state import checkpoints, load_state
from tests.helpers import ROOT, recipe_values, trained_from_scratch, write_recipe


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script finds its neighbours as `python benchmarks/NAME.py` does."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def _script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("one_step", ["--batches", "1", "--repeats", "1"]),
        ("simulate", ["--batch", "2", "--steps", "2", "--repeats", "2"]),
        ("solver_distance", ["--count", "4", "--reference-steps", "100"]),
        ("student_dtypes", ["--count", "4", "--student", "WHOLE"]),
        ("training_step", ["--batch", "2", "--repeats", "1", "--r1-every", "4"]),
        ("largest_batch", ["--most", "2", "--repeats", "1"]),
        ("few_steps", ["--count", "2", "--steps", "1", "2"]),
        ("pair_store", ["--pairs", "256", "--seconds", "0.1"]),
        ("evaluation_memory", ["--counts", "8", "16"]),
    ],
)
def test_scripts_write_what_they_measured(
    name: str, arguments: list[str], tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "result.json"
    given = [str(tmp_path / "whole") if a == "WHOLE" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", [name, *given, "--out", str(out)])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    numbers = list(_numbers(json.loads(out.read_text())))
    assert numbers and all(math.isfinite(value) for value in numbers)


def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published configurations of the random teachers with few channels and layers."""
    import random_teachers  # type: ignore[import-not-found]

    text = random_teachers._text_config
    monkeypatch.setattr(random_teachers, "_text_config", lambda hidden, _layers, _heads: text(hidden, 1, 1))
    vae = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    small = {"sample_size": 8, "layers_per_block": 1}
    for which in ("SD15", "SDXL"):
        depths = {"transformer_layers_per_block": 1} if which == "SDXL" else {}
        published = getattr(random_teachers, which)
        channels = (32, 32, 64, 64)[: len(published.unet["block_out_channels"])]
        unet = {**published.unet, **small, **depths, "block_out_channels": channels, "attention_head_dim": 4}
        monkeypatch.setattr(random_teachers, which, replace(published, unet=unet, vae={**published.vae, **vae}))


@pytest.mark.parametrize(
    ("name", "network", "arguments"),
    [
        ("training_step", "sd15", ["--batch", "2", "--repeats", "1"]),
        ("largest_batch", "sdxl", ["--most", "2", "--repeats", "1"]),
        ("simulate", "sd15", ["--batch", "2", "--steps", "2", "--repeats", "2"]),
        ("simulate", "sdxl", ["--batch", "2", "--steps", "2", "--repeats", "2"]),
        ("one_step", "sd15", ["--batches", "1", "--repeats", "1"]),
        ("one_step", "sdxl", ["--batches", "1", "--repeats", "1", "--skip-teacher"]),
    ],
)
def test_scripts_run_on_the_published_networks(
    name: str, network: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow ones of their classes, small pictures: what a GPU is measured with must not fail there for the first time."""
    _narrow(monkeypatch)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", [name, "--network", network, *arguments, "--out", str(out)])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    numbers = list(_numbers(json.loads(out.read_text())))
    assert numbers and all(math.isfinite(value) for value in numbers)


def _numbers(value: Any, key: str = "") -> Iterator[float]:
    """All numbers of a result, none of whose parts may have failed."""
    assert key != "error", value
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_ratios_of_the_perceptual_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _narrow(monkeypatch)
    script, out = _script("perceptual"), tmp_path / "result.json"
    monkeypatch.setitem(script["main"].__globals__, "SHAPES", {"tiny": (4, 8, 8)})
    monkeypatch.setattr(
        sys, "argv", ["perceptual", "--batches", "1", "--repeats", "1", "--precision", "float32", "bfloat16", "--unet", "--out", str(out)]
    )
    script["main"]()
    result = json.loads(out.read_text())
    assert not [row for row in result["rows"] if "error" in row]
    of = {row["method"]: row for row in result["rows"] if row["precision"] == "float32"}
    theirs = {"latent_lpips": "package, no augmentation", "e_latent_lpips bg": "package bg"}
    in_bf16 = {row["method"]: row for row in result["ratios"] if row["precision"] == "bfloat16"}
    half = next(r for r in result["rows"] if (r["method"], r["precision"]) == ("latent_lpips", "bfloat16"))
    assert in_bf16["latent_lpips"]["package float32, time"] == pytest.approx(of["package, no augmentation"]["ms"] / half["ms"])
    ratios = {row["method"]: row for row in result["ratios"] if row["precision"] == "float32"}
    # The default letters have no counterpart in the package, but in decode + LPIPS.
    assert ratios["e_latent_lpips bgo"]["package, time"] is None
    assert ratios["e_latent_lpips bgo"]["decode + lpips, time"] == pytest.approx(
        of["decode + lpips"]["ms"] / of["e_latent_lpips bgo"]["ms"]
    )
    for name, other in theirs.items():
        assert ratios[name]["package, time"] == pytest.approx(of[other]["ms"] / of[name]["ms"])
        assert ratios[name]["package, MB"] == pytest.approx(of[other]["MB"] / of[name]["MB"])
        assert ratios[name]["U-Net step, time"] == pytest.approx(of["sd15 U-Net"]["ms"] / of[name]["ms"])


def test_random_teachers_are_the_published_ones() -> None:
    """Parameters of SD 1.5's and SDXL's U-Nets; nothing is allocated on the meta device."""
    script = _script("random_teachers")
    for name, millions in (("random_unet", 859.5), ("random_sdxl_unet", 2567.5)):
        assert sum(p.numel() for p in script[name]("meta").parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_differences_of_seeds() -> None:
    script = _script("ablation")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2))
    rows = [
        {"row": row, "seed": seed} | {c: float(values[seed, k]) for c in script["COMPARED"]}
        for seed in range(3)
        for k, row in enumerate(("mse", "e_latent_lpips"))
    ]
    # A fourth seed that only one of them has, and a row of one seed, take no part.
    alone = [rows[0] | {"seed": 3}, rows[0] | {"row": "l1"}]
    ((label, count, *cells),) = script["differences"]([*rows, *alone], ["mse", "e_latent_lpips", "l1"])
    assert (label, count) == ("e_latent_lpips - mse", 3)
    d = values[:, 1] - values[:, 0]
    interval = stats.ttest_rel(values[:, 1], values[:, 0]).confidence_interval(0.95)
    assert cells == [f"{d.mean():+.4g} ({interval.low:+.4g} to {interval.high:+.4g})"] * len(script["COMPARED"])
    three = [
        r | {"row": name} | {c: r[c] + shift for c in script["COMPARED"]}
        for r in rows[::2]
        for name, shift in (("a", 0), ("b", 1), ("c", 3))
    ]
    assert [c[0] for c in script["differences"](three, ["a", "b", "c"])] == ["b - a", "c - a"]
    neighbours = script["differences"](three, ["a", "b", "c"], neighbours=True)
    assert [(c[0], c[2][:2]) for c in neighbours] == [("b - a", "+1"), ("c - b", "+2")]
    assert script["differences"](three, ["c", "a"], neighbours=True)[0][0] == "a - c"


def test_spread_over_seeds() -> None:
    script = _script("ablation")
    rows = [
        {"row": name, "seed": seed, "stopped": "step 3: ..." if (name, seed) == ("b", 1) else None}
        | dict.fromkeys(script["COMPARED"], value)
        for name, values in (("a", [1.0, 2.0, 3.0]), ("b", [5.0, 5.0]), ("c", [7.0]))
        for seed, value in enumerate(values)
    ]
    rows[0]["FD_inf ratio"] = None
    (a, b) = script["spread"](rows, ["a", "b", "c"])
    assert a == ["a", 3, 0, *["-" if c == "FD_inf ratio" else "2 (1)" for c in script["COMPARED"]]]
    assert b == ["b", 2, 1, *["5 (0)"] * len(script["COMPARED"])]


def test_a_row_that_stops_itself_is_scored_where_it_was_good(tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    """And does so again when the same command is repeated: the study goes on."""
    adversarial = {"steps": 60, "learning_rate": 3.0, "warmup_steps": 0, "r1": "none"}
    values = recipe_values(tiny_teacher_folder, prompts_file, training__steps=0, adversarial=adversarial)
    simulate_recipe(parse_recipe(values, "tiny"), tmp_path / "store", progress=False)
    recipe = write_recipe(tmp_path / "wild.yaml", values)
    script = _script("ablation")
    scored: list[int] = []

    def scores(student: Path, out: Path, *_: object) -> dict[str, Any]:
        scored.append(json.loads((student / "diffusion2gan.json").read_text())["steps"])
        whole = {"prompt_agreement": {"student": {"mean": 0.5}}}
        whole |= dict.fromkeys(("gap_closed", "fd_student_TB", "fd_inf_ratio", "precision_student", "recall_student"), 0.5)
        preservation = {"retrieval": {"mean": 0.5}, "ratio": 0.5}
        return {"scores": {"all": whole}, "preservation": preservation, "diversity": {"ratio": 0.5}, "floors": {}, "sha256": ""}

    script["one_row"].__globals__["evaluate_student"] = scores
    arguments = (str(recipe), 0, [], tmp_path / "store", tmp_path / "out", tmp_path / "shared", "validation")
    first, again = (script["one_row"](*arguments) for _ in range(2))
    assert "stopped before the update" in first["stopped"] and first["images seen"] == 4 * scored[0] < 240
    assert scored == [scored[0]] * 2 and again["images seen"] == first["images seen"]


def test_a_kind_of_step_that_does_not_fit_leaves_the_others(tiny_embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, out = _script("training_step"), tmp_path / "result.json"
    monkeypatch.setattr(Adversary, "_r1", lambda *_: torch.empty(1 << 58, dtype=torch.uint8))
    monkeypatch.setattr(sys, "argv", ["training_step", "--batch", "2", "--repeats", "1", "--out", str(out)])
    script["main"]()
    for row in json.loads(out.read_text())["rows"]:
        assert row["phase 1, s"] > 0 and row["phase 2, MB"] > 0
        assert "288230376151711744 bytes" in row["phase 2, with R1, error"]
        assert "phase 2 : phase 1, time" not in row


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 48, 63, 64, 100, 1000])
def test_the_largest_batch_is_found(limit: int) -> None:
    script, most = _script("largest_batch"), 200
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = script["largest"](fits, most)
    assert found <= limit and max(tried) <= most
    assert min(limit, most) - found <= found // 16
    assert len(tried) <= 14


def test_what_a_runs_discriminator_sees(
    tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversarial = {"steps": 2, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}
    values = recipe_values(tiny_teacher_folder, prompts_file, training__steps=1, adversarial=adversarial)
    trained_from_scratch(values, tmp_path)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["what_d_sees", str(tmp_path / "run"), str(tmp_path / "store"), "--draws", "60", "--out", str(out)])
    script = _script("what_d_sees")
    script["main"]()
    found = json.loads(out.read_text())
    assert found["step"] == 3 and found["count"] == 4
    assert set(found["below_real"]) == {"generated", "other_latent", "other_text", "other_noise"}
    assert 0 <= found["generated_own_noise_above_another"] <= 1
    a, b = torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([0.0, 2.0, 4.0, 5.0])
    assert script["share_above"](a, b) == 1.5 / 4 and script["share_above"](a, a) == 0.5
    # In expectation a short difference is the gradient.
    of = {row["sigma"]: row for row in found["r1"]}
    assert of["exact"]["mean |grad s|^2"] > 0
    assert of[0.01]["of the exact one"] == pytest.approx(1, abs=5 * of[0.01]["standard error of the ratio"])
    partners = script["partners"]
    assert partners(["a", "a", "b"], False).tolist() == [1, 2, 0]
    assert partners(["a", "a", "b"], True).tolist() == [2, 2, 0]


@pytest.mark.parametrize("phases", [1, 2])
def test_how_far_a_step_of_g_goes(
    phases: int, tiny_teacher_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first step Adam's move is the rate itself wherever there was a gradient."""
    adversarial = {"steps": 1, "learning_rate": 1e-3, "discriminator_learning_rate": 1e-3} if phases == 2 else None
    values = recipe_values(tiny_teacher_folder, prompts_file, training__steps=1, adversarial=adversarial)
    trained_from_scratch(values, tmp_path)
    out = tmp_path / "result.json"
    arguments = ["step_of_g", str(tmp_path / "run"), str(tmp_path / "store"), "--rate", "0.01", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    script = _script("step_of_g")
    script["main"]()
    found = json.loads(out.read_text())
    assert found["step"] == phases and found["rate"] == 0.01
    # (x - a constant) and the constant are at right angles.
    for row in found["moves"]:
        assert row["change of x"] ** 2 == pytest.approx(row["one constant a channel"] ** 2 + row["the rest"] ** 2, rel=1e-4, abs=1e-12)
    assert {r["layers"] for r in found["moves"]} >= {"all", "conv_in", "conv_out", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert [len(v) for v in found["off"].values()] == [4, 4]
    assert (found["mean_score"] is None) == (phases == 1)
    recipe = load_recipe(str(tmp_path / "run" / "recipe.yaml"))
    state = load_state(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    generator = OneStepGenerator.from_teacher(load_teacher(recipe.teacher), recipe.generator)
    for name, change in script["adam_step"](state, generator, 0.01).items():
        assert change.abs().max() <= 0.01 * 1.001, name
        assert change.abs().median() > 0.009 or "attentions" in name or "bias" in name, name
