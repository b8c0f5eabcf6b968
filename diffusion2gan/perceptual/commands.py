"""What `diffusion2gan perceptual ...` runs: training, calibrating and scoring a latent distance of any autoencoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import write_json
from diffusion2gan.fit import FitConfig
from diffusion2gan.images import open_rgb, to_tensor
from diffusion2gan.pairs.seeds import draw_noise, evaluation_seed
from diffusion2gan.perceptual.bapps import subsets
from diffusion2gan.perceptual.calibrate import Encode, Judgements, best_possible, calibrate, head_vector, judge, two_afc
from diffusion2gan.perceptual.latent_cache import LatentCache, cache_latents, open_images
from diffusion2gan.perceptual.latent_lpips import LatentLPIPS
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.perceptual.reconstruct import distances_of_figure_3, run_experiment
from diffusion2gan.perceptual.space import LatentSpace
from diffusion2gan.perceptual.train import train_classifier
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.folders import weights_digest
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig

# "Three poolings removed" is read in two ways: as by the released checkpoints, and as by the only public training code.
READINGS: dict[str, dict[str, Any]] = {
    "released": {"kept_poolings": (4, 5), "tap": "after"},
    "before": {"kept_poolings": (3, 4), "tap": "before"},
}


PROMPTS = ("noto face smiling", "twemoji animal mammal", "fluent food fruit", "noto country flag")


@dataclass(frozen=True)
class Autoencoder:
    """A frozen autoencoder: pixels to scaled latents and back, and what names it. Of any make, for the commands below."""

    encode: Encode
    """Pixels (B, 3, H, W) in [-1, 1], on the CPU -> latents (B, C, h, w) in float32, scaled as a diffusion model reads them."""
    decode: Callable[[Tensor], Tensor]
    """The other way; for Figure 3's experiment alone."""
    space: LatentSpace
    """What `raw=True` of the metric scales by: LatentSpace() where latents have scales of their own by channel, which `encode` sees to."""
    channels: int
    name: str
    """Cached latents of another name are not taken for this one's."""
    side: int
    """Of the pictures that it was made for, in pixels, at most 512; 64 of pixels, as LPIPS reads BAPPS."""


