"""HDF5 files, bare and in a `.keras` archive, made to deceive."""

import zipfile
from pathlib import Path

import h5py
import numpy as np

WEIGHTS = np.arange(15, dtype=np.float32).reshape(3, 5)


def write(folder: Path) -> dict[str, tuple[Path, str]]:
    """All files, by name, and words of the message that each deserves."""
    cases: dict[str, tuple[Path, str]] = {}
    secret = folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["secret"] = np.ones(7, np.float32)
    raw = folder / "secret.bin"
    raw.write_bytes(bytes(60))

    def case(name: str, words: str, libver: str = "earliest") -> h5py.File:
        path = folder / f"{name}.weights.h5"
        cases[f"h5 {name}"] = (path, words)
        file = h5py.File(path, "w", libver=(libver, "latest"))
        file["query/vars/0"] = WEIGHTS
        return file

    with case("soft link", "query/vars/1: is a soft link; links are not followed") as file:
        file["query/vars/1"] = h5py.SoftLink("/query/vars/0")
    with case("newest soft link", "query/vars/1: is a soft link; links are not followed", "latest") as file:
        file["query/vars/1"] = h5py.SoftLink("/query/vars/0")
    with case("external link", "query/vars/1: is an external link, to another file") as file:
        file["query/vars/1"] = h5py.ExternalLink(str(secret), "/secret")
    with case("external data", "is in other files, which are not opened") as file:
        file.create_dataset("query/vars/1", (15,), np.float32, external=[(str(raw), 0, 60)])
    with case("virtual data", "is in other files, which are not opened") as file:
        layout = h5py.VirtualLayout((7,), np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "secret", (7,))
        file.create_virtual_dataset("query/vars/1", layout)
    with case("never written", "would expand to 4398046511104 bytes") as file:
        file.create_dataset("query/vars/1", (2**20, 2**20), np.float32, chunks=(1024, 1024))
    with case(
        "bomb",
        "is stored in pieces or compressed, which Keras never does, and would expand to 67108864 bytes",
    ) as file:
        file.create_dataset(
            "query/vars/1", data=np.zeros((2**12, 2**12), np.float32), chunks=(2**12, 2**12), compression=9
        )
    with case("large piece", "is stored in pieces or compressed") as file:
        file.create_dataset(
            "query/vars/1", (1,), np.float32, chunks=(2**28,), maxshape=(None,), compression=9
        )
    with case(
        "circle",
        "/query/again is reached twice: the file is damaged, or it was made so that reading does not end",
    ) as file:
        file["query/again"] = file["query"]
    with case("text", "query/vars/1: holds no plain numbers; expected numbers") as file:
        file["query/vars/1"] = "kernel"
    with case("records", "expected numbers") as file:
        file["query/vars/1"] = np.zeros(3, [("a", "<f4"), ("b", "<i4")])
    with case("nothing", "expected numbers") as file:
        file["query/vars/1"] = h5py.Empty(np.float32)
    with case("deep", "is nested deeper than any checkpoint") as file:
        file["/".join("abcdefghij" * 4)] = WEIGHTS
    with case("never written, in one piece", "needs 48 bytes, none were ever written") as file:
        file.create_dataset("query/vars/1", (3, 4), np.float32)
    with case("many links", "is a group of the newest form of HDF5") as file:
        group = file.create_group("many", track_order=True)
        for number in range(20):
            group[f"{number}"] = WEIGHTS
    case("half", "is truncated: it should have").close()
    path = folder / "half.weights.h5"
    path.write_bytes(path.read_bytes()[:-200])
    empty = folder / "empty.weights.h5"
    h5py.File(empty, "w").close()
    cases["h5 empty"] = (empty, "holds no variables")

    for name, words in (("external link", "is an external link"), ("bomb", "would expand to")):
        path = folder / f"{name}.keras"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.write(folder / f"{name}.weights.h5", "model.weights.h5")
        cases[f"keras {name}"] = (path, words)
    path = folder / "no weights.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    cases["keras no weights"] = (path, "is a .keras archive without model.weights.h5")
    path = folder / "compressed.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**26))
    cases["keras compressed"] = (path, "a zip bomb, or store it uncompressed")
    return cases
