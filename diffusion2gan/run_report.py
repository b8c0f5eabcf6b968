"""Training runs on one page: pictures, curves, numbers. Reads run folders alone, and loads no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe, dump_recipe, load_recipe
from diffusion2gan.report import Page, curves, discriminator_picture
from diffusion2gan.run_log import read_scalars

_GRIDS = 4
"""Sample grids of a run on the page: the first, the last, and those between that are evenly apart."""
_WIDEST = 2000
"""Pixels of a picture on the page; the run's folder has it whole."""
_POINTS = 60
"""Of a curve; what lies between is averaged."""


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    name: str
    folder: Path
    recipe: Recipe
    rows: Sequence[Mapping[str, Any]]
    pairs: Mapping[str, Any]
    """The manifest of the pairs; empty where the run says nothing of them."""

    @property
    def step(self) -> int:
        return max((r["step"] for r in self.rows), default=0)

    def course(self, column: str) -> tuple[list[float], list[float]]:
        """(thousands of images seen, values) of a column of the metrics, averaged to at most 60 points."""
        told = [(self.recipe.samples(r["step"]) / 1000, r[column]) for r in self.rows if column in r]
        parts = np.array_split(np.array(told, float).reshape(-1, 2), min(_POINTS, max(len(told), 1)))
        means = [part.mean(0) for part in parts if len(part)]
        return [float(m[0]) for m in means], [float(m[1]) for m in means]

    def last(self, column: str) -> float | None:
        return next((r[column] for r in reversed(self.rows) if column in r), None)

    def grids(self) -> list[Path]:
        """Some of the pictures of held-out pairs, in the order of their steps."""
        found = sorted((self.folder / "samples").glob("held-out-*.png"))
        chosen = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(_GRIDS, len(found)))})
        return [found[i] for i in chosen]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Raises UserError for a folder that is no run, or of one that has told nothing yet."""
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: no run (no recipe.yaml); name a folder that `diffusion2gan train` wrote to --out")
    rows = read_scalars(folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"{folder}: this run has told nothing yet (no rows in metrics.jsonl); look again when it has gone further")
    inputs = folder / "inputs.json"
    pairs = json.loads(inputs.read_text())["pairs"] if inputs.exists() else {}
    return Run(name or folder.resolve().name, folder, load_recipe(str(folder / "recipe.yaml")), rows, pairs)


def write_run_report(folders: Sequence[Path], out: Path) -> None:
    """Writes one HTML page of the runs in `folders` to `out`: it opens offline. Raises UserError for a folder that is no run."""
    folders = list(dict.fromkeys(f.resolve() for f in folders))
    same_name = len({f.name for f in folders}) < len(folders)
    runs = [read_run(f, str(f) if same_name else None) for f in folders]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    page = Page(title, "Held-out pairs: the teacher's pictures above those of the student's average, from the same noise and prompt.")
    page.table(*_table(runs))
    page.picture(loss_picture(runs), "The regression loss; of held-out pairs, which are never trained on, by the average")
    if len({r.recipe.loss.distance for r in runs}) > 1:
        page.text("The runs have different losses, whose values cannot be compared; the squared error below can.")
    page.picture(_of_runs(runs, "validation_mse", "held-out squared error"), "The squared error of held-out pairs, whatever the loss is")
    for run in runs:
        page.heading(run.name)
        page.text(run.recipe.description)
        for path in run.grids():
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
            picture.thumbnail((_WIDEST, _WIDEST))
            page.picture(picture, f"step {int(path.stem.rpartition('-')[2])}")
        if any("discriminator" in r for r in run.rows):
            page.picture(discriminator_picture(run.rows), "How the discriminator did (docs/training.md says what a healthy one looks like)")
        page.picture(_of_runs([run], "gradient_norm", "norm of G's gradient, before it is cut", log_y=True), "G's gradient")
        if any("offset" in r for r in run.rows):
            page.picture(_of_runs([run], "offset", "offset of a batch", log_y=True), "What all of a batch's latents are shifted by alike")
        page.code(dump_recipe(run.recipe))
    page.write(out)


def loss_picture(runs: Sequence[Run]) -> Image.Image:
    """The regression loss over the images seen: of training and held out; of several runs held out alone."""
    if len(runs) > 1:
        return _of_runs(runs, "validation_loss", "held-out loss")
    series = {"training": runs[0].course("loss"), "held out (average)": runs[0].course("validation_loss")}
    return curves({k: v for k, v in series.items() if v[0]}, "thousands of images", runs[0].recipe.loss.distance)


def _of_runs(runs: Sequence[Run], column: str, label: str, log_y: bool = False) -> Image.Image:
    courses = {run.name: run.course(column) for run in runs}
    return curves({k: v for k, v in courses.items() if v[0]}, "thousands of images", label, log_y)


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    columns = ["run", "recipe", "distance", "pairs", "steps", "images seen", "images/s", "held-out loss", "held-out MSE"]
    rows: list[list[Any]] = []
    for run in runs:
        speed = [r["images_per_second"] for r in run.rows if "images_per_second" in r]
        made_of = [run.recipe.name, run.recipe.loss.distance, run.pairs.get("count")]
        amounts = [f"{run.step:,} of {run.recipe.total_steps:,}", f"{run.recipe.samples(run.step):,}"]
        held_out = [run.last("validation_loss"), run.last("validation_mse")]
        rows.append([run.name, *made_of, *amounts, float(np.median(speed)) if speed else None, *held_out])
    return columns, rows
