"""The sweep over what takes a file away: kills, full disks and read-only places, over every writer of the command.

`make test-loss` runs it. It asks the system for small file systems of its own, which needs Linux with user namespaces, and
ends with 1 if an old file was harmed, a command hung, or a traceback was shown, and with 3 where it cannot be run.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.files.writers import WRITERS, Writer, make_inputs

ROOT = Path(__file__).parents[2]
SECONDS = 120
"""After which a command is said to hang; the slowest of them takes 20 on two busy cores."""

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
_COMMAND = "import sys; from selfattn_core.cli import main; main(prog_name='selfattn')"
_INSIDE = "SELFATTN_LOSS_INSIDE"


@dataclass
class Found:
    """What a sweep has seen.

    Args:
        codes: how often a command ended with which exit code.
        harmed: runs after which an old file was not what it was, nor the new one.
        hung: runs that did not end.
        tracebacks: runs that showed one.
        left: runs that ended by themselves and left something beside the target.
    """

    codes: Counter[int] = field(default_factory=Counter)
    harmed: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether anything was lost or went wrong."""
        return bool(self.harmed or self.hung or self.tracebacks or self.left)

    def __str__(self) -> str:
        codes = ", ".join(f"exit {code} × {count}" for code, count in sorted(self.codes.items()))
        parts = [f"{sum(self.codes.values())} runs: {codes}"]
        for name in ("harmed", "hung", "tracebacks", "left"):
            runs = getattr(self, name)
            parts.append(f"{len(runs)} {name}{f': {runs}' if runs else ''}")
        return "; ".join(parts)


def digest(path: Path) -> str:
    """What stands at a path: the bytes of a file, or of everything in a folder."""
    sums = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file():
            sums.update(str(part.relative_to(path)).encode() + part.read_bytes())
    return sums.hexdigest()


def start(writer: Writer, target: str, folder: Path, temporary: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *writer.command(target)],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], run: str, found: Found, *, seconds: float = SECONDS) -> None:
    """Wait for its end."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        found.hung.append(run)
    found.codes[process.returncode] += 1
    if "Traceback" in output:
        found.tracebacks.append(f"{run}: {output[-2000:]}")


@contextmanager
def file_system(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system in memory of this size."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def put_old(writer: Writer, target: Path, store: Path) -> str:
    """An earlier result at the target, made once for each writer; what it is."""
    old = store / f"old{writer.suffix}"
    if writer.folder:
        shutil.copytree(old, target)
    else:
        shutil.copy(old, target)
    return digest(target)


def make_old(folder: Path, store: Path, names: list[str]) -> None:
    """What each writer writes where nothing stands in its way."""
    for name in names:
        place = store / name.replace(" ", "-")
        place.mkdir()
        found = Found()
        finish(start(WRITERS[name], str(place / f"old{WRITERS[name].suffix}"), folder, store), name, found)
        if found.bad or set(found.codes) != {0}:
            sys.exit(f"{name} does not work at all: {found}")


def hidden(folder: Path) -> list[str]:
    """What is left beside a target."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def kills(folder: Path, store: Path, names: list[str], runs: int, generator: np.random.Generator) -> Found:
    """Kill commands at any moment: the target is the old or the new one, and the next run tidies up."""
    found = Found()
    place = folder / "kills"
    place.mkdir()
    lasted: dict[str, float] = {}
    for number in range(runs):
        name = names[number % len(names)]
        writer, run = WRITERS[name], f"kill {number}, {name}"
        target = place / f"o{writer.suffix}"
        old = put_old(writer, target, store / name.replace(" ", "-"))
        if name not in lasted:
            began = time.monotonic()
            process = start(writer, str(target), folder, store)
            finish(process, run, found)
            lasted[name] = time.monotonic() - began
        else:
            process = start(writer, str(target), folder, store)
            # The last third is when something is written.
            time.sleep(lasted[name] * (1 - generator.random() ** 2 * 0.9))
            signalled = SIGNALS[generator.integers(len(SIGNALS))]
            (os.killpg if signalled == signal.SIGKILL else os.kill)(process.pid, signalled)
            finish(process, run, found)
            if process.returncode not in (-9, -15, -1) and hidden(place):
                found.left.append(f"{run}: {hidden(place)}")
        if not is_whole(target, old, folder):
            found.harmed.append(run)
        remove(target)
        if number >= runs - len(names):
            finish(start(writer, str(target), folder, store), run, found)
            if any(one.startswith(f".{target.name}.") for one in hidden(place)):
                found.left.append(f"{run}, and one more: {hidden(place)}")
            remove(target)
    return found


