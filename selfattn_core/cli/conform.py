"""What `selfattn conform` does: run, show, write the reports that were asked for, and say by the exit code how it went."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from selfattn_core.cli.exit_codes import BAD_INPUT, CHECK_FAILED, MISSING
from selfattn_core.conformance.cases.table import Level
from selfattn_core.conformance.execution.runner import run_backend, run_backends, unknown_device
from selfattn_core.conformance.mutants.selftest import self_test
from selfattn_core.conformance.protocol import REGISTRY, is_target
from selfattn_core.conformance.report import as_data, as_html, as_junit, as_markdown, difference, show
from selfattn_core.conformance.reproduce import named_runs
from selfattn_core.files.targets import (
    STANDARD_OUTPUT,
    report_target,
    shared_targets,
    target_problems,
    write_reports,
)
from selfattn_core.files.text import read_text

__all__ = ["FORMS", "conform", "tell_difference"]

FORMS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "json": lambda data: json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    "junit": as_junit,
    "markdown": as_markdown,
    "html": as_html,
}
"""The forms that a report is written in, by option."""


def conform(
    names: Sequence[str],
    *,
    seed: int,
    level: Level,
    with_self_test: bool,
    targets: Mapping[str, str],
    devices: Sequence[str] = (),
    cases: Sequence[str] = (),
) -> int:
    """Check backends, planted bugs, or both.

    Args:
        names: of backends; none means all that ship with the library, or none if the planted bugs are asked for.
        seed: of the inputs.
        level: how far to go.
        with_self_test: whether to run the planted bugs.
        targets: form to file; "-" is standard output.
        devices: one to compute on; none is the CPU.
        cases: names as for `named_runs`; none means every case of the level.

    Returns:
        The exit code: 2 if a name turns out to be no backend, or the device none of its devices, or else 1 if something
        failed, or else 3 if something is not installed or the device is not there, or else 0.

    Raises:
        click.UsageError: if a name or a target is wrong, before anything is run.
        OSError: if a report could not be written after all; the others are.
    """
    problems = [
        f"unknown backend {name}; known are {', '.join(REGISTRY)}, or module:object for your own"
        for name in names
        if name not in REGISTRY and not is_target(name)
    ]
    chosen = list(dict.fromkeys(names)) or ([] if with_self_test else list(REGISTRY))
    problems += _device_problems(chosen, devices)
    targets = {form: report_target(target) for form, target in targets.items()}
    problems += target_problems(targets)
    problems += shared_targets(targets)
    try:
        runs = named_runs(cases, level=level)
    except ValueError as error:
        problems.append(f"--case: {error}")
    if cases and not names:
        problems.append("--case: name the BACKEND that is to run it")
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    device = devices[0] if devices else ""

    def tell(name: str, words: str) -> None:
        click.echo(f"{name}: {words}", err=True)

    if cases:
        reports = [run_backend(name, seed=seed, runs=runs, device=device) for name in chosen]
    else:
        reports = run_backends(chosen, seed=seed, level=level, device=device, tell=tell)
    kills = self_test(seed=seed) if with_self_test else []
    for kill in kills:
        if kill.unasked:
            click.echo(f"not tried, {kill.mutant.name!r}: {kill.unasked}", err=True)
    kills = [kill for kill in kills if not kill.unasked]
    data = as_data(reports, seed=seed, level=level, kills=kills, device=device)
    show(data, error_stream=STANDARD_OUTPUT in targets.values())
    write_reports(targets, lambda form: FORMS[form](data))
    failed = any(not (report.passed or report.missing or report.absent) for report in reports)
    if any(report.refused for report in reports):
        return BAD_INPUT
    if failed or any(kill.outcome is None for kill in kills):
        return CHECK_FAILED
    return MISSING if any(report.missing or report.absent for report in reports) else 0


def _device_problems(names: Sequence[str], devices: Sequence[str]) -> list[str]:
    if len(devices) > 1:
        return [f"--device: got {' and '.join(devices)}; expected one device a run"]
    if devices and not names:
        return [f"--device {devices[0]}: broken implementations are numpy's, which has none; name a BACKEND"]
    found: dict[str, list[str]] = {}
    for name in names if devices else ():
        if problem := unknown_device(name, devices[0]):
            found.setdefault(problem, []).append(name)
    return [f"{', '.join(of)}: {problem}" for problem, of in found.items()]


def tell_difference(old: Path, new: Path) -> int:
    """Print what changed between two JSON reports.

    Args:
        old: the earlier one.
        new: the later one.

    Returns:
        1 if something is worse, or else 0.

    Raises:
        click.UsageError: if one of them is no report.
        OSError: if one of them cannot be read.
    """
    try:
        found = difference(_read(old), _read(new))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(str(found))
    return CHECK_FAILED if found.regressions else 0


def _read(path: Path) -> Mapping[str, Any]:
    text = read_text(path, most=_LARGEST_REPORT)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no report of selfattn conform --json.")
    return content


# Bytes. Reports of six backends have two million.
_LARGEST_REPORT = 2**27
