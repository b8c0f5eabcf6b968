"""What the adapters over diffusers folders share: finding, loading, naming them, and writing a one-step one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
import transformers
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.files import is_utf8, sha256_of
from diffusion2gan.teachers.protocol import Precision, PredictionType, TeacherConfig, TextCondition
from diffusion2gan.teachers.published import REVISIONS, revision_of

# What a family's folders are opened with, by `teacher.family`.
PIPELINES: dict[str, Any] = {"stable_diffusion": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "pixel": DDPMPipeline}
# The pipeline that model_index.json names -> the family.
FAMILY_OF_CLASS = {kind.__name__: family for family, kind in PIPELINES.items()} | {DDIMPipeline.__name__: "pixel"}


def weights_digest(*modules: nn.Module) -> str:
    """sha256 over names, dtypes and bytes of all tensors: the same weights give the same digest wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Flattened in logical order: channels-last weights give the same digest.
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Of the vocabulary, and of how a sentence is cut."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer("a red heart, number 7", truncation=True).input_ids])
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """(B, L), padded and cut to the tokenizer's length as the stock pipelines do. Raises UserError for what is no text."""
    for prompt in prompts:
        if not isinstance(prompt, str) or not is_utf8(prompt):
            raise UserError(f"prompt {prompt!r}: expected text in UTF-8")
    return tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def _files_digest(folder: Path, variant: str | None) -> str:
    """sha256 over the weight files of network and text encoders: of what is stored, whatever precision it is loaded in.

    Raises UserError when there are none.
    """
    digest = hashlib.sha256()
    # Repositories of one network may have its weights beside model_index.json.
    parts = [p for p in ("unet", "text_encoder", "text_encoder_2") if (folder / p).is_dir()] or [""]
    if not any(file for part in parts for file in (folder / part).glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors weights of a network, expected them in unet/; name another folder or variant")
    for part in parts:
        files = sorted((folder / part).glob("*.safetensors"))
        of_variant = [p for p in files if (f".{variant}" in p.name if variant else p.name.count(".") == 1)]
        for path in of_variant or files:
            digest.update(f"{part}/{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _local_folder(config: TeacherConfig, folder: str | Path) -> Path:
    """The folder itself, or for a hub id the one in the hub's cache."""
    if Path(folder).is_dir():
        return Path(folder)
    pipeline = PIPELINES[config.family]
    # Not to be fetched, nor to be asked for safetensors.
    unused = {"safety_checker": None, "feature_extractor": None} if config.family == "stable_diffusion" else {}
    revision = revision_of(str(folder), config.revision)
    return Path(pipeline.download(str(folder), revision=revision, variant=config.variant, use_safetensors=True, **unused))


def _pipeline_class(folder: Path) -> str | None:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path}: not valid JSON; restore the file") from None
    name = index.get("_class_name") if isinstance(index, dict) else None
    # A pipeline with code of its own has a list there.
    return None if name is None else str(name)


def family_of(folder: Path) -> str | None:
    """The family of a diffusers folder by its model_index.json; None for another kind of folder. Raises UserError for a damaged one."""
    name = _pipeline_class(folder)
    return None if name is None else FAMILY_OF_CLASS.get(name)


def check_parts(**parts: Any) -> None:
    """Raises UserError for parts of a pipeline, given by their names, that are None."""
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise UserError(f"the teacher has no {', '.join(missing)}, expected a model that draws from text alone; choose another teacher")


def output_gain(scheduler: Any) -> float | None:
    """By how much x exceeds the network's output: 1 / sqrt(abar) at the last timestep of an epsilon-prediction, None for others."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or scheduler.config.prediction_type != "epsilon":
        return None
    return float(alphas[-1] ** -0.5)


def student_precision(gain: float | None) -> Precision:
    """What a student of that `output_gain` is stored and drawn in unless its user says otherwise."""
    # DDPM's 157 times makes visible grain of float16's rounding, Stable Diffusion's 14.6 does not.
    return "float32" if gain is not None and gain > 50 else "float16"


def stored_scheduler(folder: Path) -> Any:
    """The scheduler of a diffusers folder, without the rest. Raises UserError when there is none."""
    try:
        config = DDIMScheduler.load_config(str(folder), subfolder="scheduler")
        return getattr(diffusers, config["_class_name"]).from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = in_one_line(error)
        raise UserError(f"{folder}: has no scheduler of diffusers ({reason}); restore the folder") from None


def stored_weights(config: TeacherConfig, folder: str | Path) -> str:
    """The `weights` of a teacher's identity, without loading it."""
    return _files_digest(_local_folder(config, folder), config.variant)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """diffusers and transformers draw a bar for every part they load or write; they are switched off here and on again."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    active = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, was_active in zip(loggers, active, strict=True):
            if was_active:
                logger.enable_progress_bar()


def decoded_at_once(height: int, width: int) -> int:
    """At most as many latents of that size as make four pictures of 512 x 512: a decoder's activations are far larger than its input."""
    return max(1, 4 * 64 * 64 // (height * width))


def latent_size(resolution: int, unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> int:
    """Side of the latents of pictures of `resolution` pixels, by the configurations of network and autoencoder (None: latents are pixels).

    Raises UserError for a size that they do not divide.
    """
    shrinks, what = (unet, "network") if vae is None else (vae, "autoencoder")
    divisor = 2 ** (len(shrinks["block_out_channels"]) - 1)
    if resolution % divisor:
        raise UserError(
            f"teacher.resolution is {resolution}, expected a multiple of {divisor}, by which its {what} shrinks pictures; choose another size"
        )
    return resolution if vae is None else resolution // divisor


def check_family(config: TeacherConfig, found: str | None, folder: str | Path) -> None:
    """Raises UserError when `folder` is known to be of another family than `config` has."""
    if found not in (None, config.family):
        raise UserError(f"teacher.family is {config.family}, but {folder} is of family {found}; set teacher.family={found}")


def _set_resolution(pipeline: Any, resolution: int | None) -> bool:
    """Lets a pipeline draw at `resolution` pixels; returns whether that is another size than its network's own.

    Raises UserError for a size that the autoencoder's factor, or a network of pixels, does not divide.
    """
    if resolution is None:
        return False
    vae = getattr(pipeline, "vae", None)
    size = latent_size(resolution, pipeline.unet.config, None if vae is None else vae.config)
    own = pipeline.unet.config.sample_size
    if own in (size, [size, size], (size, size)):
        return False
    pipeline.unet.register_to_config(sample_size=size)
    return True


def load_pipeline(config: TeacherConfig, folder: str | Path, dtype: torch.dtype) -> Any:
    """A stock pipeline of `config.family` from a folder or hub id, safetensors only, without safety checker; its network's
    `sample_size` is that of `config.resolution`.

    Raises UserError when it isn't one, or of another family or kind, and for a resolution that it cannot have.
    """
    pipeline, _ = _stored_pipeline(config, folder, dtype)
    _set_resolution(pipeline, config.resolution)
    return pipeline


def _stored_pipeline(config: TeacherConfig, folder: str | Path, dtype: torch.dtype) -> tuple[Any, Path]:
    """The pipeline and the folder that it was read from, of a hub id the one in the hub's cache."""
    from huggingface_hub.errors import HTTPError

    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        local = _local_folder(config, folder)
        name, found = _pipeline_class(local), family_of(local)
        if name is not None and found is None:
            raise UserError(
                f"teacher.source: {folder} is a {name}, expected a {', '.join(FAMILY_OF_CLASS)}: a model that draws from text or noise "
                "alone; name another"
            )
        check_family(config, found, folder)
        with no_progress_bars():
            options = unused if config.family == "stable_diffusion" else {}
            pipeline = PIPELINES[config.family].from_pretrained(local, variant=config.variant, dtype=dtype, use_safetensors=True, **options)
            return pipeline, local
    except HTTPError as error:
        reason = in_one_line(error)
        raise UserError(
            f"teacher.source: {folder} could not be asked for on the hub ({reason}); set HF_HUB_OFFLINE=1 if it is in the cache, or name a folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = in_one_line(error)
        if "not fully cached locally" in str(error) and not Path(folder).is_dir():
            raise UserError(
                f"teacher.source: {folder} is not whole in the hub's cache, and could not be fetched ({reason}); go online once, or name a folder"
            ) from None
        if Path(folder).is_file():
            raise UserError(
                f"teacher.source: {folder} is one file, expected a diffusers folder; make one: "
                f"{PIPELINES[config.family].__name__}.from_single_file(FILE).save_pretrained(FOLDER)"
            ) from None
        if Path(folder).is_dir() and (hint := _other_weights(Path(folder), config.variant)):
            raise UserError(f"teacher.source: {folder} {hint}") from None
        pinned = config.revision is None and not Path(folder).is_dir() and str(folder) in REVISIONS
        other = f", or teacher.revision=main for another commit than {REVISIONS[str(folder)][:12]}" if pinned else ""
        raise UserError(
            f"teacher.source: {folder} is not a diffusers folder or hub id of family {config.family} ({reason}); name one that has "
            f"model_index.json{other}"
        ) from None


def _other_weights(folder: Path, variant: str | None) -> str | None:
    """What weights a folder has where those that were asked for are not there, and what to do."""
    names = {p.name for p in folder.glob("*/*") if p.is_file()}
    safe = {n for n in names if n.endswith(".safetensors")}
    variants = sorted({re.sub(r"-\d+-of-\d+$", "", n.split(".")[1]) for n in safe if n.count(".") == 2})
    # model.fp16.safetensors, and no model.safetensors.
    if variants and variant not in variants and not any(n.count(".") == 1 for n in safe):
        return f"has weights of variant {' and '.join(variants)} alone; set teacher.variant={variants[0]}"
    if not safe and any(n.endswith((".bin", ".ckpt", ".pt")) for n in names):
        return "has pickled weights (.bin) alone, which are not read; load it once with diffusers and save_pretrained(FOLDER)"
    return None


def student_scheduler(teacher_config: dict[str, Any]) -> DDIMScheduler:
    """The scheduler with which one stock step from the last timestep returns x itself."""
    options = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    return DDIMScheduler.from_config({k: v for k, v in teacher_config.items() if not k.startswith("_")} | options)


class DiffusersTeacher:
    """The parts of `Teacher` that do not depend on the family. A subclass sets the attributes below before `_take_schedule`."""

    family: ClassVar[str]
    task: ClassVar[str] = "text-to-image"
    """As the hub calls it."""
    tiny_decoder: ClassVar[str | None] = None
    """Hub id of an `AutoencoderTiny` for the family's latents."""
    network_class: ClassVar[Any] = UNet2DConditionModel
    has_vae: ClassVar[bool] = True
    network: Any
    latent_shape: tuple[int, int, int]
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    scheduler_config: dict[str, Any]
    text_encoder: nn.Module | None = None
    vae: Any = None
    """The autoencoder whose half `decode` evaluates; None where latents are pixels."""
    resolution: int | None = None
    """Side of the pictures in pixels where it is not the network's own."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Of text, any prompt can be read."""

    def _take_schedule(self, scheduler_config: dict[str, Any]) -> None:
        # x is the ODE's solution. Clipping at every step has none that solvers agree on, and a latent has no range to be clipped to.
        # Given by name: what a configuration lists as its default would be the default again.
        schedule = DDIMScheduler.from_config({k: v for k, v in scheduler_config.items() if not k.startswith("_")}, clip_sample=False)
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the teacher predicts {schedule.config.prediction_type!r}, expected epsilon or v_prediction; choose another teacher"
            )
        self.scheduler_config = dict(schedule.config)
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type = schedule.config.prediction_type
        self._stored: Callable[[], str] | None = None
        self._stored_decoder: tuple[Any, Callable[[], Any]] | None = None
        self._device: torch.device | None = None
        self.source = "memory"

    @classmethod
    def from_pretrained(cls, config: TeacherConfig, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Loads a diffusers folder or hub repository (safetensors only). Raises UserError as `load_pipeline` does."""
        pipeline, local = _stored_pipeline(config, folder, getattr(torch, config.dtype))
        changed = _set_resolution(pipeline, config.resolution)
        teacher = cls.from_pipeline(pipeline.to(device))
        teacher.resolution = config.resolution if changed else None
        # Gigabytes are read for it, and who only draws does not need it.
        teacher._stored = cache(partial(_files_digest, local, config.variant))
        if teacher.vae is not None:
            kind = type(teacher.vae)
            stored = partial(
                kind.from_pretrained, local, subfolder="vae", variant=config.variant, torch_dtype=torch.float32, use_safetensors=True
            )
            teacher._stored_decoder = (teacher.vae, stored)
        # A path says nothing elsewhere; the digest does.
        teacher.source = (
            "embedded" if config.source == "embedded" else "folder" if Path(folder).is_dir() else f"{config.source}@{local.name}"
        )
        return teacher

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Self:
        """Wraps the parts of a pipeline; they are shared, not copied, and frozen."""
        raise NotImplementedError

    @classmethod
    def one_step_pipeline(cls, pipeline: Any) -> Any:
        """`pipeline` with a scheduler, and of a class, whose one step from the last timestep is G's x."""
        pipeline.scheduler = student_scheduler(dict(pipeline.scheduler.config))
        return pipeline

    @classmethod
    def one_step_usage(cls, pipeline: Any) -> str:
        """How a picture is drawn with a student exported as `pipeline`: Python, for its card."""
        name = type(pipeline).__name__
        return (
            f"from diffusers import {name}\n"
            f'pipeline = {name}.from_pretrained("this folder")\n'
            'image = pipeline("red heart", num_inference_steps=1, guidance_scale=1).images[0]'
        )

    @property
    def device(self) -> torch.device:
        return self._device or next(self.network.parameters()).device

    def give_up_network(self) -> None:
        """Frees the weights of the network, whose dtype and shapes stay: a training has its own copies, and needs the other parts of the
        teacher."""
        self._device = self.device
        nn.Module.to(self.network, "meta")

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _text_encoders(self) -> list[nn.Module]:
        return [] if self.text_encoder is None else [self.text_encoder]

    def identity(self) -> dict[str, Any]:
        schedule = self.scheduler_config
        return {
            "family": self.family,
            "source": self.source,
            "weights": self._stored() if self._stored else weights_digest(self.network, *self._text_encoders()),
            "schedule": hashlib.sha256(self.alphas_cumprod.float().numpy().tobytes()).hexdigest()[:16],
            "steps_offset": schedule.get("steps_offset", 0),
            "set_alpha_to_one": schedule.get("set_alpha_to_one", True),
            "prediction_type": self.prediction_type,
            # Left out where it is the network's own: older stores stay what they are.
            **({} if self.resolution is None else {"resolution": self.resolution}),
        }

    def decoder_in_float32(self) -> None:
        """Decodes in float32 or better from now on, with the weights as they are stored: half precision makes bands, and SDXL's decoder
        overflows."""
        vae: Any = self.vae
        if vae is None or vae.dtype in (torch.float32, torch.float64):
            return
        nn.Module.to(vae, torch.float32)
        if self._stored_decoder is not None:
            loaded, stored = self._stored_decoder
            if loaded is vae:
                with no_progress_bars():
                    loaded.load_state_dict(stored().state_dict())

    def decoder_digest(self) -> str | None:
        """Of the autoencoder's weights: pictures depend on them, latents do not."""
        return None if self.vae is None else weights_digest(self.vae)

    def timed_modules(self) -> dict[str, nn.Module]:
        """`text`, `network` and `decoder`, as far as there are any: the parts of one evaluation."""
        parts = {"text": self.text_encoder, "network": self.network, "decoder": getattr(self.vae, "decoder", None)}
        return {name: module for name, module in parts.items() if module is not None}

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> c."""
        raise NotImplementedError
