"""The pair store on disk: layout, manifest, checksums. No networks.

    STORE/settings.json                         what the pairs are (written first; a restart must agree with it)
    STORE/shard-00003-of-00040-<sha256>.arrow   one Arrow IPC stream of one record batch, named by its content
    STORE/state.json  dataset_info.json         written last: the folder opens with stock `datasets.load_from_disk`
    STORE/manifest.json                         written last: settings, shards with checksums, fingerprint

Columns: seed int64, prompt string, latent fixed_size_binary (x, float16, C order), and with stored noise also
noise fixed_size_binary (z, float16 or float32). See docs/pair_format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffusion2gan.errors import UserError
from diffusion2gan.files import json_object, sha256_of, write_bytes_atomic
from diffusion2gan.pairs.seeds import NOISE_RECIPE, draw_noise, noise_fingerprint

FORMAT = "diffusion2gan-pairs-1"
LATENT_DTYPE = np.dtype("<f2")
# Stores up to this size are hashed whole when they are opened; larger ones by `pairs check`.
VERIFY_BYTES = 2 << 30


@dataclass(frozen=True)
class OdePair:
    """One sample of the teacher's ODE (Eq. 1)."""

    noise: np.ndarray
    """z (C, H, W) float32, exactly as the teacher received it."""
    prompt: str
    """c"""
    latent: np.ndarray
    """x (C, H, W) float16, the end of the trajectory, in the U-Net's scaling."""
    seed: int
    """Draws the noise again; also the pair's identity."""


@dataclass(frozen=True)
class OdePairArrays:
    """A batch of pairs on the host; fields as in `OdePair` with B in front."""

    noise: np.ndarray
    prompts: list[str]
    latent: np.ndarray
    seeds: np.ndarray


