"""Forward and backward of each latent distance: time and extra memory, in one run.

    python benchmarks/perceptual.py --out benchmarks/results/perceptual_cpu.json
    python benchmarks/perceptual.py --precision bfloat16 --compile --out ...   # on a GPU

Random weights at full width: time and memory do not depend on them. The gradient is taken with respect to one input, as in
training. The released package (`pip install elatentlpips torchvision`) is built offline with the very weights of ours.
Methods take turns within each shape, so that a drifting machine cancels out; times are medians. Extra memory is what a call
allocates beyond its inputs and weights (GPU: torch's peak; CPU: the allocator's peak by the profiler).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
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

import torch
from torch import Tensor

from diffusion2gan import losses
from diffusion2gan.perceptual import DecodedLPIPS, ELatentLPIPS, LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.report import markdown_table

Distance = Callable[[Tensor, Tensor], Tensor]
SHAPES = {"4x64x64": (4, 64, 64), "4x128x128": (4, 128, 128), "16x64x64": (16, 64, 64)}
ENCODERS = {4: "sd15", 16: "flux"}


def released_package(metric: LatentLPIPS, channels: int, augment: str | None, device: torch.device) -> Distance | None:
    """The released package with the weights of `metric`, or None where it is not installed."""
    if "pkg_resources" not in sys.modules:
        from packaging import version

        sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
        sys.modules["pkg_resources"].parse_version = version.parse  # type: ignore[attr-defined]
    try:
        import elatentlpips
        from elatentlpips.vgg16 import LatentVGG16BN
    except ImportError:
        return None
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
            package = elatentlpips.ELatentLPIPS(encoder=encoder, augment=augment or "bg", verbose=False).to(
                device, memory_format=torch.channels_last
            )
        finally:
            os.chdir(here)
    metric.to(device)
    for parameter in package.parameters():
        parameter.requires_grad_(False)
    return lambda a, b: package(a, b, ensembling=augment is not None, add_l1_loss=False).flatten()


def distances(channels: int, device: torch.device, compiled: bool, decoded: bool) -> dict[str, Distance]:
    """The methods at one number of channels."""
    torch.manual_seed(0)
    latent = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=channels))).to(device, memory_format=torch.channels_last)
    # Each shape and letter set is one more graph of the same code.
    torch._dynamo.config.recompile_limit = 128
    plain: Distance = torch.compile(latent, dynamic=False) if compiled else latent
    rows: dict[str, Distance] = {"mse": losses.mse, "latent_lpips": plain}
    for letters in ("bg", "bgo"):
        metric = ELatentLPIPS(latent, letters)
        function: Distance = metric
        if compiled:
            graph = torch.compile(lambda a, b, p, metric=metric: metric(a, b, p), dynamic=False)
            function = lambda a, b, metric=metric, graph=graph: graph(a, b, metric.draw(len(a), a.shape[1:], device=a.device))  # noqa: E731
        rows[f"e_latent_lpips {letters}"] = function
    for name, augment in (("package, no augmentation", None), ("package bg", "bg")):
        package = released_package(latent, channels, augment, device)
        if package is not None:
            rows[name] = package
    if decoded:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        ).requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # fmt: skip
        pixel = LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=3, kept_poolings=(1, 2, 3, 4, 5), tap="before"))).to(device)
        rows["decode + lpips"] = DecodedLPIPS(lambda x: vae.decode(x, return_dict=False)[0], pixel)
    return rows


def step(distance: Distance, x0: Tensor, x1: Tensor, precision: str) -> None:
    """Forward and backward to x0."""
    x0.grad = None
    with torch.autocast(x0.device.type, getattr(torch, precision), enabled=precision != "float32"):
        value = distance(x0, x1)
    value.float().sum().backward()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def extra_memory(act: Callable[[], None], device: torch.device) -> float:
    """MB that a call allocates at its peak, beyond what was there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our distances (the package does not compile)")
    parser.add_argument("--skip-decoded", action="store_true", help="leave decode + LPIPS out (0.5 TB of traffic a CPU call)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    warnings.filterwarnings("ignore", module="torchvision")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    rows = []
    for shape in a.shapes:
        channels = SHAPES[shape][0]
        methods = distances(channels, device, a.compile, not a.skip_decoded)
        for batch in a.batches:
            generator = torch.Generator().manual_seed(0)
            x0, x1 = (torch.randn(batch, *SHAPES[shape], generator=generator).to(device) for _ in range(2))
            x0, x1 = (x.contiguous(memory_format=torch.channels_last) for x in (x0, x1))
            x0.requires_grad_()
            times: dict[str, list[float]] = {}
            for method, distance in methods.items():
                try:
                    step(distance, x0, x1, a.precision)
                except torch.OutOfMemoryError:
                    print(f"{shape}, batch {batch}: {method} needs more memory than there is", file=sys.stderr)
                    torch.cuda.empty_cache()
                    continue
                times[method] = []
            for _ in range(a.repeats):
                for method in times:
                    synchronise(device)
                    started = time.perf_counter()
                    step(methods[method], x0, x1, a.precision)
                    synchronise(device)
                    times[method].append(time.perf_counter() - started)
            for method, seconds in times.items():
                memory = extra_memory(partial(step, methods[method], x0, x1, a.precision), device)
                rows.append({"shape": shape, "batch": batch, "method": method, "ms": 1000 * statistics.median(seconds), "MB": memory})
                print(rows[-1], file=sys.stderr, flush=True)
                if a.out:  # after each row: what is there stays there
                    result = {"device": name, "torch": torch.__version__, "precision": a.precision, "compile": a.compile, "rows": rows}
                    a.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown_table(list(rows[0]), [list(r.values()) for r in rows]))


if __name__ == "__main__":
    main()
