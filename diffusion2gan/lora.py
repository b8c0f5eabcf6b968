"""LoRA students: low-rank changes to the teacher's frozen weights (Hu et al. 2022), by `peft`.

The layers are those that LCM-LoRA changes: attention, feed-forward, residual convolutions, down- and upsamplers. A run keeps and
averages the changes alone; an export adds them to the weights, or writes them as a LoRA of diffusers' pipelines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion2gan.ema import load_trained
from diffusion2gan.errors import UserError

LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
ADAPTER = "default"


def add_lora(network: Any, rank: int, alpha: int | None = None) -> None:
    """Freezes `network` and gives its LAYERS trainable changes of `rank`, zero at the start, scaled by alpha / rank (default 1).

    Raises UserError without `peft`, and for a network that diffusers cannot change so.
    """
    if not hasattr(network, "add_adapter"):
        raise UserError(f"generator.lora_rank is {rank}: {type(network).__name__} takes no LoRA; leave it out to train the whole network")
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(f"generator.lora_rank is {rank}, which needs the package peft; pip install 'diffusion2gan[lora]'") from None
    network.requires_grad_(False)
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # The same first half of every change, whatever was drawn before: a run can be repeated.
        torch.manual_seed(0)
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(LAYERS)), ADAPTER
        )
    for parameter in network.parameters():
        if parameter.requires_grad:
            # Steps of 1e-5 would round away in the half precision that the frozen weights may have.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _with_changes(network: Any, changes: dict[str, Tensor], rank: int, alpha: int | None) -> None:
    add_lora(network, rank, alpha)
    load_trained(network, {k.removeprefix("network."): v for k, v in changes.items()})


def fused_weights(network: Any, changes: dict[str, Tensor], rank: int, alpha: int | None) -> dict[str, Tensor]:
    """`network`'s weights with the `changes` of a run added, under the generator's names. `network` is changed, and stays so."""
    _with_changes(network, changes, rank, alpha)
    network.fuse_lora()
    network.unload_lora()
    return {f"network.{k}": v for k, v in network.state_dict().items()}


def lora_layers(network: Any, changes: dict[str, Tensor], rank: int, alpha: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) for a pipeline's `save_lora_weights`, as its `unet_lora_layers` and `unet_lora_adapter_metadata`."""
    from peft.utils import get_peft_model_state_dict

    _with_changes(network, changes, rank, alpha)
    # The scale goes into the tensors: a reader that looks at nothing else takes alpha to be the rank.
    scale = (alpha or rank) / rank
    layers = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    scaled = {k: (v * scale if "lora_B" in k else v).contiguous() for k, v in layers.items()}
    return scaled, network.peft_config[ADAPTER].to_dict() | {"lora_alpha": rank}
