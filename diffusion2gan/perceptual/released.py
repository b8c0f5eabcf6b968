"""Where the weights of a LatentLPIPS come from: a folder, the hub, or the checkpoints that the paper's first author released.

Those checkpoints are pickles of tensors (read with `weights_only=True`) under CC BY-NC 4.0, which is said when one is loaded.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import hub_file, sha256_of
from diffusion2gan.perceptual.checkpoint import CONFIG, WEIGHTS
from diffusion2gan.perceptual.space import LatentSpace, Origin

REPOSITORY = "Mingguksky/elatentlpips"
LICENCE = "CC BY-NC 4.0, non-commercial: M. Kang, elatentlpips"
# The factors are those of the autoencoders' own configurations.
SPACES = {
    "sd15": LatentSpace(0.18215),
    "sd21": LatentSpace(0.18215),
    "sdxl": LatentSpace(0.13025),
    "sd3": LatentSpace(1.5305, 0.0609),
    "flux": LatentSpace(0.3611, 0.1159),
}
_FILE = "{}_latest_vgg16_tuned.pth"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class LicenceNotice(UserWarning):
    """Says under which licence weights are that were just loaded and are not this project's."""


@dataclass(frozen=True)
class Resolved:
    """A folder of ours, or the tensors of a released checkpoint with the latent space they read."""

    folder: Path = field(default_factory=Path)
    state: dict[str, Tensor] | None = None
    space: LatentSpace | None = None
    origin: Origin | None = None


def resolve(source: str | Path, revision: str | None = None) -> Resolved:
    """Finds `source`: see `LatentLPIPS.from_pretrained`. Raises UserError in one line."""
    path = Path(source)
    if str(source) in SPACES:
        name = f"elatentlpips_ckpt/{_FILE.format(source)}"
        downloaded = _from_hub(REPOSITORY, name, revision)
        origin = Origin(f"{REPOSITORY}/{name}", sha256_of(downloaded))
        return Resolved(state=read_released(downloaded), space=SPACES[str(source)], origin=origin)
    if revision is not None and (path.exists() or source == "embedded"):
        raise UserError(f"revision is {revision!r} and {source} is no hub repository; leave revision away")
    if source == "embedded":
        return Resolved(folder=embedded_folder("latent_vgg"))
    if path.is_dir():
        return Resolved(folder=path)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UserError(f"{path}: is one file of a folder, expected the folder that also holds {CONFIG}; name {path.parent}")
        encoder = next((n for n in SPACES if path.name == _FILE.format(n)), None)
        state = read_released(path)
        return Resolved(state=state, space=SPACES[encoder] if encoder else None, origin=Origin(path.name, sha256_of(path)))
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not path.parent.is_dir():
        config = _from_hub(source, CONFIG, revision)
        # Both of one commit, whose name the hub's cache gives the folder: the branch may move between two requests.
        commit = config.parent.name
        _from_hub(source, WEIGHTS, commit if re.fullmatch("[0-9a-f]{40}", commit) else revision)
        return Resolved(folder=config.parent)
    names = ", ".join(["embedded", *SPACES])
    raise UserError(f"{source}: no such folder or file, and none of {names}; name one of these, a path or a hub repository")


def _from_hub(repository: str, name: str, revision: str | None) -> Path:
    try:
        path = hub_file(repository, name, revision)
    except FileNotFoundError as error:
        raise UserError(f"{repository}: {name} could not be downloaded ({error}); go online once, or give the path of a copy") from None
    # The hub's cache names a large file by its sha256; a file that was changed there since is not what was downloaded.
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        found = sha256_of(blob)
        if found != blob.name:
            raise UserError(f"{blob}: its sha256 is {found[:16]}..., expected {blob.name[:16]}...; delete that file and load again")
    return path


def read_released(path: Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint. UserError for a file that is none, or that holds more than tensors."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise UserError(
                f"{path}: is no torch checkpoint, expected a file named like {_FILE.format('ENCODER')}; download it again"
            ) from None
        raise UserError(
            f"{path}: holds objects other than tensors, expected a state dict; do not load it: such a file can run code"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: cannot be read ({reason}), expected a released checkpoint; download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors; give the file named {_FILE.format('ENCODER')}")
    if "net.slice1.0.weight" not in state:
        raise UserError(
            f"{path}: lacks net.slice1.0.weight, expected network and heads in one file; give the one named {_FILE.format('ENCODER')}"
        )
    return state
