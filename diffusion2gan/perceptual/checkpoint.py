"""One folder = `config.json` and `model.safetensors`: how every perceptual network is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.files import atomic_path, write_bytes_atomic

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save_folder(module: nn.Module, config: Mapping[str, Any], folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes `module`'s weights and `config` to `folder`; each file is replaced in one rename, the config last.

    `dtype` is how the convolution kernels are stored (None: as they are). Vectors, which are what batch norm
    divides by, keep their precision.
    """
    folder = Path(folder)
    tensors = {}
    for name, value in module.state_dict().items():
        store = dtype if dtype is not None and value.is_floating_point() and value.ndim > 1 else value.dtype
        # safetensors refuses channels-last tensors, and contiguous() alone would keep a shared storage shared.
        tensors[name] = value.detach().to("cpu", store).clone(memory_format=torch.contiguous_format)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_bytes_atomic(folder / CONFIG, (json.dumps(dict(config), indent=2) + "\n").encode())


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """`config.json` of `folder` without its `class`, which must be `kind`. UserError if it is missing or another class' file."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected a folder written by {kind}.save_pretrained; check the path") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected JSON; write the folder again with {kind}.save_pretrained") from None
    found = config.pop("class", None) if isinstance(config, dict) else None
    if found != kind:
        raise UserError(f"{path}: class is {found!r}, expected {kind!r}; load the folder with the class that wrote it")
    return config


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of `model.safetensors` in `folder`, on the CPU. UserError if the file is missing or damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected the weights beside {CONFIG}; copy or save the whole folder again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a safetensors file; copy or save the folder again") from None


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads `state` into `module`, all of it or nothing. UserError names the first tensor that is missing, unknown or of another shape."""
    expected = module.state_dict()
    remedy = "check that config and weights belong together"
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has the unknown tensor", state.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source}: {problem} {min(names)}{more}, expected exactly those of this {type(module).__name__}; {remedy}")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(f"{source}: {key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}; {remedy}")
    module.load_state_dict(dict(state))