def canonical_json(value: Any) -> bytes:
    """The same bytes for the same value: sorted keys, no spaces that could vary, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def shard_count(count: int, shard_size: int) -> int:
    return -(-count // shard_size)


def shard_rows(index: int, count: int, shard_size: int) -> range:
    """Pair indices of shard `index`."""
    return range(index * shard_size, min(count, (index + 1) * shard_size))


def shard_schema(latent_shape: Sequence[int], noise_dtype: np.dtype | None) -> pa.Schema:
    size = int(np.prod(latent_shape))
    fields = [("seed", pa.int64()), ("prompt", pa.string()), ("latent", pa.binary(size * LATENT_DTYPE.itemsize))]
    if noise_dtype is not None:
        fields.append(("noise", pa.binary(size * noise_dtype.itemsize)))
    return pa.schema(fields)


def encode_shard(seeds: Sequence[int], prompts: Sequence[str], latent: np.ndarray, noise: np.ndarray | None) -> bytes:
    """The bytes of one shard. latent (n, C, H, W) float16; noise (n, C, H, W) float16 or float32, or None."""
    schema = shard_schema(latent.shape[1:], noise.dtype if noise is not None else None)
    columns = [pa.array(seeds, pa.int64()), pa.array(prompts, pa.string()), _fixed_binary(latent, schema.field("latent").type)]
    if noise is not None:
        columns.append(_fixed_binary(noise, schema.field("noise").type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def _fixed_binary(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def shard_name(index: int, total: int, digest: str) -> str:
    return f"shard-{index:05d}-of-{total:05d}-{digest}.arrow"


def existing_shards(folder: Path, total: int) -> dict[int, Path]:
    """Finished shards by index.

    Two workers whose arithmetic differs in the last bit (another GPU, another thread count) may each have made the same
    shard: of two whole ones the first by name stays. Raises UserError when one of them is corrupt.
    """
    found: dict[int, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name.startswith("shard-") and e.name.endswith(".arrow"))
    for name in names:
        match = re.fullmatch(r"shard-(\d+)-of-(\d+)-[0-9a-f]{64}\.arrow", name)
        if match is None or int(match[2]) != total or int(match[1]) >= total:
            raise UserError(f"{folder / name}: not a shard of this store of {total}; move it away and run again")
        index = int(match[1])
        if index in found:
            try:
                verify_shard(found[index])
                verify_shard(folder / name)
            except FileNotFoundError:  # another worker just looked, too
                continue
            (folder / name).unlink(missing_ok=True)
        else:
            found[index] = folder / name
    return found


def verify_shard(path: Path) -> str:
    """The sha256 of a shard. Raises UserError when it is not the one its name carries."""
    digest = sha256_of(path)
    expected = path.stem.rsplit("-", 1)[1]
    if digest != expected:
        raise UserError(
            f"{path}: corrupt shard (sha256 {digest[:16]}..., expected {expected[:16]}...); delete it and run `simulate` again to make it anew"
        )
    return digest


def write_final_files(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes state.json, dataset_info.json and the manifest of a store whose shards are all there. Returns the manifest."""
    total = shard_count(settings["count"], settings["shard_size"])
    shards = existing_shards(folder, total)
    if len(shards) != total:
        raise UserError(f"{folder}: {len(shards)} of {total} shards are there; run the same `simulate` command again")
    rows: list[dict[str, Any]] = [
        {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": path.stem.rsplit("-", 1)[1],  # checked by whoever wrote it, or found it at its start
            "rows": len(shard_rows(i, settings["count"], settings["shard_size"])),
        }
        for i, path in sorted(shards.items())
    ]
    fingerprint = hashlib.sha256("".join(r["sha256"] for r in rows).encode()).hexdigest()[:16]
    noise_dtype = None if settings["noise_storage"] == "none" else np.dtype(settings["noise_storage"])
    schema = shard_schema(settings["latent_shape"], noise_dtype)
    kinds = {"int64": "int64", "string": "string"}
    features = {f.name: {"dtype": kinds.get(str(f.type), str(f.type)), "_type": "Value"} for f in schema}
    state: dict[str, Any] = {
        "_data_files": [{"filename": r["file"]} for r in rows],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    manifest = settings | {"shards": rows, "fingerprint": fingerprint}
    write_bytes_atomic(
        folder / "dataset_info.json",
        canonical_json({"features": features, "citation": "", "description": "", "homepage": "", "license": ""}),
    )
    write_bytes_atomic(folder / "state.json", canonical_json(state))
    write_bytes_atomic(folder / "manifest.json", canonical_json(manifest))
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store. Raises UserError for a folder that is none, an unfinished or a foreign one."""
    path = folder / "manifest.json"
    if not path.exists():
        settings = folder / "settings.json"
        if not settings.exists():
            raise UserError(f"{folder}: no pair store here (no manifest.json); run `diffusion2gan simulate` first")
        plan = json_object(settings)
        _check_keys(settings, plan, ("count", "shard_size"))
        total = shard_count(plan["count"], plan["shard_size"])
        done = len(existing_shards(folder, total))
        raise UserError(f"{folder}: unfinished pair store, {done} of {total} shards; run the same `simulate` command again to finish it")
    manifest = json_object(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}, expected {FORMAT!r}; simulate the pairs again with this version")
    _check_keys(path, manifest, ("count", "teacher", "latent_shape", "noise_storage", "noise_recipe", "shards", "fingerprint"))
    if manifest["noise_storage"] == "none" and manifest["noise_recipe"] != {"name": NOISE_RECIPE, "fingerprint": noise_fingerprint()}:
        raise UserError(
            f"{path}: noise {manifest['noise_recipe']}, but this installation draws {NOISE_RECIPE} {noise_fingerprint()}; use the NumPy version that made the store, or store the noise"
        )
    return manifest


def _check_keys(path: Path, values: dict[str, Any], keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in values]:
        raise UserError(
            f"{path}: has no {missing[0]!r}: the file is damaged; run the same `simulate` command again, or restore it from a copy"
        )


class PairDataset:
    """Random access to a finished store, memory-mapped: nothing is copied until a pair is read.

    folder: of the store. verify: whether to hash every shard now, by default up to 2 GiB; what was not is hashed when a latent or a noise of
    it is first read (False: never). share: (r, n) to hash only every n-th shard from the r-th on, as the r-th of n processes that read the store.
    manifest: its manifest.json. latent_shape: (C, H, W). noise_dtype: of the stored noise, None where it is drawn again. seeds: (N,) int64,
    of every pair in order. `store[i]` is an `OdePair`; `batch`, `latents`, `noises` and `prompt` read by index.

    Raises UserError at once for a missing or truncated shard, and for a corrupt one when it is hashed.
    """

    def __init__(self, folder: str | Path, verify: bool | None = None, share: tuple[int, int] = (0, 1)):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.latent_shape: tuple[int, ...] = tuple(self.manifest["latent_shape"])
        storage = self.manifest["noise_storage"]
        self.noise_dtype = None if storage == "none" else np.dtype(storage)
        shards = self.manifest["shards"]
        now = sum(s["bytes"] for s in shards) <= VERIFY_BYTES if verify is None else verify
        mine = set(range(share[0], len(shards), share[1]))
        # Shards to be hashed when they are first read.
        self._unread = mine if verify is None and not now else set[int]()
        seeds, latents, noises, self._prompts = [], [], [], []
        for number, shard in enumerate(shards):
            batch = self._open(shard, now and number in mine)
            seeds.append(batch.column("seed").to_numpy())
            latents.append(self._view(batch.column("latent"), LATENT_DTYPE))
            if self.noise_dtype is not None:
                noises.append(self._view(batch.column("noise"), self.noise_dtype))
            self._prompts.append(batch.column("prompt"))
        self._latents, self._noises = latents, noises
        self.seeds = np.concatenate(seeds)
        self._starts = np.cumsum([0] + [len(s) for s in seeds])

    def _open(self, shard: dict[str, Any], verify: bool) -> pa.RecordBatch:
        name = shard["file"]
        path = self.folder / name
        # A manifest is outside data: it may not lead out of its folder.
        if Path(name).name != name:
            raise UserError(f"{self.folder / 'manifest.json'}: shard file {name!r} is not a plain file name; the manifest is damaged")
        if not path.exists():
            raise UserError(f"{path}: missing shard; run the same `simulate` command again to make it anew")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise UserError(
                f"{path}: truncated shard ({size} bytes, expected {shard['bytes']}); delete it and run `simulate` again to make it anew"
            )
        if verify:
            verify_shard(path)
        if shard["sha256"] not in name:
            raise UserError(
                f"{self.folder / 'manifest.json'}: {name} is listed with sha256 {shard['sha256'][:16]}...; the manifest is damaged"
            )
        try:
            # The batch keeps the mapping alive; the file itself is closed, so that a store may have any number of shards.
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
                return reader.read_next_batch()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: cannot be mapped ({error}); delete it and run `simulate` again, or use larger shards") from None

    def _view(self, column: pa.Array, dtype: np.dtype) -> np.ndarray:
        flat = np.frombuffer(column.buffers()[1], dtype, count=len(column) * int(np.prod(self.latent_shape)))
        return flat.reshape(len(column), *self.latent_shape)

    def __len__(self) -> int:
        return len(self.seeds)

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _checked(self, index: int) -> tuple[int, int]:
        """Where a pair lies, its shard hashed if it was to be at its first reading."""
        shard, row = self._locate(index)
        if shard in self._unread:
            verify_shard(self.folder / self.manifest["shards"][shard]["file"])
            self._unread.discard(shard)
        return shard, row

    def latents(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """x of some pairs: (B, C, H, W) float16."""
        out = np.empty((len(rows), *self.latent_shape), LATENT_DTYPE)
        for target, index in zip(out, rows, strict=True):
            shard, row = self._checked(int(index))
            target[...] = self._latents[shard][row]
        return out

    def noises(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """z of some pairs: (B, C, H, W) float32, read or drawn again, exactly as the teacher received it."""
        if self.noise_dtype is None:
            return draw_noise(self.seeds[np.asarray(rows)].tolist(), self.latent_shape)
        out = np.empty((len(rows), *self.latent_shape), np.float32)
        for target, index in zip(out, rows, strict=True):
            shard, row = self._checked(int(index))
            target[...] = self._noises[shard][row]
        return out

    def prompt(self, index: int) -> str:
        """c of one pair."""
        shard, row = self._locate(index)
        return self._prompts[shard][row].as_py()

    def batch(self, rows: Sequence[int] | np.ndarray) -> OdePairArrays:
        """Some pairs by index, in the given order."""
        return OdePairArrays(self.noises(rows), [self.prompt(int(i)) for i in rows], self.latents(rows), self.seeds[np.asarray(rows)])

    def __getitem__(self, index: int) -> OdePair:
        """One pair. Raises IndexError out of range."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of a store of {len(self)}")
        return OdePair(self.noises([index])[0], self.prompt(index), self.latents([index])[0], int(self.seeds[index]))
