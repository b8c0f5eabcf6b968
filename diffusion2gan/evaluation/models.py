"""What can be evaluated: a student, a teacher, any diffusers text-to-image pipeline, a folder of pictures. All draw from the same noise.

A model's pictures depend on its weights and settings, a prompt and a seed; `identity` names the former.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from diffusion2gan.embedded.weights import student_folder
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.evaluation.datasets import PictureFolder
from diffusion2gan.files import hub_file
from diffusion2gan.images import Quantiser, to_uint8
from diffusion2gan.pairs.seeds import draw_noise
from diffusion2gan.pipeline import STUDENT_FILE, OneStepPipeline, teacher_pictures
from diffusion2gan.precision import no_tf32
from diffusion2gan.teachers.folders import decoded_at_once, family_of, weights_digest
from diffusion2gan.teachers.load import LoadedTeacher, load_teacher
from diffusion2gan.teachers.ode import OdeSolver, SolverConfig
from diffusion2gan.teachers.protocol import TeacherConfig
from diffusion2gan.teachers.published import revision_of


@dataclass(frozen=True)
class Model:
    """`draw(prompts, seeds)` -> uint8 (n, h, w, 3). `identity` (JSON) is all that the pictures depend on."""

    name: str
    identity: Mapping[str, Any]
    draw: Callable[[Sequence[str], Sequence[int]], np.ndarray]
    folder: PictureFolder | None = None
    """Set when the pictures are not drawn but read: then `captions` are theirs."""
    captions: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    latent_shape: tuple[int, ...] | None = None
    """Of the noise. Only pictures from noises of one shape can be compared noise by noise."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """`text`, `network` and `decoder`: what `speed.latency` listens to. Empty for pictures."""
    quantiser: Quantiser | None = "round"
    """How its pixels became whole numbers; None for pictures that were."""


# --- Ours -----------------------------------------------------------------------------------------------------------
def student_model(
    folder: Path, name: str, dtype: str, device: str, batch_size: int, quantiser: Quantiser = "round", timed: bool = False
) -> Model:
    """A folder written by `export`. `timed`: it decodes in `dtype`, where its autoencoder can."""
    student = OneStepPipeline.from_pretrained(folder, dtype, device)
    _set_decoder(student.teacher, timed)
    identity = {
        # Of the files: the same in every precision.
        "subject": f"student {student.teacher.identity()['weights'][:16]}",
        "decoder": _short(student.teacher.decoder_digest()),
        "dtype": dtype,
        **_unless_rounded(quantiser),
    }
    lent = student.teacher
    return Model(
        name, identity, lambda p, s: student.generate(p, s, batch_size, quantiser=quantiser), facts=student.facts,
        latent_shape=lent.latent_shape, modules=lent.timed_modules(), quantiser=quantiser,
    )  # fmt: skip


def _set_decoder(teacher: LoadedTeacher, timed: bool) -> None:
    """To float32; where it is timed only if it would overflow."""
    if not timed or _overflows(teacher.vae, teacher.dtype, teacher.family == "sdxl"):
        teacher.decoder_in_float32()


def _overflows(vae: Any, dtype: torch.dtype, sdxl: bool) -> bool:
    """In float16, as its configuration says: SDXL's, for others have the setting and don't mean it."""
    return sdxl and dtype == torch.float16 and bool(vae.config.force_upcast)


def _unless_rounded(quantiser: Quantiser) -> dict[str, str]:
    """Part of an identity. Rounding is the rule, and is not said."""
    return {} if quantiser == "round" else {"quantiser": quantiser}


def _short(digest: str | None) -> str | None:
    return None if digest is None else digest[:16]


def _family(source: str, revision: str | None = None) -> str:
    """The family of a teacher by its pipeline's class: of a folder, or of a hub repository's model_index.json."""
    folder = Path(source)
    if source != "embedded" and not folder.is_dir():
        try:
            folder = hub_file(source, "model_index.json", revision_of(source, revision)).parent
        except FileNotFoundError as error:
            raise UserError(f"teacher:{source}: cannot be found ({error}); name `embedded`, a diffusers folder or a hub id") from None
    return family_of(folder) or "stable_diffusion"


def teacher_of_source(
    source: str, dtype: str, device: str, resolution: int | None = None, revision: str | None = None, variant: str | None = None
) -> LoadedTeacher:
    """A teacher named by folder or hub id, at its own resolution or another."""
    settings = {
        "family": _family(source, revision), "source": source, "revision": revision, "variant": variant, "dtype": dtype,
        "resolution": resolution,
    }  # fmt: skip
    return load_teacher(TeacherConfig.model_validate(settings), device)


def teacher_model(
    source: str,
    name: str,
    ode: SolverConfig,
    dtype: str,
    device: str,
    batch_size: int,
    quantiser: Quantiser = "round",
    resolution: int | None = None,
    negative_prompt: str = "",
    revision: str | None = None,
    variant: str | None = None,
    timed: bool = False,
) -> Model:
    """A teacher with its ODE solver, as its pairs are made. `timed` as of a student."""
    teacher = teacher_of_source(source, dtype, device, resolution, revision, variant)
    _set_decoder(teacher, timed)
    solver = OdeSolver(teacher, ode, batch_size, negative_prompt=negative_prompt)
    known = teacher.identity()
    identity = {
        "subject": f"teacher {known['weights'][:16]}",
        "ode": ode.model_dump(),
        "decoder": _short(teacher.decoder_digest()),
        "dtype": dtype,
        **_unless_rounded(quantiser),
        **({} if teacher.resolution is None else {"resolution": teacher.resolution}),
        **({"negative_prompt": negative_prompt} if negative_prompt else {}),
    }
    modules = teacher.timed_modules() | ({} if solver.network is None else {"network": solver.network})
    facts = {"ode": ode.model_dump(), "weights": known["weights"]}
    return Model(
        name, identity, lambda p, s: teacher_pictures(solver, p, s, quantiser=quantiser), facts=facts,
        latent_shape=teacher.latent_shape, modules=modules, quantiser=quantiser,
    )  # fmt: skip


# --- Pictures that exist --------------------------------------------------------------------------------------------
def folder_model(folder: Path, name: str, captions: Path | None) -> Model:
    """A folder of pictures, sorted by name, with one caption a line in `captions` (default: `captions.txt` inside).
    Raises UserError when their numbers differ, and for names that sort in two ways (2.png, 10.png)."""
    pictures = PictureFolder(folder)
    if pictures.lossy:
        warnings.warn(f"{folder}: {pictures.lossy} of {len(pictures)} pictures are JPEG or WebP, which moves every score", stacklevel=1)
    path = captions or folder / "captions.txt"
    lines: tuple[str, ...] = ()
    if captions or path.exists():
        from diffusion2gan.evaluation.datasets import prompts_of_file

        lines = prompts_of_file(path).prompts
        if len(lines) != len(pictures):
            raise UserError(f"{path}: {len(lines)} captions for {len(pictures)} pictures in {folder}, expected one each")
        pictures.refuse_two_orders(f"{path} could be meant in either order")

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        raise UserError(f"{folder}: a folder of pictures cannot draw new ones; name a model")

    return Model(name, {"subject": f"pictures {pictures.identity[:16]}"}, draw, pictures, lines, quantiser=None)


# --- Other people's pipelines ---------------------------------------------------------------------------------------
class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Euler steps of a rectified flow whose network predicts v = picture - noise at time 1000 (1 - i/N) (InstaFlow)."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.timesteps = torch.tensor([float(num_train_timesteps)])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None, **_: Any) -> None:
        total = self.config.num_train_timesteps
        self.timesteps = torch.tensor([total * (1 - i / num_inference_steps) for i in range(num_inference_steps)], device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> tuple[Tensor]:
        return (sample + model_output / len(self.timesteps),)


def _instaflow(pipeline: Any) -> None:
    pipeline.scheduler = RectifiedFlowScheduler()


def _turbo(pipeline: Any) -> None:
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")


def _lightning(pipeline: Any) -> None:
    from safetensors.torch import load_file

    try:
        weights = load_file(hub_file("ByteDance/SDXL-Lightning", "sdxl_lightning_1step_unet_x0.safetensors"))
    except FileNotFoundError as error:
        raise UserError(f"ByteDance/SDXL-Lightning: its weights cannot be had ({error}); go online once, or leave the model away") from None
    network = UNet2DConditionModel.from_config(pipeline.unet.config).to(pipeline.unet.dtype)
    network.load_state_dict(weights)
    pipeline.unet = network.to(pipeline.unet.device).eval()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", prediction_type="sample"
    )


@dataclass(frozen=True)
class Preset:
    """A published model as its own card says it is to be used."""

    source: str
    steps: int
    guidance: float
    prepare: Callable[[Any], None] | None = None


PRESETS: Mapping[str, Preset] = {
    "sdxl-turbo": Preset("stabilityai/sdxl-turbo", 1, 0.0, _turbo),
    "sdxl-lightning": Preset("stabilityai/stable-diffusion-xl-base-1.0", 1, 0.0, _lightning),
    "lcm": Preset("SimianLuo/LCM_Dreamshaper_v7", 4, 8.0),
    "instaflow": Preset("XCLiu/instaflow_0_9B_from_sd_1_5", 1, 1.0, _instaflow),
}


@torch.inference_mode()
def _decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Scaled latents -> pixels in [-1, 1], by the pipeline's autoencoder in its own precision."""
    vae = pipeline.vae
    config = vae.config
    latents = latents.float()
    if getattr(config, "latents_mean", None) is not None:
        mean, spread = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        latents = latents * spread / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    latents = latents.to(next(vae.parameters()).dtype)
    return torch.cat([vae.decode(part).sample for part in latents.split(decoded_at_once(*latents.shape[2:]))])


