"""PyTorch checkpoints made to deceive."""

import pickle
import struct
import warnings
import zipfile
from pathlib import Path

from tests.porting.formats.hostile.marker import Payload, pickled


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def persistent(key="0", numel=6, storage="FloatStorage") -> bytes:
    """The instructions that refer to a storage."""
    kind = b"ctorch\n" + storage.encode() + b"\n"
    return b"(" + word("storage") + kind + word(key) + word("cpu") + integer(numel) + b"tQ"


def tensor(shape=(2, 3), stride=(3, 1), offset=0, **storage) -> bytes:
    """The instructions that make a tensor."""
    axes, steps = (b"(" + b"".join(integer(value) for value in values) + b"t" for values in (shape, stride))
    rest = b"\x89ccollections\nOrderedDict\n)RtR"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + persistent(**storage)
        + integer(offset)
        + axes
        + steps
        + rest
    )


def state_dict(*items: tuple[str, bytes]) -> bytes:
    """A pickled dict of these keys and values, given as instructions; nothing hinders a key from being there twice."""
    rows = b"".join(word(key) + value for key, value in items)
    return b"\x80\x02}(" + rows + b"u."


def archive(
    path: Path, content: bytes, storages=(("0", b"\0" * 24),), compress=zipfile.ZIP_STORED, extra=()
) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        # zipfile warns of the name that is there twice on purpose.
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        for key, data in storages:
            file.writestr(f"archive/data/{key}", data, compress_type=compress)
        for name, data in extra:
            file.writestr(name, data)


def shared_dicts(levels: int) -> bytes:
    """A dict that holds the same dict twice, and so on: two to the power of `levels` paths in a few bytes."""
    content = b"\x80\x02" + tensor()
    for _ in range(levels):
        content += b"q\x000}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u"
    return content + b"."


def nested_key() -> bytes:
    """A dict whose key is a tuple of tuples that takes for ever to hash."""
    content = b"\x80\x02}K\x01"
    content += b"2\x86" * 60
    return content + b"K\x01s."


def write(folder: Path, trace: Path) -> dict[str, tuple[Path, str]]:
    """All files, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}

    def case(name: str, words: str, content: bytes | None = None, suffix: str = ".pth", **options) -> None:
        path = folder / f"{name}{suffix}"
        if content is not None:
            archive(path, content, **options)
        cases[f"torch {name}"] = (path, words)

    for protocol in (0, 1, 2, 4):
        case(
            f"runs code, protocol {protocol}",
            "would import and could run builtins.exec; nothing was executed",
            pickled(trace, protocol),
        )
    case(
        "runs code in a class",
        "loading it would import",
        state_dict(("gamma", pickle.dumps(Payload(trace), 4)[11:-1])),
    )
    case("instance instruction", "instruction INST", b"(S'x'\nios\nsystem\n.")
    case("extension instruction", "instruction EXT1", b"\x80\x02\x82\x01.")
    case("wants a module", "import and could run my_models.Generator", b"\x80\x02cmy_models\nGenerator\n)R.")
    case(
        "storage is shorter",
        "should have 24 bytes, it has 8",
        state_dict(("w", tensor())),
        storages=(("0", b"\0" * 8),),
    )
    case("storage is absent", "archive/data/7 is not in the archive", state_dict(("w", tensor(key="7"))))
    case(
        "reaches beyond", "reaches beyond its storage of 6 numbers", state_dict(("w", tensor((2, 4), (4, 1))))
    )
    case("begins beyond", "reaches beyond its storage", state_dict(("w", tensor(offset=1))))
    case("negative offset", "do not fit its shape", state_dict(("w", tensor(offset=-1))))
    case("negative stride", "do not fit its shape", state_dict(("w", tensor(stride=(-3, 1)))))
    case("negative shape", "is not one of an array", state_dict(("w", tensor((-2, 3)))))
    case(
        "repeats a number",
        "repeats a storage of 6 numbers",
        state_dict(("w", tensor((2**30, 2**10), (0, 0)))),
    )
    case("overflowing shape", "is not one of an array", state_dict(("w", tensor((2**62, 2**62), (0, 0)))))
    case("key twice", "holds the key 'w' twice", state_dict(("w", tensor()), ("w", tensor())))
    case(
        "member twice",
        "is in the archive twice",
        state_dict(("w", tensor())),
        storages=(("0", b"\0" * 24), ("0", b"\1" * 24)),
    )
    case(
        "compressed storage",
        "is compressed, which its format never does",
        state_dict(("w", tensor())),
        compress=zipfile.ZIP_DEFLATED,
    )
    case(
        "script",
        "is a TorchScript program",
        state_dict(("w", tensor())),
        extra=(("archive/code/model.py", "x"),),
    )
    case(
        "two pickles", "not a checkpoint of torch", b"\x80\x02}.", extra=(("other/data.pkl", b"\x80\x02}."),)
    )
    case("deep dicts", "nested more than", shared_dicts(40))
    case("shared dicts", "holds more than 200000 values", shared_dicts(25))
    case("slow key", "a key of type tuple", nested_key())
    case("no tensors", "holds no tensors", b"\x80\x02}X\x05\x00\x00\x00epochK\x03s.")
    case("no end", "is a damaged pickle", b"\x80\x02}")
    case("empty stack", "is a damaged pickle", b"\x80\x020.")
    case(
        "leads out",
        "a path that leads out of the archive",
        state_dict(("w", tensor())),
        extra=(("../../escaped", "x"),),
    )

    path = folder / "half.pth"
    archive(path, state_dict(("w", tensor())))
    path.write_bytes(path.read_bytes()[:-30])
    case("half", "truncated or damaged zip archive")
    path = folder / "flipped.pth"
    archive(path, state_dict(("w", tensor())), storages=(("0", b"weights!" * 3),))
    path.write_bytes(path.read_bytes().replace(b"weights!weights!", b"weights!weighted"))
    case("flipped", "is damaged (Bad CRC-32")

    path = folder / "legacy runs code.pth"
    path.write_bytes(pickled(trace))
    case("legacy runs code", "would import and could run builtins.exec; nothing was executed")
    head = b"".join(
        pickle.dumps(value, protocol=2)
        for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    )
    path = folder / "legacy promises more.pth"
    body = state_dict(("w", tensor())) + pickle.dumps(["0"], protocol=2)
    path.write_bytes(head + body + (2**40).to_bytes(8, "little") + b"\0" * 24)
    case("legacy promises more", "is truncated or damaged: storage 0 should end at byte")
    path = folder / "legacy half.pth"
    path.write_bytes(head + body[:50])
    case("legacy half", "is a damaged pickle")
    path = folder / "other pickle.pth"
    path.write_bytes(pickle.dumps({"epoch": 3}, protocol=2))
    case(
        "other pickle",
        "is a pickle, but not a checkpoint of torch, and it holds no arrays. Nothing in it was executed",
    )
    return cases
