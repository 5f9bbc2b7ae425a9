"""Every command × every kind of target: what was there stays whole, and what is no file is written into."""

import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from selfattn_core import verifying
from selfattn_core.cli import main
from selfattn_core.conformance.execution import runner
from selfattn_core.conformance.results import BackendReport
from selfattn_core.conformance.verdicts.tolerance import Verdict
from selfattn_core.verifying import Finding, VerifyReport
from tests.files.devices import FULL, HOLE, make_device
from tests.files.writers import WRITERS, Writer, make_inputs

PRECIOUS = b"precious"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Inputs, without the processes that compute: a report of a backend that is not there, no framework's layer."""
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    reports = [BackendReport("torch", missing=("torch",), extra="torch")]
    monkeypatch.setattr(runner, "run_backends", lambda *_, **__: reports)
    report = VerifyReport(
        artifact="numpy:copy",
        weights="new.safetensors",
        container="module:callable",
        runtime="python",
        versions={},
        config={},
        layout="channels_last",
        sizes=(None, None, None),
        with_map=False,
        precision="float32",
        why="",
        factor=8.0,
        findings=(Finding("2×3×4", (Verdict("y", 0.0, 0.0, True),)),),
    )
    monkeypatch.setattr(verifying, "verify", lambda *_, **__: report)
    # Of the package the name `port` is the function.
    monkeypatch.setattr(sys.modules["selfattn_core.porting.port"], "check_framework", lambda *_: [])
    return tmp_path


@dataclass(frozen=True)
class Target:
    """What a command is told to write to.

    Args:
        name: as it is typed.
        refused: a part of the message, if nothing is to be written; empty if something is.
        received: what has arrived there, where that can be asked.
    """

    name: str
    refused: str = ""
    received: Callable[[], bytes] | None = None


def _missing(folder: Path, writer: Writer) -> Target:
    return Target(f"o{writer.suffix}", received=_content(folder / f"o{writer.suffix}"))


def _regular(folder: Path, writer: Writer) -> Target:
    path = folder / f"o{writer.suffix}"
    path.write_bytes(PRECIOUS)
    return Target(
        path.name, "is a file; a checkpoint of Orbax is a folder" if writer.folder else "", _content(path)
    )


def _directory(folder: Path, writer: Writer) -> Target:
    path = folder / f"o{writer.suffix}"
    path.mkdir()
    (path / "notes").write_bytes(PRECIOUS)
    return Target(path.name, "is a folder")


def _link(folder: Path, writer: Writer) -> Target:
    (folder / "elsewhere").mkdir()
    real = folder / "elsewhere" / f"real{writer.suffix}"
    if not writer.folder:
        real.write_bytes(PRECIOUS)
    (folder / f"o{writer.suffix}").symlink_to(real)
    return Target(f"o{writer.suffix}", received=_content(real))


def _device(folder: Path, writer: Writer) -> Target:
    make_device(folder / f"o{writer.suffix}", HOLE)
    return Target(f"o{writer.suffix}", "is a file" if writer.folder else "")


def _full_device(folder: Path, writer: Writer) -> Target:
    make_device(folder / f"o{writer.suffix}", FULL)
    return Target(f"o{writer.suffix}", "is a file" if writer.folder else "No space left on device")


def _fifo(folder: Path, writer: Writer) -> Target:
    path = folder / f"o{writer.suffix}"
    os.mkfifo(path)
    return Target(path.name, "is a file" if writer.folder else "", _reader(_open_fifo(path)))


def _fifo_without_reader(folder: Path, writer: Writer) -> Target:
    os.mkfifo(folder / f"o{writer.suffix}")
    return Target(f"o{writer.suffix}", "is a file" if writer.folder else "nobody reads from it")


def _pipe(folder: Path, writer: Writer) -> Target:
    """What a shell's process substitution hands over."""
    reading, writing = os.pipe()
    (folder / f"o{writer.suffix}").symlink_to(f"/dev/fd/{writing}")
    received = _reader(reading)

    def closed_and_received() -> bytes:
        os.close(writing)
        return received()

    return Target(f"o{writer.suffix}", "is a file" if writer.folder else "", closed_and_received)


