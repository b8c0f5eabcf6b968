"""Recipes beside each other on one pair store: trains, exports and scores each, then a table and a picture.

    python benchmarks/ablation.py ablations/mse ablations/pseudo_huber --store runs/pairs --out runs/table1

Protocol emoji10k-v1; teacher, untrained and reference features are computed once, in OUT/shared. The same command again
goes on where it stopped. Writes OUT/table.md, OUT/table.json and OUT/pictures.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.benchmark import evaluate_student
from diffusion2gan.compare import teacher_pictures
from diffusion2gan.device import default_device
from diffusion2gan.evaluation.emoji10k import drawn_prompt_list, noise_seeds
from diffusion2gan.files import write_bytes_atomic
from diffusion2gan.generator import GeneratorConfig, OneStepGenerator
from diffusion2gan.images import grid, png_bytes
from diffusion2gan.pipeline import STUDENT_FILE, Student
from diffusion2gan.recipe import load_recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.run import export_run, train_recipe
from diffusion2gan.run_log import read_scalars
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher

COLUMNS = [
    "row",
    "images seen",
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


def one_row(name: str, overrides: list[str], store: Path, out: Path, shared: Path, list_name: str) -> dict[str, Any]:
    """Trains, exports and scores one recipe; what is already there is not done again."""
    recipe = load_recipe(name, overrides)
    folder = out / name.replace("/", "-")
    train_recipe(recipe, store, folder / "run")
    # A student of fewer steps than the run now has is of another row.
    card = folder / "student" / STUDENT_FILE
    scores = folder / list_name / "emoji10k-v1.json"
    if not card.exists() or json.loads(card.read_text())["steps"] != recipe.training.steps:
        export_run(folder / "run", folder / "student", "float32")
        shutil.rmtree(scores.parent, ignore_errors=True)
    result = json.loads(scores.read_text()) if scores.exists() else evaluate_student(folder / "student", scores.parent, shared, list_name)
    held_out = [r["validation_mse"] for r in read_scalars(folder / "run" / "metrics.jsonl") if "validation_mse" in r]
    whole, kept = result["scores"]["all"], result["preservation"]
    row = [
        name.removeprefix("ablations/"),
        recipe.training.steps * recipe.training.batch_size,
        whole["gap_closed"],
        whole["fd_student_TB"],
        whole["fd_inf_ratio"],
        kept["retrieval"]["mean"],
        kept["ratio"],
        result["diversity"]["ratio"],
        whole["prompt_agreement"]["student"]["mean"],
        whole["precision_student"],
        whole["recall_student"],
        held_out[-1],
    ]
    return dict(zip(COLUMNS, row, strict=True)) | {"floors": result["floors"], "sha256": result["sha256"], "list": list_name}


def side_by_side(names: list[str], overrides: list[str], out: Path, count: int) -> None:
    """The teacher, the untrained one step and every row's student from the same noises, on the validation list."""
    recipe = load_recipe(names[0], overrides)
    teacher = load_teacher(recipe.teacher, default_device())
    assert isinstance(teacher, StableDiffusionTeacher)
    chosen = [p for p in drawn_prompt_list("validation") if p.stratum == "coarse"][:count]
    prompts, seeds = [p.prompt for p in chosen], noise_seeds("validation", "B", count)
    untrained = OneStepGenerator.from_teacher(teacher, GeneratorConfig()).requires_grad_(False).eval()
    rows = [
        ("teacher", teacher_pictures(OdeSolver(teacher, recipe.pairs.ode), prompts, seeds)),
        ("untrained", Student(teacher, untrained).generate(prompts, seeds)),
    ]
    for name in names:
        student = Student.from_pretrained(out / name.replace("/", "-") / "student", "float32", default_device())
        rows.append((name.removeprefix("ablations/"), student.generate(prompts, seeds)))
    pictures = np.concatenate([images for _, images in rows])
    captions = [*prompts, *[""] * (len(pictures) - count)]
    write_bytes_atomic(out / "pictures.png", png_bytes(grid(pictures, count, captions, [label for label, _ in rows])))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=None, help="features that other evaluations left (default: OUT/shared)")
    parser.add_argument("--list", choices=("test", "validation"), default="test")
    parser.add_argument("--set", action="append", default=[], help="an override of every row, such as training.steps=100")
    parser.add_argument("--pictures", type=int, default=12)
    a = parser.parse_args()
    rows = []
    for name in a.recipes:
        rows.append(one_row(name, a.set, a.store, a.out, a.shared or a.out / "shared", a.list))
        table = markdown_table(COLUMNS, [[r[c] for c in COLUMNS] for r in rows])
        write_bytes_atomic(a.out / "table.md", table.encode())
        write_bytes_atomic(a.out / "table.json", (json.dumps(rows, indent=1) + "\n").encode())
        print(table, flush=True)
    side_by_side(a.recipes, a.set, a.out, a.pictures)


if __name__ == "__main__":
    main()
