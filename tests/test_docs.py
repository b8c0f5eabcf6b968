"""What the documents tell a reader to type can be typed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import diffusion2gan
from diffusion2gan.cli import _parser
from diffusion2gan.recipe import builtin_recipes

ROOT = Path(diffusion2gan.__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "diffusion2gan" / "recipes" / "README.md"]


def _command_lines(text: str) -> list[str]:
    """Indented and fenced lines, continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    fenced = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", joined, re.M | re.S))
    lines = [line[4:] for line in joined.splitlines() if line.startswith("    ")] + fenced.splitlines()
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in lines]


def _of_ours(line: str) -> list[str] | None:
    """The arguments of a `diffusion2gan` command, however it is started; None for any other line."""
    found = re.match(r"(?:[A-Z0-9_]+=\S+ +)*(?:(?:torchrun|accelerate launch|python)\b.*? (?:-m )?)?diffusion2gan (?=[a-z])(.*)", line)
    return shlex.split(re.split(r" \| | > | && ", found[1])[0]) if found else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_commands_can_be_typed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in _command_lines(path.read_text()):
        arguments = _of_ours(line)
        if arguments is None:
            continue
        # What stands for several words, or for what may be left away.
        arguments = [a for a in arguments if a not in ("...", "[...]")]
        try:
            _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{path.name}: {line!r}: {capsys.readouterr().err.strip().splitlines()[-1]}")


