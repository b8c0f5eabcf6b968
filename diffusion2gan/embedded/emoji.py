"""The emoji data set of the embedded teacher: download, split, captions.

Three public npm packages give 10,319 pictures at 64 x 64 on white, each with a name, a short name,
a category, a subcategory, a drawing style and, for people and hands, a skin tone:

    emoji-datasource-google   Noto Emoji       Apache-2.0
    emoji-datasource-twitter  Twemoji          CC BY 4.0
    @lobehub/fluent-emoji-3d  Fluent Emoji 3D  MIT

Words used here and in the benchmark:

    concept   one emoji whatever its style and tone ("waving hand")
    cell      one (concept, style)
    picture   one (concept, style, tone)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.files import ANOTHER_CACHE, cache_dir, disk_errors, sha256_of, write_bytes_atomic

RESOLUTION = 64
STYLES = ("noto", "twemoji", "fluent")
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
_TONE_CODES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}

# (npm package with its version, sha256 of the packed tarball, style)
PACKAGES = (
    ("emoji-datasource-google@16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "noto"),
    ("emoji-datasource-twitter@16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "twemoji"),
    ("@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "fluent"),
)
_MEMBER = {"noto": "package/img/google/64/{}.png", "twemoji": "package/img/twitter/64/{}.png", "fluent": "package/assets/{}.webp"}
_SPLIT_SALT = "diffusion2gan emoji split v1"
HELD_OUT = 0.05


@dataclass(frozen=True)
class EmojiRecord:
    """One picture. `concept` is the code points without tone; `split` is train, concept or cell."""

    concept: str
    style: str
    tone: str
    name: str
    short_name: str
    category: str
    subcategory: str
    split: str

    @property
    def cell(self) -> tuple[str, str]:
        return self.concept, self.style


@dataclass(frozen=True)
class EmojiDataset:
    """`images` (N, 64, 64, 3) uint8, memory-mapped, and one record for each."""

    images: np.ndarray
    records: list[EmojiRecord]

    def indices(self, split: str) -> np.ndarray:
        return np.array([i for i, r in enumerate(self.records) if r.split == split], np.int64)

    @cached_property
    def _training_cells(self) -> list[list[int]]:
        cells: dict[tuple[str, str], list[int]] = {}
        for i, record in enumerate(self.records):
            if record.split == "train":
                cells.setdefault(record.cell, []).append(i)
        return list(cells.values())

    def draw_training_rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Rows of `count` training pictures: a cell drawn evenly, then one of its tones. By files it would be 56 % people."""
        chosen = [self._training_cells[i] for i in rng.integers(len(self._training_cells), size=count)]
        return np.array([tones[int(u * len(tones))] for tones, u in zip(chosen, rng.random(count), strict=True)])


