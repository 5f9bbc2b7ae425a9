"""Turning the answer to a run into an outcome, with the failures that the backend expects."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.execution.events import Answer, Answered
from selfattn_core.conformance.results import Outcome
from selfattn_core.conformance.verdicts.compare import compare

__all__ = ["as_expected", "outcome_of"]


def outcome_of(run: Run, answer: Answer, seed: int = 0, label: str = "float32") -> Outcome:
    """Judge an answer. `as_expected` then marks the failures that the backend expects.

    Args:
        run: the run that was asked.
        answer: the answer of the backend.
        seed: the seed of the inputs.
        label: as for `compare`.
    """
    if not isinstance(answer, Answered):
        return Outcome(run, answer.status, (), answer.message)
    found = dict(zip(answer.names, answer.arrays, strict=True))
    return replace(compare(run, found, seed, label), seconds=answer.seconds)


def as_expected(outcome: Outcome, expected_failures: Mapping[str, Sequence[str]]) -> Outcome:
    """Mark the failure of a run that the backend expects to fail, and fail the run if it passes.

    Args:
        outcome: the outcome, from `outcome_of`.
        expected_failures: the failures, from `Backend.expected_failures`.
    """
    for key, (reason, link) in expected_failures.items():
        if outcome.run.is_named(key):
            # Only a wrong answer can be expected: a crash may hide any other bug.
            if outcome.status in ("error", "unclaimed"):
                return outcome
            if outcome.status == "fail":
                return replace(outcome, status="expected-failure", reason=reason, link=link)
            stale = (
                f"passes, but was expected to fail ({reason}; {link}): remove {key} from expected_failures"
            )
            return replace(outcome, status="fail", message=stale, reason=reason, link=link)
    return outcome
