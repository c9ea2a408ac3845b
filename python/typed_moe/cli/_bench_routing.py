"""`typed-moe bench routing`: the fused routing kernel on this GPU, beside other ways to route."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, Protocol, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_clock import Clocks, poisoned
from typed_moe.cli._errors import UserError
from typed_moe.cli._progress import Steps
from typed_moe.kernels import SortedSlots, SortRequest, fused_routing, sort_slots
from typed_moe.models import load_config, moe_layer_ids, moe_spec
from typed_moe.routing import (
    BiasRule,
    DeepSeekV3,
    InKernel,
    Refused,
    Renormalize,
    Routed,
    RoutingShape,
    RoutingStrategy,
    SigmoidRenorm,
)
from typed_moe.testing._oracle import route_float64

TOKENS = (1, 8, 64, 512, 4096, 16384)
BLOCK = 64
_CALLS = 20
_CONFIGS = (
    "qwen3-30b-a3b",
    "qwen3-next-80b-a3b",
    "deepseek-v3",
    "kimi-k2",
    "llama4-scout",
    "llama4-maverick",
    "gpt-oss-120b",
    "glm-4.5-air",
    "olmoe-1b-7b",
    "minimax-m2",
    "deepseek-v2",
    "deepseek-v4-flash",
)
_SETTINGS = (
    "num_expert_group",
    "topk_group",
    "group_score",
    "norm_topk_prob",
    "routed_scaling_factor",
)
_BF16_WEIGHTS = 2.0**-8

Way = Literal[
    "route",
    "route_bf16",
    "route_and_slots",
    "sort_slots",
    "topk_softmax",
    "select_experts",
    "flashinfer",
]
WAYS: tuple[tuple[Way, str], ...] = (
    ("route", "the fused kernel: float32 logits to ids and weights"),
    ("route_bf16", "the same from bfloat16 logits"),
    ("route_and_slots", f"with the slots sorted by expert, in blocks of {BLOCK}"),
    ("sort_slots", "the slots of given ids alone"),
    ("topk_softmax", "torch.topk and torch.softmax: no bias, no groups, no order of ties"),
    ("select_experts", "the strategy in PyTorch"),
    ("flashinfer", "FlashInfer's kernels: ids, weights and a permutation, without its Python"),
)
"""What is timed, and what it is."""


@final
@attrs.frozen(kw_only=True)
class Router:
    """One model's routing.

    Attributes:
        name: on the command line.
        strategy: as the model's, taking logits in any dtype.
        shape: E and k.
    """

    name: str
    strategy: RoutingStrategy
    shape: RoutingShape


def _released(name: str) -> Router:
    config = load_config(name)
    spec = moe_spec(config, moe_layer_ids(config)[-1])
    strategy = spec.routing
    if isinstance(strategy, DeepSeekV3):
        strategy = attrs.evolve(strategy, router_logits_dtype=None)
    shape = RoutingShape(num_experts=spec.num_experts, top_k=spec.top_k)
    return Router(name=name, strategy=strategy, shape=shape)


_MADE_UP = (
    Router(
        name="sigmoid-renorm-128",
        strategy=SigmoidRenorm(),
        shape=RoutingShape(num_experts=128, top_k=8),
    ),
    Router(
        name="largest-2048",
        strategy=Renormalize(),
        shape=RoutingShape(num_experts=2048, top_k=32),
    ),
)
ROUTER_NAMES: tuple[str, ...] = (*_CONFIGS, *(router.name for router in _MADE_UP))
"""What `--model` takes: shipped configs, a method that none of them has, and the largest size."""


def chosen_routers(names: tuple[str, ...]) -> tuple[Router, ...]:
    """Those of these names; all, where there are none.

    Raises:
        UserError: no such name.
    """
    unknown = [name for name in names if name not in ROUTER_NAMES]
    if unknown:
        raise UserError(f"--model is {unknown[0]!r}; allowed: {', '.join(ROUTER_NAMES)}")
    made_up = {router.name: router for router in _MADE_UP}
    asked = dict.fromkeys(names or ROUTER_NAMES)
    return tuple(made_up[name] if name in made_up else _released(name) for name in asked)


class Fused(Protocol):
    """**Protocol:** `FusedRouting`."""

    def __call__(self, router_logits: Tensor, e_score_correction_bias: Tensor | None, /) -> Routed:
        """Ids and weights."""
        ...

    def with_slots(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        request: SortRequest,
        /,
    ) -> tuple[Routed, SortedSlots]:
        """And the sorted slots."""
        ...


class LibraryCall(Protocol):
    """**Protocol:** FlashInfer's routing kernels, from a library that was built for this card."""

    def prepared(
        self, told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int, /
    ) -> tuple[Routed, Callable[[], object]]:
        """The choice, and the library's own call that makes it.

        Raises:
            RuntimeError: the kernels refuse the call.
        """
        ...


