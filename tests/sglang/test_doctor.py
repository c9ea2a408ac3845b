"""The doctor on the installed SGLang 0.5.23, and what SGLang itself does with the same settings.

The expected verdicts are of a reading of SGLang's models by hand (2026-11), not of the doctor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.calls import Cli, items, part
from typed_moe.sglang import Agreement, BlockReport, RoutedOutside, Verdict, examine, models_folder

pytestmark = pytest.mark.sglang

WRONG = {"exaone_moe", "sarvam_moe", "step3p5", "xllm"}
# A number that holds only for some configs: no renormalisation, DeepSeek-V2's softmax, a hash.
WRONG_SOMETIMES = {
    "deepseek_v2",
    "glm4_moe",
    "interns2_mobius",
    "kimi_k3",
    "nemotron_h",
    "qwen2_moe",
    "qwen3_moe",
    "sdar_moe",
    # A factor that RenormalizeNaive's kernel does not apply, where config.json has one.
    "bailing_moe",
}
AGREES = {"beam", "cohere2_moe", "iquest_q1", "llama4", "mimo_v2"}
OUTSIDE = {"ernie4", "gemma4_causal", "grok", "interns1pro", "longcat_flash", "phimoe"}
NEVER_BOUND = {"afmoe", "beam", "dbrx", "deepseek", "xverse_moe"}
RULES = {
    "mixtral": {"RenormalizeNaive"},
    "gpt_oss": {"RenormalizeNaive"},
    "olmoe": {"Default"},
    "iquest_q1": {"Renormalize"},
    "llama4": {"Llama4"},
    "qwen2_moe": {"RenormalizeNaive", "Default"},
    "qwen3_moe": {"Renormalize", "Default"},
    "exaone_moe": {"DeepSeekV3", "BiasedSigmoid"},
    "step3p5": {"MiniMax2"},
    "glm4_moe": {"DeepSeekV3", "BiasedSigmoid"},
    "cohere2_moe": {"SigmoidRenorm", "Sigmoid", "RenormalizeNaive", "Default"},
    "lfm2_moe": {"MiniMax2", "BiasedSigmoid", "SigmoidRenorm", "Sigmoid"},
    "beam": {"DeepSeekV3"},
}


@pytest.fixture(scope="module")
def blocks() -> dict[str, BlockReport]:
    found = examine(models_folder())
    assert len({one.module for one in found}) == len(found)
    return {one.module: one for one in found}


def test_every_file_that_names_a_topk_is_there(blocks: dict[str, BlockReport]) -> None:
    """Counted by text, not by syntax."""
    folder = models_folder()
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if " TopK(" in path.read_text(encoding="utf-8")
    }
    assert set(blocks) == files
    assert len(files) == 46


@pytest.mark.parametrize(
    ("verdict", "modules"),
    [
        (Verdict.WRONG, WRONG),
        (Verdict.WRONG_SOMETIMES, WRONG_SOMETIMES),
        (Verdict.AGREES, AGREES),
        (Verdict.OUTSIDE, OUTSIDE),
    ],
    ids=lambda value: value.value if isinstance(value, Verdict) else "",
)
def test_the_verdicts(verdict: Verdict, modules: set[str], blocks: dict[str, BlockReport]) -> None:
    assert {name for name, one in blocks.items() if one.verdict is verdict} == modules


def test_every_route_has_a_strategy_or_a_name(blocks: dict[str, BlockReport]) -> None:
    for block in blocks.values():
        assert block.routes
        for route in block.routes:
            assert route.translation.name
            if isinstance(route.translation, RoutedOutside):
                assert route.translation.reason


@pytest.mark.parametrize("module", sorted(RULES))
def test_the_strategies(module: str, blocks: dict[str, BlockReport]) -> None:
    assert {one.translation.name for one in blocks[module].routes} == RULES[module]


def test_models_that_never_bind(blocks: dict[str, BlockReport]) -> None:
    """But for hash routing, which has nothing to bind."""
    assert {
        name
        for name, one in blocks.items()
        for route in one.routes
        if not route.binds and route.translation.name != "hash of the token id"
    } == NEVER_BOUND


def test_unnormalised_is_what_makes_it_wrong(blocks: dict[str, BlockReport]) -> None:
    for module in (
        "qwen2_moe",
        "qwen3_moe",
        "interns2_mobius",
        "sdar_moe",
        "glm4_moe",
        "nemotron_h",
    ):
        wrong = [
            one.when
            for one in blocks[module].routes
            if one.comparison.agreement is Agreement.CONFLICT
        ]
        assert wrong == [("config.norm_topk_prob = False",)]


def test_one_model_by_its_config(cli: Cli, tmp_path: Path) -> None:
    """Qwen2-57B-A14B does not renormalise, and its class says RenormalizeNaive."""
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli("sglang", "doctor", "--model-path", str(tmp_path), "--json")
    assert done.status == 1
    (block,) = items(done.json(), "blocks")
    assert (block["class"], block["verdict"]) == ("Qwen2MoeSparseMoeBlock", "wrong number")
    (route,) = items(block, "routes")
    assert route["strategy"] == "Default()"
    assert part(route, "kernel_path")["fp8_block"] == "in the kernel, as Default"
    config["norm_topk_prob"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli("sglang", "doctor", "--model-path", str(tmp_path))
    assert done.status == 0
    assert "in the kernel, as RenormalizeNaive" in done.out


def test_the_table(cli: Cli) -> None:
    done = cli("sglang", "doctor")
    assert done.status == 1
    assert "46 classes that build a TopK" in done.out
    for module in WRONG:
        assert module in done.out.split("Wrong number sometimes")[0]


def test_a_config_without_experts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    done = cli("sglang", "doctor", "--model-path", str(tmp_path))
    assert done.status == 2
    assert "no class that builds a TopK belongs to LlamaForCausalLM" in done.err
