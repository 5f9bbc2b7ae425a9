"""The report of a verification, as text, as data and as an HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from selfattn_core import __version__
from selfattn_core.conformance.verdicts.tolerance import Verdict

__all__ = ["Finding", "VerifyReport"]


@dataclass(frozen=True)
class Finding:
    """The result for one input.

    Args:
        question: name of the input.
        verdicts: one verdict for each compared output.
        error: why there is no output. Empty if there is one.
        refused: whether the file refuses an input of this size although it declares open sizes. This is not a wrong answer.
    """

    question: str
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """Whether every output is within the limits."""
        return not self.error and bool(self.verdicts) and all(each.passed for each in self.verdicts)

    @property
    def kind(self) -> str:
        """The CSS class of its cell on the page."""
        return "absent" if self.refused else "good" if self.passed else "bad"

    @property
    def words(self) -> str:
        """The errors in noise floors, or a description of what is wrong."""
        if self.refused:
            return f"refused: {self.error}"
        if self.passed:
            return ", ".join(f"{each.quantity} {each.ratio:.2f} ×" for each in self.verdicts)
        wrong = [each.message for each in self.verdicts if not each.passed]
        return f"WRONG: {self.error or '; '.join(wrong)}"


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Args:
        artifact: the file.
        weights: the weights that it was compared with.
        container: its format.
        runtime: the runtime that ran it.
        versions: versions of the runtime.
        config: config of the weights, from `SelfAttentionConfig.to_dict`.
        layout: layout of the file's feature maps.
        sizes: (B, H, W) that the file accepts, with None for an open size.
        with_map: whether the attention map is among the outputs, and was compared.
        precision: precision that sets the limits.
        why: reason for this precision. Empty if the caller chose it or it is float32.
        factor: number of noise floors that an error may reach.
        findings: one result for each input.
        diagnosis: known bugs and configs that give the same wrong answers.
        notes: further notes for the reader.
    """

    artifact: str
    weights: str
    container: str
    runtime: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    layout: str
    sizes: tuple[int | None, int | None, int | None]
    with_map: bool
    precision: str
    why: str
    factor: float
    findings: tuple[Finding, ...]
    diagnosis: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def answered(self) -> tuple[Finding, ...]:
        """The findings for the sizes that the file accepts."""
        return tuple(finding for finding in self.findings if not finding.refused)

    @property
    def passed(self) -> bool:
        """Whether there is an answer, and every answer is within the limits."""
        return bool(self.answered) and all(finding.passed for finding in self.answered)

    @property
    def worst(self) -> float:
        """The largest error in noise floors. Infinite if an answer could not be compared."""
        ratios = [verdict.ratio for finding in self.answered for verdict in finding.verdicts]
        missing = any(finding.error for finding in self.answered)
        return float("inf") if missing or not ratios else max(ratios)

    @property
    def headline(self) -> str:
        """The verdict in a sentence."""
        if not self.passed:
            wrong = sum(not finding.passed for finding in self.answered)
            return f"{self.artifact} is NOT the function of {self.weights}: wrong on {wrong} of {len(self.answered)} inputs."
        refused = len(self.findings) - len(self.answered)
        taken = f" that it takes; it refuses {refused} of {len(self.findings)}" if refused else ""
        return (
            f"{self.artifact} is the function of {self.weights}: {self.worst:.2f} × the noise floor at most, on all "
            f"inputs{taken}."
        )

    @property
    def facts(self) -> list[str]:
        """Facts about the file and its run, one line each."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        sizes = "×".join("?" if size is None else str(size) for size in self.sizes)
        outputs = "output and attention map" if self.with_map else "output"
        why = f", for {self.why}" if self.why else ""
        return [
            f"{self.container}, run by {self.runtime}{f' ({versions})' if versions else ''}",
            f"{outputs}, {self.layout}, maps of {sizes} positions (batch × height × width; ? is open)",
            f"precision {self.precision}{why}: up to {self.factor:g} × the noise floor",
        ]

    def to_text(self) -> str:
        """The report for a terminal."""
        width = max((len(finding.question) for finding in self.findings), default=0)
        lines = [self.headline, *(f"  {fact}" for fact in self.facts)]
        lines += [f"  {finding.question:<{width}}  {finding.words}" for finding in self.findings]
        lines += [f"explained by: {words}" for words in self.diagnosis]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report for a program."""
        return {
            "selfattn": __version__,
            "numpy": np.__version__,
            "artifact": self.artifact,
            "weights": self.weights,
            "passed": self.passed,
            "worst": _number(self.worst),
            "container": self.container,
            "runtime": self.runtime,
            "versions": dict(self.versions),
            "config": dict(self.config),
            "layout": self.layout,
            "sizes": list(self.sizes),
            "with_map": self.with_map,
            "precision": self.precision,
            "why": self.why,
            "factor": self.factor,
            "findings": [
                {
                    "question": finding.question,
                    "passed": finding.passed,
                    "error": finding.error,
                    "refused": finding.refused,
                    "ratios": {each.quantity: _number(each.ratio) for each in finding.verdicts},
                    "messages": [each.message for each in finding.verdicts if each.message],
                }
                for finding in self.findings
            ],
            "diagnosis": list(self.diagnosis),
            "notes": list(self.notes),
        }

    def to_html(self) -> str:
        """The report as a self-contained HTML page."""
        style = files("selfattn_core.conformance.report").joinpath("page.css").read_text(encoding="utf-8")
        kind = "good" if self.passed else "bad"
        rows = "\n".join(
            f'<tr><td>{escape(finding.question)}</td><td class="{finding.kind}">{escape(finding.words)}</td></tr>'
            for finding in self.findings
        )
        said = [f"Explained by: {words}" for words in self.diagnosis] + [
            f"Note: {note}" for note in self.notes
        ]
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>selfattn verify</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            '<p class="kicker">selfattn verify</p>\n'
            f'<h1><span class="{kind}">{"✓" if self.passed else "✗"}</span> {escape(self.headline)}</h1>\n'
            f"{''.join(f'<p>{escape(line)}</p>' for line in (*said, *self.facts))}\n"
            f"<table>\n<tr><th>input</th><th>error</th></tr>\n{rows}\n</table>\n"
            f'<p class="soft">selfattn {escape(__version__)} · numpy {escape(np.__version__)}</p>\n'
            "</main>\n</body>\n</html>\n"
        )


def _number(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return float(value) if np.isfinite(value) else None
