"""The contract that every routing strategy keeps, as one check.

Shapes: T tokens, E experts, k = top_k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from typed_moe.kernels import FromLogits, route_reference
from typed_moe.kernels.reference import REFERENCE_RULES
from typed_moe.routing import (
    BiasRule,
    InKernel,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
)

_TOKENS = (0, 1, 5, 64)


def check_strategy(
    strategy: RoutingStrategy, *, num_experts: int, top_k: int, ties: bool = True, seed: int = 0
) -> None:
    """Check that a strategy keeps the contract of `RoutingStrategy`.

    Checked: shapes and dtypes; ids in range and distinct within a row; finite weights, for
    all-negative and large logits too; the same answer twice, for a strided view, and for a row
    alone or among others; rows of NaN or -inf (valid distinct ids, weight 0, other rows
    untouched); ties; T = 0; a missing bias; no synchronisation with the host (it runs on
    torch's meta device); and, where the strategy has an in-kernel form, that the
    kernel told so chooses what the strategy chooses.

    Args:
        strategy: the one to check.
        num_experts: E of the layer to check it for.
        top_k: k of the layer.
        ties: whether equal logits are a tie, which goes to the lower id. False for a rule that
            prefers some experts whatever the logits.
        seed: of the random logits.

    Raises:
        AssertionError: a sentence that says what the contract is and what was found.
        ValueError: the strategy's `check` refuses the layer.
    """
    shape = RoutingShape(num_experts=num_experts, top_k=top_k)
    case = _Case(strategy, shape, seed)
    strategy.check(shape)
    _check_name(strategy)
    for tokens in _TOKENS:
        _check_result(case, case.logits(tokens))
    for scale, shift in ((1.0, -20.0), (30.0, 0.0), (1.0, 100.0)):
        _check_result(case, case.logits(32) * scale + shift)
    _check_repeatable(case)
    _check_unusable_rows(case)
    if ties:
        _check_ties(case)
    _check_bias(case)
    _check_low_precision(case)
    _check_no_synchronisation(case)
    _check_in_kernel(case)


class _Case:
    """A strategy with the layer and the inputs it is checked on."""

    def __init__(self, strategy: RoutingStrategy, shape: RoutingShape, seed: int) -> None:
        self.strategy = strategy
        self.shape = shape
        self._generator = torch.Generator().manual_seed(seed)
        self.bias: Tensor | None = None
        if strategy.bias is BiasRule.REQUIRED:
            self.bias = torch.randn(shape.num_experts, generator=self._generator) * 0.1

    def logits(self, tokens: int) -> Tensor:
        """(T, E) float32, normal with deviation 2."""
        return 2.0 * torch.randn(tokens, self.shape.num_experts, generator=self._generator)

    def select(self, logits: Tensor) -> Routed:
        """The strategy on these logits."""
        return self.strategy.select_experts(logits, self.bias, shape=self.shape)


def _expect(held: bool, contract: str) -> None:
    if not held:
        raise AssertionError(contract)


def _check_name(strategy: RoutingStrategy) -> None:
    name: object = strategy.name
    _expect(isinstance(name, str) and bool(name), f"a strategy's name is text; got {name!r}")


def _check_result(case: _Case, logits: Tensor) -> None:
    name, shape = case.strategy.name, case.shape
    result: object = case.select(logits)
    _expect(isinstance(result, Routed), f"{name} returns Routed; got {type(result).__name__}")
    assert isinstance(result, Routed)
    ids, weights = result.topk_ids, result.topk_weights
    wanted = (logits.shape[0], shape.top_k)
    _expect(tuple(ids.shape) == wanted, f"{name}: topk_ids is {wanted}; got {tuple(ids.shape)}")
    _expect(ids.dtype is torch.int32, f"{name}: topk_ids is int32; got {ids.dtype}")
    _expect(weights.dtype is torch.float32, f"{name}: topk_weights is float32; got {weights.dtype}")
    _check_ids(name, ids, shape)
    _expect(bool(weights.isfinite().all()), f"{name}: weights are finite for finite logits")


def _check_ids(name: str, ids: Tensor, shape: RoutingShape) -> None:
    inside = bool(((ids >= 0) & (ids < shape.num_experts)).all())
    _expect(
        inside,
        f"{name}: ids are 0 to {shape.num_experts - 1}; got {sorted(set(ids.flatten().tolist()))}",
    )
    ordered = ids.sort(dim=-1).values
    distinct = bool((ordered[:, 1:] != ordered[:, :-1]).all())
    _expect(distinct, f"{name}: the ids of a row are distinct")


def _same(left: Routed, right: Routed) -> bool:
    return torch.equal(left.topk_ids, right.topk_ids) and torch.equal(
        left.topk_weights, right.topk_weights
    )


def _check_repeatable(case: _Case) -> None:
    name = case.strategy.name
    logits = case.logits(16)
    kept = logits.clone()
    first = case.select(logits)
    _expect(torch.equal(logits, kept), f"{name} leaves its input as it was")
    case.select(case.logits(7))
    _expect(_same(first, case.select(logits)), f"{name} has no state between calls")
    wide = torch.full((16, case.shape.num_experts + 8), torch.nan)
    wide[:, : case.shape.num_experts] = logits
    strided = case.select(wide[:, : case.shape.num_experts])
    _expect(_same(first, strided), f"{name} reads a strided view as the contiguous tensor")
    alone = case.select(logits[3:4])
    row = Routed(topk_ids=first.topk_ids[3:4], topk_weights=first.topk_weights[3:4])
    _expect(_same(row, alone), f"{name} routes a token alone as among others")


def _check_unusable_rows(case: _Case) -> None:
    name = case.strategy.name
    clean = case.logits(6)
    broken = clean.clone()
    broken[1] = torch.nan
    broken[2] = -torch.inf
    broken[4, case.shape.num_experts // 2] = torch.nan
    before, after = case.select(clean), case.select(broken)
    _check_ids(name, after.topk_ids, case.shape)
    bad = [1, 2, 4]
    _expect(
        bool((after.topk_weights[bad] == 0).all()),
        f"{name}: a row with a NaN, or of -inf alone, has weight 0; got "
        f"{after.topk_weights[bad].tolist()}. typed_moe.routing.float_logits and routed do that",
    )
    good = [0, 3, 5]
    _expect(
        torch.equal(after.topk_ids[good], before.topk_ids[good])
        and torch.equal(after.topk_weights[good], before.topk_weights[good]),
        f"{name}: a broken row leaves the others bit-identical",
    )


def _check_ties(case: _Case) -> None:
    bias = case.bias
    case.bias = None if bias is None else torch.zeros_like(bias)
    ids = case.select(torch.zeros(2, case.shape.num_experts)).topk_ids
    case.bias = bias
    wanted = list(range(case.shape.top_k))
    got = ids.sort(dim=-1).values.tolist()
    _expect(
        got == [wanted, wanted],
        f"{case.strategy.name}: ties go to the lower id, so equal logits choose {wanted}; got "
        f"{got[0]}. torch.topk promises no order: typed_moe.routing.top_k_ids does",
    )


def _check_bias(case: _Case) -> None:
    if case.strategy.bias is BiasRule.NONE:
        return
    _expect_error(
        ValueError,
        lambda: case.strategy.select_experts(case.logits(2), None, shape=case.shape),
        f"{case.strategy.name} asks for a bias, so None raises ValueError",
    )


def _check_low_precision(case: _Case) -> None:
    """bfloat16 logits route as their float32 copies, or are refused where float32 is asked."""
    name = case.strategy.name
    logits = case.logits(16).bfloat16()
    if case.strategy.router_logits_dtype is torch.float32:
        _expect_error(
            TypeError,
            lambda: case.select(logits),
            f"{name} asks for float32 logits, so bfloat16 raises TypeError",
        )
        return
    _expect(
        _same(case.select(logits), case.select(logits.float())),
        f"{name}: bfloat16 logits route as the same values in float32",
    )


def _expect_error(error: type[Exception], call: Callable[[], object], contract: str) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(contract)


def _check_no_synchronisation(case: _Case) -> None:
    """Reading a value back to the host fails on the meta device, which holds none."""
    bias = None if case.bias is None else case.bias.to("meta")
    logits = torch.empty(4, case.shape.num_experts, device="meta")
    try:
        case.strategy.select_experts(logits, bias, shape=case.shape)
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"{case.strategy.name} does not synchronise with the host, so it runs on torch's meta "
            f"device; there it failed: {error}"
        ) from error


def _check_in_kernel(case: _Case) -> None:
    """The kernel told the strategy's arguments chooses what the strategy chooses."""
    strategy, shape = case.strategy, case.shape
    told = strategy.in_kernel(shape, REFERENCE_RULES)
    if not isinstance(told, InKernel):
        return
    logits = case.logits(64)
    by_kernel = route_reference(
        FromLogits(
            routing_logits=logits,
            routing_bias=case.bias,
            n_group=told.n_group,
            topk_group=told.topk_group,
            routed_scaling_factor=told.routed_scaling_factor,
            routing_method_type=told.routing_method_type,
            norm_topk_prob=told.norm_topk_prob,
            use_routing_scales_on_input=told.use_routing_scales_on_input,
        ),
        shape.top_k,
    )
    mine = case.select(logits)
    order, kernel_order = mine.topk_ids.argsort(), by_kernel.topk_ids.argsort()
    same_ids = torch.equal(
        mine.topk_ids.gather(1, order), by_kernel.topk_ids.gather(1, kernel_order)
    )
    _expect(
        same_ids,
        f"{strategy.name}: the kernel routing as {told.routing_method_type} chooses the same "
        "experts as select_experts",
    )
    factor = strategy.scale(RoutingForm.IN_KERNEL).factor
    _expect(
        torch.allclose(
            mine.topk_weights.gather(1, order),
            by_kernel.topk_weights.gather(1, kernel_order),
            rtol=1e-5,
            atol=1e-6 * max(1.0, factor),
        ),
        f"{strategy.name}: the kernel routing as {told.routing_method_type} gives the weights that "
        "select_experts gives",
    )
