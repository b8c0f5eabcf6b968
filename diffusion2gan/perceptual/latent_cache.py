"""Labelled images encoded once: what a LatentVGG is trained on in any latent space.

Encoding on the fly costs others most of their training time. A cache is a folder of `.npy` shards, each written whole
under its own name; the same command goes on where it stopped, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import atomic_path, disk_errors, sweep_temporaries, write_json
from diffusion2gan.images import PICTURE_SUFFIXES, open_rgb, to_tensor

# ImageNet has 313 of them, each open while it is read: below the usual limit of 1,024 open files.
SHARD = 4096
_SCALE, _RATIO = (0.25, 1.0), (3 / 4, 4 / 3)


class LabelledImages(Protocol):
    """Images with one class each."""

    classes: list[str]
    fingerprint: str
    """Names the images: another list of files has another."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """RGB."""
        ...

    def label(self, index: int) -> int:
        """Index into `classes`."""
        ...


class ImageFolder:
    """A folder with one subfolder of images a class. Raises UserError when there are none, or when one cannot be read."""

    def __init__(self, root: Path):
        self.root = root
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        present = [(p, i) for i, c in enumerate(self.classes) for p in sorted((root / c).rglob("*"))]
        self.files = [(p, i) for p, i in present if p.suffix.lower() in PICTURE_SUFFIXES]
        others = [p.suffix.lower() or p.name for p, _ in present if p.suffix.lower() not in PICTURE_SUFFIXES and p.is_file()]
        if others:
            warnings.warn(
                f"{root}: {len(others)} files are not read ({', '.join(sorted(set(others))[:5])}): no images of {', '.join(PICTURE_SUFFIXES)}",
                stacklevel=2,
            )
        if not self.files:
            raise UserError(f"{root}: no images in subfolders, expected {root.name}/CLASS/IMAGE; name a folder laid out so")
        listing = "".join(f"{p.relative_to(root)} {p.stat().st_size}\n" for p, _ in self.files)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        return open_rgb(self.files[index][0], "mend or remove the file")

    def label(self, index: int) -> int:
        return self.files[index][1]


class HubImages:
    """A split of a hub data set with columns `image` (or `img`) and `label`, through `datasets`."""

    def __init__(self, name: str, splits: tuple[str, ...]):
        try:
            import datasets
        except ImportError:
            raise UserError(f"{name}: is no folder; hub data sets need the package datasets: pip install datasets") from None
        try:
            available = datasets.get_dataset_split_names(name)
            self.rows = datasets.load_dataset(name, split=next((s for s in splits if s in available), splits[0]))
            columns = [c for c in ("image", "img") if c in self.rows.features]
            if not columns:
                raise KeyError(f"no column image or img among {', '.join(self.rows.features)}")
            self._image = columns[0]
            self.classes = list(self.rows.features["label"].names)
            self._labels = np.asarray(self.rows.with_format("numpy")["label"][:], np.int64)
        except (OSError, ValueError, KeyError, AttributeError, ConnectionError) as error:
            reason = in_one_line(error)
            raise UserError(
                f"{name}: split {splits[0]} cannot be loaded as images with labels ({reason}); name a folder or another data set"
            ) from None
        self.fingerprint = str(self.rows._fingerprint)

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        try:
            return self.rows[index][self._image].convert("RGB")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"row {index}, column {self._image}: cannot be read as a picture ({error}); choose another data set") from None

    def label(self, index: int) -> int:
        return int(self._labels[index])


def open_images(source: str, split: str) -> LabelledImages:
    """`SOURCE/SPLIT/CLASS/IMAGE` of a local folder ("val" is also found as "validation" or "test"), or a hub data set's split."""
    names = {"train": ("train",), "val": ("validation", "val", "test")}[split]
    root = Path(source)
    if root.is_dir():
        found = next((root / n for n in names if (root / n).is_dir()), None)
        if found is None:
            raise UserError(f"{source}: has no folder {' or '.join(names)}, expected train and val with a subfolder a class")
        return ImageFolder(found)
    return HubImages(source, names)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The middle of the image, its shorter side first brought to 8 / 7 of `resolution` (256 for 224)."""
    scale = resolution * 8 / 7 / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def random_crop(image: Image.Image, resolution: int, rng: np.random.Generator) -> Image.Image:
    """A rectangle of a quarter to all of the area, of a ratio of 3:4 to 4:3, brought to a square and flipped in half of the cases."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*_SCALE)
        ratio = np.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def cache_latents(
    images: LabelledImages,
    encode: Callable[[Tensor], Tensor],
    folder: Path,
    settings: dict[str, Any],
    resolution: int,
    crops: int = 0,
    limit: int | None = None,
    batch: int = 32,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Encodes every image into `folder`: the centre crop, or `crops` random ones.

    `encode`: pixels (B, 3, resolution, resolution) in [-1, 1] to scaled latents, at most `batch` at once. `settings` name the autoencoder; a folder of
    other settings is refused. `limit`: only so many images, spread evenly. Process `rank` of `world` makes every world-th shard.
    """
    chosen = np.arange(len(images)) if limit is None or limit >= len(images) else np.linspace(0, len(images) - 1, limit).round().astype(int)
    settings = settings | {"resolution": resolution, "crops": crops, "seed": seed, "images": len(chosen)}
    settings |= {"source": images.fingerprint, "classes": images.classes}
    path = folder / "settings.json"
    if path.exists():
        theirs = _read_settings(path)
        for key, value in settings.items():
            if theirs.get(key) != value:
                raise UserError(
                    f"{folder}: latents of other settings: {key} is {theirs.get(key)!r} there and {value!r} now; choose a new --out"
                )
    elif rank == 0:
        write_json(path, settings)
    shards = range(0, len(chosen), SHARD)
    with tqdm(total=len(chosen), desc=f"encode {folder.name}", unit="image", mininterval=1, disable=rank != 0) as bar:
        for number, start in enumerate(shards):
            rows = chosen[start : start + SHARD]
            if number % world == rank and not (folder / f"{number:05d}.npy").exists():
                at_once = max(1, batch // max(1, crops))
                latents = [
                    _encode_rows(images, rows[i : i + at_once], encode, resolution, crops, seed) for i in range(0, len(rows), at_once)
                ]
                _save(folder / f"{number:05d}-labels.npy", np.array([images.label(int(i)) for i in rows], np.int32))
                _save(folder / f"{number:05d}.npy", np.concatenate(latents))
            bar.update(len(rows))
    sweep_temporaries(folder)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("images"), int):
        raise UserError(
            f"{path}: cannot be read, expected the settings of cached latents; delete {path.parent} and run the same command again"
        )
    return settings


@torch.inference_mode()
def _encode_rows(
    images: LabelledImages, rows: np.ndarray, encode: Callable[[Tensor], Tensor], resolution: int, crops: int, seed: int
) -> np.ndarray:
    """(n, max(1, crops), C, h, w) float16."""
    views = []
    for index in rows:
        image = images.image(int(index))
        if crops == 0:
            views.append(np.asarray(centre_crop(image, resolution)))
        for crop in range(crops):
            rng = np.random.Generator(np.random.Philox(key=[seed, int(index) << 16 | crop]))
            views.append(np.asarray(random_crop(image, resolution, rng)))
    latents = encode(to_tensor(np.stack(views))).cpu().half()
    if not latents.isfinite().all():
        raise UserError(f"the latents of images {rows[0]} to {rows[-1]} are not finite, or beyond float16's range; encode in float32")
    return latents.unflatten(0, (len(rows), -1)).numpy()


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


class LatentCache:
    """The shards of a folder, memory-mapped. Raises UserError while shards are missing, or for a damaged one."""

    def __init__(self, folder: Path, wait: bool = False):
        """`wait`: other processes are still making shards."""
        path = folder / "settings.json"
        while wait and not (path.exists() and not self._missing(_read_settings(path), folder)):
            time.sleep(1)
        if not path.exists():
            raise UserError(f"{folder}: no cached latents (no settings.json); run `diffusion2gan perceptual train` with this --out")
        self.settings: dict[str, Any] = _read_settings(path)
        self.count: int = self.settings["images"]
        total, missing = -(-self.count // SHARD), self._missing(self.settings, folder)
        if missing:
            raise UserError(f"{folder}: {total - len(missing)} of {total} shards are there; run the same command again to encode the rest")
        with disk_errors(folder):
            try:
                self._shards = [np.load(folder / f"{i:05d}.npy", mmap_mode="r", allow_pickle=False) for i in range(total)]
                labels = [np.load(folder / f"{i:05d}-labels.npy", allow_pickle=False) for i in range(total)]
            except (ValueError, EOFError) as error:
                raise UserError(f"{folder}: a shard cannot be read ({error}); delete it and run the same command again") from None
        self.labels = np.concatenate(labels)
        if len(self.labels) != self.count or sum(map(len, self._shards)) != self.count:
            raise UserError(
                f"{folder}: {sum(map(len, self._shards))} latents and {len(self.labels)} labels, expected {self.count} of each; delete the folder and run again"
            )
        self.shape: tuple[int, int, int] = self._shards[0].shape[2:]
        self.views: int = self._shards[0].shape[1]

    @staticmethod
    def _missing(settings: dict[str, Any], folder: Path) -> list[int]:
        return [i for i in range(-(-settings["images"] // SHARD)) if not (folder / f"{i:05d}.npy").exists()]

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """Latents (B, C, h, w) float32 of the given rows, each in one of its views."""
        return torch.from_numpy(
            np.stack([self._shards[r // SHARD][r % SHARD, v] for r, v in zip(rows, views, strict=True)]).astype(np.float32)
        )

    def in_order(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """All latents (first view) and labels, `size` at a time."""
        for start in range(0, self.count, size):
            rows = np.arange(start, min(start + size, self.count))
            yield self.batch(rows, np.zeros(len(rows), np.int64)), torch.from_numpy(self.labels[rows].astype(np.int64))
