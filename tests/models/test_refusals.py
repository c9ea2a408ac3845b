"""What is refused, and that the message names the field, the value and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.models.hf import hf_config
from typed_moe.errors import UnsupportedRouting
from typed_moe.models import load_config, moe_layer_ids, moe_spec, strategy_for
from typed_moe.routing import Default, RenormalizeNaive

OWN = "write the rule as a RoutingStrategy of your own and pass routing= yourself"


def changed(name: str, **settings: object) -> dict[str, object]:
    """A shipped config with some fields set."""
    return {**load_config(name), **settings}


def without(name: str, *fields: str) -> dict[str, object]:
    """A shipped config without some fields."""
    return {key: value for key, value in load_config(name).items() if key not in fields}


# Shipped config, settings, and the beginning of the message.
UNSUPPORTED: list[tuple[str, dict[str, object], str]] = [
    (
        "deepseek-v3",
        {"scoring_func": "softmax"},
        "scoring_func is 'softmax' in a deepseek_v3 config; allowed: 'sigmoid', or no such field",
    ),
    (
        "deepseek-v3",
        {"topk_method": "greedy"},
        "topk_method is 'greedy' in a deepseek_v3 config; allowed: 'noaux_tc', or no such field",
    ),
    (
        "deepseek-v2",
        {"norm_topk_prob": True},
        (
            "norm_topk_prob is True in a deepseek_v2 config; allowed: False, or no such field "
            "(transformers ignores it, the published code renormalises"
        ),
    ),
    (
        "deepseek-v2",
        {"topk_method": "noaux_tc"},
        (
            "topk_method is 'noaux_tc' in a deepseek_v2 config; allowed: 'greedy' or "
            "'group_limited_greedy'"
        ),
    ),
    (
        "deepseek-v2",
        {"scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid' in a deepseek_v2 config; allowed: 'softmax'",
    ),
    (
        "deepseek-moe-16b",
        {"scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid' in a deepseek config; allowed: 'softmax'",
    ),
    (
        "deepseek-moe-16b",
        {"routed_scaling_factor": 2.5},
        (
            "routed_scaling_factor is 2.5 in a deepseek config; allowed: 1.0, or no such field (no "
            "deepseek router reads that field, so it contradicts the model)"
        ),
    ),
    (
        "mixtral-8x7b",
        {"norm_topk_prob": False},
        "norm_topk_prob is False in a mixtral config; allowed: True",
    ),
    ("mixtral-8x7b", {"n_group": 8}, "n_group is 8 in a mixtral config; allowed: 0 or 1"),
    (
        "qwen3-30b-a3b",
        {"scoring_func": "softmax"},
        "scoring_func is 'softmax' in a qwen3_moe config; allowed: no such field",
    ),
    (
        "gpt-oss-20b",
        {"norm_topk_prob": False},
        "norm_topk_prob is False in a gpt_oss config; allowed: True",
    ),
    (
        "north-mini-code-1.0",
        {"expert_selection_fn": "tanh"},
        "expert_selection_fn is 'tanh' in a cohere2_moe config; allowed: 'softmax' or 'sigmoid'",
    ),
    (
        "north-mini-code-1.0",
        {"expert_selection_fn": "softmax"},  # with its norm_topk_prob = False
        (
            "norm_topk_prob is False in a cohere2_moe config; allowed: True, or no such field (a "
            "softmax over the chosen experts always sums to 1)"
        ),
    ),
    (
        "minimax-m2",
        {"scoring_func": "softmax"},
        "scoring_func is 'softmax' in a minimax_m2 config; allowed: 'sigmoid'",
    ),
    (
        "minimax-m2",
        {"use_routing_bias": False},
        "use_routing_bias is False in a minimax_m2 config; allowed: True",
    ),
    (
        "minimax-m2",
        {"routed_scaling_factor": 2.0},
        "routed_scaling_factor is 2.0 in a minimax_m2 config; allowed: 1.0",
    ),
    (
        "step-3.5-flash",
        {"moe_router_activation": "softmax"},
        "moe_router_activation is 'softmax' in a step3p5 config; allowed: 'sigmoid'",
    ),
    (
        "step-3.5-flash",
        {"use_moe_router_bias": False},
        "use_moe_router_bias is False in a step3p5 config; allowed: True",
    ),
    (
        "step-3.5-flash",
        {"norm_expert_weight": False},
        "norm_expert_weight is False in a step3p5 config; allowed: True",
    ),
]


@pytest.mark.parametrize(("name", "settings", "message"), UNSUPPORTED)
def test_unsupported_routing(name: str, settings: Mapping[str, object], message: str) -> None:
    """A routing field we cannot honour is refused by name, value and remedy."""
    config = changed(name, **settings)
    with pytest.raises(UnsupportedRouting, match=re.escape(message)) as caught:
        strategy_for(config)
    assert OWN in str(caught.value)
    with pytest.raises(UnsupportedRouting, match=re.escape(message)):
        moe_spec(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"n_group": 8}, "n_group is 8"),
    ],
)
def test_deepseek_v4_settings(settings: Mapping[str, object], message: str) -> None:
    """On a top-k layer, where the hash layers are not in the way."""
    with pytest.raises(UnsupportedRouting, match=message):
        strategy_for(changed("deepseek-v4-flash", **settings), 3)


@pytest.mark.parametrize("layer_id", [0, 1, 2])
def test_deepseek_v4_hash_layer_by_the_published_field(layer_id: int) -> None:
    """The published json counts the hash layers."""
    message = (
        f"layer {layer_id} of this deepseek_v4 config takes its experts from a table of token ids "
        "(num_hash_layers = 3), which no strategy computes from logits; allowed: the layers with a "
        "top-k router (the first is 3)"
    )
    for call in (strategy_for, moe_spec):
        with pytest.raises(UnsupportedRouting, match=re.escape(message)) as caught:
            call(load_config("deepseek-v4-flash"), layer_id)
        assert OWN in str(caught.value)


def test_deepseek_v4_hash_layer_by_transformers_field() -> None:
    """transformers 5 lists the layers' types."""
    config = hf_config("deepseek_v4")
    with pytest.raises(UnsupportedRouting, match="mlp_layer_types = 'hash_moe'"):
        strategy_for(config, 2)
    every = hf_config("deepseek_v4", num_hidden_layers=2, mlp_layer_types=["hash_moe", "hash_moe"])
    with pytest.raises(UnsupportedRouting, match="allowed: none"):
        moe_spec(every)


