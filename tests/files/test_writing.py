"""A file or a folder comes whole or not at all, and what a killed process has left goes with the next one."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selfattn_core import SelfAttentionConfig, init_params, save
from selfattn_core.files import writing
from selfattn_core.files.writing import workplace, write_atomically, write_folder_atomically
from tests.files.devices import HOLE, make_device

OLD, NEW = b"old", b"new content"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_folder(path: Path, content: bytes) -> None:
    path.mkdir()
    (path / "array").write_bytes(content)


def replace_folder(path: Path, *, overwrite: bool = True, then: Callable[[], None] = lambda: None) -> None:
    with write_folder_atomically(path, overwrite=overwrite) as place:
        make_folder(place, NEW)
        then()


def fail() -> None:
    raise ArithmeticError


class TestAFile:
    def test_arrives_in_pieces_of_any_kind(self, tmp_path):
        pieces = [
            b"",
            b"abc",
            memoryview(np.arange(6, dtype="<i2").reshape(2, 3)),
            memoryview(np.array(7, "u1")),
        ]
        write_atomically(tmp_path / "x", pieces, overwrite=False)
        assert (tmp_path / "x").read_bytes() == b"abc" + np.arange(6, dtype="<i2").tobytes() + b"\x07"
        assert names(tmp_path) == ["x"]

    def test_stays_as_it_was_if_its_making_fails(self, tmp_path):
        def pieces():
            yield NEW
            fail()

        (tmp_path / "x").write_bytes(OLD)
        with pytest.raises(ArithmeticError):
            write_atomically(tmp_path / "x", pieces(), overwrite=True)
        assert (tmp_path / "x").read_bytes() == OLD
        assert names(tmp_path) == ["x"]

    def test_is_not_replaced_unless_told_even_if_it_comes_late(self, tmp_path):
        path = tmp_path / "x"

        def pieces():
            yield NEW
            path.write_bytes(OLD)

        with pytest.raises(FileExistsError, match="x: exists already and was left as it is"):
            write_atomically(path, pieces(), overwrite=False)
        assert path.read_bytes() == OLD
        assert names(tmp_path) == ["x"]

    def test_errors_name_what_was_asked_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("link").symlink_to(tmp_path / "absent" / "x")
        Path("file").write_bytes(OLD)
        for name in ("link", "file/x", "absent/x"):
            with pytest.raises(OSError, match=name.partition("/")[0] + "|absent") as caught:
                write_atomically(Path(name), NEW, overwrite=True)
            assert ".tmp" not in str(caught.value)
        monkeypatch.setattr(os, "fsync", self._full)
        with pytest.raises(OSError, match=r"No space left on device: 'file'"):
            write_atomically(Path("file"), NEW, overwrite=True)
        assert Path("file").read_bytes() == OLD
        assert names(tmp_path) == ["file", "link"]

    @staticmethod
    def _full(_: int) -> None:
        raise OSError(28, "No space left on device")


class TestAFolder:
    def test_takes_the_place_of_another(self, tmp_path):
        make_folder(tmp_path / "x", OLD)
        with write_folder_atomically(tmp_path / "x", overwrite=True) as place:
            assert not place.exists()
            make_folder(place, NEW)
            assert (tmp_path / "x" / "array").read_bytes() == OLD
        assert (tmp_path / "x" / "array").read_bytes() == NEW
        assert names(tmp_path) == ["x"]

    def test_in_two_steps_where_the_system_does_not_exchange(self, tmp_path, monkeypatch):
        monkeypatch.setattr(writing, "_exchange", lambda *_: False)
        self.test_takes_the_place_of_another(tmp_path)

    def test_is_exchanged_in_one_step(self, tmp_path):
        """Or a kill between two steps would leave nothing at the target."""
        for name, content in (("a", OLD), ("b", NEW)):
            make_folder(tmp_path / name, content)
        assert writing._exchange(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "a" / "array").read_bytes() == NEW
        assert (tmp_path / "b" / "array").read_bytes() == OLD

    @pytest.mark.parametrize("exchange", [True, False])
    def test_stays_as_it_was_if_its_making_fails(self, tmp_path, monkeypatch, exchange):
        if not exchange:
            monkeypatch.setattr(writing, "_exchange", lambda *_: False)
        make_folder(tmp_path / "x", OLD)
        with pytest.raises(ArithmeticError):
            replace_folder(tmp_path / "x", then=fail)
        # Nothing was made at all, which the move meets.
        with pytest.raises(FileNotFoundError), write_folder_atomically(tmp_path / "x", overwrite=True):
            pass
        assert (tmp_path / "x" / "array").read_bytes() == OLD
        assert names(tmp_path) == ["x"]

    def test_is_not_replaced_unless_told(self, tmp_path):
        with pytest.raises(FileExistsError, match="x: exists already"):
            replace_folder(tmp_path / "x", overwrite=False, then=lambda: make_folder(tmp_path / "x", OLD))
        assert (tmp_path / "x" / "array").read_bytes() == OLD


KILLED = """
import os, signal, sys
from pathlib import Path
from selfattn_core.files import writing

def stop(*_):
    os.kill(os.getpid(), signal.SIGKILL)

target = Path(sys.argv[1])
if sys.argv[2] == "file":
    def pieces():
        yield b"half"
        stop()
    writing.write_atomically(target, pieces(), overwrite=True)
with writing.write_folder_atomically(target, overwrite=True) as place:
    place.mkdir()
    (place / "array").write_bytes(b"new content")
    if sys.argv[2] == "folder":
        stop()
    writing._exchange = lambda *_: False
    rename = Path.rename
    def renamed(self, other):
        if Path(other) == target:
            stop()
        return rename(self, other)
    Path.rename = renamed
