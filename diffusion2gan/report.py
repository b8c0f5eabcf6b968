"""Results to one self-contained HTML page (it opens offline) and to Markdown tables. Loads no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion2gan.files import write_bytes_atomic
from diffusion2gan.images import png_bytes

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d7dce3; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .35rem .8rem; border-bottom: 1px solid #e4e8ee; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { background: #f4f6f9; }
img { max-width: 100%; height: auto; image-rendering: auto; } figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: #5a6575; font-size: .9rem; }
pre { background: #f4f6f9; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class Page:
    """An HTML report, written part by part. All text is escaped; pictures are inside the file."""

    def __init__(self, title: str, subtitle: str = ""):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(subtitle)}</p>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(v))}</td>" for v in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, picture: Image.Image, caption: str) -> None:
        data = base64.b64encode(png_bytes(picture)).decode()
        alt = html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def write(self, path: Path) -> None:
        """Writes the page atomically."""
        body = "\n".join(self._parts)
        page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
        page += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
        write_bytes_atomic(path, page.encode())


def cell(value: Any) -> str:
    """A table cell: three significant digits for floats, a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table for a Markdown file."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(v).replace("|", "\\|") for v in row) + " |" for row in rows]) + "\n"


def new_figure(width: float, height: float, dpi: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def as_image(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # `savefig` would draw everything twice.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, log_y: bool = False) -> Image.Image:
    """A line plot: name -> (x, y)."""
    figure = new_figure(7.2, 3.4, 110)
    axes = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 20 else None, markersize=3, linewidth=1.4)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    if series:
        # Named here: the legend leaves out what it is not told of and begins with an underscore.
        axes.legend(axes.get_lines(), list(series), frameon=False)
    return as_image(figure)


def discriminator_picture(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """How D did, from the rows of a run's metrics: which fakes it tells from the real latent of their row, as a whole and (mismatches) by
    map; accuracy and logits by map; losses and R1; norms of its gradient and of what began at 0."""
    told = [(r["step"], r["discriminator"]) for r in rows if "discriminator" in r]
    figure = new_figure(11, 10.5, 100)
    (by_kind, losses), (by_map, logits), (mismatches, norms) = figure.subplots(3, 2)
    for kind in ("generated", "other_latent", "other_text", "other_noise"):
        of_kind = [(step, t[kind]["below_real"][0]) for step, t in told if "below_real" in t.get(kind, {})]
        if of_kind:
            by_kind.plot(*zip(*of_kind, strict=True), label=kind.replace("_", " "), linewidth=1.2)
    by_kind.set_ylim(-0.02, 1.02)
    by_kind.axhline(0.5, color="grey", linewidth=0.8)
    by_kind.set_ylabel("share scored below their real latent")
    for name, label in (
        ("discriminator_loss", "D, Eq. 5"),
        ("adversarial_loss", "G, weight x Eq. 6"),
        ("loss", "G, regression"),
        ("r1", "R1"),
    ):
        of_name = [(r["step"], r[name]) for r in rows if name in r and "discriminator" in r]
        if of_name:
            losses.plot(*zip(*of_name, strict=True), label=label, linewidth=1.2)
    losses.set_yscale("symlog", linthresh=1e-3)  # hinge and relativistic losses may be negative
    losses.set_ylabel("loss")
    for i, name in enumerate(told[-1][1]["columns"][1:] if told else [], start=1):
        both = [(step, t) for step, t in told if "real" in t and "generated" in t]
        steps = [step for step, _ in both]
        by_map.plot(steps, [(t["real"]["accuracy"][i] + t["generated"]["accuracy"][i]) / 2 for _, t in both], label=name, linewidth=1)
        logits.plot(steps, [t["real"]["logit"][i] - t["generated"]["logit"][i] for _, t in both], label=name, linewidth=1)
        for kind, style in (("other_text", "-"), ("other_noise", ":")):
            of_kind = [(step, t[kind]["below_real"][i]) for step, t in told if "below_real" in t.get(kind, {})]
            if of_kind:
                mismatches.plot(*zip(*of_kind, strict=True), style, color=f"C{(i - 1) % 10}", linewidth=1)
    for name in ("discriminator_gradient_norm", "r1_gradient_norm"):
        of_name = [(r["step"], r[name]) for r in rows if name in r]
        if of_name:
            norms.plot(*zip(*of_name, strict=True), label=f"D's gradient{', in steps with R1' if name[0] == 'r' else ''}", linewidth=1.2)
    for name in next((r["input_norms"] for r in rows if r.get("input_norms")), {}):
        of_input = [(r["step"], r["input_norms"][name]) for r in rows if name in r.get("input_norms", {})]
        norms.plot(*zip(*of_input, strict=True), "--", label=f"weights of {name}", linewidth=1)
    norms.set_yscale("symlog", linthresh=1e-3)
    norms.set_ylabel("norm")
    mismatches.set_ylabel("the same by map: other text; dotted: noise")
    mismatches.axhline(0.5, color="grey", linewidth=0.8)
    by_map.set_ylabel("accuracy by map, real and generated")
    logits.set_ylabel("logit of real - generated, by map")
    for axes in (by_kind, losses, by_map, logits, mismatches, norms):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7, ncols=2)
    return as_image(figure)
