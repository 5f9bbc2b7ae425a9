"""The search: probes in an order that the seed decides, and a smallest probe for each kind of failure."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from selfattn_core.conformance.search.asking import Answers
from selfattn_core.conformance.search.finding import Finding, Kind, Search
from selfattn_core.conformance.search.judging import findings
from selfattn_core.conformance.search.material import UndecidedError, material
from selfattn_core.conformance.search.probe import Probe
from selfattn_core.conformance.search.process import Process, Unanswered
from selfattn_core.conformance.search.strategies import probes
from selfattn_core.conformance.search.token import from_token, to_token

__all__ = ["PROBES_PER_SECOND", "explore", "replay"]


PROBES_PER_SECOND = 10
"""The most probes that a search asks for each of its seconds. A backend that answers faster ends the search early, so that its
searches are equal on every machine."""

_BATCH = 64
_SMALL_BATCHES = 2
"""The first batches have small maps alone, so that most failures are met small."""

_SHRINK_SECONDS = 30.0
_SHRINK_PROBES = 500
_MOST_TIMEOUTS = 3
_MOST_FINDINGS = 20

_LIKE: Mapping[str, str] = {
    "compiled_forward": "forward",
    "training_pass": "forward",
    "refilled": "forward",
    "permuted": "forward",
    "alone": "forward",
    "doubled": "forward",
    "shifted": "forward",
    "compiled_vjp": "vjp",
    "training_vjp": "vjp",
    "per_sample": "vjp",
}
"""The step whose failure explains that of another step."""


class _FoundError(AssertionError):
    """A probe fails. Hypothesis sees this and makes the probe smaller."""


def explore(
    process: Process,
    *,
    seed: int = 0,
    seconds: float = 60.0,
    past: Iterable[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Search:
    """Search a backend for failures.

    The search ends when it has asked `PROBES_PER_SECOND` probes for each second, or when the seconds are over. The last
    failure may take half a minute more to be made smaller. Ctrl-C ends the search, and what was found so far is returned.

    Args:
        process: the process of the backend.
        seed: decides the probes and their order.
        seconds: the time.
        past: tokens of past failures, which are asked first. Those of another version are left out.
        tell: called with a line for each failure.

    Raises:
        NotInstalledError: if hypothesis is not installed.
        NotStartedError: if the backend does not start.
    """
    searcher = _Searcher(process, seed, seconds, tell)
    try:
        searcher.repeat(past)
        batch = 0
        while not searcher.over:
            searcher.batch(batch)
            batch += 1
    except KeyboardInterrupt:
        searcher.ended = "interrupt"
    return searcher.result()


def replay(process: Process, tokens: Iterable[str]) -> Search:
    """Ask the probes of tokens again, each twice. A probe with two answers is reported as flaky.

    Args:
        process: the process of the backend.
        tokens: the tokens.

    Raises:
        TokenError: if a token cannot be replayed.
        NotStartedError: if the backend does not start.
    """
    searcher = _Searcher(process, 0, float("inf"), lambda _: None)
    searcher.ended = "replay"
    for token in tokens:
        probe = from_token(token)
        first = searcher.look(probe)
        searcher.seen.clear()
        second = searcher.look(probe)
        if {each.kind for each in first} != {each.kind for each in second}:
            found = (first or second)[0]
            searcher.add(_flaky(found), probe)
        else:
            for found in first:
                searcher.add(found, probe)
    return searcher.result()


class _Searcher:
    def __init__(self, process: Process, seed: int, seconds: float, tell: Callable[[str], None]) -> None:
        self.process, self.seed, self.tell = process, seed, tell
        self.claims = process.start().claims
        self.began = time.monotonic()
        self.seconds = seconds
        self.budget = 0 if seconds == float("inf") else max(1, round(seconds * PROBES_PER_SECOND))
        self.seen: dict[Probe, tuple[Finding, ...]] = {}
        self.known: set[Kind] = set()
        self.found: list[Finding] = []
        self.probes = self.steps = self.drawn = self.timeouts = 0
        self.ended: Literal["", "time", "interrupt", "gave up", "replay"] = ""
        # While hypothesis makes a failure smaller: its kind, the smallest probe so far, and when to stop.
        self.target: Kind | None = None
        self.smallest: Probe | None = None
        self.until, self.left = 0.0, 0

    @property
    def over(self) -> bool:
        """Whether no further probe is drawn."""
        if not self.ended and time.monotonic() - self.began > self.seconds:
            self.ended = "time"
        if len(self.found) >= _MOST_FINDINGS or self.timeouts >= _MOST_TIMEOUTS:
            self.ended = "gave up"
        return bool(self.ended) or self.drawn >= self.budget

    def repeat(self, past: Iterable[str]) -> None:
        """Ask the probes of past failures."""
        for token in past:
            try:
                probe = from_token(token)
            except ValueError:
                continue
            for found in self.look(probe):
                if not self._explained(found):
                    self.add(found, probe)

    def batch(self, number: int) -> None:
        """Draw some probes, and make the first new failure among them smaller."""
        strategy = probes(self.claims, small=number < _SMALL_BATCHES)
        from hypothesis import HealthCheck, Phase, Verbosity, given, settings
        from hypothesis import seed as seeded

        @seeded(self.seed * 1_000_003 + number)
        @settings(
            max_examples=_BATCH,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
            print_blob=False,
        )
        @given(strategy)
        def holds(probe: Probe) -> None:
            if self.fails(probe):
                raise _FoundError

        self.target = self.smallest = None
        try:
            holds()
        except _FoundError:
            assert self.smallest is not None  # noqa: S101 - a probe failed
            shown = [each for each in self.look(self.smallest) if each.kind == self.target]
            self.known |= {each.kind for each in self.look(self.smallest)}
            self.add(shown[0], self.smallest)

    def fails(self, probe: Probe) -> bool:
        """Whether a probe fails in a new way, or, while a failure is made smaller, in the same way."""
        if self.target is not None:
            if probe not in self.seen and (time.monotonic() > self.until or self.left <= 0):
                return False
            self.left -= probe not in self.seen
            failing = any(each.kind == self.target for each in self.look(probe))
            self.smallest = probe if failing else self.smallest
            return failing
        if self.over:
            return False
        self.drawn += probe not in self.seen
        found = self.look(probe)
        if not found or any(self._explained(each) for each in found):
            return False
        return self._begins_to_shrink(probe, found)

    def _begins_to_shrink(self, probe: Probe, found: tuple[Finding, ...]) -> bool:
        if found[0].rule == "timeout":
            # To make it smaller would take as long again for each try.
            self.add(found[0], probe)
            return False
        # A failure of a process that has answered other probes counts only if a new process shows it too.
        self.process.end()
        del self.seen[probe]
        again = {each.kind for each in self.look(probe)}
        repeated = [each for each in found if each.kind in again]
        if not repeated:
            self.seen[probe] = ()
            self.add(_flaky(found[0]), probe)
            return False
        self.target, self.smallest = repeated[0].kind, probe
        self.until, self.left = time.monotonic() + _SHRINK_SECONDS, _SHRINK_PROBES
        return True

    def look(self, probe: Probe) -> tuple[Finding, ...]:
        """What is wrong with the answers to a probe. It is asked once."""
        if probe not in self.seen:
            self.seen[probe] = self._asked(probe)
        return self.seen[probe]

    def _asked(self, probe: Probe) -> tuple[Finding, ...]:
        try:
            material(probe)
        except UndecidedError:
            return ()
        self.probes += 1
        self.steps += len(probe.steps)
        answer = self.process.ask(probe)
        if isinstance(answer, Answers):
            self.timeouts = 0
            return findings(probe, answer)
        if isinstance(answer, Unanswered):
            self.timeouts = self.timeouts + 1 if answer.how == "timeout" else 0
            status: Literal["fail", "error"] = "fail" if answer.how == "answers are arrays" else "error"
            return (Finding(answer.how, "", answer.what, answer.message, status),)
        return ()

    def add(self, found: Finding, probe: Probe) -> None:
        """Note a failure with the probe that shows it."""
        self.known.add(found.kind)
        whole = replace(found, token=to_token(probe), words=probe.words, probes=self.probes)
        self.found.append(whole)
        self.tell(f"{whole.rule}: {whole.words}: {whole.message}")

    def result(self) -> Search:
        """The results so far."""
        self.process.end()
        seconds = time.monotonic() - self.began
        return Search(
            self.seed,
            seconds,
            self.budget,
            self.probes,
            self.steps,
            tuple(self.found),
            self.ended or "budget",
        )

    def _explained(self, found: Finding) -> bool:
        """Whether a failure of the same kind is known, or one of the step that this step repeats in another way."""
        if found.kind in self.known:
            return True
        like = _LIKE.get(found.ask, "")
        return any(ask == like and quantity == found.quantity for _, ask, quantity in self.known)


def _flaky(found: Finding) -> Finding:
    words = f"the same run had two answers, one of them wrong: {found.message}"
    return replace(found, rule="equal runs, equal answers", message=words, status="flaky")
