"""Several noise blocks of one model: what is pooled, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation import commands
from diffusion2gan.evaluation.blocks import pool_blocks
from diffusion2gan.evaluation.commands import evaluate_command
from diffusion2gan.evaluation.comparison import read_evaluation, write_comparison
from diffusion2gan.evaluation.models import ModelOptions, folder_model
from tests.evaluation.test_evaluate import small_coco, small_shards, toy_model
from tests.evaluation.test_extractors import tiny_clip, tiny_inception_ts

__all__ = ["small_shards"]
PROTOCOLS = ["clip5k_coco17", "fid5k_coco17"]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    for make in (tiny_inception_ts, tiny_clip):
        make(tmp_path / "weights")
    monkeypatch.setattr(commands, "load_model", lambda spec, options: toy_model(spec, shift=9 * (spec == "brighter")))
    return {"data": small_coco(tmp_path / "coco"), "weights": tmp_path / "weights"}


def _evaluate(spec: str, out: Path, inputs: dict[str, Path], blocks: int | None = None, block: int = 0) -> str:
    options = ModelOptions(device="cpu")
    return evaluate_command(
        spec, PROTOCOLS, out, None, options, **inputs, teacher=None, teacher_options=options, block=block, blocks=blocks
    )


def test_means_over_noise_blocks(tmp_path: Path, inputs: dict[str, Path]) -> None:
    table = _evaluate("toy", tmp_path / "three", inputs, blocks=3)
    assert "over 3 noise blocks, best" in table
    for protocol in PROTOCOLS:
        pooled = json.loads((tmp_path / "three" / f"{protocol}.json").read_text())
        assert pooled["noise"]["block"] == [0, 1, 2]
        assert len(set(pooled["pictures_sha256"])) == 3
        # A block is what it is alone.
        _evaluate("toy", tmp_path / "alone", inputs, block=1)
        alone = json.loads((tmp_path / "alone" / f"{protocol}.json").read_text())
        for entry, one in zip(pooled["results"], alone["results"], strict=True):
            assert entry["blocks"][1] == one["value"]
            assert entry["value"] == pytest.approx(np.mean(entry["blocks"]))
            assert entry["standard_deviation"] == pytest.approx(np.std(entry["blocks"], ddof=1)) and entry["standard_deviation"] > 0
            assert entry["best"] == (min if entry["better"] == "lower" else max)(entry["blocks"])
            assert "interval95" not in entry and "values" not in entry
    # The same again, and beside another model.
    before = (tmp_path / "three" / "fid5k_coco17.json").read_text()
    _evaluate("toy", tmp_path / "three", inputs, blocks=3)
    assert (tmp_path / "three" / "fid5k_coco17.json").read_text() == before
    _evaluate("brighter", tmp_path / "other", inputs, blocks=3)
    report = write_comparison([read_evaluation(tmp_path / n) for n in ("three", "other")], tmp_path / "report")
    assert "over 3 noise blocks" in report and "same prompts and noises in every row" in report


def test_blocks_of_other_inputs_are_not_pooled(tmp_path: Path, inputs: dict[str, Path]) -> None:
    _evaluate("toy", tmp_path, inputs, blocks=2)
    assert (tmp_path / "fid5k_coco17.json").exists()
    path = tmp_path / "block-1" / "fid5k_coco17.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n": 3}))
    why = pool_blocks(tmp_path, PROTOCOLS, [0, 1])
    assert list(why) == ["fid5k_coco17"] and "evaluated with other n" in why["fid5k_coco17"]
    # The one from before would be taken for this one.
    assert not (tmp_path / "fid5k_coco17.json").exists() and (tmp_path / "clip5k_coco17.json").exists()
    path.unlink()
    assert pool_blocks(tmp_path, ["fid5k_coco17"], [0, 1]) == {"fid5k_coco17": "noise block 1 has no result"}


def test_blocks_that_make_no_sense_are_refused(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--blocks 1: one block needs no mean"):
        _evaluate("toy", tmp_path / "out", inputs, blocks=1)
    _evaluate("toy", tmp_path / "out", inputs, blocks=2)
    with pytest.raises(UserError, match=r"evaluated there with blocks \[0, 1\], now \[0, 1, 2\]"):
        _evaluate("toy", tmp_path / "out", inputs, blocks=3)
    assert not (tmp_path / "out" / "block-2").exists()  # said before anything is drawn
    for block in (-1, 127):
        with pytest.raises(UserError, match=f"--block {block} --blocks 2: expected blocks within 0 to 127"):
            _evaluate("toy", tmp_path / "far", inputs, blocks=2, block=block)
    assert not (tmp_path / "far").exists()
    with pytest.raises(UserError, match="evaluated there with blocks .*, now without it"):
        _evaluate("toy", tmp_path / "out", inputs)
    pictures = folder_model(inputs["data"] / "val2017", "pictures", None)
    monkeypatch.setattr(commands, "load_model", lambda spec, options: pictures)
    with pytest.raises(UserError, match="is a folder of pictures, whose noises are past choosing"):
        _evaluate("pictures", tmp_path / "of-pictures", inputs, blocks=3)
