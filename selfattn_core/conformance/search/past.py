"""A file of past failures: one line for each, with the name of a backend and a token."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from selfattn_core.files.text import read_text
from selfattn_core.files.writing import write_atomically

__all__ = ["PastFailures"]

_LARGEST = 2**22


@dataclass
class PastFailures:
    """Past failures of any number of backends. They stay when a bug is fixed, so that it is noticed if it returns.

    Args:
        tokens: the tokens of each backend.
    """

    tokens: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "PastFailures":
        """The failures in a file. A file that does not exist has none.

        Args:
            path: the file.

        Raises:
            ValueError: if a line is not a name and a token.
        """
        found = cls()
        if not path.exists():
            return found
        for number, line in enumerate(read_text(path, most=_LARGEST).splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, token = line.strip().rpartition(" ")
            if not name:
                raise ValueError(
                    f"{path}: line {number} is {line!r}, expected a backend, a space and a token."
                )
            found.add(name.strip(), [token])
        return found

    def of(self, name: str) -> tuple[str, ...]:
        """The tokens of a backend, in the order of the file.

        Args:
            name: the name of the backend.
        """
        return tuple(self.tokens.get(name, ()))

    def add(self, name: str, tokens: Iterable[str]) -> None:
        """Add tokens that are not there yet.

        Args:
            name: the name of the backend.
            tokens: the tokens.

        Example:
            >>> past = PastFailures()
            >>> past.add("torch", ["S1::97fb", "S1::97fb"])
            >>> past.of("torch")
            ('S1::97fb',)
        """
        known = self.tokens.setdefault(name, [])
        known += [token for token in dict.fromkeys(tokens) if token not in known]

    def write(self, path: Path) -> None:
        """Write all failures to a file, which is complete or unchanged.

        Args:
            path: the file. It is replaced.
        """
        lines = [f"{name} {token}" for name, tokens in self.tokens.items() for token in tokens]
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode(), overwrite=True)
