"""FSDP2 (`training.shard`): weights, gradients, optimiser state and average of G and D, split over the processes.

PyTorch's own `fully_shard` and not accelerate's `prepare`, which takes one model at a time and on a CPU silently gives DDP.
Each process saves its own rows of every tensor; joined again, they do not know how many processes wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, device: torch.device, world: int) -> None:
    """Splits the parameters of `module` over all processes, in place: a unit for each residual and attention block, and one for the
    rest. To be called before its optimiser is made."""
    mesh = init_device_mesh(device.type, (world,))
    for child in list(module.modules()):
        for name in ("resnets", "attentions", "transformer_blocks", "blocks"):
            for block in getattr(child, name, None) or ():
                # A transformer's own blocks are units; what is around them is small.
                if block is not None and not hasattr(block, "transformer_blocks"):
                    fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is in one process. Every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# The one key of the mapping that stands for a process' rows of a tensor: files may hold no objects of ours.
_ROWS = "rows of this process"


@dataclass(frozen=True)
class Pieces:
    """A tensor whose rows lie in several files; they are read when the whole is asked for."""

    rows: Sequence[Tensor]

    def whole(self) -> Tensor:
        return torch.cat(list(self.rows))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A state dict or any part of one, each of its leaves changed."""
    if isinstance(value, Mapping):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return change(value)


def own_rows(value: Any, rest: bool) -> Any:
    """`value`, a state dict or any part of one, as this process saves it: its own rows of what is split, and of all else everything if
    `rest`, else None. Where nothing is split, everything."""
    return _mapped(value, lambda leaf: {_ROWS: leaf.to_local()} if isinstance(leaf, DTensor) else leaf if rest else None)


def joined(values: Sequence[Any]) -> Any:
    """What `own_rows` made in each process, in their order: the first one's, with `Pieces` for what was split."""
    first = values[0]
    if isinstance(first, Mapping):
        if set(first) == {_ROWS}:
            return Pieces([v[_ROWS] for v in values])
        return {k: joined([v[k] for v in values]) for k in first}
    if isinstance(first, list | tuple):
        return type(first)(joined(each) for each in zip(*values, strict=True))
    return first


def with_whole_tensors(value: Any) -> Any:
    """`value` with what was split put together."""
    return _mapped(value, lambda leaf: leaf.whole() if isinstance(leaf, Pieces) else leaf)


def _like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor or its pieces, split and laid out in memory as `parameter` is; anything else as it is."""
    if isinstance(value, Pieces):
        value = value.whole()
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # A fused optimiser goes through parameter and moments in the order of memory, whatever their strides say.
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    # Every process has read the whole: nobody has to send it.
    value = value.to(parameter.device).contiguous()
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def split_like(state: Mapping[str, Any], current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, split as those of the same names in `current` are."""
    return {name: _like(value, current[name]) if name in current else value for name, value in state.items()}


def split_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state of a checkpoint, split and laid out as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: _like(v, parameters[i]) for k, v in of_one.items()} for i, of_one in state["state"].items()}
    return state | {"state": moments}
