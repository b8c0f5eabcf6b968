"""Features of many pictures, a shard at a time: never more pictures in memory than one shard holds.

A shard is a fixed range of sample numbers. Its pictures are made once for all extractors that still lack it, and each
extractor's rows go into a file of their own, written under a temporary name and renamed. So a killed run goes on where it
stopped, another extractor can be added later, and shard k is the work of process k mod world: what a shard holds depends on its
own sample numbers alone, and sums are taken over shards in order, so any number of processes gives the same result.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.files import atomic_path, disk_errors, sweep_temporaries, write_bytes_atomic
from diffusion2gan.worker import Worker

SHARD = 256
PATIENCE = 300.0
"""Seconds without a new shard after which a waiting process says for whom it waits."""

Pictures = Sequence[np.ndarray] | np.ndarray
"""uint8 RGB pictures (H, W, 3), of one size or of several."""

Produce = Callable[[int, int], Pictures]
"""The pictures of samples start to stop - 1."""


@dataclass(frozen=True)
class Extractor:
    """What turns the pictures of samples start to stop - 1 into rows.

    `name` begins the names of its files. `identity` (JSON) is all that the rows depend on: pictures, weights, preprocessing.
    `rows(pictures, start, stop)` returns (n, ...) with n = stop - start.
    """

    name: str
    identity: Mapping[str, Any]
    rows: Callable[[Pictures, int, int], np.ndarray]


class Rows:
    """The rows of one extractor, in sample order, read shard by shard."""

    def __init__(self, paths: Sequence[Path], spans: Sequence[tuple[int, int]]):
        self._paths, self._spans = list(paths), list(spans)

    def __len__(self) -> int:
        return self._spans[-1][1]

    def __iter__(self) -> Iterator[np.ndarray]:
        """One shard after the other, (n, ...)."""
        for path, (start, stop) in zip(self._paths, self._spans, strict=True):
            yield _read(path, stop - start)

    def load(self) -> np.ndarray:
        """All rows, (N, ...)."""
        return np.concatenate(list(self))

    def mapped(self) -> np.ndarray:
        """All rows, (N, ...), in a nameless file beside the shards: its pages take no memory that somebody else needs."""
        with disk_errors(self._paths[0].parent), tempfile.TemporaryFile(dir=self._paths[0].parent) as file:
            for rows in self:
                file.write(np.ascontiguousarray(rows).data)
            file.flush()
            return np.memmap(file, rows.dtype, "r+", shape=(len(self), *rows.shape[1:]))


def save_values(out: Path, name: str, values: np.ndarray) -> str:
    """Writes what each picture or prompt got below an evaluation's folder; returns where, as its result names it."""
    plain = "".join(c if c.isalnum() else "-" for c in name.lower())
    path = out / "values" / f"{plain}.npy"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.asarray(values, np.float32))
    return path.relative_to(out).as_posix()


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """The shards of `count` samples: (start, stop) of each, `size` samples but for the last."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def extract(
    produce: Produce,
    count: int,
    folder: Path,
    extractors: Sequence[Extractor],
    *,
    size: int = SHARD,
    log: str = "pictures",
    label: str = "",
    progress: bool = True,
    worker: Worker | None = None,
) -> dict[str, Rows]:
    """Fills `folder` with the rows of `count` samples for every extractor, and returns them by the extractor's name.

    Every process does its own shards and then waits for those of the others. `folder/seconds-LOG.jsonl` gets the seconds
    that each shard's pictures took, `folder/LOG-00003-of-00040.json` what they were (sha256, number of blank ones).
    Raises UserError for a folder that was filled with another identity, pictures that are no pictures, rows that are not
    finite.
    """
    worker = worker or Worker.from_environment()
    parts = spans(count, size)
    total = len(parts)
    sweep_temporaries(folder)
    for extractor in extractors:
        _agree(folder / f"{extractor.name}-of-{total:05d}.json", extractor.identity)
    paths = {e.name: [folder / f"{e.name}-{k:05d}-of-{total:05d}.npy" for k in range(total)] for e in extractors}

    def missing(k: int) -> list[Extractor]:
        return [e for e in extractors if not paths[e.name][k].exists()]

    def finished() -> int:
        return sum(stop - start for k, (start, stop) in enumerate(parts) if not missing(k))

    # What is done counts as `initial`, so that rate and ETA are of the work of this run.
    done = finished()
    with tqdm(total=count, initial=done, desc=label, unit="img", disable=not progress or worker.rank > 0 or done == count) as bar:
        for k in range(worker.rank, total, worker.world):
            if todo := missing(k):
                start, stop = parts[k]
                # What was noted of pictures that no feature was taken of binds nobody.
                bound = any(folder.glob(f"*-{k:05d}-of-{total:05d}.npy"))
                facts = folder / f"{log}-{k:05d}-of-{total:05d}.json"
                pictures = _produce(produce, start, stop, facts if bound else None, folder / f"seconds-{log}.jsonl")
                if not bound:
                    write_bytes_atomic(facts, json.dumps(_facts(pictures, start)).encode())
                for extractor in todo:
                    _write(paths[extractor.name][k], _checked(extractor, pictures, start, stop))
                bar.update((finished() if worker.world > 1 else bar.n + stop - start) - bar.n)
        waiting_since, said = time.monotonic(), False
        while late := [k for k in range(total) if missing(k)]:  # other processes' shards
            time.sleep(0.2)
            if finished() > bar.n:
                waiting_since, said = time.monotonic(), False
                bar.update(finished() - bar.n)
            elif time.monotonic() - waiting_since > PATIENCE and not said:
                said = True
                warnings.warn(
                    f"{folder}: waiting for shard {late[0]} of process {late[0] % worker.world} ({len(late)} are missing); is every one of the "
                    f"{worker.world} processes running, and does it see this folder?",
                    stacklevel=2,
                )
    return {name: Rows(files, parts) for name, files in paths.items()}


def _agree(manifest: Path, identity: Mapping[str, Any]) -> None:
    described = json.loads(json.dumps(identity))
    if not manifest.exists():
        write_bytes_atomic(manifest, json.dumps(described, indent=1, sort_keys=True).encode())
        return
    found = json.loads(manifest.read_text())
    for key in sorted({*found, *described}):
        if found.get(key) != described.get(key):
            raise UserError(
                f"{manifest}: {key} is {found.get(key)!r}, this run has {described.get(key)!r}; choose another folder or delete this one"
            )


def _produce(produce: Produce, start: int, stop: int, known: Path | None, seconds: Path) -> Pictures:
    """The pictures, checked; `known`: the note of them that other features were taken of."""
    began = time.perf_counter()
    pictures = produce(start, stop)
    took = time.perf_counter() - began
    if len(pictures) != stop - start:
        raise UserError(f"the sampler returned {len(pictures)} pictures for {stop - start} prompts, expected one each")
    for i, picture in enumerate(pictures, start):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"picture {i} is {picture.dtype} {picture.shape}, expected uint8 (H, W, 3); round to 0-255 first")
    if known is not None and known.exists() and json.loads(known.read_text()) != _facts(pictures, start):
        raise UserError(
            f"{known}: these pictures were other ones when their first features were taken: the machine, its settings or a library "
            "changed; delete the folder and extract all features again"
        )
    with disk_errors(seconds), open(seconds, "a") as log:
        log.write(json.dumps({"images": len(pictures), "seconds": took}) + "\n")
    return pictures


def _facts(pictures: Pictures, start: int) -> dict[str, Any]:
    digest, blank = hashlib.sha256(), 0
    for picture in pictures:
        digest.update(repr(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).tobytes())
        blank += int((picture == picture[0, 0]).all())
    return {"sha256": digest.hexdigest(), "blank": blank, "first": start, "count": len(pictures)}


def _checked(extractor: Extractor, pictures: Pictures, start: int, stop: int) -> np.ndarray:
    rows = extractor.rows(pictures, start, stop)
    if len(rows) != stop - start:
        raise UserError(f"{extractor.name}: {len(rows)} rows for {stop - start} pictures, expected one each")
    bad = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(1))
    if len(bad):
        raise UserError(f"{extractor.name}: the features of picture {start + bad[0]} are not finite; look at that picture")
    return rows


def _write(path: Path, rows: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def _read(path: Path, count: int) -> np.ndarray:
    try:
        rows: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise UserError(f"{path}: not a whole .npy file; delete it and run the command again") from None
    if rows.ndim < 1 or len(rows) != count:
        raise UserError(f"{path}: shape {rows.shape}, expected {count} rows; delete it and run the command again")
    return rows


def picture_facts(folder: Path, log: str, count: int, size: int = SHARD) -> dict[str, Any]:
    """What `extract` noted of its pictures: `sha256` over all shards' sums, and how many were of one colour (`blank`)."""
    total = len(spans(count, size))
    digest, blank = hashlib.sha256(), 0
    for k in range(total):
        path = folder / f"{log}-{k:05d}-of-{total:05d}.json"
        if not path.exists():
            return {"sha256": None, "blank": None}
        facts = json.loads(path.read_text())
        digest.update(facts["sha256"].encode())
        blank += facts["blank"]
    return {"sha256": digest.hexdigest(), "blank": blank}


def seconds_per_image(folder: Path, log: str) -> float | None:
    """Time a picture took to make, as `extract` logged it; None when it was not logged."""
    path = folder / f"seconds-{log}.jsonl"
    if not path.exists():
        return None
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # a kill can leave half a line, and the next one begins there
            rows.append(json.loads(line))
    # The first shard warms up; it counts only when there is no other.
    rows = rows[1:] or rows
    return float(sum(r["seconds"] for r in rows) / sum(r["images"] for r in rows)) if rows else None
