"""Scoring networks: uint8 pictures in, features out. One factory, `build_network`, which tests give small weights by path.

All networks run in float32 with TF32 off, in batches of one fixed size, so that a feature depends on its picture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion2gan.errors import in_one_line
from diffusion2gan.evaluation.preprocess import bicubic_squash, centre_patch, centre_square, lanczos_square, prepared
from diffusion2gan.evaluation.shards import Pictures
from diffusion2gan.evaluation.weights import FoundWeights, UnavailableError, find_weights, optional_module, safe_state
from diffusion2gan.precision import no_tf32

BATCH = 32
CLIP_PREFIX = "A photo depicts "
CLIP_VARIANTS = ("gigagan", "gigagan-noprefix", "plain", "plain-prefix")
"""Columns of the CLIP extractor: GigaGAN's path (centre square, Lanczos 256) or CLIP's own transform of the picture as it is
(`plain`); the caption with "A photo depicts " before it or without."""


@dataclass(frozen=True)
class Network:
    """A scoring network with its preprocessing. `features(pictures, captions)` -> (n, d) float32."""

    kind: str
    features: Callable[[Pictures, Sequence[str]], np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Weights and preprocessing, for identities and results."""


@torch.inference_mode()
def _in_batches(network: Callable[[Tensor], Tensor], inputs: np.ndarray, device: torch.device) -> np.ndarray:
    """(n, H, W, 3) of any type -> (n, d) float32, `network` given (BATCH, 3, H, W) each time, the last filled with zeros."""
    rows = []
    with no_tf32():
        for start in range(0, len(inputs), BATCH):
            batch = torch.from_numpy(inputs[start : start + BATCH])
            n = len(batch)
            batch = torch.cat([batch, batch.new_zeros((BATCH - n, *batch.shape[1:]))]) if n < BATCH else batch
            out = network(batch.to(device).permute(0, 3, 1, 2).contiguous())
            rows.append(out.reshape(BATCH, -1)[:n].float().cpu().numpy())
    return np.concatenate(rows)


# --- Inception and VGG ----------------------------------------------------------------------------------------------
def _inception_clean(
    kind: str, described: str, first: Callable[[Image.Image], Image.Image]
) -> Callable[[FoundWeights, torch.device], Network]:
    """clean-fid's Inception: picture -> `first` -> bicubic 299 in float, not rounded again -> pool3, 2048."""

    def build(found: FoundWeights, device: torch.device) -> Network:
        resize = optional_module("cleanfid.resize", "metrics").build_resizer("clean")
        # Its loader takes the folder and insists on the name.
        network = (
            optional_module("cleanfid.inception_torchscript", "metrics")
            .InceptionV3W(str(found.path.parent), download=False)
            .to(device)
            .eval()
        )

        def features(pictures: Pictures, captions: Sequence[str] = ()) -> np.ndarray:
            inputs = prepared(pictures, lambda image: resize(np.asarray(first(image))))
            return _in_batches(network, inputs, device)

        return Network(kind, features, {"preprocess": f"{described}, clean-fid bicubic 299"})

    return build


def _fidelity(kind: str, layer: str, class_name: str, side: int | None) -> Callable[[FoundWeights, torch.device], Network]:
    """A torch-fidelity network: TensorFlow 1's bilinear resize inside, of the picture as it is or after `lanczos_square(side)`."""

    def build(found: FoundWeights, device: torch.device) -> Network:
        extractor = getattr(optional_module("torch_fidelity", "metrics"), class_name)
        safe_state(found.path)  # torch-fidelity unpickles; what holds code is refused here first
        network = extractor(kind, [layer], feature_extractor_weights_path=str(found.path)).to(device).eval()

        def features(pictures: Pictures, captions: Sequence[str] = ()) -> np.ndarray:
            inputs = prepared(pictures, lambda image: np.asarray(lanczos_square(image, side) if side else image))
            return _in_batches(lambda x: network(x)[0], inputs, device)

        first = f"centre square, Lanczos {side}" if side else "none"
        return Network(kind, features, {"preprocess": f"{first}; TensorFlow 1 bilinear inside"})

    return build


# --- CLIP -----------------------------------------------------------------------------------------------------------
def _clip(found: FoundWeights, device: torch.device) -> Network:
    """Cosines of picture and caption, one column for each of CLIP_VARIANTS."""
    open_clip = optional_module("open_clip", "metrics")
    # Its own search prefers another file of the folder than the one whose digest the result names.
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{found.path.parent}", load_weights=False)
    open_clip.load_checkpoint(model, str(found.path))
    model = model.to(device).float().eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{found.path.parent}")

    def image_features(pictures: Pictures, first: Callable[[Image.Image], Image.Image]) -> Tensor:
        inputs = prepared(pictures, lambda image: transform(first(image)).permute(1, 2, 0).numpy())
        return torch.from_numpy(_in_batches(lambda x: model.encode_image(x, normalize=True), inputs, device))

    @torch.inference_mode()
    def text_features(captions: Sequence[str]) -> Tensor:
        parts = [tokenizer(list(captions[i : i + BATCH])).to(device) for i in range(0, len(captions), BATCH)]
        with no_tf32():
            return torch.cat([model.encode_text(ids, normalize=True).float().cpu() for ids in parts])

    def features(pictures: Pictures, captions: Sequence[str]) -> np.ndarray:
        bare, prefixed = text_features(captions), text_features([CLIP_PREFIX + c for c in captions])
        gigagan = image_features(pictures, lambda image: lanczos_square(image, 256))
        plain = image_features(pictures, lambda image: image)
        columns = ((gigagan, prefixed), (gigagan, bare), (plain, bare), (plain, prefixed))
        return torch.stack([(a * b).sum(1) for a, b in columns], 1).numpy()

    return Network("clip", features, {"columns": list(CLIP_VARIANTS), "prefix": CLIP_PREFIX})


