"""Damaged checkpoints by the ten thousand: `make fuzz`.

Every reader gets copies of a sound file with bytes flipped, cut out, doubled, put in or set to numbers that hurt, from a seed.
It may read what is left or refuse with a PortError. What it must not do: raise anything else, crash the interpreter, take
longer than `HANG` seconds, or allocate more than `BOUND` bytes beyond what it had before. Where a checksum or a compression
would hide the damage, half of the copies are damaged inside and wrapped up again.
"""

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from selfattn_core.porting import PortError, open_tensors
from selfattn_core.porting.formats.untrusted.crc32c import crc32c, masked

__all__ = ["BOUND", "HANG", "READERS", "run"]

# Peak memory beyond that of the imports, in bytes; the samples have a few hundred.
BOUND = 128 * 2**20
# Seconds for one file; on a quiet core a file takes milliseconds.
HANG = 20
_INTERESTING = (0, 1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)

# Reader: the sample below the folder of samples.
READERS = {
    "safetensors": "plain.safetensors",
    "npz": "plain.npz",
    "torch": "plain.pth",
    "torch-legacy": "legacy.pth",
    "keras": "model.keras",
    "h5": "model.weights.h5",
    "msgpack": "plain.msgpack",
    "orbax": "linen",
    "tensorflow": "saver/model.ckpt-7.index",
    "pickle": "plain.pkl",
}


def damage(content: bytes, generator: np.random.Generator) -> bytes:
    """The content with one to four faults."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        if not data:
            break
        place = int(generator.integers(len(data)))
        length = int(generator.integers(1, 1 + min(64, len(data) - place)))
        match int(generator.integers(8)):
            case 0:
                data[place] ^= 1 << int(generator.integers(8))
            case 1:
                data[place : place + length] = generator.bytes(length)
            case 2:
                data[place : place + length] = bytes([int(generator.choice([0, 255]))]) * length
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                del data[place:]
            case 6:
                width = int(generator.choice([1, 2, 4, 8]))
                value = _INTERESTING[int(generator.integers(len(_INTERESTING)))] % 2 ** (8 * width)
                order = "little" if generator.integers(2) else "big"
                data[place : place + width] = value.to_bytes(width, order)
            case _:
                other = int(generator.integers(len(data)))
                data[place : place + length] = data[other : other + length]
    return bytes(data)


def damage_inside_zip(content: bytes, generator: np.random.Generator) -> bytes:
    """A member damaged and the archive made anew, so that its checksums are right."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        # A damaged network is not described by its weights alone, but large members are where the structure is.
        names = old.namelist()
        chosen = names[int(generator.integers(len(names)))]
        for name in names:
            member = old.read(name)
            new.writestr(name, damage(member, generator) if name == chosen else member)
    return result.getvalue()


def damage_inside_index(content: bytes, generator: np.random.Generator) -> bytes:
    """A block of TensorFlow's index damaged in place, and its checksum made right."""
    data = bytearray(content)
    footer = data[-48:]
    offset, size = _handle(footer, _skip(footer, 2))
    # A row is three lengths, a key and a handle.
    first, length = _handle(data, offset + 3 + data[offset + 1])
    begin, count = (first, length) if generator.integers(3) and first + length < len(data) else (offset, size)
    for _ in range(int(generator.integers(1, 4))):
        data[begin + int(generator.integers(count))] = int(generator.integers(256))
    checksum = masked(crc32c(bytes(data[begin : begin + count + 1])))
    data[begin + count + 1 : begin + count + 5] = struct.pack("<I", checksum)
    return bytes(data)


def _skip(data: bytearray, numbers: int) -> int:
    place = 0
    for _ in range(numbers):
        while data[place] > 127:
            place += 1
        place += 1
    return place


def _handle(data: bytearray, place: int) -> tuple[int, int]:
    values = []
    for _ in range(2):
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        values.append(value)
    return values[0], values[1]


_INSIDE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "npz": damage_inside_zip,
    "torch": damage_inside_zip,
    "keras": damage_inside_zip,
    "tensorflow": damage_inside_index,
}


