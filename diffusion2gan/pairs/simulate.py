"""Runs the teacher's ODE over prompts, a shard at a time, on any number of workers.

A shard is a unit of work whose bytes depend on nothing but the settings, so there are no locks: a worker makes every
n-th shard, then helps the others from their far ends; a shard made twice is the same file; a dead worker costs one
shard; the same command again, with any number of workers, fills what is missing. Times and host names go to `STORE.log.jsonl` beside the store, never into it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from diffusion2gan.config import Section, store_difference
from diffusion2gan.device import warn_of_slow_bf16
from diffusion2gan.errors import UserError
from diffusion2gan.files import disk_errors, json_object, sweep_temporaries, write_bytes_atomic
from diffusion2gan.pairs.dataset import (
    FORMAT,
    LATENT_DTYPE,
    canonical_json,
    encode_shard,
    existing_shards,
    shard_count,
    shard_name,
    shard_rows,
    verify_shard,
    write_final_files,
)
from diffusion2gan.pairs.prompts import PromptsConfig, prompts_digest, read_prompts
from diffusion2gan.pairs.seeds import MAX_STORE_SEED, NOISE_RECIPE, draw_noise, noise_fingerprint, pair_seed
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import Teacher
from diffusion2gan.worker import Worker


class PairsConfig(Section):
    """Which pairs a store holds."""

    count: int = Field(ge=1)
    """Pairs. A list of fewer prompts is read round and round, each time with other noises."""
    prompts: PromptsConfig = PromptsConfig()
    negative_prompt: str = ""
    """What guidance leads away from; the paper's is empty."""
    ode: SolverConfig = SolverConfig()
    seed: int = Field(0, ge=0, le=MAX_STORE_SEED)
    """Decides the noises, and of `embedded` the prompts."""
    batch_size: int = Field(32, ge=1)
    """Pairs solved at once. It may change the last bits of x, so it belongs to the store's settings."""
    shard_size: int = Field(256, ge=1)
    """Pairs a shard; a multiple of batch_size."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the network while it solves; text, and the state of the ODE, keep theirs. Default: the teacher's own."""
    compile: bool = False
    """Compiles the network: a minute at the start, then faster. It may change the last bits of x, as `batch_size` may."""
    noise_storage: Literal["none", "float16", "float32"] = "none"
    """`none` draws z again from the seed (half the disk); `float16` rounds z before the teacher sees it, and keeps it."""

    @model_validator(mode="after")
    def _whole_batches(self) -> PairsConfig:
        if self.shard_size % self.batch_size:
            raise ValueError(f"shard_size is {self.shard_size}, expected a multiple of batch_size ({self.batch_size})")
        return self


def store_settings(teacher: Teacher, config: PairsConfig, prompts_sha256: str) -> dict[str, Any]:
    """Everything that decides the store's bytes; the manifest is this plus the shards."""
    own = str(teacher.dtype).removeprefix("torch.")
    # What is as it was before there was a choice is left out: older stores stay what they are.
    chosen: dict[str, Any] = {"text_precision": own} if config.precision not in (None, own) else {}
    chosen |= {"compile": True} if config.compile else {}
    return chosen | {
        "format": FORMAT,
        "teacher": teacher.identity(),
        "precision": config.precision or own,
        "latent_shape": list(teacher.latent_shape),
        "ode": config.ode.model_dump(),
        "negative_prompt": config.negative_prompt,
        "prompts_sha256": prompts_sha256,
        "count": config.count,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
        "noise_recipe": {"name": NOISE_RECIPE, "fingerprint": noise_fingerprint()},
        "noise_storage": config.noise_storage,
    }


def agree_on_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Makes a store's folder and `settings.json`, or raises UserError naming the first setting in which they differ. A store that has no
    shard yet takes the new settings: what stopped it may have been the old ones."""
    path = folder / "settings.json"
    if not path.exists():
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            others = [p.name for p in folder.iterdir() if p.name != "settings.json" and not p.name.startswith(".")]
        if others and not path.exists():
            raise UserError(f"{folder}: not empty and no pair store (it holds {others[0]}); choose a new folder")
        write_bytes_atomic(path, canonical_json(settings))
    before = json_object(path)
    if store_difference(settings, before) and not any(folder.glob("shard-*")):
        write_bytes_atomic(path, canonical_json(settings))
        if any(folder.glob("shard-*")):  # written meanwhile: its settings stay
            write_bytes_atomic(path, canonical_json(before))
        else:
            print(f"{folder}: holds no shard yet; its settings are replaced", file=sys.stderr)
    check_settings(folder, settings)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError naming the first setting in which a store's `settings.json` differs."""
    for key, ours, other in store_difference(settings, json_object(folder / "settings.json")):
        raise UserError(
            f"{folder}: a store of other settings: {key} is {other!r} there and {ours!r} in the recipe; choose a new folder, or mend the recipe"
        )


