"""Recipes beside each other on one pair store: trains, exports and scores each, then a table and a picture.

    python benchmarks/ablation.py ablations/mse ablations/pseudo_huber --seeds 0 1 2 --store runs/pairs --out runs/table1

Protocol emoji10k-v1; teacher, untrained and reference features are computed once, in OUT/shared. The same command again
goes on where it stopped, and another one with the same OUT adds its rows: all recipes with one seed, say, then some with more.
Writes OUT/table.md, OUT/table.json and OUT/pictures.png; where recipes have two seeds or more in common also
OUT/differences.md: each recipe minus the first one, or (--neighbours) minus the one before it, seed by seed, with Student's 95 %
interval of the mean difference; and OUT/spread.md: mean and standard deviation over the seeds. Seeds change the order of the pairs
and all draws; the pairs and the start are the same. Of a training that stopped itself the last good average is scored.

    python benchmarks/ablation.py table2/regression table2/scratch ... --neighbours --set generator.start=runs/emoji --store ... --out ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from diffusion2gan.benchmark import evaluate_student
from diffusion2gan.device import default_device
from diffusion2gan.errors import TrainingStoppedError
from diffusion2gan.evaluation.emoji10k import drawn_prompt_list, noise_seeds
from diffusion2gan.files import write_bytes_atomic, write_json
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.images import grid, png_bytes
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline, teacher_pictures
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.run import export_run, train_recipe
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

COLUMNS = [
    "row",
    "seed",
    "images seen",
    "s a step",
    "gap closed",
    "FD(student, T_B)",
    "FD_inf ratio",
    "retrieval",
    "own / other noise",
    "diversity",
    "prompt agreement",
    "precision",
    "recall",
    "held-out MSE",
]


COMPARED = ("gap closed", "FD(student, T_B)", "FD_inf ratio", "retrieval", "diversity", "prompt agreement", "held-out MSE")


def row_name(recipe: str) -> str:
    return recipe.rpartition("/")[2]


def row_folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace('/', '-')}-seed{seed}"


def one_row(name: str, seed: int, overrides: list[str], store: Path, out: Path, shared: Path, list_name: str) -> dict[str, Any]:
    """Trains, exports and scores one recipe; what is already there is not done again."""
    recipe = load_recipe(name, [*overrides, f"training.seed={seed}"])
    folder = row_folder(out, name, seed)
    steps, stopped = recipe.total_steps, None
    try:
        train_recipe(recipe, store, folder / "run")
    except TrainingStoppedError as error:
        if error.good_step is None:
            raise
        steps, stopped = error.good_step, str(error)
        print(f"{name}, seed {seed}: {stopped}", flush=True)
    # A student of fewer steps than the run now has is of another row.
    card = folder / "student" / STUDENT_FILE
    scores = folder / list_name / "emoji10k-v1.json"
    if not card.exists() or json.loads(card.read_text())["steps"] != steps:
        # In this order: a kill between the two must not leave another student's scores.
        shutil.rmtree(scores.parent, ignore_errors=True)
        export_run(folder / "run", folder / "student", "float32", step=steps)
    result = json.loads(scores.read_text()) if scores.exists() else evaluate_student(folder / "student", scores.parent, shared, list_name)
    told = read_scalars(folder / "run" / "metrics.jsonl")
    held_out = [r["validation_mse"] for r in told if "validation_mse" in r and r["step"] <= steps]
    seconds = [
        (recipe.samples(r["step"]) - recipe.samples(r["step"] - 1)) / r["images_per_second"] for r in told if "images_per_second" in r
    ]
    # The mean, for steps with R1 are few and slow; without those in which something was compiled.
    usual = [s for s in seconds if s < 3 * statistics.median(seconds)]
    whole, kept = result["scores"]["all"], result["preservation"]
    row = [
        row_name(name),
        seed,
        recipe.samples(steps),
        statistics.mean(usual),
        whole["gap_closed"],
        whole["fd_student_TB"],
        whole["fd_inf_ratio"],
        kept["retrieval"]["mean"],
        kept["ratio"],
        result["diversity"]["ratio"],
        whole["prompt_agreement"]["student"]["mean"],
        whole["precision_student"],
        whole["recall_student"],
        held_out[-1] if held_out else None,
    ]
    settings: dict[str, Any] = {"list": list_name, "set": overrides, "stopped": stopped}
    return dict(zip(COLUMNS, row, strict=True)) | {"floors": result["floors"], "sha256": result["sha256"]} | settings


def earlier_rows(path: Path, list_name: str, overrides: list[str]) -> list[dict[str, Any]]:
    """The rows that earlier calls left. Ends the program if they are of another list or other settings."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        if (row["list"], row["set"]) != (list_name, overrides):
            raise SystemExit(
                f"{path}: {row['row']} is of --list {row['list']} --set {row['set']}, expected --list {list_name} --set {overrides}; "
                "choose another --out"
            )
    return rows


