"""What SGLang can be set up to do that our runners are not there for, and the refusal of it."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from typed_moe.errors import UnsupportedRouting
from typed_moe.sglang._seam import ConfigLike, SeamLayerLike


class _Moe(Protocol):
    enable_paged_experts: bool
    ep_join_mode: str | None
    enable_eplb: bool
    ep_num_redundant_experts: int
    init_expert_location: str
    expert_distribution_recorder_mode: str | None
    kt_weight_path: str | None


class _Features(Protocol):
    enable_return_routed_experts: bool


class _Execution(Protocol):
    moe: _Moe
    features: _Features


class _Lora(Protocol):
    enable_lora: bool | None
    lora_paths: object


class _Parallel(Protocol):
    dwdp_size: int


class _Context(Protocol):
    """`sglang.srt.runtime_context`: the configuration as SGLang has resolved it."""

    def get_exec(self) -> _Execution: ...
    def get_lora(self) -> _Lora: ...
    def get_parallel(self) -> _Parallel: ...


def _context() -> _Context:
    return cast("_Context", importlib.import_module("sglang.srt.runtime_context"))


def refuse_server(name: str, layer: SeamLayerLike, config: ConfigLike) -> None:
    """Refuse what the server or the model asks for and our runners do not do.

    Raises:
        UnsupportedRouting: with what was asked, and what to do.
    """
    context = _context()
    moe, lora, width = context.get_exec().moe, context.get_lora(), context.get_parallel().dwdp_size
    utils = importlib.import_module("sglang.srt.layers.moe.utils")
    a2a = str(utils.get_moe_a2a_backend().value)
    common = importlib.import_module("sglang.srt.utils")
    elsewhere = [
        platform
        for platform in ("hip", "npu", "xpu", "musa")
        if getattr(common, f"is_{platform}")()
    ]
    asked: dict[str, object] = {
        f"--moe-a2a-backend {a2a}": a2a != "none",
        "--enable-lora": lora.enable_lora or lora.lora_paths,
        "--enable-paged-experts": moe.enable_paged_experts,
        f"--ep-join-mode {moe.ep_join_mode}": moe.ep_join_mode is not None,
        f"--dwdp-size {width}": width > 1,
        "--kt-weight-path": moe.kt_weight_path,
        f"a device of {' and '.join(elsewhere)}": elsewhere,
        "no_combine, which gives each expert's output by itself": config.no_combine,
        f"{config.num_fused_shared_experts} fused shared experts under expert parallelism, which "
        "every rank would add (--disable-shared-experts-fusion)": (
            config.num_fused_shared_experts and layer.moe_ep_size > 1
        ),
    }
    wrong = [what for what, is_asked in asked.items() if is_asked]
    if wrong:
        raise UnsupportedRouting(
            f"{name}: typed-moe's runners in SGLang do not serve {'; '.join(wrong)}. Leave it out, or "
            "choose another --moe-runner-backend"
        )


def ids_are_wanted() -> str | None:
    """Why SGLang's TopK has to route by itself in this process; None: it does not.

    Experts that move between ranks, or are recorded or returned, are known by the ids that a TopK
    writes: a kernel that routes by itself writes none.
    """
    execution = _context().get_exec()
    moe = execution.moe
    asked: dict[str, object] = {
        "--enable-eplb": moe.enable_eplb,
        "--ep-num-redundant-experts": moe.ep_num_redundant_experts,
        "--init-expert-location": moe.init_expert_location != "trivial",
        "--expert-distribution-recorder-mode": moe.expert_distribution_recorder_mode,
        "--enable-return-routed-experts": execution.features.enable_return_routed_experts,
    }
    wanted = [what for what, is_asked in asked.items() if is_asked]
    return " and ".join(wanted) if wanted else None
