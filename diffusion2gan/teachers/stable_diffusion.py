"""Stable Diffusion 1.x and 2.x (and the embedded teacher, which is one): adapter over diffusers classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion2gan.errors import UserError
from diffusion2gan.teachers.protocol import PredictionType, TeacherConfig, TextCondition

# What a family's folders are opened with, by `teacher.family`.
PIPELINES: dict[str, Any] = {"stable_diffusion": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


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
    """(B, L), padded and cut to the tokenizer's length as the stock pipelines do."""
    return tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def _files_digest(folder: Path, variant: str | None) -> str:
    """sha256 over the weight files of network and text encoders: of what is stored, whatever precision it is loaded in."""
    digest = hashlib.sha256()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        files = sorted((folder / part).glob("*.safetensors"))
        of_variant = [p for p in files if (f".{variant}" in p.name if variant else p.name.count(".") == 1)]
        for path in of_variant or files:
            with open(path, "rb") as file:
                digest.update(f"{part}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _local_folder(config: TeacherConfig, folder: str | Path) -> Path:
    """The folder itself, or for a hub id the one in the hub's cache."""
    if Path(folder).is_dir():
        return Path(folder)
    pipeline = PIPELINES[config.family]
    return Path(pipeline.download(str(folder), revision=config.revision, variant=config.variant, use_safetensors=True))


def family_of(folder: Path) -> str | None:
    """The family of a diffusers folder by its model_index.json; None for another kind of folder."""
    path = folder / "model_index.json"
    name = json.loads(path.read_text()).get("_class_name") if path.is_file() else None
    return next((family for family, kind in PIPELINES.items() if kind.__name__ == name), None)


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


def load_pipeline(config: TeacherConfig, folder: str | Path, dtype: torch.dtype) -> Any:
    """A stock pipeline of `config.family` from a folder or hub id, safetensors only, without safety checker.

    Raises UserError when it isn't one, or of another family.
    """
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        local = _local_folder(config, folder)
        found = family_of(local)
        if found not in (None, config.family):
            raise UserError(f"teacher.family is {config.family}, but {folder} is of family {found}; set teacher.family={found}")
        with no_progress_bars():
            return PIPELINES[config.family].from_pretrained(
                local, variant=config.variant, dtype=dtype, use_safetensors=True, **(unused if config.family == "stable_diffusion" else {})
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"teacher.source: {folder} is not a Stable Diffusion folder or hub id ({reason}); name one that has model_index.json"
        ) from None


class StableDiffusionTeacher:
    """Implements `Teacher` for `StableDiffusionPipeline` folders; epsilon- and v-prediction."""

    family = "stable_diffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ):
        self.network, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False).eval()
        schedule = DDIMScheduler.from_config(scheduler_config)
        if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the teacher predicts {schedule.config.prediction_type!r}, expected epsilon or v_prediction; choose another teacher"
            )
        self.scheduler_config = dict(schedule.config)
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type: PredictionType = schedule.config.prediction_type
        self._weights: str | None = None
        self.source = "memory"
        self.latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    @classmethod
    def from_pretrained(cls, config: TeacherConfig, folder: str | Path, device: str | torch.device = "cpu") -> StableDiffusionTeacher:
        """Loads a diffusers folder or hub repository (safetensors only). Raises UserError when it isn't one."""
        teacher = cls.from_pipeline(load_pipeline(config, folder, getattr(torch, config.dtype)).to(device))
        local = _local_folder(config, folder)
        teacher._weights = _files_digest(local, config.variant)
        # A path says nothing elsewhere; the digest does.
        teacher.source = (
            "embedded" if config.source == "embedded" else "folder" if Path(folder).is_dir() else f"{config.source}@{local.name}"
        )
        return teacher

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline) -> StableDiffusionTeacher:
        """Wraps the parts of a pipeline; they are shared, not copied, and frozen."""
        return cls(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, dict(pipeline.scheduler.config))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _text_encoders(self) -> list[nn.Module]:
        return [self.text_encoder]

    def identity(self) -> dict[str, Any]:
        schedule = self.scheduler_config
        return {
            "family": self.family,
            "source": self.source,
            "weights": self._weights or weights_digest(self.network, *self._text_encoders()),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "schedule": hashlib.sha256(self.alphas_cumprod.float().numpy().tobytes()).hexdigest()[:16],
            "steps_offset": schedule.get("steps_offset", 0),
            "set_alpha_to_one": schedule.get("set_alpha_to_one", True),
            "prediction_type": self.prediction_type,
            "latent_scaling": float(self.vae.config.scaling_factor),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts -> embeddings (B, L, D)."""
        return TextCondition(self.text_encoder(token_ids(self.tokenizer, prompts).to(self.device))[0].to(self.dtype))

    def encode_negative(self, prompt: str = "") -> TextCondition:
        """The unconditional branch's condition, one row."""
        return self.encode_prompts([prompt])

    def evaluate(self, latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module | None = None) -> Tensor:
        return (self.network if network is None else network)(
            latent,
            timestep,
            encoder_hidden_states=condition.embeddings,
            added_cond_kwargs=dict(condition.added) if condition.added else None,
            return_dict=False,
        )[0]

    def decode(self, latent: Tensor) -> Tensor:
        # At most as many pictures at once as make four of 512 x 512: a decoder's activations are far larger than its input.
        at_once = max(1, 4 * 64 * 64 // (latent.shape[2] * latent.shape[3]))
        scaled = latent.to(self.vae.dtype) / self.vae.config.scaling_factor
        return torch.cat([self.vae.decode(part, return_dict=False)[0] for part in scaled.split(at_once)])