def one(reader: str, sample: Path, folder: Path, seed: int, number: int) -> str:
    """Damage the sample in a way of this number's own and read it; "read" or "refused"."""
    generator = np.random.default_rng((seed, list(READERS).index(reader), number))
    target = folder / sample.name
    inside = _INSIDE.get(reader)
    change = inside if inside and number % 2 else damage
    if sample.is_dir():
        files = sorted(path.relative_to(sample) for path in sample.rglob("*") if path.is_file())
        chosen = files[int(generator.integers(len(files)))]
        (target / chosen).write_bytes(change((sample / chosen).read_bytes(), generator))
    else:
        target.write_bytes(change(sample.read_bytes(), generator))
    try:
        with open_tensors(target, format=reader) as tensors:
            for key in tensors:
                tensors.read(key)
        return "read"
    except PortError:
        return "refused"
    finally:
        if sample.is_dir():
            shutil.copyfile(sample / chosen, target / chosen)


def prepare(sample: Path, folder: Path) -> None:
    """What stays the same from file to file."""
    if sample.is_dir():
        shutil.copytree(sample, folder / sample.name)
    for path in sample.parent.glob(f"{sample.stem}.data-*"):
        shutil.copy(path, folder)


def loop(reader: str, sample: Path, seed: int, first: int, last: int, pipe: Connection) -> None:
    """A worker: tells the number that it begins, then how it went."""
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as name:
        folder = Path(name)
        prepare(sample, folder)
        with open_tensors(_target(sample, folder), format=reader) as tensors:
            for key in tensors:
                tensors.read(key)
        before = _peak()
        soft = _address_space() + 4 * BOUND
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        sample.read_bytes() if sample.is_file() else None
        for number in range(first, last):
            pipe.send((number, "begun"))
            try:
                outcome = one(reader, sample, folder, seed, number)
            except BaseException:  # whatever it is, it is the finding
                outcome = traceback.format_exc(limit=-4)
            if _peak() - before > BOUND:
                outcome = f"allocated {_peak() - before} bytes"
                before = _peak()
            pipe.send((number, outcome))
    pipe.send((last, "done"))


def _target(sample: Path, folder: Path) -> Path:
    if not sample.is_dir():
        shutil.copy(sample, folder)
    return folder / sample.name


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder of its own is made in it


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def run(reader: str, sample: Path, seed: int, count: int) -> tuple[Counter[str], dict[int, str]]:
    """Outcomes and findings of one reader; a worker that crashes or hangs is replaced by another, from the next number on."""
    outcomes: Counter[str] = Counter()
    findings: dict[int, str] = {}
    context = multiprocessing.get_context("spawn")
    number = 0
    while number < count:
        receive, send = context.Pipe(duplex=False)
        worker = context.Process(target=loop, args=(reader, sample, seed, number, count, send))
        worker.start()
        send.close()
        outcome = _follow(receive, outcomes, findings)
        worker.kill() if outcome[1] == "hung" else None
        worker.join()
        if outcome[1] == "done":
            break
        what = f"hung for {HANG} s" if outcome[1] == "hung" else f"crashed, exit code {worker.exitcode}"
        if outcome[0] < 0:
            raise RuntimeError(f"the worker for {reader} did not start: {what}")
        findings[outcome[0]] = what
        number = outcome[0] + 1
    return outcomes, findings


def _follow(receive: Connection, outcomes: Counter[str], findings: dict[int, str]) -> tuple[int, str]:
    number = -1
    patience = 120
    while True:
        try:
            if not receive.poll(patience):
                return number, "hung"
            number, outcome = receive.recv()
        except EOFError:
            return number, "crashed"
        patience = HANG
        if outcome == "done":
            return number, "done"
        if outcome in ("read", "refused"):
            outcomes[outcome] += 1
        elif outcome != "begun":
            findings[number] = outcome


def main() -> int:
    """Every reader, or those that are named; exit code 1 with findings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, help="folder of samples; by default they are made")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = options.samples or Path(name)
        if not options.samples:
            make_samples(folder)
        for reader in options.readers or READERS:
            began = time.monotonic()
            outcomes, findings = run(reader, folder / READERS[reader], options.seed, options.count)
            seconds = time.monotonic() - began
            report[reader] = {**outcomes, "findings": findings, "seconds": round(seconds, 1)}
            print(f"{reader:<13} {dict(outcomes)} {len(findings)} findings {seconds:.0f} s", flush=True)
            for number, finding in list(findings.items())[:5]:
                print(f"  {number}: {finding}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(any(row["findings"] for row in report.values()))


def make_samples(folder: Path) -> None:
    """Sound files, each by its own library in a process of its own."""
    import subprocess

    for library in ("safetensors", "npz", "torch", "flax", "keras"):
        subprocess.run(
            [sys.executable, "-m", "tests.porting.formats.samples", library, str(folder)], check=True
        )


if __name__ == "__main__":
    sys.exit(main())
