"""The float64 oracle that the command line compares with, against others' routers and by hand."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.cli.plain import act_of, relative, rule_of
from tests.models.hf import hf_config, quiet_import
from typed_moe import (
    Activation,
    BiasedSigmoid,
    BiasRule,
    DeepSeekV3,
    Default,
    Geglu,
    Gelu,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Relu2,
    Renormalize,
    RenormalizeNaive,
    RoutingStrategy,
    ScaledSoftmax,
    Sigmoid,
    SigmoidRenorm,
    Silu,
    SqrtSoftplus,
    Swiglu,
    SwigluStep,
    TopK,
    TopKSigmoid,
)
from typed_moe.cli._compare import _oracle
from typed_moe.testing import _oracle as module
from typed_moe.testing._oracle import (
    ORACLE_METHODS,
    OracleExperts,
    OracleRouting,
    experts_float64,
    route_float64,
)

ROWS, EXPERTS, TOP_K, HIDDEN = 2000, 32, 4, 24

STRATEGIES: tuple[RoutingStrategy, ...] = (
    Default(),
    Renormalize(),
    RenormalizeNaive(),
    TopK(),
    Sigmoid(),
    TopKSigmoid(),
    SigmoidRenorm(),
    Llama4(),
    MiniMax2(routed_scaling_factor=1.5),
    DeepSeekV3(routed_scaling_factor=2.5),
    DeepSeekV3(num_expert_group=8, topk_group=3, routed_scaling_factor=2.5),
    BiasedSigmoid(num_expert_group=4, topk_group=2),
    SqrtSoftplus(routed_scaling_factor=1.5),
    ScaledSoftmax(norm_topk_prob=False, routed_scaling_factor=16.0),
    ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=2.0),
    GroupedSoftmax(num_expert_group=8, topk_group=3, group_score="max", norm_topk_prob=False),
    GroupedSoftmax(num_expert_group=8, topk_group=3, group_score="top2_sum", norm_topk_prob=True),
)


def _settings(model: str) -> tuple[str, str, dict[str, object]]:
    """Class, model_type and config of a family's router."""
    routed: dict[str, object] = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    deepseek = {
        **routed,
        "num_attention_heads": 2,
        "n_routed_experts": EXPERTS,
        "routed_scaling_factor": 2.5,
    }
    local = {**routed, "num_local_experts": EXPERTS}
    return {
        "qwen3": (
            "Qwen3MoeTopKRouter",
            "qwen3_moe",
            {**routed, "num_experts": EXPERTS, "norm_topk_prob": True},
        ),
        "qwen3 without the division": (
            "Qwen3MoeTopKRouter",
            "qwen3_moe",
            {**routed, "num_experts": EXPERTS, "norm_topk_prob": False},
        ),
        "deepseek-v3": (
            "DeepseekV3TopkRouter",
            "deepseek_v3",
            {**deepseek, "n_group": 8, "topk_group": 3, "norm_topk_prob": True},
        ),
        "deepseek-v2": (
            "DeepseekV2TopkRouter",
            "deepseek_v2",
            {**deepseek, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
        ),
        "deepseek-v2 greedy": (
            "DeepseekV2TopkRouter",
            "deepseek_v2",
            {**deepseek, "topk_method": "greedy"},
        ),
        "deepseek-v4": ("DeepseekV4TopKRouter", "deepseek_v4", deepseek),
        "minimax-m2": ("MiniMaxM2TopKRouter", "minimax_m2", local),
        "gpt-oss": ("GptOssTopKRouter", "gpt_oss", local),
    }[model]


_OURS: dict[str, RoutingStrategy] = {
    "qwen3": RenormalizeNaive(),
    "qwen3 without the division": Default(),
    "deepseek-v3": DeepSeekV3(num_expert_group=8, topk_group=3, routed_scaling_factor=2.5),
    "deepseek-v2": GroupedSoftmax(
        num_expert_group=8,
        topk_group=3,
        group_score="max",
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
    ),
    "deepseek-v2 greedy": ScaledSoftmax(norm_topk_prob=False, routed_scaling_factor=2.5),
    "deepseek-v4": SqrtSoftplus(routed_scaling_factor=2.5),
    "minimax-m2": MiniMax2(),
    "gpt-oss": Renormalize(),
}


def _theirs(model: str, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and weights of transformers' router with random weights."""
    name, model_type, settings = _settings(model)
    package = f"transformers.models.{model_type}.modeling_{model_type}"
    router = getattr(quiet_import(package), name)(hf_config(model_type, **settings))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0.0, 0.3)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.copy_(bias)
        given = (x, bias) if model == "minimax-m2" else (x,)
        logits, weights, ids = router(*given)
    return logits, ids, weights


def _dense(ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(ids.shape[0], EXPERTS, dtype=torch.float64).scatter(
        1, ids.long(), weights.double()
    )


@pytest.mark.parametrize("model", _OURS)
def test_it_routes_as_transformers_does(model: str) -> None:
    """The same experts on every decided row, with the same weights to 1e-6."""
    strategy = _OURS[model]
    x, bias = torch.randn(ROWS, HIDDEN), torch.randn(EXPERTS) * 0.2
    logits, ids, weights = _theirs(model, x, bias)

    ours = _oracle(strategy, logits, bias, TOP_K)

    decided = ~ours.undecided()
    assert decided.float().mean() > 0.99
    torch.testing.assert_close(
        _dense(ours.ids, ours.weights)[decided],
        _dense(ids, weights)[decided],
        rtol=2e-6,
        atol=1e-6,
    )
    if strategy.bias is BiasRule.REQUIRED:
        without = _oracle(strategy, logits, torch.zeros_like(bias), TOP_K)
        assert (without.ids.sort().values != ours.ids.sort().values).any(dim=1).float().mean() > 0.1


def test_it_routes_as_llama4_does() -> None:
    """transformers' router gives the sigmoid at the best expert and 0 elsewhere."""
    config = hf_config("llama4_text", hidden_size=HIDDEN, num_local_experts=EXPERTS)
    router = quiet_import("transformers.models.llama4.modeling_llama4").Llama4Router(config)
    with torch.no_grad():
        scores, logits = router(torch.randn(ROWS, HIDDEN))

    ours = route_float64(logits, None, method="Llama4", top_k=1)

    torch.testing.assert_close(
        _dense(ours.ids, ours.weights), scores.double(), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_it_agrees_with_the_tests_own_oracle(strategy: RoutingStrategy) -> None:
    """Every method: the same experts in the same order, the same weights to 1e-12."""
    k = 1 if strategy.name == "Llama4" else TOP_K
    logits, bias = torch.randn(ROWS, EXPERTS) * 2, torch.randn(EXPERTS) * 0.1
    given = bias if strategy.bias is BiasRule.REQUIRED else None

    ours = _oracle(strategy, logits, given, k)

    theirs = oracle.route(rule_of(strategy), logits, given, k)
    rows = theirs.decided & ~ours.undecided()
    assert rows.float().mean() > 0.99
    assert torch.equal(ours.ids[rows], theirs.ids[rows])
    torch.testing.assert_close(ours.weights[rows], theirs.weights[rows], rtol=1e-12, atol=1e-15)


def test_it_knows_every_method() -> None:
    """The strategies above are all of them."""
    assert {strategy.name for strategy in STRATEGIES} == set(ORACLE_METHODS)


def test_a_row_by_hand() -> None:
    """Logits 0, log 3 and -log 3: sigmoids 1/2, 3/4 and 1/4; softmax 3/13, 9/13 and 1/13."""
    logits = torch.tensor([[0.0, math.log(3.0), -math.log(3.0)]])

    def agree(method: str, *expected: float) -> bool:
        found = route_float64(logits, None, method=method, top_k=2)
        values = torch.tensor([expected], dtype=torch.float64)
        return found.ids.tolist() == [[1, 0]] and torch.allclose(found.weights, values, rtol=1e-6)

    assert agree("TopKSigmoid", 3 / 4, 1 / 2)
    assert agree("Sigmoid", 3 / 4, 1 / 2)
    assert agree("SigmoidRenorm", 3 / 5, 2 / 5)
    assert agree("Default", 9 / 13, 3 / 13)
    assert agree("RenormalizeNaive", 3 / 4, 1 / 4)
    assert agree("Renormalize", 3 / 4, 1 / 4)
    assert agree("TopK", math.log(3.0), 0.0)


def test_ties_go_to_the_lower_id_and_have_no_margin() -> None:
    """Equal logits: experts 0 and 1; a margin of 0 is undecided."""
    found = route_float64(torch.zeros(1, 5), None, method="Default", top_k=2)

    assert found.ids.tolist() == [[0, 1]]
    assert found.margin.tolist() == [0.0]
    assert found.undecided().tolist() == [True]


def test_the_margin_counts_experts_and_groups() -> None:
    """Clear experts in tied groups are undecided; all experts chosen leave nothing open."""
    logits = torch.tensor([[3.0, 2.0, 3.0, 2.0, -9.0, -9.0]])
    bias = torch.zeros(6)

    def found(groups: int) -> OracleRouting:
        return route_float64(
            logits, bias, method="DeepSeekV3", top_k=2, num_expert_group=groups, topk_group=1
        )

    assert found(3).ids.tolist() == [[0, 1]]
    assert found(3).undecided().tolist() == [True]
    assert found(1).ids.tolist() == [[0, 2]]
    assert found(1).undecided().tolist() == [False]
    everything = route_float64(logits, None, method="Default", top_k=6)
    assert everything.margin.tolist() == [math.inf]


def test_experts_outside_the_kept_groups_lose_to_negative_scores() -> None:
    """A kept expert whose biased score is negative still beats a masked one: -inf, not 0."""
    logits, bias = torch.zeros(1, 4), torch.tensor([-0.6, -0.7, -5.0, 2.0])

    found = route_float64(
        logits, bias, method="DeepSeekV3", top_k=2, num_expert_group=2, topk_group=1
    )

    assert found.ids.tolist() == [[0, 1]]


def test_minus_infinity_gives_distinct_ids() -> None:
    """Where fewer experts than k are finite, the lowest others fill up."""
    logits = torch.full((1, 4), -math.inf)
    logits[0, 2] = 1.0

    found = route_float64(logits, None, method="Renormalize", top_k=3)

    assert found.ids.tolist() == [[2, 0, 1]]


def test_given_choices_are_weighted() -> None:
    """Somebody else's ids get this method's weights, and leave the margin as it is."""
    logits = torch.randn(7, 6)
    ids = torch.tensor([[5, 0]]).expand(7, 2)

    found = route_float64(logits, None, method="Renormalize", top_k=2, ids=ids)

    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.weights, logits.double()[:, [5, 0]].softmax(1))
    own = route_float64(logits, None, method="Renormalize", top_k=2)
    assert torch.equal(found.margin, own.margin)


def test_unknown_methods_and_missing_biases_are_refused() -> None:
    """In a sentence each."""
    with pytest.raises(ValueError, match="does not know 'Mine'; allowed: Default"):
        route_float64(torch.zeros(1, 4), None, method="Mine", top_k=1)
    with pytest.raises(ValueError, match="DeepSeekV3 adds a correction bias"):
        route_float64(torch.zeros(1, 4), None, method="DeepSeekV3", top_k=1)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    "activation",
    [
        Swiglu(),
        Swiglu(alpha=1.702, beta=1.0, limit=0.7),
        Swiglu(limit=0.5),
        SwigluStep(limit=0.4),
        Geglu(),
        Geglu(approximate="tanh"),
        Relu2(),
        Silu(),
        Gelu(),
        Gelu(approximate="tanh"),
    ],
    ids=repr,
)
def test_experts_agree_with_the_tests_own_oracle(activation: Activation, on_input: bool) -> None:
    """Every activation with biases, weights on either side, skipped slots: the same to 1e-12."""
    act = act_of(activation)
    up, gate, down = torch.randn(5, 8, 12), torch.randn(5, 8, 12), torch.randn(5, 12, 8)
    up_bias, gate_bias, down_bias = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 12)
    plain = oracle.Experts(
        up=up,
        down=down,
        gate=gate if act.gated else None,
        up_bias=up_bias,
        gate_bias=gate_bias if act.gated else None,
        down_bias=down_bias,
    )
    ours = OracleExperts(
        w13=torch.cat((gate, up), dim=1) if act.gated else up,
        w2=down,
        activation=activation.name,
        w13_bias=torch.cat((gate_bias, up_bias), dim=1) if act.gated else up_bias,
        w2_bias=down_bias,
        **{
            name: getattr(activation, name)
            for name in ("alpha", "beta", "limit", "approximate")
            if hasattr(activation, name)
        },
    )
    x, weights = torch.randn(9, 12), torch.rand(9, 3)
    ids = torch.rand(9, 5).argsort(dim=1)[:, :3]
    ids[2, 1] = -1

    output = experts_float64(x, ids, weights, ours, weight_on_input=on_input)

    expected = oracle.moe(plain, x, ids, weights, act, on_input=on_input)
    assert relative(output, expected) < 1e-12


def test_only_experts_with_tokens_are_asked_for() -> None:
    """An expert that nobody goes to is not made."""
    asked: list[int] = []

    class Watched:
        def __getitem__(self, expert: int, /) -> Tensor:
            asked.append(expert)
            return torch.ones(4, 2)

    experts = OracleExperts(w13=Watched(), w2=torch.ones(9, 2, 2), activation="swiglu")
    experts_float64(torch.ones(2, 2), torch.tensor([[7, 3], [3, -1]]), torch.ones(2, 2), experts)

    assert asked == [3, 7]


def test_an_unknown_activation_is_refused() -> None:
    """By its name."""
    experts = OracleExperts(w13=torch.ones(1, 4, 2), w2=torch.ones(1, 2, 2), activation="swish2")

    with pytest.raises(ValueError, match="does not know the activation 'swish2'"):
        experts(torch.ones(1, 2, dtype=torch.float64), 0)


def test_it_imports_nothing_of_the_packages_maths() -> None:
    """torch, attrs and the standard library alone: a mistake of ours is not repeated here."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))

    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names == {
        "__future__",
        "attrs",
        "collections.abc",
        "math",
        "torch",
        "types",
        "typing",
    }
