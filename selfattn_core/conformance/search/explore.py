"""The search: probes in an order that the seed decides, and a smallest probe for each kind of failure."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from selfattn_core.conformance.search.asking import Answers
from selfattn_core.conformance.search.drawing import unclaimed
from selfattn_core.conformance.search.finding import Finding, Kind, Search, Skipped
from selfattn_core.conformance.search.judging import findings
from selfattn_core.conformance.search.material import UndecidedError, material
from selfattn_core.conformance.search.probe import Probe
from selfattn_core.conformance.search.process import Declined, NotStartedError, Process
from selfattn_core.conformance.search.strategies import probes
from selfattn_core.conformance.search.token import TokenError, from_token, to_token

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
_TELL_SECONDS = 10.0
_ELSEWHERE = 16
"""The probes that are asked again in another process."""

_LIKE: Mapping[str, str] = {
    "compiled_forward": "forward",
    "training_pass": "forward",
    "refilled": "forward",
    "permuted": "forward",
    "alone": "forward",
    "doubled": "forward",
    "shifted": "forward",
    "together": "forward",
    "often": "forward",
    "worn": "forward",
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

    The search ends when it has asked `PROBES_PER_SECOND` probes for each second, or when the seconds are over. Then it asks
    the last probes that passed once more, in another process and in another order. The last failure may take half a minute
    more to be made smaller. What was found so far is also returned if Ctrl-C or a signal ends
    the search, or if the backend does not start again.

    Args:
        process: the process of the backend.
        seed: decides the probes and their order.
        seconds: the time.
        past: tokens of past failures, which are asked first. Those that this version cannot replay, or that the backend does
            not claim, are skipped.
        tell: called with a line for each failure and each skipped token, and every ten seconds.

    Raises:
        ValueError: if the time is not a positive number of seconds.
        NotInstalledError: if hypothesis is not installed.
        NotStartedError: if the backend does not start.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds}: expected a positive number of seconds.")
    searcher = _Searcher(process, seed, seconds, tell)
    with searcher.until_stopped():
        searcher.repeat(past)
        batch = 0
        while not searcher.over:
            searcher.batch(batch)
            batch += 1
        searcher.ask_elsewhere()
    return searcher.result()


def replay(process: Process, tokens: Iterable[str]) -> Search:
    """Ask the probes of tokens again, each twice. What only one of the two answers shows is reported as flaky.

    Args:
        process: the process of the backend.
        tokens: the tokens.

    Raises:
        TokenError: if a token cannot be replayed.
        NotStartedError: if the backend does not start.
    """
    searcher = _Searcher(process, 0, float("inf"), lambda _: None)
    searcher.ended = "replay"
    with searcher.until_stopped():
        for token in tokens:
            probe = from_token(token)
            first = {found.kind: found for found in searcher.look(probe)}
            if searcher.skip(token, probe):
                continue
            searcher.seen.clear()
            second = {found.kind: found for found in searcher.look(probe)}
            for kind, found in (first | second).items():
                searcher.add(found if kind in first and kind in second else _flaky(found), probe)
    return searcher.result()


class _Searcher:
    def __init__(self, process: Process, seed: int, seconds: float, tell: Callable[[str], None]) -> None:
        self.process, self.seed, self.tell = process, seed, tell
        self.claims = process.start().claims
        self.began = self.told = time.monotonic()
        self.seconds = seconds
        self.budget = 0 if seconds == float("inf") else max(1, round(seconds * PROBES_PER_SECOND))
        self.seen: dict[Probe, tuple[Finding, ...]] = {}
        self.known: set[Kind] = set()
        self.found: list[Finding] = []
        self.skipped: list[Skipped] = []
        self.right: deque[Probe] = deque(maxlen=_ELSEWHERE)
        # Why a probe has no answer to judge.
        self.unanswered: dict[Probe, tuple[Literal["unclaimed", "undecided"], str]] = {}
        self.probes = self.steps = self.answered = self.drawn = self.timeouts = self.exit_code = 0
        self.ended: Literal["", "time", "interrupt", "gave up", "replay"] = ""
        # While hypothesis makes a failure smaller: its kind, the smallest probe so far, and when to stop.
        self.target: Kind | None = None
        self.smallest: Probe | None = None
        self.until, self.left = 0.0, 0
        # The last probe that was asked, and what ended the search while hypothesis ran.
        self.asked: Probe | None = None
        self.stopped: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether no further probe is drawn."""
        if not self.ended and time.monotonic() - self.began > self.seconds:
            self.ended = "time"
        if len(self.found) >= _MOST_FINDINGS or self.timeouts >= _MOST_TIMEOUTS:
            self.ended = "gave up"
        return bool(self.ended) or self.drawn >= self.budget

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Keep what was found if the search is stopped from outside, or if the backend does not start again."""
        try:
            yield
        except KeyboardInterrupt:
            self.ended = "interrupt"
        except SystemExit as error:
            self.ended = "interrupt"
            self.exit_code = error.code if isinstance(error.code, int) else 1
        except NotStartedError as error:
            self.ended = "gave up"
            assert self.asked is not None  # noqa: S101 - the backend had started
            self.add(Finding("starts again", "", "", str(error), "error"), self.asked)

    def repeat(self, past: Iterable[str]) -> None:
        """Ask the probes of past failures."""
        for token in past:
            if self.over:
                return
            try:
                probe = from_token(token)
            except TokenError as error:
                self._skip(Skipped(token, "stale", str(error)))
                continue
            found = self.look(probe)
            if not self.skip(token, probe):
                self._note(found, probe)

    def skip(self, token: str, probe: Probe) -> bool:
        """Whether a probe that was looked at has no answer to judge. The token is noted then."""
        if probe in self.unanswered:
            self._skip(Skipped(token, *self.unanswered[probe]))
        return probe in self.unanswered

    def _skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.tell(f"skipped {skipped.token}: {skipped.why}: {skipped.message}")

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
            pass
        except BaseException as error:
            self.stopped = self.stopped or _stopper(error)
        if self.smallest is not None:
            found = self.seen[self.smallest]
            self._note(sorted(found, key=lambda each: each.kind != self.target), self.smallest)
        if self.stopped is not None:
            raise self.stopped

    def fails(self, probe: Probe) -> bool:
        """Whether a probe fails in a new way, or, while a failure is made smaller, in the same way.

        Hypothesis takes any exception for a failure of the probe, even that of a signal, and would repeat it. So an exception
        is kept, and nothing more is asked.
        """
        if self.stopped is not None:
            return False
        try:
            return self._fails(probe)
        except BaseException as error:
            self.stopped = error
            return False

    def _fails(self, probe: Probe) -> bool:
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
        if found[0].property == "timeout":
            # To make it smaller would take as long again for each try.
            self.add(found[0], probe)
            return False
        # A failure of a process that has answered other probes counts only if a new process shows it too.
        self.process.end()
        try:
            again = self._answer(probe)
        except BaseException:
            self.target, self.smallest = found[0].kind, probe
            raise
        kinds = {each.kind for each in again}
        repeated = [each for each in found if each.kind in kinds]
        if not repeated:
            self.seen[probe] = ()
            if not self._explained(flaky := _flaky(found[0])):
                self.add(flaky, probe)
            return False
        self.seen[probe] = again
        self.target, self.smallest = repeated[0].kind, probe
        self.until, self.left = time.monotonic() + _SHRINK_SECONDS, _SHRINK_PROBES
        return True

    def look(self, probe: Probe) -> tuple[Finding, ...]:
        """What is wrong with the answers to a probe. It is asked once."""
        if probe not in self.seen:
            self.seen[probe] = self._answer(probe)
        return self.seen[probe]

    def _answer(self, probe: Probe) -> tuple[Finding, ...]:
        if lacking := unclaimed(probe, self.claims):
            self.unanswered[probe] = "unclaimed", f"the backend does not claim {', '.join(lacking)}"
            return ()
        try:
            material(probe)
        except UndecidedError as error:
            self.unanswered[probe] = "undecided", str(error)
            return ()
        self._tell_progress()
        self.asked = probe
        self.probes += 1
        self.steps += len(probe.steps)
        answer = self.process.ask(probe)
        if isinstance(answer, Declined):
            self.unanswered[probe] = "unclaimed", answer.reason
            return ()
        self.answered += 1
        if isinstance(answer, Answers):
            self.timeouts = 0
            if not (found := findings(probe, answer)):
                self.right.append(probe)
            return found
        self.timeouts = self.timeouts + 1 if answer.how == "timeout" else 0
        status: Literal["fail", "error"] = "fail" if answer.how == "answers are arrays" else "error"
        return (Finding(answer.how, "", answer.what, answer.message, status),)

    def ask_elsewhere(self) -> None:
        """Ask the last probes that passed again, in a new process and in the opposite order."""
        if self.ended == "gave up":
            return
        self.process.end()
        for probe in reversed(tuple(self.right)):
            self._note(
                [
                    replace(
                        found,
                        property="equal answers in another process",
                        message=f"right in one process, and wrong in another with other calls before: {found.message}",
                    )
                    for found in self._answer(probe)
                ],
                probe,
            )

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self.told >= _TELL_SECONDS:
            self.told = now
            seconds = now - self.began
            self.tell(f"{self.probes} probes asked in {seconds:.0f} s, {len(self.found)} failures")

    def _note(self, found: Iterable[Finding], probe: Probe) -> None:
        """Note the new failures of a probe. Those of one property and step differ in the array, and are told together."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        new = [each for each in found if not self._explained(each)]
        for each in new:
            groups.setdefault((each.property, each.ask), []).append(each)
        for first, *others in groups.values():
            if len(self.found) < _MOST_FINDINGS and not self._explained(first):
                words = f"; likewise {', '.join(each.quantity for each in others)}" if others else ""
                self.add(replace(first, message=f"{first.message}{words}"), probe)
        self.known |= {each.kind for each in new}

    def add(self, found: Finding, probe: Probe) -> None:
        """Note a failure with the probe that shows it."""
        self.known.add(found.kind)
        whole = replace(found, token=to_token(probe), words=probe.words, probes=self.probes)
        self.found.append(whole)
        last = whole.message.splitlines()[-1:]
        self.tell(": ".join((whole.property, whole.words, *last)))

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
            self.answered,
            tuple(self.skipped),
            self.exit_code,
        )

    def _explained(self, found: Finding) -> bool:
        """Whether a failure of the same kind is known, or one of the step that this step repeats in another way."""
        if found.kind in self.known:
            return True
        if found.status == "flaky":
            # A random error shows in any step.
            return any(
                name == found.property and quantity == found.quantity for name, _, quantity in self.known
            )
        like = _LIKE.get(found.ask)
        return like is not None and any(
            ask == like and quantity == found.quantity for _, ask, quantity in self.known
        )


def _flaky(found: Finding) -> Finding:
    words = f"the same run had two answers, one of them wrong: {found.message}"
    return replace(found, property="equal runs, equal answers", message=words, status="flaky")


def _stopper(error: BaseException) -> BaseException:
    """The exception of a signal that came while hypothesis drew a probe, or else the error itself."""
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if isinstance(each, SystemExit):
            return each
        if each is not None:
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return error
