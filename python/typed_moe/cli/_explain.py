"""`typed-moe explain`: what each layer of a model routes by, and what would run it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import final

import attrs
import torch
from rich.console import Console

from typed_moe.cli._errors import user_errors
from typed_moe.cli._model import Model, read_format, read_model, read_spec
from typed_moe.cli._output import (
    Fact,
    plan_json,
    print_facts,
    print_heading,
    print_plan,
    print_title,
)
from typed_moe.config import Format, Unquantized
from typed_moe.errors import UnsupportedRouting
from typed_moe.layer import FusedMoE
from typed_moe.models import (
    MoeSpec,
    SharedCombination,
    moe_layer_ids,
    moe_spec,
    num_hidden_layers,
)
from typed_moe.runners import Plan, decide


@final
@attrs.frozen(kw_only=True)
class MoeLayers:
    """MoE layers that are alike, and the plan of the first."""

    ids: tuple[int, ...]
    spec: MoeSpec
    plan: Plan


@final
@attrs.frozen(kw_only=True)
class OtherLayers:
    """Layers without a plan: dense, or of a routing that no strategy honours."""

    ids: tuple[int, ...]
    kind: str
    reason: str


@final
@attrs.frozen(kw_only=True)
class Explanation:
    """A model's layers, grouped.

    Attributes:
        model: the config.
        num_layers: decoder layers.
        moe: groups of MoE layers, by their first layer.
        others: the layers that are none, or that cannot be routed.
    """

    model: Model
    num_layers: int
    moe: tuple[MoeLayers, ...]
    others: tuple[OtherLayers, ...]


def explain(name: str, quant_name: str) -> Explanation:
    """Plan every MoE layer of a model; no weight is made or read.

    Raises:
        UserError: no such model or format, not an MoE, or a layer that the format cannot hold.
    """
    model, quant = read_model(name), read_format(quant_name)
    first = read_spec(model, None)
    moe_ids = moe_layer_ids(model.config)
    num_layers = num_hidden_layers(model.config)
    groups: dict[MoeSpec, list[MoeSpec]] = {}
    refused: dict[int, str] = {}
    for layer in moe_ids:
        try:
            spec = moe_spec(model.config, layer)
        except UnsupportedRouting as error:
            refused[layer] = str(error)
            continue
        groups.setdefault(_without_names(spec), []).append(spec)
    dense = tuple(layer for layer in range(num_layers) if layer not in moe_ids)
    others = []
    if dense:
        reason = dict(_sources(first))["layers"]
        others.append(OtherLayers(ids=dense, kind="dense", reason=reason))
    if refused:
        reason = next(iter(refused.values()))
        others.append(OtherLayers(ids=tuple(refused), kind="not supported", reason=reason))
    with user_errors(f"{model.name} in {quant.name}: "):
        moe = tuple(
            MoeLayers(
                ids=tuple(spec.layer_id for spec in specs),
                spec=specs[0],
                plan=_plan(specs[0], quant),
            )
            for specs in groups.values()
        )
    return Explanation(model=model, num_layers=num_layers, moe=moe, others=tuple(others))


def _without_names(spec: MoeSpec) -> MoeSpec:
    """What has to be equal for two layers to be alike: everything but where they are."""
    return attrs.evolve(
        spec,
        layer_id=0,
        experts_prefix="",
        gate_name="",
        gate_bias_name=None,
        correction_bias_name=None,
    )


def _plan(spec: MoeSpec, quant: Format) -> Plan:
    """Of a layer on this machine's CPU.

    The layer is made on the meta device, where weights take no memory, so that what its
    constructor refuses is refused here too.
    """
    layer = FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        routing=spec.routing,
        quant=quant,
        activation=spec.activation,
        has_bias=spec.has_bias,
        device="meta",
        dtype=torch.float32 if isinstance(quant, Unquantized) else torch.bfloat16,
    )
    request = attrs.evolve(layer.plan.request, device=torch.device("cpu"))
    return decide(request, spec.routing).plan


def layer_ranges(ids: Iterable[int]) -> str:
    """`3-60` for a run, `1, 3, ..., 47` for even steps, else the runs one by one."""
    numbers = list(ids)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def explain_json(explanation: Explanation) -> dict[str, object]:
    """The explanation as plain values."""
    return {
        "model": explanation.model.name,
        "source": explanation.model.source,
        "model_type": explanation.moe[0].spec.model_type,
        "num_layers": explanation.num_layers,
        "moe_layers": [
            {
                "layers": list(group.ids),
                "strategy": group.spec.routing.name,
                "plan": plan_json(group.plan),
                "shared_experts": _shared(group.spec),
                "checkpoint": dict(_checkpoint(group.spec)),
                "config": dict(group.spec.sources),
            }
            for group in explanation.moe
        ],
        "other_layers": [
            {"layers": list(group.ids), "kind": group.kind, "reason": group.reason}
            for group in explanation.others
        ],
    }


def print_explanation(explanation: Explanation, console: Console) -> None:
    """The explanation for people: later groups of layers by what they have of their own."""
    first = explanation.moe[0]
    model_type = first.spec.model_type
    print_title(
        console,
        explanation.model.name,
        f"{explanation.model.source}, model_type {model_type}, {explanation.num_layers} layers",
    )
    print_heading(console, "Layers")
    print_facts(console, _layer_rows(explanation))
    print_plan(console, first.plan)
    print_heading(console, "From the config")
    print_facts(console, _sources(first.spec))
    print_heading(console, "Beside the routed experts, and in the checkpoint")
    print_facts(console, [("shared experts", _shared(first.spec)), *_checkpoint(first.spec)])
    for group in explanation.moe[1:]:
        print_heading(console, f"Layers {layer_ranges(group.ids)} differ")
        print_facts(console, _differences(first, group))


def _layer_rows(explanation: Explanation) -> list[Fact]:
    rows: list[tuple[int, Fact]] = []
    for group in explanation.moe:
        spec = group.spec
        text = (
            f"{spec.routing.name}, {spec.num_experts} experts, top_k {spec.top_k}, "
            f"{spec.activation!r}"
        )
        rows.append((group.ids[0], (layer_ranges(group.ids), text)))
    for other in explanation.others:
        text = f"{other.kind}: {other.reason}"
        rows.append((other.ids[0], (layer_ranges(other.ids), text)))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def _differences(first: MoeLayers, group: MoeLayers) -> list[Fact]:
    """Rows of the plan and of the config that are not the first group's."""

    def rows(one: MoeLayers) -> list[Fact]:
        read = (("from the config", source) for _, source in _sources(one.spec))
        return [*one.plan.rows(), *read]

    known = rows(first)
    return [row for row in rows(group) if row not in known]


def _sources(spec: MoeSpec) -> list[Fact]:
    """Where each thing came from; a list of layers gets room to be folded."""
    folded = ((what, re.sub(r"(?<=\d),(?=\d)", ", ", text)) for what, text in spec.sources.items())
    return list(folded)


def _shared(spec: MoeSpec) -> str:
    if spec.shared_expert_combination is SharedCombination.NONE:
        return "none"
    return (
        f"{spec.num_shared_experts}, together {spec.shared_expert_intermediate_size} wide, added "
        f"as {spec.shared_expert_combination.value}; the model's to run"
    )


def _checkpoint(spec: MoeSpec) -> list[Fact]:
    """Tensor names of one layer, and how the experts are stored."""
    names = [
        ("experts", f"{spec.experts_prefix} ({spec.layout.value})"),
        ("gate", spec.gate_name),
        ("gate bias", spec.gate_bias_name),
        ("correction bias", spec.correction_bias_name),
    ]
    return [(what, name) for what, name in names if name is not None]
