"""Trains F (section 3.2): a VGG classifier that reads latents, as LPIPS' backbone was trained on pixels.

One function for any latent space: the caller says what a batch is (ImageNet latents, the embedded emoji, ...) and
which label heads there are. Linear calibration of the distance comes afterwards and is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.fit import FitConfig, fit
from diffusion2gan.perceptual.latent_vgg import LatentVGG, LatentVGGConfig

# One training batch: x (B, C, H, W) and for every head its labels (B,) int64; -1 marks a label to be left out.
Batches = Callable[[np.random.Generator, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]


class Classifier(nn.Module):
    """F's last feature map, averaged over space, and one linear layer for each head."""

    def __init__(self, config: LatentVGGConfig, heads: Mapping[str, int]):
        super().__init__()
        self.vgg = LatentVGG(config).for_training()
        self.heads = nn.ModuleDict({name: nn.Linear(self.vgg.channels[-1], size) for name, size in heads.items()})
        for module in self.vgg.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> logits (B, classes) of each head."""
        features = self.vgg(x)[-1].mean(dim=(2, 3))
        return {name: head(features) for name, head in self.heads.items()}


def classification_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], smoothing: float = 0.1) -> Tensor:
    """Mean of the heads' cross entropies."""
    losses = [F.cross_entropy(logits[name].float(), labels[name], ignore_index=-1, label_smoothing=smoothing) for name in logits]
    return torch.stack(losses).mean()


@torch.inference_mode()
def top1(model: Classifier, x: Tensor, labels: Mapping[str, Tensor], batch: int = 256) -> dict[str, float]:
    """Share of right answers of each head on (N, C, H, W) inputs; labels of -1 are left out."""
    model.eval()
    parts = [model(x[i : i + batch]) for i in range(0, len(x), batch)]
    result = {}
    for name in model.heads:
        answers = torch.cat([p[name] for p in parts]).argmax(1)
        known = labels[name] >= 0
        result[name] = (answers[known] == labels[name][known]).float().mean().item()
    return result


def train_classifier(
    vgg: LatentVGGConfig,
    heads: Mapping[str, int],
    batches: Batches,
    config: FitConfig,
    folder: Path,
    validation: tuple[Tensor, Mapping[str, Tensor]],
    validate_every: int = 500,
) -> tuple[LatentVGG, dict[str, float]]:
    """Trains in `folder`, resumably. Returns the frozen averaged backbone and the top-1 of each head on `validation`."""
    torch.manual_seed(config.seed)
    device = validation[0].device
    model = Classifier(vgg, heads).to(device).to(memory_format=torch.channels_last)
    average = Classifier(vgg, heads).to(device).to(memory_format=torch.channels_last)
    network = torch.compile(model) if config.compile else model

    def loss_of_step(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batches(rng, generator)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        right = {f"train_top1_{k}": (v.argmax(1) == labels[k]).float().mean() for k, v in logits.items()}
        return classification_loss(logits, labels), right

    def validate(state: dict[str, Tensor]) -> dict[str, float]:
        average.load_state_dict(state)
        return {f"top1_{k}": v for k, v in top1(average, *validation).items()}

    average.load_state_dict(fit(model, loss_of_step, config, folder, validate, validate_every))
    accuracy = top1(average, *validation)
    return average.vgg.cpu().freeze(), accuracy
