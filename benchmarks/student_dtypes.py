"""Error of an exported student in each precision, through the stock pipeline, against float64.

python benchmarks/student_dtypes.py --student embedded --out benchmarks/results/student_dtypes.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from diffusion2gan.embedded.weights import embedded_student
from diffusion2gan.evaluation.emoji10k import drawn_prompt_list, noise_seeds
from diffusion2gan.files import write_json
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import OneStepPipeline
from diffusion2gan.report import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default="embedded")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, default=None)
    a = parser.parse_args()
    folder = embedded_student() if a.student == "embedded" else Path(a.student)
    prompts = [p.prompt for p in drawn_prompt_list("validation", a.count)]
    seeds = noise_seeds("validation", "A", a.count)
    rows = {}
    exact = None
    for name in ("float64", "float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        student = OneStepPipeline.from_pretrained(folder, name)
        noise = draw_noise(seeds, student.teacher.latent_shape)
        latents = torch.from_numpy(noise).to(dtype)
        stock = pipeline(prompts, num_inference_steps=1, guidance_scale=1, latents=latents, output_type="latent").images.double()
        ours = student.latents(prompts, noise).double()
        exact = ours if exact is None else exact
        rows[name] = {
            "stock_rms": (stock - exact).square().mean().sqrt().item(),
            "stock_max": (stock - exact).abs().max().item(),
            "ours_rms": (ours - exact).square().mean().sqrt().item(),
            "stock_against_ours_max": (stock - ours).abs().max().item(),
        }
    print(markdown_table(["dtype", *next(iter(rows.values()))], [[k, *v.values()] for k, v in rows.items()]))
    if a.out:
        write_json(a.out, rows)


if __name__ == "__main__":
    main()