def _closed_pipe(folder: Path, writer: Writer) -> Target:
    reading, writing = os.pipe()
    os.close(reading)
    (folder / f"o{writer.suffix}").symlink_to(f"/dev/fd/{writing}")
    return Target(f"o{writer.suffix}", "is a file" if writer.folder else "Broken pipe")


def _input_itself(_: Path, writer: Writer) -> Target:
    return Target(writer.reads, _of_input(writer))


def _link_to_input(folder: Path, writer: Writer) -> Target:
    (folder / f"o{writer.suffix}").symlink_to(writer.reads)
    return Target(f"o{writer.suffix}", _of_input(writer))


def _hard_link_to_input(folder: Path, writer: Writer) -> Target:
    (folder / f"o{writer.suffix}").hardlink_to(folder / writer.reads)
    return Target(f"o{writer.suffix}", _of_input(writer))


KINDS: dict[str, Callable[[Path, Writer], Target]] = {
    "missing": _missing,
    "regular": _regular,
    "directory": _directory,
    "link": _link,
    "device": _device,
    "full device": _full_device,
    "FIFO": _fifo,
    "FIFO without a reader": _fifo_without_reader,
    "pipe": _pipe,
    "closed pipe": _closed_pipe,
    "input itself": _input_itself,
    "link to the input": _link_to_input,
    "hard link to the input": _hard_link_to_input,
}


def _of_input(writer: Writer) -> str:
    """How a target that is read is refused: by a port, or before the command begins."""
    ported = writer.forced and writer.reads == "layer.safetensors"
    return "is the source" if ported else "would replace"


def _content(path: Path) -> Callable[[], bytes]:
    return lambda: b"" if not path.exists() else path.read_bytes() if path.is_file() else b"a folder"


def _open_fifo(path: Path) -> int:
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(opened, True)
    return opened


def _reader(descriptor: int) -> Callable[[], bytes]:
    """What a thread reads from a descriptor until its writers are gone."""
    found: list[bytes] = []

    def read() -> None:
        with os.fdopen(descriptor, "rb") as file:
            found.append(file.read())

    # A pipe that was never written to is never at its end.
    thread = threading.Thread(target=read, daemon=True)

    def wait() -> bytes:
        thread.start()
        thread.join(timeout=10)
        return found[0] if found else b""

    return wait