def is_whole(target: Path, old: str, folder: Path) -> bool:
    """Whether a target is what it was, or can be read as what the command writes."""
    if not target.exists():
        return False
    if digest(target) == old:
        return True
    if target.suffix in (".json", ".html", ".junit", ".markdown", ".png"):
        ends = {
            ".json": b"}\n",
            ".html": b"</html>\n",
            ".junit": b">\n",
            ".markdown": b"\n",
            ".png": b"IEND\xaeB`\x82",
        }
        return target.read_bytes().endswith(ends[target.suffix])
    return not subprocess.run(
        [sys.executable, "-c", _COMMAND, "inspect", str(target)], cwd=folder, capture_output=True, check=False
    ).returncode


def remove(target: Path) -> None:
    """Take a target away."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def full_disks(
    folder: Path, store: Path, names: list[str], runs: int, generator: np.random.Generator
) -> Found:
    """Write where there is no more room, at any number of bytes that are left, also none for temporary files."""
    found = Found()
    for number in range(runs):
        name = names[number % len(names)]
        writer, run = WRITERS[name], f"full disk {number}, {name}"
        with file_system(folder / "disk", 4096) as disk:
            target = disk / f"o{writer.suffix}"
            old = put_old(writer, target, store / name.replace(" ", "-"))
            room = 4096 * max(0, int(generator.integers(-1, 4)))
            with (disk / "ballast").open("wb") as ballast:
                ballast.write(b"\1" * room)
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                ballast.write(b"\1" * (free - 4096))
                ballast.flush()
                os.ftruncate(ballast.fileno(), ballast.tell() - room)
            temporary = disk if number % 5 == 4 and not name.startswith("conform") else store
            finish(start(writer, str(target), folder, temporary), run, found)
            if not is_whole(target, old, folder):
                found.harmed.append(run)
            if hidden(disk):
                found.left.append(f"{run}: {hidden(disk)}")
    return found


def read_only(folder: Path, store: Path, names: list[str], runs: int, _: np.random.Generator) -> Found:
    """Write where nothing may be written: over an old file, as a new one, through a link into it."""
    found = Found()
    for number in range(runs):
        name = names[number % len(names)]
        writer, run = WRITERS[name], f"read-only {number}, {name}"
        with file_system(folder / "disk", 4096) as disk:
            target = disk / f"o{writer.suffix}"
            old = put_old(writer, target, store / name.replace(" ", "-"))
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            link = folder / f"link{writer.suffix}"
            link.symlink_to(target)
            way = [str(target), str(disk / f"new{writer.suffix}"), str(link)][number // len(names) % 3]
            finish(start(writer, way, folder, store), run, found)
            if digest(target) != old or (disk / f"new{writer.suffix}").exists():
                found.harmed.append(run)
            link.unlink()
    return found


SWEEPS = {"kills": kills, "full-disks": full_disks, "read-only": read_only}


def main() -> int:
    """Run the sweeps that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=50)
    parser.add_argument("--read-only", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if _INSIDE not in os.environ:
        # A namespace of our own, where we may mount and which ends with us.
        inside = ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
            print(
                "needs `unshare --map-root-user --mount`, which this system does not allow; nothing was tried"
            )
            return 3
        return subprocess.run(
            [*inside, sys.executable, "-m", "tests.files.loss", *sys.argv[1:]],
            cwd=ROOT,
            env=os.environ | {_INSIDE: "1"},
            check=False,
        ).returncode
    bad = False
    with tempfile.TemporaryDirectory(prefix="selfattn-loss-") as name:
        folder, store = Path(name), Path(name) / "store"
        store.mkdir()
        make_inputs(folder)
        # One form of `conform` stands for all four, which are written by the same lines; it computes for seconds.
        names = [name for name in WRITERS if not name.startswith("conform") or name.endswith("json")]
        make_old(folder, store, names)
        for title, sweep in SWEEPS.items():
            runs = getattr(asked, title.replace("-", "_"))
            found = sweep(folder, store, names, runs, np.random.default_rng(asked.seed))
            bad = bad or found.bad
            print(f"{title}: {found}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
