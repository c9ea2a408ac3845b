"""`typed-moe run`: one MoE layer of a model, loaded, run and compared with the oracle."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.checkpoint import open_checkpoint
from typed_moe.cli._compare import Comparison, compare, selected
from typed_moe.cli._errors import UserError, user_errors
from typed_moe.cli._memory import check_memory
from typed_moe.cli._model import Model, Widths, read_format, read_model, read_spec, widths
from typed_moe.cli._progress import Step, Steps
from typed_moe.cli._stored import StoredWeights
from typed_moe.cli._weights import (
    DrawnWeights,
    Weights,
    draw_tokens,
    needs_calibration,
    router_logits,
)
from typed_moe.config import Format, Unquantized
from typed_moe.layer import FusedMoE
from typed_moe.models import CheckpointLayout, MoeSpec, SharedCombination
from typed_moe.runners import Plan

_CALIBRATION_TOKENS = 128
_CALLS = 3  # timed, as long as they fit into:
_CALLS_SECONDS = 3.0
_MAX_SEED = 2**32 - 1


@final
@attrs.frozen(kw_only=True)
class RunOptions:
    """What the user asked for, not checked yet."""

    model: str
    quant: str
    tokens: int
    layer_scale: float
    layer: int | None
    checkpoint: Path | None
    seed: int
    fused_shared: bool

    def check(self) -> None:
        """Refuse numbers out of range. Raises: UserError."""
        if self.tokens < 0:
            raise UserError(f"--tokens is {self.tokens}; allowed: 0 or more")
        if not 0.0 < self.layer_scale <= 1.0:
            raise UserError(
                f"--layer-scale is {self.layer_scale}; allowed: above 0, up to 1 (1 is the "
                "model's own widths)"
            )
        if not 0 <= self.seed <= _MAX_SEED:
            raise UserError(f"--seed is {self.seed}; allowed: 0 to {_MAX_SEED}")
        if self.checkpoint is not None and self.layer_scale != 1.0:
            raise UserError(
                f"--layer-scale is {self.layer_scale} and --checkpoint names a folder, whose "
                "weights have the model's own widths; leave out one of the two"
            )


@final
@attrs.frozen(kw_only=True)
class RunReport:
    """Everything that `run` prints.

    Attributes:
        model: the config.
        spec: the layer.
        widths: the widths it ran at.
        layer_scale: that they were scaled by.
        weights: where the weights are from, in words.
        plan: of the layer.
        comparison: with the oracle.
        slots: per routed expert, the tokens that chose it.
        notes: what a reader has to know besides, one sentence each.
        seconds: wall time by step.
        run_seconds: median wall time of one forward call.
        calls: how many were timed.
        peak_bytes: the process's largest resident size.
    """

    model: Model
    spec: MoeSpec
    widths: Widths
    layer_scale: float
    weights: str
    plan: Plan
    comparison: Comparison
    slots: tuple[int, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    run_seconds: float
    calls: int
    peak_bytes: int


@torch.no_grad()
def run(options: RunOptions, steps: Steps) -> RunReport:
    """Do what `typed-moe run` says.

    Raises:
        UserError: a mistake in the options, the config or the checkpoint.
    """
    options.check()
    model, quant = read_model(options.model), read_format(options.quant)
    spec = read_spec(model, options.layer)
    size = widths(spec, options.layer_scale)
    shared, notes = _shared(options, spec)
    weights = _weights(options, spec, size, shared)
    blame = user_errors if options.checkpoint is not None else nullcontext
    with blame():
        gate, bias = weights.gate(), weights.correction_bias()
    with user_errors(f"{model.name} in {quant.name}: "):
        bare = _layer(spec, size, quant, shared, "meta")
    check_memory(model.name, _nbytes(bare) + weights.held_bytes, options.layer_scale)
    with steps.step("allocate"):
        layer = _layer(spec, size, quant, shared, "cpu")
    with blame():
        _load(layer, weights, bias, steps)
    inputs = _Inputs(spec=spec, widths=size, gate=gate, seed=options.seed, layer=layer)
    if needs_calibration(layer):
        with steps.step("calibrate"):
            layer.calibrate(*inputs.draw(_CALIBRATION_TOKENS, calibration=True))
        notes.append(
            f"the static activation scales are from {_CALIBRATION_TOKENS} other drawn tokens"
        )
    with blame(), steps.step("check"):
        layer.validate_weights()
    hidden_states, logits = inputs.draw(options.tokens)
    output, calls = _timed(layer, hidden_states, logits, steps)
    with steps.step("compare with float64"):
        comparison = compare(layer, output, hidden_states, logits, weights.for_oracle())
    return RunReport(
        model=model,
        spec=spec,
        widths=size,
        layer_scale=options.layer_scale,
        weights=weights.origin,
        plan=layer.plan,
        comparison=comparison,
        slots=_slots(layer, logits),
        notes=tuple(notes),
        seconds=steps.seconds,
        run_seconds=statistics.median(calls),
        calls=len(calls),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


@final
@attrs.frozen(kw_only=True, eq=False)
class _Inputs:
    """What a layer's calls are fed: drawn tokens, and the logits that the gate makes of them."""

    spec: MoeSpec
    widths: Widths
    gate: tuple[Tensor, Tensor | None]
    seed: int
    layer: FusedMoE

    def draw(self, count: int, *, calibration: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states in the layer's dtype and router logits."""
        drawn = draw_tokens(
            count,
            self.widths.hidden_size,
            self.widths.router_hidden_size,
            seed=self.seed,
            calibration=calibration,
        )
        hidden_states = drawn.hidden_states.to(self.layer.plan.request.dtype)
        return hidden_states, router_logits(self.spec, drawn.router_input, self.gate)


def _nbytes(layer: FusedMoE) -> int:
    """Of the parameters, and of what looking for NaN in the largest takes besides.

    `isfinite` of a whole parameter makes its magnitudes and three masks.
    """
    largest = max(tensor.nbytes + 3 * tensor.numel() for tensor in layer.parameters())
    return sum(tensor.nbytes for tensor in layer.parameters()) + largest


def _shared(options: RunOptions, spec: MoeSpec) -> tuple[int, list[str]]:
    """How many fused shared experts the run has, and what to say about the others."""
    if spec.num_shared_experts == 0:
        return 0, ["the model has no shared expert to fuse"] if options.fused_shared else []
    count, rest = divmod(spec.shared_expert_intermediate_size, spec.intermediate_size)
    layouts = (CheckpointLayout.SEPARATE, CheckpointLayout.MIXTRAL)
    why = ""
    if spec.shared_expert_combination is not SharedCombination.SUM:
        why = f"the model adds it as {spec.shared_expert_combination.value}, not as a plain sum"
    elif rest:
        why = (
            f"its width {spec.shared_expert_intermediate_size} is no multiple of an expert's, "
            f"{spec.intermediate_size}"
        )
    elif spec.routing.apply_router_weight_on_input:
        why = f"{spec.routing.name} weights the experts' input, and a shared expert's has no weight"
    elif options.checkpoint is not None and spec.layout not in layouts:
        why = f"the checkpoint's layout {spec.layout.value} stacks the routed experts"
    if options.fused_shared and not why:
        return count, []
    unfused = "the shared expert is the model's and no part of this run"
    if options.fused_shared:
        return 0, [f"{unfused}; it cannot be fused: {why}"]
    return 0, [unfused + ("" if why else " (--fused-shared fuses it)")]


def _weights(options: RunOptions, spec: MoeSpec, size: Widths, shared: int) -> Weights:
    if options.checkpoint is None:
        return DrawnWeights(
            spec=spec,
            hidden_size=size.hidden_size,
            router_hidden_size=size.router_hidden_size,
            intermediate_size=size.intermediate_size,
            num_fused_shared_experts=shared,
            seed=options.seed,
        )
    with user_errors():
        checkpoint = open_checkpoint(options.checkpoint)
    return StoredWeights(checkpoint=checkpoint, spec=spec, num_fused_shared_experts=shared)


def _layer(spec: MoeSpec, size: Widths, quant: Format, shared: int, device: str) -> FusedMoE:
    return FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        routing=spec.routing,
        quant=quant,
        activation=spec.activation,
        num_fused_shared_experts=shared,
        has_bias=spec.has_bias,
        prefix=spec.experts_prefix,
        device=device,
        dtype=torch.float32 if isinstance(quant, Unquantized) else torch.bfloat16,
    )


