"""What a teacher says. What simulates, distils and scores uses this protocol and never asks for the family.

Legend: B batch, C latent channels, H and W latent height and width, L tokens, D width of a text embedding.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from diffusion2gan.config import Section

PredictionType = Literal["epsilon", "v_prediction"]
Precision = Literal["float64", "float32", "bfloat16", "float16"]


class TeacherConfig(Section):
    """Which pretrained model is the teacher."""

    family: Literal["stable_diffusion", "sdxl", "pixel"] = "stable_diffusion"
    """Stable Diffusion 1.x and 2.x, SDXL, or a diffusion model of pixels (DDPM, EDM)."""
    source: str = "embedded"
    """`embedded`, a diffusers folder, or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`."""
    revision: str | None = None
    """Branch, tag or commit of the hub id, `main` for its newest; without one, the commit in `published.REVISIONS`, or the newest of others."""
    variant: str | None = None
    """Weight variant of the hub repository, e.g. `fp16`."""
    dtype: Precision = "float32"
    """Precision of the frozen networks. The state of the ODE stays in float32 or better."""
    resolution: int | None = Field(None, ge=1)
    """Side of the pictures in pixels; without a number, the network's own."""


@dataclass(frozen=True)
class TextCondition:
    """c: what the network reads of a batch of prompts. `embeddings` (B, L, D); `added` further (B, ...) tensors (SDXL's)."""

    embeddings: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice | Tensor) -> TextCondition:
        return TextCondition(self.embeddings[rows], {k: v[rows] for k, v in self.added.items()})

    def to(self, dtype: torch.dtype) -> TextCondition:
        """The same condition in another precision."""
        return TextCondition(self.embeddings.to(dtype), {k: v.to(dtype) for k, v in self.added.items()})

    def expand(self, batch: int) -> TextCondition:
        """Repeats a condition of one prompt `batch` times, without copying."""
        return TextCondition(
            self.embeddings.expand(batch, *self.embeddings.shape[1:]), {k: v.expand(batch, *v.shape[1:]) for k, v in self.added.items()}
        )

    @staticmethod
    def cat(*parts: TextCondition) -> TextCondition:
        return TextCondition(torch.cat([p.embeddings for p in parts]), {k: torch.cat([p.added[k] for p in parts]) for k in parts[0].added})


class Teacher(Protocol):
    """A frozen diffusion model in its own latent space."""

    network: Any
    """The diffusion network itself, an `nn.Module`; a student starts as a copy of it."""
    latent_shape: tuple[int, int, int]
    """(C, H, W) of a scaled latent: what the network reads and what pairs store."""
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    """The schedule's cumulative alpha-bar, (T,) float32 on the CPU."""
    scheduler_config: dict[str, Any]
    """The configuration from which any diffusers scheduler of this teacher is made."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def identity(self) -> dict[str, Any]:
        """Names the teacher in a manifest: family, digest of the weights, latent scaling. No paths."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> c."""
        ...

    def reads(self, prompts: Sequence[str]) -> list[Hashable]:
        """What the teacher sees of each prompt: equal for two prompts that it cannot tell apart."""
        ...

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for the first prompt that cannot be read; of a teacher of text any can."""

    def encode_negative(self, prompt: str = "") -> TextCondition:
        """The condition of the unconditional branch of guidance, one row."""
        ...

    def evaluate(self, latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module | None = None) -> Tensor:
        """One network evaluation: (B, C, H, W), timestep () or (B,), c -> prediction (B, C, H, W). `network` defaults to the teacher's."""
        ...

    def decoder_in_float32(self) -> None:
        """Decodes in float32 or better from now on."""

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latents (B, C, H, W) -> pixels (B, 3, h, w), about [-1, 1], differentiable."""
        ...