def test_llama4_with_more_than_one_expert_per_token() -> None:
    """F15: the weight is on the input, so two experts do not sum alike."""
    config = hf_config("llama4_text", num_experts_per_tok=2)
    with pytest.raises(UnsupportedRouting, match=r"num_experts_per_tok is 2 .* allowed: 1,"):
        strategy_for(config)


def test_unknown_model_type_with_experts_lists_the_known_ones() -> None:
    """Nothing is guessed from another family's flags."""
    message = (
        "model_type is 'granitemoe', a mixture-of-experts model .* allowed: cohere2_moe, .*step3p5"
    )
    with pytest.raises(UnsupportedRouting, match=message):
        strategy_for(hf_config("granitemoe"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral3"])
def test_dense_config(model_type: str) -> None:
    """A dense model is not an MoE model."""
    for call in (strategy_for, moe_spec, moe_layer_ids):
        with pytest.raises(ValueError, match="is not a mixture-of-experts config") as caught:
            call(hf_config(model_type))
        assert not isinstance(caught.value, UnsupportedRouting)


def test_no_experts_or_no_moe_layers() -> None:
    """An MoE family with its experts switched off is not one either."""
    with pytest.raises(ValueError, match=r"num_local_experts is 0, so this .* not a mixture"):
        strategy_for(hf_config("qwen3_moe", num_experts=0))
    with pytest.raises(ValueError, match="no layer of this deepseek_v3 config is an MoE layer"):
        strategy_for(changed("deepseek-v3", first_k_dense_replace=61))


# Shipped config and a field that has no safe default.
REQUIRED = [
    ("deepseek-v3", "n_group"),
    ("deepseek-v3", "topk_group"),
    ("deepseek-v3", "routed_scaling_factor"),
    ("deepseek-v3", "norm_topk_prob"),
    ("deepseek-v3", "first_k_dense_replace"),
    ("deepseek-v3", "num_hidden_layers"),
    ("deepseek-v2", "topk_method"),
    ("deepseek-v2", "n_group"),
    ("deepseek-v2", "routed_scaling_factor"),
    ("deepseek-moe-16b", "norm_topk_prob"),
    ("deepseek-v4-flash", "num_hash_layers"),
    ("kimi-k2", "n_group"),
    ("glm-4.7", "n_group"),
    ("qwen3-30b-a3b", "norm_topk_prob"),
    ("nemotron-3-nano-30b-a3b", "topk_group"),
    ("nemotron-3-nano-30b-a3b", "hybrid_override_pattern"),
    ("north-mini-code-1.0", "expert_selection_fn"),
    ("north-mini-code-1.0", "norm_topk_prob"),
    ("step-3.5-flash", "moe_router_scaling_factor"),
    ("step-3.5-flash", "moe_layers_enum"),
]


@pytest.mark.parametrize(("name", "field"), REQUIRED)
def test_a_missing_routing_field_is_an_error_that_names_it(name: str, field: str) -> None:
    """Class defaults differ from released values, so none is assumed."""
    with pytest.raises(ValueError, match=f"^{field} .*(is missing|is None) in a ") as caught:
        strategy_for(without(name, field), 3)
    assert not isinstance(caught.value, UnsupportedRouting)


@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "hidden_size"])
def test_a_missing_size_is_an_error_that_names_it(field: str) -> None:
    """No size is guessed."""
    with pytest.raises(ValueError, match=f"^{field} .*is missing in a qwen3_moe config"):
        moe_spec(without("qwen3-30b-a3b", field))


