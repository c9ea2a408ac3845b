"""SGLang's `ModelRunner` by itself on a CPU: `python -m tests.sglang.model_runner_run DIR BACKEND`.

Prints one JSON object: the logits (steps, V) after the first of PROMPTS, the greedy tokens, and what ran
each layer's experts. No scheduler and no server: SGLang's loader, its model, and the steps of its one-batch
benchmark.
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


def main(folder: str, backend: str) -> None:
    """Load, prefill, decode."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    from typed_moe.sglang._method import TypedMoeMethod

    load_plugins()
    arguments = ServerArgs(
        model_path=folder,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        moe_runner_backend=backend,
        skip_tokenizer_init=True,
        tokenizer_path=folder,
        max_total_tokens=512,
        disable_radix_cache=True,
        random_seed=0,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    one_batch.get_tokenizer = lambda *_, **__: None
    runner, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
    reqs = one_batch.prepare_synthetic_inputs_for_latency_test(1, len(PROMPTS[0]), [PROMPTS[0]])
    token, logits, batch = runner.extend(reqs)
    steps = [logits]
    tokens = [int(token)]
    while len(tokens) < NEW_TOKENS:
        token, logits = runner.decode(token, batch)
        steps.append(logits)
        tokens.append(int(token))
    methods = [
        getattr(module, "quant_method", None) for module in runner.torch_runner.model.modules()
    ]
    ways = [
        way
        for method in methods
        if isinstance(method, TypedMoeMethod)
        for way in method.experts._ways()
    ]
    found = {
        "tokens": tokens,
        "logits": [step[0].float().tolist() for step in steps],
        "ran": [str(way) for way in ways if way.told],
    }
    sys.stdout.write("FOUND " + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