def _count_of_smaller(smaller: Path, settings: dict[str, Any], prompts: list[str]) -> int:
    """How many pairs the store `smaller` has or will have. Raises UserError unless one of `settings` begins with them."""
    path = smaller / "settings.json"
    if not path.exists():
        raise UserError(f"{path}: no such file, expected a pair store; name the folder of one")
    theirs = json_object(path)
    grown = {"count": settings["count"], "prompts_sha256": settings["prompts_sha256"]}
    for key, ours, other in store_difference(settings, theirs | grown):
        raise UserError(
            f"{smaller}: a store of other settings: {key} is {other!r} there and {ours!r} in the recipe; its pairs are other pairs"
        )
    if theirs["count"] > settings["count"]:
        raise UserError(f"{smaller}: has {theirs['count']} pairs, expected at most pairs.count ({settings['count']}); raise it")
    if prompts_digest(prompts[: theirs["count"]]) != theirs["prompts_sha256"]:
        raise UserError(f"{smaller}: its prompts are not the first {theirs['count']} of this recipe's; a list may only grow at its end")
    count: int = theirs["count"]
    return count


def _take_over(smaller: Path, count: int, folder: Path, config: PairsConfig, worker: Worker) -> None:
    """Copies this worker's share of the shards of `smaller` that hold as many pairs in `folder`: all but a short last one."""
    before, total = shard_count(count, config.shard_size), shard_count(config.count, config.shard_size)
    present = existing_shards(folder, total)
    for index, path in existing_shards(smaller, before).items():
        whole = shard_rows(index, count, config.shard_size) == shard_rows(index, config.count, config.shard_size)
        if whole and index % worker.world == worker.rank and index not in present:
            digest = verify_shard(path)
            write_bytes_atomic(folder / shard_name(index, total, digest), path.read_bytes())


def simulate(
    teacher: Teacher,
    config: PairsConfig,
    folder: str | Path,
    worker: Worker | None = None,
    progress: bool = True,
    smaller: Path | None = None,
    in_place: bool = False,
) -> dict[str, Any]:
    """Fills the store in `folder`; returns its manifest when all shards are there, whoever made them.

    teacher: whose ODE is solved, on its own device. config: which pairs, and how. worker: which share of the shards is this process'
    own; by default all. progress: a bar on stderr. smaller: a store of the same settings with fewer pairs, whose whole shards are taken
    over instead of being made again: the result is the same bytes. in_place: the teacher's network itself is brought to `config.precision`
    and compiled, not a copy, and stays so. Raises UserError for a folder of other settings, a corrupt shard, a full disk, or a solution
    that is not finite.
    """
    folder, worker = Path(folder).resolve(), worker or Worker()
    prompts = read_prompts(config.prompts, config.count, config.seed)
    # Now, and not at the one that is wrong, when the store is nearly done and a mended list would be another store.
    teacher.check_prompts(prompts)
    settings = store_settings(teacher, config, prompts_digest(prompts))
    if config.precision == "bfloat16":
        warn_of_slow_bf16(teacher.device, "pairs.precision=float32")
    # Before anything is written: it may refuse to compile.
    solver = OdeSolver(teacher, config.ode, config.batch_size, config.precision, config.compile, config.negative_prompt, in_place)
    count = _count_of_smaller(smaller, settings, prompts) if smaller is not None else 0
    agree_on_settings(folder, settings)
    total = shard_count(config.count, config.shard_size)
    if smaller is not None:
        _take_over(smaller, count, folder, config, worker)
    present = existing_shards(folder, total)
    for found, path in present.items():
        if found % worker.world == worker.rank:
            verify_shard(path)

    def pairs_present() -> int:
        return sum(len(shard_rows(i, config.count, config.shard_size)) for i in present)

    with tqdm(
        total=config.count, initial=pairs_present(), unit="pair", desc="simulate", disable=not progress or worker.rank != 0, mininterval=1
    ) as bar:
        order = _Order(total, worker, random.SystemRandom(), present)
        while (index := order.next(present)) is not None:
            started = time.time()
            rows = shard_rows(index, config.count, config.shard_size)
            # A folder of thousands of shards is not listed at every batch for nobody.
            superfluous = partial(_has_shard, folder, index, total) if order.shared(index) else None
            data = _make_shard(solver, config, rows, prompts, bar.update, superfluous)
            if data is not None:
                # A job of other settings may have found the store empty.
                check_settings(folder, settings)
                if not _has_shard(folder, index, total):
                    path = folder / shard_name(index, total, hashlib.sha256(data).hexdigest())
                    write_bytes_atomic(path, data)
                    order.made(index)
                    try:
                        check_settings(folder, settings)
                    except UserError:
                        path.unlink(missing_ok=True)
                        raise
                _log(folder, {"shard": index, "pairs": len(rows), "seconds": round(time.time() - started, 3), "rank": worker.rank})
            present = existing_shards(folder, total)
            # What others made meanwhile; and nothing of a shard that was given up.
            bar.update(pairs_present() - bar.n)
    sweep_temporaries(folder)
    return write_final_files(folder, settings)