@final
@attrs.frozen(kw_only=True)
class RoutingRow:
    """One router at one T.

    Attributes:
        model, strategy, num_experts, top_k, tokens: whose.
        us: microseconds per call in a CUDA graph, by way; those that are wrong or refused have none.
        reasons: of those.
        rows_changed_by_bf16: rows whose set of experts is another from bfloat16 logits; None where
            the fused kernel is wrong.
    """

    model: str
    strategy: str
    num_experts: int
    top_k: int
    tokens: int
    us: dict[Way, float]
    reasons: dict[Way, str]
    rows_changed_by_bf16: int | None


@torch.no_grad()
def bench_routing(
    clocks: Clocks,
    routers: Sequence[Router],
    tokens: Sequence[int],
    library: LibraryCall | None,
    steps: Steps,
) -> Iterator[RoutingRow]:
    """Row by row, as they are measured.

    Raises:
        UserError: the fused kernel does not run on the device.
    """
    for router in routers:
        fused = _fused(router, clocks.device)
        with steps.step(router.name, total=len(tokens)) as step:
            for count in tokens:
                yield _Case(clocks, router, fused, count, library).row()
                step.advance()


def _fused(router: Router, device: torch.device) -> Fused:
    made = fused_routing(router.strategy, shape=router.shape, device=device)
    if isinstance(made, Refused):
        raise UserError(f"the fused routing kernel, {router.strategy.name}: {made.reason}")
    return made


