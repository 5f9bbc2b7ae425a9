"""Flax msgpack files and TensorFlow checkpoints made to deceive, and things that are no files at all."""

import os
import struct
from pathlib import Path

import numpy as np

from selfattn_core.porting.formats.untrusted.crc32c import crc32c, masked


def text(value: str) -> bytes:
    return bytes([0xA0 | len(value)]) + value.encode()


def array(shape=(2, 3), dtype="float32", data=bytes(24)) -> bytes:
    axes = bytes([0x90 | len(shape)]) + b"".join(struct.pack(">Bq", 0xD3, axis) for axis in shape)
    body = b"\x93" + axes + text(dtype) + struct.pack(">BI", 0xC6, len(data)) + data
    return struct.pack(">BIb", 0xC9, len(body), 1) + body


def write_msgpack(folder: Path) -> dict[str, tuple[Path, str]]:
    """All files, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, words: str, content: bytes) -> None:
        path = folder / f"{name}.msgpack"
        path.write_bytes(content)
        cases[f"msgpack {name}"] = (path, words)

    key = b"\x81" + text("kernel")
    case("half", "is truncated or damaged: it ends at", (key + array())[:-5])
    case("more", "bytes follow the end", key + array() + b"\0")
    case("shape", "needs 28 bytes, but there are 24", key + array((7,)))
    case("overflow", "is not one of an array", key + array((2**40, 2**40)))
    case("negative", "is not one of an array", key + array((-2, -3)))
    case("dtype", "has the dtype 'object'", key + array(dtype="object"))
    case("key twice", "holds the key 'kernel' twice", b"\x82" + (text("kernel") + array()) * 2)
    case(
        "joined keys",
        "holds a/b twice",
        b"\x82" + text("a/b") + array() + text("a") + b"\x81" + text("b") + array(),
    )
    case("deep", "is nested too deep", key * 40 + array())
    case("endless map", "is truncated or damaged", b"\xdf\xff\xff\xff\xff" + text("a"))
    case("endless list", "too many values", key + b"\xdd\xff\xff\xff\xff" + b"\xc0" * 1_000_001)
    case("endless bytes", "is truncated or damaged", key + b"\xc6\xff\xff\xff\xff")
    case("no name", "a key that is not a name", b"\x82" + text("a") + b"\xc0" + b"\x91\xc0\xc0")
    case("reserved byte", "is not a msgpack file, or is damaged", key + b"\xc1")
    pieces = (
        b"\x83"
        + text("__msgpack_chunked_array__")
        + b"\xc3"
        + text("shape")
        + b"\x81"
        + text("0")
        + b"\xce\xff\xff\xff\xff"
    )
    case("pieces", "its pieces have 24", key + pieces + text("chunks") + b"\x81" + text("0") + array())
    case("no arrays", "holds no arrays", key + b"\x01")
    return cases


def block(*rows: tuple[bytes, bytes]) -> bytes:
    def varint(value: int) -> bytes:
        content = b""
        while value > 127:
            content += bytes([value & 127 | 128])
            value >>= 7
        return content + bytes([value])

    content = b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v for k, v in rows)
    content += struct.pack("<II", 0, 1) + b"\0"
    return content + struct.pack("<I", masked(crc32c(content)))


def index(*rows: tuple[bytes, bytes], header: bytes = b"\x08\x01") -> bytes:
    """An index of these keys and values, with right checksums."""
    data = block((b"", header), *rows)
    handle = b"\0" + bytes([len(data) - 5 & 127 | 128, len(data) - 5 >> 7])
    middle = block((b"z", handle))
    meta = block()
    places = [(len(data), len(middle) - 5), (len(data) + len(middle), len(meta) - 5)]
    packed = [
        bytes([value & 127 | 128, value >> 7 & 127 | 128, value >> 14]) for place in places for value in place
    ]
    footer = packed[2] + packed[3] + packed[0] + packed[1]
    return data + middle + meta + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def entry(dtype=1, axes=(2, 3), offset=0, size=24, checksum=0, extra=b"", shard=0) -> bytes:
    def field(number: int, value: int) -> bytes:
        content = bytes([number << 3])
        while value > 127:
            content += bytes([value & 127 | 128])
            value >>= 7
        return content + bytes([value])

    shape = b"".join(b"\x12" + bytes([len(field(1, axis))]) + field(1, axis) for axis in axes)
    fields = (
        field(1, dtype)
        + b"\x12"
        + bytes([len(shape)])
        + shape
        + field(3, shard)
        + field(4, offset)
        + field(5, size)
    )
    return fields + b"\x35" + struct.pack("<I", checksum) + extra


def write_tensorflow(folder: Path) -> dict[str, tuple[Path, str]]:
    """All checkpoints, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}
    good = bytes(np.arange(6, dtype=np.float32))
    checksum = masked(crc32c(good))

    def case(name: str, words: str, content: bytes, data: bytes | None = good) -> None:
        prefix = folder / name.replace(" ", "-")
        prefix.with_suffix(".index").write_bytes(content)
        if data is not None:
            prefix.with_suffix(".data-00000-of-00001").write_bytes(data)
        cases[f"tensorflow {name}"] = (prefix, words)

    whole = index((b"w", entry(checksum=checksum)))
    case("half index", "is truncated, or is not an index", whole[:-20])
    case("flipped index", "the checksum of a block differs", bytes([whole[0] ^ 1]) + whole[1:])
    case(
        "half data",
        "ends at byte 24 of half-data.data-00000-of-00001, which has 20: it is truncated",
        whole,
        good[:20],
    )
    case("flipped data", "is damaged: its checksum differs", whole, good[:-1] + b"\1")
    case("no data", "no such file", whole, None)
    case("shape", "needs 28 bytes, the index says 24", index((b"w", entry(axes=(7,)))))
    case("overflow", "is not one of an array", index((b"w", entry(axes=(2**40, 2**40)))))
    case("dtype", "has the dtype number 20", index((b"w", entry(dtype=20))))
    case("partitioned", "is a partitioned variable", index((b"w", entry(extra=b"\x3a\x00"))))
    case("other shard", "is in data file 9 of 1", index((b"w", entry(shard=9))))
    case("key twice", "it has the key b'w' twice", index((b"w", entry()), (b"w", entry())))
    case("name twice", "is there twice", index((b"w", entry()), (b"w/.ATTRIBUTES/VARIABLE_VALUE", entry())))
    case(
        "big endian",
        "was written on a big-endian machine",
        index((b"w", entry()), header=b"\x08\x01\x10\x01"),
    )
    case("cut field", "is damaged", index((b"w", entry()[:-2])))
    return cases


