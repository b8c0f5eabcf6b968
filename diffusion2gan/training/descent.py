"""What turns losses into steps: gradients over micro-batches and processes, their clipping, the optimiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffusion2gan.training.clipping import RelativeClip
from diffusion2gan.training.sharding import own_rows, split_optimizer_state


class Descent(ABC):
    """Of one network, G or D. `trained`: what to call, in the block of `exchanging`. `clip` cuts the gradient."""

    trained: nn.Module
    raw_optimizer: torch.optim.Optimizer
    clip: RelativeClip

    @abstractmethod
    def exchanging(self, exchange: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: whether the processes exchange its gradients, and all before it, or keep them."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, this micro-batch's share of the process' mean."""

    @abstractmethod
    def norm(self) -> float:
        """The gradient's norm, before it is cut; nothing is changed yet. Every process has to call this."""

    @abstractmethod
    def step(self, rate: float, norm: float) -> None:
        """Cuts the gradient that was measured as `norm`, makes a step at learning rate `rate`, and forgets the gradient."""

    @abstractmethod
    def restart(self, betas: tuple[float, float] | None = None) -> None:
        """As before the first step, but for the weights, and for Adam's betas if others are given."""

    @abstractmethod
    def state(self, rest: bool) -> dict[str, Any]:
        """The optimiser's, as this process saves it. rest: what belongs to no process too. Every process has to call this."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """After the weights, what the processes together got from `state`."""


class WholeOrSplit(Descent):
    """Of a network that is whole on every process (DDP), or split over them (FSDP2).

    called: `network` as training calls it, compiled perhaps.
    """

    def __init__(self, network: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer, clip: float, accelerator: Accelerator):
        self._network, self._accelerator, self._clip_factor = network, accelerator, clip
        self.trained: nn.Module = called if isinstance(network, FSDPModule) else accelerator.prepare(called)
        self.raw_optimizer, self._optimizer = optimizer, accelerator.prepare(optimizer)
        self.clip = RelativeClip(clip)

    @contextmanager
    def exchanging(self, exchange: bool) -> Iterator[None]:
        # What is split exchanges them always: kept, they would be whole on every process.
        if exchange or isinstance(self.trained, FSDPModule):
            yield
        else:
            with self._accelerator.no_sync(self.trained):
                yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def norm(self) -> float:
        return self.clip.measure(self._network.parameters())

    def step(self, rate: float, norm: float) -> None:
        self.clip.apply(norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def restart(self, betas: tuple[float, float] | None = None) -> None:
        self.raw_optimizer.state.clear()
        for group in self.raw_optimizer.param_groups if betas else ():
            group["betas"] = betas
        self.clip = RelativeClip(self._clip_factor)

    def state(self, rest: bool) -> dict[str, Any]:
        state: dict[str, Any] = own_rows(self._optimizer.state_dict(), rest)
        return state

    def load(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(split_optimizer_state(state, self.raw_optimizer))
