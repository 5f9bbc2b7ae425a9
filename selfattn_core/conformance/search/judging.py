"""Judging the answers to a probe: by the definition and the tolerances of the table, and by what needs no definition."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from selfattn_core import spec
from selfattn_core.arrays import Array
from selfattn_core.conformance.cases.case import SIXTEEN_BITS, Case
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.cases.inputs import Inputs
from selfattn_core.conformance.search.asking import Answers, changed_weights
from selfattn_core.conformance.search.finding import Finding
from selfattn_core.conformance.search.material import given_to, material
from selfattn_core.conformance.search.normalised import terms_of_the_norm, with_terms_of_the_norm
from selfattn_core.conformance.search.probe import Probe, Step
from selfattn_core.conformance.verdicts.cancellation import terms_through_the_map
from selfattn_core.conformance.verdicts.expected import NOISE, differentiated, expect_on
from selfattn_core.conformance.verdicts.tolerance import EPS, Expectation, Verdict, judge
from selfattn_core.params import parameter_table, state_table

__all__ = ["findings", "worst"]

DEFINITION = "definition"

_COMPUTES: Mapping[str, FamilyName] = {
    "vjp": "vjp",
    "map": "map",
    "r1": "r1",
    "mixed": "mixed",
    "per_sample": "per_sample",
    "compiled_vjp": "vjp",
}
"""The family whose computation a step asks for. Any other step asks for y."""

_RELATIONS: Mapping[str, str] = {
    "together": "equal answers in threads",
    "often": "equal calls, equal answers",
    "worn": "equal answers after updates",
    "permuted": "permuted positions",
    "alone": "batch independence",
    "doubled": "linear in the value",
    "shifted": "no effect of the key bias",
}
"""The property of each step whose answer follows from that of `forward`. It is judged by the definition, like any other."""


def findings(probe: Probe, answers: Answers) -> tuple[Finding, ...]:
    """Everything that is wrong with the answers to a probe.

    Args:
        probe: the probe.
        answers: the answers of the backend.

    Example:
        >>> from selfattn_core.conformance.reference import Reference
        >>> from selfattn_core.conformance.search.asking import ask_steps
        >>> findings(Probe(), ask_steps(Reference(), Probe()))
        ()
    """
    return tuple(_Judge(probe).findings(answers))


def worst(probe: Probe, answers: Answers) -> float:
    """The largest error of the answers to a probe, in noise floors.

    Args:
        probe: the probe.
        answers: the answers of the backend.
    """
    judge_of_it = _Judge(probe)
    list(judge_of_it.findings(answers))
    return max((verdict.ratio for verdict in judge_of_it.verdicts), default=0.0)


class _Judge:
    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.numbers = material(probe)
        # Float64 and bfloat16 borrow the error of another dtype, on the same numbers in that dtype.
        self.other = NOISE[probe.dtype] if NOISE[probe.dtype] != probe.dtype else ""
        self.noisy = material(probe, self.other) if self.other else self.numbers
        self.weights = [dict(weights) for weights in self.numbers.layers]
        self.noisy_weights = [dict(weights) for weights in self.noisy.layers]
        self.versions = [0, 0]
        self.moved: list[Mapping[str, Expectation]] = [{}, {}]
        self.expected: dict[tuple[object, ...], Mapping[str, Expectation]] = {}
        self.verdicts: list[Verdict] = []

    def findings(self, answers: Answers) -> Iterator[Finding]:
        latest: dict[tuple[str, int], Array] = {}
        for step, found in zip(self.probe.steps, answers.steps, strict=True):
            at = 1 if step.place == "layer" else 0
            if step.ask == "worn":
                # The last update gives the layer its first weights back.
                self._give(at, at)
            yield from self._step(step, at, found)
            if step.ask in ("forward", "map"):
                yield from self._again(step, at, found, latest)
            if step.ask == "updated":
                self._give(at, 1 - at)
            if step.ask == "saved":
                self.versions[at] += 1
        for touched in answers.touched:
            ask = self.probe.steps[touched.step].words
            what = {
                "argument": ("arguments untouched", f"{touched.name} was changed by {ask}"),
                "earlier answer": (
                    "earlier answers untouched",
                    f"{touched.name} of {ask} was changed by a later call",
                ),
                "weights of the layer": (
                    "weights are copies",
                    f"the layer uses the array {touched.name} that params() gave away",
                ),
            }
            name, message = what[touched.what]
            yield Finding(name, self.probe.steps[touched.step].ask, touched.name, message)

    def _give(self, at: int, source: int) -> None:
        """Give a layer the weights that one of the two began with."""
        self.weights[at] = dict(self.numbers.layers[source])
        self.noisy_weights[at] = dict(self.noisy.layers[source])
        self.moved[at] = {}
        self.versions[at] += 1

    def _step(self, step: Step, at: int, found: Mapping[str, Array]) -> Iterator[Finding]:
        if step.ask in ("saved", "updated"):
            return
        exact: Mapping[str, Array] = {}
        expected: Mapping[str, Expectation] = {}
        if step.ask == "params":
            exact, expected = self._read(at)
        elif step.ask == "training_pass":
            trained = parameter_table(self.probe.config)
            exact = {name: array for name, array in self.weights[at].items() if name in trained}
            state = self.moved[at] = self._state(step, at)
            self._move(at)
            expected = {**self._expected(step, at), **state}
        else:
            expected = self._expected(step, at)
        if set(found) != {*expected, *exact}:
            missing = sorted({*expected, *exact} - set(found))
            extra = sorted(set(found) - {*expected, *exact})
            yield Finding(DEFINITION, step.ask, "", f"missing {missing}, unexpected {extra}")
            return
        for name, want in expected.items():
            verdict = judge(name, found[name], want, self.probe.dtype)
            self.verdicts.append(verdict)
            if not verdict.passed:
                yield Finding(_RELATIONS.get(step.ask, DEFINITION), step.ask, name, verdict.message)
        for name, array in exact.items():
            # The kit hands over 16-bit numbers as float32, and a backend may return either.
            narrow = self.probe.dtype in SIXTEEN_BITS
            same = found[name].astype(np.float32) if narrow else found[name]
            if same.dtype != array.dtype or same.shape != array.shape or same.tobytes() != array.tobytes():
                yield Finding(
                    "weights come back", step.ask, name, f"{name} is not bit for bit what was given"
                )
        if step.ask == "map":
            yield from self._row_sums(found["map"], expected["map"])

    def _row_sums(self, answer: Array, expected: Expectation) -> Iterator[Finding]:
        if answer.shape != expected.want.shape or not np.isfinite(expected.want).all() or not answer.size:
            return
        sums = answer.astype(np.float64).sum(axis=-1)
        # In any order of summation the sum of M numbers is right to M roundings, and so is the quotient by it. Each
        # entry is further off by as many of its floors as pass.
        eps = EPS["float32" if self.probe.dtype in SIXTEEN_BITS else self.probe.dtype]
        keys = answer.shape[-1]
        floor = keys * (eps + expected.floor)
        verdict = judge("row sums", sums, Expectation(np.ones_like(sums), floor, np.inf), "float64")
        if not verdict.passed:
            yield Finding("rows of the map sum to 1", "map", "row sums", verdict.message)

    def _again(
        self, step: Step, at: int, found: Mapping[str, Array], latest: dict[tuple[str, int], Array]
    ) -> Iterator[Finding]:
        key = (step.words, self.versions[at])
        name = "map" if step.ask == "map" else "y"
        if name in found:
            before = latest.setdefault(key, found[name])
            if before.tobytes() != found[name].tobytes():
                yield Finding(
                    "equal calls, equal answers", step.ask, name, f"{name} differs from that of an equal call"
                )

    def _read(self, at: int) -> tuple[Mapping[str, Array], Mapping[str, Expectation]]:
        """The weights that the layer holds. Those that a training pass has moved are known to their rounding."""
        moved = self.moved[at]
        return {name: array for name, array in self.weights[at].items() if name not in moved}, moved

    def _move(self, at: int) -> None:
        """One power iteration, in float64 from what the layer holds, rounded to the dtype."""
        for numbers, dtype in (
            (self.weights, self.probe.dtype),
            (self.noisy_weights, self.other or self.probe.dtype),
        ):
            wide = {name: array.astype(np.float64) for name, array in numbers[at].items()}
            moved = spec.power_iteration(self.probe.config, wide)
            numbers[at] = {
                name: moved[name].astype(dtype) if name in state_table(self.probe.config) else array
                for name, array in numbers[at].items()
            }
        self.versions[at] += 1

    def _state(self, step: Step, at: int) -> dict[str, Expectation]:
        """The state after a training pass of what the layer holds now."""
        given, noisy = self._given(step, at)
        expected = expect_on(
            replace(self._case(step), family="spectral_norm", of="spectral_norm"),
            given,
            noisy,
            self.probe.dtype,
        )
        return {name: expected[name] for name in state_table(self.probe.config)}

    def _given(self, step: Step, at: int) -> tuple[Inputs, Inputs]:
        """The input of a step, and the one on which the error of the spec is measured."""
        given = given_to(step, self.numbers, self.weights[at])
        return given, given_to(step, self.noisy, self.noisy_weights[at]) if self.other else given

    def _expected(self, step: Step, at: int) -> Mapping[str, Expectation]:
        key = (step.ask, step.place, self.versions[at])
        if key not in self.expected:
            self.expected[key] = self._made(step, at)
        return self.expected[key]

    def _made(self, step: Step, at: int) -> Mapping[str, Expectation]:
        given, noisy = self._given(step, at)
        if step.ask in ("doubled", "shifted"):
            # The layer with the other weights must give y by the rule, which is the expected value of the spec here.
            given, noisy = (
                replace(each, params=changed_weights(step.ask, numbers.layers[at]))
                for each, numbers in ((given, self.numbers), (noisy, self.noisy))
            )
        if step.ask == "training_vjp":
            given, noisy = (self._moved(each) for each in (given, noisy))
        if step.ask == "alone":
            given, noisy = (replace(each, x=each.x[-1:], dy=each.dy[-1:]) for each in (given, noisy))
        if step.ask == "refilled":
            given, noisy = (replace(each, x=each.other) for each in (given, noisy))
        case = self._case(step)
        expected = expect_on(case, given, noisy if self.other else given, self.probe.dtype)
        return self._with_norm(case, given, expected) if self.probe.norm and case.order else expected

    def _with_norm(
        self, case: Case, given: Inputs, expected: Mapping[str, Expectation]
    ) -> Mapping[str, Expectation]:
        """The expectations with the terms that spectral norm adds to the gradients of kernels."""
        wide = given.in_float64()
        for x, dy, cotangents in differentiated(case, wide):
            terms = terms_of_the_norm(case.config, wide.params, x, dy, cotangents=cotangents)
            through = terms_through_the_map(case.config, wide.params, x, dy, cotangents=cotangents)
            logits = spec.magnitudes(case.config, wide.params, x)["logits"]
            expected = with_terms_of_the_norm(expected, terms, through, logits, case.order, self.probe.dtype)
        return expected

    def _moved(self, given: Inputs) -> Inputs:
        moved = spec.power_iteration(self.probe.config, given.in_float64().params)
        return replace(
            given, params={name: moved[name].astype(array.dtype) for name, array in given.params.items()}
        )

    def _case(self, step: Step) -> Case:
        family = _COMPUTES.get(step.ask, "vjp" if step.ask == "training_vjp" else "forward")
        probe = self.probe
        return Case(
            "search",
            family,
            "",
            probe.config,
            probe.shape,
            probe.gamma,
            probe.logits,
            constant=probe.rows == "equal" or probe.x_view == "still",
            integers=probe.rows == "integers",
        )