"""


class TestAKilledProcess:
    def kill(self, target: Path, how: str) -> None:
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), how], check=False, timeout=60)
        assert done.returncode == -9

    def test_leaves_a_hidden_folder_which_goes_with_the_next_one(self, tmp_path):
        target = tmp_path / "x"
        target.write_bytes(OLD)
        self.kill(target, "file")
        assert target.read_bytes() == OLD
        (left,) = (name for name in names(tmp_path) if name != "x")
        assert left.startswith(".x.")
        assert left.endswith(".tmp")
        write_atomically(tmp_path / "y", NEW, overwrite=True)
        assert left in names(tmp_path), "it may be of use to who writes x"
        write_atomically(target, NEW, overwrite=True)
        assert names(tmp_path) == ["x", "y"]

    def test_of_a_folder(self, tmp_path):
        target = tmp_path / "x"
        make_folder(target, OLD)
        self.kill(target, "folder")
        assert (target / "array").read_bytes() == OLD
        replace_folder(target)
        assert names(tmp_path) == ["x"]

    def test_between_two_steps_the_old_folder_is_brought_back(self, tmp_path):
        target = tmp_path / "x"
        make_folder(target, OLD)
        self.kill(target, "between")
        assert not target.exists()
        with pytest.raises(FileExistsError):
            replace_folder(target, overwrite=False)
        assert (target / "array").read_bytes() == OLD
        assert names(tmp_path) == ["x"]

    def test_strangers_are_left_alone(self, tmp_path):
        for name in (".x.tmp", ".x.0123456789ab.tmp.bak", ".x.old.0123456789ab.tmp", ".xx.0123456789ab.tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / ".x.0123456789ab.tmp").write_bytes(OLD)
        before = names(tmp_path)
        write_atomically(tmp_path / "x", NEW, overwrite=True)
        assert names(tmp_path) == sorted([*before, "x"])


def test_who_still_writes_is_not_disturbed(tmp_path):
    """Another process, and another thread of this one, write the same target in the meantime."""
    target = tmp_path / "x"
    script = (
        "import sys; from pathlib import Path; from selfattn_core.files.writing import write_atomically; "
    )
    script += "write_atomically(Path(sys.argv[1]), b'other', overwrite=True)"

    def pieces():
        yield NEW
        subprocess.run([sys.executable, "-c", script, str(target)], check=True, timeout=60)
        thread = threading.Thread(
            target=write_atomically, args=(target, b"third"), kwargs={"overwrite": True}
        )
        thread.start()
        thread.join()
        assert target.read_bytes() == b"third"

    write_atomically(target, pieces(), overwrite=True)
    assert target.read_bytes() == NEW
    assert names(tmp_path) == ["x"]


def test_a_place_without_locks_still_works(tmp_path, monkeypatch):
    """As some network file systems are; what is left behind stays there, since nobody knows whose it is."""
    import fcntl

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / ".x.0123456789ab.tmp").mkdir()
    monkeypatch.setattr(fcntl, "flock", none)
    write_atomically(tmp_path / "x", NEW, overwrite=True)
    assert names(tmp_path) == [".x.0123456789ab.tmp", "x"]


@pytest.mark.parametrize("late", [False, True])
def test_another_process_may_take_it_for_abandoned_before_it_is_locked(tmp_path, monkeypatch, late):
    lock, calls = writing._lock, []

    def first_gone(folder: Path) -> int | None:
        calls.append(folder)
        if late:
            found = lock(folder)
        if len(calls) == 1:
            folder.rmdir()
        return found if late else lock(folder)

    monkeypatch.setattr(writing, "_lock", first_gone)
    with workplace(tmp_path / "x") as folder:
        assert folder.is_dir()
    assert len(calls) == 2


SHOWN = """
import sys
from pathlib import Path
from selfattn_core.files.writing import write_atomically
print("before")
write_atomically(Path(sys.argv[1]), b"content\\n", overwrite=True)
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_by_another_name(tmp_path, name, kind):
    """A file behind it is written on, not replaced and not begun again."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    command = [sys.executable, "-c", SHOWN, name]
    # What Python holds back has to come first.
    held = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if kind == "pipe":
        done = subprocess.run(command, cwd=tmp_path, env=held, capture_output=True, text=True, check=True)
        assert done.stdout == "before\ncontent\nafter\n"
        return
    with (tmp_path / "output").open("w+") as output:
        output.write("earlier\n")
        output.flush()
        subprocess.run(command, cwd=tmp_path, env=held, stdout=output, check=True)
        assert (tmp_path / "output").samefile(f"/proc/self/fd/{output.fileno()}")
    assert (tmp_path / "output").read_text() == "earlier\nbefore\ncontent\nafter\n"


@pytest.mark.parametrize(("number", "told"), [(28, True), (95, False), (22, False)])
def test_room_is_missed_before_a_library_misses_it(tmp_path, monkeypatch, number, told):
    """And not where the system cannot reserve any."""

    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    writing.check_room(tmp_path, 1000)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if told:
        with pytest.raises(OSError, match="No space left"):
            writing.check_room(tmp_path, 1000)
    else:
        writing.check_room(tmp_path, 1000)
    assert names(tmp_path) == []


def test_our_own_files_are_written_the_same_way(tmp_path):
    config = SelfAttentionConfig(11, 2, 11)
    make_device(tmp_path / "layer.safetensors", HOLE)
    save(tmp_path / "layer.safetensors", config, init_params(config, seed=0), overwrite=True)
    assert (tmp_path / "layer.safetensors").is_char_device()
