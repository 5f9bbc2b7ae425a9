"""The result of every reader: the tensors of a file by name, which are listed at once and read one by one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.porting.errors import PortError

__all__ = ["Array", "Entry", "TensorInfo", "Tensors"]


@dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a tensor, without its values.

    Args:
        shape: the stored shape.
        dtype: the stored dtype, as numpy or ml_dtypes names it: "float32", "bfloat16", "float8_e4m3fn". A 16-bit or 8-bit
            float that numpy does not have is read as float32, which is exact.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Args:
        info: its shape and dtype.
        read: returns a new array of this shape.
    """

    info: TensorInfo
    read: Callable[[], Array]


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of a file: a read-only mapping of names to shapes and dtypes, and `read` for the values.

    It is a context manager. After the `with` block nothing can be read.

    Args:
        path: the path of the file or folder, for messages.
        format: one of "safetensors", "npz", "torch", "keras", "msgpack", "orbax" or "tensorflow".
        entries: the tensors in the order of the file.
        metadata: the metadata of the file.
        close: a function that is called once at the end.
        left_out: entries that look like tensors and are not, by name, with the reason.
        pools: the `kv_pool` of layers of this library, if the file records it. The keys are their prefixes without the last
            separator.

    Example:
        >>> entry = Entry(TensorInfo((2,), "float32"), lambda: np.ones(2, np.float32))
        >>> with Tensors(Path("toy.npz"), "npz", {"gamma": entry}) as tensors:
        ...     print(list(tensors), tensors["gamma"].shape, tensors.read("gamma"))
        ['gamma'] (2,) [1. 1.]
    """

    def __init__(
        self,
        path: Path,
        format: str,
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str] | None = None,
        close: Callable[[], object] = lambda: None,
        left_out: Mapping[str, str] | None = None,
        pools: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.metadata = dict(metadata or {})
        self.left_out = dict(left_out or {})
        self.pools = dict(pools or {})
        self._entries = dict(entries)
        self._close = close
        self._closed = False

    def __getitem__(self, key: str) -> TensorInfo:
        return self._entries[key].info

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, key: str) -> Array:
        """Read a tensor's values as a new, contiguous array.

        Args:
            key: a key of the mapping.

        Raises:
            PortError: if there is no such tensor, if the file is closed, damaged or has changed, or if numpy cannot hold the
                dtype.
        """
        if self._closed:
            raise PortError(f"{self.path}: is closed. Read {key} before the end of the `with` block.")
        if key in self.left_out:
            raise PortError(f"{self.path}: {self.left_out[key]}.")
        if key not in self._entries:
            raise PortError(f"{self.path}: has no tensor {key!r}. It has {len(self)} others.")
        entry = self._entries[key]
        try:
            array = np.ascontiguousarray(entry.read()).reshape(entry.info.shape)
        except (OSError, EOFError) as error:
            raise PortError(f"{self.path}: {key} cannot be read: {error}") from error
        except MemoryError:
            raise PortError(
                f"{self.path}: {key} {entry.info.shape} of {entry.info.dtype} does not fit into memory."
            ) from None
        return array

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