def _step_noise(seed: int) -> torch.Generator:
    """For samplers that add noise on the way. torch reads the low 32 bits of a seed alone, so they are made of all."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4]))


_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _check_parts(pipeline: Any, source: str) -> nn.Module:
    """The denoising network. Raises UserError for a pipeline that is driven in another way."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    missing = [p for p in ("vae", "text_encoder") if getattr(pipeline, p, None) is None]
    if network is None or missing:
        lacks = "unet or transformer" if network is None else missing[0]
        raise UserError(
            f"{source}: a {type(pipeline).__name__} has no {lacks}, expected network, autoencoder and text encoder; draw its pictures yourself "
            "and name their folder"
        )
    if network.config.in_channels != pipeline.vae.config.latent_channels:
        raise UserError(
            f"{source}: its network reads {network.config.in_channels} channels and its autoencoder has {pipeline.vae.config.latent_channels} "
            "(packed latents), which cannot be given from here; draw its pictures yourself and name their folder"
        )
    found: nn.Module = network
    return found


def pipeline_model(
    source: str,
    name: str,
    steps: int,
    guidance: float,
    dtype: str,
    device: str,
    batch_size: int,
    prepare: Callable[[Any], None] | None = None,
    quantiser: Quantiser = "round",
    timed: bool = False,
) -> Model:
    """Any diffusers text-to-image pipeline with a U-Net or transformer and an autoencoder: folder or hub id. `timed` as of a student."""
    types = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype={"vae": torch.float32, "default": types[dtype]})
        _check_parts(pipeline, source)
        if prepare:
            prepare(pipeline)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError) as error:
        reason = in_one_line(error)
        raise UserError(
            f"{source}: cannot be loaded as a diffusers pipeline ({reason}); name a folder, a hub id or one of {', '.join(PRESETS)}"
        ) from None
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it paints pictures black
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if timed and not _overflows(pipeline.vae, types[dtype], type(pipeline).__name__.startswith("StableDiffusionXL")):
        nn.Module.to(pipeline.vae, types[dtype])
    network: Any = _check_parts(pipeline, source)
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (network.config.in_channels, height, width)

    @torch.inference_mode()
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        parts = []
        for start in range(0, len(prompts), batch_size):
            chosen = list(seeds[start : start + batch_size])
            noise = torch.from_numpy(draw_noise(chosen, shape)).to(device, network.dtype)
            generators = [_step_noise(s) for s in chosen]
            with no_tf32():  # as ours
                latents = pipeline(
                    prompt=list(prompts[start : start + batch_size]), latents=noise, num_inference_steps=steps, guidance_scale=guidance,
                    generator=generators, output_type="latent",
                ).images  # fmt: skip
                parts.append(to_uint8(_decode(pipeline, latents), quantiser))
        return np.concatenate(parts)

    modules = [network, pipeline.vae, *(m for m in (getattr(pipeline, p, None) for p in _PARTS) if m is not None)]
    identity = {
        "subject": f"{type(pipeline).__name__} {weights_digest(*modules)[:16]}",
        "scheduler": hashlib.sha256(
            json.dumps([type(pipeline.scheduler).__name__, dict(pipeline.scheduler.config)], sort_keys=True, default=str).encode()
        ).hexdigest()[:16],
        "steps": steps,
        "guidance": guidance,
        "dtype": dtype,
        **_unless_rounded(quantiser),
    }
    parts = {"text": pipeline.text_encoder, "network": network, "decoder": pipeline.vae.decoder}
    facts = {"source": source, "steps": steps, "guidance": guidance}
    return Model(name, identity, draw, facts=facts, latent_shape=shape, modules=parts, quantiser=quantiser)


