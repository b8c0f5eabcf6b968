"""Stable Diffusion XL: two text encoders, pooled text and the picture's size as further conditions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from diffusion2gan.teachers.folders import check_parts, token_ids, tokenizer_digest
from diffusion2gan.teachers.protocol import TextCondition
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher


class SDXLTeacher(StableDiffusionTeacher):
    """Implements `Teacher` for `StableDiffusionXLPipeline` folders.

    `TextCondition.added` holds `text_embeds` (B, D2), the second encoder's pooled output, and `time_ids` (B, 6): original size, crop and
    target size in pixels, as the stock pipeline has them by default (the whole picture, no crop).
    """

    family = "sdxl"
    tiny_decoder = "madebyollin/taesdxl"

    def __init__(self, pipeline: StableDiffusionXLPipeline):
        super().__init__(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, dict(pipeline.scheduler.config))
        check_parts(text_encoder_2=pipeline.text_encoder_2, tokenizer_2=pipeline.tokenizer_2)
        self.text_encoder_2, self.tokenizer_2 = pipeline.text_encoder_2, pipeline.tokenizer_2
        self.text_encoder_2.requires_grad_(False).eval()
        # The stock pipeline leaves the unconditional branch without text, unless it is given a negative prompt.
        self.force_zeros_for_empty_prompt = bool(pipeline.config.force_zeros_for_empty_prompt)
        if self.vae.config.force_upcast and self.vae.dtype == torch.float16:
            # Its activations do not fit into half precision.
            self.vae.to(torch.float32)

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> SDXLTeacher:
        return cls(pipeline)

    def _text_encoders(self) -> list[nn.Module]:
        return [self.text_encoder, self.text_encoder_2]

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "tokenizer_2": tokenizer_digest(self.tokenizer_2),
            "force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt,
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> both encoders' penultimate layers side by side (B, L, D1 + D2), with `added` as above."""
        layers, pooled = [], torch.empty(0)
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            found = encoder(token_ids(tokenizer, prompts).to(self.device), output_hidden_states=True)
            layers.append(found.hidden_states[-2])
            pooled = found[0]
        embeddings = torch.cat(layers, dim=-1).to(self.dtype)
        return TextCondition(embeddings, {"text_embeds": pooled.to(self.dtype), "time_ids": self._time_ids(len(prompts))})

    def reads(self, prompts: Sequence[str]) -> list[Hashable]:
        """The token ids of both tokenizers."""
        second = token_ids(self.tokenizer_2, prompts).tolist()
        return [(first, tuple(ids)) for first, ids in zip(super().reads(prompts), second, strict=True)]

    def _time_ids(self, batch: int) -> Tensor:
        side = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = [n * side for n in self.latent_shape[1:]]
        return torch.tensor([[*size, 0, 0, *size]], dtype=self.dtype, device=self.device).expand(batch, -1)

    def encode_negative(self, prompt: str = "") -> TextCondition:
        """The unconditional branch: zeros for the empty prompt, as the stock pipeline has it without a negative prompt."""
        condition = self.encode_prompts([prompt])
        if prompt or not self.force_zeros_for_empty_prompt:
            return condition
        zeros = {"text_embeds": torch.zeros_like(condition.added["text_embeds"])}
        return TextCondition(torch.zeros_like(condition.embeddings), dict(condition.added) | zeros)
