"""Every format in shards, in one process: the shards' sum is the whole layer's output."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.shards import NAMES, Rows, expected, rows_of, shard, tokens
from typed_moe import Placement

formats = pytest.mark.parametrize("name", NAMES)


@formats
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_acceptance_46_shards_of_every_format_add_up(name: str, ranks: int) -> None:
    """flashinfer#3547, aiter#3995: EP 1, 2, 4, 8 alike; a shard with an offset is not zero."""
    rows = Rows()
    for count in (1, 8, 32, 256):
        x, logits = tokens(count)
        top = logits.topk(2).indices
        total = torch.zeros_like(x)
        for rank in range(ranks):
            part = shard(name, Placement(ep_size=ranks, ep_rank=rank))(x, logits)
            owns = (top // (8 // ranks) == rank).any(1)
            assert torch.equal((part != 0).any(1), owns)
            total += part
        rows.add(total, expected(name, count))
    rows.check()


@formats
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_tensor_parallel_shards_of_every_format_add_up(name: str, ep_size: int) -> None:
    """TP 2, by itself and within EP 2 and 4."""
    rows = rows_of(name, 2)
    for count in (1, 8, 32, 256):
        x, logits = tokens(count)
        parts = [
            shard(name, Placement(tp_size=2, tp_rank=tp, ep_size=ep_size, ep_rank=ep))(x, logits)
            for ep in range(ep_size)
            for tp in range(2)
        ]
        rows.add(torch.stack(parts).sum(0), expected(name, count))
    rows.check()
