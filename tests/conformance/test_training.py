"""Training trajectories: problems reveal bugs, correct layers stay within the noise, and wrong gradients do not."""

from dataclasses import replace

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.conformance.cases.case import Run
from selfattn_core.conformance.cases.inputs import clear_windows
from selfattn_core.conformance.cases.table import CASES
from selfattn_core.conformance.questions.optimizers import Adam, Momentum
from selfattn_core.conformance.questions.training import (
    BATCHES,
    STEPS,
    follow,
    problem,
    reference,
    train,
    trained,
)
from selfattn_core.conformance.report import as_data
from selfattn_core.conformance.results import BackendReport
from selfattn_core.conformance.verdicts.compare import compare
from selfattn_core.conformance.verdicts.tolerance import FACTOR
from selfattn_core.conformance.verdicts.trajectory import curve_floors, judge_trajectory

TRAINING = {case.id: case for case in CASES if case.family == "trajectory"}


class Trained:
    """The spec with the part of the protocol that training needs."""

    def build(self, config, params, dtype, layout):
        return config, params

    def forward(self, model, x):
        return spec.forward(*model, x)

    def vjp(self, model, x, dy):
        return self.change(spec.vjp(*model, x, dy), x, dy)

    def change(self, gradients, x, dy):
        return gradients


class QueryGradientOff(Trained):
    """An error of a tenth of a percent, which no single step shows."""

    def change(self, gradients, x, dy):
        return gradients | {"query.kernel": gradients["query.kernel"] * x.dtype.type(1.001)}


class GammaDetached(Trained):
    def change(self, gradients, x, dy):
        return gradients | {"gamma": np.zeros_like(gradients["gamma"])}


class FirstOfTheBatch(Trained):
    """The gradient of only the first feature map of each batch, times the batch size."""

    def vjp(self, model, x, dy):
        gradients = spec.vjp(*model, x[:1], dy[:1])
        return {name: value * x.dtype.type(len(x)) for name, value in gradients.items()}


class KeyTakenForQuery(Trained):
    def change(self, gradients, x, dy):
        return gradients | {"key.kernel": gradients["query.kernel"], "query.kernel": gradients["key.kernel"]}


class MapHeldConstant(Trained):
    """A backward that does not go through the softmax."""

    def change(self, gradients, x, dy):
        return {
            name: np.zeros_like(value) if name.startswith(("query", "key")) else value
            for name, value in gradients.items()
        }


class Forgetful(Trained):
    """Keeps its first weights, as a function that was compiled with the weights as constants."""

    def update(self, model, params):
        return model


class HalfPrecisionGradients(Trained):
    def change(self, gradients, x, dy):
        return {name: value.astype(np.float16).astype(value.dtype) for name, value in gradients.items()}


class Exploding(Trained):
    def change(self, gradients, x, dy):
        return {name: value * x.dtype.type(1e30) for name, value in gradients.items()}


def judged(backend, case, dtype, seed=0):
    return judge_trajectory(case, train(backend, case, dtype, "channels_last", seed), dtype, seed)


def failed(verdicts):
    return {verdict.quantity for verdict in verdicts if not verdict.passed}


def test_both_forms_are_trained_with_both_optimisers():
    assert {(case.config.kv_pool, case.optimizer) for case in TRAINING.values()} == {
        (pool, optimizer) for pool in (1, 2) for optimizer in ("momentum", "adam")
    }


@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_the_problem_is_learned_and_can_see_bugs(case):
    given, curve = problem(case), reference(case).losses
    assert curve.shape == (STEPS,)
    assert curve[-BATCHES:].mean() < 0.6 * curve[:BATCHES].mean()
    assert len({BATCHES, *case.shape, case.config.channels}) == 5
    assert all(array.any() for array in given.start.values())
    assert spec.attention_map(case.config, given.start, given.x[0]).max() > 0.3
    moved = {name: np.abs(value - given.start[name]).max() for name, value in reference(case).params.items()}
    assert min(moved[name] for name in trained(case)[1:]) > 1e-2
    assert problem(case).x is given.x
    assert problem(case, seed=1).x.tobytes() != given.x.tobytes()
    assert clear_windows(case.config, reference(case).params, given.x[0], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("seed", range(3))
def test_the_spec_stays_within_its_own_noise(case, dtype, seed):
    """Another order of the batch passes too. It is the same function with other rounding."""

    class Reversed(Trained):
        def forward(self, model, x):
            return super().forward(model, x[::-1])[::-1]

        def vjp(self, model, x, dy):
            return spec.vjp(*model, x[::-1], dy[::-1])

    assert failed(judged(Trained(), case, dtype, seed)) == set()
    verdicts = judged(Reversed(), case, dtype, seed)
    assert failed(verdicts) == set()
    assert 0 < max(verdict.ratio for verdict in verdicts) < FACTOR / 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["flat form", "pooled form"])
