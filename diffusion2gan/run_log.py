"""What a run leaves to look at: scalars as JSON lines, sample grids. External trackers are not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.files import atomic_path, disk_errors, write_bytes_atomic
from diffusion2gan.images import png_bytes


class RunLog:
    """`RUN/metrics.jsonl` and `RUN/samples/`. Only the main process writes."""

    def __init__(self, folder: Path, enabled: bool = True):
        self.folder, self.enabled = folder, enabled
        self.path = folder / "metrics.jsonl"

    def rewind(self, step: int) -> None:
        """Drops rows beyond `step`: a resumed run writes them again."""
        if self.enabled and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def scalars(self, step: int, values: dict[str, float], **extra: Any) -> None:
        if self.enabled:
            with disk_errors(self.path), open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values, **extra}) + "\n")

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        if self.enabled:
            write_bytes_atomic(self.folder / "samples" / f"{name}-{step:08d}.png", png_bytes(picture))


# An empty file, there as soon as a run has a checkpoint.
_MARK = "checkpointed"


def mark_checkpointed(folder: Path) -> None:
    """To be called once a checkpoint of the run in `folder` is written: `refuse_lost_checkpoint` misses it from then on."""
    with disk_errors(folder / _MARK):
        (folder / _MARK).touch()


def refuse_lost_checkpoint(folder: Path, expected: str) -> None:
    """To be called where no checkpoint was found. Raises UserError if there has been one: the run would begin anew unasked."""
    if (folder / _MARK).exists():
        raise UserError(
            f"{folder}: this run had a checkpoint ({expected}), and has none now; put it back, or remove the folder to begin anew"
        )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, written when the process was killed


def read_scalars(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a torn last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float("inf")]
