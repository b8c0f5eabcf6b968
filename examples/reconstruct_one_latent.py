"""Which distance finds its way back to a picture? Needs nothing but the package.

python examples/reconstruct_one_latent.py

Two distances, in numbers. For all of Figure 3's, with pictures and curves: diffusion2gan perceptual reconstruct --out fig3
"""

from __future__ import annotations

import torch

from diffusion2gan import ELatentLPIPS, LatentLPIPS
from diffusion2gan.embedded.weights import embedded_folder
from diffusion2gan.perceptual.reconstruct import reconstruct
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig

# A latent to aim at: one picture of the embedded teacher.
teacher = load_teacher(TeacherConfig(source="embedded"))
noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).numpy()
target = OdeSolver(teacher, SolverConfig(solver="dpmpp", steps=20, spacing="trailing")).solve(noise, ["noto red heart"])

plain = LatentLPIPS.from_pretrained(embedded_folder("latent_vgg"))
ensembled = ELatentLPIPS(plain, "bgo")
for name, distance in (
    ("LatentLPIPS", lambda a, b, generator: plain(a, b)),
    ("E-LatentLPIPS", lambda a, b, generator: ensembled(a, b, generator=generator)),
):
    found = reconstruct(distance, target, steps=300)
    print(f"{name}: error {found.errors[0]:.2f} at the start, {found.errors[-1]:.3f} after {found.steps[-1]} steps")
