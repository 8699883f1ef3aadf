"""`--where`: a condition on the columns of the shards' parquet files, as an expression that pyarrow evaluates.

The text is parsed, never run: names are columns, and what is not listed here is an error.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neuclip_scale.reshard.errors import UsageError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left.cast("float64") / right,  # arrow would divide whole numbers without a rest
}
_HELP = (
    "Write columns, numbers and 'texts' with < <= > >= == != in, and or not, + - * /, len() lower() abs() min() max(), "
    '`is None`: for example "clip_l14_similarity_score > 0.3 and min(original_width, original_height) >= 200".'
)


@dataclass(frozen=True)
class Predicate:
    """A condition that was parsed; it pickles as its text."""

    text: str
    columns: tuple[str, ...]
    """Columns it reads."""

    def expression(self) -> Any:
        """The condition as a `pyarrow.compute.Expression`; null where a column that decides is null."""
        return _convert(ast.parse(self.text, mode="eval").body, self.text)


def parse_predicate(text: str) -> Predicate:
    """Parse `text`; raises `UsageError` for anything but columns, constants and the operators above."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"--where {text!r}: {error}. {_HELP}") from error
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in calls}
    if not names:
        raise UsageError(f"--where {text!r}: names no column. {_HELP}")
    predicate = Predicate(text.strip(), tuple(sorted(names)))
    try:
        predicate.expression()
    except UsageError:
        raise
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:  # a number of 100 bits, a list of both
        raise UsageError(f"--where {text!r}: {error}. {_HELP}") from error
    return predicate


def _convert(node: ast.expr, text: str) -> Any:
    import pyarrow.compute as pc

    match node:
        case ast.Name(id=name):
            return pc.field(name)
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return pc.scalar(value)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_convert(operand, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return pc.scalar(-value)
        case ast.BoolOp(op=op, values=values):
            return _joined([_convert(value, text) for value in values], isinstance(op, ast.And))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_convert(left, text), _convert(right, text))
        case ast.Call(func=ast.Name(id=("min" | "max") as name), args=[_, _, *_] as arguments, keywords=[]):
            function = pc.min_element_wise if name == "min" else pc.max_element_wise
            return function(*(_convert(argument, text) for argument in arguments), skip_nulls=False)
        case ast.Call(func=ast.Name(id=("len" | "lower" | "abs") as name), args=[argument], keywords=[]):
            functions = {"len": pc.utf8_length, "lower": pc.utf8_lower, "abs": pc.abs}
            return functions[name](_convert(argument, text))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [left, *comparators]
            return _joined([_compare(a, op, b, text) for a, op, b in zip(sides, ops, comparators, strict=False)], True)
    raise UsageError(f"--where {text!r}: {ast.unparse(node)!r} is not understood. {_HELP}")


def _joined(parts: list[Any], every: bool) -> Any:
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part if every else whole | part
    return whole


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, text: str) -> Any:
    match op, right:
        case ((ast.Is() | ast.IsNot()), ast.Constant(value=None)):
            null = _convert(left, text).is_null()
            return null if isinstance(op, ast.Is) else ~null
        case ((ast.In() | ast.NotIn()), (ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items))):
            values = [item.value for item in items if isinstance(item, ast.Constant)]
            if len(values) == len(items):
                inside = _convert(left, text).isin(values)
                return inside if isinstance(op, ast.In) else ~inside
        case _ if type(op) in _COMPARE:
            return _COMPARE[type(op)](_convert(left, text), _convert(right, text))
    raise UsageError(f"--where {text!r}: {ast.unparse(ast.Compare(left, [op], [right]))!r} is not understood. {_HELP}")
