"""What a recipe will take, before a GPU is rented: network evaluations, FLOPs, GPU-days, disk, memory.

FLOPs and kept activations are counted, not guessed: the recipe's own networks run once on torch's fake tensors, which have shapes
and no numbers (FLOPs = 2 x multiply-adds of convolutions, products and attention). Days follow from the share of a GPU's matrix
rate that is really used, which is an assumption (`utilisation`), and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion2gan.discriminator.multi_scale import DiscriminatorConfig, MultiScaleDiscriminator
from diffusion2gan.errors import UserError
from diffusion2gan.lora import add_lora
from diffusion2gan.perceptual import LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.recipe import Recipe
from diffusion2gan.report import markdown_table
from diffusion2gan.teachers.load import FAMILIES, teacher_folder
from diffusion2gan.teachers.ode import evaluations_per_pair
from diffusion2gan.teachers.protocol import TeacherConfig, TextCondition
from diffusion2gan.teachers.published import PUBLISHED
from diffusion2gan.teachers.stable_diffusion import decoded_at_once
from diffusion2gan.training.batches import BatchShare

TOKENS = 77


@dataclass(frozen=True)
class Gpu:
    """Dense half-precision matrix rate (TFLOP/s) and memory (GiB), of the maker's data sheet."""

    tflops: float
    memory: float


GPUS: Mapping[str, Gpu] = {
    "a100-40gb": Gpu(312, 40),
    "a100": Gpu(312, 80),
    "h100": Gpu(989, 80),
    "h200": Gpu(989, 141),
    "l40s": Gpu(362, 48),
    "a10": Gpu(125, 24),
    "rtx4090": Gpu(165, 24),
    "rtx3090": Gpu(71, 24),
    "v100": Gpu(125, 32),
}


@dataclass(frozen=True)
class Cost:
    """Of one network at a batch of one: FLOPs of a forward pass, parameters, bytes that a forward in 16 bits keeps for backward."""

    flops: float
    parameters: int
    activations: int


def measure(network: nn.Module, call: Callable[[nn.Module], Any]) -> Cost:
    """Counts `call(network)`, on fake tensors."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    # Held until the count is done, so that no storage is counted twice or under another's address.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = call(network)
    del held
    return Cost(_flops(lambda: call(network)), sum(p.numel() for p in network.parameters()), sum(kept.values()))


def _flops(call: Callable[[], Any]) -> float:
    # Fused attention on a CPU is not known to the counter; written out it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return float(counter.get_total_flops())


# --- A recipe's networks, without weights ---------------------------------------------------------------------------
def _network_class(teacher: TeacherConfig) -> Any:
    return FAMILIES[teacher.family].network_class


def _configuration(teacher: TeacherConfig, part: str) -> dict[str, Any]:
    """`unet` or `vae` of the teacher: of its folder, or as published. Raises UserError when neither is known."""
    kind = _network_class(teacher) if part == "unet" else AutoencoderKL
    folder = teacher_folder(teacher)
    if teacher.source in PUBLISHED and not Path(folder).is_dir():
        return dict(getattr(PUBLISHED[teacher.source], part))
    try:
        if Path(folder).is_dir():
            return dict(kind.load_config(str(folder), subfolder=part))
        return dict(kind.load_config(teacher.source, subfolder=part, revision=teacher.revision))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{teacher.source}: its sizes are not known here ({reason}); name a folder, or one of {', '.join(PUBLISHED)}"
        ) from None


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """Tensors without numbers, new ones in half precision: mixed precision keeps most of what it keeps in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
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
    decoder: Cost | None
    """None where latents are pixels."""
    latent: tuple[int, int, int]
    trained: int
    """Parameters of the generator that are trained: all, or a LoRA's."""


