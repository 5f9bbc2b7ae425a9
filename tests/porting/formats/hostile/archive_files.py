"""`.npz` and `.safetensors` files made to deceive."""

import io
import json
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np

from tests.porting.formats.hostile.marker import Payload


def npy(array: np.ndarray, **options) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, **options)
    return content.getvalue()


def npy_header(text: str, data: bytes = b"") -> bytes:
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def safetensors(header: object, data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def row(shape=(2, 3), begin=0, end=24, dtype="F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_npz(folder: Path, trace: Path) -> dict[str, tuple[Path, str]]:
    """All files, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, words: str, *members: tuple[str, bytes], compress: int = zipfile.ZIP_STORED) -> Path:
        path = folder / f"{name}.npz"
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compress) as file:
            warnings.simplefilter("ignore")
            for member, content in members:
                file.writestr(member, content)
        cases[f"npz {name}"] = (path, words)
        return path

    good = ("w.npy", npy(np.arange(6.0).reshape(2, 3)))
    objects = np.array([Payload(trace), 1], dtype=object)
    case(
        "objects",
        "holds Python objects, which only unpickling could read",
        ("w.npy", npy(objects, allow_pickle=True)),
    )
    case("leads out", "a path that leads out of the archive", good, ("../../escaped.npy", good[1]))
    case("absolute", "a path that leads out of the archive", good, ("/etc/escaped.npy", good[1]))
    case("windows path", "a path that leads out of the archive", good, ("..\\escaped.npy", good[1]))
    case("drive", "a path that leads out of the archive", good, ("C:escaped.npy", good[1]))
    case("member twice", "is in the archive twice", good, good)
    zeros = npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2097152, 32)}", bytes(2**29))
    case("bomb", "a zip bomb, or store it uncompressed", ("w.npy", zeros), compress=zipfile.ZIP_DEFLATED)
    promise = npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}")
    case("promises more", "needs 8796093022208 bytes, but the file has 0", ("w.npy", promise))
    case(
        "negative",
        "is not one of an array",
        ("w.npy", npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-2,)}")),
    )
    call = npy_header("__import__('os').system('true')")
    case("header is code", "its header is not numpy's", ("w.npy", call))
    case("structured", "expected numbers", ("w.npy", npy(np.zeros(2, [("a", "<f4")]))))
    case("strings", "expected numbers", ("w.npy", npy(np.array(["a"]))))
    path = case("half", "truncated or damaged zip archive", good)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path = case("flipped", "is damaged (Bad CRC-32", ("w.npy", npy(np.frombuffer(b"weights!" * 3))))
    path.write_bytes(path.read_bytes().replace(b"weights!weights!", b"weights!weighted"))
    path = case("encrypted", "is encrypted", good)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    path = case(
        "overlap", "its members overlap", good, ("v.npy", good[1]), ("u.npy", good[1]), ("t.npy", good[1])
    )
    # Every member of the list points at the first one's bytes, and the rest is gone.
    with zipfile.ZipFile(path) as file:
        first = file.infolist()[1].header_offset
    content = path.read_bytes()
    directory = content.index(b"PK\1\2")
    listing = bytearray(content[directory:])
    place = 0
    while (place := listing.find(b"PK\1\2", place)) >= 0:
        listing[place + 42 : place + 46] = bytes(4)
        place += 4
    end = listing.index(b"PK\5\6")
    listing[end + 16 : end + 20] = struct.pack("<I", first)
    path.write_bytes(content[:first] + listing)
    return cases


def write_safetensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """All files, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, words: str, content: bytes) -> None:
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        cases[f"safetensors {name}"] = (path, words)

    whole = safetensors({"w": row()}, bytes(24))
    case("half", "the file is truncated: its header promises 24 bytes of data, and it has 12", whole[:-12])
    case("half header", "is truncated or no .safetensors file", whole[:30])
    case("endless header", "its header should have 4294967296 bytes", struct.pack("<Q", 2**32) + whole[8:])
    case("key twice", "holds a key twice: w", safetensors(b'{"w": 1, "w": 2}'))
    case(
        "overlap",
        "begins at byte 12 of the data, but the tensor before it ends at 24",
        safetensors({"w": row(), "v": row(begin=12, end=36)}, bytes(36)),
    )
    case("gap", "begins at byte 4 of the data", safetensors({"w": row(begin=4, end=28)}, bytes(28)))
    case("trailing", "8 bytes behind the last tensor belong to no tensor", whole + bytes(8))
    case("shape", "needs 28 bytes, data_offsets 0 to 24 are 24", safetensors({"w": row((7,))}, bytes(24)))
    case("negative", "is not one of an array", safetensors({"w": row((-2, -3))}, bytes(24)))
    case("overflow", "is not one of an array", safetensors({"w": row((2**40, 2**40))}, bytes(24)))
    case("text shape", "is not one of an array", safetensors({"w": row(("2", 3))}, bytes(24)))
    case("true offsets", "not two integers", safetensors({"w": row(begin=True)}, bytes(24)))
    case("unknown dtype", "unknown dtype 'F33'", safetensors({"w": row(dtype="F33")}, bytes(24)))
    case("no row", "expected dtype, shape and data_offsets", safetensors({"w": [1]}, bytes(24)))
    case("no JSON", "its header is not JSON", safetensors(b'{"w"}'))
    case("deep", "its header is not JSON", safetensors(b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
    case("metadata", "is not a JSON object of strings", safetensors({"__metadata__": {"version": 1}}))
    return cases
