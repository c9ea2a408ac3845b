"""Settings: what is right by type, and what is wrong. Never executed: read by mypy and pyright."""

from __future__ import annotations

from typing import Literal, assert_never, assert_type

from typed_moe import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Placement,
    Unquantized,
)

placement = Placement(tp_size=2, tp_rank=1, ep_size=4, ep_rank=0)
assert_type(placement.num_local_experts(128), int)
assert_type(placement.local_expert_offset(128), int)
assert_type(Fp8BlockScale().name, Literal["fp8_block"])
assert_type(MxFp4(activation="mxfp8").activation, Literal["bf16", "mxfp8"])

any_format: list[Format] = [
    Unquantized(),
    Bf16(),
    Fp8PerTensor(),
    Fp8PerChannel(),
    Fp8BlockScale(),
    MxFp8(),
    Nvfp4(),
    MxFp4(activation="bf16"),
    MxInt4(),
]


def bits(fmt: Format) -> int:
    """A user's `match` over the formats can be complete, and the checker says when it is not."""
    match fmt:
        case Unquantized():
            return 32
        case Bf16():
            return 16
        case Fp8PerTensor() | Fp8PerChannel() | Fp8BlockScale() | MxFp8():
            return 8
        case Nvfp4() | MxFp4() | MxInt4():
            return 4
        case _:
            assert_never(fmt)


def wrong_settings() -> None:
    """Each line is an error."""
    Placement(2, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Placement(tp_size="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Placement(world_size=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    placement.ep_rank = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    MxFp4(activation="fp8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MxFp4("mxfp8")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Fp8BlockScale(block=(128, 128))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    by_name: Format = "fp8_block"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    by_class: Format = Fp8BlockScale  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


def incomplete(fmt: Format) -> int:
    """A format is missing: named by `assert_never`."""
    match fmt:
        case Unquantized() | Bf16():
            return 16
        case Fp8PerTensor() | Fp8PerChannel() | Fp8BlockScale() | MxFp8():
            return 8
        case MxFp4() | MxInt4():
            return 4
        case _:
            assert_never(fmt)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
