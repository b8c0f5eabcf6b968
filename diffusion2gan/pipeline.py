"""Draws pictures with a student, and with its teacher for comparison. No training code."""

from __future__ import annotations

import json
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from diffusion2gan.device import compile_in_place, default_device
from diffusion2gan.embedded.weights import embedded_student
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.generator import OneStepGenerator
from diffusion2gan.images import Quantiser, to_uint8
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.folders import family_of, no_progress_bars, output_gain, stored_scheduler, student_precision
from diffusion2gan.teachers.load import LoadedTeacher, load_teacher
from diffusion2gan.teachers.ode import OdeSolver
from diffusion2gan.teachers.protocol import Precision, TeacherConfig
from diffusion2gan.teachers.published import revision_of

STUDENT_FILE = "diffusion2gan.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
FORMAT = "diffusion2gan-student-1"


OutputType = Literal["pil", "uint8", "latent"]


@dataclass(frozen=True)
class OneStepPipeline:
    """A student, ready to draw: `OneStepPipeline.from_pretrained(folder)("red heart")[0].save("heart.png")`.

    One network evaluation a picture, without guidance. A picture depends on its own prompt and seed alone, whatever else is drawn
    with it.
    """

    teacher: LoadedTeacher
    """Lends text encoder, decoder and schedule; its network is the student's own."""
    generator: OneStepGenerator
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was made: what `export` wrote beside the weights."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        *,
        decoder: str | None = None,
        compile: bool = False,
        revision: str | None = None,
    ) -> OneStepPipeline:
        """Loads a folder or hub repository written by `export`, or `embedded`, the student that ships with the package.

        dtype: of the network; by default float32, but float16 on a GPU unless the student's output is multiplied by too much for it
        (its card says by how much). The last layers compute in float32 in any case.
        device: by default the GPU where there is one. decoder: `tiny` (or a folder or hub id of an `AutoencoderTiny`) decodes 20
        times faster and a little worse. compile: compiles network and decoder, which takes minutes at the first call of each batch size.
        Raises UserError for anything else than a student, another dtype, and a decoder of other latents.
        """
        if dtype is not None and dtype not in get_args(Precision):
            raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(Precision))}")
        folder = _student_folder(source, revision)
        facts = _student_facts(folder, source)
        device = str(device or default_device())
        dtype = dtype or _default_precision(folder, device)
        config = TeacherConfig.model_validate({"family": family_of(folder) or "stable_diffusion", "source": str(folder), "dtype": dtype})
        teacher = load_teacher(config, device)
        if decoder is not None:
            teacher.vae = _tiny_decoder(decoder, teacher)
        generator = OneStepGenerator.around(teacher.network, teacher, facts["timestep"]).to(memory_format=torch.channels_last)
        if compile:
            for part in (generator.network, getattr(teacher.vae, "decoder", None)):
                if part is not None:
                    compile_in_place(part, teacher.device, "compile")
        return cls(teacher, generator, facts)

    @overload
    def __call__(
        self, prompt: str | Sequence[str], *, seed: int | Sequence[int] = ..., images_per_prompt: int = ..., batch_size: int = ...
    ) -> list[Image.Image]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = ...,
        images_per_prompt: int = ...,
        batch_size: int = ...,
        output_type: OutputType,
    ) -> Any: ...

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        batch_size: int = 32,
        output_type: OutputType = "pil",
    ) -> Any:
        """Pictures of one or more prompts, `images_per_prompt` of each, one after the other.

        seed: of the first picture, the next ones have the next numbers, across the prompts; or one for each picture. From 0 to 2^63 - 1;
        those from 2^62 on are evaluation's.
        Returns PIL images; with output_type `uint8` an array (N, h, w, 3), with `latent` a tensor (N, C, H, W) of latents, float32 in the
        U-Net's scaling.
        Raises UserError for a number of seeds that is not that of the pictures, and for one that no noise is drawn from.
        """
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type is {output_type!r}, expected one of {', '.join(get_args(OutputType))}")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [p for p in prompts for _ in range(images_per_prompt)]
        seeds = _checked_seeds([seed + i for i in range(len(prompts))] if isinstance(seed, int | numbers.Real) else seed, len(prompts))
        if output_type == "latent":
            shape, starts = self.teacher.latent_shape, range(0, len(prompts), batch_size)
            return torch.cat([self.latents(prompts[i : i + batch_size], draw_noise(seeds[i : i + batch_size], shape)) for i in starts])
        pictures = self.generate(prompts, seeds, batch_size)
        return pictures if output_type == "uint8" else [Image.fromarray(p) for p in pictures]

    @torch.inference_mode()
    def latents(self, prompts: Sequence[str], noise: np.ndarray) -> Tensor:
        """x = G(z, c): noise (B, C, H, W) float32 on the host -> (B, C, H, W), float32 in the U-Net's scaling (float64 for a float64
        network). Raises UserError unless B, at least one, is the number of prompts."""
        if not 0 < len(prompts) == len(noise):
            raise UserError(f"{len(noise)} noises for {len(prompts)} prompts, expected one for each and at least one")
        state = torch.promote_types(self.teacher.dtype, torch.float32)
        z = torch.from_numpy(noise).to(self.teacher.device, state).contiguous(memory_format=torch.channels_last)
        # The last layers are in float32 whatever the network is; inside a compiled graph they cannot ask for it.
        with no_tf32():
            return self.generator(z, self.teacher.encode_prompts(prompts))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 32, *, quantiser: Quantiser = "round") -> np.ndarray:
        """Pictures (B, h, w, 3) uint8, one for each prompt and seed. Raises UserError unless there are as many, and at least one."""
        seeds, parts = _checked_seeds(seeds, len(prompts)), []
        for start in range(0, len(prompts), batch_size):
            stop = start + batch_size
            x = self.latents(prompts[start:stop], draw_noise(seeds[start:stop], self.teacher.latent_shape))
            with no_tf32():
                parts.append(to_uint8(self.teacher.decode(x), quantiser))
        return np.concatenate(parts)