def networks(recipe: Recipe) -> Networks:
    """Builds and counts them. Raises UserError for a teacher whose sizes cannot be had."""
    teacher = recipe.teacher
    unet_config = _configuration(teacher, "unet")
    vae_config = _configuration(teacher, "vae") if FAMILIES[teacher.family].has_vae else None
    size = unet_config["sample_size"]
    latent = (unet_config["in_channels"], *((size, size) if isinstance(size, int) else size))
    with _shapes_alone():
        x, condition = torch.empty(1, *latent), _condition(unet_config)
        timestep = torch.empty((), dtype=torch.int64)
        unet = _network_class(teacher).from_config(unet_config)
        if recipe.generator.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        generator = measure(unet, lambda n: _evaluate(x, timestep, condition, n))
        discriminator = None
        if recipe.adversarial is not None and recipe.adversarial.weight and recipe.discriminator.kind == "diffusion":
            network = _network_class(teacher).from_config(unet_config)
            discriminator = _discriminator(recipe.discriminator, network, x, condition)
        perceptual, width = None, 0.25 if recipe.loss.perceptual == "embedded" else 1.0
        if recipe.loss.distance in ("latent_lpips", "e_latent_lpips"):
            perceptual = _perceptual(latent, width=width)
        decoder = None
        if vae_config is not None:
            vae = AutoencoderKL.from_config(vae_config)
            decoder = measure(vae, lambda n: cast(Any, n).decode(x, return_dict=False))
        elif recipe.loss.distance == "lpips":
            perceptual = _perceptual(latent, width=width, kept_poolings=(1, 2, 3, 4, 5))
    trained = generator.parameters if recipe.generator.lora_rank is None else _changes(recipe, unet_config)
    return Networks(generator, discriminator, perceptual, decoder, latent, trained)


def _changes(recipe: Recipe, unet_config: Mapping[str, Any]) -> int:
    """Parameters of the recipe's LoRA."""
    assert recipe.generator.lora_rank is not None
    # Not a fake tensor: peft puts its layers into a network in ways that those do not follow.
    with torch.device("meta"):
        network = _network_class(recipe.teacher).from_config(unet_config)
        add_lora(network, recipe.generator.lora_rank, recipe.generator.lora_alpha)
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _discriminator(config: DiscriminatorConfig, around: nn.Module, x: Tensor, condition: TextCondition) -> Cost:
    # Checkpointing lowers what is kept by as much as the generator's does; it is counted without.
    network = MultiScaleDiscriminator(around, _evaluate, config)
    return measure(network, lambda n: n(x, x, condition))


def _perceptual(latent: tuple[int, int, int], **shape: Any) -> Cost:
    network = LatentVGG(LatentVGGConfig(in_channels=latent[0], **shape)).requires_grad_(False)
    x = torch.empty(1, *latent, requires_grad=True)
    return measure(network, lambda n: n(x))


# --- The plan -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StagePlan:
    """`evaluations` of the diffusion network; `flops` in all; `memory` (bytes) of one GPU, `disk` (bytes)."""

    name: str
    evaluations: int
    flops: float
    memory: float
    disk: float = 0.0

    def gpu_days(self, gpu: Gpu, utilisation: float) -> float:
        return self.flops / (gpu.tflops * 1e12 * utilisation) / 86_400


# Bytes a number of the frozen networks.
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Bytes a parameter: float32 weight and gradient; Adam's two moments; the generator's average.
_TRAINED, _MOMENTS, _AVERAGE = 8, {"adamw": 8, "adamw_8bit": 2}, 4
# Without a backward pass little more than the widest layers is alive at once: about this share of what one would keep.
_ALIVE = 0.1
# A decoder's last layers are its widest, and it decodes in float32: a quarter of what it would keep, twice as wide.
_DECODING = 0.5
EVALUATED = 30_000


