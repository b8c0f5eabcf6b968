"""ZeRO (Rajbhandari et al. 2020) by DeepSpeed, for G in phase 1: `training.zero`, `training.zero_offload`.

Stage 1 splits the optimiser's state over the processes, stage 2 also the gradients; either may be kept in the hosts' memory. The
weights stay whole, and so does what is saved: a run goes on with or without it, on any number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.training.clipping import RelativeClip
from diffusion2gan.training.descent import Descent
from diffusion2gan.training.sharding import with_whole_tensors

# Before it, a gradient that is not finite has a finite norm.
_NEEDED = "0.19"


class _InAutocast(nn.Module):
    """The network in the trainer's precision: around DeepSpeed's own forward, autocast is switched off."""

    def __init__(self, network: nn.Module, accelerator: Accelerator):
        super().__init__()
        self.network, self._accelerator = network, accelerator

    def forward(self, *inputs: Any) -> Any:
        with self._accelerator.autocast():
            return self.network(*inputs)


class _Clip(RelativeClip):
    """DeepSpeed measures and cuts what it has split."""

    def __init__(self, factor: float, optimizer: Any):
        super().__init__(factor)
        self._optimizer = optimizer

    def measure(self, parameters: Any) -> float:
        return float(self._optimizer.scaled_global_norm())

    def _cut(self, limit: float) -> None:
        self._optimizer.clip_grad = limit


class ZeroDescent(Descent):
    """Of a network whose optimiser DeepSpeed splits. Raises UserError without DeepSpeed, and outside of torchrun."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float,
        accelerator: Accelerator,
        micro_batch: int,
        stage: int,
        offload: bool,
    ):
        try:
            import deepspeed
            from deepspeed.utils import logger
            from packaging.version import Version
        except ImportError:
            raise UserError(f"training.zero is {stage}, which needs DeepSpeed: pip install --no-build-isolation deepspeed") from None
        if Version(deepspeed.__version__) < Version(_NEEDED):
            raise UserError(f"training.zero is {stage} with DeepSpeed {deepspeed.__version__}, expected {_NEEDED} or later; update it")
        if not torch.distributed.is_initialized():
            raise UserError(
                f"training.zero is {stage} in a single process; start it by `torchrun --nproc-per-node N -m diffusion2gan train`"
            )
        logger.setLevel(logging.WARNING)
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000}
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if offload else {}
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            # Micro-batches are told by `exchanging`.
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Told by `_Clip`; by default it cuts to 1.
            "gradient_clipping": 0.0,
            "steps_per_print": 1 << 60,
        }
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        # Before DeepSpeed puts its own tensors into it.
        self._groups = optimizer.state_dict()["param_groups"]
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=_InAutocast(network, accelerator), optimizer=optimizer, config=config, dist_init_required=False
        )
        self.trained, self.raw_optimizer = self._engine, optimizer
        self.clip = _Clip(clip, self._zero)

    @contextmanager
    def exchanging(self, exchange: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(exchange)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def norm(self) -> float:
        return self.clip.measure(())

    def step(self, rate: float, norm: float) -> None:
        self.clip.apply(norm)
        self._step(rate)

    def _step(self, rate: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()

    def restart(self, betas: tuple[float, float] | None = None) -> None:
        raise AssertionError("phase 2 goes without ZeRO")

    def _own_state(self) -> dict[str, Any]:
        """Of this process' part of the parameters, in one row."""
        return next(iter(self.raw_optimizer.state.values()), {})

    def state(self, rest: bool) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        own, states = self._own_state(), {}
        if own:
            for i, parameter in enumerate(self._parameters):
                # To be asked for by every process, one parameter after the other, and none stays on the GPU.
                whole = {k: safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")}
                if rest:
                    states[i] = {"step": own["step"].cpu().clone(), **{k: v.view(parameter.shape).cpu() for k, v in whole.items()}}
        rate = self._zero.param_groups[0]["lr"]
        return {"state": states, "param_groups": [{**group, "lr": rate} for group in self._groups]}

    def load(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for parameter in self._parameters:
            safe_set_full_fp32_param(parameter, parameter.detach().float())
        if not state["state"]:
            return
        # Its state is there after a first step: one of no gradient at no rate.
        with self.exchanging(True):
            self.backward(torch.stack([p.sum() for p in self._parameters]).sum() * 0)
        self._step(0.0)
        for i, parameter in enumerate(self._parameters):
            for key in ("exp_avg", "exp_avg_sq"):
                # Of a run that was split by FSDP2, in pieces.
                moment = with_whole_tensors(state["state"][i][key])
                safe_set_full_optimizer_state(parameter, moment.to(parameter.device).float(), key)
        for own in self.raw_optimizer.state.values():
            own["step"].copy_(state["state"][0]["step"])
