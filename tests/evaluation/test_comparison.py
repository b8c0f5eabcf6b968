"""Evaluated models side by side: who is best, prompt by prompt, and what is not comparable."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.commands import compare_command, drawn_side_by_side
from diffusion2gan.evaluation.comparison import COPIED, duels, lines, read_evaluation, sample_grid, write_comparison
from diffusion2gan.evaluation.evaluate import FORMAT, describe, keep_samples
from diffusion2gan.evaluation.models import Model, ModelOptions


def evaluated(folder: Path, fid: float, clip: list[float], block: int = 0, n: int = 5000, side: int = 16) -> Path:
    """A folder as `evaluate` leaves it."""
    describe(folder, folder.name, {"subject": folder.name})
    common = {"format": FORMAT, "partial": False, "n": n, "prompts": {"name": "coco17", "sha256": "0" * 64}, "noise": {"block": block}}
    entry = {"metric": "FID", "variant": "res256", "better": "lower", "value": fid, "interval95": [fid - 1, fid + 1]}
    (folder / "fid5k_coco17.json").write_text(json.dumps(common | {"protocol": "fid5k_coco17", "results": [entry], "notes": []}))
    (folder / "values").mkdir()
    np.save(folder / "values" / "clip.npy", np.array(clip, np.float32))
    entry = {"metric": "CLIP score", "variant": "gigagan", "better": "higher", "value": float(np.mean(clip)), "values": "values/clip.npy"}
    (folder / "clip5k_coco17.json").write_text(
        json.dumps(common | {"protocol": "clip5k_coco17", "results": [entry], "notes": ["one odd thing"]})
    )
    pictures = [np.full((side, side, 3), 20 * i, np.uint8) for i in range(6)]
    keep_samples(folder / "samples" / "coco17", pictures, [f"prompt {i}" for i in range(6)], 0)
    return folder


def test_a_report_of_two_models(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "alpha", 20.0, [0.3, 0.3, 0.2, 0.4])
    b = evaluated(tmp_path / "beta", 25.0, [0.2, 0.1, 0.3, 0.4], side=32)
    models = [read_evaluation(a), read_evaluation(b, "renamed")]
    table = lines(models)
    best = {line.metric: line.best() for line in table}
    assert best == {"FID": 0, "CLIP score": 0}
    (duel,) = duels(models, table)
    assert (duel.wins, duel.losses) == (2, 1)  # the fourth prompt is a tie
    assert duel.difference == pytest.approx(0.05)
    assert duel.p == 1.0
    assert duel.interval95[0] <= 0.05 <= duel.interval95[1]

    markdown = write_comparison(models, tmp_path / "out")
    assert "**20** [19, 21]" in markdown and "FID (res256) ↓" in markdown
    assert f"SDXL-Turbo, 1 step {COPIED} | fid5k_coco17 | FID | 28.1 |" in markdown
    assert "copied from the paper named, not measured here" in markdown
    assert "clip5k_coco17, alpha: one odd thing" in markdown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "renamed" in page and "20 (best)" in page and "data:image/png" in page and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "out" / "coco17.png").exists()
    picture = sample_grid(models, "coco17")
    assert picture is not None and sample_grid(models, "nothing") is None


def test_other_noises_are_no_duel_and_are_said(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 20.0, [0.3, 0.2]), evaluated(tmp_path / "b", 21.0, [0.2, 0.3], block=1, n=100)
    models = [read_evaluation(a), read_evaluation(b)]
    assert list(duels(models, lines(models))) == []
    markdown = write_comparison(models, tmp_path / "out")
    assert "fid5k_coco17: the models drew from other noises" in markdown
    assert "fid5k_coco17: the models were evaluated with other numbers of pictures" in markdown
    # 20 beats 21, but not of another number of pictures.
    assert "**" not in markdown and all(line.best() is None for line in lines(models))


def test_other_scoring_weights_are_not_comparable(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 20.0, [0.3, 0.2]), evaluated(tmp_path / "b", 21.0, [0.2, 0.3])
    path = b / "clip5k_coco17.json"
    content = json.loads(path.read_text())
    content["results"][0]["network"] = {"weights": {"sha256": "another"}}
    path.write_text(json.dumps(content))
    models = [read_evaluation(a), read_evaluation(b)]
    assert list(duels(models, lines(models))) == []
    assert "clip5k_coco17: the models were evaluated with other scoring networks" in write_comparison(models, tmp_path / "out")


@pytest.mark.parametrize(("first", "second", "same"), [("round", "trunc", False), ("round", "as found", True), ("trunc", "trunc", True)])
def test_another_rounding_is_another_measurement(tmp_path: Path, first: str, second: str, same: bool) -> None:
    folders = [evaluated(tmp_path / name, value, [0.3, 0.2]) for name, value in (("a", 20.0), ("b", 21.0))]
    for folder, quantiser in zip(folders, (first, second), strict=True):
        path = folder / "fid5k_coco17.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantiser": quantiser}))
    models = [read_evaluation(folder) for folder in folders]
    line = next(line for line in lines(models) if line.metric == "FID")
    assert line.best() == (0 if same else None)
    assert ("other roundings to uint8" in write_comparison(models, tmp_path / "out")) is not same


def test_a_metric_that_one_model_lacks_leaves_a_dash(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 20.0, [0.3, 0.2]), evaluated(tmp_path / "b", 21.0, [0.2, 0.3])
    (b / "fid5k_coco17.json").unlink()
    models = [read_evaluation(a), read_evaluation(b)]
    line = next(line for line in lines(models) if line.metric == "FID")
    assert line.best() is None
    assert "| 20 [19, 21] | - |" in write_comparison(models, tmp_path / "out")


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", 20.0, [0.3, 0.2])
    with pytest.raises(UserError, match="holds no evaluation"):
        read_evaluation(tmp_path)
    with pytest.raises(UserError, match="different names"):
        write_comparison([read_evaluation(a), read_evaluation(a)], tmp_path / "out")
    describe(tmp_path / "begun", "begun", {"subject": "x"})
    with pytest.raises(UserError, match="no protocol has finished"):
        read_evaluation(tmp_path / "begun")


def test_grids_are_at_the_smaller_size(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path / "a", 1.0, [0.1], side=100), evaluated(tmp_path / "b", 1.0, [0.1], side=200)
    picture = sample_grid([read_evaluation(a), read_evaluation(b)], "coco17", columns=3)
    assert picture is not None
    assert picture.height < 300
    assert Image.open(tmp_path / "b" / "samples" / "coco17" / "00000.png").size == (200, 200)


def test_names_of_folders_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ModelOptions()
    evaluated(Path("gamma=5"), 20.0, [0.3, 0.2])
    evaluated(Path("b"), 19.0, [0.3, 0.2])
    (Path("b") / "notes.json").write_text("[1]")
    compare_command(["gamma=5", "second=b"], [], Path("cmp-v0.5"), options)
    report = (Path("cmp-v0.5") / "report.md").read_text()
    assert "gamma=5" in report and "second" in report
    for name in ("report.html", "a.png"):
        with pytest.raises(UserError, match=r"a report is a folder, expected a name without \.(html|png)$"):
            compare_command(["gamma=5", "b"], [], Path(name), options)
    with pytest.raises(UserError, match=r"grid.jpg: a report is a folder, expected a name without .jpg, or a .png"):
        compare_command(["elsewhere"], ["a cat"], Path("grid.jpg"), options)


def test_models_are_drawn_with_one_after_the_other() -> None:
    """Two that fit one by one need not fit together."""
    alive: list[weakref.ref[object]] = []

    class Network:
        def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    def made(name: str) -> Model:
        network = Network()
        alive.append(weakref.ref(network))
        return Model(name, {}, network.draw, facts={"ode": {"guidance": 7.0}})

    def models() -> Iterator[Model]:
        for name in ("a", "b", "c"):
            assert not any(reference() is not None for reference in alive)
            yield made(name)

    picture, seconds = drawn_side_by_side(models(), ["a", "b", "c"], ["cat"], seed=0, count=2)
    assert len(alive) == len(seconds) == 3
    assert picture.startswith(b"\x89PNG")
