"""One `sglang.Engine` on a CPU, in a process of its own: `python -m tests.sglang.engine_run DIR BACKEND`.

Prints one JSON object: the greedy tokens after PROMPTS. The scheduler is a child of this process, and
imports this module first, so that it has the stand-ins too.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.sglang import stand_ins
from tests.sglang.prompts import NEW_TOKENS, PROMPTS

stand_ins.install()
if os.environ.get("TYPED_MOE_TEST_MODEL") == "qwen2_moe":
    stand_ins.install_qwen2_gate()


def main(folder: str, backend: str, tp_size: str = "1", ep_size: str = "1") -> None:
    """Start, generate, stop."""
    from sglang import Engine

    engine = Engine(
        model_path=folder,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        moe_runner_backend=backend,
        tp_size=int(tp_size),
        ep_size=int(ep_size),
        skip_tokenizer_init=True,
        max_total_tokens=512,
        disable_radix_cache=True,
        random_seed=0,
        log_level="info",
    )
    try:
        outputs = engine.generate(
            input_ids=PROMPTS,
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": NEW_TOKENS,
                "ignore_eos": True,
            },
        )
        tokens = [output["output_ids"] for output in outputs]
    finally:
        engine.shutdown()
    sys.stdout.write("TOKENS " + json.dumps(tokens) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
