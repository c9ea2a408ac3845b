"""The comparison with the oracle: ties that float32 cannot decide, and strategies it knows not."""

from __future__ import annotations

import math
from typing import final

import attrs
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from typed_moe import BiasedSigmoid, FusedMoE, Routed, RoutingShape, RoutingStrategy, Sigmoid
from typed_moe.cli._compare import Comparison, compare
from typed_moe.cli._run_report import Load, _accuracy, _print_load
from typed_moe.cli._weights import Each
from typed_moe.testing._oracle import OracleExperts

EXPERTS, TOP_K, HIDDEN, WIDTH = 6, 2, 32, 16


@final
@attrs.frozen
class Last(RoutingStrategy):
    """The k last experts, equally."""

    name = "Last"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        del e_score_correction_bias
        rows = router_logits.shape[0]
        ids = torch.arange(shape.num_experts - shape.top_k, shape.num_experts)
        weights = torch.full((rows, shape.top_k), 1.0 / shape.top_k)
        return Routed(topk_ids=ids.expand(rows, -1).int(), topk_weights=weights)


def _layer(routing: RoutingStrategy) -> tuple[FusedMoE, OracleExperts]:
    layer = FusedMoE(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        routing=routing,
        dtype=torch.float32,
    )
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    experts = OracleExperts(
        w13=Each(make=lambda expert: layer.get_parameter("w13_weight")[expert]),
        w2=Each(make=lambda expert: layer.get_parameter("w2_weight")[expert]),
        activation="swiglu",
    )
    return layer, experts


def _compare(layer: FusedMoE, experts: OracleExperts, logits: Tensor) -> Comparison:
    x = torch.randn(logits.shape[0], HIDDEN)
    return compare(layer, layer(x, logits), x, logits, experts)


def test_ties_of_float32_are_named_and_do_not_count_as_errors() -> None:
    """Sigmoids of 20 and above are 1 in float32: its choice is the lower id, float64's the larger."""
    layer, experts = _layer(Sigmoid())
    logits = torch.tensor([[20.0, 21.0, 22.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])

    result = _compare(layer, experts, logits)

    assert (result.rows_with_other_experts, result.undecided_rows) == (1, 1)
    assert result.relative_error is not None
    assert result.relative_error < 1e-6
    text = "1 of 2 tokens go to other experts; 1 of these are ties that float32 cannot decide"
    assert dict(_accuracy(result, "bf16"))["routing"] == text


def test_an_output_where_nothing_is_expected() -> None:
    """Weights of zero expect zeros: those are no error, anything else is infinitely wrong."""
    layer, experts = _layer(Sigmoid())
    layer.get_parameter("w2_weight").data.zero_()
    logits, x = torch.randn(3, EXPERTS), torch.randn(3, HIDDEN)

    right = compare(layer, layer(x, logits), x, logits, experts)
    wrong = compare(layer, torch.ones(3, HIDDEN), x, logits, experts)

    assert (right.relative_error, right.passed) == (0.0, True)
    assert (wrong.relative_error, wrong.passed) == (math.inf, False)


def test_a_wrong_choice_is_counted_and_shows_in_the_error() -> None:
    """A layer whose bias is not the one that the comparison reads chooses other experts."""
    layer, experts = _layer(BiasedSigmoid())
    logits, x = torch.randn(16, EXPERTS), torch.randn(16, HIDDEN)
    layer.load_weights([("e_score_correction_bias", torch.tensor([5.0, 5.0, 0.0, 0.0, 0.0, 0.0]))])
    output = layer(x, logits)
    layer.load_weights([("e_score_correction_bias", torch.zeros(EXPERTS))])

    result = compare(layer, output, x, logits, experts)

    assert result.rows_with_other_experts == 0  # the strategy with the new bias and the oracle
    assert result.relative_error is not None
    assert result.relative_error > 0.3
    assert not result.passed


def test_a_strategy_that_errs_is_counted() -> None:
    """Another method's choices under a known name are rows with other experts, and decided ones."""

    @final
    @attrs.frozen
    class Renormalize(RoutingStrategy):
        name = "Renormalize"

        @override
        def select_experts(
            self,
            router_logits: Tensor,
            e_score_correction_bias: Tensor | None,
            *,
            shape: RoutingShape,
        ) -> Routed:
            return Last().select_experts(router_logits, e_score_correction_bias, shape=shape)

    layer, experts = _layer(Renormalize())
    logits = torch.tensor([[9.0, 8.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 2.0, 2.0]])

    result = _compare(layer, experts, logits)

    assert (result.rows_with_other_experts, result.undecided_rows) == (1, 0)
    assert not result.passed


def test_an_unknown_strategy_is_compared_with_its_own_choices() -> None:
    """The output is checked, the routing is not, and the text says so."""
    layer, experts = _layer(Last())

    result = _compare(layer, experts, torch.randn(5, EXPERTS))

    assert result.rows_with_other_experts is None
    assert result.relative_error is not None
    assert result.relative_error < 1e-6
    assert "does not know this strategy" in dict(_accuracy(result, "bf16"))["routing"]


@pytest.mark.parametrize(("experts", "rows"), [(6, 6), (16, 16), (17, 9), (100, 15), (384, 16)])
def test_the_histogram_has_at_most_sixteen_rows(experts: int, rows: int) -> None:
    """Buckets cover every expert once, and their counts are the experts' together."""
    slots = tuple(range(experts))

    buckets = Load(slots=slots).buckets()

    assert len(buckets) == rows
    assert [first for first, _, _ in buckets] == [0, *(last + 1 for _, last, _ in buckets[:-1])]
    assert buckets[-1][1] == experts - 1
    assert all(count == sum(slots[first : last + 1]) for first, last, count in buckets)


def test_the_histograms_bars_are_in_proportion() -> None:
    """The fullest has 40 blocks, half as many tokens 20, none none, very few one."""
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        _print_load(Load(slots=(100, 50, 0, 1)), console)

    lines = capture.get().splitlines()
    assert [line.count("█") for line in lines[:4]] == [40, 20, 0, 1]
    assert lines[4] == "  min 0, mean 37.8, max 100, unused 1 of 4, imbalance 2.65 (max over mean)"
