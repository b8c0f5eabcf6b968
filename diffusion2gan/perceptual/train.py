"""Trains F (section 3.2): a VGG classifier that reads latents, as LPIPS' backbone was trained on pixels.

One function for any latent space: the caller says what a batch is (ImageNet latents, the embedded emoji, ...) and
which label heads there are. Linear calibration of the distance comes afterwards and is not done here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion2gan.config import settings_difference
from diffusion2gan.device import bf16_autocast, compile_for_one_shape
from diffusion2gan.errors import UserError
from diffusion2gan.files import write_json
from diffusion2gan.fit import FitConfig, fit, process_rank
from diffusion2gan.perceptual.latent_vgg import LatentVGG, LatentVGGConfig

# One training batch: x (B, C, H, W) and for every head its labels (B,) int64; -1 marks a label to be left out.
Batches = Callable[[np.random.Generator, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]


class Classifier(nn.Module):
    """F's last feature map, averaged over space, and one linear layer for each head."""

    def __init__(self, config: LatentVGGConfig, heads: Mapping[str, int]):
        super().__init__()
        self.vgg = LatentVGG(config).for_training()
        self.heads = nn.ModuleDict({name: nn.Linear(self.vgg.channels[-1], size) for name, size in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> logits (B, classes) of each head."""
        features = self.vgg(x)[-1].mean(dim=(2, 3))
        return {name: head(features) for name, head in self.heads.items()}


def classification_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], smoothing: float = 0.1) -> Tensor:
    """Mean of the heads' cross entropies."""
    losses = [F.cross_entropy(logits[name].float(), labels[name], ignore_index=-1, label_smoothing=smoothing) for name in logits]
    return torch.stack(losses).mean()


@torch.inference_mode()
def accuracies(model: Classifier, batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> dict[str, float]:
    """Share of right answers of each head, `top1_HEAD` and, for heads of more than 20 classes, `top5_HEAD`; labels of -1 are left out."""
    model.eval()
    ranks: dict[str, list[Tensor]] = {name: [] for name in model.heads}
    classes = {}
    for x, labels in batches:
        for name, logits in model(x).items():
            known, classes[name] = labels[name] >= 0, logits.shape[1]
            right = logits[known].gather(1, labels[name][known, None])
            # A tie or a NaN is no right answer: the class itself is the one that may be as large as it is.
            ranks[name].append((~(logits[known] < right)).sum(1) - 1)
    result = {}
    for name, parts in ranks.items():
        rank = torch.cat(parts)
        result[f"top1_{name}"] = (rank < 1).float().mean().item()
        if classes[name] > 20:
            result[f"top5_{name}"] = (rank < 5).float().mean().item()
    return result


def _check_same_network(folder: Path, described: dict[str, Any]) -> None:
    """Writes what is trained to `folder/network.json`, or raises UserError when something else was trained there before."""
    path, described = folder / "network.json", json.loads(json.dumps(described))
    if path.exists():
        for key, ours, theirs in settings_difference(described, json.loads(path.read_text())):
            raise UserError(f"{folder}: a training with {key} {theirs!r}, now it is {ours!r}; choose another folder")
    elif process_rank()[0] == 0:
        write_json(path, described)


def train_classifier(
    vgg: LatentVGGConfig,
    heads: Mapping[str, int],
    batches: Batches,
    config: FitConfig,
    folder: Path,
    validation: Callable[[], Iterable[tuple[Tensor, Mapping[str, Tensor]]]],
    device: torch.device | str = "cpu",
    validate_every: int = 500,
) -> tuple[LatentVGG, dict[str, float]]:
    """Trains in `folder`, resumably. Returns the frozen averaged backbone and its `accuracies` on `validation`.

    In several processes `batches` gives each its own share.
    """
    _check_same_network(folder, {"vgg": asdict(vgg), "heads": dict(heads)})
    torch.manual_seed(config.seed)
    device = torch.device(device)
    model = Classifier(vgg, heads).to(device).to(memory_format=torch.channels_last)
    average = Classifier(vgg, heads).to(device).to(memory_format=torch.channels_last)
    network = compile_for_one_shape(model, device, "compile") if config.compile else model

    def loss_of_step(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = batches(rng, generator)
        with bf16_autocast(device):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        right = {f"train_top1_{k}": (v.argmax(1) == labels[k]).float().mean() for k, v in logits.items()}
        return classification_loss(logits, labels), right

    latest: dict[str, float] = {}

    def validate(state: dict[str, Tensor]) -> dict[str, float]:
        average.load_state_dict(state)
        latest.update(accuracies(average, validation()))
        return dict(latest)

    average.load_state_dict(fit(model, loss_of_step, config, folder, validate, validate_every))
    # `fit` ends with a validation, unless there was nothing left to train.
    return average.vgg.freeze(), latest or accuracies(average, validation())
