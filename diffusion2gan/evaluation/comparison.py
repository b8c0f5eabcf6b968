"""Several evaluated models beside one another: their numbers, who wins, published rows, and what they drew from the same noises.

Reads only what `evaluate` wrote. Loads no network.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.emoji10k import PROTOCOL as EMOJI
from diffusion2gan.evaluation.evaluate import FORMAT, spread
from diffusion2gan.evaluation.metrics import bootstrap_interval
from diffusion2gan.evaluation.protocols import PUBLISHED
from diffusion2gan.evaluation.statistics import sign_test
from diffusion2gan.files import json_object, write_bytes_atomic
from diffusion2gan.images import at_smallest_side, grid, png_bytes
from diffusion2gan.report import Page, cell, markdown_table

COPIED = "†"
SHOWN_COLUMNS = 8


@dataclass(frozen=True)
class Evaluated:
    """What a folder written by `evaluate` holds. `results`: protocol -> its JSON. `samples`: set -> (caption, picture)."""

    name: str
    folder: Path
    results: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Sequence[tuple[str, Path]]]


def read_evaluation(folder: Path, name: str | None = None) -> Evaluated:
    """Raises UserError for a folder that holds no evaluation."""
    described = folder / "model.json"
    if not described.is_file():
        raise UserError(f"{folder}: holds no evaluation (no model.json); name a folder written by `diffusion2gan evaluate --out`")
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json_object(path)
        except UserError:
            warnings.warn(f"{path}: no result of `diffusion2gan evaluate`, left out", stacklevel=1)
            continue
        if content.get("format") == FORMAT:
            results[content["protocol"]] = content
        elif content.get("protocol") == EMOJI:
            results[EMOJI] = content | {
                "results": emoji_entries(content),
                "n": content["count"],
                "prompts": content["sha256"],
                "teacher": content["identities"]["teacher"],
                "noise": {"protocol": EMOJI, "list": content["list"]},
            }
    if not results:
        raise UserError(f"{folder}: no protocol has finished there; run `diffusion2gan evaluate` to its end")
    samples: dict[str, list[tuple[str, Path]]] = {}
    for picture in sorted((folder / "samples").glob("*/*.png")):
        caption = picture.with_suffix(".txt")
        samples.setdefault(picture.parent.name, []).append((caption.read_text() if caption.exists() else "", picture))
    return Evaluated(name or folder.name, folder, results, samples)


def emoji_entries(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of `emoji10k-v1` as entries of a result."""
    scores, kept, diversity = result["scores"]["all"], result["preservation"], result["diversity"]
    agreement = scores["prompt_agreement"]["student"]
    entries: list[dict[str, Any]] = [
        {"metric": "gap closed", "value": scores["gap_closed"], "better": "higher"},
        {"metric": "FD-EffNet to the teacher's", "value": scores["fd_student_TB"], "better": "lower"},
        {"metric": "precision", "value": scores["precision_student"], "better": "higher"},
        {"metric": "recall", "value": scores["recall_student"], "better": "higher"},
        {"metric": "prompt agreement", "value": agreement["mean"], "interval95": agreement["interval95"], "better": "higher"},
        {
            "metric": "retrieval of the own noise",
            "value": kept["retrieval"]["mean"],
            "interval95": kept["retrieval"]["interval95"],
            "better": "higher",
        },
        {"metric": "distance to own / other noise", "value": kept["ratio"], "better": "lower"},
        {
            "metric": "diversity within a prompt",
            "value": diversity["student"]["mean"],
            "interval95": diversity["student"]["interval95"],
            "better": "higher",
        },
    ]
    if "fd_inf_ratio" in scores:
        entries.insert(2, {"metric": "FD_inf to R_rec", "value": scores["fd_inf_Rrec_student"]["fd_inf"], "better": "lower"})
    # Results from before these were kept have none.
    values = result.get("values", {})
    return [{"variant": "all", "values": values.get(e["metric"]), **e} for e in entries if e["value"] is not None]


@dataclass(frozen=True)
class Line:
    """One metric of one protocol: an entry for each model, None where it has none. `differences`: what keeps them from being
    comparable, besides the noises."""

    protocol: str
    metric: str
    variant: str
    entries: Sequence[Mapping[str, Any] | None]
    differences: Sequence[str] = ()

    @property
    def better(self) -> str | None:
        return next((e.get("better") for e in self.entries if e), None)

    def best(self) -> int | None:
        """The model with the best value, when two or more have one, the metric has a better end, and they are comparable."""
        known = [(i, e["value"]) for i, e in enumerate(self.entries) if e]
        if len(known) < 2 or self.better is None or self.differences:
            return None
        return (min if self.better == "lower" else max)(known, key=lambda p: p[1])[0]


