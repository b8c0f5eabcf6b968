"""Reads and feeds named places of a diffusers U-Net, whose own forward runs unchanged (Figure 5).

fed    beside the input convolution; at the entrance of every encoder block below the first resolution
read   in every decoder block: the skip feature, the feature that comes from below, the feature after they were joined

Works for `UNet2DConditionModel` of any depth (four resolutions in SD 1.5, three in SDXL) and `UNet2DModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from diffusion2gan.errors import UserError

READOUTS = ("skip", "below", "joined")


class UNetTaps:
    """Hooks on `network`, for as long as it lives. Outside `run` they change nothing and keep nothing.

    Raises UserError for a network without a U-Net's encoder, middle and decoder blocks.
    """

    def __init__(self, network: Any):
        missing = [n for n in ("conv_in", "down_blocks", "mid_block", "up_blocks") if getattr(network, n, None) is None]
        if missing:
            raise UserError(
                f"discriminator: {type(network).__name__} has no {', '.join(missing)}, expected a U-Net such as UNet2DConditionModel"
            )
        self.network = network
        self._at_input: Tensor | None = None
        self._at_encoder: Callable[[int, Tensor], Tensor] | None = None
        self._read: dict[tuple[int, str], Tensor] | None = None
        network.conv_in.register_forward_hook(self._feed_input)
        for i, block in enumerate(network.down_blocks):
            if i:
                block.register_forward_pre_hook(partial(self._feed_encoder, i), with_kwargs=True)
        for i, block in enumerate(network.up_blocks):
            block.register_forward_pre_hook(partial(self._read_entrance, i), with_kwargs=True)
            # Before the upsampler, which only makes the next resolution of it.
            if getattr(block, "upsamplers", None):
                block.upsamplers[0].register_forward_pre_hook(partial(self._read_upsampler, i))
            else:
                block.register_forward_hook(partial(self._read_exit, i))

    # --- Widths -----------------------------------------------------------------------------------------------------

    def input_channels(self) -> int:
        """Channels behind the input convolution."""
        return self.network.conv_in.out_channels

    def encoder_channels(self) -> list[int]:
        """Channels at the entrance of every encoder block after the first."""
        return [block.resnets[0].in_channels for block in self.network.down_blocks][1:]

    def decoder_channels(self) -> list[dict[str, int]]:
        """Channels of every decoder block's READOUTS, from the lowest resolution up."""
        below, rows = self.network.mid_block.resnets[-1].out_channels, []
        for block in self.network.up_blocks:
            joined = block.resnets[-1].out_channels
            rows.append({"skip": block.resnets[0].in_channels - below, "below": below, "joined": joined})
            below = joined
        return rows

    # --- One evaluation ---------------------------------------------------------------------------------------------

    def run(
        self, evaluate: Callable[[], Any], at_input: Tensor | None = None, at_encoder: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """Calls `evaluate`, which evaluates the network once, and returns every decoder block's READOUTS (B, C, h, w).

        at_input: added behind the input convolution. at_encoder(i, hidden) -> what encoder block i >= 1 receives for hidden.
        """
        self._at_input, self._at_encoder, self._read = at_input, at_encoder, {}
        try:
            evaluate()
            read = self._read
        finally:
            self._at_input = self._at_encoder = self._read = None
        return [{name: read[i, name] for name in READOUTS} for i in range(len(self.network.up_blocks))]

    def _feed_input(self, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output if self._at_input is None else output + self._at_input

    def _feed_encoder(
        self, block: int, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._at_encoder is None:
            return arguments, named
        if arguments:
            return (self._at_encoder(block, arguments[0]), *arguments[1:]), named
        return arguments, named | {"hidden_states": self._at_encoder(block, named["hidden_states"])}

    def _read_entrance(self, block: int, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._read is not None:
            # By position in `UNet2DModel`, by name in `UNet2DConditionModel`.
            below, residuals = arguments[:2] if arguments else (named["hidden_states"], named["res_hidden_states_tuple"])
            self._read[block, "below"] = below
            # The block's first resnet joins the last of its residuals.
            self._read[block, "skip"] = residuals[-1]

    def _read_upsampler(self, block: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._read is not None:
            self._read[block, "joined"] = arguments[0]

    def _read_exit(self, block: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
        if self._read is not None:
            # The blocks with a skip path in pixels return both.
            self._read[block, "joined"] = output[0] if isinstance(output, tuple) else output
