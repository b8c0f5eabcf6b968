"""The page about training runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import load_recipe
from diffusion2gan.run_report import Run, read_run, write_run_report
from tests.helpers import recipe_values, run_command, trained_from_scratch
from tests.test_report import Links


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_folder: Path, prompts_file: Path) -> Path:
    """12 steps of 4 and 2 of 2, with D; pictures at steps 6, 12 and 14."""
    folder = tmp_path_factory.mktemp("reported")
    values = recipe_values(tiny_teacher_folder, prompts_file, description="a tiny run", adversarial={"steps": 2, "batch_size": 2})
    trained_from_scratch(values, folder)
    return folder / "run"


def test_a_run_on_one_page(run: Path, tmp_path: Path) -> None:
    write_run_report([run], tmp_path / "page.html")
    text, links = (tmp_path / "page.html").read_text(), Links()
    links.feed(text)
    last = read_run(run).last("validation_mse")
    assert last is not None
    for expected in ("a tiny run", "<td>14 of 14</td>", "<td>52</td>", "<td>24</td>", f"<td>{last:.4g}</td>", "seed: 0"):
        assert expected in text, expected
    # Losses, squared error, gradient, offset and D, beside the grids.
    assert links.tags.count("img") == 5 + len(list((run / "samples").glob("held-out-*.png")))
    assert all(s.startswith("data:image/png;base64,") for s in links.sources)


def test_runs_beside_each_other_and_a_run_that_goes_on(run: Path, tmp_path: Path) -> None:
    """A run that was just begun has a row and no more."""
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (begun / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    done = run_command("report", run, begun, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    assert "2 runs" in text and "<td>begun</td>" in text and "1 of 14" in text
    assert run_command("report", begun).returncode == 0
    assert (begun / "report.html").exists()


def test_a_curve_is_averaged(run: Path) -> None:
    rows = [{"step": i, "loss": float(i)} for i in range(1, 13)] + [{"step": 13, "loss": 100.0}]
    short = Run("r", run, load_recipe(str(run / "recipe.yaml")), rows, {})
    x, y = short.course("loss")
    # Twelve steps of 4 samples, then one of 2.
    assert x == pytest.approx([0.004 * i for i in range(1, 13)] + [0.05]) and y == [*range(1, 13), 100.0]
    long = Run("r", run, short.recipe, [{"step": i, "loss": float(i % 2)} for i in range(3000)], {})
    x, y = long.course("loss")
    assert len(x) == 60 and y == pytest.approx([0.5] * 60)
    assert short.course("nothing") == ([], [])


def test_what_is_no_run_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run .no recipe.yaml."):
        read_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="has told nothing yet"):
        read_run(tmp_path)
