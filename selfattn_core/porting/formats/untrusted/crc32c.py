"""Computes in numpy the checksum that TensorFlow stores for every tensor and index block.

Why not google-crc32c: every user would install a C extension for the checksum of one format. The price is time: 64 MiB take
about 2 s here.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c", "masked"]

_POLYNOMIAL = 0x82F63B78


def crc32c(content: bytes | memoryview) -> int:
    """The CRC-32C of these bytes.

    The bytes are cut into lanes of equal length that advance together. Then the lanes' checksums are joined.

    Source: the checksum of RFC 3720, appendix B.4, whose test vector the example is.

    Example:
        >>> hex(crc32c(bytes(32)))
        '0x8a9136aa'
    """
    data = np.frombuffer(content, np.uint8)
    length = max(1, int(np.sqrt(data.size)))
    lanes = data.size // length
    table = _table()
    state = np.zeros(lanes, np.uint32)
    if lanes:
        # The usual inversion of the first state.
        state[0] = 0xFFFFFFFF
        for column in data[: lanes * length].reshape(lanes, length).T:
            state = table[(state ^ column) & 255] ^ (state >> 8)
    crc = int(state[0]) if lanes else 0xFFFFFFFF
    if lanes > 1:
        skip = _skip(length)
        for lane in state[1:].tolist():
            crc = lane ^ int(
                skip[0, crc & 255] ^ skip[1, crc >> 8 & 255] ^ skip[2, crc >> 16 & 255] ^ skip[3, crc >> 24]
            )
    for byte in data[lanes * length :].tolist():
        crc = int(table[(crc ^ byte) & 255]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The form in which TensorFlow stores a checksum. It avoids checksums of bytes that contain checksums.

    Example:
        >>> hex(masked(0))
        '0xa282ead8'
    """
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _table() -> NDArray[np.uint32]:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1).astype(np.uint32)
    return values


@cache
def _skip(length: int) -> NDArray[np.uint32]:
    """The state after this number of zero bytes, for each of its four bytes."""
    table = _table()
    states = np.arange(256, dtype=np.uint32)[None] << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(length):
        states = table[states & 255] ^ (states >> 8)
    return states