def test_there_are_commands() -> None:
    found = [a for path in DOCUMENTS for line in _command_lines(path.read_text()) if (a := _of_ours(line))]
    assert len(found) > 25
    assert {a[0] for a in found} >= {"simulate", "train", "export", "generate", "evaluate", "compare", "plan", "perceptual", "pairs"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_what_is_named_is_there(path: Path) -> None:
    text = path.read_text()
    for script in re.findall(r"\b((?:benchmarks|examples)/[\w/]+\.(?:py|sh|sbatch))\b", text):
        assert (ROOT / script).is_file(), f"{path.name}: {script}"
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link and not link.startswith("mailto:"):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    for result in re.findall(r"\bbenchmarks/results/\w+\.json", text):
        assert (ROOT / result).is_file(), f"{path.name}: {result}"


def test_the_table_of_recipes_has_all_of_them() -> None:
    text = (ROOT / "diffusion2gan" / "recipes" / "README.md").read_text()
    told: set[str] = set()
    for name in re.findall(r"`([\w/{},]+)`", text):
        start, _, rest = name.partition("{")
        choices, _, end = rest.partition("}")
        told |= {f"{start}{choice}{end}" for choice in choices.split(",")}
    # `base` recipes are there to be built on.
    assert not [name for name in builtin_recipes() if name not in told]
    assert len(told & set(builtin_recipes())) > 30


def test_figure_3_is_the_results_file() -> None:
    rows = {r["distance"]: r for r in json.loads((ROOT / "benchmarks/results/figure3.json").read_text())}
    text = (ROOT / "docs/reproduction.md").read_text().partition("## Figure 3")[2]
    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| ")]
    told = {name.replace(", Eq. 2", ""): (float(error), float(psnr)) for name, error, psnr in cells[2:]}
    assert told.keys() == rows.keys()
    for name, (error, psnr) in told.items():
        assert error == pytest.approx(rows[name]["latent RMSE"], rel=0.01)
        assert psnr == pytest.approx(rows[name]["PSNR, dB"], abs=0.06)
    nearer = [rows["latent_lpips"]["latent RMSE"] / r["latent RMSE"] for name, r in rows.items() if name.startswith("e_latent_lpips")]
    assert 14.5 < min(nearer) < 15.5 and 50 <= max(nearer) < 55  # "15 to 50 times nearer"


def _doc_rows(section: str) -> dict[str, list[str]]:
    """Of the first table in a section of docs/reproduction.md: first cell -> the others."""
    text = (ROOT / "docs/reproduction.md").read_text().partition(f"\n{section}\n")[2]
    table = text[text.index("\n| ") + 1 :].partition("\n\n")[0]
    cells = [[c.strip(" *") for c in line.strip("| ").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in cells}


# As columns of a table are headed there -> the key in the results file.
_KEYS = {
    "gap closed": "gap closed",
    "FD to T_B": "FD(student, T_B)",
    "FD_inf ratio": "FD_inf ratio",
    "retrieval": "retrieval",
    "prompt agreement": "prompt agreement",
    "precision": "precision",
    "recall": "recall",
    "precision / recall": "precision recall",
    "diversity": "diversity",
    "held-out MSE": "held-out MSE",
    "s a step": "s a step",
}


def _check_row(heads: list[str], told: list[str], row: dict[str, float]) -> None:
    for head, cell in zip(heads, told, strict=True):
        key = _KEYS.get(head)
        parts = [] if key is None else [("precision", cell.split("/")[0]), ("recall", cell.split("/")[1])] if "/" in head else [(key, cell)]
        for name, value in parts:
            digits = value.strip().removesuffix("%").strip()
            found = row[name] * (100 if value.strip().endswith("%") else 1)
            step = 10.0 ** -len(digits.partition(".")[2])
            assert float(digits) == pytest.approx(found, abs=0.501 * step), (head, cell, found)


@pytest.mark.parametrize(
    ("section", "head", "names"),
    [
        ("## Table 1", "distance", {n: n for n in ("mse", "pseudo_huber", "e_latent_lpips", "l1", "latent_lpips", "lpips")}),
        (
            "### Letter sets",
            "letters",
            {"none": "latent_lpips", "bgo": "e_latent_lpips", "bgo, 4x the batch (235 steps of 256)": "e_latent_lpips_4x_batch"}
            | {"bgo, the mean of 4 draws": "e_latent_lpips_4_draws"}
            | {n: f"e_latent_lpips_{n}" for n in ("b", "g", "bg", "go", "bgc", "bgco")},
        ),
        (
            "### More pairs, the same images",
            "pairs",
            {"1,000": "pairs_1k", "4,000": "pairs_4k", "16,000": "pairs_16k", "191,744": "e_latent_lpips"},
        ),
        (
            "## Table 2",
            "row",
            {
                "regression alone, trained on": "regression",
                "+ D from scratch (GigaGAN's manner)": "scratch",
                "+ diffusion D instead": "diffusion",
                "+ it sees z": "noise",
                "+ R1": "r1",
                "+ multi-scale in and out": "multi_scale",
                "+ mix-and-match": "mix_and_match",
            },
        ),
    ],
)
def test_tables_are_their_results_files(section: str, head: str, names: dict[str, str]) -> None:
    file = "table2.json" if section == "## Table 2" else "table1.json"
    results = {r["row"]: r for r in json.loads((ROOT / "benchmarks/results" / file).read_text()) if r["seed"] == 0}
    rows = _doc_rows(section)
    for name, key in names.items():
        _check_row(rows[head], rows[name], results[key])


def test_table_1_with_three_seeds_is_its_results_file() -> None:
    text = (ROOT / "docs/reproduction.md").read_text()
    lines = text[text.index("\n| | FD, mean (standard deviation)") :].partition("\n\n")[0].strip().splitlines()[2:]
    results = json.loads((ROOT / "benchmarks/results/table1.json").read_text())
    before = None
    for line in lines:
        name, fd, gap, difference = (c.strip() for c in line.strip("|").split("|"))
        rows = {r["seed"]: r for r in results if r["row"] == name.removesuffix(" (bgo)") and r["seed"] < 3}
        values = np.array([rows[seed]["FD(student, T_B)"] for seed in range(3)])
        assert fd == f"{values.mean():.1f} ({values.std(ddof=1):.1f})"
        assert gap == f"{np.mean([r['gap closed'] for r in rows.values()]):.3f}"
        if before is not None:
            apart = values - before
            half = 4.3027 * apart.std(ddof=1) / 3**0.5  # Student's t of two degrees of freedom
            assert difference == f"{apart.mean():+.1f} ({apart.mean() - half:+.1f} to {apart.mean() + half:+.1f})"
        before = values
    assert len(lines) == 6
