"""Explains files and folders of unsupported formats, and the call of their own library that makes a supported file."""

from collections.abc import Callable, Collection
from pathlib import Path

__all__ = ["unread_archive", "unread_file", "unread_folder"]

_SAVEZ = "numpy.savez"

# The first bytes or a function of them, with a message: what the file is, and what to do.
_SIGNS: tuple[tuple[bytes | Callable[[bytes], bool], str], ...] = (
    (
        lambda start: start[257:262] == b"ustar",
        "is a tar archive. Unpack it. If torch before 0.1.10 wrote it, load it with that torch and save it again",
    ),
    (b"\x1f\x8b", "is compressed with gzip. Unpack it with gunzip, or with tar xzf if it is a .tar.gz"),
    (b"BZh", "is compressed with bzip2. Unpack it with bunzip2"),
    (b"\xfd7zXZ\0", "is compressed with xz. Unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard. Unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive. Unpack it"),
    (b"Rar!", "is a rar archive. Unpack it"),
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its repository, or download the file",
    ),
    (
        lambda start: start.lstrip().lower().startswith((b"<!doctype html", b"<html")),
        (
            "is a web page, saved instead of the file. Download the file itself (from Hugging Face by the address with "
            "/resolve/, from GitHub by the one with /raw/, from Google Drive with gdown)"
        ),
    ),
    (
        b"\x93NUMPY",
        (
            "is one array of numpy. If it contains a dictionary and you trust it, make an .npz: numpy.savez('weights.npz', "
            "**numpy.load(PATH, allow_pickle=True).item())"
        ),
    ),
    (
        b"MATLAB 5.0",
        f"is a file of MATLAB. Make an .npz of it with scipy.io.loadmat and {_SAVEZ}",
    ),
    (b"GGUF", f"is a GGUF file. Make an .npz of it with gguf.GGUFReader and {_SAVEZ}"),
    (
        lambda start: start[4:8] == b"TFL3",
        f"is a model of LiteRT. Take its tensors with ai_edge_litert's Interpreter.get_tensor and save them with {_SAVEZ}",
    ),
)
_SUFFIXES = {
    ".onnx": "is a model of ONNX. Make an .npz of it: numpy.savez('weights.npz', **{t.name: "
    "onnx.numpy_helper.to_array(t) for t in onnx.load(PATH).graph.initializer})",
    ".pb": "is a graph of TensorFlow. Name the folder of a SavedModel, or save the Const nodes of a frozen graph with "
    f"tensorflow.make_ndarray and {_SAVEZ}",
}
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".h5", ".keras", ".msgpack", ".npz", ".pkl")


def unread_file(path: Path, start: bytes) -> str:
    """The message for a file, by its first bytes or its suffix. "" if it is unknown.

    Example:
        >>> unread_file(Path("a.pth"), b"version https://git-lfs.github.com/spec/v1")[:30]
        'is a pointer of Git LFS, not t'
    """
    for sign, text in _SIGNS:
        if start.startswith(sign) if isinstance(sign, bytes) else sign(start):
            return text
    return _SUFFIXES.get(path.suffix, "")


def unread_archive(names: Collection[str]) -> str:
    """The message for a zip archive, by the names in it. "" if it is unknown.

    Example:
        >>> unread_archive(["D.pth"])
        'is a zip archive that holds D.pth. Unpack it and name that file'
    """
    if any(name.endswith(("/archive_format", "/models/model.json")) for name in names):
        return (
            "is a program of torch.export (.pt2). Load it with torch.export.load and save its state_dict: "
            "torch.save(torch.export.load(PATH).state_dict, 'weights.pth')"
        )
    held = [name for name in names if name.endswith(_CHECKPOINTS)]
    return f"is a zip archive that holds {', '.join(held[:6])}. Unpack it and name that file" if held else ""


def unread_folder(folder: Path, steps: list[Path]) -> str:
    """The message for a folder. "" if it is unknown.

    Args:
        folder: the folder.
        steps: folders in it that are checkpoints of Orbax.

    Example:
        >>> unread_folder(Path("run"), [Path("run/3"), Path("run/10")])
        'holds several checkpoints of Orbax. Name one: run/3, run/10'
    """
    if steps:
        return f"holds several checkpoints of Orbax. Name one: {', '.join(map(str, steps[-6:]))}"
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        return (
            "is a distributed checkpoint of torch. Make a file of it: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} weights.pth"
        )
    held = sorted(path.name for path in folder.iterdir() if path.suffix in _CHECKPOINTS)
    return f"is a folder. Name a file in it: {', '.join(held[:6])}" if held else ""
