"""The base of every configuration section: typed, closed, immutable; and how settings that were saved are compared."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """An unknown key or a wrong type is an error; a value is never changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def settings_difference(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, ours, theirs) for every setting that differs."""
    rows: list[tuple[str, Any, Any]] = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += settings_difference(a, b, f"{prefix}{key}.")
        elif a != b:
            rows.append((prefix + key, a, b))
    return rows


HOW_KEPT = frozenset({"batch_size", "shard_size", "noise_storage", "precision", "text_precision", "compile"})
"""Settings of a pair store that say how its pairs were made and are kept, not which pairs they are. A student is trained in float32 whatever
the precision of the pairs."""


def store_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The same of two pair stores' settings, but for where the teacher's weights were found (a folder, or a commit of the hub): that they
    are the same weights is for their digest to say."""
    return [row for row in settings_difference(ours, theirs) if row[0] != "teacher.source"]
