"""The mutants that compute the same as the source, marked by hand in `equivalent.toml` with the reason."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfattn_core.conformance.mutants.generated.derive import GeneratedMutant

__all__ = ["LIST", "equivalents"]

LIST = Path(__file__).with_name("equivalent.toml")


def equivalents(
    mutants: Sequence[GeneratedMutant], modules: Sequence[str], path: Path = LIST
) -> Mapping[GeneratedMutant, str]:
    """The reason why a mutant computes the same, by mutant.

    Args:
        mutants: all mutants of some modules.
        modules: the names of the modules.
        path: the list, a TOML file with entries of module, function, old, new and reason.

    Raises:
        ValueError: if an entry for one of the modules fits no mutant, or has no reason.
    """
    entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])
    found: dict[GeneratedMutant, str] = {}
    for entry in entries:
        if entry["module"] not in modules:
            continue
        fitting = [
            mutant
            for mutant in mutants
            if (mutant.module, mutant.function, mutant.old, mutant.new)
            == (entry["module"], entry["function"], entry["old"], entry["new"])
        ]
        if not fitting or not entry["reason"]:
            raise ValueError(
                f"{path.name}: got an entry for {entry['module']} {entry['function']} ({entry['new']!r}) that "
                f"{'has no reason' if fitting else 'fits no generated mutant'}; expected one that a rule derives from the "
                "source, with the reason why it computes the same: the source has changed, so judge the entry again."
            )
        found |= dict.fromkeys(fitting, entry["reason"])
    return found
