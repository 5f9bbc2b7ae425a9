"""Files that a command's reports go to, looked at before the work is done."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["STANDARD_OUTPUT", "target_problems"]

STANDARD_OUTPUT = "-"


def target_problems(
    targets: Mapping[str, str], *, keep: Mapping[str, str | os.PathLike[str]] | None = None
) -> list[str]:
    """Why reports cannot be written there; a report replaces what it finds.

    Args:
        targets: file by the option's name; "-" is standard output, about which nothing is said.
        keep: what the command reads, or writes otherwise, by its name in the usage: a report must not be one of these
            files, nor lie in one of these folders.

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
        else:
            problems += [
                f"{given}: would replace {name}{'' if same else ', or a part of it'}; name another file"
                for name, kept in (keep or {}).items()
                if (same := _is_same(path, Path(kept))) or _is_part(path, Path(kept))
            ]
    return problems


def _is_same(path: Path, kept: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(kept):
        return True
    # Two names of one file, as of a hard link.
    return path.exists() and kept.exists() and path.samefile(kept)


def _is_part(path: Path, kept: Path) -> bool:
    """Whether it lies in a checkpoint that is a folder, or is one of the files that a TensorFlow checkpoint's name begins."""
    real, whole = os.path.realpath(path), os.path.realpath(kept)
    if kept.is_dir():
        return Path(whole) in Path(real).parents
    return real == f"{whole}.index" or real.startswith(f"{whole}.data-")