def lines(models: Sequence[Evaluated]) -> list[Line]:
    """All metrics that any of the models has, protocol by protocol."""
    keys = dict.fromkeys(
        (protocol, e["metric"], e["variant"])
        for m in models
        for protocol, result in m.results.items()
        for e in result["results"]
    )  # fmt: skip
    return [Line(*key, [_entry(m, *key) for m in models], _what_differs(models, *key)) for key in keys]


def _what_differs(models: Sequence[Evaluated], protocol: str, metric: str, variant: str) -> list[str]:
    """What two values of a row must have in common, and have not."""
    found: dict[str, set[str]] = {}
    for model in models:
        entry = _entry(model, protocol, metric, variant)
        if entry is None:
            continue
        result = model.results[protocol]
        prompts = result.get("prompts") or {}
        reference = {k: v for k, v in (result.get("reference") or {}).items() if k != "name"}
        inputs = {
            "numbers of pictures": result.get("n"),
            "prompts": prompts.get("captions_sha256", prompts),
            "reference pictures": reference,
            "teachers": result.get("teacher"),
            "scoring networks": entry.get("network"),
        }
        if result.get("quantiser", "as found") != "as found":
            inputs["roundings to uint8"] = result["quantiser"]
        for what, value in inputs.items():
            found.setdefault(what, set()).add(json.dumps(value, sort_keys=True))
    return [what for what, values in found.items() if len(values) > 1]


def _entry(model: Evaluated, protocol: str, metric: str, variant: str) -> Mapping[str, Any] | None:
    entries = model.results.get(protocol, {}).get("results", [])
    return next((e for e in entries if (e["metric"], e["variant"]) == (metric, variant)), None)


def _values(model: Evaluated, entry: Mapping[str, Any]) -> np.ndarray | None:
    """What each picture or prompt got, where the metric has such a thing."""
    path = model.folder / entry["values"] if entry.get("values") else None
    return np.load(path, allow_pickle=False) if path and path.exists() else None


@dataclass(frozen=True)
class Duel:
    """Two models on one metric, prompt by prompt: the mean difference (first minus second) with its 95 % interval by a paired
    bootstrap, the share of prompts that the first wins (ties dropped), and the sign test's p."""

    first: str
    second: str
    line: Line
    difference: float
    interval95: tuple[float, float]
    wins: int
    losses: int
    p: float


def duels(models: Sequence[Evaluated], table: Sequence[Line]) -> Iterator[Duel]:
    """Every pair of models on every metric that both have prompt by prompt, from the same prompts and noises."""
    for line in table:
        for i in range(len(models)):
            for j in range(i + 1, len(models)):
                a, b = line.entries[i], line.entries[j]
                if not (a and b and line.better) or not _same_noises(models[i], models[j], line):
                    continue
                x, y = _values(models[i], a), _values(models[j], b)
                if x is None or y is None or len(x) != len(y):
                    continue
                sign = -1 if line.better == "lower" else 1
                wins, losses = int((sign * (x - y) > 0).sum()), int((sign * (x - y) < 0).sum())
                names = models[i].name, models[j].name
                yield Duel(*names, line, float((x - y).mean()), bootstrap_interval(x - y), wins, losses, sign_test(wins, losses))


def _same_noises(a: Evaluated, b: Evaluated, line: Line) -> bool:
    first, second = (m.results[line.protocol].get("noise") for m in (a, b))
    pair = [a, b]
    return first is not None and first == second and not _what_differs(pair, line.protocol, line.metric, line.variant)


def _notes(models: Sequence[Evaluated], table: Sequence[Line]) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    for protocol in dict.fromkeys(p for m in models for p in m.results):
        having = [m for m in models if protocol in m.results]
        for what in dict.fromkeys(w for line in table if line.protocol == protocol for w in line.differences):
            notes.append(
                f"{protocol}: the models were evaluated with other {what}; their numbers are not comparable, and none is called best"
            )
        if len({json.dumps(m.results[protocol].get("noise"), sort_keys=True) for m in having}) > 1:
            notes.append(f"{protocol}: the models drew from other noises; nothing is compared picture by picture")
        notes += [f"{protocol}, {m.name}: {note}" for m in having for note in m.results[protocol].get("notes", [])]
        notes += [
            f"{protocol}, {m.name}: partial, {m.results[protocol]['n']} pictures" for m in having if m.results[protocol].get("partial")
        ]
    return notes


def _shown(entry: Mapping[str, Any] | None, is_best: bool, bold: bool) -> str:
    if entry is None:
        return "-"
    text = cell(float(entry["value"]))
    text = f"**{text}**" if is_best and bold else f"{text} (best)" if is_best else text
    text += " (too few pictures)" if entry.get("debug") else ""
    low_high = entry.get("interval95")
    if low_high:
        return f"{text} [{low_high[0]:.4g}, {low_high[1]:.4g}]"
    of_blocks = spread(entry)
    return f"{text} ({of_blocks})" if of_blocks else text


