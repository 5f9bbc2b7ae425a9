"""A file of past failures: one line for each, with the name of a backend and a token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfattn_core.files.text import read_text
from selfattn_core.files.writing import write_atomically

__all__ = ["PastFailures"]

_LARGEST = 2**22


@dataclass(frozen=True)
class PastFailures:
    """A file of past failures of any number of backends. They stay when a bug is fixed, so that it is noticed if it returns.

    Empty lines, and lines that begin with #, are comments.

    Args:
        path: the file. One that does not exist has no failures.
    """

    path: Path

    def of(self, name: str) -> tuple[str, ...]:
        """The tokens of a backend, in the order of the file.

        Args:
            name: the name of the backend.

        Raises:
            ValueError: if a line is not a name and a token.
            OSError: if the file cannot be read.
        """
        return tuple(token for each, token in self._pairs(self._text()) if each == name)

    def add(self, tokens: Mapping[str, Iterable[str]]) -> None:
        """Add the tokens that the file does not have yet at its end. Without a new one it is not written.

        Args:
            tokens: tokens by the name of the backend.

        Raises:
            ValueError: if a line of the file is not a name and a token.
            OSError: if it cannot be read or written. It then stays unchanged.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     past = PastFailures(Path(folder) / "failures.txt")
            ...     past.add({"torch": ["S1::97fb", "S1::97fb"]})
            ...     past.of("torch")
            ('S1::97fb',)
        """
        # Another search may have added some in the meantime.
        text = self._text()
        known = set(self._pairs(text))
        given = dict.fromkeys((name, token) for name, found in tokens.items() for token in found)
        new = [f"{name} {token}\n" for name, token in given if (name, token) not in known]
        if new:
            whole = f"{text}\n" if text and not text.endswith("\n") else text
            write_atomically(self.path, (whole + "".join(new)).encode(), overwrite=True)

    def _text(self) -> str:
        return read_text(self.path, most=_LARGEST) if self.path.exists() else ""

    def _pairs(self, text: str) -> list[tuple[str, str]]:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, token = line.strip().rpartition(" ")
            if not name:
                raise ValueError(
                    f"{self.path}: line {number} is {line!r}, expected a backend, a space and a token."
                )
            found.append((name.strip(), token))
        return found