def differences(rows: list[dict[str, Any]], names: list[str], neighbours: bool = False) -> list[list[Any]]:
    """Of every recipe of `names` but the first: the mean over seeds of (its value - the first or previous recipe's at that seed), with
    the interval in which Student's t puts the mean in 95 % of cases. Left out with less than two seeds in common."""
    values = {(r["row"], r["seed"]): r for r in rows}
    table = []
    for other, name in itertools.pairwise(names) if neighbours else ((names[0], n) for n in names[1:]):
        seeds = sorted({s for row, s in values if row == name} & {s for row, s in values if row == other})
        if len(seeds) < 2:
            continue
        cells: list[Any] = [f"{name} - {other}", len(seeds)]
        for column in COMPARED:
            pairs = [(values[name, s][column], values[other, s][column]) for s in seeds]
            if any(None in pair for pair in pairs):
                cells.append("-")  # too few pictures for it
                continue
            d = np.array([ours - theirs for ours, theirs in pairs])
            half = student_t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5
            cells.append(f"{d.mean():+.4g} ({d.mean() - half:+.4g} to {d.mean() + half:+.4g})")
        table.append(cells)
    return table


def spread(rows: list[dict[str, Any]], names: list[str]) -> list[list[Any]]:
    """Of every recipe of `names` with two seeds or more: mean and standard deviation over them, and how many stopped themselves."""
    table = []
    for name in names:
        found = [r for r in rows if r["row"] == name]
        if len(found) > 1:
            values = [[r[column] for r in found] for column in COMPARED]
            cells = ["-" if None in v else f"{statistics.mean(v):.4g} ({statistics.stdev(v):.2g})" for v in values]
            table.append([name, len(found), sum(r.get("stopped") is not None for r in found), *cells])
    return table


def side_by_side(names: list[str], seed: int, overrides: list[str], out: Path, count: int) -> None:
    """The teacher, the untrained one step and every row's student from the same noises, on the validation list."""
    recipe = load_recipe(names[0], overrides)
    teacher = load_teacher(recipe.teacher, default_device())
    assert isinstance(teacher, StableDiffusionTeacher)
    chosen = [p for p in drawn_prompt_list("validation") if p.stratum == "coarse"][:count]
    prompts, seeds = [p.prompt for p in chosen], noise_seeds("validation", "B", count)
    untrained = OneStepGenerator.from_teacher(teacher, GeneratorConfig()).requires_grad_(False).eval()
    rows = [
        ("teacher", teacher_pictures(OdeSolver(teacher, recipe.pairs.ode), prompts, seeds)),
        ("untrained", OneStepPipeline(teacher, untrained).generate(prompts, seeds)),
    ]
    for name in names:
        student = OneStepPipeline.from_pretrained(row_folder(out, name, seed) / "student", "float32", default_device())
        rows.append((row_name(name), student.generate(prompts, seeds)))
    pictures = np.concatenate([images for _, images in rows])
    captions = [*prompts, *[""] * (len(pictures) - count)]
    write_bytes_atomic(out / "pictures.png", png_bytes(grid(pictures, count, captions, [label for label, _ in rows])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=None, help="features that other evaluations left (default: OUT/shared)")
    parser.add_argument("--list", choices=("test", "validation"), default="test")
    parser.add_argument("--set", action="append", default=[], help="an override of every row, such as training.steps=100")
    parser.add_argument("--neighbours", action="store_true", help="differences from the recipe before, not from the first")
    parser.add_argument("--pictures", type=int, default=12)
    a = parser.parse_args()
    rows = earlier_rows(a.out / "table.json", a.list, a.set)
    # All recipes of one seed before the next: an interrupted table compares like with like.
    for seed, name in itertools.product(a.seeds, a.recipes):
        new = one_row(name, seed, a.set, a.store, a.out, a.shared or a.out / "shared", a.list)
        # Read again: another call, beside this one, may have added its own.
        rows = earlier_rows(a.out / "table.json", a.list, a.set)
        rows = [r for r in rows if (r["row"], r["seed"]) != (new["row"], seed)] + [new]
        table = markdown_table(COLUMNS, [[r[c] for c in COLUMNS] for r in rows])
        write_bytes_atomic(a.out / "table.md", table.encode())
        write_json(a.out / "table.json", rows)
        print(table, flush=True)
    compared = differences(rows, [row_name(n) for n in a.recipes], a.neighbours)
    if compared:
        text = markdown_table(["difference", "seeds", *COMPARED], compared)
        write_bytes_atomic(a.out / "differences.md", text.encode())
        print(text)
    if of_seeds := spread(rows, [row_name(n) for n in a.recipes]):
        text = markdown_table(["row", "seeds", "stopped", *COMPARED], of_seeds)
        write_bytes_atomic(a.out / "spread.md", text.encode())
        print(text)
    side_by_side(a.recipes, a.seeds[0], a.set, a.out, a.pictures)


if __name__ == "__main__":
    main()