def _load(layer: FusedMoE, weights: Weights, bias: Tensor | None, steps: Steps) -> None:
    """Fill the layer; the time that goes into making the tensors is taken by itself."""
    making = 0.0

    def watched(step: Step) -> Iterator[tuple[str, Tensor]]:
        nonlocal making
        tensors = weights.stream()
        while True:
            begin = time.perf_counter()
            entry = next(tensors, None)
            making += time.perf_counter() - begin
            if entry is None:
                break
            step.advance()
            yield entry
        step.becomes("quantise")

    with steps.step(weights.verb, total=weights.total) as step:
        if bias is not None:
            layer.load_weights([("e_score_correction_bias", bias)])
        layer.load_weights(watched(step), layout=weights.layout)
    whole = steps.seconds[weights.verb]
    steps.seconds |= {weights.verb: making, "quantise": whole - making}


def _timed(
    layer: FusedMoE, hidden_states: Tensor, logits: Tensor, steps: Steps
) -> tuple[Tensor, list[float]]:
    """The output, and the wall time of each of a few calls."""
    times: list[float] = []
    with steps.step("run"):
        while True:
            begin = time.perf_counter()
            output = layer(hidden_states, logits)
            times.append(time.perf_counter() - begin)
            if len(times) >= _CALLS or sum(times) + times[-1] > _CALLS_SECONDS:
                return output, times


def _slots(layer: FusedMoE, logits: Tensor) -> tuple[int, ...]:
    ids = selected(layer, logits).flatten().long()
    counts = torch.bincount(ids[ids >= 0], minlength=layer.plan.request.shape.num_experts)
    return tuple(int(count) for count in counts.tolist())
