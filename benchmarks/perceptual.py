"""Forward and backward of each latent distance: time and extra memory, in one run.

    python benchmarks/perceptual.py --shapes 4x64x64 --batches 1 8 --skip-decoded --out perceptual.json   # on a CPU
    python benchmarks/perceptual.py --precision float32 bfloat16 --compile --unet --out ...   # on a GPU

Random weights at full width: time and memory do not depend on them. The gradient is taken with respect to one input, as in
training. The released package (`pip install elatentlpips torchvision`) is built offline with the very weights of ours.
Methods take turns within each shape, so that a drifting machine cancels out; times are medians. Extra memory is what a call
allocates beyond its inputs and weights (GPU: torch's peak; CPU: the allocator's peak by the profiler). A method that fails (the
package is not installed, or cannot compile its CUDA extension; memory) is recorded with its error.
All networks and latents are channels-last. `--compile` compiles every method, and of the package its network: its augmentation
takes numbers from the host, and would compile again for each draw.

The ratios say how many times the package's, or decode + LPIPS', time and memory ours are taken in; above 1, ours is better.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_teachers import random_unet, random_vae
from torch import Tensor

from diffusion2gan import losses
from diffusion2gan.evaluation.speed import device_name, extra_memory, synchronise
from diffusion2gan.files import write_json
from diffusion2gan.perceptual import Augmentation, DecodedLPIPS, ELatentLPIPS, LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.report import markdown_table

Distance = Callable[[Tensor, Tensor], Tensor]
SHAPES = {"4x64x64": (4, 64, 64), "4x128x128": (4, 128, 128), "16x64x64": (16, 64, 64)}
ENCODERS = {4: "sd15", 16: "flux"}
# What the released package does instead.
THEIRS = {
    "latent_lpips": "package, no augmentation",
    "e_latent_lpips bg": "package bg",
    "augmentation bg alone": "package, augmentation bg alone",
}


def released_package(metric: LatentLPIPS, channels: int, device: torch.device) -> Any:
    """The released package with the weights of `metric`. ImportError where it, or what it needs, is not installed."""
    if "pkg_resources" not in sys.modules:
        from packaging import version

        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
        sys.modules["pkg_resources"].parse_version = version.parse  # type: ignore[attr-defined]
    import elatentlpips
    from elatentlpips.vgg16 import LatentVGG16BN

    state, encoder, here = metric.cpu().state_dict(), ENCODERS[channels], Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        (Path(folder) / "ckpt").mkdir()
        backbone = LatentVGG16BN(channels)
        own = {f"model.features.{n.split('.', 2)[2]}": v for n, v in state.items() if n.startswith("net.")}
        torch.save({"state_dict": backbone.state_dict() | own, "best_acc1": 0.0}, Path(folder) / "ckpt" / f"{encoder}_latent_vgg16.pth.tar")
        twice = {n.replace("lin", "lins.", 1): v for n, v in state.items() if n.startswith("lin")}
        torch.save(state | twice, Path(folder) / "ckpt" / f"{encoder}_latest_vgg16_tuned.pth")
        os.chdir(folder)  # it reads ./ckpt
        try:
            package = elatentlpips.ELatentLPIPS(encoder=encoder, augment="bg", verbose=False).to(device, memory_format=torch.channels_last)
        finally:
            os.chdir(here)
    metric.to(device)
    for parameter in package.parameters():
        parameter.requires_grad_(False)
    return package


def unet_step(device: torch.device, prepared: Callable[[Any], Any]) -> Distance:
    """Stable Diffusion 1.5's U-Net, random weights: forward and backward to its weights, as a step of distillation has it."""
    unet = random_unet(device).to(memory_format=torch.channels_last)
    network = prepared(unet)

    def run(x0: Tensor, _x1: Tensor) -> Tensor:
        unet.zero_grad(set_to_none=True)
        return network(x0, 999, x0.new_zeros(len(x0), 77, 768), return_dict=False)[0]

    return run


def distances(channels: int, device: torch.device, compiled: bool, decoded: bool, unet: bool) -> dict[str, Distance]:
    """The methods at one number of channels."""
    torch.manual_seed(0)
    latent = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=channels))).to(device, memory_format=torch.channels_last)
    # Each shape and letter set is one more graph of the same code.
    torch._dynamo.config.recompile_limit = 128
    prepared: Callable[[Any], Any] = partial(torch.compile, dynamic=False) if compiled else lambda function: function
    rows: dict[str, Distance] = {"mse": prepared(losses.mse), "latent_lpips": prepared(latent)}

    def ensembled(letters: str) -> Distance:
        metric = ELatentLPIPS(latent, letters)
        network = prepared(metric)
        return lambda a, b: network(a, b, metric.draw(len(a), a.shape[1:], device=a.device))

    rows |= {f"e_latent_lpips {letters}": ensembled(letters) for letters in ("bg", "bgo")}
    augmentation = Augmentation("bg")

    def augmented(a: Tensor, b: Tensor) -> Tensor:
        drawn = augmentation.draw(len(a), a.shape[1:], device=a.device)
        return augmentation.apply(a, drawn) + augmentation.apply(b, drawn)

    rows["augmentation bg alone"] = augmented
    try:
        package = released_package(latent, channels, device)
    except ImportError as error:
        rows |= dict.fromkeys(THEIRS.values(), partial(_fail, error))
    else:
        network = prepared(partial(package, ensembling=False, add_l1_loss=False))
        rows["package, no augmentation"] = network
        rows["package bg"] = lambda a, b: network(*package.augment(a, b))
        rows["package, augmentation bg alone"] = lambda a, b: torch.add(*package.augment(a, b))
    if decoded:
        vae = random_vae(device, channels).requires_grad_(False).eval().to(memory_format=torch.channels_last)
        pixel = LatentLPIPS(LatentVGG(LatentVGGConfig.pixels()))
        pixel.to(device, memory_format=torch.channels_last)
        rows["decode + lpips"] = prepared(DecodedLPIPS(lambda x: vae.decode(x, return_dict=False)[0], pixel))
    if unet and channels == 4:
        rows["sd15 U-Net"] = unet_step(device, prepared)
    return rows


