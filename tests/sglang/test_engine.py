"""A real `sglang.Engine`, its scheduler in a process of its own, beside transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch

from tests.sglang.engine_run import NEW_TOKENS, PROMPTS

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).parents[2]


@attrs.frozen(kw_only=True)
class Served:
    """What one engine said."""

    tokens: list[list[int]]
    log: str


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE as transformers saves it, whose experts and gates matter."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig.from_dict(
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
    )
    model = Qwen3MoeForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-qwen3-moe")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """transformers' greedy tokens."""
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found: list[list[int]] = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([tokens])).logits[0, -1]
                tokens.append(int(logits.argmax()))
        found.append(tokens[len(prompt) :])
    return found


def serve(folder: Path, backend: str, mode: str, **environment: str) -> Served:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.sglang.engine_run", str(folder), backend],
        env={**os.environ, "TYPED_MOE_SGLANG": mode, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    return Served(tokens=json.loads(line.removeprefix("TOKENS ")), log=done.stderr)


def test_the_same_tokens_with_our_backend(checkpoint: Path, expected: list[list[int]]) -> None:
    """transformers', and the scheduler child says which runner computed them."""
    served = serve(checkpoint, "typed_moe", "observe")
    assert served.tokens == expected
    assert (
        "model.layers.0.mlp.experts runs RenormalizeNaive() on the reference kernel" in served.log
    )


def test_the_same_tokens_without_the_plugin(checkpoint: Path, expected: list[list[int]]) -> None:
    served = serve(checkpoint, "auto", "off")
    assert served.tokens == expected
    assert "on the reference kernel" not in served.log


def test_the_model_of_the_docs(checkpoint: Path, expected: list[list[int]]) -> None:
    """`FusedMoE(..., routing=RenormalizeNaive())` in a package of one's own, on any backend."""
    served = serve(
        checkpoint,
        "auto",
        "observe",
        SGLANG_EXTERNAL_MODEL_PACKAGE="sglang_models",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "docs" / "examples")]),
    )
    assert served.tokens == expected
    assert (
        "model.layers.0.mlp.experts runs RenormalizeNaive() on the reference kernel" in served.log
    )
