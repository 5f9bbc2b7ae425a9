"""What `selfattn conform` does: run, show, write the reports that were asked for, and say by the exit code how it went."""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from selfattn_core.conformance.backend import REGISTRY, is_target
from selfattn_core.conformance.cases import Level
from selfattn_core.conformance.report import as_data, as_html, as_junit, as_markdown, difference, show
from selfattn_core.conformance.runner import run_backends
from selfattn_core.conformance.selftest import self_test
from selfattn_core.exit_codes import BAD_INPUT, CHECK_FAILED, MISSING
from selfattn_core.report_files import target_problems
from selfattn_core.weights import write_atomically

__all__ = ["FORMS", "conform", "tell_difference"]

FORMS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "json": lambda data: json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    "junit": as_junit,
    "markdown": as_markdown,
    "html": as_html,
}
"""The forms that a report is written in, by option."""


def conform(
    names: Sequence[str], *, seed: int, level: Level, with_self_test: bool, targets: Mapping[str, str]
) -> int:
    """Check backends, planted bugs, or both.

    Args:
        names: of backends; none means all that ship with the library, or none if the planted bugs are asked for.
        seed: of the inputs.
        level: how far to go.
        with_self_test: whether to run the planted bugs.
        targets: form to file; "-" is standard output.

    Returns:
        The exit code: 2 if a name turns out to be no backend, or else 1 if something failed, or else 3 if something is
        not installed, or else 0.

    Raises:
        click.UsageError: if a name or a target is wrong, before anything is run.
    """
    problems = [
        f"unknown backend {name}; known are {', '.join(REGISTRY)}, or module:object for your own"
        for name in names
        if name not in REGISTRY and not is_target(name)
    ]
    problems += target_problems(targets)
    places: dict[Path, list[str]] = {}
    for form, target in targets.items():
        if target != "-":
            places.setdefault(Path(target).resolve(), []).append(f"--{form}")
    problems += [
        f"{' and '.join(options)} cannot all go to {place}"
        for place, options in places.items()
        if len(options) > 1
    ]
    to_output = [form for form, target in targets.items() if target == "-"]
    if len(to_output) > 1:
        problems.append(f"--{' and --'.join(to_output)} cannot both go to standard output")
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    chosen = list(dict.fromkeys(names)) or ([] if with_self_test else list(REGISTRY))

    def tell(name: str, words: str) -> None:
        click.echo(f"{name}: {words}", err=True)

    with _ended_by_sigterm():
        reports = run_backends(chosen, seed=seed, level=level, tell=tell)
    kills = self_test(seed=seed) if with_self_test else []
    for kill in kills:
        if kill.unasked:
            click.echo(f"not tried, {kill.mutant.name!r}: {kill.unasked}", err=True)
    kills = [kill for kill in kills if not kill.unasked]
    data = as_data(reports, seed=seed, level=level, kills=kills)
    show(data, error_stream=bool(to_output))
    for form, target in targets.items():
        _write(target, FORMS[form](data))
    failed = any(not report.passed and not report.missing for report in reports)
    if any(report.refused for report in reports):
        return BAD_INPUT
    if failed or any(kill.outcome is None for kill in kills):
        return CHECK_FAILED
    return MISSING if any(report.missing for report in reports) else 0


def tell_difference(old: Path, new: Path) -> int:
    """Print what changed between two JSON reports.

    Args:
        old: the earlier one.
        new: the later one.

    Returns:
        1 if something is worse, or else 0.

    Raises:
        click.UsageError: if one of them cannot be read, or is no report.
    """
    try:
        found = difference(_read(old), _read(new))
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(str(found))
    return CHECK_FAILED if found.regressions else 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as an exception, which Ctrl-C is anyway: the processes of backends are ended and their files removed."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    # Only there can a handler be set.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, where a file is expected.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no report of selfattn conform --json.")
    return content


def _write(target: str, text: str) -> None:
    if target == "-":
        click.echo(text, nl=False)
        return
    try:
        write_atomically(Path(target), text.encode(), overwrite=True)
    except OSError as error:
        raise click.UsageError(str(error)) from error
