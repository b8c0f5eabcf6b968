"""Small real models shared by the tests: the same diffusers and transformers classes that SD 1.5 uses, with random weights."""

from __future__ import annotations

import os

# Before torch starts: one thread makes every result reproducible, and leaves the other core to the process tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may reach for the network; the processes that tests start inherit this.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion2gan.export import export_student
from diffusion2gan.pairs.simulate import PairsConfig, simulate
from diffusion2gan.perceptual import LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.teachers.protocol import Teacher, TeacherConfig
from diffusion2gan.teachers.stable_diffusion import StableDiffusionTeacher
from tests.no_network import forbid

torch.set_num_threads(1)
forbid()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONG = (
    "test_crashes.py", "test_benchmarks.py", "training/test_trainer.py", "training/test_adversarial.py", "test_cli.py", "training/test_sharding.py",
    "embedded/test_models.py", "test_families.py", "perceptual/test_commands.py", "test_pipeline.py", "test_examples.py", "test_demo.py",
)  # fmt: skip
"""Files that take minutes, the longest first: begun last, one of them would keep one process busy while the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {here / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def _tiny_tokenizer(letters: str = LETTERS, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {c: 2 + i for i, c in enumerate(letters)}
    vocabulary |= {c + "</w>": 28 + i for i, c in enumerate(letters)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8, pad_token=pad)


def tiny_second_tokenizer() -> CLIPTokenizer:
    """Another vocabulary and, as SDXL's second one, another token to pad with."""
    return _tiny_tokenizer(LETTERS[::-1], pad="z</w>")


def _tiny_text_config(layers: int = 1, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=projection,
    )  # fmt: skip


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, mid_block_add_attention=False, scaling_factor=0.7,
    )  # fmt: skip


def _tiny_scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """SDXL's plan: three resolutions, deeper attention below, pooled text and time ids."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 32), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 3),
        cross_attention_dim=32, attention_head_dim=(2, 4, 8), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
    )  # fmt: skip


def tiny_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """A whole `StableDiffusionXLPipeline`: two text encoders, three resolutions, 8 x 8 x 4 latents."""
    torch.manual_seed(seed)
    text, text_2 = CLIPTextModel(_tiny_text_config(2)), CLIPTextModelWithProjection(_tiny_text_config(3, projection=12))
    return StableDiffusionXLPipeline(
        vae=_tiny_vae(), text_encoder=text, text_encoder_2=text_2, tokenizer=_tiny_tokenizer(), tokenizer_2=tiny_second_tokenizer(),
        unet=tiny_sdxl_unet(), scheduler=_tiny_scheduler("epsilon"), add_watermarker=False,
    )  # fmt: skip


def tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A whole `StableDiffusionPipeline` of 60 thousand parameters: 8 x 8 x 4 latents, 16 x 16 pixels."""
    torch.manual_seed(seed)
    tokenizer, text_encoder = _tiny_tokenizer(), CLIPTextModel(_tiny_text_config())
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=_tiny_vae(), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=_tiny_scheduler(prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_pixel_unet(classes: int | None = None, seed: int = 0, **changes: Any) -> UNet2DModel:
    """A diffusion model of 8 x 8 pixels, two resolutions."""
    torch.manual_seed(seed)
    return UNet2DModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": classes,
        } | changes
    )  # fmt: skip


def tiny_pixel_pipeline(edm: bool = False, sigma_data: float = 0.5, clip: bool = False) -> DDPMPipeline:
    """Its pipeline: with DDPM's schedule, or with EDM's preconditioning."""
    return DDPMPipeline(tiny_pixel_unet(), EDMEulerScheduler(sigma_data=sigma_data) if edm else DDPMScheduler(clip_sample=clip))


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the life of a process; a test must not inherit another's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_store(folder: Path, prompts: Path, teacher: Teacher | None = None, **changes: Any) -> Path:
    """A finished store of 24 pairs of the tiny teacher, or of another, in shards of 8."""
    config = {"count": 24, "prompts": {"source": str(prompts)}, "ode": {"steps": 4, "guidance": 2.0}, "batch_size": 8, "shard_size": 8}
    teacher = teacher or StableDiffusionTeacher.from_pipeline(tiny_pipeline())
    simulate(teacher, PairsConfig.model_validate(config | changes), folder, progress=False)
    return folder


@pytest.fixture
def tiny_teacher() -> StableDiffusionTeacher:
    return StableDiffusionTeacher.from_pipeline(tiny_pipeline())


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{a} {b}\n" for a in ("red", "blue", "green") for b in ("heart", "cat", "sun")))
    return path


@pytest.fixture
def tiny_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DIFFUSION2GAN_EMBEDDED with a teacher, a latent VGG and a shipped student."""
    root = tmp_path / "embedded"
    tiny_pipeline().save_pretrained(root / "teacher")
    torch.manual_seed(0)
    LatentLPIPS(LatentVGG(LatentVGGConfig(in_channels=4, width=0.125))).save_pretrained(root / "latent_vgg")
    teacher = StableDiffusionTeacher.from_pretrained(TeacherConfig(source="embedded"), root / "teacher")
    weights = {f"network.{k}": v + 0.01 * torch.randn_like(v) for k, v in tiny_pipeline().unet.state_dict().items()}
    facts = {
        "recipe": "emoji", "pairs": 1, "steps": 1, "batch_size": 1, "distance": "mse",
        "ode": {"solver": "ddim", "steps": 2, "spacing": "leading", "guidance": 2.0}, "precision": "bfloat16", "teacher_weights": teacher.identity()["weights"],
    }  # fmt: skip
    export_student(tiny_pipeline(), weights, 999, tmp_path / "whole", facts, torch.float16)
    shutil.copytree(tmp_path / "whole", root / "student", ignore=shutil.ignore_patterns("vae", "text_encoder", "tokenizer"))
    monkeypatch.setenv("DIFFUSION2GAN_EMBEDDED", str(root))
    monkeypatch.setenv("DIFFUSION2GAN_CACHE", str(tmp_path / "cache"))
    return root
