"""Who multiplies by a model's routed scaling factor, in SGLang.

SGLang asks the layer (`should_fuse_routed_scaling_factor_in_topk`) whether its TopK should. If not, its
runners do, on CUDA; elsewhere some of its blocks multiply by themselves, whatever the layer has said.
So the block is looked at: its source, as installed, says whether it does.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import final

import attrs
from typing_extensions import override

from typed_moe.errors import UnsupportedRouting
from typed_moe.routing import RoutingForm, RoutingStrategy, Scale, ScaleOwner
from typed_moe.sglang._topk import TopKConfigLike


@final
@attrs.frozen(kw_only=True)
class Block:
    """The model's block around a layer.

    Attributes:
        name: its class; None: there is none.
        multiplies: it multiplies the layer's output by the factor in this process.
    """

    name: str | None
    multiplies: bool

    @classmethod
    def of(cls, block: type) -> Block:
        """The block of a class, as its module stands now."""
        on_cuda = getattr(sys.modules.get(block.__module__), "_is_cuda", True)
        return cls(
            name=f"{block.__module__}.{block.__qualname__}",
            multiplies=not on_cuda and _multiplies_off_cuda(block),
        )


@functools.cache
def _multiplies_off_cuda(block: type) -> bool:
    """Whether there is an `if not _is_cuda ...: y *= ...scaling_factor` in a class's methods."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(block)))
    except (OSError, TypeError):
        return False  # a class that was made without a file has no such branch of SGLang's
    branches = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    return any(
        "not _is_cuda" in ast.unparse(branch.test) and any(map(_scales, branch.body))
        for branch in branches
    )


def _scales(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.AugAssign)
        and isinstance(statement.op, ast.Mult)
        and ast.unparse(statement.value).endswith("scaling_factor")
    )


@final
@attrs.frozen(kw_only=True)
class Owned:
    """The factor on a layer's output.

    Attributes:
        scale: the factor, and who applies it: the routing weights (STRATEGY), the kernel or our layer
            behind it (KERNEL), or SGLang's block (HOST).
        after: what our layer multiplies the kernel's result by.
    """

    scale: Scale
    after: float = 1.0

    @override
    def __str__(self) -> str:
        if self.scale.factor == 1.0:
            return "no factor"
        who = {
            ScaleOwner.STRATEGY: "in the routing weights",
            ScaleOwner.KERNEL: "by the kernel" if self.after == 1.0 else "by our layer",
            ScaleOwner.HOST: "by the model's block",
        }
        return f"times {self.scale.factor} {who[self.scale.owner]}"


@final
@attrs.frozen(kw_only=True)
class ScaleAtSeam:
    """What is known of a layer's factor before its TopK is.

    Attributes:
        factor: the layer's `routed_scaling_factor`; 1.0 where it has none.
        block: around the layer.
    """

    factor: float
    block: Block

    def owned(
        self, strategy: RoutingStrategy, form: RoutingForm, topk: TopKConfigLike | None
    ) -> Owned:
        """Who multiplies when this strategy routes, and by what.

        Args:
            strategy: of the plan.
            form: of the plan.
            topk: the config of the TopK in front, if there is one.

        Raises:
            UnsupportedRouting: the factor would be applied twice, or two factors are named.
        """
        inside = strategy.scale(form)
        if inside.owner is ScaleOwner.HOST:
            # SGLang's TopK routes, and has multiplied; or nobody has.
            inside = Scale(factor=_in_topk(topk), owner=ScaleOwner.STRATEGY)
        if inside.factor == 1.0:
            if self.block.multiplies:
                return Owned(scale=Scale(factor=self.factor, owner=ScaleOwner.HOST))
            scale = Scale(factor=self.factor, owner=ScaleOwner.KERNEL)
            return Owned(scale=scale, after=self.factor)
        if self.block.multiplies and self.factor != 1.0:
            raise UnsupportedRouting(
                f"{strategy.name} multiplies by {inside.factor}, and {self.block.name} multiplies its "
                f"experts' output by {self.factor} by itself off CUDA: leave the factor out of one"
            )
        if self.factor not in (1.0, inside.factor):
            raise UnsupportedRouting(
                f"{strategy.name} multiplies by {inside.factor}, and the layer's "
                f"routed_scaling_factor is {self.factor}; allowed: one factor"
            )
        return Owned(scale=inside)


def _in_topk(topk: TopKConfigLike | None) -> float:
    if topk is None or not topk.apply_routed_scaling_factor_on_output:
        return 1.0
    return 1.0 if topk.routed_scaling_factor is None else topk.routed_scaling_factor