def write_other(folder: Path) -> dict[str, tuple[Path, str]]:
    """Things that are no checkpoint, by name, and words of the message that each deserves."""
    (folder / "a folder.safetensors").mkdir()
    (folder / "a folder.safetensors" / "notes.txt").write_text("nothing", encoding="utf-8")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("a text of some length that is no checkpoint", encoding="utf-8")
    (folder / "tar.tar").write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(300))
    os.mkfifo(folder / "pipe.pth")
    (folder / "two").mkdir()
    for name in ("a", "b"):
        (folder / "two" / f"{name}.index").write_bytes(index())
    (folder / "astray").mkdir()
    (folder / "astray" / "checkpoint").write_text(
        'model_checkpoint_path: "/etc/../etc/passwd"\n', encoding="utf-8"
    )
    return {
        "absent": (folder / "absent.pth", "no such file"),
        "a folder": (
            folder / "a folder.safetensors",
            "is a folder, and neither a checkpoint of Orbax nor of TensorFlow. It holds notes.txt",
        ),
        "empty": (folder / "empty.pth", "is empty. Expected a checkpoint"),
        "text": (folder / "text.pth", "has an unknown format (it begins with 61 20 74 65 78 74 20 6f)"),
        "tar": (folder / "tar.tar", "is a tar archive. Unpack it"),
        "pipe": (folder / "pipe.pth", "is not an ordinary file"),
        "device": (Path("/dev/zero"), "is not an ordinary file"),
        "two checkpoints": (folder / "two", "holds 2 checkpoints, name one"),
        "astray": (folder / "astray", "is a folder, and neither"),
    }