def test_documented_defaults_say_so() -> None:
    """A field that fell back says whose default it took."""
    config = without("olmoe-1b-7b", "norm_topk_prob", "hidden_act")
    assert strategy_for(config) == Default()
    sources = moe_spec(config).sources
    assert sources["routing.norm_topk_prob"] == "norm_topk_prob absent: OlmoeConfig default False"
    assert sources["activation"] == "hidden_act absent: OlmoeConfig default silu"
    assert strategy_for(without("qwen2-57b-a14b", "norm_topk_prob")) == Default()
    assert strategy_for(without("qwen3-next-80b-a3b", "norm_topk_prob")) == RenormalizeNaive()


def test_deepseek_v1_does_not_renormalise_a_single_expert() -> None:
    """One expert's weight divided by itself would be 1."""
    config = changed("deepseek-moe-16b", norm_topk_prob=True)
    assert strategy_for(config) == RenormalizeNaive()
    assert strategy_for({**config, "num_experts_per_tok": 1}) == Default()


# Shipped config, settings, and the message of a plain ValueError from moe_spec.
MALFORMED: list[tuple[str, dict[str, object], str]] = [
    ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "top_k is 129; allowed: 1 to num_experts"),
    ("qwen3-30b-a3b", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ("qwen3-30b-a3b", {"num_experts": "128"}, "num_experts is '128' .* allowed: a whole number"),
    ("qwen3-30b-a3b", {"norm_topk_prob": 1}, "norm_topk_prob is 1 .* allowed: true or false"),
    ("qwen3-30b-a3b", {"mlp_only_layers": 0}, "mlp_only_layers is 0 .* allowed: a list"),
    ("qwen3-30b-a3b", {"num_local_experts": 64}, "num_experts is 128 and num_local_experts is 64"),
    ("qwen3-30b-a3b", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    (
        "qwen3-30b-a3b",
        {"shared_expert_intermediate_size": 4},
        "shared_expert_intermediate_size is 4",
    ),
    (
        "gpt-oss-20b",
        {"experts_per_token": 2},
        "num_experts_per_tok is 4 and experts_per_token is 2",
    ),
    ("deepseek-v3", {"n_group": 7}, "num_experts is 256, not a multiple of num_expert_group = 7"),
    ("deepseek-v3", {"topk_group": 9}, "topk_group is 9; allowed: 1 to num_expert_group = 8"),
    ("deepseek-v3", {"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5'"),
    ("deepseek-v3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0"),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2 in a deepseek_v3 config"),
    ("deepseek-v4-flash", {"swiglu_limit": 0.0}, "limit is 0.0"),
    (
        "deepseek-v4-flash",
        {"mlp_layer_types": ["moe"] * 43},
        "num_hash_layers is 3 and mlp_layer_t",
    ),
    ("deepseek-v4-flash", {"mlp_layer_types": ["dense"] * 43}, "the entry 'dense'"),
    ("glm-5", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries"),
    ("glm-5", {"mlp_layer_types": ["moe"] * 78}, "mlp_layer_types has the entry 'moe'"),
    ("minimax-m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
    (
        "nemotron-3-nano-30b-a3b",
        {"num_hidden_layers": 50},
        "num_hidden_layers is 50 .* has 52 layers",
    ),
    ("nemotron-3-nano-30b-a3b", {"layers_block_type": ["moe"]}, "name different MoE layers"),
    ("nemotron-3-nano-30b-a3b", {"mlp_hidden_act": "silu_gated"}, "mlp_hidden_act is 'silu_gated'"),
    ("step-3.5-flash", {"moe_layers_enum": "3,x"}, "moe_layers_enum .* is '3,x'"),
    ("step-3.5-flash", {"swiglu_limits": [0.0]}, "swiglu_limits has 1 entries .* layer 3"),
    ("step-3.5-flash", {"swiglu_limits": ["7"] * 45}, r"swiglu_limits\[3\] is '7'"),
    ("step-3.5-flash", {"use_moe": False}, "use_moe is False"),
    ("llama4-scout", {"text_config": 3}, "text_config is a int; allowed: a mapping"),
    ("qwen3-30b-a3b", {"model_type": None}, "model_type is None"),
]


@pytest.mark.parametrize(("name", "settings", "message"), MALFORMED)
def test_malformed(name: str, settings: Mapping[str, object], message: str) -> None:
    """Wrong types, disagreeing spellings and impossible counts."""
    with pytest.raises(ValueError, match=message) as caught:
        moe_spec(changed(name, **settings))
    assert not isinstance(caught.value, UnsupportedRouting)


def test_layer_outside_the_model() -> None:
    """Both functions check layer_id against num_hidden_layers."""
    config = load_config("deepseek-v3")
    for layer_id in (-1, 61):
        for call in (strategy_for, moe_spec):
            with pytest.raises(ValueError, match=f"layer_id is {layer_id}; allowed: 0 to .* = 60"):
                call(config, layer_id)


def test_dense_layer_has_no_spec_and_the_models_rule() -> None:
    """The refusal names the dense field and the first MoE layer."""
    config = load_config("deepseek-v3")
    assert strategy_for(config, 0) == strategy_for(config, 60)
    with pytest.raises(
        ValueError,
        match=r"layer 0 .* is dense \(first_k_dense_replace = 3\); .* the first of which is 3",
    ):
        moe_spec(config, 0)


def test_wrapper_without_text_config_or_unknown() -> None:
    """A wrapper needs its text_config; an unknown one has no tensor names."""
    with pytest.raises(ValueError, match="text_config is missing in a llama4 config"):
        strategy_for({"model_type": "llama4"})
    text = load_config("qwen3-30b-a3b")
    wrapped = {"model_type": "some_vl", "text_config": text}
    assert strategy_for(wrapped) == RenormalizeNaive()
    with pytest.raises(ValueError, match="model_type 'some_vl' wraps a qwen3_moe text model"):
        moe_spec(wrapped)


def test_not_a_config() -> None:
    """Neither a mapping nor an object with to_dict()."""
    with pytest.raises(TypeError, match="config is a str; allowed: a mapping"):
        strategy_for("qwen3-30b-a3b")  # type: ignore[arg-type]


def test_load_config_from_files(tmp_path: Path) -> None:
    """By name, by path, and what is wrong with a bad one."""
    config = load_config("mixtral-8x7b")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert load_config(file) == load_config(str(file)) == load_config(tmp_path) == config
    file.write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list; allowed: an object"):
        load_config(file)
    with pytest.raises(ValueError, match="'mixtral' is no shipped config and no file"):
        load_config("mixtral")
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "absent.json")
