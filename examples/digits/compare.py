"""Comparison of the frameworks: the error of every logit against the numpy model in float64, in float32 noise floors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.digits.data import Digits, accuracy
from examples.digits.frameworks import Answer
from examples.digits.numpy_model import Classifier
from selfattn_core.conformance.verdicts.tolerance import Expectation, judge

Array = NDArray[Any]

# The rule of the conformance kit, for a whole network instead of one layer: a framework may be off by `FACTOR` noise
# floors, 8. The cap in ulp only prevents that a noisy numpy hides a bug.
_ALLOWANCE_ULP = 1.0
_CAP_ULP = 64.0


@dataclass(frozen=True)
class Row:
    """One framework's line of the table.

    Args:
        framework: name of the framework.
        accuracy: accuracy on the held-out images, or None without usable logits.
        ratio: the largest logit difference as a multiple of the noise floor. Infinite without usable logits.
        problem: why the framework disagrees. Empty if it agrees.
        missing: whether the framework is not installed.
    """

    framework: str
    accuracy: float | None
    ratio: float
    problem: str = ""
    missing: bool = False


def expect(model: Classifier, images: Array) -> Expectation:
    """The logits of the numpy model in float64, and the allowed error of float32 arithmetic.

    The noise floor is the error of the same model in float32, plus one ulp of the largest logit, because that error is one
    random sample and can be small by chance.
    """
    want = model.astype("float64")(images)
    ulp = float(np.finfo(np.float32).eps * np.abs(want).max())
    error = float(np.abs(model.astype("float32")(images) - want).max())
    return Expectation(want, floor=error + _ALLOWANCE_ULP * ulp, cap=_CAP_ULP * ulp)


def compare(answer: Answer, expectation: Expectation, held_out: Digits) -> Row:
    """Judge one framework's answer."""
    if answer.logits is None:
        return Row(answer.framework, None, np.inf, answer.problem, answer.missing)
    verdict = judge("logits", answer.logits, expectation, "float32")
    usable = bool(np.isfinite(verdict.ratio))
    right = accuracy(answer.logits, held_out.labels) if usable else None
    return Row(answer.framework, right, verdict.ratio, verdict.message)


def table(rows: Sequence[Row], expectation: Expectation, held_out: Digits) -> str:
    """The rows as text, below the reference."""
    reference = accuracy(expectation.want, held_out.labels)
    lines = [
        f"{'':<18}{'accuracy':>9}   largest difference of a logit",
        f"{'numpy, float64':<18}{reference:>9.1%}   (the reference)",
    ]
    for row in rows:
        right = "-" if row.accuracy is None else f"{row.accuracy:.1%}"
        difference = f"{row.ratio:.1f} × the noise floor" if np.isfinite(row.ratio) else "-"
        lines.append(f"{row.framework:<18}{right:>9}   {difference:<23} {_verdict(row)}")
    return "\n".join(lines)


def _verdict(row: Row) -> str:
    if not row.problem:
        return "agrees"
    kind = "MISSING" if row.missing else "FAILED" if row.accuracy is None else "DISAGREES"
    return f"{kind}: {row.problem}"