def _rows(models: Sequence[Evaluated], table: Sequence[Line], bold: bool) -> list[list[Any]]:
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    return [
        [line.protocol, f"{line.metric} ({line.variant}){arrows[line.better]}"]
        + [_shown(e, line.best() == i, bold) for i, e in enumerate(line.entries)]
        for line in table
    ]


def sample_grid(models: Sequence[Evaluated], samples: str, columns: int = SHOWN_COLUMNS) -> Image.Image | None:
    """The first pictures of a set, a row for each model, all from the same prompts and noises. None without pictures."""
    having = [m for m in models if m.samples.get(samples)]
    if not having:
        return None
    count = min(columns, *(len(m.samples[samples]) for m in having))
    pictures = [[np.asarray(Image.open(path).convert("RGB")) for _, path in m.samples[samples][:count]] for m in having]
    rows, side = at_smallest_side(pictures)
    captions = [caption for m in having for caption, _ in m.samples[samples][:count]]
    return grid(np.concatenate(rows), count, captions=captions, row_labels=[m.name for m in having], scale=max(1, 96 // side))


def _what_rows_share(models: Sequence[Evaluated], samples: str) -> str:
    """Of the pictures shown: evaluations of one protocol and noise block draw the same prompts from the same noises."""
    having = [m for m in models if m.samples.get(samples)]
    captions = {tuple(caption for caption, _ in m.samples[samples][:SHOWN_COLUMNS]) for m in having}
    noises = {json.dumps(r.get("noise"), sort_keys=True) for m in having for r in m.results.values() if r.get("prompts")}
    if len(captions) > 1:
        return "each row with its own prompts"
    return "the same prompts and noises in every row" if len(noises) == 1 and "null" not in noises else "the same prompts in every row"


def write_comparison(models: Sequence[Evaluated], out: Path) -> str:
    """Writes `out/report.html` (one file, opens offline), `out/report.md` and the grids; returns the Markdown.
    Raises UserError for fewer than two models or two of one name."""
    names = [m.name for m in models]
    if len(models) < 2 or len(set(names)) < len(names):
        raise UserError(f"models {', '.join(names)}: expected two or more of different names; give NAME=FOLDER to name them")
    table = lines(models)
    columns, duel_columns = ["protocol", "metric", *names], ["metric", "first", "second", "first - second", "95 %", "first wins", "p"]
    found = [
        [
            f"{d.line.metric} ({d.line.variant})", d.first, d.second, d.difference, f"{d.interval95[0]:.4g} to {d.interval95[1]:.4g}",
            f"{d.wins} of {d.wins + d.losses}", d.p,
        ]
        for d in duels(models, table)
    ]  # fmt: skip
    present = {(line.protocol, line.metric) for line in table}
    published = [[f"{p.name} {COPIED}", p.protocol, p.metric, p.value, p.source] for p in PUBLISHED if (p.protocol, p.metric) in present]
    pictures = {s: sample_grid(models, s) for s in dict.fromkeys(s for m in models for s in m.samples)}
    notes = _notes(models, table)

    page = Page(" / ".join(names), "Numbers with 95 % intervals where the metric has one; (best) marks the best value of a row.")
    text = [f"# {' / '.join(names)}\n", markdown_table(columns, _rows(models, table, bold=True))]
    page.table(columns, _rows(models, table, bold=False))
    for samples, picture in pictures.items():
        if picture is not None:
            caption = f"{samples}: {_what_rows_share(models, samples)}"
            page.picture(picture, caption)
            write_bytes_atomic(out / f"{samples}.png", png_bytes(picture))
            text.append(f"![{caption}]({samples}.png)\n")
    if found:
        page.heading("Prompt by prompt")
        page.table(duel_columns, found)
        text += ["## Prompt by prompt\n", markdown_table(duel_columns, found)]
    if published:
        said = f"{COPIED} copied from the paper named, not measured here."
        page.heading("Published")
        page.text(said)
        page.table(["model", "protocol", "metric", "value", "source"], published)
        text += ["## Published\n", f"{said}\n", markdown_table(["model", "protocol", "metric", "value", "source"], published)]
    if notes:
        page.heading("Notes")
        for note in notes:
            page.text(note)
        text += ["## Notes\n", "\n".join(f"- {n}" for n in notes) + "\n"]
    markdown = "\n".join(text)
    page.write(out / "report.html")
    write_bytes_atomic(out / "report.md", markdown.encode())
    return markdown
