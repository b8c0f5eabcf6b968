"""The software that a result depends on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch


def software(packages: Sequence[str]) -> dict[str, Any]:
    """Versions of Python and `packages` (None for one that is not installed), and torch's threads: they change last digits."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch_threads": torch.get_num_threads()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