# --- By name --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelOptions:
    """How a model that is named on the command line is to be run. `steps` and `guidance` are for teachers and other pipelines,
    `resolution` (pixels) is for teachers."""

    steps: int | None = None
    guidance: float | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 32
    captions: Path | None = None
    quantiser: Quantiser = "round"
    resolution: int | None = None
    timed: bool = False
    """To be timed: half precision is for the decoder too, where it can. What is scored decodes in float32."""


def model_kind(spec: str) -> Literal["teacher", "student", "preset", "pictures", "pipeline"]:
    """What `load_model` makes of a name; a `pipeline` may also be none."""
    if not spec.removeprefix("teacher:").strip():
        raise UserError(f"model {spec!r}: expected the name of one; is a variable of your shell empty?")
    if spec.startswith("teacher:"):
        return "teacher"
    if spec in PRESETS:
        return "preset"
    path = Path(spec)
    if spec == "embedded" or (path / STUDENT_FILE).is_file():
        return "student"
    return "pictures" if path.is_dir() and not (path / "model_index.json").is_file() else "pipeline"


def model_name(spec: str) -> str:
    """What a model that is named on the command line is called."""
    if spec == "embedded":
        return "embedded student"
    return spec if model_kind(spec) in ("teacher", "preset") else Path(spec).name


