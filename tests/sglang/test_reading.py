"""The doctor reads constructors: on sources that are written here, so that nothing need be installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.cli.calls import Cli
from typed_moe import Default, RenormalizeNaive, UnsupportedRouting
from typed_moe.sglang import Agreement, BlockReport, RoutedOutside, Verdict, examine

INSTALLED = importlib.util.find_spec("sglang") is not None
MODEL = """
class Tiny(nn.Module):
    def __init__(self, config, layer_id, quant_config=None, prefix=""):
        super().__init__()
        if self.tp_size > config.num_experts:
            raise ValueError("too many ranks")
{body}
        self.topk.bind_runner_backend(
            self.experts.runner_backend, routing_method_type=self.experts.routing_method_type
        )

class TinyForCausalLM(nn.Module):
    def __init__(self, config):
        self.mlp = Tiny(config, 0)

EntryClass = TinyForCausalLM
"""
EXPERTS = """
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_experts, top_k=2, intermediate_size=8,
            routing_method_type={method},
        )
"""


def report(folder: Path, body: str, method: str, **config: object) -> BlockReport:
    source = MODEL.format(body=body + EXPERTS.format(method=method))
    (folder / "models").mkdir()
    (folder / "models" / "tiny.py").write_text(source)
    fields = {"architectures": ["TinyForCausalLM"], **config} if config else None
    (found,) = examine(folder / "models", fields)
    return found


def test_a_field_is_assumed_both_ways(tmp_path: Path) -> None:
    found = report(
        tmp_path,
        "        self.topk = TopK(2, renormalize=config.norm_topk_prob)",
        "RoutingMethodType.RenormalizeNaive",
    )
    said = {one.when: (one.translation, one.comparison.agreement) for one in found.routes}
    assert said == {
        ("config.norm_topk_prob = True",): (RenormalizeNaive(), Agreement.SAME),
        ("config.norm_topk_prob = False",): (Default(), Agreement.CONFLICT),
    }
    assert found.models == ("TinyForCausalLM",)
    assert found.verdict is Verdict.WRONG_SOMETIMES


@pytest.mark.parametrize(("value", "verdict"), [(True, Verdict.AGREES), (False, Verdict.WRONG)])
def test_a_config_answers(tmp_path: Path, value: bool, verdict: Verdict) -> None:
    found = report(
        tmp_path,
        "        self.topk = TopK(2, renormalize=config.norm_topk_prob)",
        "RoutingMethodType.RenormalizeNaive",
        norm_topk_prob=value,
    )
    (route,) = found.routes
    assert route.when == ()
    assert found.verdict is verdict


def test_a_default_that_is_wrong_is_a_wrong_number(tmp_path: Path) -> None:
    """Right for a setting that a config would have to name, wrong for one that says nothing."""
    found = report(
        tmp_path,
        '        self.topk = TopK(2, scoring_func=getattr(config, "score", "sigmoid"))',
        "RoutingMethodType.RenormalizeNaive",
    )
    assert {one.comparison.agreement for one in found.routes} == {
        Agreement.SAME,
        Agreement.CONFLICT,
    }
    assert found.verdict is Verdict.WRONG


def test_the_number_and_the_topk_depend_on_the_same_field(tmp_path: Path) -> None:
    body = """
        norm = config.norm
        method = RoutingMethodType.RenormalizeNaive if norm else RoutingMethodType.Default
        self.topk = TopK(2, renormalize=norm)
"""
    found = report(tmp_path, body, "method")
    assert [one.comparison.agreement for one in found.routes] == [Agreement.SAME] * 2
    assert found.verdict is Verdict.AGREES


def test_an_assertion_rules_combinations_out(tmp_path: Path) -> None:
    body = """
        self.score = config.score_function
        self.bias = nn.Parameter(torch.empty(8)) if config.use_bias else None
        assert (self.score == "sigmoid" and self.bias is not None) or (
            self.score == "softmax" and self.bias is None
        )
        self.topk = TopK(2, scoring_func=self.score, correction_bias=self.bias)
"""
    found = report(tmp_path, body, "None")
    assert {one.translation.name for one in found.routes} == {"MiniMax2", "RenormalizeNaive"}


def test_keywords_from_a_dictionary_that_is_updated(tmp_path: Path) -> None:
    body = """
        kwargs = dict(renormalize=True, use_grouped_topk=True, num_expert_group=config.n_group,
                      topk_group=config.topk_group, correction_bias=self.gate.bias)
        if is_new:
            kwargs.update(use_grouped_topk=False, scoring_func="sqrtsoftplus")
        self.topk = TopK(2, **kwargs)
""".replace("is_new", "config.is_new")
    found = report(tmp_path, body, "RoutingMethodType.DeepSeekV3")
    names = {one.translation.name for one in found.routes if one.settings.has_correction_bias}
    assert names == {"DeepSeekV3", "SqrtSoftplus"}


def test_a_gate_that_always_has_a_bias(tmp_path: Path) -> None:
    body = """
        self.gate = Gate(config)
        self.topk = TopK(2, scoring_func="sigmoid", correction_bias=self.gate.bias)
"""
    gate = """
class Gate(nn.Module):
    def __init__(self, config):
        self.bias = nn.Parameter(torch.zeros(8))
"""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.py").write_text(
        gate + MODEL.format(body=body + EXPERTS.format(method="None"))
    )
    (found,) = examine(tmp_path / "models")
    assert [one.translation.name for one in found.routes] == ["MiniMax2"]


def test_a_model_that_imports_the_block_is_one_of_its_models(tmp_path: Path) -> None:
    report(tmp_path, "        self.topk = TopK(2)", "None")
    (tmp_path / "models" / "other.py").write_text(
        """
from sglang.srt.models.tiny import Tiny as Block

class Layer(nn.Module):
    def __init__(self, config):
        self.mlp = Block(config, 0)

class OtherForCausalLM(nn.Module):
    def __init__(self, config):
        self.layers = [Layer(config)]

class Unrelated(nn.Module):
    pass

EntryClass = [OtherForCausalLM, Unrelated]
"""
    )
    (found,) = examine(tmp_path / "models")
    assert found.models == ("OtherForCausalLM", "TinyForCausalLM")


def test_a_hash_is_routed_outside(tmp_path: Path) -> None:
    found = report(tmp_path, "        self.topk = HashTopK(topk=2)", "RoutingMethodType.DeepSeekV3")
    (route,) = found.routes
    assert isinstance(route.translation, RoutedOutside)
    assert route.translation.name == "hash of the token id"
    assert found.verdict is Verdict.WRONG


def test_a_function_of_the_models_own_is_named(tmp_path: Path) -> None:
    body = "        self.topk = TopK(2, custom_routing_function=Tiny.route)"
    (route,) = report(tmp_path, body, "None").routes
    assert isinstance(route.translation, RoutedOutside)
    assert route.translation.name == "sglang.srt.models.tiny.Tiny.route"


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedRouting, match="no class that builds a TopK belongs to Dense"):
        report(tmp_path, "        self.topk = TopK(2)", "None", architectures=["Dense"])


@pytest.mark.skipif(INSTALLED, reason="sglang is installed here")
def test_without_sglang_there_is_nothing_to_look_at(cli: Cli) -> None:
    done = cli("sglang", "doctor")
    assert done.status == 2
    assert "sglang is not installed in this environment" in done.err