# --- DreamSim and DINOv2 --------------------------------------------------------------------------------------------
def dreamsim_network(model: Any, device: torch.device, facts: Mapping[str, Any]) -> Network:
    """A DreamSim model: `model.embed` of (B, 3, 224, 224) in [0, 1] -> mean-centred unit vectors; 1 - cosine is its distance."""

    def features(pictures: Pictures, captions: Sequence[str] = ()) -> np.ndarray:
        inputs = prepared(pictures, lambda image: np.asarray(bicubic_squash(image, 224), np.float32) / 255)
        return _in_batches(model.embed, inputs, device)

    return Network("dreamsim", features, facts)


def _dreamsim(found: FoundWeights, device: torch.device) -> Network:
    package = optional_module("dreamsim", "metrics")
    hub = torch.hub.get_dir()
    try:
        # It points torch.hub at its own folder for good, which others would then look into.
        model, _ = package.dreamsim(
            pretrained=True, dreamsim_type="ensemble", cache_dir=str(found.path.parent.resolve()), device=str(device)
        )
    finally:
        torch.hub.set_dir(hub)
    return dreamsim_network(model, device, {"type": "ensemble", "preprocess": "bicubic 224, squashed"})


_IMAGENET = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def _dinov2(found: FoundWeights, device: torch.device) -> Network:
    """The class token of DINOv2 ViT-L/14, 1024: dgm-eval's preprocessing (bicubic 224 on uint8, ImageNet's mean and spread) of the
    centre square: real pictures squashed beside square ones would be told apart by their shape."""
    network = torch.hub.load(str(found.folder / "dinov2"), "dinov2_vitl14", source="local", pretrained=False)
    network.load_state_dict(safe_state(found.path))
    network = network.to(device).eval().requires_grad_(False)
    mean, spread = _IMAGENET

    def features(pictures: Pictures, captions: Sequence[str] = ()) -> np.ndarray:
        inputs = prepared(pictures, lambda image: (np.asarray(bicubic_squash(centre_square(image), 224), np.float32) / 255 - mean) / spread)
        return _in_batches(network, inputs, device)

    return Network("dinov2", features, {"preprocess": "centre square, bicubic 224, uint8"})


_BUILDERS: Mapping[str, tuple[str, Callable[[FoundWeights, torch.device], Network]]] = {
    "inception-clean-256": (
        "inception_ts", _inception_clean("inception-clean-256", "centre square, Lanczos 256", lambda i: lanczos_square(i, 256)),
    ),
    "inception-clean-512": (
        "inception_ts", _inception_clean("inception-clean-512", "centre square, Lanczos 512", lambda i: lanczos_square(i, 512)),
    ),
    "inception-patch-299": ("inception_ts", _inception_clean("inception-patch-299", "centre patch 299", lambda i: centre_patch(i, 299))),
    "inception-tf": ("inception_tf", _fidelity("inception-tf", "2048", "FeatureExtractorInceptionV3", None)),
    "inception-tf-256": ("inception_tf", _fidelity("inception-tf-256", "2048", "FeatureExtractorInceptionV3", 256)),
    "vgg16-256": ("vgg16", _fidelity("vgg16-256", "fc2_relu", "FeatureExtractorVGG16", 256)),
    "clip": ("clip_g14", _clip),
    "dreamsim": ("dreamsim", _dreamsim),
    "dinov2": ("dinov2", _dinov2),
}  # fmt: skip
NETWORKS = tuple(_BUILDERS)


def build_network(kind: str, weights: Path | None = None, device: torch.device | str = "cpu", allow_unknown: bool = False) -> Network:
    """A scoring network of NETWORKS from the folder `weights` (see `weights.find_weights`).
    Raises UnavailableError when its weights or its library are not there, or are damaged."""
    key, build = _BUILDERS[kind]
    found = find_weights(key, weights, allow_unknown)
    try:
        network = build(found, torch.device(device))
    except UnavailableError:
        raise
    except Exception as error:  # half a dozen libraries read these files, each with errors of its own
        reason = in_one_line(error)
        raise UnavailableError(f"{kind}: {found.path} cannot be loaded ({type(error).__name__}: {reason}); copy it again") from error
    return Network(network.kind, network.features, {**network.facts, "weights": found.facts, "batch": BATCH})
