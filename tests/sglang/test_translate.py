"""The strategy that a TopKConfig is translated to, beside SGLang's own TopK, on the same logits.

SGLang's side is its real `TopK` in PyTorch (`forward_native`), float32 logits, on a CPU.
"""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe import Llama4, RenormalizeNaive, RoutingShape, RoutingStrategy, Sigmoid
from typed_moe.sglang import RoutedOutside, TopKSettings, read_topk_config, strategy_of

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("sglang_host")]

TOKENS, EXPERTS, TOP_K, GROUPS, KEPT = 64, 32, 4, 4, 2
# float32 on both sides, and sums of 4 terms in another order.
TOLERANCE = 2e-6
FACTOR = 2.5


@attrs.frozen(kw_only=True)
class Case:
    """One set of TopK arguments."""

    scoring_func: str = "softmax"
    renormalize: bool = True
    groups: int | None = None
    biased: bool = False
    factor: float | None = None
    custom: object = None
    top_k: int = TOP_K

    @override
    def __str__(self) -> str:
        words = [self.scoring_func, "renorm" if self.renormalize else "plain"]
        words += [f"groups{self.groups}"] if self.groups else []
        words += ["bias"] if self.biased else []
        words += ["scaled"] if self.factor else []
        return "-".join(words)


@attrs.frozen(kw_only=True, eq=False)
class Theirs:
    """What SGLang's TopK gives."""

    settings: TopKSettings
    ids: Tensor
    weights: Tensor


CASES = [
    Case(scoring_func=scoring, renormalize=renormalize, groups=groups, biased=biased, factor=factor)
    for scoring, renormalize, groups, biased, factor in itertools.product(
        ("softmax", "sigmoid", "sqrtsoftplus"),
        (True, False),
        (None, 1, GROUPS),
        (True, False),
        (None, FACTOR),
    )
]


def _settings_and_routing(case: Case, logits: Tensor, bias: Tensor | None) -> Theirs:
    """What SGLang's TopK computes, and what its config reads as."""
    from sglang.srt.layers.moe.topk import TopK

    topk = TopK(
        case.top_k,
        layer_id=0,
        use_grouped_topk=case.groups is not None,
        num_expert_group=case.groups,
        topk_group=None if case.groups is None else min(case.groups, KEPT),
        renormalize=case.renormalize,
        scoring_func=case.scoring_func,
        correction_bias=bias,
        routed_scaling_factor=case.factor,
        apply_routed_scaling_factor_on_output=case.factor is not None,
        custom_routing_function=case.custom,
    )
    settings = read_topk_config(topk.topk_config)
    output = topk.forward_native(torch.empty(logits.shape[0], 8), logits)
    return Theirs(settings=settings, ids=output.topk_ids, weights=output.topk_weights)


def _dense(ids: Tensor, weights: Tensor) -> Tensor:
    """(T, E) weights by expert, so that the order of the slots does not matter."""
    return torch.zeros(ids.shape[0], EXPERTS).scatter_(1, ids.long(), weights.float())


def _draw(case: Case) -> tuple[Tensor, Tensor | None]:
    """Logits of both signs, and a bias that changes the choice."""
    logits = torch.randn(TOKENS, EXPERTS) * 2
    return logits, torch.randn(EXPERTS) * 0.3 if case.biased else None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_experts_and_weights(case: Case) -> None:
    """Every combination that SGLang's TopK computes: the strategy's, or there is none, by name."""
    if case.groups is not None and not case.biased and case.scoring_func == "sqrtsoftplus":
        pytest.skip("SGLang refuses it: Unsupported scoring function")
    logits, bias = _draw(case)
    theirs = _settings_and_routing(case, logits, bias)
    strategy = strategy_of(theirs.settings)
    if isinstance(strategy, RoutedOutside):
        assert _has_no_strategy(case)
        return
    assert not _has_no_strategy(case)
    shape = RoutingShape(num_experts=EXPERTS, top_k=case.top_k)
    ours = strategy.select_experts(logits, bias, shape=shape)
    torch.testing.assert_close(
        _dense(ours.topk_ids, ours.topk_weights),
        _dense(theirs.ids, theirs.weights),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )
    if bias is not None:
        unbiased = strategy.select_experts(logits, torch.zeros(EXPERTS), shape=shape)
        assert (unbiased.topk_ids.sort().values != ours.topk_ids.sort().values).any()


def _has_no_strategy(case: Case) -> bool:
    """By hand, from the list of strategies."""
    if case.groups is not None and case.biased:
        return False  # a sigmoid, whatever scoring_func says
    if case.biased:
        return case.scoring_func == "softmax" or (
            case.scoring_func == "sqrtsoftplus" and not case.renormalize
        )
    if case.scoring_func == "softmax":
        return False
    if case.scoring_func == "sqrtsoftplus":
        return True
    return case.factor is not None or case.groups == GROUPS


def test_llama4s_function() -> None:
    from sglang.srt.models.llama4 import Llama4MoE

    case = Case(custom=Llama4MoE.custom_routing_function, renormalize=False, top_k=1)
    _check_custom(case, Llama4())


def test_cohere2s_function() -> None:
    from sglang.srt.models.cohere2_moe import cohere2_sigmoid_topk

    _check_custom(Case(custom=cohere2_sigmoid_topk, renormalize=False), Sigmoid())


def _check_custom(case: Case, expected: RoutingStrategy) -> None:
    logits, _ = _draw(case)
    theirs = _settings_and_routing(case, logits, None)
    strategy = strategy_of(theirs.settings)
    assert strategy == expected
    shape = RoutingShape(num_experts=EXPERTS, top_k=case.top_k)
    ours = expected.select_experts(logits, None, shape=shape)
    torch.testing.assert_close(
        _dense(ours.topk_ids, ours.topk_weights), _dense(theirs.ids, theirs.weights)
    )


def _strange(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    del hidden_states, renormalize
    return torch.topk(gating_output.abs(), topk)


def test_a_function_that_nobody_knows_has_no_strategy() -> None:
    theirs = _settings_and_routing(Case(custom=_strange), *_draw(Case()))
    outside = strategy_of(theirs.settings)
    assert isinstance(outside, RoutedOutside)
    assert outside.name.endswith("test_translate._strange")


def test_a_factor_that_topk_does_not_apply_is_not_the_strategys() -> None:
    """The model multiplies then: a strategy that scaled as well would give 2.5 squared."""
    from sglang.srt.layers.moe.topk import TopK

    topk = TopK(TOP_K, layer_id=0, routed_scaling_factor=FACTOR)
    assert strategy_of(read_topk_config(topk.topk_config)) == RenormalizeNaive()
