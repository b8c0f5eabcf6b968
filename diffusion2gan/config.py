"""The base of every configuration section: typed, closed, immutable."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """An unknown key or a wrong type is an error; a value is never changed after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
