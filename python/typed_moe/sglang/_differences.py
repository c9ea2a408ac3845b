"""Two calls of one FlashInfer function, argument by argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import attrs
import torch
from torch import Tensor
from typing_extensions import override


@final
@attrs.frozen(kw_only=True, eq=False)
class Call:
    """One call: the function's name, and every argument by name, defaults included."""

    entry_point: str
    arguments: Mapping[str, object]


@final
@attrs.frozen(kw_only=True)
class Difference:
    """One argument that SGLang's call and ours do not agree on.

    Attributes:
        argument: its name; `entry point` where another function is called.
        sglang, ours: the values, for people.
        reason: why they may differ; None: they should not.
    """

    argument: str
    sglang: str
    ours: str
    reason: str | None

    @override
    def __str__(self) -> str:
        return f"{self.argument}: SGLang passes {self.sglang}, typed-moe {self.ours}"


MADE_PER_CALL = frozenset({"hidden_states", "hidden_states_scale", "topk_ids", "output"})
"""Tensors that each side makes for the call: dtype, shape and strides are compared, not where they are."""


def differences(theirs: Call, ours: Call) -> tuple[Difference, ...]:
    """Every argument that is not equal, with the reason where one is known.

    Tensors are equal if dtype, shape and strides are, and, but for those that a call makes, if they
    are the same memory. Nothing here reads a tensor's values.
    """
    if theirs.entry_point != ours.entry_point:
        return (
            Difference(
                argument="entry point",
                sglang=theirs.entry_point,
                ours=ours.entry_point,
                reason=None,
            ),
        )
    found: list[Difference] = []
    routed = theirs.entry_point.endswith("_routed_moe")
    for name in sorted(theirs.arguments.keys() | ours.arguments.keys()):
        first, second = theirs.arguments.get(name), ours.arguments.get(name)
        if _same(name, first, second):
            continue
        found.append(
            Difference(
                argument=name,
                sglang=_text(first),
                ours=_text(second),
                reason=_reason(name, first, second, routed=routed),
            )
        )
    return tuple(found)


def _same(name: str, first: object, second: object) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(
            _same(name, one, other) for one, other in zip(first, second, strict=True)
        )
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first == second
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    if name in MADE_PER_CALL:
        return alike and first.stride() == second.stride()
    # A tensor of settings, such as gemm1_alpha, is each side's own.
    if first.dim() == 1:
        return alike
    return alike and first.data_ptr() == second.data_ptr()


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        shape = "x".join(str(size) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} {shape}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_text(one) for one in value) + ")"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    return repr(value)


def _reason(name: str, theirs: object, ours: object, *, routed: bool) -> str | None:
    """Why a difference is meant; None for one that is not. docs/sglang.md lists them."""
    match name:
        case "tune_max_num_tokens":
            return "fixed for a layer: a value that follows each call's T profiles again and again"
        case "output" if theirs is None:
            return "the kernel writes to memory that SGLang's all-reduce can take, without a copy"
        case "enable_pdl" if ours is None:
            return "left to FlashInfer, which knows the device"
        case "hidden_states_scale_layout" if theirs is None:
            return "said, since FlashInfer deprecates leaving it out; linear is what it assumes"
        case "routed_scaling_factor" if ours is None and (routed or theirs in (None, 1.0)):
            return (
                "the weights are final"
                if routed
                else "the method has no factor, and the kernel reads None as 1.0"
            )
        case "routed_scaling_factor" if theirs is None and ours == 1.0:
            return "the kernel reads None as 1.0"
        case "routing_method_type" if routed:
            return "ids are given; TopK is the name that says so in every release"
        case "n_group" | "topk_group" if routed or _no_groups(theirs, ours):
            return "None, 0 and 1 groups are the same thing"
        case "routing_bias" if _rounded(theirs, ours):
            return "cast to bfloat16, to which the grouped kernel rounds it"
        case "routing_logits" if _kept(theirs, ours):
            return "kept as the gate gave them: rounding changes which experts are chosen"
        case "topk_ids" if _narrowed(theirs, ours):
            return "int32 ids, which is what the kernel reads; on a CPU SGLang's are int64"
        case _:
            return None


def _no_groups(theirs: object, ours: object) -> bool:
    return theirs in (None, 0, 1) and ours in (None, 0, 1)


def _rounded(theirs: object, ours: object) -> bool:
    return (
        isinstance(theirs, Tensor)
        and isinstance(ours, Tensor)
        and theirs.shape == ours.shape
        and ours.dtype == torch.bfloat16
    )


def _kept(theirs: object, ours: object) -> bool:
    return (
        isinstance(theirs, Tensor)
        and isinstance(ours, Tensor)
        and theirs.shape == ours.shape
        and theirs.dtype == torch.bfloat16
        and ours.dtype in (torch.float32, torch.bfloat16)
    )


def _narrowed(theirs: object, ours: object) -> bool:
    if not (isinstance(theirs, tuple) and isinstance(ours, tuple)):
        return False
    return (
        isinstance(theirs[0], Tensor)
        and isinstance(ours[0], Tensor)
        and theirs[0].dtype == torch.int64
        and ours[0].dtype == torch.int32
        and _same("topk_ids", theirs[1], ours[1])
    )
