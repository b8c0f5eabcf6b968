"""One step against fifty, end to end from prompt to pixels, both with the same precision and compilation, in one run.

    python benchmarks/one_step.py --out benchmarks/results/one_step.json
    python benchmarks/one_step.py --network sd15 --precision float16 --compile        # a GPU; random weights, same cost

Text encoder, network and decoder are timed together and apart; all take turns. `pipeline` is `OneStepPipeline.generate`, from strings
and seeds to uint8 pictures; its overhead is against those three alone. `--skip-teacher` leaves the fifty steps out, which take a CPU an
hour at SD 1.5's size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_teachers import random_sd15, random_sdxl

from diffusion2gan.device import compile_in_place, default_device
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.evaluation.speed import device_name
from diffusion2gan.files import write_json
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.precision import no_tf32
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.attention import plain_attention_on_cpu
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher


def timed(act: Callable[[], torch.Tensor]) -> float:
    """Seconds of one call; reading a value waits for the device."""
    started = time.perf_counter()
    act().flatten()[0].item()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("embedded", "sd15", "sdxl"), default="embedded")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--skip-teacher", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    device, dtype = default_device(), getattr(torch, a.precision)
    if a.network != "embedded":
        teacher = {"sd15": random_sd15, "sdxl": random_sdxl}[a.network](device)
    else:
        teacher = StableDiffusionTeacher.from_pretrained(TeacherConfig(), embedded_folder("teacher"), device)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        if module := getattr(teacher, part, None):
            torch.nn.Module.to(module, dtype, memory_format=torch.channels_last)
    student = OneStepGenerator.from_teacher(teacher).requires_grad_(False).eval()
    student = student.to(dtype).to(memory_format=torch.channels_last)
    if a.compile:
        plain_attention_on_cpu(student.network, teacher.latent_shape[1] * teacher.latent_shape[2], teacher.device)
        for part in (student.network, teacher.vae.decoder):
            compile_in_place(part, teacher.device, "--compile")
    pipeline = OneStepPipeline(teacher, student)
    rows = []
    for batch in a.batches:
        precision = None if a.precision == "float32" else a.precision
        solver = None if a.skip_teacher else OdeSolver(teacher, SolverConfig(), batch, precision, a.compile)
        prompts, noise = ["red heart"] * batch, draw_noise(range(batch), teacher.latent_shape)

        @torch.inference_mode()
        def pixels(x: torch.Tensor) -> torch.Tensor:
            return teacher.vae.decode(x.to(dtype) / teacher.vae.config.scaling_factor, return_dict=False)[0]

        @torch.inference_mode()
        def one_step(noise=noise, prompts=prompts) -> torch.Tensor:  # type: ignore[no-untyped-def]
            z = torch.from_numpy(noise).to(device).contiguous(memory_format=torch.channels_last)
            return student(z, teacher.encode_prompts(prompts))

        def teacher_latents(solver=solver, noise=noise, prompts=prompts) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return solver.solve(noise, prompts)

        x = one_step()
        acts: dict[str, Callable[[], torch.Tensor]] = {
            "student": lambda act=one_step: pixels(act()),
            "decoder": lambda x=x: pixels(x),
            "pipeline": lambda prompts=prompts: torch.from_numpy(pipeline.generate(prompts, range(len(prompts)), len(prompts))),
        }
        if solver is not None:
            acts["teacher"] = lambda act=teacher_latents: pixels(act())
        times: dict[str, list[float]] = {name: [] for name in acts}
        with no_tf32():  # all alike
            for act in acts.values():
                timed(act)
            for _ in range(a.repeats):
                for name, act in acts.items():
                    times[name].append(timed(act))
        row = {name: statistics.median(seconds) / batch for name, seconds in times.items()}
        overheads = [p / s - 1 for p, s in zip(times["pipeline"], times["student"], strict=True)]
        row = {"batch": batch, **{f"{k}, s an image": v for k, v in row.items()}, "pipeline's overhead": statistics.median(overheads)}
        if solver is not None:
            row["times as fast"] = statistics.median(t / s for t, s in zip(times["teacher"], times["student"], strict=True))
        rows.append(row)
    print(markdown_table(list(rows[0]), [list(r.values()) for r in rows]))
    if a.out:
        result = {"device": device_name(device), "network": a.network, "precision": a.precision, "compile": a.compile, "rows": rows}
        write_json(a.out, result)


if __name__ == "__main__":
    main()
