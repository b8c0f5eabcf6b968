"""Writes the student as an ordinary diffusers folder, and draws pictures with it. No training code.

The folder needs nothing of ours: `StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1,
guidance_scale=1)` runs G, because one DDIM step with trailing spacing and a final alpha-bar of one *is* the
conversion from prediction to x.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.files import atomic_folder, write_bytes_atomic
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import to_uint8
from diffusion2gan.pairs.dataset import canonical_json
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.teachers.load import load_teacher
from diffusion2gan.teachers.ode import OdeSolver
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher, family_of, no_progress_bars

STUDENT_FILE = "diffusion2gan.json"
FORMAT = "diffusion2gan-student-1"


def student_scheduler(teacher_config: dict[str, Any]) -> DDIMScheduler:
    """The scheduler with which one stock step from the last timestep returns x itself."""
    options = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    return DDIMScheduler.from_config({k: v for k, v in teacher_config.items() if not k.startswith("_")} | options)


def export_student(
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
    generator_weights: dict[str, Tensor],
    timestep: int,
    folder: Path,
    facts: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes a student folder: the teacher's pipeline with G's weights, a one-step scheduler, a card and `diffusion2gan.json`.

    `facts` go into the card (recipe, steps, pairs). Raises UserError for a timestep that no stock scheduler starts from,
    or an output folder that already holds something else.
    """
    steps = pipeline.scheduler.config.num_train_timesteps
    if timestep != steps - 1:
        raise UserError(
            f"generator.timestep is {timestep}: a stock one-step scheduler starts at {steps - 1}; train with that timestep to export"
        )
    if folder.exists() and not (folder / STUDENT_FILE).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty and no student; choose a new folder")
    # float32 first: the weights are rounded once, to the dtype they are stored in.
    network = pipeline.unet.float()
    network.load_state_dict({k.removeprefix("network."): v for k, v in generator_weights.items()})
    pipeline.scheduler = student_scheduler(dict(pipeline.scheduler.config))
    with atomic_folder(folder) as target:
        _save(pipeline, target, dtype)
        write_bytes_atomic(target / STUDENT_FILE, canonical_json({"format": FORMAT, "timestep": timestep} | facts))
        write_bytes_atomic(target / "README.md", _card(facts, dtype, type(pipeline).__name__).encode())


def _save(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, folder: Path, dtype: torch.dtype) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is None:
            continue
        # Module.to: the pipeline's own `to` warns of layers that these models do not have.
        torch.nn.Module.to(part, dtype)
    with no_progress_bars():
        pipeline.save_pretrained(folder, safe_serialization=True)


def _card(facts: dict[str, Any], dtype: torch.dtype, pipeline: str) -> str:
    lines = "\n".join(f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# A one-step text-to-image student

Distilled with diffusion2gan. It draws in one network evaluation what its teacher draws in many, from the same noise.

```python
from diffusers import {pipeline}
pipeline = {pipeline}.from_pretrained("this folder")
image = pipeline("red heart", num_inference_steps=1, guidance_scale=1).images[0]
```

In other programs: sampler DDIM with *trailing* spacing, 1 step, guidance (CFG) 1, clip sample off. Euler samplers scale
the starting noise and give washed-out pictures. Weights are {str(dtype).removeprefix("torch.")}; run in float32 or float16:
the last layer's output is multiplied by 14.6, so bfloat16 adds visible grain.

{lines}
"""


@dataclass(frozen=True)
class Student:
    """A loaded student folder: text encoder and decoder of the teacher, and G."""

    teacher: StableDiffusionTeacher
    generator: OneStepGenerator
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was made: what `export` wrote beside the weights."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Student:
        """Loads a folder written by `export_student`. Raises UserError when it is none."""
        path = Path(folder) / STUDENT_FILE
        if not path.is_file():
            raise UserError(f"{folder}: no student here (no {STUDENT_FILE}); name a folder written by `diffusion2gan export`")
        facts = json.loads(path.read_text())
        if facts.get("format") != FORMAT:
            raise UserError(f"{path}: format {facts.get('format')!r}, expected {FORMAT!r}; export the student again with this version")
        config = TeacherConfig.model_validate(
            {"family": family_of(Path(folder)) or "stable_diffusion", "source": str(folder), "dtype": dtype}
        )
        teacher = load_teacher(config, device)
        # The folder's network is the student's own; "teacher" here lends it text encoder, decoder and schedule.
        generator = OneStepGenerator.around(teacher.network, teacher, facts["timestep"])
        return cls(teacher, generator.to(memory_format=torch.channels_last), facts)

    @torch.inference_mode()
    def latents(self, prompts: Sequence[str], noise: np.ndarray) -> Tensor:
        """x = G(z, c): noise (B, C, H, W) float32 on the host -> (B, C, H, W)."""
        state = torch.promote_types(self.teacher.dtype, torch.float32)
        z = torch.from_numpy(noise).to(self.teacher.device, state).contiguous(memory_format=torch.channels_last)
        return self.generator(z, self.teacher.encode_prompts(prompts))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 32) -> np.ndarray:
        """Pictures (B, h, w, 3) uint8, one for each prompt and seed; a picture depends on its own prompt and seed alone."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            stop = start + batch_size
            x = self.latents(prompts[start:stop], draw_noise(seeds[start:stop], self.teacher.latent_shape))
            parts.append(to_uint8(self.teacher.decode(x)))
        return np.concatenate(parts)


@torch.inference_mode()
def teacher_pictures(solver: OdeSolver, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """The teacher's pictures (B, h, w, 3) uint8, one for each prompt and seed."""
    teacher, parts = solver.teacher, []
    for start in range(0, len(prompts), solver.batch_size):
        stop = start + solver.batch_size
        x = solver.solve(draw_noise(seeds[start:stop], teacher.latent_shape), prompts[start:stop])
        parts.append(to_uint8(teacher.decode(x.to(teacher.dtype))))
    return np.concatenate(parts)
