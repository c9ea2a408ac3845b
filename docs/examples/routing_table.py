"""What routing costs and how it spreads load, per strategy, as the tables in docs/ show it.

    python docs/examples/routing_table.py             # this machine's CPU
    python docs/examples/routing_table.py --cuda      # a CUDA device, timed in a CUDA graph

Time is `select_experts` in PyTorch, microseconds per call, the median of 20. Load is for 4096
tokens with independent normal logits: the fullest expert over the mean. A trained router is
less even; `typed-moe run MODEL --checkpoint DIR` shows a real one's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from typed_moe import (
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    SigmoidRenorm,
    SqrtSoftplus,
)
from typed_moe.routing import BiasRule

ROWS: tuple[tuple[str, RoutingStrategy, int, int], ...] = (
    ("Qwen3-30B-A3B", RenormalizeNaive(), 128, 8),
    ("Qwen3-Next-80B-A3B", RenormalizeNaive(), 512, 10),
    ("gpt-oss-120b", Renormalize(), 128, 4),
    ("OLMoE-1B-7B", Default(), 64, 8),
    (
        "DeepSeek-V3",
        DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
        256,
        8,
    ),
    ("Kimi-K2", DeepSeekV3(routed_scaling_factor=2.827), 384, 8),
    (
        "DeepSeek-V2",
        GroupedSoftmax(
            num_expert_group=8,
            topk_group=3,
            group_score="max",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
        ),
        160,
        6,
    ),
    ("DeepSeek-V4 shape", SqrtSoftplus(routed_scaling_factor=1.5), 256, 6),
    ("Llama-4-Scout", Llama4(), 16, 1),
    ("sigmoid, renormalised", SigmoidRenorm(), 128, 8),
)


def main() -> None:
    """Print the table as Markdown."""
    device = torch.device("cuda" if "--cuda" in sys.argv[1:] else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| model | strategy | E / k | T=1 | T=64 | T=4096 | fullest / mean | unused |")
    print("|---|---|---|---|---|---|---|---|")
    for model, strategy, num_experts, top_k in ROWS:
        shape = RoutingShape(num_experts=num_experts, top_k=top_k)
        times = [measure(strategy, shape, tokens, device) for tokens in (1, 64, 4096)]
        fullest, unused = load(strategy, shape, device)
        cells = " | ".join(f"{value:.0f}" for value in times)
        print(
            f"| {model} | `{strategy.name}` | {num_experts} / {top_k} | {cells} "
            f"| {fullest:.2f} | {unused} |"
        )


def inputs(
    strategy: RoutingStrategy, shape: RoutingShape, tokens: int, device: torch.device
) -> Callable[[], Routed]:
    """A call of the strategy on random logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, shape.num_experts, generator=generator).to(device)
    bias = None
    if strategy.bias is BiasRule.REQUIRED:
        bias = torch.zeros(shape.num_experts, device=device)
    return lambda: strategy.select_experts(logits, bias, shape=shape)


def measure(
    strategy: RoutingStrategy, shape: RoutingShape, tokens: int, device: torch.device
) -> float:
    """Median microseconds of one call; on a CUDA device of one replay of its graph."""
    call: Callable[[], object] = inputs(strategy, shape, tokens, device)
    for _ in range(3):
        call()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    samples = []
    for _ in range(20):
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            call()
        _wait(device)
        samples.append((time.perf_counter() - start) / 10)
    return sorted(samples)[len(samples) // 2] * 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def load(strategy: RoutingStrategy, shape: RoutingShape, device: torch.device) -> tuple[float, int]:
    """The fullest expert over the mean, and how many have no token."""
    ids = inputs(strategy, shape, 4096, device)().topk_ids.flatten().long()
    counts = torch.bincount(ids, minlength=shape.num_experts).float()
    return float(counts.max() / counts.mean()), int((counts == 0).sum())


if __name__ == "__main__":
    main()
