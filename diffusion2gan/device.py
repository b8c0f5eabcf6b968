"""What depends on the machine: where networks run, and whether they can be compiled there."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from diffusion2gan.errors import UserError

Compilable = TypeVar("Compilable", bound=Callable[..., Any])


def default_device() -> str:
    """The CPU, the GPU, or this process' own one under torchrun."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def available_memory(device: torch.device | str) -> int:
    """Bytes that this process can have: of a GPU what is free or its own already; of a host's memory, or what a container may have of it,
    its share among the processes that torchrun started there."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _CONTAINER_LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():  # without a limit: "max"
            memory = min(memory, int(text))
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# Of control groups, in their second and first version.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def out_of_memory(error: Exception) -> str | None:
    """Whose memory was too small, "GPU" or "host", or None for another error: libraries say it in words alone."""
    said = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in said:
        return "host"
    return "GPU" if "out of memory" in said or "ALLOC_FAILED" in said else None


def has_bf16(device: torch.device | str) -> bool:
    """Whether `device` computes in bfloat16 itself. A CPU that does not (no AVX-512, no AMX) takes 16 times as long
    as in float32 (a convolution with its backward, Zen 3)."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_autocast(device: torch.device | str) -> torch.autocast:
    """Autocast to bfloat16 where `device` has it, and nothing elsewhere."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bf16(device))


def warn_of_slow_bf16(device: torch.device | str, setting: str) -> None:
    """Says so when the bfloat16 that `setting` asks for is slow on `device`."""
    if not has_bf16(device):
        warnings.warn(
            f"{setting.partition('=')[0]} asks for bfloat16, which this {torch.device(device).type.upper()} computes in software, "
            f"many times slower than float32; better stop and repeat with --set {setting}",
            stacklevel=2,
        )


def _missing_for_compiling(device: torch.device) -> str | None:
    """What `torch.compile` needs on `device` and this machine lacks."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "a C++ compiler (g++)"
    if device.type == "cuda" and all(shutil.which(c) is None for c in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (gcc)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (python3-dev)"
    return None


def can_compile(device: torch.device) -> bool:
    """Whether `compile_for_one_shape` would work."""
    return _missing_for_compiling(device) is None


def _prepare_compiling(device: torch.device, setting: str) -> None:
    missing = _missing_for_compiling(device)
    if missing is not None:
        raise UserError(f"{setting} is true, which needs {missing}, and there is none; install it, or set {setting}=false")
    # Of diffusers' version checks, whose answer never changes.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    # Otherwise a network with hooks might run the graph of one without.
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # type: ignore[assignment]
    # Inside DDP a graph would be cut at every bucket: a hundred graphs for each network of Stable Diffusion 1.5.
    torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]


def compile_for_one_shape(function: Compilable, device: torch.device, setting: str) -> Compilable:
    """A network or function compiled for the shape of its first call; another shape compiles again.

    `setting` names what the user would switch off. Raises UserError where the machine lacks what compiling needs.
    """
    _prepare_compiling(device, setting)
    return cast(Compilable, torch.compile(function, dynamic=False))


def compile_in_place(module: nn.Module, device: torch.device, setting: str) -> None:
    """The same of a module's own calls: it stays itself, with the names of its weights."""
    _prepare_compiling(device, setting)
    module.compile(dynamic=False)
