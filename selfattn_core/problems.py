"""Errors as data. A problem has a kind and names, and a remedy names an option, in the words of Python or of the command."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

__all__ = ["Kind", "Problem", "ProblemError", "Remedy", "Text", "in_command", "in_python"]

_OPTIONS = {
    "block": "--block",
    "check": "--check",
    "dialect": "--from",
    "keep_spectral_norm": "--keep-spectral-norm",
    "overwrite": "--force",
    "prefix": "--prefix",
    "settings": "--set",
    "strict": "--allow-unused",
    "to": "--to",
    "whole": "--whole",
}
"""The command's options by their keywords in Python."""


@dataclass(frozen=True)
class Remedy:
    """An option to pass, or to leave out.

    Args:
        option: the keyword in Python.
        value: the value to pass. None if only the user knows it.
        setting: the name of the setting, for the option `settings`.
        choices: the possible values.

    Example:
        >>> print(Remedy("prefix"), Remedy("prefix").in_command())
        prefix= --prefix
        >>> print(Remedy("settings", setting="gamma"), Remedy("settings", setting="gamma").in_command())
        settings={"gamma": VALUE} --set gamma=VALUE
        >>> print(Remedy("strict", value=False), Remedy("strict", value=False).in_command())
        strict=False --allow-unused
    """

    option: str
    value: object = None
    setting: str = ""
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.setting:
            return f'{self.option}={{"{self.setting}": {"VALUE" if self.value is None else self.value}}}'
        text = f"{self.option}={'' if self.value is None else repr(self.value)}"
        return f"{text} one of: {', '.join(self.choices)}" if self.choices else text

    def in_command(self) -> str:
        """The option as a user types it on the command line."""
        option = _OPTIONS[self.option]
        if self.setting:
            return f"{option} {self.setting}={'VALUE' if self.value is None else self.value}"
        if self.choices:
            return f"{option}, one of: {', '.join(self.choices)}"
        return option if self.value is None or isinstance(self.value, bool) else f"{option} {self.value}"


Text = str | tuple[str | Remedy, ...]
"""A message. Each option in it is a `Remedy`, whose `str` gives the words of Python."""


def in_python(text: Text) -> str:
    """A message in the words of Python.

    Example:
        >>> in_python(("choose one with ", Remedy("prefix"), "."))
        'choose one with prefix=.'
    """
    return _joined(text, str)


def in_command(text: Text) -> str:
    """A message in the words of the command.

    Example:
        >>> in_command(("choose one with ", Remedy("prefix"), "."))
        'choose one with --prefix.'
    """
    return _joined(text, Remedy.in_command)


def _joined(text: Text, spell: Callable[[Remedy], str]) -> str:
    return "".join(part if isinstance(part, str) else spell(part) for part in _parts(text))


def _parts(text: Text) -> tuple[str | Remedy, ...]:
    return (text,) if isinstance(text, str) else text


Kind = Literal[
    "ambiguous",
    "bad_dialect",
    "bad_io_file",
    "bad_setting",
    "batch_norm",
    "check_failed",
    "contradiction",
    "dialect_needed",
    "dialect_refused",
    "dtype",
    "folder_missing",
    "gamma_not_stored",
    "keep_spectral_norm",
    "keys_alike",
    "missing",
    "no_block",
    "not_expressible",
    "not_finite",
    "optimiser_state",
    "other_function",
    "path",
    "several_blocks",
    "shape",
    "spectral_norm",
    "split",
    "target_exists",
    "target_format",
    "target_is_read",
    "unknown_dialect",
    "unknown_setting",
    "unusable",
    "unused",
    "whole",
    "widths",
]
"""The kinds of problems. "unusable" is a file that cannot be read or written."""


@dataclass(frozen=True)
class Problem:
    """One reason why something cannot be done.

    Args:
        kind: the kind of the reason, for example "missing".
        text: the message: what was received, what was expected, and what to do.
        names: the tensors, blocks, dialects or options that the problem is about.

    Example:
        >>> problem = Problem("unused", ("unused: norm.weight. Pass ", Remedy("strict", value=False)), ("norm.weight",))
        >>> print(problem)
        unused: norm.weight. Pass strict=False
        >>> problem.remedies
        (Remedy(option='strict', value=False, setting='', choices=()),)
    """

    kind: Kind
    text: Text
    names: tuple[str, ...] = ()

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """The options that solve the problem."""
        return tuple(part for part in _parts(self.text) if isinstance(part, Remedy))

    def __str__(self) -> str:
        return in_python(self.text)

    def within(self, where: str) -> "Problem":
        """The same problem, with its place at the beginning of the message."""
        return Problem(self.kind, (where, *_parts(self.text)), self.names) if where else self


class ProblemError(ValueError):
    """An error that carries its problems as data. `str` gives its message in the words of Python.

    Args:
        text: the whole message.
        problems: the reasons. By default there is one: the message itself.
        kind: the kind of that one reason.
        names: the names of that one reason.

    Example:
        >>> error = ProblemError(("holds 2 blocks, pass ", Remedy("block", choices=("g", "d"))), kind="several_blocks")
        >>> print(error)
        holds 2 blocks, pass block= one of: g, d
        >>> error.in_command(), error.problems[0].kind
        ('holds 2 blocks, pass --block, one of: g, d', 'several_blocks')
    """

    def __init__(
        self,
        text: Text,
        problems: Sequence[Problem] = (),
        *,
        kind: Kind = "unusable",
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(in_python(text))
        self.text = text
        self.problems = tuple(problems) or (Problem(kind, text, tuple(names)),)

    @classmethod
    def of(cls, head: str, problems: Sequence[Problem], *, between: str = "\n  ", end: str = "") -> Self:
        """An error with a message that lists every problem.

        Args:
            head: the text before the first problem.
            problems: one problem or more.
            between: the text between two problems.
            end: the text after the last problem.
        """
        parts: list[str | Remedy] = [head]
        for number, problem in enumerate(problems):
            parts += [between if number else "", *_parts(problem.text)]
        return cls((*parts, end), problems)

    def in_command(self) -> str:
        """The message in the words of the command."""
        return in_command(self.text)