def _unit_hash(*parts: str) -> float:
    digest = hashlib.sha256("\0".join((_SPLIT_SALT, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: str, style: str, n_styles: int) -> str:
    """The split of one cell: a function of its name alone, so that adding pictures moves nothing.

    5 % of concepts are held out whole ("concept": every style and tone of them); of the cells of the other
    concepts that exist in two styles or more, 5 % are held out ("cell": other styles of it are in training).
    """
    if _unit_hash("concept", concept) < HELD_OUT:
        return "concept"
    if n_styles > 1 and _unit_hash("cell", concept, style) < HELD_OUT:
        # At most one style of a concept is held out, or "the others are in training" could be empty.
        scores = {s: _unit_hash("cell", concept, s) for s in STYLES}
        if style == min(scores, key=lambda s: scores[s]):
            return "cell"
    return "train"


def _words(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").replace("-", " ").split())


def _style_sources(index: list[dict], members: dict[str, set[str]]) -> Iterator[tuple[str, str, str, dict, str]]:
    """Yields (style, member path, tone, entry of emoji.json, reason it is skipped or "")."""
    for entry in index:
        variants = [("", entry["image"])] + [(code, v["image"]) for code, v in entry.get("skin_variations", {}).items()]
        for code, image in variants:
            for style in STYLES:
                member = _MEMBER[style].format(image.removesuffix(".png"))
                if "-" in code:
                    yield style, member, "", entry, "two tones"
                elif member not in members[style]:
                    yield style, member, "", entry, "no picture in this style"
                else:
                    yield style, member, _TONE_CODES[code] if code else "", entry, ""


def _read_picture(archive: tarfile.TarFile, member: str) -> np.ndarray:
    file = archive.extractfile(member)
    if file is None:
        raise UserError(f"{member}: not a plain file in {archive.name!r}; delete the archive and build again")
    picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
    # Composite before resizing: resizing straight alpha would bleed the colour of transparent pixels in.
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    rgb = canvas.convert("RGB")
    if rgb.size != (RESOLUTION, RESOLUTION):
        rgb = rgb.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def _fetch(package: str, sha256: str, folder: Path) -> Path:
    """The npm tarball of `package` in `folder`, checked; downloads it with `npm pack` when it is missing."""
    name = package.rsplit("@", 1)[0].lstrip("@").replace("/", "-")
    path = folder / f"{name}-{package.rsplit('@', 1)[1]}.tgz"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = ["npm", "pack", package, "--pack-destination", scratch]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
            except FileNotFoundError:
                raise UserError("npm is not installed, expected on the PATH: the emoji come as npm packages; install Node.js") from None
            except subprocess.CalledProcessError as error:
                raise UserError(
                    f"`{' '.join(command[:3])}` failed: {error.stderr.strip().splitlines()[-1:]}; check the network and try again"
                ) from None
            except subprocess.TimeoutExpired:
                raise UserError(f"`{' '.join(command[:3])}` did not end within 10 minutes; check the network and try again") from None
            os.replace(Path(scratch) / path.name, path)
    digest = sha256_of(path)
    if digest != sha256:
        raise UserError(f"{path}: sha256 is {digest}, expected {sha256}; delete the file and run the command again")
    return path


def build(folder: Path | None = None) -> tuple[EmojiDataset, dict[str, int]]:
    """Builds the data set in `folder` (default: the cache) and says what was skipped, by reason."""
    folder = folder or cache_dir() / "emoji"
    with disk_errors(folder, ANOTHER_CACHE):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        archives = {style: stack.enter_context(tarfile.open(_fetch(package, sha256, folder))) for package, sha256, style in PACKAGES}
        skipped = _build_from(archives, folder)
    return load(folder), skipped


def _build_from(archives: dict[str, tarfile.TarFile], folder: Path) -> dict[str, int]:
    members = {style: set(archive.getnames()) for style, archive in archives.items()}
    file = archives["noto"].extractfile("package/emoji.json")
    assert file is not None  # the checksum above fixes the archive's content
    index = sorted(json.load(file), key=lambda e: e["unified"])

    kept, skipped = [], {"two tones": 0, "no picture in this style": 0}
    for style, member, tone, entry, reason in _style_sources(index, members):
        if reason:
            skipped[reason] += 1
        else:
            kept.append((style, member, tone, entry))
    styles_of: dict[str, set[str]] = {}
    for style, _, _, entry in kept:
        styles_of.setdefault(entry["unified"], set()).add(style)

    images = np.empty((len(kept), RESOLUTION, RESOLUTION, 3), np.uint8)
    records = []
    for i, (style, member, tone, entry) in enumerate(kept):
        images[i] = _read_picture(archives[style], member)
        concept = entry["unified"]
        records.append(
            EmojiRecord(
                concept=concept,
                style=style,
                tone=tone,
                name=_words(entry["name"]),
                short_name=_words(entry["short_name"]),
                category=_words(entry["category"]),
                subcategory=_words(entry["subcategory"]),
                split=split_of(concept, style, len(styles_of[concept])),
            )
        )
    buffer = io.BytesIO()
    np.save(buffer, images)
    write_bytes_atomic(folder / "images.npy", buffer.getvalue())
    # Written last: its presence means that the images are whole.
    lines = [json.dumps(asdict(r), sort_keys=True) for r in records]
    write_bytes_atomic(folder / "records.jsonl", ("\n".join(lines) + "\n").encode())
    return skipped


def load(folder: Path | None = None) -> EmojiDataset:
    """Opens a data set that `build` made. Raises UserError when there is none."""
    folder = folder or cache_dir() / "emoji"
    if not (folder / "records.jsonl").exists():
        raise UserError(f"{folder}: no emoji data set here; run `diffusion2gan embedded data` first")
    records = [EmojiRecord(**json.loads(line)) for line in (folder / "records.jsonl").read_text().splitlines()]
    images = np.load(folder / "images.npy", mmap_mode="r")
    if len(images) != len(records):
        raise UserError(f"{folder}: {len(images)} images but {len(records)} records; delete the folder and build again")
    return EmojiDataset(images, records)


def packaged_records() -> list[EmojiRecord]:
    """The records that ship with the package, without pictures: enough for captions and prompts, offline."""
    path = resources.files("diffusion2gan.embedded") / "data" / "records.jsonl.gz"
    return [EmojiRecord(**json.loads(line)) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# --- Captions -------------------------------------------------------------------------------------------------------
# Coarse captions have many right answers: that is what makes the noise matter.
LEVELS = ("category", "subcategory", "short_name", "name")
LEVEL_WEIGHTS = (0.15, 0.25, 0.3, 0.3)


def caption(record: EmojiRecord, level: str, with_style: bool, with_tone: bool) -> str:
    """One caption of a picture, e.g. `caption(r, "name", True, True)` -> "fluent waving hand sign, dark skin"."""
    text = getattr(record, level)
    if with_style:
        text = f"{record.style} {text}"
    if with_tone and record.tone:
        text = f"{text}, {record.tone} skin"
    return text


def all_captions(record: EmojiRecord) -> list[str]:
    """Every distinct caption of a picture, coarse to fine."""
    tones = (False, True) if record.tone else (False,)
    return list(dict.fromkeys(caption(record, lv, s, t) for lv in LEVELS for s in (False, True) for t in tones))


def draw_caption(record: EmojiRecord, uniform: Sequence[float]) -> str:
    """The caption that three numbers in [0, 1) choose: level by LEVEL_WEIGHTS, style and tone each with p = 0.5."""
    level = LEVELS[int(np.searchsorted(np.cumsum(LEVEL_WEIGHTS), uniform[0], side="right").clip(0, len(LEVELS) - 1))]
    return caption(record, level, uniform[1] < 0.5, uniform[2] < 0.5)


def reference_indices(records: Sequence[EmojiRecord]) -> np.ndarray:
    """Rows of R, the benchmark's reference: each held-in cell once, its tone chosen by a fixed hash. In the records' order."""
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for i, r in enumerate(records):
        if r.split == "train":
            key = (_unit_hash("tone", r.concept, r.style, r.tone), i)
            best[r.cell] = min(best.get(r.cell, key), key)
    return np.array(sorted(i for _, i in best.values()))
