"""Targets of a command's reports: checks before the work begins, and writing afterwards."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from selfattn_core.files.writing import is_standard_output, write_atomically

__all__ = [
    "STANDARD_OUTPUT",
    "is_replaced",
    "is_same",
    "report_target",
    "shared_targets",
    "target_problems",
    "would_replace",
    "write_report",
    "write_reports",
]

STANDARD_OUTPUT = "-"


def report_target(target: str) -> str:
    """The target, or "-" if it is another name of standard output.

    Example:
        >>> report_target("/dev/stdout"), report_target("report.json")
        ('-', 'report.json')
    """
    return STANDARD_OUTPUT if target and is_standard_output(target) else target


def target_problems(
    targets: Mapping[str, str], *, keep: Mapping[str, str | os.PathLike[str]] | None = None
) -> list[str]:
    """Reasons why reports cannot be written to their targets. A report replaces an existing file.

    Args:
        targets: file by the option's name. "-" is standard output, which is always possible.
        keep: other files and folders of the command, by their names in the usage. A report must not replace such a file or
            be inside such a folder.

    Returns:
        One clause for each problem.

    Example:
        >>> target_problems({"json": "absent/report.json"})
        ['--json absent/report.json: there is no folder absent']
        >>> target_problems({"json": "layer.npz"}, keep={"FILE": "layer.npz"})
        ['--json layer.npz: would replace FILE; name another file']
    """
    problems = []
    for option, target in targets.items():
        if target == STANDARD_OUTPUT:
            continue
        given = f"--{option} {target}"
        path = Path(target)
        if not target:
            problems.append(f"--{option}: the name is empty; name a file, or - for standard output")
        elif not path.parent.is_dir():
            problems.append(f"{given}: there is no folder {path.parent}")
        elif path.is_dir():
            problems.append(f"{given}: is a folder, where a file is expected")
        elif is_replaced(path):
            problems += [
                f"{given}: would replace {name}{'' if is_same(path, Path(kept)) else ', or a part of it'}; name another file"
                for name, kept in (keep or {}).items()
                if would_replace(path, kept)
            ]
    return problems


def shared_targets(targets: Mapping[str, str]) -> list[str]:
    """Reasons why several reports of one run cannot be written together, although each one could be.

    Args:
        targets: file by the option's name. "-" is standard output.

    Returns:
        One clause for each problem.

    Example:
        >>> shared_targets({"json": "-", "html": "-"})
        ['--json and --html cannot both go to standard output']
    """
    places: dict[Path, list[str]] = {}
    for option, target in targets.items():
        if target != STANDARD_OUTPUT and is_replaced(Path(target)):
            places.setdefault(Path(target).resolve(), []).append(f"--{option}")
    problems = [
        f"{' and '.join(options)} cannot all go to {place}"
        for place, options in places.items()
        if len(options) > 1
    ]
    to_output = [option for option, target in targets.items() if target == STANDARD_OUTPUT]
    if len(to_output) > 1:
        problems.append(f"--{' and --'.join(to_output)} cannot both go to standard output")
    return problems


def is_replaced(path: Path) -> bool:
    """Whether writing there creates or replaces a file. A device or a pipe is written into instead.

    Example:
        >>> is_replaced(Path("report.json")), is_replaced(Path(os.devnull))
        (True, False)
    """
    return path.is_file() or not path.exists()


def is_same(path: Path, kept: Path) -> bool:
    """Whether two names belong to one file, for example through a symbolic or hard link.

    Example:
        >>> is_same(Path("layer.npz"), Path("./layer.npz"))
        True
    """
    if os.path.realpath(path) == os.path.realpath(kept):
        return True
    return path.exists() and kept.exists() and path.samefile(kept)


def would_replace(path: str | os.PathLike[str], kept: str | os.PathLike[str]) -> bool:
    """Whether writing to a path would replace another file or folder, or a part of it.

    Args:
        path: the path to write.
        kept: a file, a checkpoint folder, or the common beginning of the names of a TensorFlow checkpoint's files.

    Example:
        >>> would_replace("model.index", "model"), would_replace("model.json", "model")
        (True, False)
    """
    path, kept = Path(path), Path(kept)
    if is_same(path, kept):
        return True
    real, whole = os.path.realpath(path), os.path.realpath(kept)
    if kept.is_dir():
        return Path(whole) in Path(real).parents
    return real == f"{whole}.index" or real.startswith(f"{whole}.data-")


def write_report(target: str, text: str) -> None:
    """Write a report to a file, which is then complete or absent, or to standard output.

    Args:
        target: a path, or "-".
        text: the report, which ends with a new line.

    Raises:
        OSError: if it cannot be written. An existing file then stays unchanged.
    """
    if target == STANDARD_OUTPUT:
        click.echo(text, nl=False)
        return
    write_atomically(Path(target), text.encode(), overwrite=True)


def write_reports(targets: Mapping[str, str], text: Callable[[str], str]) -> None:
    """Write as many reports of a run as possible, because a run takes minutes. Then raise an error for the others.

    Args:
        targets: file by the option's name. "-" is standard output.
        text: maps an option to the report in its format, which ends with a new line.

    Raises:
        OSError: if a report could not be written. The others are written.
    """
    failed = []
    for option, target in targets.items():
        try:
            write_report(target, text(option))
        except OSError as error:
            if target == STANDARD_OUTPUT:
                raise
            failed.append(f"--{option} {target}: {error.strerror or error}")
    if failed:
        raise OSError(f"not written: {'; '.join(failed)}. The other reports are written.")
