"""Speed: latency of a model, throughput of a training, cost of a loss. Every number carries the machine it was taken on."""

from __future__ import annotations

import gc
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from diffusion2gan.device import default_device
from diffusion2gan.errors import UserError
from diffusion2gan.evaluation.models import Model
from diffusion2gan.perceptual import DecodedLPIPS, LatentLPIPS, LatentVGG
from diffusion2gan.perceptual.latent_vgg import LatentVGGConfig
from diffusion2gan.training.batches import BatchShare

if TYPE_CHECKING:
    from diffusion2gan.recipe import Recipe
    from diffusion2gan.teachers.load import LoadedTeacher

PROMPTS = (
    "a red heart", "a smiling face", "a small house by a lake", "two cats on a sofa", "a bowl of fruit", "a city at night",
    "a man riding a bicycle", "a green train in the snow",
)  # fmt: skip


def device_name(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device, tf32: bool = False) -> dict[str, Any]:
    """What a time depends on besides the model. tf32: what was timed may use it; models and trainings don't."""
    facts: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "tf32_convolutions": tf32 and torch.backends.cudnn.allow_tf32}
    return facts


# --- Latency --------------------------------------------------------------------------------------------------------
class _Clock:
    """Moments on the device's own time line, read after the run: no wait in between."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self._cuda else end - start)


class _Stopwatch:
    """Notes when the first text encoder begins, when each evaluation of the network begins and ends, when the decoder ends."""

    def __init__(self, model: Model, clock: _Clock):
        self._clock = clock
        # A model of pixels is its network: there it begins and ends.
        network = model.modules["network"]
        text, decoder = (model.modules.get(k, network) for k in ("text", "decoder"))
        self._handles = [
            text.register_forward_pre_hook(lambda *_: self._begin()),
            network.register_forward_pre_hook(lambda *_: self.evaluations.append([clock.now()])),
            network.register_forward_hook(lambda *_: self.evaluations[-1].append(clock.now())),
            decoder.register_forward_hook(lambda *_: self._end()),
        ]
        self.reset()

    def reset(self) -> None:
        self.begin: Any = None
        self.end: Any = None
        self.evaluations: list[list[Any]] = []

    def _begin(self) -> None:
        self.begin = self._clock.now() if self.begin is None else self.begin

    def _end(self) -> None:
        self.end = self._clock.now()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def latency(model: Model, batch: int = 1, warmup: int = 10, runs: int = 50, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Seconds of one run of `model` at `batch`, another prompt each time: medians with the tenth and ninetieth percentile.

    `t_e2e`: the first text encoder's begin to the decoder's end, on the device. `t_network`: the network's evaluations alone.
    `t_e2e_host`: strings in, uint8 pictures out, tokens, noise and copies included. Loading and the first `warmup` runs are left
    out. Raises UserError for a folder of pictures, or fewer than one run.
    """
    if not model.modules:
        raise UserError(f"{model.name}: only pictures, expected a model to time")
    if runs < 1 or warmup < 0 or batch < 1:
        raise UserError(f"latency of {runs} runs after {warmup}, batch {batch}; expected at least 1 run, 0 before, batch 1")
    device = next(model.modules["network"].parameters()).device
    clock, found = _Clock(device), []
    watch = _Stopwatch(model, clock)
    try:
        for i in range(warmup + runs):
            watch.reset()
            texts, seeds = [prompts[(i + k) % len(prompts)] for k in range(batch)], list(range(i * batch, (i + 1) * batch))
            synchronise(device)
            started = time.perf_counter()
            model.draw(texts, seeds)
            synchronise(device)
            host = time.perf_counter() - started
            network = sum(clock.seconds(a, b) for a, b in watch.evaluations)
            if i >= warmup:
                found.append((clock.seconds(watch.begin, watch.end), network, host, len(watch.evaluations)))
    finally:
        watch.close()
    columns = np.array(found)
    result: dict[str, Any] = {"batch": batch, "runs": runs, "warmup": warmup, "evaluations": int(columns[0, 3])}
    for name, values in zip(("t_e2e", "t_network", "t_e2e_host"), columns.T[:3], strict=True):
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        result |= {name: float(middle), f"{name}_p10": float(low), f"{name}_p90": float(high)}
    result["images_per_second"] = batch / result["t_e2e_host"]
    decoder = model.modules.get("decoder")
    precision = {} if decoder is None else {"decoder_dtype": str(next(decoder.parameters()).dtype).removeprefix("torch.")}
    return result | precision | {"model": {"name": model.name, **model.identity}, "machine": machine(device)}