def _fail(error: ImportError, _x0: Tensor, _x1: Tensor) -> Tensor:
    raise error


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of our methods, at each shape, batch and precision: the others' time and memory over its own."""
    found = {(r["shape"], r["batch"], r["precision"], r["method"]): r for r in rows if "error" not in r}
    table = []
    for (shape, batch, precision, method), ours in found.items():
        if method not in THEIRS and not method.startswith("e_latent_lpips"):
            continue
        theirs = THEIRS.get(method, "")  # nothing in the package's place of the other letters

        def over(column: str, other: str, at: str, key: tuple[str, int] = (shape, batch), ours: dict[str, Any] = ours) -> float | None:
            of_other = found.get((*key, at, other))
            return None if of_other is None or not ours[column] else of_other[column] / ours[column]

        table.append(
            {
                "shape": shape, "batch": batch, "precision": precision, "method": method,
                "package, time": over("ms", theirs, precision), "package, MB": over("MB", theirs, precision),
                "package float32, time": over("ms", theirs, "float32"),
                "decode + lpips, time": over("ms", "decode + lpips", precision), "decode + lpips, MB": over("MB", "decode + lpips", precision),
                "U-Net step, time": over("ms", "sd15 U-Net", precision),
            }
        )  # fmt: skip
    return table


def step(distance: Distance, x0: Tensor, x1: Tensor, precision: str) -> None:
    """Forward and backward to x0."""
    x0.grad = None
    with torch.autocast(x0.device.type, getattr(torch, precision), enabled=precision != "float32"):
        value = distance(x0, x1)
    value.float().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), nargs="+", default=["float32"])
    parser.add_argument("--compile", action="store_true", help="compile every method (of the package, its network)")
    parser.add_argument("--skip-decoded", action="store_true", help="leave decode + LPIPS out (0.5 TB of traffic a CPU call)")
    parser.add_argument("--unet", action="store_true", help="also a training step of Stable Diffusion 1.5's U-Net, at 4 channels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchvision")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for shape in a.shapes:
        methods = distances(SHAPES[shape][0], device, a.compile, not a.skip_decoded, a.unet)
        for batch in a.batches:
            generator = torch.Generator().manual_seed(0)
            x0, x1 = (torch.randn(batch, *SHAPES[shape], generator=generator).to(device) for _ in range(2))
            x0, x1 = (x.contiguous(memory_format=torch.channels_last) for x in (x0, x1))
            x0.requires_grad_()
            acts = {(m, p): partial(step, distance, x0, x1, p) for m, distance in methods.items() for p in a.precision}
            times: dict[tuple[str, str], list[float]] = {}
            failed: dict[tuple[str, str], str] = {}
            for key, act in acts.items():
                try:
                    act()
                    times[key] = []
                except (RuntimeError, OSError, ImportError) as error:  # out of memory is a RuntimeError
                    failed[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
            for _ in range(a.repeats):
                for key in times:
                    synchronise(device)
                    started = time.perf_counter()
                    acts[key]()
                    synchronise(device)
                    times[key].append(time.perf_counter() - started)
            for method, precision in acts:
                row: dict[str, Any] = {"shape": shape, "batch": batch, "precision": precision, "method": method}
                key = (method, precision)
                row |= (
                    {"error": failed[key]}
                    if key in failed
                    else {"ms": 1000 * statistics.median(times[key]), "MB": extra_memory(acts[key], device)}
                )
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
                if a.out:  # after each row: what is there stays there
                    result = {
                        "device": device_name(device),
                        "torch": torch.__version__,
                        "compile": a.compile,
                        "rows": rows,
                        "ratios": ratios(rows),
                    }
                    write_json(a.out, result)
    columns = ("shape", "batch", "precision", "method", "ms", "MB", "error")
    print(markdown_table(list(columns), [[r.get(c, "") for c in columns] for r in rows]))
    compared = ratios(rows)
    print(markdown_table(list(compared[0]), [["" if v is None else v for v in r.values()] for r in compared]))


if __name__ == "__main__":
    main()
