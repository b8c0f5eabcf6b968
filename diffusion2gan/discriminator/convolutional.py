"""Table 2's baseline: a discriminator trained from scratch, convolutional and multi-scale in GigaGAN's manner.

Kang et al. 2023: the input resized to every resolution enters the trunk there, every resolution gives its own
predictions, and each prediction has an unconditional part and one modulated by a global code of the text. Our own code; the
parameter count is that of the teacher's network within an eighth for the embedded teacher and SD 1.5, a sixth of it for SDXL, whose
transformers are most of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, resized
from diffusion2gan.teachers.protocol import Teacher, TextCondition

# Times the teacher's own widths: the encoder alone then weighs about as much as the teacher's encoder and decoder.
WIDTH = 2
SLOPE = 0.2
# Self-attention up to so many positions, as GigaGAN has it at 8 x 8 and 16 x 16.
ATTENTION_POSITIONS = 256


class _Residual(nn.Module):
    """Two convolutions beside the identity: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # The trunk begins as a chain of resizings, whatever its depth.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.conv1(F.leaky_relu(x, SLOPE)), SLOPE))


class _SelfAttention(nn.Module):
    """Attention among positions beside the identity, as plain products: their double backward exists everywhere."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        weights = torch.softmax(query @ key.transpose(1, 2) / channels**0.5, dim=-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, channels, height, width)
        return x + self.out(attended)


class _TextCode(nn.Module):
    """Token embeddings (B, L, D) -> one code (B, hidden): the tokens weighed by a learned query, then two layers."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.query = nn.Linear(width, 1)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, embeddings: Tensor) -> Tensor:
        weights = torch.softmax(self.query(embeddings), dim=1)
        return self.layers((weights * embeddings).sum(1))


class _Prediction(nn.Module):
    """A feature (B, C, h, w) and a text code (B, K) -> logits (B, 1, h, w): unconditional part + projection on the text."""

    def __init__(self, channels: int, code: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.unconditional = nn.Conv2d(channels, 1, 1)
        self.of_text = nn.Linear(code, channels)
        for layer in (self.unconditional, self.of_text):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor, code: Tensor) -> Tensor:
        feature = F.leaky_relu(self.conv(F.leaky_relu(feature, SLOPE)), SLOPE)
        modulated = (feature * self.of_text(code)[:, :, None, None]).sum(1, keepdim=True) / feature.shape[1] ** 0.5
        logits = self.unconditional(feature) + modulated
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class ConvolutionalDiscriminator(nn.Module):
    """D of Table 2's first row with a discriminator.

    channels: width at each resolution, halving the size each time. forward as `MultiScaleDiscriminator`'s: one map a resolution,
    resolution 0 the lowest; without `multi_scale` the latent enters at the first resolution and the lowest alone predicts.
    """

    def __init__(self, latent_shape: tuple[int, int, int], channels: list[int], text_width: int, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        in_channels, height, width = latent_shape
        self.noise_in = nn.Conv2d(in_channels, channels[0], 3, padding=1) if config.noise else None
        entering = len(channels) if config.multi_scale else 1
        self.latent_in = nn.ModuleList(nn.Conv2d(in_channels, c, 3, padding=1) for c in channels[:entering])
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(channels))
        self.blocks = nn.ModuleList()
        for i, c in enumerate(channels):
            attention = [_SelfAttention(c)] if (height >> i) * (width >> i) <= ATTENTION_POSITIONS else []
            self.blocks.append(nn.Sequential(_Residual(c), *attention, _Residual(c)))
        code = channels[-1]
        self.text = _TextCode(text_width, code)
        last = len(channels) - 1
        self._predicting = range(last + 1) if config.multi_scale else [last]
        self.map_names = [f"{last - i}.joined" for i in self._predicting]
        self.predictions = nn.ModuleList(_Prediction(channels[i], code) for i in self._predicting)

    @classmethod
    def for_teacher(cls, teacher: Teacher, config: DiscriminatorConfig) -> ConvolutionalDiscriminator:
        """One for `teacher`'s latents and text, as deep as its network."""
        channels = [WIDTH * c for c in teacher.network.config.block_out_channels]
        # A prompt that every teacher reads: where there are classes, it is a class.
        text_width = teacher.encode_prompts(["0"]).embeddings.shape[2]
        dtype = torch.promote_types(teacher.dtype, torch.float32)
        return cls(teacher.latent_shape, channels, text_width, config).to(teacher.device, dtype)

    def forward(self, latent: Tensor, noise: Tensor, condition: TextCondition) -> dict[str, Tensor]:
        dtype = next(self.parameters()).dtype
        latent, noise = latent.to(dtype), noise.to(dtype)
        code = self.text(condition.embeddings.to(dtype))
        x = self.latent_in[0](latent)
        if self.noise_in is not None:
            x = x + self.noise_in(noise)
        features = []
        for i, block in enumerate(self.blocks):
            if i:
                x = self.widen[i - 1](F.avg_pool2d(x, 2))
                if self.config.multi_scale:
                    x = x + self.latent_in[i](resized(latent, x.shape[2:]))
            x = block(x)
            features.append(x)
        logits = [head(features[i], code) for i, head in zip(self._predicting, self.predictions, strict=True)]
        return dict(zip(self.map_names, logits, strict=True))