def _state(folder: Path) -> dict[str, tuple[int, object]]:
    """The kind of everything there, and the content of what is not the target's own business."""
    return {
        str(path.relative_to(folder)): (
            stat.S_IFMT(path.lstat().st_mode),
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


# `conform` reads no file that it could be told to write to.
CELLS = [(name, kind) for name in WRITERS for kind in KINDS if WRITERS[name].reads or "input" not in kind]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_every_command_and_every_kind_of_target(folder, name, kind):
    writer = WRITERS[name]
    target = KINDS[kind](folder, writer)
    before = _state(folder)
    done = CliRunner().invoke(main, writer.command(target.name))
    after = _state(folder)
    refused = bool(target.refused) or "input" in kind
    # A backend that is missing is what the canned report of `conform` says.
    right = 3 if name.startswith("conform") else 0
    assert done.exit_code == (2 if refused else right), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert not [path for path in after if path.rpartition("/")[2].startswith(".")], "nothing is left beside"
    if refused:
        assert target.refused in done.output
        assert Path(target.name).name in done.output, "the message names what the user named"
        assert after == before
        return
    if kind in ("missing", "regular", "link", "FIFO", "pipe"):
        content = target.received()
        assert content, "it has arrived"
        assert content != PRECIOUS
    changed = {path for path in after if before.get(path) != after[path] and not path.startswith("o/")}
    whole = {"missing": {f"o{writer.suffix}"}, "regular": {f"o{writer.suffix}"}}
    place = f"elsewhere/real{writer.suffix}"
    allowed = {path for path in changed if path == place or path.startswith(f"{place}/")}
    assert changed == (allowed if kind == "link" else whole.get(kind, set()))
    assert before.keys() <= after.keys()


@pytest.mark.parametrize("name", [name for name, writer in WRITERS.items() if writer.forced])
@pytest.mark.parametrize("kind", ["regular", "link", "device", "FIFO"])
def test_nothing_is_replaced_unless_that_is_asked_for(folder, name, kind):
    writer = WRITERS[name]
    target = KINDS[kind](folder, writer)
    if writer.folder and kind == "link":
        (folder / "elsewhere" / "real").mkdir()
    before = _state(folder)
    command = [part for part in writer.command(target.name) if part != "--force"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert target.refused or "exists already" in done.output, done.output
    assert _state(folder) == before


def test_a_checkpoint_that_is_a_folder_is_replaced_as_one(folder):
    writer = WRITERS["port to orbax"]
    assert CliRunner().invoke(main, writer.command("o")).exit_code == 0
    names = sorted(path.name for path in (folder / "o").rglob("*") if path.name == "_METADATA")
    (folder / "o" / "extra").write_bytes(PRECIOUS)
    assert CliRunner().invoke(main, writer.command("o")).exit_code == 0
    assert not (folder / "o" / "extra").exists()
    assert sorted(path.name for path in (folder / "o").rglob("*") if path.name == "_METADATA") == names


def test_a_part_of_what_is_read(folder):
    """A checkpoint that is a folder: a file in it, and the folder that holds it."""
    writer = WRITERS["port to orbax"]
    (folder / "outer").mkdir()
    assert CliRunner().invoke(main, writer.command("outer/inner")).exit_code == 0
    before = _state(folder)
    for command in (
        ["port", "outer/inner", "outer/inner/o.npz", "--from", "flax", "--to", "fgh", "--force"],
        ["port", "outer/inner", "outer", "--from", "flax", "--to", "flax", "--force"],
        ["port", "outer/inner", "outer/inner", "--from", "flax", "--to", "flax", "--force"],
        ["inspect", "outer/inner", "--json", "outer/inner/report.json"],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2, done.output
        assert _state(folder) == before


def test_other_files_that_a_port_reads(folder):
    dialect = CliRunner().invoke(main, ["dialects", "fgh"]).output
    (folder / "mine.toml").write_text(dialect, encoding="utf-8")
    (folder / "io.npz").write_bytes(PRECIOUS)
    (folder / "o.npz").symlink_to("mine.toml")
    before = _state(folder)
    for target, more, words in (
        ("io.npz", ("--to", "fgh", "--check", "io.npz"), "is the file of check"),
        ("o.npz", ("--to", "mine.toml"), "is the dialect of to"),
    ):
        done = CliRunner().invoke(main, ["port", "layer.safetensors", target, *more, "--force"])
        assert done.exit_code == 2
        assert words in done.output
        assert _state(folder) == before


def test_a_report_that_cannot_be_written_keeps_no_other_from_it(folder):
    """A run takes minutes."""
    make_device(folder / "full", FULL)
    command = [
        "conform",
        "torch",
        "--html",
        "full",
        "--json",
        "o.json",
        "--junit",
        "full",
        "--markdown",
        "o.md",
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert "not written: --html full: No space left on device; --junit full: No space" in done.output
    assert (folder / "o.json").exists()
    assert (folder / "o.md").exists()


@pytest.mark.parametrize("name", ["port --json", "inspect --json", "conform --json", "verify --json"])
def test_another_name_of_standard_output_is_standard_output(folder, name):
    """So that what is told to a person goes elsewhere."""
    done = CliRunner().invoke(main, WRITERS[name].command("/dev/stdout"))
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stderr
    twice = CliRunner().invoke(main, ["conform", "torch", "--json", "-", "--html", "/dev/stdout"])
    assert "cannot both go to standard output" in twice.output


def test_two_reports_can_go_to_one_device_and_not_to_one_file(folder):
    make_device(folder / "hole", HOLE)
    done = CliRunner().invoke(main, ["conform", "torch", "--json", "hole", "--html", "hole"])
    assert done.exit_code == 3, done.output
    done = CliRunner().invoke(main, ["conform", "torch", "--json", "o", "--html", "./o"])
    assert done.exit_code == 2
    assert "--json and --html cannot all go to" in done.output
