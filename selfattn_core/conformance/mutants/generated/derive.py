"""Deriving mutants from source text: every place to which a rule applies, and a seeded choice among them."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selfattn_core.conformance.mutants.generated.rules import RULES

__all__ = ["GeneratedMutant", "choose", "derived"]


@dataclass(frozen=True)
class GeneratedMutant:
    """One changed expression of a module.

    Args:
        module: the import name of the module.
        function: the name of the function or method, with its class.
        rule: the rule, one of `RULES`.
        line: the number of the first changed line.
        old: the lines that change, without indentation.
        new: what they become.
        source: the whole changed source.
    """

    module: str
    function: str
    rule: str
    line: int
    old: str
    new: str
    source: str

    @property
    def difference(self) -> str:
        """The change as the lines of a diff."""
        old = "\n".join(f"- {line}" for line in self.old.splitlines())
        new = "\n".join(f"+ {line}" for line in self.new.splitlines())
        return f"{self.module}:{self.line} {self.function} ({self.rule})\n{old}\n{new}"


def derived(module: str, source: str, *, without: Sequence[str] = ()) -> tuple[GeneratedMutant, ...]:
    """All mutants of a source, in the order of their places.

    Checks that end in `raise`, texts, annotations, decorators and defaults stay as they are, because no case asks for them.

    Args:
        module: the import name of the module.
        source: its source.
        without: the names of functions that stay as they are.

    Example:
        >>> [mutant.new for mutant in derived("toy", "def f(a, b): return a - b") if mutant.rule == "operator"]
        ['def f(a, b): return (a + b)']
    """
    found: dict[str, GeneratedMutant] = {}
    lines = source.encode().split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    content = source.encode()
    for function, node in _expressions(ast.parse(source), ""):
        if function in without or not function:
            continue
        for rule, changes in RULES.items():
            for changed in changes(node):
                begin = starts[node.lineno - 1] + node.col_offset
                end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
                text = ast.unparse(ast.fix_missing_locations(changed))
                whole = isinstance(changed, _WHOLE)
                piece = text if whole else f"({text})"
                mutated = content[:begin] + piece.encode() + content[end:]
                if mutated == content or not _compiles(mutated):
                    continue
                last = (node.end_lineno or 0) - 1
                tail = lines[last][node.end_col_offset or 0 :]
                head = lines[node.lineno - 1][: node.col_offset]
                old = b"\n".join(each.strip() for each in lines[node.lineno - 1 : last + 1]).decode()
                new = (head + piece.encode() + tail).decode().strip()
                found.setdefault(
                    mutated.decode(),
                    GeneratedMutant(module, function, rule, node.lineno, old, new, mutated.decode()),
                )
    return tuple(found.values())


def choose(mutants: Sequence[GeneratedMutant], count: int, seed: int = 0) -> tuple[GeneratedMutant, ...]:
    """A seeded choice, in the order of the places.

    Args:
        mutants: the mutants.
        count: how many. All, if there are fewer.
        seed: the seed of the choice.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(mutants))[:count]
    return tuple(mutants[index] for index in sorted(chosen))


_WHOLE = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Slice, ast.Constant, ast.Tuple)
"""What needs no brackets."""

_UNTOUCHED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments, ast.withitem, ast.Import, ast.ImportFrom)


def _expressions(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """The expressions in functions, each with the name of its function."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, _UNTOUCHED) or _refuses(child):
                continue
            within = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                within = f"{function}.{child.name}".lstrip(".")
            elif isinstance(node, ast.Module):
                continue
            if isinstance(child, ast.expr) and not isinstance(node, ast.ClassDef):
                yield within, child
            yield from _expressions(child, within)


def _refuses(node: ast.AST) -> bool:
    """Whether a statement only checks its arguments."""
    return isinstance(node, ast.If) and any(isinstance(each, ast.Raise) for each in node.body)


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "<mutant>", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
