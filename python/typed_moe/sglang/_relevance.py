"""Which statements of a constructor say what TopK it builds."""

from __future__ import annotations

import ast
from functools import cache

READ = frozenset(
    {
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "renormalize",
        "custom_routing_function",
        "scoring_func",
        "correction_bias",
        "routed_scaling_factor",
        "apply_routed_scaling_factor_on_output",
        "routing_method_type",
    }
)
"""The arguments that are read. Others say nothing about routing, and are not looked into."""


def topk_name(call: ast.Call) -> str | None:
    """The attribute that a call builds for: "TopK" or "HashTopK", else None."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name if name in {"TopK", "HashTopK"} else None


@cache
def assigned_names(function: ast.FunctionDef) -> frozenset[str]:
    """Everything that the function sets somewhere."""
    return frozenset(name for one in ast.walk(function) for name in targets(one))


@cache
def relevant_statements(function: ast.FunctionDef) -> frozenset[int]:
    """The statements that what is built depends on, by id."""
    wanted: set[str] = set()
    statements: set[int] = set()
    before = -1
    while len(statements) + len(wanted) != before:
        before = len(statements) + len(wanted)
        for statement in function.body:
            _mark(statement, wanted, statements)
    return frozenset(statements)


def _mark(node: ast.stmt, wanted: set[str], statements: set[int]) -> bool:
    """Whether a statement is relevant; it and the names it reads are kept if so."""
    parts = [one for one in ast.iter_child_nodes(node) if isinstance(one, ast.stmt)]
    handlers = [one for one in ast.walk(node) if isinstance(one, ast.Call)]
    if parts:
        marked = [_mark(one, wanted, statements) for one in parts]
        relevant = any(marked)
        if isinstance(node, ast.If) and isinstance(parts[-1], ast.Raise):
            relevant = relevant or bool(_names(node.test) & wanted)
            if relevant:
                statements.add(id(parts[-1]))
        if relevant and isinstance(node, ast.If):
            wanted |= _names(node.test)
    elif isinstance(node, ast.Assert):
        relevant = bool(_names(node.test) & wanted)
        if relevant:
            wanted |= _names(node.test)
    else:
        calls = [one for one in handlers if _of_interest(one)]
        set_here = targets(node)
        owners = {one.rpartition(".")[0] for one in set_here}
        relevant = (
            bool(calls)
            or bool((set_here | owners) & wanted)
            or any(".topk_config." in one for one in set_here)
        )
        for call in calls:
            wanted |= _argument_names(call)
        if relevant and not calls:
            wanted |= _names(node)
    if relevant:
        statements.add(id(node))
    return relevant


def _of_interest(call: ast.Call) -> bool:
    keywords = {one.arg for one in call.keywords}
    return (
        topk_name(call) is not None
        or "routing_method_type" in keywords
        or {"intermediate_size", "top_k"} <= keywords
        or ast.unparse(call.func).endswith(".bind_runner_backend")
    )


def _argument_names(call: ast.Call) -> set[str]:
    found: set[str] = set()
    for one in call.keywords:
        if one.arg is None or one.arg in READ:
            found |= _names(one.value)
    return found


def _names(node: ast.AST) -> set[str]:
    """Names and attributes of `self` that a node reads."""
    found: set[str] = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            found.add(one.id)
        elif isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self":
            found.add(f"self.{one.attr}")
    return found - {"self", "config"}


def targets(node: ast.AST) -> set[str]:
    match node:
        case ast.Assign(targets=targets):
            return {ast.unparse(one) for one in targets}
        case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
            return {ast.unparse(target)}
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="update"))):
            return {ast.unparse(owner)}
        case _:
            return set()