def _checked_seeds(seeds: Sequence[int], pictures: int) -> list[int]:
    """Plain numbers. Raises UserError for others than whole ones of 63 bits, and unless there is one for each of at least one picture."""
    for seed in seeds:
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 1 << 63:
            raise UserError(f"seed is {seed!r}, expected a whole number from 0 to 2^63 - 1")
    if len(seeds) != pictures:
        raise UserError(f"{len(seeds)} seeds for {pictures} pictures; give one number, or one for each picture")
    if not pictures:
        raise UserError("no prompts and no pictures asked for, expected at least one of each")
    return [int(seed) for seed in seeds]


def _default_precision(folder: Path, device: str) -> str:
    """Half only where it is fast, and no rounding becomes visible."""
    return student_precision(output_gain(stored_scheduler(folder))) if device.startswith("cuda") else "float32"


def _student_folder(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or for a hub id the one in the hub's cache."""
    if source == "embedded":
        if revision is not None:
            raise UserError(f"revision {revision!r}: `embedded` is part of the package and has none; leave it out")
        return embedded_student()
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    # Of a repository that also holds a single file or a LoRA, the folder alone.
    wanted = [STUDENT_FILE, "model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        # First of all, or gigabytes would come before the news that it is no student.
        hf_hub_download(str(source), STUDENT_FILE, revision=revision)
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HTTPError, HFValidationError, OSError) as error:
        reason = in_one_line(error)
        raise UserError(f"{source}: no such folder, and not found on the hub ({reason}); name a student's folder or hub id") from None


def _student_facts(folder: Path, source: str | Path) -> dict[str, Any]:
    path = folder / STUDENT_FILE
    if not path.is_file() and (folder / LORA_FILE).is_file():
        raise UserError(f"{source}: a LoRA, not a whole student; load it into the teacher's pipeline, or export --format folder")
    if not path.is_file():
        raise UserError(f"{source}: no student here (no {STUDENT_FILE}); name a folder written by `diffusion2gan export`")
    try:
        facts: Any = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path}: not valid JSON; export the student again") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("timestep", 0), int):
        raise UserError(f"{path}: is no record of a student; export it again")
    if facts.get("format") != FORMAT or "timestep" not in facts:
        raise UserError(f"{path}: format {facts.get('format')!r}, expected {FORMAT!r}; export the student again with this version")
    return facts


def _tiny_decoder(source: str, teacher: LoadedTeacher) -> AutoencoderTiny:
    """An `AutoencoderTiny` of the teacher's latent space. Raises UserError when there is none, or it is of another space."""
    from huggingface_hub.errors import HTTPError

    name = teacher.tiny_decoder if source == "tiny" else source
    if not name or teacher.vae is None:
        raise UserError(f"decoder {source!r}: a {teacher.family} student has no tiny decoder; leave it out")
    try:
        with no_progress_bars():
            tiny = AutoencoderTiny.from_pretrained(name, revision=revision_of(name, None), torch_dtype=teacher.dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, HTTPError) as error:
        raise UserError(f"decoder {source!r}: {name} is no AutoencoderTiny ({in_one_line(error)}); name a folder or hub id") from None
    for what, ours, theirs in (
        ("latent channels", teacher.vae.config.latent_channels, tiny.config.latent_channels),
        ("pixels a latent", 2 ** (len(teacher.vae.config.block_out_channels) - 1), 2 ** (len(tiny.config.decoder_block_out_channels) - 1)),
    ):
        if ours != theirs:
            raise UserError(f"decoder {source!r}: has {theirs} {what}, expected {ours}, the student's; name one of its latent space")
    return tiny.to(teacher.device).requires_grad_(False).eval()


@torch.inference_mode()
def teacher_pictures(solver: OdeSolver, prompts: Sequence[str], seeds: Sequence[int], *, quantiser: Quantiser = "round") -> np.ndarray:
    """The teacher's pictures (B, h, w, 3) uint8, one for each prompt and seed."""
    teacher, parts = solver.teacher, []
    for start in range(0, len(prompts), solver.batch_size):
        stop = start + solver.batch_size
        x = solver.solve(draw_noise(seeds[start:stop], teacher.latent_shape), prompts[start:stop])
        with no_tf32():
            parts.append(to_uint8(teacher.decode(x), quantiser))
    return np.concatenate(parts)
