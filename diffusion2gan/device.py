"""What depends on the machine: where networks run, and whether they can be compiled there."""

from __future__ import annotations

import os
import shutil
import warnings

import torch
from torch import nn

from diffusion2gan.errors import UserError


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compile_for_one_shape(module: nn.Module, device: torch.device, setting: str) -> nn.Module:
    """`module` compiled for the shape of its first call; another shape compiles again.

    `setting` names what the user would switch off. Raises UserError for a CPU without a C++ compiler.
    """
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(f"{setting} is true, which needs a C++ compiler on a CPU, and there is none; install g++, or set {setting}=false")
    # Of diffusers' version checks, whose answer never changes.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]