@final
class _Case:
    """One T: logits, bias and the oracle's choice."""

    def __init__(
        self,
        clocks: Clocks,
        router: Router,
        fused: Fused,
        tokens: int,
        library: LibraryCall | None,
    ) -> None:
        self._clocks, self._router, self._fused = clocks, router, fused
        self._tokens, self._library = tokens, library
        device, experts = clocks.device, router.shape.num_experts
        generator = torch.Generator(device=device).manual_seed(tokens)
        self._logits = 2.0 * torch.randn(tokens, experts, generator=generator, device=device)
        bias = 0.1 * torch.randn(experts, generator=generator, device=device)
        # A grouped kernel of FlashInfer's reads a bfloat16 bias; all sides get that one.
        self._bias = None if router.strategy.bias is BiasRule.NONE else bias.bfloat16().float()
        settings = {
            name: getattr(router.strategy, name)
            for name in _SETTINGS
            if hasattr(router.strategy, name)
        }
        self._oracle = route_float64(
            self._logits.cpu(),
            None if self._bias is None else self._bias.cpu(),
            method=router.strategy.name,
            top_k=router.shape.top_k,
            **settings,
        )
        self._us: dict[Way, float] = {}
        self._reasons: dict[Way, str] = {}

    def row(self) -> RoutingRow:
        """Check and time every way."""
        shape = self._router.shape
        changed = self._time_fused()
        best = partial(torch.topk, self._logits, shape.top_k, dim=-1)
        self._time("topk_softmax", lambda: torch.softmax(best().values, dim=-1))
        self._time_select()
        if self._library is not None:
            self._time_library(self._library)
        return RoutingRow(
            model=self._router.name,
            strategy=self._router.strategy.name,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            tokens=self._tokens,
            us=self._us,
            reasons=self._reasons,
            rows_changed_by_bf16=changed,
        )

    def _time_fused(self) -> int | None:
        """All that the fused kernel does; nothing of it where its choice or its slots are wrong."""
        fused, logits, bias = self._fused, self._logits, self._bias
        half = logits.bfloat16()
        request = SortRequest(
            first_local=0, num_local=self._router.shape.num_experts, block_size=BLOCK
        )
        with poisoned():
            routed, slots = fused.with_slots(logits, bias, request)
            alone = fused(logits, bias)
        wrong = self._wrong(alone, 0.0) or self._wrong(routed, 0.0) or wrong_slots(routed, slots)
        if wrong:
            for way in ("route", "route_bf16", "route_and_slots", "sort_slots"):
                self._reasons[way] = wrong
            return None
        self._time("route", partial(fused, logits, bias))
        self._time("route_bf16", partial(fused, half, bias))
        self._time("route_and_slots", partial(fused.with_slots, logits, bias, request))
        self._time("sort_slots", partial(_sort_slots, routed.topk_ids, request))
        mine, other = (
            one.sort(dim=1).values for one in (alone.topk_ids, fused(half, bias).topk_ids)
        )
        return int((mine != other).any(dim=1).sum())

    def _time_select(self) -> None:
        select = partial(
            self._router.strategy.select_experts,
            self._logits,
            self._bias,
            shape=self._router.shape,
        )
        wrong = self._wrong(select(), 0.0)
        if wrong:
            self._reasons["select_experts"] = wrong
        else:
            self._time("select_experts", select)

    def _time_library(self, library: LibraryCall) -> None:
        """FlashInfer's, which it refuses for some methods and sizes."""
        from typed_moe.kernels.reference import REFERENCE_RULES  # noqa: PLC0415 - all methods

        told = self._router.strategy.in_kernel(self._router.shape, REFERENCE_RULES)
        if isinstance(told, Refused):
            self._reasons["flashinfer"] = "no such method"
            return
        bias = self._bias
        if bias is not None and (told.n_group or 1) > 1:
            bias = bias.bfloat16()
        try:
            routed, call = library.prepared(told, self._logits, bias, self._router.shape.top_k)
        except (RuntimeError, ValueError, KeyError) as refused:
            self._reasons["flashinfer"] = (str(refused).strip().splitlines() or ["refused"])[-1]
            return
        wrong = self._wrong(routed, _BF16_WEIGHTS)
        if wrong:
            self._reasons["flashinfer"] = wrong
        else:
            self._time("flashinfer", call)

    def _time(self, way: Way, call: Callable[[], object]) -> None:
        self._us[way] = self._clocks.graph([call] * _CALLS)

    def _wrong(self, routed: Routed, rounding: float) -> str:
        """What is wrong with a choice on the rows that float32 decides; nothing: an empty string."""
        decided = ~self._oracle.undecided()
        ids, order = routed.topk_ids.long().cpu()[decided].sort(dim=1)
        expected, theirs = self._oracle.ids[decided].sort(dim=1)
        if not torch.equal(ids, expected):
            rows = int((ids != expected).any(dim=1).sum())
            return f"wrong: {rows} of {len(ids)} decided rows have other experts than the oracle"
        weights = routed.topk_weights.double().cpu()[decided].gather(1, order)
        right = self._oracle.weights[decided].gather(1, theirs)
        if not torch.allclose(weights, right, rtol=1e-4 + rounding, atol=1e-6):
            return f"wrong: a weight is {float((weights - right).abs().max()):.2g} off the oracle's"
        return ""


def _sort_slots(ids: Tensor, request: SortRequest) -> SortedSlots:
    return sort_slots(ids, request)


def wrong_slots(routed: Routed, slots: SortedSlots) -> str:
    """What is wrong with sorted slots: each stands once, in a block of its expert's."""
    ids = routed.topk_ids.flatten().long().cpu()
    # What lies behind the last expert is not written.
    places = slots.slots[: int(slots.offsets[-1])].long().cpu()
    filled = places < ids.numel()
    if not torch.equal(places[filled].sort().values, torch.arange(ids.numel())):
        return "wrong: the sorted slots are not every slot once"
    blocks = torch.arange(places.numel())[filled] // slots.block_size
    if not torch.equal(slots.block_experts.long().cpu()[blocks], ids[places[filled]]):
        return "wrong: a sorted slot is in another expert's block"
    return ""
