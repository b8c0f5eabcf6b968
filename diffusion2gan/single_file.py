"""Weights of a diffusers pipeline under the names of the original Stable Diffusion checkpoints, which user interfaces load.

    U-Net           model.diffusion_model.          input_blocks, middle_block, output_blocks
    autoencoder     first_stage_model.              encoder.down, decoder.up, mid
    text            cond_stage_model.               SD 1.x: transformer.text_model (CLIP's names); SD 2.x: model (OpenCLIP's)
                    conditioner.embedders.{0,1}.    SDXL: the first as SD 1.x, the second as SD 2.x

Nothing is computed: tensors are renamed, OpenCLIP's query, key and value are put together, and the autoencoder's attention gets the
1 x 1 kernels that its original had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _unet_prefixes(down_layers: list[int], up_layers: list[int], up_attention: list[bool]) -> dict[str, str]:
    """diffusers' module path -> the original's. `down_layers`, `up_layers`: resnets of each block."""
    names, n = dict(_UNET_ENDS), 1
    for block, layers in enumerate(down_layers):
        for layer in range(layers):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{n}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{n}.1"
            n += 1
        if block + 1 < len(down_layers):
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for block, layers in enumerate(up_layers):
        for layer in range(layers):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{n}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{n}.1"
            n += 1
        # The upsampler closes the last layer's group: behind its attention, where there is one.
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{2 if up_attention[block] else 1}.conv"
    return names


def _longest_prefix(key: str, names: Mapping[str, str]) -> tuple[str, str]:
    """(the original's name of the longest module path that `key` begins with, the rest of the key)."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:length])
        if path in names:
            return names[path], ".".join(parts[length:])
    raise UserError(f"single file: the original layout has no place for {key}; export a folder instead")


def original_unet(network: Any) -> dict[str, Tensor]:
    """The U-Net's weights, without prefix. Raises UserError for a network that is none of Stable Diffusion's."""
    down, up = network.down_blocks, network.up_blocks
    names = _unet_prefixes([len(b.resnets) for b in down], [len(b.resnets) for b in up], [hasattr(b, "attentions") for b in up])
    weights = {}
    for key, value in network.state_dict().items():
        prefix, rest = _longest_prefix(key, names)
        if ".resnets." in key:
            inner, _, last = rest.rpartition(".")
            rest = f"{_RESNET[inner]}.{last}"
        weights[f"{prefix}.{rest}"] = value
    return weights


def original_vae(vae: Any) -> dict[str, Tensor]:
    """The autoencoder's weights, without prefix."""
    ups = len(vae.decoder.up_blocks)
    weights = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{ups - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            head, _, rest = name.partition("mid_block.attentions.0.")
            inner, _, last = rest.rpartition(".")
            name = f"{head}mid.attn_1.{_VAE_ATTENTION[inner]}.{last}"
            if last == "weight" and inner != "group_norm":
                value = value[:, :, None, None]
        weights[name] = value
    return weights


def _clip_weights(encoder: Any) -> dict[str, Tensor]:
    """CLIP's text weights without `text_model.`, which versions of transformers have or have not."""
    return {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items() if not k.endswith("position_ids")}


def original_clip(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under CLIP's own names: `transformer.text_model...`."""
    return {f"transformer.text_model.{k}": v for k, v in _clip_weights(encoder).items()}


def original_open_clip(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under OpenCLIP's names: `model.transformer.resblocks...`."""
    source, weights = _clip_weights(encoder), {}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for key, value in source.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in ends:
            weights[ends[key]] = value
        elif key == "text_projection.weight":
            weights["text_projection"] = value.T.contiguous()
        elif layer is None:
            raise UserError(f"single file: the original layout has no place for the text encoder's {key}; export a folder instead")
        elif layer[2] == "self_attn.q_proj":
            three = [source[f"encoder.layers.{layer[1]}.self_attn.{n}_proj.{layer[3]}"] for n in "qkv"]
            weights[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(three)
        elif layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            weights[f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP[layer[2]]}.{layer[3]}"] = value
    return {f"model.{k}": v for k, v in weights.items()}


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, as one original checkpoint names them.

    Raises UserError for another pipeline.
    """
    text = getattr(pipeline, "text_encoder", None)
    if text is None or getattr(pipeline, "vae", None) is None:
        raise UserError(f"single file: {type(pipeline).__name__} has no original layout, expected Stable Diffusion 1.x, 2.x or XL")
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        encoders = {"conditioner.embedders.0.": original_clip(text), "conditioner.embedders.1.": original_open_clip(second)}
    elif text.config.hidden_size == 1024:
        # SD 2.x was trained on OpenCLIP's encoder.
        encoders = {"cond_stage_model.": original_open_clip(text)}
    else:
        encoders = {"cond_stage_model.": original_clip(text)}
    parts = {"model.diffusion_model.": original_unet(pipeline.unet), "first_stage_model.": original_vae(pipeline.vae)} | encoders
    # How UIs know an SDXL network that predicts v.
    schedule = dict(pipeline.scheduler.config)
    if second is not None and schedule.get("prediction_type") == "v_prediction":
        marks = ["v_pred", *(["ztsnr"] if schedule.get("rescale_betas_zero_snr") else [])]
        parts[""] = {mark: torch.zeros(0) for mark in marks}
    return {prefix + key: value.detach().cpu().contiguous() for prefix, part in parts.items() for key, value in part.items()}
