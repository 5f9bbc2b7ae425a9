"""The rules by which mutants are derived from a syntax tree: each gives the ways to change one expression."""

import ast
import copy
from collections.abc import Callable, Iterator, Mapping

__all__ = ["RULES", "Rule"]

Rule = Callable[[ast.expr], Iterator[ast.expr]]

_SWAPPED: Mapping[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}

_NARROWED = (
    "(lambda _: _.astype('float16' if _.dtype == 'float32' else 'float32').astype(_.dtype) "
    "if hasattr(_, 'astype') else _.half().to(_.dtype))"
)
"""Rounds an array to a narrower dtype, in any array library."""

_IN_PLACE: Mapping[type[ast.operator], str] = {
    ast.Add: "__iadd__",
    ast.Sub: "__isub__",
    ast.Mult: "__imul__",
}

_STEPS = ("astype", "to", "float", "copy", "contiguous", "detach", "clone", "swapaxes", "mT", "abs")
"""The methods of arrays that a mutant may leave out."""


def _operator(node: ast.expr) -> Iterator[ast.expr]:
    """Another operator, a sign or a negation left out, or the operands of a product exchanged."""
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for other in _SWAPPED.get(type(node.op), ()):
            changed = copy.deepcopy(node)
            changed.op = other()  # type: ignore[assignment]
            yield changed
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield ast.BinOp(node.right, node.op, node.left)
    if isinstance(node, ast.Compare):
        for other in _SWAPPED.get(type(node.ops[0]), ()):
            compared = copy.deepcopy(node)
            compared.ops = [other()]  # type: ignore[list-item]
            yield compared
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def _constant(node: ast.expr) -> Iterator[ast.expr]:
    """Another constant."""
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node.value, float):
        yield ast.Constant(node.value * 2)


def _axis(node: ast.expr) -> Iterator[ast.expr]:
    """Another axis."""
    if not isinstance(node, ast.Call):
        return
    for index, keyword in enumerate(node.keywords):
        if keyword.arg == "axis":
            axes = keyword.value.elts if isinstance(keyword.value, ast.Tuple) else []
            others: list[ast.expr] = list(axes) or [
                ast.Constant(axis)
                for axis in (0, 1, 2, -1, -2)
                if ast.unparse(ast.Constant(axis)) != ast.unparse(keyword.value)
            ]
            for other in others:
                changed = copy.deepcopy(node)
                changed.keywords[index].value = other
                yield changed


def _missing(node: ast.expr) -> Iterator[ast.expr]:
    """A term, a factor or a step left out."""
    if isinstance(node, ast.BinOp) and isinstance(
        node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitOr
    ):
        yield node.left
        yield node.right
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        yield node.args[0]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _STEPS:
        yield node.func.value


def _off_by_one(node: ast.expr) -> Iterator[ast.expr]:
    """A bound of a slice or of a range moved by one, or left out."""
    if isinstance(node, ast.Slice):
        for side in ("lower", "upper"):
            bound = getattr(node, side)
            for moved in _moved(bound):
                changed = copy.deepcopy(node)
                setattr(changed, side, moved)
                yield changed
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("range", "np.arange", "arange"):
        for index, argument in enumerate(node.args):
            for moved in _moved(argument):
                called = copy.deepcopy(node)
                called.args[index] = moved or ast.Constant(0)
                yield called


def _moved(bound: ast.expr | None) -> Iterator[ast.expr | None]:
    if bound is None:
        return
    yield ast.BinOp(bound, ast.Add(), ast.Constant(1))
    yield ast.BinOp(bound, ast.Sub(), ast.Constant(1))
    yield None


def _narrowed(node: ast.expr) -> Iterator[ast.expr]:
    """A result rounded to a narrower dtype."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult | ast.Mult | ast.Sub | ast.Add):
        yield ast.Call(ast.parse(_NARROWED, mode="eval").body, [node], [])


def _overwritten(node: ast.expr) -> Iterator[ast.expr]:
    """An operand overwritten by the result."""
    if isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name | ast.Attribute):
        for operator, function in _IN_PLACE.items():
            if isinstance(node.op, operator):
                yield ast.Call(ast.Attribute(node.left, function), [node.right], [])


RULES: Mapping[str, Rule] = {
    "operator": _operator,
    "constant": _constant,
    "axis": _axis,
    "missing": _missing,
    "off by one": _off_by_one,
    "narrowed": _narrowed,
    "overwritten": _overwritten,
}
"""The rules by name."""
