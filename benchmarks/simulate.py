"""Pairs a second of `simulate`'s loop against the stock pipeline's, same batch, precision and solver, in one run.

    python benchmarks/simulate.py --batch 32 --steps 20 --stock-layout contiguous --out benchmarks/results/simulate_cpu.json
    python benchmarks/simulate.py --batch 32 --steps 20 --precision bfloat16 --compile --out benchmarks/results/simulate_cpu_bf16_compiled.json

    python benchmarks/simulate.py --network sd15 --batch 64 --steps 50 --precision bfloat16 --compile --out ...    # a GPU; random weights

Ours computes in channels_last, the stock pipeline in the same layout, or in the one that it loads in (contiguous). The two take turns, and
the ratio is taken pair by pair, so that a drifting machine cancels out. `share_of_matrix_rate`: FLOPs of ours (counted, both branches of
guidance) a second, of those of a large matrix product in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from random_teachers import random_sd15_pipeline, random_sdxl_pipeline

from diffusion2gan.device import default_device
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.evaluation.speed import device_name, synchronise
from diffusion2gan.files import write_json
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.plan import count_flops
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.folders import load_pipeline
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import Teacher, TeacherConfig
from diffusion2gan.teachers.sdxl import SDXLTeacher
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher


def load(a: argparse.Namespace, device: str) -> tuple[Any, Teacher]:
    """The stock pipeline and the teacher, each with networks of its own."""
    if a.network == "embedded":
        folder = a.teacher or embedded_folder("teacher")
        pipeline = load_pipeline(TeacherConfig(), folder, getattr(torch, a.precision)).to(device)
        return pipeline, StableDiffusionTeacher.from_pretrained(TeacherConfig(), folder, device)
    if a.network == "sd15":
        random = random_sd15_pipeline(device)
        teacher: Teacher = StableDiffusionTeacher.from_pipeline(copy.deepcopy(random))
    else:
        random = random_sdxl_pipeline(device)
        teacher = SDXLTeacher.from_pipeline(copy.deepcopy(random))
    return random.to(getattr(torch, a.precision)), teacher


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device != "cpu" else 1024
    x = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        synchronise(torch.device(device))
        started = time.perf_counter()
        for _ in range(10):
            x @ x
        synchronise(torch.device(device))
        times.append((time.perf_counter() - started) / 10)
    return 2 * size**3 / min(times)


def evaluation_flops(teacher: Teacher) -> float:
    """Of one network evaluation at a batch of one."""
    condition = teacher.encode_prompts(["red heart"])
    latent = torch.randn(1, *teacher.latent_shape, device=teacher.device, dtype=teacher.dtype)
    return count_flops(lambda: teacher.evaluate(latent, torch.tensor(999, device=teacher.device), condition))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("embedded", "sd15", "sdxl"), default="embedded")
    parser.add_argument("--teacher", type=Path, default=None, help="with --network embedded: a Stable Diffusion folder instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the network, ours and the stock pipeline's alike")
    parser.add_argument("--stock-layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    device = default_device()
    pipeline, teacher = load(a, device)
    pipeline.set_progress_bar_config(disable=True)
    layout = torch.channels_last if a.stock_layout == "channels_last" else torch.contiguous_format
    pipeline.unet.to(memory_format=layout)
    if a.compile:
        pipeline.unet = torch.compile(pipeline.unet, dynamic=False)
    prompts = ["red heart"] * a.batch
    config = SolverConfig(steps=a.steps, guidance=3.0)
    flops = a.steps * 2 * evaluation_flops(teacher)
    # In float32 and as it is: the path of a teacher's own precision, which reuses more.
    plain = a.precision == "float32" and not a.compile
    solver = OdeSolver(teacher, config, a.batch, None if plain else a.precision, a.compile)
    drawn = draw_noise(range(a.batch), teacher.latent_shape)
    noise = torch.from_numpy(drawn).to(device, getattr(torch, a.precision)).contiguous(memory_format=layout)

    def stock() -> torch.Tensor:
        with no_tf32():  # as ours
            return pipeline(prompts, num_inference_steps=a.steps, guidance_scale=3.0, latents=noise.clone(), output_type="latent").images

    def ours() -> torch.Tensor:
        return solver.solve(drawn, prompts)

    # Both once untimed; `.item()` below and here waits for the device.
    difference = (stock().float() - ours()).abs().mean().item()
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(a.repeats):
        for name, act in (("stock", stock), ("ours", ours)):
            started = time.perf_counter()
            act().mean().item()
            times[name].append(time.perf_counter() - started)
    ratios = [s / o for s, o in zip(times["stock"], times["ours"], strict=True)]
    rate, ours_a_second = matrix_rate(device, getattr(torch, a.precision)), a.batch / statistics.median(times["ours"])
    result = {
        "device": device_name(device), "network": a.network, "precision": a.precision, "compile": a.compile, "stock_layout": a.stock_layout,
        "batch": a.batch, "steps": a.steps, "threads": torch.get_num_threads(), "mean_difference": difference,
        "stock_pairs_per_second": a.batch / statistics.median(times["stock"]), "ours_pairs_per_second": ours_a_second,
        "flops_a_pair": flops, "matrix_tflops": rate / 1e12, "share_of_matrix_rate": ours_a_second * flops / rate,
        "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
