"""The embedded teacher's tokenizer, text encoder and U-Net, and their training: an ordinary latent diffusion model.

Epsilon prediction on SD's scaled-linear schedule (Rombach et al.), loss weighted by min(SNR, 5) / SNR (Hang et al. 2023),
10 % empty captions for classifier-free guidance. Pictures are drawn by `draw_training_rows`, so that the teacher
models R of the benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion2gan.device import bf16_autocast, compile_for_one_shape
from diffusion2gan.embedded.emoji import EmojiDataset, EmojiRecord, all_captions, draw_caption
from diffusion2gan.files import write_bytes_atomic
from diffusion2gan.fit import FitConfig, fit
from diffusion2gan.images import to_tensor
from diffusion2gan.teachers.attention import plain_attention_on_cpu

VOCABULARY = 2048
MAX_TOKENS = 24
HIDDEN = 128
CONFIG = FitConfig(
    steps=23_400,
    batch_size=128,
    learning_rate=4e-4,
    warmup_steps=500,
    decay_steps=5_000,
    ema_decay=0.9995,
    checkpoint_every=250,
    log_every=50,
    compile=True,
)
EMPTY_CAPTIONS = 0.1
SNR_CLIP = 5.0


def train_tokenizer(records: list[EmojiRecord], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format (lower case, `</w>` word ends) of VOCABULARY tokens, trained on the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # The text splitting is taken from CLIPTokenizer itself, so that training and use cannot differ.
    blank = CLIPTokenizer()._tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator((c for r in records if r.split == "train" for c in all_captions(r)), trainer)
    state = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / "vocab.json", json.dumps(state["vocab"], ensure_ascii=False).encode())
    write_bytes_atomic(folder / "merges.txt", ("#version: 0.2\n" + "\n".join(merges) + "\n").encode())
    result = CLIPTokenizer(vocab=state["vocab"], merges=[tuple(m.split(" ")) for m in merges], model_max_length=MAX_TOKENS)
    result.save_pretrained(folder)
    return result


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained `CLIPTextModel` of 0.9 M parameters for the small vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=HIDDEN,
        # CLIPTextConfig's defaults are CLIP's own ids, which the small vocabulary does not have.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net: 16 x 16 x 4 latents, channels (32, 64, 128), attention at 8 and 4. Channels-last."""
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return model.to(memory_format=torch.channels_last)


def new_scheduler() -> DDIMScheduler:
    """SD 1.5's schedule and DDIM settings."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenize_captions(tokenizer: CLIPTokenizer, records: list[EmojiRecord]) -> dict[str, Tensor]:
    """Token ids (MAX_TOKENS,) of every caption of `records` and of the empty one."""
    captions = sorted({c for r in records for c in all_captions(r)} | {""})
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return dict(zip(captions, ids, strict=True))


@torch.inference_mode()
def encode_dataset(vae: AutoencoderKL, dataset: EmojiDataset, batch: int = 128) -> Tensor:
    """Scaled latents (mean of the posterior) of every picture: (N, 4, 16, 16) float32."""
    parts = [vae.encode(to_tensor(dataset.images[i : i + batch])).latent_dist.mode() for i in range(0, len(dataset.images), batch)]
    return torch.cat(parts) * vae.config.scaling_factor


class TextToImage(nn.Module):
    """What is trained: text encoder and U-Net as one module, so that one checkpoint and one EMA hold both."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = new_text_encoder(tokenizer)
        self.unet = new_unet()

    def forward(self, latent: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        """Noisy latent (B, C, H, W), timestep (B,), token ids (B, L) -> predicted noise (B, C, H, W)."""
        text = self.text_encoder(token_ids)[0]
        return self.unet(latent, timestep, text, return_dict=False)[0]


def train(dataset: EmojiDataset, vae: AutoencoderKL, folder: Path, config: FitConfig = CONFIG, device: str = "cpu") -> TextToImage:
    """Trains in `folder`, resumably; returns the EMA of text encoder and U-Net."""
    torch.manual_seed(config.seed)
    known = folder / "tokenizer"
    # One that is there belongs to the weights that are there.
    tokenizer = CLIPTokenizer.from_pretrained(known) if known.is_dir() else train_tokenizer(dataset.records, known)
    model = TextToImage(tokenizer).to(device)
    plain_attention_on_cpu(model.unet, model.unet.config.sample_size**2, torch.device(device))
    model.text_encoder.set_attn_implementation("eager")
    latents = encode_dataset(vae, dataset).to(device)
    alphas = new_scheduler().alphas_cumprod.to(device)
    token_ids = tokenize_captions(tokenizer, dataset.records)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=SNR_CLIP) / snr

    def objective(latent: Tensor, noise: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        a = alphas[timestep].view(-1, 1, 1, 1)
        predicted = model(a.sqrt() * latent + (1 - a).sqrt() * noise, timestep, token_ids)
        return (predicted.float() - noise).square().mean(dim=(1, 2, 3))

    compiled = compile_for_one_shape(objective, torch.device(device), "compile") if config.compile else objective

    def loss_of_step(rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        n = config.batch_size
        rows = dataset.draw_training_rows(rng, n)
        captions = [draw_caption(dataset.records[i], u) for i, u in zip(rows, rng.random((n, 3)), strict=True)]
        captions = ["" if u < EMPTY_CAPTIONS else c for c, u in zip(captions, rng.random(n), strict=True)]
        ids = torch.stack([token_ids[c] for c in captions]).to(device)
        # One timestep from each of n equal parts of the schedule: the same distribution, a steadier loss.
        timestep = torch.from_numpy(((np.arange(n) + rng.random(n)) / n * len(alphas)).astype(np.int64)).to(device)
        # Drawn on the CPU whatever the device: the same run everywhere.
        noise = torch.randn(latents[rows].shape, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        with bf16_autocast(device):
            error = compiled(latents[rows].contiguous(memory_format=torch.channels_last), noise, timestep, ids)
        return (error * weights[timestep]).mean(), {"mse": error.detach().mean()}

    state = fit(model, loss_of_step, config, folder)
    model.load_state_dict(state)
    return model.cpu().eval()


def save_pipeline(model: TextToImage, tokenizer: CLIPTokenizer, vae: AutoencoderKL, folder: Path) -> None:
    """Writes an ordinary `StableDiffusionPipeline` folder in fp16 safetensors."""
    # Where it was loaded from is of no use elsewhere.
    vae.register_to_config(_name_or_path="")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