def _has_shard(folder: Path, index: int, total: int) -> bool:
    return index in existing_shards(folder, total)


class _Order:
    """Which missing shard a process makes next: those of its own share, round about from one drawn at random, then the others', from the
    far end, where an idle worker meets a slow one at its last shards.

    Jobs that know nothing of each other have the same rank, so the same share. As soon as shards of it appear that this process did not
    make, it draws each next one at random: in step with another it would make every one of them twice.
    """

    def __init__(self, total: int, worker: Worker, generator: random.Random, present: Collection[int] = ()):
        """present: the shards that are there at the beginning."""
        self._total, self._worker, self._random = total, worker, generator
        self._first = generator.randrange(total)
        # There before, or this process' own work.
        self._known = set(present)
        self._alone = True

    def next(self, present: Collection[int]) -> int | None:
        """The shard to make, given those that are there; None when all are."""
        missing = [i for i in range(self._total) if i not in present]
        own = [i for i in missing if self._own(i)]
        self._alone = self._alone and all(i in self._known for i in present if self._own(i))
        return self._choose(own, missing) if missing else None

    def made(self, index: int) -> None:
        """Notes a shard as this process' own work."""
        self._known.add(index)

    def shared(self, index: int) -> bool:
        """Whether others may be making that shard, too."""
        return not (self._alone and self._own(index))

    def _own(self, index: int) -> bool:
        return index % self._worker.world == self._worker.rank

    def _choose(self, own: list[int], missing: list[int]) -> int:
        if not self._alone:
            return self._random.choice(own or missing)
        if own:
            return next((i for i in own if i >= self._first), own[0])
        return missing[-1 - self._worker.rank % len(missing)]


def _make_shard(
    solver: OdeSolver,
    config: PairsConfig,
    rows: range,
    prompts: list[str],
    made: Callable[[int], Any],
    superfluous: Callable[[], bool] | None,
) -> bytes | None:
    """The bytes of a shard; None when it turned out superfluous on the way: another process has made it. `made` is told the size of
    every batch."""
    stored = None if config.noise_storage == "none" else np.dtype(config.noise_storage)
    seeds = [pair_seed(config.seed, i) for i in rows]
    latents, noises = [], []
    for start in range(0, len(rows), config.batch_size):
        if superfluous is not None and superfluous():
            return None
        part = rows[start : start + config.batch_size]
        noise = draw_noise(seeds[start : start + config.batch_size], solver.teacher.latent_shape)
        if stored is not None:
            noise = noise.astype(stored)
            noises.append(noise)
        x = solver.solve(noise.astype(np.float32), [prompts[i] for i in part]).cpu().numpy()
        with np.errstate(over="ignore"):
            x = x.astype(LATENT_DTYPE)
        # As it is stored: what is beyond float16's range would be infinite there.
        finite = np.isfinite(x).reshape(len(x), -1).all(1)
        if not finite.all():
            bad = part[int(np.flatnonzero(~finite)[0])]
            raise UserError(
                f"pair {bad} ({prompts[bad]!r}): the teacher's solution is not finite, or beyond float16's range, in "
                f"{config.precision or solver.teacher.dtype}; try pairs.precision: bfloat16 or float32"
            )
        latents.append(x)
        made(len(part))
    return encode_shard(seeds, [prompts[i] for i in rows], np.concatenate(latents), np.concatenate(noises) if noises else None)


def _log(folder: Path, row: dict[str, Any]) -> None:
    """Beside the store, which holds what its manifest names. The parent of a mounted folder may be another's: pairs matter more."""
    path = folder.with_name(folder.name + ".log.jsonl")
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row | {"time": time.time(), "host": platform.node()}) + "\n")
    except OSError as error:
        warnings.warn(f"{path}: cannot be written ({error.strerror}); the store is made without a log", stacklevel=2)
