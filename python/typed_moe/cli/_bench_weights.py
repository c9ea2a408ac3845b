"""Experts drawn on the device, stored in a format, and dequantised for the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._verify_expected import as_read
from typed_moe.cli._weights import Each
from typed_moe.config import Format, Fp8PerTensor, Nvfp4, is_gated
from typed_moe.kernels import MoeKernel
from typed_moe.layer import FusedMoE
from typed_moe.quantization import (
    Quantized,
    calibration_scale,
    dequantize_weight,
    quantize_weight,
)
from typed_moe.routing import BiasRule
from typed_moe.testing._oracle import OracleExperts

_BIAS_STD = 0.02
_EXPERT_BIAS_STD = 0.1
_LARGEST_INPUT = 6.0  # of a million standard normal values, 4.9 on average
_LARGEST_INTERMEDIATE = 24.0  # of products of two of them, activated
ROTATED_BYTES = 100e6
"""Read between two readings of an expert: more than the L2 cache of any card of today."""


@final
@attrs.frozen(kw_only=True, eq=False)
class StoredLayer:
    """One layer's tensors under `FusedMoE`'s names, on the device."""

    shape: LayerShape
    quant: Format
    state: Mapping[str, Tensor]

    @property
    def correction_bias(self) -> Tensor | None:
        """(E,) float32, where the strategy reads one."""
        return self.state.get("e_score_correction_bias")

    @property
    def bytes_per_expert(self) -> float:
        """Of weights, scales and biases."""
        experts = self.shape.num_experts
        return sum(
            tensor.nbytes / experts for name, tensor in self.state.items() if name.startswith("w")
        )

    def oracle(self, *, rounded: bool) -> OracleExperts:
        """The same experts for the float64 oracle, one at a time.

        Args:
            rounded: the second matrix reads the intermediate as the format stores it.
        """
        reads = partial(as_read, quant=self.quant, scale=self.state.get("w2_input_scale"))
        experts = OracleExperts(
            w13=Each(make=partial(self._expert, "w13")),
            w2=Each(make=partial(self._expert, "w2")),
            activation=self.shape.activation.name,
            w13_bias=self.state.get("w13_weight_bias"),
            w2_bias=self.state.get("w2_weight_bias"),
            round_intermediate=reads if rounded else None,
        )
        return attrs.evolve(experts, **attrs.asdict(self.shape.activation))

    def _expert(self, prefix: str, expert: int) -> Tensor:
        scale = self.state.get(f"{prefix}_weight_scale_inv")
        if scale is None:
            scale = self.state.get(f"{prefix}_weight_scale")
        second = self.state.get(f"{prefix}_weight_scale_2")
        stored = Quantized(
            data=self.state[f"{prefix}_weight"][expert],
            scale=None if scale is None else scale[expert],
            global_scale=None if second is None else second[expert],
        )
        return dequantize_weight(stored, self.quant)


def num_layers(stored: StoredLayer) -> int:
    """So many that `ROTATED_BYTES` are read between two readings of one expert, also at T = 1."""
    per_call = stored.bytes_per_expert * stored.shape.top_k
    return 2 + int(ROTATED_BYTES / per_call)


def draw_layer(shape: LayerShape, quant: Format, seed: int, device: torch.device) -> StoredLayer:
    """Normal weights of standard deviation 1 / sqrt(fan in), stored expert by expert.

    Raises:
        ValueError: a width is not in whole groups of the format.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    rows = shape.intermediate_size * (2 if is_gated(shape.activation) else 1)
    state: dict[str, Tensor] = {}
    for prefix, height, width in (
        ("w13", rows, shape.hidden_size),
        ("w2", shape.hidden_size, shape.intermediate_size),
    ):
        parts = [
            quantize_weight((normal(height, width) * width**-0.5).bfloat16(), quant)
            for _ in range(shape.num_experts)
        ]
        state |= _stacked(prefix, parts, quant)
        if shape.has_bias:
            state[f"{prefix}_weight_bias"] = normal(shape.num_experts, height) * _EXPERT_BIAS_STD
    if shape.routing.bias is BiasRule.REQUIRED:
        state["e_score_correction_bias"] = normal(shape.num_experts) * _BIAS_STD
    return StoredLayer(shape=shape, quant=quant, state=state)


def _stacked(prefix: str, parts: list[Quantized], quant: Format) -> dict[str, Tensor]:
    """One tensor per name, and the static scale of the activation where the format has one."""
    state = {f"{prefix}_weight": torch.stack([part.data for part in parts])}
    scales = [part.scale for part in parts if part.scale is not None]
    if scales:
        name = "weight_scale_inv" if quant.name == "fp8_block" else "weight_scale"
        state[f"{prefix}_{name}"] = torch.stack(scales)
    seconds = [part.global_scale for part in parts if part.global_scale is not None]
    if seconds:
        state[f"{prefix}_weight_scale_2"] = torch.stack(seconds)
    if isinstance(quant, Fp8PerTensor | Nvfp4):
        largest = _LARGEST_INPUT if prefix == "w13" else _LARGEST_INTERMEDIATE
        amax = state[f"{prefix}_weight"].new_full((), largest, dtype=torch.float32)
        state[f"{prefix}_input_scale"] = calibration_scale(amax, quant)
    return state


def make_layer(stored: StoredLayer, kernel: MoeKernel | None = None) -> FusedMoE:
    """A layer with a copy of these weights: a kernel may rearrange them.

    Raises:
        ValueError: no kernel, or not this one, serves it.
    """
    shape = stored.shape
    layer = FusedMoE(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        routing=shape.routing,
        quant=stored.quant,
        activation=shape.activation,
        has_bias=shape.has_bias,
        kernel=kernel,
        device=stored.state["w13_weight"].device,
        dtype=torch.bfloat16,
    )
    layer.load_state_dict(stored.state)
    layer.prepare_weights()
    return layer


@final
@attrs.frozen(kw_only=True, eq=False)
class LayerInputs:
    """hidden_states (T, H) bfloat16 and router_logits (T, E) float32, the same for every side."""

    hidden_states: Tensor
    router_logits: Tensor


def draw_inputs(shape: LayerShape, tokens: int, device: torch.device) -> LayerInputs:
    """Standard normal, a seed for each T."""
    generator = torch.Generator(device=device).manual_seed(tokens)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator, device=device)
    logits = torch.randn(tokens, shape.num_experts, generator=generator, device=device)
    return LayerInputs(hidden_states=hidden.bfloat16(), router_logits=logits)
