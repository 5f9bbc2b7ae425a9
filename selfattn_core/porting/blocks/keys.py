"""Compares the keys of a file independently of the separators that frameworks use."""

from bisect import bisect_left
from collections.abc import Iterable

__all__ = ["KeyIndex", "normal"]


class KeyIndex:
    """An index of the keys of a file. It treats `.` and `/` as equal and ignores TensorFlow's `:0`.

    Args:
        keys: the keys of the file.

    Example:
        >>> index = KeyIndex(["net.attn.theta.weight", "net.attn.gamma"])
        >>> index.original("net/attn/gamma"), index.under("net/attn/"), index.prefixes_of("theta/weight")
        ('net.attn.gamma', ['gamma', 'theta/weight'], ['net/attn/'])
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.clashes: list[tuple[str, str]] = []
        self._originals: dict[str, str] = {}
        self._by_suffix: dict[str, list[str]] = {}
        for key in keys:
            name = normal(key)
            if name in self._originals:
                self.clashes.append((self._originals[name], key))
                continue
            self._originals[name] = key
            start = 0
            while True:
                self._by_suffix.setdefault(name[start:], []).append(name[:start])
                start = name.find("/", start) + 1
                if not start:
                    break
        self._sorted = sorted(self._originals)

    def __contains__(self, name: str) -> bool:
        return name in self._originals

    def original(self, name: str) -> str:
        """The file's own key."""
        return self._originals[name]

    def prefixes_of(self, suffix: str) -> list[str]:
        """Every prefix of a key with this ending. A prefix is "" or ends with "/"."""
        return self._by_suffix.get(suffix, [])

    def under(self, prefix: str) -> list[str]:
        """The names under a prefix, sorted and without the prefix."""
        start = bisect_left(self._sorted, prefix)
        found = []
        for name in self._sorted[start:]:
            if not name.startswith(prefix):
                break
            found.append(name[len(prefix) :])
        return found


def normal(key: str) -> str:
    """A key in the form that is compared.

    Example:
        >>> normal("module.Generator/attention/gamma:0")
        'module/Generator/attention/gamma'
    """
    return key.removesuffix(":0").replace(".", "/").strip("/")