def open_autoencoder(source: str | Autoencoder, device: torch.device, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """A diffusers `AutoencoderKL` from a folder or hub id, or from the `vae` part of a pipeline; `pixels`: none, latents are pixels in
    [-1, 1]. One that is given as an `Autoencoder`, of whatever make, stays as it is. Raises UserError when it is something else."""
    if isinstance(source, Autoencoder):
        return source
    if source == "embedded":
        source = str(embedded_folder("teacher"))
    if source == "pixels":
        return Autoencoder(lambda x: x.to(device), lambda x: x, LatentSpace(1.0, 0.0), 3, source, 64)
    reasons = []
    for options in ({}, {"subfolder": "vae"}):
        try:
            # `from_pretrained` itself passes over another class, and fills up what does not fit with defaults.
            kind = AutoencoderKL.load_config(source, **options).get("_class_name", "AutoencoderKL")
            if kind != "AutoencoderKL":
                raise UserError(
                    f"--vae {source}: holds {kind}, expected AutoencoderKL; name another, or use it from Python as an `Autoencoder` "
                    "(docs/e_latent_lpips.md)"
                )
            vae = AutoencoderKL.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
            break
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reasons.append(in_one_line(error))
    else:
        # Of a folder that is one itself, that there is none below it says nothing.
        reason = reasons[0 if (Path(source) / "config.json").is_file() else -1]
        raise UserError(f"--vae {source}: is no AutoencoderKL ({reason}); name a folder or hub id of one, or of a pipeline with a vae")
    if any(vae.config.get(key) is not None for key in ("latents_mean", "latents_std")):
        raise UserError(
            f"--vae {source}: has latents_mean and latents_std of its own, expected a scaling_factor alone; name another, or use it from "
            "Python as an `Autoencoder` (docs/e_latent_lpips.md)"
        )
    vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    space = LatentSpace(float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0))

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        latent = vae.encode(x.to(device, dtype).contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        return space.scaled(latent.float())

    def decode(x: Tensor) -> Tensor:
        return vae.decode((x / space.scale + space.shift).to(dtype), return_dict=False)[0].float()

    name = f"{weights_digest(vae)[:16]}, {vae.config.latent_channels} channels, scale {space.scale:g}, shift {space.shift:g}"
    sides = np.atleast_1d(vae.config.sample_size or 512)
    return Autoencoder(encode, decode, space, vae.config.latent_channels, name, min(512, int(sides.max())))


def train_command(
    vae: str | Autoencoder,
    data: str,
    out: Path,
    resolution: int = 256,
    crops: int = 4,
    limit: int | None = None,
    width: float = 1.0,
    norm: str = "batch",
    reading: str = "released",
    epochs: int = 90,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    compiled: bool = False,
    encode_batch: int = 32,
    encode_dtype: str = "float32",
) -> dict[str, float]:
    """Encodes the images of `data` once into OUT/latents, trains F on them and writes the uncalibrated distance to OUT/metric.

    `reading` is of a network that reads latents; `vae="pixels"` is read as by LPIPS, with all five poolings.
    Runs in any number of processes (`torchrun --nproc-per-node N -m diffusion2gan perceptual train ...`). Returns top-1 and top-5 on the validation
    images. The same command goes on where it stopped.
    """
    state = PartialState()
    rank, world, device = state.process_index, state.num_processes, state.device
    if batch_size % world:
        raise UserError(f"--batch-size is {batch_size}, expected a multiple of the {world} processes")
    if vae == "pixels" and reading != "released":
        raise UserError(f"--reading is {reading} with --vae pixels, which keeps all five poolings; leave --reading away")
    caches = {split: out / "latents" / split for split in ("train", "val")}
    encoder = open_autoencoder(vae, device, getattr(torch, encode_dtype))
    # All that can be wrong, before hours of encoding.
    shape = (
        LatentVGGConfig.pixels(width, norm)
        if vae == "pixels"
        else LatentVGGConfig(in_channels=encoder.channels, width=width, norm=norm, **READINGS[reading])
    )
    pictures = {split: open_images(data, split) for split in caches}
    if pictures["train"].classes != pictures["val"].classes:
        raise UserError(f"{data}: train and val have other classes; expected the same subfolders in both")
    for split, folder in caches.items():
        images, views = pictures[split], crops if split == "train" else 0
        cache_latents(images, encoder.encode, folder, {"vae": encoder.name}, resolution, views, limit, encode_batch, rank=rank, world=world)
    # Not a barrier: the processes may need hours, and are never equally fast.
    train, val = (LatentCache(folder, wait=world > 1) for folder in caches.values())
    steps = max(1, epochs * len(train) // batch_size)
    config = FitConfig(
        steps, batch_size, learning_rate, warmup_steps=min(1000, steps // 10), decay_steps=steps // 2, weight_decay=0.05, compile=compiled
    )  # fmt: skip
    share = batch_size // world
    # About once an epoch: one process looks, the others wait.
    validate_every = max(500, len(train) // batch_size)

    def batches(rng: np.random.Generator, _generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # The whole batch in every process, so that their number does not change it; each takes its share.
        rows, views = rng.integers(len(train), size=batch_size), rng.integers(train.views, size=batch_size)
        own = slice(rank * share, (rank + 1) * share)
        labels = torch.from_numpy(train.labels[rows[own]].astype(np.int64))
        return train.batch(rows[own], views[own]).to(device), {"class": labels.to(device)}

    def validation() -> Any:
        return ((x.to(device), {"class": labels.to(device)}) for x, labels in val.in_order())

    backbone, accuracy = train_classifier(
        shape, {"class": len(train.settings["classes"])}, batches, config, out / "run", validation, device, validate_every
    )
    if rank == 0:
        LatentLPIPS(backbone.cpu(), space=encoder.space).save_pretrained(out / "metric")
        write_json(out / "accuracy.json", accuracy)
    return accuracy


def _judged(metric: LatentLPIPS, encode: Encode, root: Path, split: str, resolution: int) -> dict[str, Judgements]:
    return {
        name: judge(metric, subset.batches(), encode, -(-len(subset) // subset.batch))
        for name, subset in subsets(root, split, resolution).items()
    }


def calibrate_command(
    metric_source: str, vae: str | Autoencoder, bapps: Path, out: Path, resolution: int | None = None
) -> dict[str, float]:
    """Fits the heads of a metric to the training judgements of BAPPS and writes it to `out`. Returns its 2AFC on them.

    resolution: side of the pictures in pixels, which BAPPS has at 64; None: `Autoencoder.side`, for its latents to be of the size that
    they have in use.
    """
    device = PartialState().device
    metric = LatentLPIPS.from_pretrained(metric_source).to(device)
    encoder = _encoder_of(metric, vae, device)
    judged = _judged(metric, encoder.encode, bapps, "train", resolution or encoder.side)
    metric = calibrate(metric.cpu(), Judgements.cat(judged.values()))
    metric.save_pretrained(out)
    return {name: two_afc(head_vector(metric), j) for name, j in judged.items()}


def score_command(metric_source: str, vae: str | Autoencoder, bapps: Path, resolution: int | None = None, clamp: bool = True) -> str:
    """2AFC of a metric on each validation subset of BAPPS, beside the best that any metric could reach; a Markdown table. `resolution` as
    of `calibrate_command`."""
    device = PartialState().device
    metric = LatentLPIPS.from_pretrained(metric_source, clamp).to(device)
    if metric.l1_weight:
        raise UserError(
            f"{metric_source}: has an L1 term (l1_weight {metric.l1_weight:g}), expected the features' distance alone; set it to 0"
        )
    encoder = _encoder_of(metric, vae, device)
    side = resolution or encoder.side
    judged = _judged(metric, encoder.encode, bapps, "val", side)
    for name, found in judged.items():
        if not (found.first.isfinite().all() and found.second.isfinite().all()):
            raise UserError(f"{metric_source}: its features of the pictures of {name} are not finite; look where its weights come from")
    heads = head_vector(metric).cpu()
    rows = [[name, len(j.judgement), f"{side} x {side}", two_afc(heads, j), best_possible(j)] for name, j in judged.items()]
    return markdown_table(["subset", "triplets", "pictures", "2AFC", "always with the majority"], rows)


def _encoder_of(metric: LatentLPIPS, vae: str | Autoencoder, device: torch.device) -> Autoencoder:
    encoder = open_autoencoder(vae, device)
    _check_channels(encoder, metric, encoder.name if isinstance(vae, Autoencoder) else vae)
    return encoder


def _check_channels(encoder: Autoencoder, metric: LatentLPIPS, vae: str) -> None:
    if encoder.channels != metric.net.config.in_channels:
        raise UserError(
            f"--vae {vae}: has {encoder.channels} channels, the metric reads {metric.net.config.in_channels}; name the metric's own autoencoder"
        )


def reconstruct_command(
    out: Path,
    metric: str = "embedded",
    vae: str = "embedded",
    pixel_metric: str | None = None,
    images: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    steps: int = 1000,
    seed: int = 0,
) -> str:
    """Figure 3's experiment on images, or on pictures of the embedded teacher for `prompts` (four of its own by default). Returns the table.

    `metric`: `embedded`, or as `LatentLPIPS.from_pretrained`; `pixel_metric`: a metric that reads pixels, for LPIPS through the
    decoder (the embedded one by default beside the embedded metric).
    """
    device = PartialState().device
    embedded = vae == "embedded"
    if (metric == "embedded") != embedded:
        raise UserError(f"--metric {metric} with --vae {vae}: the metric must be of the autoencoder's own latents; name both")
    latent = LatentLPIPS.from_pretrained(metric).to(device)
    encoder = open_autoencoder(vae, device)
    pixel_source = str(embedded_folder("pixel_vgg")) if pixel_metric is None and embedded else pixel_metric
    pixel = None if pixel_source is None else LatentLPIPS.from_pretrained(pixel_source).to(device)
    _check_channels(encoder, latent, vae)
    if pixel is not None and pixel.net.config.in_channels != 3:
        raise UserError(f"--pixel-metric {pixel_source}: reads {pixel.net.config.in_channels} channels, expected a metric of pixels, of 3")
    if prompts and (images or not embedded):
        raise UserError("--prompt is drawn by the embedded teacher, expected neither --images nor another --vae beside it; leave one away")
    if pixel is None:
        warnings.warn("no --pixel-metric: the row of LPIPS through the decoder is left out", stacklevel=2)
    if images:
        pictures = [read_picture(path) for path in images]
        if len({p.shape for p in pictures}) > 1:
            raise UserError(
                f"--images: sizes are {', '.join(f'{p.shape[3]} x {p.shape[2]}' for p in pictures)}, expected one size; resize them"
            )
        target = torch.cat([encoder.encode(p) for p in pictures])
    elif embedded:
        teacher, prompts = load_teacher(TeacherConfig(source="embedded"), device), prompts or PROMPTS
        noise = draw_noise([evaluation_seed((1 << 51) + seed + i) for i in range(len(prompts))], teacher.latent_shape)
        target = OdeSolver(teacher, SolverConfig(solver="dpmpp", steps=25, spacing="trailing")).solve(noise, list(prompts))
    else:
        raise UserError(f"--vae {vae}: there is nothing to reconstruct; name --images")
    return run_experiment(distances_of_figure_3(latent, pixel, encoder.decode), target, encoder.decode, out, steps, seed)


def read_picture(path: Path) -> Tensor:
    """A picture file as (1, 3, H, W) in [-1, 1], cut to multiples of 8. Raises UserError."""
    picture = open_rgb(path, "name a PNG or JPEG file")
    pixels = to_tensor(np.asarray(picture)[None])
    if min(pixels.shape[2:]) < 8:
        raise UserError(f"{path}: has {picture.width} x {picture.height} pixels, expected at least 8 x 8")
    return pixels[..., : pixels.shape[2] // 8 * 8, : pixels.shape[3] // 8 * 8]
