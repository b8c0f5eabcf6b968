from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffusion2gan.demo import NOISES, PROMPTS, Speed, plan
from diffusion2gan.images import grid
from diffusion2gan.pairs.prompts import PromptsConfig, read_prompts
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import Page, cell, curves, markdown_table
from diffusion2gan.teachers.ode import SolverConfig, evaluations_per_pair


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attributes if k in ("src", "href")]


def test_a_page_is_one_file_and_escapes_everything(tmp_path: Path) -> None:
    page = Page("<script>alert(1)</script>", "a & b")
    page.heading("<b>")
    page.text("<i>")
    page.code("</pre><script>")
    page.table(["<th>"], [["<td>"], [0.123456], [None]])
    page.picture(grid(np.zeros((2, 8, 8, 3), np.uint8), 2), 'a "caption" <img>')
    page.write(tmp_path / "report.html")
    links = Links()
    links.feed((tmp_path / "report.html").read_text())
    assert "script" not in links.tags
    assert links.tags.count("img") == 1
    assert all(s.startswith("data:image/png;base64,") for s in links.sources)


def test_cells_and_markdown() -> None:
    assert [cell(v) for v in (0.123456, None, 3, "a")] == ["0.1235", "-", "3", "a"]
    assert markdown_table(["a|b", "c"], [["x|y", 1.0]]).splitlines()[-1] == "| x\\|y | 1 |"


def test_curves_draw_what_they_are_given() -> None:
    empty = curves({}, "step", "loss")
    drawn = curves({"loss": ([0, 1, 2], [3.0, 2.0, 1.0])}, "step", "loss")
    assert empty.size == drawn.size
    assert np.abs(np.asarray(empty, float) - np.asarray(drawn, float)).sum() > 0


def test_grid_places_pictures_row_by_row() -> None:
    images = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (10, 20, 30)])
    pixels = np.asarray(grid(images, 2))
    assert pixels[6, 6, 0] == 10
    assert pixels[6, 6 + 12, 0] == 20
    assert pixels[6 + 12, 6, 0] == 30


@pytest.mark.parametrize("minutes", [3, 10, 60])
def test_the_demo_plans_within_its_time(minutes: float) -> None:
    recipe, judged, speed = load_recipe("demo"), SolverConfig(), Speed(evaluations=140, training_samples=50)
    amounts = plan(recipe, speed, minutes, judged)
    seconds = amounts["pairs"] * evaluations_per_pair(recipe.pairs.ode) / speed.evaluations
    seconds += amounts["steps"] * recipe.training.batch_size / speed.training_samples
    seconds += len(PROMPTS) * NOISES * evaluations_per_pair(judged) / speed.evaluations
    assert seconds < max(60 * minutes, 200)
    assert amounts["pairs"] % recipe.pairs.shard_size == 0
    faster = plan(recipe, Speed(1400, 500), minutes, judged)
    assert faster["pairs"] >= amounts["pairs"]
    assert faster["steps"] >= amounts["steps"]


def test_embedded_prompts_are_the_benchmarks_mixture() -> None:
    prompts = read_prompts(PromptsConfig(), 400, seed=3)
    assert prompts == read_prompts(PromptsConfig(), 800, seed=3)[:400]
    assert prompts != read_prompts(PromptsConfig(), 400, seed=4)
    assert all(p.strip() for p in prompts)
    assert 60 < len(set(prompts)) < 400
