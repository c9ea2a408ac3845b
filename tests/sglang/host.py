"""SGLang's process state, as its own start-up makes it, with a world of one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

_GROUPS = (
    "world_group",
    "tp_group",
    "pp_group",
    "attn_tp_group",
    "attn_cp_group",
    "moe_ep_group",
    "moe_tp_group",
    "moe_dp_group",
)


def publish(moe_runner_backend: str = "auto", device: str = "cpu") -> None:
    """Server arguments, and a gloo world of one; again with another backend keeps the world."""
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, reset_context
    from sglang.srt.runtime_context import publish as publish_context
    from sglang.srt.server_args import ServerArgs

    groups = _groups() if torch.distributed.is_initialized() else {}
    reset_context()
    arguments = ServerArgs(model_path="dummy", device=device, moe_runner_backend=moe_runner_backend)
    publish_context(arguments, role="test", ranks=SpawnRanks(world_rank=0))
    if groups:
        get_parallel().override_permanently(**groups)
    _make_groups()
    initialize_moe_config()


def _groups() -> dict[str, object]:
    from sglang.srt.runtime_context import get_parallel

    found: dict[str, object] = {}
    for name in _GROUPS:
        try:
            found[name] = getattr(get_parallel(), name)
        except (RuntimeError, AttributeError):
            continue  # a group that a world of one does not make
    return found


def _make_groups() -> None:
    from sglang.srt.distributed import parallel_state

    if not torch.distributed.is_initialized():
        rendezvous = Path(tempfile.mkdtemp(prefix="typed-moe-sglang-")) / "store"
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            backend="gloo",
            distributed_init_method=f"file://{rendezvous}",
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(backend="gloo")