@pytest.mark.parametrize(
    "broken",
    [
        QueryGradientOff,
        GammaDetached,
        FirstOfTheBatch,
        KeyTakenForQuery,
        MapHeldConstant,
        Forgetful,
        HalfPrecisionGradients,
        Exploding,
    ],
)
def test_a_broken_backward_is_caught(broken, form, dtype):
    cases = [case for case in TRAINING.values() if case.title.endswith(form)]
    assert any(failed(judged(broken(), case, dtype)) for case in cases)


def test_a_factor_on_a_gradient_is_invisible_to_adam_and_not_to_momentum():
    """This is why the kit has two optimisers: Adam divides by the size of the gradient."""
    caught = {
        case.optimizer for case in TRAINING.values() if failed(judged(QueryGradientOff(), case, "float32"))
    }
    assert caught == {"momentum"}


def test_a_verdict_names_the_step_and_the_multiple():
    case = TRAINING["SA-TRN-001"]
    found = train(Trained(), case, "float32", "")
    losses = found["loss"].copy()
    losses[120] *= 1.001
    (verdict, *_) = judge_trajectory(case, found | {"loss": losses}, "float32")
    assert "loss: the error at step 120 is" in verdict.message
    assert "× the noise of the float64 trajectory, at most 8 × is allowed" in verdict.message
    losses[60] = np.nan
    (verdict, *_) = judge_trajectory(case, found | {"loss": losses}, "float32")
    assert verdict.message == "loss: NaN or infinity from step 60 on"
    (verdict, *_) = judge_trajectory(case, found | {"loss": losses[:9]}, "float32")
    assert verdict.message == "loss: got float64 (9,), expected float64 (200,)"


def test_the_key_bias_is_not_compared():
    case = TRAINING["SA-TRN-001"]
    assert "query.bias" in trained(case)
    assert "key.bias" not in trained(case)


def test_gradients_that_do_not_fit_are_named():
    class Misshapen(Trained):
        def change(self, gradients, x, dy):
            gradients = gradients | {"gamma": gradients["gamma"][0]}
            del gradients["query.kernel"]
            return gradients

    with pytest.raises(ValueError, match=r"vjp: query.kernel is missing; gamma is \(\), should be \(1,\)"):
        train(Misshapen(), TRAINING["SA-TRN-001"], "float32", "")


def test_what_is_handed_to_the_backward_is_the_derivative_of_the_loss():
    case = TRAINING["SA-TRN-003"]
    given, seen = problem(case), []
    step = 1e-6
    bump = np.zeros_like(given.x[0])
    bump[1, 2, 3, 4] = step

    def losses(shift):
        def vjp(params, x, dy):
            seen.append(dy)
            return {name: np.zeros_like(value) for name, value in params.items()}

        return follow(given, Momentum(), "float64", lambda _, x: x + shift, vjp).losses

    plus, minus = losses(bump), losses(-bump)
    positions = given.x[0].size // case.config.channels
    assert losses(0 * bump)[0] == pytest.approx(0.5 * ((given.x[0] - given.target[0]) ** 2).sum() / positions)
    assert seen[-STEPS][1, 2, 3, 4] == pytest.approx((plus[0] - minus[0]) / (2 * step), rel=1e-6)


def test_optimisers_by_hand():
    """Two steps on one weight, calculated by hand. The gradients are 1 and 2."""
    momentum, w = Momentum(rate=0.1, decay=0.5), {"w": np.array([1.0])}
    w = momentum.step(w, {"w": np.array([1.0])})
    assert w["w"] == pytest.approx([0.9])
    w = momentum.step(w, {"w": np.array([2.0])})
    assert w["w"] == pytest.approx([0.65])  # v = 0.5 · 1 + 2
    adam, w = Adam(rate=0.1, epsilon=0.0), {"w": np.array([1.0])}
    w = adam.step(w, {"w": np.array([1.0])})
    assert w["w"] == pytest.approx([0.9])  # m = 1 and v = 1 after the correction
    w = adam.step(w, {"w": np.array([2.0])})
    mean, square = 0.29 / 0.19, 0.004999 / 0.001999
    assert w["w"] == pytest.approx([0.9 - 0.1 * mean / np.sqrt(square)])
    assert (
        Momentum().step({"w": np.ones(1, np.float32)}, {"w": np.ones(1, np.float32)})["w"].dtype == "float32"
    )
    assert Adam().step({"w": np.ones(1, np.float32)}, {"w": np.ones(1, np.float32)})["w"].dtype == "float32"


def test_the_curve_reaches_the_report():
    run = Run(TRAINING["SA-TRN-002"], "float64", "channels_last")
    found = train(Trained(), run.case, run.dtype, run.layout)
    outcome = compare(run, found)
    assert outcome.status == "pass"
    assert outcome.losses == tuple(reference(run.case).losses)
    assert outcome.reference == outcome.losses
    assert outcome.floors == tuple(curve_floors(run.case, run.dtype))
    judged = replace(outcome, reference=(1.0,), floors=(2.0,))
    (row,) = as_data([BackendReport("mine", outcomes=(judged,))])["trajectories"]
    assert (row["reference"], row["floors"]) == ([1.0], [2.0]), "a report trains nothing"
    assert row["losses"] == {"mine": list(outcome.losses)}
    del found["gamma"]
    assert compare(run, found).message == "missing gamma"
