"""Reads one table of a TOML file field by field, and collects every problem instead of raising the first."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["TomlTable"]


class TomlTable:
    """A table whose fields are read by name and type. A field that nobody reads is a problem too.

    Args:
        content: the table as tomllib returns it.
        where: the table's place in the file, for messages. "" at the top.
        problems: the list that all tables of a file share.

    Example:
        >>> problems = []
        >>> table = TomlTable({"name": 3, "titel": "Mine"}, "", problems)
        >>> table.text("name"), table.text("title", required=True)
        ('', '')
        >>> table.finish()
        >>> problems
        ['name = 3 should be a string', 'title (a string) is missing', 'titel is unknown: did you mean title?']
    """

    def __init__(self, content: dict[str, Any], where: str, problems: list[str]) -> None:
        self._content = content
        self._where = where
        self.problems = problems
        self._asked: list[str] = []

    def text(self, name: str, *, required: bool = False, choices: Sequence[str] = ()) -> str:
        """A string, "" if it is absent."""
        wanted = f"one of {', '.join(map(repr, choices))}" if choices else "a string"
        value = self._field(name, wanted, required)
        if value is None:
            return ""
        if not isinstance(value, str) or not value or (choices and value not in choices):
            self.wrong(name, value, wanted)
            return ""
        if value == "?":
            self.problem(f'{name} = "?" is an open question; answer it from the code')
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """An array of strings. One string counts as an array. Empty if it is absent."""
        value = self._field(name, "a list of strings", False)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
            self.wrong(name, value, "a string or a list of strings")
            return ()
        if "?" in found:
            self.problem(f'{name} = "?" is an open question; answer it from the code')
        return tuple(found)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._field(name, "true or false", False)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(name, value, "true or false")
        return default

    def flag_or_stored(self, name: str, default: bool | None) -> bool | None:
        """True, false, or None for "stored", which means that the file shows it."""
        value = self._field(name, 'true, false or "stored"', False)
        if value is None:
            return default
        if value == "stored" or isinstance(value, bool):
            return None if value == "stored" else value
        self.wrong(name, value, 'true, false or "stored"')
        return default

    def whole(self, name: str, default: int) -> int:
        """A positive whole number."""
        value = self._field(name, "a positive whole number", False)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(name, value, "a positive whole number")
            return default
        return value

    def number(self, name: str, *, required: bool = False, least: float | None = None) -> float | None:
        """A number, None if it is absent."""
        wanted = "a number" if least is None else f"a number of at least {least:g}"
        value = self._field(name, wanted, required)
        if value is None:
            return None
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or (least is not None and value < least):
            self.wrong(name, value, wanted)
            return None
        return float(value)

    def table(self, name: str) -> "TomlTable | None":
        """A table within this one, None if it is absent."""
        value = self._field(name, "a table", False)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.wrong(name, value, "a table")
            return None
        return TomlTable(value, f"{self._where}{name}.", self.problems)

    def tables(self, name: str) -> list["TomlTable"]:
        """An array of tables."""
        value = self._field(name, "an array of tables", False)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.wrong(name, value, f"an array of tables: write [[{self._where}{name}]]")
            return []
        return [
            TomlTable(item, f"{self._where}{name}[{index}].", self.problems)
            for index, item in enumerate(value)
        ]

    def has(self, name: str) -> bool:
        """Whether the field is present, whatever its type."""
        return name in self._content

    def raw(self, name: str) -> object:
        """The field as it is, for a field with several types. Read it by type as well."""
        return self._content.get(name)

    def problem(self, message: str) -> None:
        """Add a problem of this table."""
        self.problems.append(f"{self._where}{message}")

    def wrong(self, name: str, value: object, wanted: str) -> None:
        """Add a problem: a field has the wrong type or value."""
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        self.problem(f"{name} = {shown} should be {wanted}")

    def finish(self) -> None:
        """Add a problem for every field that nobody has read."""
        for name in self._content:
            if name not in self._asked:
                near = difflib.get_close_matches(name, self._asked, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self._asked)}"
                self.problem(f"{name} is unknown: {hint}")

    def _field(self, name: str, wanted: str, required: bool) -> Any:
        self._asked.append(name)
        if required and name not in self._content:
            self.problem(f"{name} ({wanted}) is missing")
        return self._content.get(name)
