"""Prompts and real pictures of the published protocols, read from a folder of the data set as its publisher packs it.

DATA/annotations/captions_val2014.json, DATA/val2014/*.jpg
DATA/annotations/captions_val2017.json, DATA/val2017/*.jpg
DATA/captions_coco14_test.txt           (DMD2's list of 30,000; without it, a seeded list of our own)
DATA/coco_prompt_list.txt               (AMD's list of 5,000 captions of val2017, if wanted)
DATA/cifar-10-batches-bin/data_batch_1.bin ... 5
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.shards import Pictures
from diffusion2gan.files import sha256_of
from diffusion2gan.images import LOSSY_SUFFIXES, PICTURE_SUFFIXES, open_rgb
from diffusion2gan.pairs.prompts import prompts_digest

DMD2_LIST = "captions_coco14_test.txt"
DMD2_SHA256 = "edabd2a556026cbf5d36a5fffa35ad43d7ba71b72f6d640b727c1edefb7f1945"
AMD_LIST = "coco_prompt_list.txt"
AMD_SHA256 = ("fea841d5", "5247")
"""How the digest begins and ends."""


@dataclass(frozen=True)
class PromptList:
    """`prompts`, the list's `name`, and the sha256 of its lines."""

    name: str
    prompts: tuple[str, ...]
    sha256: str

    def first(self, count: int | None) -> PromptList:
        """The list cut to its first `count` prompts, under the same name. Raises UserError for a count out of range."""
        if count is None or count == len(self.prompts):
            return self
        if not 1 <= count <= len(self.prompts):
            raise UserError(f"count is {count}, expected 1 to {len(self.prompts)} prompts of the list {self.name}")
        return PromptList(self.name, self.prompts[:count], prompts_digest(self.prompts[:count]))


class PictureSet(Protocol):
    """Real or generated pictures by number. `identity` is a digest of which they are, never only a name."""

    name: str
    identity: str

    def __len__(self) -> int: ...
    def pictures(self, start: int, stop: int) -> Pictures:
        """Numbers start to stop - 1, uint8 RGB."""
        ...


