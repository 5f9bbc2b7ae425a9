"""Runs the table on generated mutants, each in a process with a limit of time and memory."""

import importlib.util
import json
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from selfattn_core.conformance.backends import REGISTRY
from selfattn_core.conformance.execution.environment import environment
from selfattn_core.conformance.mutants.generated.asked import PROBES
from selfattn_core.conformance.mutants.generated.derive import GeneratedMutant, choose, derived
from selfattn_core.conformance.mutants.generated.equivalent import equivalents

__all__ = ["SOURCES", "GeneratedKill", "Source", "UnusableError", "mutants_of", "run_mutants", "summary"]


class UnusableError(Exception):
    """The unchanged source fails, so that nothing can be said about its mutants."""


@dataclass(frozen=True)
class Source:
    """The source from which mutants are derived.

    Args:
        modules: the import names of its modules.
        backend: the built-in backend that runs it. Empty for the definition.
        without: the functions that no answer needs.
    """

    modules: tuple[str, ...]
    backend: str = ""
    without: tuple[str, ...] = ()


SOURCES: Mapping[str, Source] = {
    "spec": Source(("selfattn_core.spec",), without=("magnitudes",)),
    "torch": Source(
        (
            "selfattn_torch.layer",
            "selfattn_torch.projection",
            "selfattn_torch.spectral_norm",
            "selfattn_ops.torch.autograd",
            "selfattn_ops.torch.blocks",
            "selfattn_ops.torch.dense",
            "selfattn_ops.torch.derivatives",
        ),
        "torch",
    ),
}
"""The sources by name."""

_SECONDS, _GIGABYTES = 300.0, 16.0
"""The limits of one mutant: time of the processor, and memory."""

_WAIT = 1800.0
"""The seconds after which a process counts as hanging that uses no processor."""


@dataclass(frozen=True)
class GeneratedKill:
    """The result of one mutant.

    Args:
        mutant: the mutant.
        how: "wrong answer", "exception" or "hang". Empty if it survived.
        run: the run that caught it.
        message: what the run reported.
        equivalent: the reason why it computes the same. Empty if it does not, as far as anybody knows.
    """

    mutant: GeneratedMutant
    how: str
    run: str = ""
    message: str = ""
    equivalent: str = ""


def mutants_of(name: str) -> tuple[GeneratedMutant, ...]:
    """All mutants of a source.

    Args:
        name: one of `SOURCES`.

    Example:
        >>> len(mutants_of("spec")) > 400
        True
    """
    source = SOURCES[name]
    return tuple(
        mutant
        for module in source.modules
        for mutant in derived(module, _path(module).read_text(encoding="utf-8"), without=source.without)
    )


def run_mutants(
    name: str,
    count: int,
    *,
    seed: int = 0,
    probes: int = PROBES,
    tell: Callable[[GeneratedKill], None] = lambda _: None,
) -> list[GeneratedKill]:
    """Run a choice of the mutants of a source.

    Args:
        name: one of `SOURCES`.
        count: how many.
        seed: the seed of the choice and of the inputs.
        probes: the number of probes for a mutant that the table does not catch.
        tell: called with each result when it is ready.

    Raises:
        ValueError: if the list of equivalent mutants does not fit the source any more.
        UnusableError: if the unchanged source fails here too.
    """
    every = mutants_of(name)
    same = equivalents(every, SOURCES[name].modules)
    results = []
    for kill in _results(SOURCES[name], choose(every, count, seed), seed, probes, same):
        results.append(kill)
        tell(kill)
    return results


def summary(name: str, kills: Sequence[GeneratedKill]) -> str:
    """The rate, its parts, and the survivors as diffs.

    Args:
        name: the source.
        kills: the results.
    """
    counted = [kill for kill in kills if kill.how or not kill.equivalent]
    caught = [kill for kill in counted if kill.how]
    ways = Counter(kill.how for kill in caught)
    parts = ", ".join(f"{number} by {way}" for way, number in sorted(ways.items()))
    rate = 100 * len(caught) / max(1, len(counted))
    same = len(kills) - len(counted)
    caught_words = f"{len(caught)} of {len(counted)} mutants caught, {rate:.1f} % ({parts or 'none'})"
    searched = sum(bool(kill.run) and not kill.run.startswith("SA-") for kill in caught)
    lines = [
        f"generated from {name}: {caught_words}; {same} more compute the same; {searched} were caught by the search alone"
    ]
    lines += [
        f"caught, but marked as computing the same ({kill.equivalent}): {kill.mutant.difference}"
        for kill in caught
        if kill.equivalent
    ]
    lines += [f"survived: {kill.mutant.difference}" for kill in counted if not kill.how]
    return "\n".join(lines)


def _path(module: str) -> Path:
    """The file of a module. This imports nothing but finds its package."""
    package, *inner = module.split(".")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{module}: there is no package {package}", name=package)
    return Path(found.submodule_search_locations[0], *inner).with_suffix(".py")


def _results(
    source: Source,
    mutants: Sequence[GeneratedMutant],
    seed: int,
    probes: int,
    same: Mapping[GeneratedMutant, str],
) -> Iterator[GeneratedKill]:
    target = REGISTRY[source.backend].target if source.backend else ""
    variables = environment(REGISTRY[source.backend].in_full if source.backend else {})
    process: _Process | None = None

    def asked(module: str, text: str, searched: int) -> dict[str, str]:
        nonlocal process
        process = _Process(variables) if process is None else process
        given = {"module": module, "source": text, "target": target, "seed": seed, "probes": searched}
        answer = process.ask(given)
        if answer is None:
            process = None
            return {"how": "hang", "run": "", "message": "the process ended, or its time was over"}
        if target:
            # An adapter can be imported once only, so its next mutant needs another process.
            process.end()
            process = None
        return answer

    first = source.modules[0]
    unchanged = asked(first, _path(first).read_text(encoding="utf-8"), 0)
    if unchanged["how"]:
        raise UnusableError(
            f"generated mutants: the unchanged source of {first} fails here: "
            f"{unchanged['run'] or unchanged['how']}: {unchanged['message']}. Expected it to pass every case: mend that first."
        )
    for mutant in mutants:
        answer = asked(mutant.module, mutant.source, probes)
        yield GeneratedKill(mutant, **answer, equivalent=same.get(mutant, ""))
    if process is not None:
        process.end()


class _Process:
    """A worker, and a thread that reads its answers."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        worker = "selfattn_core.conformance.mutants.generated.worker"
        self.process = subprocess.Popen(
            [sys.executable, "-m", worker, str(_SECONDS), str(_GIGABYTES)],
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ask(self, asked: Mapping[str, object]) -> dict[str, str] | None:
        """The answer, or None if there is none. Then the process has ended."""
        given, line = self.process.stdin, ""
        try:
            if given is not None:
                given.write(json.dumps(asked) + "\n")
                given.flush()
            line = self.lines.get(timeout=_WAIT)
        except (BrokenPipeError, queue.Empty):
            pass
        if line:
            found: dict[str, str] = json.loads(line)
            return found
        self.process.kill()
        self.end()
        return None

    def end(self) -> None:
        """Close the input, and wait until the process ends."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()
        self.reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put("")
