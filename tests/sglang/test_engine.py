"""A real `sglang.Engine`, its scheduler in a process of its own, beside transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
import torch

from tests.sglang.prompts import NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).parents[2]


@attrs.frozen(kw_only=True)
class Served:
    """What one engine said."""

    tokens: list[list[int]]
    log: str
    parent: int

    def processes(self, strategy: str) -> set[str]:
        """Those in which a layer said that our runner runs it."""
        line = rf"layers\.\d+\.mlp\.experts runs {re.escape(strategy)}.*; process (\d+)"
        return set(re.findall(line, self.log))


COMMON: Mapping[str, object] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


@attrs.frozen(kw_only=True)
class Model:
    """A tiny model of one architecture, and the strategy that its TopK means."""

    model_type: str
    strategy: str
    fields: Mapping[str, object]


QWEN3 = Model(model_type="qwen3_moe", strategy="Renormalize()", fields={"num_experts": 8})
MODELS = [
    QWEN3,
    Model(
        model_type="qwen2_moe",
        # Its number says RenormalizeNaive, and its TopK does not renormalise: that one routes.
        strategy="RoutedBySglang(",
        fields={
            "num_experts": 8,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 48,
        },
    ),
    Model(
        model_type="glm4_moe",
        strategy="DeepSeekV3(",
        fields={
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 0,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
    ),
]


def checkpoint(model: Model, folder: Path) -> None:
    """As transformers saves it, with experts and gates that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model.model_type, **{**COMMON, **model.fields})
    made = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # transformers'
    for name, tensor in made.state_dict().items():
        if "e_score_correction_bias" in name:
            tensor.normal_(std=0.3)
    made.save_pretrained(folder)


def expected(folder: Path) -> list[list[int]]:
    """transformers' greedy tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[list[int]] = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([tokens])).logits[0, -1]
                tokens.append(int(logits.argmax()))
        found.append(tokens[len(prompt) :])
    return found


def serve(
    folder: Path, backend: str, mode: str, *, tp: int = 1, ep: int = 1, **environment: str
) -> Served:
    """One engine, with as many scheduler processes as `tp`."""
    arguments = (str(folder), backend, str(tp), str(ep))
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.sglang.engine_run", *arguments],
        env={**os.environ, "TYPED_MOE_SGLANG": mode, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log[-4000:]
    (line,) = (line for line in out.splitlines() if line.startswith("TOKENS "))
    tokens = json.loads(line.removeprefix("TOKENS "))
    return Served(tokens=tokens, log=log, parent=process.pid)


def test_the_same_tokens_with_our_backend(tmp_path: Path) -> None:
    """transformers', and the scheduler child says which runner computed them."""
    checkpoint(QWEN3, tmp_path)
    served = serve(tmp_path, "typed_moe", "observe")
    assert served.tokens == expected(tmp_path)
    assert len(served.processes(QWEN3.strategy) - {str(served.parent)}) == 1
    assert "on the reference kernel" in served.log


@pytest.mark.parametrize("model", MODELS[1:], ids=lambda model: model.model_type)
def test_a_model_runner_by_itself(model: Model, tmp_path: Path) -> None:
    """SGLang's `ModelRunner` without a scheduler: transformers' logits at every step."""
    from transformers import AutoModelForCausalLM

    checkpoint(model, tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.sglang.model_runner_run",
            tmp_path,
            "typed_moe",
        ],
        env={**os.environ, "TYPED_MOE_TEST_MODEL": model.model_type},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    assert found["tokens"] == expected(tmp_path)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([PROMPTS[0] + found["tokens"][:-1]])).logits[0]
    torch.testing.assert_close(
        torch.tensor(found["logits"]), logits[len(PROMPTS[0]) - 1 :], rtol=1e-4, atol=1e-5
    )
    assert len(found["ran"]) == COMMON["num_hidden_layers"]
    assert all(line.startswith(model.strategy) for line in found["ran"])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="SGLang binds each rank to a core")
@pytest.mark.parametrize(
    ("model", "ep"),
    [(MODELS[2], 1), (MODELS[1], 2)],
    ids=["glm4_moe tensor parallel", "qwen2_moe expert parallel"],
)
def test_two_ranks(model: Model, ep: int, tmp_path: Path) -> None:
    """Two schedulers over gloo, each with half of every expert, or with half of the experts."""
    checkpoint(model, tmp_path)
    served = serve(
        tmp_path,
        "typed_moe",
        "observe",
        tp=2,
        ep=ep,
        TYPED_MOE_TEST_MODEL=model.model_type,
        SGLANG_CPU_OMP_THREADS_BIND="0|1",
    )
    assert served.tokens == expected(tmp_path)
    assert len(served.processes(model.strategy) - {str(served.parent)}) == 2


def test_the_same_tokens_without_the_plugin(tmp_path: Path) -> None:
    checkpoint(QWEN3, tmp_path)
    served = serve(tmp_path, "auto", "off")
    assert served.tokens == expected(tmp_path)
    assert "on the reference kernel" not in served.log


def test_the_model_of_the_docs(tmp_path: Path) -> None:
    """`FusedMoE(..., routing=RenormalizeNaive())` in a package of one's own, on any backend."""
    checkpoint(QWEN3, tmp_path)
    served = serve(
        tmp_path,
        "auto",
        "observe",
        SGLANG_EXTERNAL_MODEL_PACKAGE="sglang_models",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "docs" / "examples")]),
    )
    assert served.tokens == expected(tmp_path)
    assert (
        "model.layers.0.mlp.experts runs RenormalizeNaive() on the reference kernel" in served.log
    )