def check_steps(specs: Sequence[str], options: ModelOptions) -> None:
    """Raises UserError for steps or guidance that none of the models can follow: students draw in one step, pictures are there."""
    asked = [f"--{name} {value}" for name in ("steps", "guidance") if (value := getattr(options, name)) is not None]

    if asked and all(model_kind(spec) in ("student", "pictures") for spec in specs):
        named = f"{specs[0]} is a student or a folder of pictures, which takes none" if specs else "what is named was evaluated already"
        raise UserError(f"{' '.join(asked)}: {named}; leave it out, or name a teacher")


def load_model(spec: str, options: ModelOptions) -> Model:
    """`embedded` or a folder written by `export`: a student. `teacher:SOURCE`: a teacher (`teacher:embedded`), by DDIM with
    `steps` and `guidance`. One of PRESETS. A folder or hub id of a diffusers pipeline, with `steps` and `guidance`.
    A folder of pictures. Raises UserError for anything else."""
    o, kind, path, name = options, model_kind(spec), Path(spec), model_name(spec)
    if kind == "teacher":
        ode = SolverConfig(steps=o.steps or 50, guidance=3.0 if o.guidance is None else o.guidance)
        return teacher_model(
            spec.removeprefix("teacher:"), name, ode, o.dtype, o.device, o.batch_size, o.quantiser, o.resolution, timed=o.timed
        )
    if kind == "preset":
        preset = PRESETS[spec]
        steps, guidance = o.steps or preset.steps, preset.guidance if o.guidance is None else o.guidance
        return pipeline_model(preset.source, name, steps, guidance, o.dtype, o.device, o.batch_size, preset.prepare, o.quantiser, o.timed)
    if kind == "student":
        return student_model(student_folder(spec), name, o.dtype, o.device, o.batch_size, o.quantiser, o.timed)
    if kind == "pictures":
        if o.quantiser != "round":
            raise UserError(f"--quantiser {o.quantiser}: the pictures of {path} are whole numbers already; leave it out, or name a model")
        return folder_model(path, name, o.captions)
    if not path.exists() and (path.is_absolute() or spec.startswith(".") or spec.count("/") != 1 or path.parent.is_dir()):
        raise UserError(f"{spec}: no such folder, and no name of a hub repository; check the path")
    if not path.is_dir() and path.exists():
        raise UserError(f"{spec}: a file, expected a folder of a model or of pictures")
    if o.steps is None or o.guidance is None:
        raise UserError(
            f"{spec}: a diffusers pipeline needs --steps and --guidance; its card says which, or name one of {', '.join(PRESETS)}"
        )
    return pipeline_model(spec, name, o.steps, o.guidance, o.dtype, o.device, o.batch_size, quantiser=o.quantiser, timed=o.timed)
