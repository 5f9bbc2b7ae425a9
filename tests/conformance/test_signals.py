"""A run that is ended from outside leaves no process behind, and no files if it can still remove them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution.environment import cores
from selfattn_core.conformance.execution.runner import run_backend

PARTS = min(2, cores())

# A shell that runs tests in the background makes processes ignore SIGINT, and `nohup` makes them ignore SIGHUP.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from selfattn_core.cli import main
main(prog_name="selfattn")
"""


def wait_for(condition, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


class Beats:
    """The text that the processes of `NeverAnswers` write while they live."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def processes(self) -> set[str]:
        return set(self.file.read_text(encoding="utf-8").split()) if self.file.exists() else set()

    def stopped(self) -> bool:
        before = self.file.stat().st_size
        time.sleep(0.5)
        return self.file.stat().st_size == before


@pytest.fixture
def beats(on_path, tmp_path, monkeypatch) -> Iterator[Beats]:
    beats = Beats(tmp_path / "beats.txt")
    monkeypatch.setenv("TOY_BEATS", str(beats.file))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    yield beats
    if not beats.stopped():
        for process in beats.processes():
            os.kill(int(process), signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 1), (signal.SIGKILL, -9)],
)
def test_no_process_outlives_the_command(beats, tmp_path, number, code):
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "conform", "toy_backends:NeverAnswers", "--level", "core"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert wait_for(lambda: len(beats.processes()) == PARTS)
            process.send_signal(number)
            _, told = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in told
    assert "did not start" not in told, "what was ended is not told as a result"
    if number in (signal.SIGTERM, signal.SIGHUP):
        assert told.count(f"Error: {signal.Signals(number).name} ended this command") == 1
    assert beats.stopped()
    if number != signal.SIGKILL:
        assert list((tmp_path / "scratch").iterdir()) == []


def test_a_backend_that_ends_its_parent_is_not_silent(on_path):
    asked = [sys.executable, "-c", COMMAND, "conform", "toy_backends:EndsItsParent", "--case", "SA-FWD-001"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143
    assert "SIGTERM ended this command" in done.stderr
    assert "a backend that ends its parent" in done.stderr


def test_who_waits_in_another_thread_can_stop_it(beats):
    stop = threading.Event()
    threading.Thread(target=lambda: (wait_for(beats.processes), stop.set())).start()
    with pytest.raises(CancelledError):
        run_backend("toy_backends:NeverAnswers", runs=all_runs(level="core"), stop=stop)
    assert beats.stopped()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_a_search_found_outlives_a_signal(on_path, tmp_path, number, code):
    """While hypothesis runs, which takes the exception of a signal for a failure of the probe."""
    asked = [sys.executable, "-c", COMMAND, "conform", "planted:OwnParams", "--explore", "600"]
    kept = ["--failures", "failures.txt", "--json", "report.json"]
    with subprocess.Popen(
        [*asked, *kept], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        try:
            assert process.stderr is not None
            assert next(line for line in process.stderr if "probes asked" not in line)
            time.sleep(0.5)
            process.send_signal(number)
            shown, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, told
    assert told.count(f"Error: {signal.Signals(number).name} ended this command") == 1
    assert "Traceback" not in told
    assert "it was interrupted, and found" in shown
    assert "planted:OwnParams S1:" in (tmp_path / "failures.txt").read_text(encoding="utf-8")
    assert '"ended": "interrupt"' in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_a_report_outlives_a_signal_while_the_next_backend_is_imported(beats, tmp_path):
    asked = [sys.executable, "-c", COMMAND, "conform", "planted:OwnParams", "toy_backends:NeverStarts"]
    with subprocess.Popen(
        [*asked, "--replay", "S1:steps=params:2042"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert wait_for(beats.processes)
            process.send_signal(signal.SIGINT)
            shown, told = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "weights are copies" in shown
    assert "Traceback" not in told
    assert beats.stopped()