class PictureFolder:
    """The pictures below a folder, sorted by path, or those called `only`, in their order; grey and transparent ones become RGB.
    Raises UserError when there are none, or one of `only` is not there."""

    def __init__(self, folder: Path, name: str | None = None, only: Sequence[str] | None = None):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, expected pictures; check the path")
        if only is None:
            self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        else:
            self.paths = [folder / n for n in only]
            if missing := [p for p in self.paths if not p.is_file()]:
                raise UserError(f"{missing[0]}: no such picture, and {len(missing) - 1} more; unpack the data set again")
        if not self.paths:
            raise UserError(f"{folder}: holds no picture, expected files ending in {', '.join(PICTURE_SUFFIXES)}")
        self.folder, self.name = folder, name or folder.name
        # Of names, sizes and times: the contents of 40,000 files would take minutes at every start.
        files = (f"{p.relative_to(folder).as_posix()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in self.paths)
        self.identity = prompts_digest(list(files))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def lossy(self) -> int:
        """How many of the pictures have lost something in their file."""
        return sum(p.suffix.lower() in LOSSY_SUFFIXES for p in self.paths)

    def refuse_two_orders(self, why: str) -> None:
        """Raises UserError for numbered names that have an order as numbers and another one as text: of captions beside them, nobody
        knows which is meant."""
        names = [p.relative_to(self.folder).as_posix() for p in self.paths]
        if len({re.sub(r"\d+", "", name) for name in names}) > 1:
            return
        numbered = sorted(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
        if numbered != names:
            first = next(i for i, (a, b) in enumerate(zip(numbered, names, strict=True)) if a != b)
            raise UserError(
                f"{self.folder}: by name {names[first]} comes before {numbered[first]}, by number after it, and {why}; give all names as many "
                "digits (00002.png)"
            )

    def pictures(self, start: int, stop: int) -> list[np.ndarray]:
        remedy = "take it out of the folder, or replace it"
        return [np.asarray(open_rgb(path, remedy)) for path in self.paths[start:stop]]


class Cifar10:
    """CIFAR-10's 50,000 training pictures, from its binary version (the other one is a pickle), in the order of the files."""

    name = "cifar10-train"
    _ROW = 1 + 3 * 32 * 32

    def __init__(self, folder: Path):
        self._paths = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
        if missing := [p for p in self._paths if not p.exists()]:
            raise UserError(f"{missing[0]}: no such file, expected the binary version of CIFAR-10 unpacked in {folder.parent}")
        sizes = [p.stat().st_size for p in self._paths]
        if wrong := [p for p, size in zip(self._paths, sizes, strict=True) if size % self._ROW or not size]:
            raise UserError(f"{wrong[0]}: {wrong[0].stat().st_size} bytes, expected a multiple of {self._ROW}; unpack the archive again")
        self._starts = np.cumsum([0] + [size // self._ROW for size in sizes])
        self.identity = prompts_digest([sha256_of(p) for p in self._paths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def pictures(self, start: int, stop: int) -> np.ndarray:
        rows = []
        for path, first, end in zip(self._paths, self._starts, self._starts[1:], strict=False):
            if start < end and stop > first:
                file = np.memmap(path, np.uint8, "r").reshape(-1, self._ROW)
                rows.append(file[max(start - first, 0) : stop - first, 1:])
        return np.concatenate(rows).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def seeded_rows(total: int, count: int) -> np.ndarray:
    """`count` of `total` numbers without replacement, sorted: NumPy's PCG64(0), as eval practice for COCO subsets has it."""
    return np.sort(np.random.Generator(np.random.PCG64(0)).choice(total, count, replace=False))


def _annotations(path: Path) -> tuple[list[tuple[int, int, str]], dict[int, str]]:
    """COCO's captions in the order of the file, each (image id, annotation id, caption), and the images' file names."""
    try:
        content = json.loads(path.read_text())
        rows = [(int(a["image_id"]), int(a["id"]), " ".join(str(a["caption"]).split())) for a in content["annotations"]]
        return rows, {int(i["id"]): Path(i["file_name"]).name for i in content.get("images", ())}
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected COCO's captions; name the data set's folder by --data"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not COCO's captions, expected `annotations` with image_id, id and caption") from None


def _captions(path: Path) -> dict[int, tuple[int, str]]:
    """Image id -> its caption of the smallest annotation id."""
    first: dict[int, tuple[int, str]] = {}
    for image, annotation, caption in _annotations(path)[0]:
        if image not in first or annotation < first[image][0]:
            first[image] = (annotation, caption)
    return first


def _listed(name: str, captions: dict[int, tuple[int, str]], images: Sequence[int]) -> PromptList:
    lines = [f"{i}\t{captions[i][0]}\t{captions[i][1]}" for i in images]
    return PromptList(name, tuple(captions[i][1] for i in images), prompts_digest(lines))


def text_lines(text: str) -> list[str]:
    """Lines between newlines alone: `splitlines` would also split at U+2028 and other marks that stand inside real captions."""
    return text.removesuffix("\n").split("\n") if text else []


def coco14_prompts(data: Path, count: int = 30_000) -> PromptList:
    """DMD2's list when the file is there (its digest is checked), else a seeded choice of pictures, each with its first caption."""
    path = data / DMD2_LIST
    if path.exists():
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != DMD2_SHA256:
            raise UserError(f"{path}: sha256 is {digest[:16]}..., expected {DMD2_SHA256[:16]}...; copy DMD2's file again, or take it away")
        return PromptList("coco14-30k-dmd2", tuple(line.strip() for line in text_lines(content.decode())), digest)
    captions = _captions(data / "annotations" / "captions_val2014.json")
    images = sorted(captions)
    if len(images) < count:
        raise UserError(f"{data}: captions of {len(images)} pictures, expected at least {count}; unpack all of COCO 2014's annotations")
    return _listed("coco14-30k-seed0", captions, [images[i] for i in seeded_rows(len(images), count)])


def coco17_prompts(data: Path) -> PromptList:
    """Every picture of val2017 in order of its id, with the caption of the smallest annotation id."""
    captions = _captions(data / "annotations" / "captions_val2017.json")
    return _listed("coco17-5k-first", captions, sorted(captions))


def coco17_amd_prompts(data: Path) -> PromptList:
    """AMD's list for the pictures of val2017, another caption of each; `number----caption` a line, its digest checked."""
    path = data / AMD_LIST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}), expected AMD's list; copy it there, or take the first captions"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if (digest[:8], digest[-4:]) != AMD_SHA256:
        raise UserError(f"{path}: sha256 is {digest[:8]}...{digest[-4:]}, expected {'...'.join(AMD_SHA256)}; copy AMD's file again")
    captions = [line.partition("----")[2].strip() for line in text_lines(content.decode())]
    return PromptList("coco17-5k-amd", tuple(captions), digest)


def coco14_dmd2_sdxl(data: Path, count: int = 10_000) -> tuple[PromptList, list[str]]:
    """DMD2's set for SDXL: `count` pictures of val2014 with one caption each, and those pictures' file names.

    Its rule: the captions grouped by picture in the order of `images`, shuffled, the first of each picture kept, and `count` of these
    drawn, all by one NumPy generator of seed 123. Raises UserError for annotations without `images`, or too few.
    """
    path = data / "annotations" / "captions_val2014.json"
    rows, names = _annotations(path)
    if {image for image, _, _ in rows} != set(names) or len(names) < count:
        raise UserError(f"{path}: captions of {len(names)} listed pictures, expected at least {count}, all with captions; unpack it again")
    place = {image: i for i, image in enumerate(names)}
    rows.sort(key=lambda row: place[row[0]])
    random = np.random.RandomState(123)
    chosen: dict[int, tuple[int, str]] = {}
    for k in random.choice(len(rows), len(rows), replace=False):
        image, annotation, caption = rows[k]
        chosen.setdefault(image, (annotation, caption))
    shuffled = list(chosen)
    images = [shuffled[k] for k in random.choice(len(shuffled), count, replace=False)]
    return _listed("coco14-10k-dmd2", chosen, images), [names[image] for image in images]


def prompts_of_file(path: Path) -> PromptList:
    """A text file, one prompt a line. Raises UserError for an empty line or file."""
    try:
        lines = text_lines(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a text file with one prompt a line") from None
    if not lines:
        raise UserError(f"{path}: is empty, expected one prompt a line")
    if empty := next((i for i, line in enumerate(lines, 1) if not line.strip()), None):
        raise UserError(f"{path}: line {empty} is empty, expected one prompt a line; delete the line")
    return PromptList(path.name, tuple(line.strip() for line in lines), prompts_digest(lines))