def stages(recipe: Recipe, gpus: int, counted: Networks | None = None) -> list[StagePlan]:
    """simulate, phase 1, phase 2 and an evaluation on 30,000 pictures. `counted`: what `networks(recipe)` returned.
    Raises UserError when the batch does not divide."""
    pairs, training = recipe.pairs, recipe.training
    of_phase_1 = BatchShare.of(training.batch_size, training.micro_batch_size, gpus, "training.batch_size")
    of_phase_2 = BatchShare.of(recipe.phase_2_batch_size, training.micro_batch_size, gpus, "adversarial.batch_size")
    n = counted or networks(recipe)
    g, loss = n.generator, _loss_flops(recipe, n)
    again = 1 if recipe.generator.gradient_checkpointing else 0
    whole = recipe.generator.lora_rank is None
    # Forward, backward to the activations and, of a network that is trained whole, to the weights.
    passes = (3 if whole else 2) + again
    elements = n.latent[0] * n.latent[1] * n.latent[2]
    stored = {"none": 2, "float16": 4, "float32": 6}[pairs.noise_storage] * elements + 150  # latent, noise, a caption and a seed

    evaluations = pairs.count * evaluations_per_pair(pairs.ode)
    guided = 2 if pairs.ode.guidance > 1 else 1
    half = 2 if pairs.precision in ("float16", "bfloat16") else 4
    simulate = StagePlan(
        "simulate", evaluations, evaluations * g.flops,
        g.parameters * (half + (4 if half == 2 else 0)) + _ALIVE * pairs.batch_size * guided * g.activations, pairs.count * stored,
    )  # fmt: skip

    images = recipe.samples(training.steps)
    # The teacher's own network stays loaded; a LoRA changes a second frozen one.
    frozen = _BYTES[recipe.teacher.dtype] * g.parameters * (1 if whole else 2)
    # What is trained is copied to every GPU, or split over them.
    parts = gpus if training.shard else 1
    trained = (_TRAINED + _MOMENTS[training.optimizer]) / parts
    if training.zero:
        # Weights; gradients; the optimiser's moments and its own copy of the weights, split or on the host.
        gradients = 4 / gpus if training.zero == 2 else 4
        trained = 4 + gradients + (0 if training.zero_offload else (_MOMENTS[training.optimizer] + 4) / gpus)
    resident = frozen + n.trained * (trained + (0 if training.ema_on_cpu else _AVERAGE / parts))
    kept = (n.perceptual.activations if n.perceptual else 0) + g.activations
    saved = 4 + _MOMENTS[training.optimizer]
    checkpoint = (saved + 4) * n.trained  # weights, moments, average
    phase_1 = StagePlan(
        "phase 1", images, images * (passes * g.flops + loss), resident + of_phase_1.micro * kept, training.keep_checkpoints * checkpoint
    )
    plan = [simulate, phase_1]
    if recipe.adversarial is not None:
        images = recipe.samples(recipe.total_steps) - images
        per_image = passes * g.flops + loss
        memory, disk = resident + of_phase_2.micro * kept, float(training.keep_checkpoints * checkpoint)
        if n.discriminator is not None:
            d = n.discriminator
            # D's step: real and fake, forward and backward; G's step: forward, and backward to the latent alone.
            # What is split cannot leave D's gradients out in G's step.
            per_image += g.flops + 2 * (3 + again) * d.flops + ((3 if training.shard else 2) + again) * d.flops
            memory += d.parameters * trained + of_phase_2.micro * d.activations
            disk += training.keep_checkpoints * saved * d.parameters
        plan.append(StagePlan("phase 2", images, images * per_image, memory, disk))
    plan.append(
        StagePlan(
            f"{EVALUATED:,} pictures",
            EVALUATED,
            EVALUATED * (g.flops + (n.decoder.flops if n.decoder else 0)),
            4 * g.parameters + _DECODING * decoded_at_once(*n.latent[1:]) * (n.decoder.activations if n.decoder else 0),
        )
    )
    return plan


def _loss_flops(recipe: Recipe, n: Networks) -> float:
    """Of one image: two forwards and a backward to the input, through the latent network or through decoder and pixels."""
    if n.perceptual is not None:
        return 3 * n.perceptual.flops
    # Decoding both, and back through one; the pixel network is a sixteenth of that.
    return 3 * n.decoder.flops * 17 / 16 if recipe.loss.distance == "lpips" and n.decoder else 0.0


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
        days = s.gpu_days(gpu, utilisation)
        fits = "" if s.memory <= 0.9 * gpu.memory * 2**30 else " (does not fit)"
        rows.append(
            [
                s.name,
                f"{s.evaluations:,}",
                f"{s.flops / 1e18:.4g}",
                days,
                24 * days / count,
                f"{s.memory / 2**30:.3g}{fits}",
                f"{s.disk / 1e9:.4g}",
            ]
        )
    total = sum(s.gpu_days(gpu, utilisation) for s in found)
    columns = ["stage", "evaluations", "EFLOP", "GPU-days", f"hours on {count}", "memory a GPU, GiB", "disk, GB"]
    return (
        f"{recipe.name} on {count} x {gpu_name}: network {n.generator.parameters / 1e6:,.0f} M parameters, "
        f"{n.generator.flops / 1e12:.3g} TFLOP an evaluation\n\n"
        + markdown_table(columns, rows)
        + f"\n{total:.3g} GPU-days in all, if {utilisation:.0%} of the {gpu.tflops:g} TFLOP/s of half-precision matrix units is used: an "
        "assumption; FLOPs are counted, memory is weights, optimiser and kept activations, without the allocator's own.\n"
    )
