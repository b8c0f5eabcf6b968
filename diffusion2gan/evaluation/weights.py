"""Weights of scoring networks: looked for in one folder, then on the hub. Nothing is fetched from anywhere else.

They are other people's, under their own licences, and none ships with this package.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import cache_dir, hub_file, sha256_of


class UnavailableError(UserError):
    """A metric that cannot run here, for want of weights or of a library; the others can."""


def optional_module(name: str, extra: str) -> Any:
    """A module of a package that comes with one of our extras. Raises UnavailableError, which names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UnavailableError(
            f'{package} cannot be imported ({error}), expected for this metric; run `pip install "diffusion2gan[{extra}]"`'
        ) from None


@dataclass(frozen=True)
class Weights:
    """`files` and folders below the weights folder, all needed, the one that is loaded first; `origin` says where they are published;
    `hub` is a repository that has them. `sha256` begins the digest of the first file, where its publisher names it."""

    files: tuple[str, ...]
    origin: str
    hub: str | None = None
    sha256: str | None = None


CLIP_G14 = "CLIP-ViT-g-14-laion2B-s12B-b42K"
WEIGHTS: Mapping[str, Weights] = {
    "inception_ts": Weights(("inception-2015-12-05.pt",), "NVIDIA stylegan2-ada-pytorch, pretrained/metrics"),
    "inception_tf": Weights(
        ("weights-inception-2015-12-05-6726825d.pth",), "toshas/torch-fidelity on GitHub, release v0.2.0", sha256="6726825d"
    ),
    "vgg16": Weights(("vgg16-397923af.pth",), "torchvision's VGG16_Weights.IMAGENET1K_V1", sha256="397923af"),
    "clip_g14": Weights(
        (f"{CLIP_G14}/open_clip_pytorch_model.bin", f"{CLIP_G14}/open_clip_config.json"),
        f"laion/{CLIP_G14} on the hub",
        f"laion/{CLIP_G14}",
    ),
    "dreamsim": Weights(
        (
            "dreamsim/dino_vitb16_pretrain.pth",
            "dreamsim/open_clip_vitb16_pretrain.pth.tar",
            "dreamsim/clip_vitb16_pretrain.pth.tar",
            "dreamsim/ensemble_lora",
            # Its DINO branch would otherwise fetch and run these.
            "dreamsim/facebookresearch_dino_main",
            "dreamsim/checkpoints/dino_vitbase16_pretrain.pth",
        ),
        "ssundaram21/dreamsim on GitHub, dreamsim_ensemble_checkpoint.zip of release v0.2.0-checkpoints, unpacked; "
        "and facebookresearch/dino on GitHub, a checkout of main and its ViT-B/16 weights",
    ),
    "dinov2": Weights(
        ("dinov2_vitl14_pretrain.pth", "dinov2"),
        "facebookresearch/dinov2: its ViT-L/14 weights, and a checkout of the repository",
    ),
}


def weights_folder(folder: Path | None = None) -> Path:
    """`folder`, or $DIFFUSION2GAN_WEIGHTS, or `evaluation` in the cache."""
    return folder or Path(os.environ.get("DIFFUSION2GAN_WEIGHTS") or cache_dir() / "evaluation")


@dataclass(frozen=True)
class FoundWeights:
    """Where the first file is, the folder that all are below, and what a result says of them."""

    path: Path
    folder: Path
    facts: dict[str, str] = field(default_factory=dict)


def find_weights(key: str, folder: Path | None = None, allow_unknown: bool = False) -> FoundWeights:
    """The weights `key`, checked against their publisher's digest where there is one, unless `allow_unknown`.
    Raises UnavailableError that says which file to put where, or that it is another one."""
    wanted, where = WEIGHTS[key], weights_folder(folder)
    paths = [where / name for name in wanted.files]
    if wanted.hub and not all(p.exists() for p in paths):
        paths = _from_hub(wanted, key, where)
    if missing := [name for name, p in zip(wanted.files, paths, strict=True) if not p.exists()]:
        raise UnavailableError(
            f"{key}: {where} has no {missing[0]}, expected {', '.join(wanted.files)} there; copy it from {wanted.origin}"
        )
    digest = _sha256(paths[0])
    as_published = digest.startswith(wanted.sha256 or "")
    if not as_published and not allow_unknown:
        raise UnavailableError(f"{paths[0]}: sha256 begins {digest[:8]}, expected {wanted.sha256}; copy it again from {wanted.origin}")
    checked = ("publisher's digest" if as_published else "UNKNOWN WEIGHTS") if wanted.sha256 else "no digest is published"
    facts = {
        "key": key,
        "sha256": digest if len(paths) == 1 else _sha256_of_all(paths),
        "checked": checked,
    }
    return FoundWeights(paths[0], where, facts)


def _from_hub(wanted: Weights, key: str, where: Path) -> list[Path]:
    assert wanted.hub is not None
    try:
        return [hub_file(wanted.hub, Path(name).name) for name in wanted.files]
    except FileNotFoundError as error:
        raise UnavailableError(
            f"{key}: {where} has no {wanted.files[0]}, and {wanted.hub} could not be reached ({error}); copy {', '.join(wanted.files)} there"
        ) from None


def _sha256_of_all(paths: list[Path]) -> str:
    """Of all files, folders with all that is in them: a metric is more than its largest file. What git and Python leave beside them is
    another one on every host."""
    files = sorted(
        f
        for p in paths
        for f in (p.rglob("*") if p.is_dir() else [p])
        if f.is_file() and not (p.is_dir() and any(n.startswith(".") or n == "__pycache__" for n in f.relative_to(p).parts))
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


_digests: dict[tuple[str, int, int], str] = {}


def _sha256(path: Path) -> str:
    """Of gigabytes, so once a process and state of the file."""
    state = path.stat()
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if key not in _digests:
        _digests[key] = sha256_of(path)
    return _digests[key]


def safe_state(path: Path) -> dict[str, Tensor]:
    """A state dict of tensors; no pickled code is run. Raises UserError for anything else."""
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen classes here
        reason = in_one_line(error)
        raise UserError(f"{path}: cannot be read as weights ({reason}), expected a state dict; copy the file again") from None
    return state
