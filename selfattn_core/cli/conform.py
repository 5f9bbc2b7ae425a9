"""The `conform` command: run, show, write reports, and set the exit code."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from selfattn_core.cli import completion
from selfattn_core.cli.exit_codes import BAD_INPUT, CHECK_FAILED, MISSING
from selfattn_core.cli.parameters import NamedPath, Seconds, report_option
from selfattn_core.files.targets import (
    STANDARD_OUTPUT,
    is_replaced,
    report_target,
    shared_targets,
    target_problems,
    write_reports,
)
from selfattn_core.files.text import read_text

if TYPE_CHECKING:
    from selfattn_core.conformance.results import BackendReport
    from selfattn_core.conformance.search.past import PastFailures

__all__ = ["conform", "forms"]


@click.command()
@click.argument("names", metavar="[BACKEND]...", nargs=-1, shell_complete=completion.backends)
@click.option(
    "--seed",
    metavar="N",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Seed of the random inputs.",
)
@click.option(
    "--level",
    default="deploy",
    show_default=True,
    type=click.Choice(["core", "training", "gan", "deploy"]),
    help="Highest level to check; each level includes those before it.",
)
@click.option(
    "--case",
    "cases",
    metavar="ID[/DTYPE[/LAYOUT]]",
    multiple=True,
    shell_complete=completion.cases,
    help="Run only this case, or its runs in one dtype or layout. Repeatable.",
)
@click.option(
    "--device",
    "devices",
    metavar="DEVICE",
    multiple=True,
    help="Device to run on, as the framework names it: cpu, cuda, cuda:1, mps, xpu, gpu, tpu. Default: the CPU.",
)
@click.option(
    "--processes",
    metavar="N",
    default=None,
    type=click.IntRange(min=1),
    help="Number of processes for a backend that computes over several, such as torch-rows. Default: the backend's own.",
)
@click.option(
    "--explore",
    "seconds",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=60.0,
    default=None,
    type=Seconds(),
    help="Search for failures instead of running the cases, for 60 seconds or as many as you name.",
)
@click.option(
    "--failures",
    "past",
    metavar="FILE",
    type=NamedPath(),
    shell_complete=completion.files,
    help="With --explore: a file of past failures, which the search asks first and to which it adds new ones.",
)
@click.option(
    "--replay",
    "tokens",
    metavar="TOKEN",
    multiple=True,
    help="Repeat what a search found. Repeatable.",
)
@click.option(
    "--self-test",
    is_flag=True,
    help="Also run the cases on deliberately broken implementations; without BACKEND, run only those.",
)
@click.option(
    "--generated",
    metavar="N",
    default=0,
    type=click.IntRange(min=0),
    help="With --self-test: also run N mutants that rules derive from the source of the definition, and of each BACKEND that has some.",
)
@report_option("json", "Write all verdicts as JSON; - means standard output.")
@report_option("html", "Write the report as an HTML page.")
@report_option("junit", "Write JUnit XML for a CI service.")
@report_option("markdown", "Write Markdown for a pull request.")
@click.option(
    "--diff",
    nargs=2,
    metavar="OLD NEW",
    type=click.Path(path_type=Path),
    help="Compare two JSON reports instead of running; exit 1 on a regression.",
)
def conform(
    names: tuple[str, ...],
    seed: int,
    level: Literal["core", "training", "gan", "deploy"],
    cases: tuple[str, ...],
    devices: tuple[str, ...],
    processes: int | None,
    seconds: float | None,
    past: Path | None,
    tokens: tuple[str, ...],
    self_test: bool,
    generated: int,
    json_file: str | None,
    html_file: str | None,
    junit_file: str | None,
    markdown_file: str | None,
    diff: tuple[Path, Path] | None,
) -> None:
    """Check backends against the numpy definition.

    BACKEND is a name that `selfattn backends` lists, or module:object for a backend of your own. Without BACKEND, all
    are checked. Errors are multiples of the noise floor.

    Exit code 1: a check failed. 2: a backend or a device has an unknown name. 3: a framework or the device is missing.
    """
    files = {"json": json_file, "html": html_file, "junit": junit_file, "markdown": markdown_file}
    targets = {form: target for form, target in files.items() if target is not None}
    if diff:
        work = (names, targets, self_test, generated, devices, processes, cases, tokens, seconds, past)
        if any(work):
            raise click.UsageError(
                "--diff compares two files and runs nothing: pass no backend and no other report."
            )
        sys.exit(_tell_difference(*diff))
    if generated and not self_test:
        raise click.UsageError("--generated: it is a part of --self-test: pass both.")
    if seconds is not None or tokens:
        if processes is not None:
            raise click.UsageError("--processes: a search and a replay use the backend's own number.")
        if cases or self_test or (seconds is not None and tokens):
            raise click.UsageError(
                "--explore, --replay, --case and --self-test run different things: pass one of them."
            )
        sys.exit(
            _search(
                names,
                seed=seed,
                seconds=seconds or 0.0,
                past=past,
                tokens=tokens,
                targets=targets,
                devices=devices,
            )
        )
    if past is not None:
        raise click.UsageError(f"--failures {past}: only a search reads it: pass --explore too.")
    sys.exit(
        _run(
            names,
            seed=seed,
            level=level,
            cases=cases,
            with_self_test=self_test,
            generated=generated,
            targets=targets,
            devices=devices,
            processes=processes,
        )
    )


def forms() -> Mapping[str, Callable[[Mapping[str, Any]], str]]:
    """The formats of a report, by option."""
    from selfattn_core.conformance.report import as_html, as_junit, as_markdown

    return {
        "json": lambda data: json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "junit": as_junit,
        "markdown": as_markdown,
        "html": as_html,
    }


def _run(
    names: Sequence[str],
    *,
    seed: int,
    level: Literal["core", "training", "gan", "deploy"],
    cases: Sequence[str],
    with_self_test: bool,
    generated: int,
    targets: Mapping[str, str],
    devices: Sequence[str],
    processes: int | None,
) -> int:
    """The exit code of a run. A usage error is raised before anything runs."""
    from selfattn_core.conformance.backends import REGISTRY
    from selfattn_core.conformance.execution.runner import run_backend, run_backends
    from selfattn_core.conformance.mutants.selftest import self_test
    from selfattn_core.conformance.report import as_data, show
    from selfattn_core.conformance.reproduce import named_runs

    problems = _unknown_backends(names)
    chosen = list(dict.fromkeys(names)) or ([] if with_self_test else list(REGISTRY))
    problems += _device_problems(chosen, devices)
    targets = {form: report_target(target) for form, target in targets.items()}
    problems += target_problems(targets)
    problems += shared_targets(targets)
    try:
        runs = named_runs(cases, level=level)
    except ValueError as error:
        problems.append(f"--case: {error}")
    if processes is not None and not names:
        problems.append("--processes: name the BACKEND that should compute over them")
    if cases and not names:
        problems.append("--case: name the BACKEND that should run it")
    if problems:
        raise click.UsageError(f"{'; '.join(problems)}.")
    device = devices[0] if devices else ""

    def tell(name: str, words: str) -> None:
        click.echo(f"{name}: {words}", err=True)

    if cases:
        reports = [run_backend(name, seed=seed, runs=runs, device=device, over=processes) for name in chosen]
    else:
        reports = run_backends(chosen, seed=seed, level=level, device=device, over=processes, tell=tell)
    kills = self_test(seed=seed) if with_self_test else []
    for kill in kills:
        if kill.unasked:
            click.echo(f"not tried, {kill.mutant.name!r}: {kill.unasked}", err=True)
    kills = [kill for kill in kills if not kill.unasked]
    data = as_data(reports, seed=seed, level=level, kills=kills, device=device)
    show(data, error_stream=STANDARD_OUTPUT in targets.values())
    write = forms()
    write_reports(targets, lambda form: write[form](data))
    _tell_generated(names, generated, seed=seed, error_stream=STANDARD_OUTPUT in targets.values())
    return _exit_code(reports, failed=any(kill.outcome is None for kill in kills))


def _tell_generated(names: Sequence[str], count: int, *, seed: int, error_stream: bool) -> None:
    """Run generated mutants, and print the rate and the survivors. A survivor is no failure, because some compute the same."""
    from selfattn_core.conformance.mutants.generated.selftest import (
        SOURCES,
        UnusableError,
        run_mutants,
        summary,
    )

    for name in dict.fromkeys(["spec", *names]) if count else ():
        if name in SOURCES:
            try:
                kills = run_mutants(name, count, seed=seed)
            except UnusableError as error:
                raise click.ClickException(str(error)) from error
            click.echo(summary(name, kills), err=error_stream)


def _search(
    names: Sequence[str],
    *,
    seed: int,
    seconds: float,
    past: Path | None,
    tokens: Sequence[str],
    targets: Mapping[str, str],
    devices: Sequence[str],
) -> int:
    """The exit code of a search or a replay. A usage error is raised before anything runs."""
    from selfattn_core.conformance.report import as_data, show
    from selfattn_core.conformance.search.past import PastFailures
    from selfattn_core.installed import require

    targets = {form: report_target(target) for form, target in targets.items()}
    if problems := _search_problems(names, past=past, tokens=tokens, targets=targets, devices=devices):
        raise click.UsageError(f"{'; '.join(problems)}.")
    if not tokens:
        require("selfattn conform --explore", ["hypothesis"], "search")
    device = devices[0] if devices else ""
    kept = PastFailures(past) if past is not None else None
    reports, stopped = _searched(names, seed=seed, seconds=seconds, kept=kept, tokens=tokens, device=device)
    data = as_data(reports, seed=seed, device=device)
    show(data, error_stream=STANDARD_OUTPUT in targets.values())
    write = forms()
    try:
        write_reports(targets, lambda form: write[form](data))
    finally:
        if kept is not None:
            searches = {report.name: report.search for report in reports if report.search is not None}
            kept.add({name: [each.token for each in found.findings] for name, found in searches.items()})
    return stopped or _exit_code(reports)


def _search_problems(
    names: Sequence[str],
    *,
    past: Path | None,
    tokens: Sequence[str],
    targets: Mapping[str, str],
    devices: Sequence[str],
) -> list[str]:
    from selfattn_core.conformance.search.token import TokenError, from_token

    problems = _unknown_backends(names)
    if not names:
        problems.append(f"{'--replay' if tokens else '--explore'}: name the BACKEND that should answer")
    problems += _device_problems(names, devices)
    written = targets if past is None else {**targets, "failures": str(past)}
    problems += target_problems(written)
    problems += shared_targets(written)
    problems += _past_problems(past) if past is not None and not past.is_dir() else []
    for token in tokens:
        try:
            from_token(token)
        except TokenError as error:
            problems.append(f"--replay: {str(error).removesuffix('.')}")
    return problems


def _past_problems(past: Path) -> list[str]:
    from selfattn_core.conformance.search.past import PastFailures

    if not is_replaced(past):
        return [f"--failures {past}: is a device or a pipe, expected a file that keeps its lines"]
    try:
        PastFailures(past).of("")
    except ValueError as error:
        return [f"--failures {str(error).removesuffix('.')}"]
    return []


def _searched(
    names: Sequence[str],
    *,
    seed: int,
    seconds: float,
    kept: "PastFailures | None",
    tokens: Sequence[str],
    device: str,
) -> "tuple[list[BackendReport], int]":
    """The reports up to Ctrl-C or a signal, and the exit code that the signal asks for, or 0."""
    from selfattn_core.conformance.search.run import search_backend

    reports: list[BackendReport] = []
    try:
        for name in dict.fromkeys(names):
            report = search_backend(
                name,
                seed=seed,
                seconds=seconds,
                tokens=tokens,
                past=() if kept is None else kept.of(name),
                device=device,
                tell=lambda words, name=name: click.echo(f"{name}: {words}", err=True),  # type: ignore[misc]
            )
            reports.append(report)
            if report.search is not None and report.search.ended == "interrupt":
                return reports, report.search.exit_code
    except (KeyboardInterrupt, SystemExit) as error:
        # A backend was being started. What the others showed is still reported.
        if not reports:
            raise
        code = error.code if isinstance(error, SystemExit) else CHECK_FAILED
        return reports, code if isinstance(code, int) else CHECK_FAILED
    return reports, 0


def _unknown_backends(names: Sequence[str]) -> list[str]:
    from selfattn_core.conformance.backends import KNOWN, is_target

    return [
        f"unknown backend {name}; known are {', '.join(KNOWN)}, or module:object for your own"
        for name in names
        if name not in KNOWN and not is_target(name)
    ]


def _exit_code(reports: "Sequence[BackendReport]", *, failed: bool = False) -> int:
    """The exit code of reports. A failed check wins over a missing backend."""
    if any(report.refused for report in reports):
        return BAD_INPUT
    if failed or any(not (report.passed or report.missing or report.absent) for report in reports):
        return CHECK_FAILED
    return MISSING if any(report.missing or report.absent for report in reports) else 0


def _device_problems(names: Sequence[str], devices: Sequence[str]) -> list[str]:
    if len(devices) > 1:
        return [f"--device: got {' and '.join(devices)}; expected one device a run"]
    if devices and not names:
        return [
            f"--device {devices[0]}: the broken implementations run on numpy, which has no devices; name a BACKEND"
        ]
    from selfattn_core.conformance.execution.runner import unknown_device

    found: dict[str, list[str]] = {}
    for name in names if devices else ():
        if problem := unknown_device(name, devices[0]):
            found.setdefault(problem, []).append(name)
    return [f"{', '.join(of)}: {problem}" for problem, of in found.items()]


def _tell_difference(old: Path, new: Path) -> int:
    """Print the differences between two JSON reports. The exit code is 1 if a result got worse."""
    from selfattn_core.conformance.report import difference

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
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a report of selfattn conform --json.")
    return content


# In bytes. A report of six backends has two million.
_LARGEST_REPORT = 2**27