def latency_line(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """`fixed` + `per_step` x steps, least squares through (steps, seconds). Raises UserError for fewer than two step counts."""
    if len({steps for steps, _ in points}) < 2:
        raise UserError(f"a line through {len(points)} points, expected two step counts or more; give --steps several")
    per_step, fixed = np.polyfit([steps for steps, _ in points], [seconds for _, seconds in points], 1)
    return {"fixed": float(fixed), "per_step": float(per_step)}


# --- Cost of a loss -------------------------------------------------------------------------------------------------
class PeakMemory:
    """MB that are allocated at the peak between `start` and `stop`, beyond what was there."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before = 0
        self._profiler: Any = None

    def start(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()

    def stop(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - self._before) / 2**20
        self._profiler.__exit__(None, None, None)
        events = [e for e in self._profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        current = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            current += event.nbytes()
            peak = max(peak, current)
        return peak / 2**20


def extra_memory(act: Callable[[], Any], device: torch.device) -> float:
    """MB that a call allocates at its peak, beyond what was there."""
    memory = PeakMemory(device)
    memory.start()
    act()
    return memory.stop()


def decoded_lpips(teacher: LoadedTeacher) -> tuple[DecodedLPIPS, list[nn.Module]]:
    """LPIPS of Eq. 2 through a teacher's decoder, and the modules whose weights it needs. VGG16 has random weights: time and memory do
    not depend on them. Raises UserError for a teacher without a decoder."""
    if teacher.vae is None:
        raise UserError(f"a {teacher.family} teacher decodes nothing; name one of latents")
    vgg = LatentVGG(LatentVGGConfig.pixels())
    distance = DecodedLPIPS(teacher.decode, LatentLPIPS(vgg).to(teacher.device).to(memory_format=torch.channels_last))
    return distance, [distance, teacher.vae.decoder, teacher.vae.post_quant_conv]


def loss_cost(
    distance: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    precision: str = "float32",
    batch: int = 1,
    warmup: int = 5,
    runs: int = 20,
    modules: Sequence[nn.Module] | None = None,
) -> dict[str, Any]:
    """Forward and backward of `distance` to its first input, (batch, *shape) latents: median ms, `extra_activation_mb` beyond
    what is resident, and `weight_mb` of `modules` (default: of a distance that is one). `precision` other than float32 is autocast."""
    random = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(batch, *shape, generator=random).to(device) for _ in range(2))
    x0.requires_grad_()

    def step() -> None:
        x0.grad = None
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            value = distance(x0, x1)
        value.float().sum().backward()

    for _ in range(warmup):
        step()
    times = []
    for _ in range(runs):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - started)
    if modules is None:
        modules = [distance] if isinstance(distance, nn.Module) else []
    weights = sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / 2**20
    return {
        "shape": list(shape), "batch": batch, "precision": precision, "ms": 1000 * statistics.median(times),
        "extra_activation_mb": extra_memory(step, device), "weight_mb": weights, "machine": machine(device, tf32=True),
    }  # fmt: skip


# --- Throughput of a training ---------------------------------------------------------------------------------------
class _EnoughError(Exception):
    """Leaves a training without its last checkpoint, which would take longer than what was measured."""


def train_throughput(recipe: Recipe, store: Path, warmup: int = 50, steps: int = 200) -> dict[str, Any]:
    """Samples a second of phase 1 of a recipe on a pair store, all processes together: loading, text, forward, backward, exchange,
    optimiser and average included; checkpoints, validation and sample grids not. `step_memory_mb` is what one more step allocates at
    its peak beyond weights, gradients and optimiser. Nothing of the run is kept.
    Raises UserError for fewer than one step, and all that `train` refuses."""
    from diffusion2gan.run import train_recipe

    if steps < 1 or warmup < 0:
        raise UserError(f"throughput of {steps} steps after {warmup}, expected at least 1 after 0 or more")
    never = warmup + steps + 3
    quiet = {"steps": never, "decay_steps": 0, "checkpoint_every": never, "validate_every": never, "sample_every": never}
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=quiet), "adversarial": None})
    times: list[float] = []
    memory = PeakMemory(torch.device(default_device()))
    found: dict[str, float] = {}

    def enough() -> bool:
        # Asked in every step once its backward is done: between two answers lies one whole step, and gradients are there at each.
        times.append(time.perf_counter())
        done = len(times) - 1 - warmup
        if torch.cuda.is_available() and done == 0:
            torch.cuda.reset_peak_memory_stats()
        if torch.cuda.is_available() and done == steps:
            found["max_memory_allocated_mb"] = torch.cuda.max_memory_allocated() / 2**20
            found["max_memory_reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20
        if done == steps:
            memory.start()  # the time is taken; now one step for its memory
        elif done > steps:
            found["step_memory_mb"] = memory.stop()
            raise _EnoughError  # every process at the same step
        return False

    with tempfile.TemporaryDirectory() as folder, suppress(_EnoughError):
        train_recipe(recipe, store, Path(folder) / "run", deadline=enough)
    seconds = times[warmup + steps] - times[warmup]
    training, state = recipe.training, PartialState()
    share = BatchShare.of(training.batch_size, training.micro_batch_size, state.num_processes, "training.batch_size")
    return {
        "recipe": recipe.name, "distance": recipe.loss.distance, "ensemble": recipe.loss.ensemble, "steps": steps, "warmup": warmup,
        "batch": recipe.training.batch_size, "processes": state.num_processes, "micro_batch": share.micro,
        "mixed_precision": recipe.training.mixed_precision, "compile": recipe.training.compile,
        "images_per_second": recipe.training.batch_size * steps / seconds, "seconds_per_step": seconds / steps,
        **found, "machine": machine(state.device),
    }  # fmt: skip
