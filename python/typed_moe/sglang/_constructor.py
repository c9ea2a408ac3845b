"""A constructor of SGLang's models, read without running it: which TopK it builds, and how.

A small interpreter of the statements that lead to a TopK, to the experts beside it and to what binds
the two. What depends on how a model is served has one answer: an NVIDIA GPU, `flashinfer_trtllm`, a
quantised checkpoint that is not GGUF, no fused shared experts.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import attrs

from typed_moe.sglang._assumptions import (
    NO_DEFAULT,
    OTHER,
    Assumptions,
    Infeasible,
    Method,
    Thing,
    Unknown,
)
from typed_moe.sglang._relevance import READ, assigned_names, relevant_statements, topk_name

SCORING = ("softmax", "sigmoid", "sqrtsoftplus")
_LAYER_METHOD = Thing("the layer's routing_method_type")
_SERVED = frozenset({"quant_config", "prefix", "alt_stream", "layer_id"})
"""Parameters that say how the model is served, or where the layer is."""


@final
@attrs.define(kw_only=True)
class Routing:
    """What one way through a constructor builds.

    Attributes:
        topk: the arguments of `TopK(...)`; empty before it is met.
        hashed: a `HashTopK` is built in its place.
        experts: the arguments of the experts that are of interest.
        bound: the number given to `bind_runner_backend`.
        binds: whether it is called.
    """

    topk: dict[str, object] = attrs.field(factory=dict)
    hashed: bool = False
    experts: dict[str, object] = attrs.field(factory=dict)
    bound: object = None
    binds: bool = False

    @property
    def method(self) -> object:
        """The number that the TopK is told, or else the experts."""
        told = self.experts.get("routing_method_type")
        return told if self.bound in (None, _LAYER_METHOD) else self.bound


class _Stop(Exception):
    pass


@final
class Constructor:
    """One `__init__`, on one path.

    Args:
        function: its source.
        assumptions: of the path.
        config: the model's own values, by name; None: every field is assumed.
        parts: which attributes a class of the model always sets to a tensor, by class name.
    """

    def __init__(
        self,
        function: ast.FunctionDef,
        assumptions: Assumptions,
        config: Mapping[str, object] | None = None,
        parts: Mapping[str, frozenset[str]] = MappingProxyType({}),
    ) -> None:
        self._function, self._assume, self._config = function, assumptions, config
        self._parts = parts
        self._assigned = assigned_names(function)
        self._names: dict[str, object] = {}
        self._relevant = relevant_statements(function)
        self.routings: list[Routing] = []
        self._experts: dict[str, object] = {}
        self._bound: tuple[object, bool] = (None, False)

    def run(self) -> list[Routing]:
        """Every TopK that this path builds, in order.

        Raises:
            Infeasible: the constructor raises.
        """
        arguments = self._function.args
        defaults = dict(
            zip([one.arg for one in arguments.args][::-1], arguments.defaults[::-1], strict=False)
        )
        defaults |= {
            one.arg: default
            for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            if default is not None
        }
        for one in (*arguments.args, *arguments.kwonlyargs):
            name = one.arg
            self._names[name] = Unknown(name, deployment=name in _SERVED)
        with contextlib.suppress(_Stop):
            self._block(self._function.body)
        for routing in self.routings:
            routing.experts = routing.experts or self._experts
            if not routing.binds:
                routing.bound, routing.binds = self._bound
        return self.routings

    def _block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if id(statement) in self._relevant:
                self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                found = self.value(value)
                for target in targets:
                    self._assign(target, found)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self.value(value))
            case ast.AugAssign(target=target):
                self._assign(target, Unknown(ast.unparse(node)))
            case ast.If(test=test, body=body, orelse=orelse):
                self._block(body if self._truth(self.value(test)) else orelse)
            case ast.Assert(test=test):
                if not self._truth(self.value(test)):
                    raise Infeasible
            case ast.Raise():
                raise Infeasible
            case ast.Return():
                raise _Stop
            case ast.Expr(value=value):
                self.value(value)
            case ast.With(body=body) | ast.Try(body=body) | ast.For(body=body):
                self._block(body)
            case _:
                pass

    def _assign(self, target: ast.expr, value: object) -> None:
        name = ast.unparse(target)
        _, written, field = name.partition(".topk_config.")
        if written and self.routings:
            self.routings[-1].topk[field] = value
            return
        if isinstance(target, ast.Name | ast.Attribute):
            self._names[name] = value

    def value(self, node: ast.expr) -> object:
        """What an expression gives."""
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Name(id=name):
                return self._names.get(name, Unknown(name, deployment=True))
            case ast.Attribute():
                return self._attribute(node)
            case ast.Call():
                return self._call(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self._truth(self.value(test)) else orelse)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._truth(self.value(operand))
            case ast.BoolOp(op=op, values=values):
                return self._bool(values, until=isinstance(op, ast.Or))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(node, left, op, right)
            case ast.BinOp() | ast.Subscript() | ast.Compare():
                return self._unknown(node)
            case _:
                return Thing(ast.unparse(node))

    def _bool(self, values: list[ast.expr], *, until: bool) -> object:
        found: object = not until
        for one in values:
            found = self.value(one)
            if self._truth(found) is until:
                return found
        return found

    def _attribute(self, node: ast.Attribute) -> object:
        text = ast.unparse(node)
        if text in self._names:
            return self._names[text]
        owner = ast.unparse(node.value)
        if owner == "RoutingMethodType":
            return Method(node.attr)
        if node.attr == "routing_method_type":
            return _LAYER_METHOD
        if node.attr == "should_fuse_routed_scaling_factor_in_topk":
            return True  # what a layer on the trtllm backends answers
        if owner == "self" and text in self._assigned:
            raise Infeasible  # read before it is set: these assumptions set it nowhere
        base = self.value(node.value)
        if node.attr == "data":
            return base
        if isinstance(base, Thing) and node.attr in self._parts.get(base.text, ()):
            return Thing(text)
        if isinstance(base, Unknown) and not base.deployment:
            return self._field(f"{base.text}.{node.attr}")
        # An attribute of a part that was built: the model's own, and not known here.
        return Unknown(text, deployment=isinstance(base, Unknown))

    def _field(self, text: str, *default: object) -> object:
        """A field of the model's config: its value, its default, or unknown."""
        owner, _, name = text.rpartition(".")
        if self._config is not None and owner.endswith("config"):
            if name in self._config:
                return self._config[name]
            if default:
                return default[0]
        return Unknown(text, default=default[0] if default else NO_DEFAULT)

    def _call(self, node: ast.Call) -> object:
        built = topk_name(node)
        if built is not None:
            return self._build(node, built)
        name = ast.unparse(node.func)
        keywords = {one.arg for one in node.keywords}
        if name == "getattr" and len(node.args) >= 2 and isinstance(node.args[1], ast.Constant):
            return self._getattr(node)
        if name == "dict":
            return self._arguments(node)
        if name.endswith(".update"):
            held = self._names.get(name.removesuffix(".update"))
            if isinstance(held, dict):
                held |= self._arguments(node)
            return None
        if name.endswith(".bind_runner_backend"):
            told = self._arguments(node).get("routing_method_type")
            self._bind(told)
            return None
        if "routing_method_type" in keywords or (
            "intermediate_size" in keywords and "top_k" in keywords
        ):
            self._experts = self._arguments(node)
            return Thing(name)
        if name.split(".")[0] in {"nn", "torch"} or name.split(".")[-1][0].isupper():
            return Thing(name)
        return self._unknown(node)

    def _getattr(self, node: ast.Call) -> object:
        base = self.value(node.args[0])
        assert isinstance(node.args[1], ast.Constant), "the caller has looked"
        field = str(node.args[1].value)
        if field == "should_fuse_routed_scaling_factor_in_topk":
            return True
        default = [self.value(one) for one in node.args[2:3]]
        if isinstance(base, Unknown) and not base.deployment:
            found = self._field(f"{base.text}.{field}", *default)
            if default and isinstance(default[0], Method) and isinstance(found, Unknown):
                return default[0]  # a config that names a method is an exception
            return found
        return default[0] if default else Unknown(ast.unparse(node), deployment=True)

    def _arguments(self, node: ast.Call) -> dict[str, object]:
        found: dict[str, object] = {}
        for one in node.keywords:
            if one.arg in READ:
                found[one.arg] = self.value(one.value)
            if one.arg is not None:
                continue
            more = self.value(one.value)
            if isinstance(more, dict):
                found |= more
        return found

    def _build(self, node: ast.Call, built: str) -> object:
        routing = Routing(topk=self._arguments(node), hashed=built == "HashTopK")
        routing.experts = dict(self._experts)
        self.routings.append(routing)
        return Thing(built)

    def _bind(self, told: object) -> None:
        self._bound = (told, True)
        for routing in self.routings:
            if not routing.binds:
                routing.bound, routing.binds = told, True
                routing.experts = routing.experts or self._experts
                break

    def _unknown(self, node: ast.expr) -> Unknown:
        """An expression whose parts say whether it is the model's."""
        names = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
        values = [self._names.get(one.id) for one in names]
        of_model = any(isinstance(one, Unknown) and not one.deployment for one in values)
        return Unknown(ast.unparse(node), deployment=not of_model)

    def _compare(self, node: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> object:
        first, second = self.value(left), self.value(right)
        match op:
            case ast.Is() | ast.IsNot():
                if second is not None:
                    return self._unknown(node)
                return self._is_none(first) is isinstance(op, ast.Is)
            case ast.Eq() | ast.NotEq():
                return self._equal(first, second) is isinstance(op, ast.Eq)
            case ast.Gt() | ast.GtE() | ast.Lt() | ast.LtE() if isinstance(
                first, int | float
            ) and isinstance(second, int | float):
                return {
                    ast.Gt: first > second,
                    ast.GtE: first >= second,
                    ast.Lt: first < second,
                    ast.LtE: first <= second,
                }[type(op)]
            case _:
                return self._unknown(node)

    def _is_none(self, value: object) -> bool:
        if isinstance(value, Unknown):
            scores = any(word in value.text for word in ("scor", "selection_fn"))
            domain = (*SCORING, None) if scores else (OTHER, None)
            return False if value.deployment else self._assumed(value, domain) is None
        return value is None

    def _equal(self, value: object, other: object) -> bool:
        if isinstance(value, Unknown) and isinstance(other, str):
            domain = SCORING if other in SCORING else (other, OTHER)
            return False if value.deployment else self._assumed(value, domain) == other
        if isinstance(value, Unknown) or isinstance(other, Unknown):
            text = f"{value} == {other}"
            return bool(self._assumed(Unknown(text), (False, True)))
        return value == other

    def _truth(self, value: object) -> bool:
        if isinstance(value, Unknown):
            return False if value.deployment else bool(self._assumed(value, (True, False)))
        return True if isinstance(value, Thing | Method) else bool(value)

    def _assumed(self, value: Unknown, domain: tuple[object, ...]) -> object:
        return self._assume.value(value, domain)

    def resolve(self, value: object, domain: tuple[object, ...]) -> object:
        """A value that has to be known, assumed to be of the domain where it is not."""
        if isinstance(value, Unknown):
            return domain[0] if value.deployment else self._assumed(value, domain)
        return value
