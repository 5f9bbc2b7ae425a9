"""Drawing a probe, choice by choice. Every list begins with the simplest choice, and repeats what should come often.

The choices are made in one order, whether or not a later rule overrides them. So a search that makes one choice simpler keeps
the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfattn_core.conformance.cases.case import SIXTEEN_BITS
from selfattn_core.conformance.protocol import Backend, Claims
from selfattn_core.conformance.search.probe import Probe, Step

__all__ = ["Choose", "drawn", "fitted", "needs", "searched_claims", "unclaimed"]

Choose = Callable[[Sequence[Any]], Any]
"""Takes one of some choices."""

_ABILITIES = {
    "map": {"map"},
    "vjp": {"vjp"},
    "r1": {"r1"},
    "mixed": {"mixed"},
    "per_sample": {"per_sample"},
    "training_pass": {"spectral_norm"},
    "training_vjp": {"training_vjp", "spectral_norm"},
    "params": {"params"},
    "saved": {"saved"},
    "updated": {"updated"},
    "worn": {"updated"},
    "compiled_forward": {"compiled"},
    "compiled_vjp": {"compiled", "vjp"},
}
"""The abilities that a step needs beside forward. "updated" stands for the optional method `update`."""

_WEIGHTS = {
    "forward": 12,
    "vjp": 12,
    "map": 6,
    "r1": 8,
    "mixed": 8,
    "per_sample": 4,
    "training_pass": 8,
    "training_vjp": 6,
    "params": 4,
    "refilled": 2,
    "permuted": 2,
    "alone": 2,
    "doubled": 2,
    "shifted": 2,
    "updated": 2,
    "saved": 1,
}
"""How often a step comes, relative to the others. The files of some frameworks take seconds."""

_MANY_CALLS = ("together", "often", "worn")
"""Steps of thousands of calls, which come alone, with small maps, and seldom."""

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16)
_CHANNELS = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 127, 128, 129, 256, 257,
)  # fmt: skip
_NARROW = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 66, 128, 129)
_BATCHES = (1, 2, 3, 1, 2, 3, 1, 2, 4, 5, 0, 7, 8, 9, 16, 17, 33, 65)
# Maps around the blocks that kernels have: 64, 128, 256, 512 and 1,024 rows.
_BLOCKS = (
    (8, 8), (5, 13), (7, 9), (1, 64), (1, 65), (8, 16), (3, 43), (1, 127), (16, 16), (1, 257), (15, 17), (4, 65),
    (16, 32), (1, 513), (19, 27), (27, 19), (23, 31), (32, 32), (25, 41), (1, 1023),
)  # fmt: skip
# More than 2,048 rows, more than 2²² scores and more than two blocks of any size.
_LARGE = ((1, 2049), (46, 45), (2, 1051), (33, 40), (64, 64))
_MOST_NUMBERS = 40_000
"""The most numbers of one map of features."""
_MOST_SCORES = 400_000
_MANY = 600
"""The positions of a map beyond which a probe has one call."""

_MOST_STEPS = 5
_MOST_EQUAL_TERMS = 32
"""Twice the cap of a value in ulp."""

_SEEDS = 2**16


def searched_claims(backend: Backend) -> Claims:
    """The claims of a backend, with "updated" among the abilities if it has the optional method `update`.

    Args:
        backend: the backend.
    """
    claims = Claims.of(backend)
    further = {"updated"} if callable(getattr(backend, "update", None)) else set()
    return replace(claims, abilities={*claims.abilities, *further})


def needs(probe: Probe) -> Claims:
    """The least that a backend claims if it must answer a probe.

    Args:
        probe: the probe.

    Example:
        >>> sorted(needs(Probe(steps=(Step("mixed"),), norm=True)).abilities)
        ['forward', 'mixed', 'spectral_norm']
    """
    abilities = {"forward"}.union(*(_ABILITIES.get(step.ask, set()) for step in probe.steps))
    return Claims(abilities | ({"spectral_norm"} if probe.norm else set()), (probe.layout,), (probe.dtype,))


def unclaimed(probe: Probe, claims: Claims) -> list[str]:
    """What a probe needs and a backend does not claim.

    Args:
        probe: the probe.
        claims: the claims of the backend, as for `drawn`.

    Example:
        >>> unclaimed(Probe(steps=(Step("vjp"),)), Claims(["forward"], ["channels_last"], ["float64"]))
        ['vjp', 'float32']
    """
    needed = needs(probe)
    return [
        *sorted(set(needed.abilities) - {*claims.abilities, "forward"}),
        *sorted(set(needed.layouts) - set(claims.layouts)),
        *sorted(set(needed.dtypes) - set(claims.dtypes)),
    ]


@dataclass(frozen=True)
class _Sizes:
    batch: int
    height: int
    width: int


def drawn(choose: Choose, claims: Claims, *, small: bool = False) -> Probe:
    """A probe within the claims of a backend.

    Args:
        choose: takes one of some choices. Always taking the first one gives the simplest probe.
        claims: the claims of the backend, from `searched_claims`.
        small: whether all maps are small. Small probes are fast to ask and to make smaller.

    Example:
        >>> claims = Claims(["forward", "vjp"], ["channels_last"], ["float32"])
        >>> drawn(lambda choices: choices[0], claims).words
        'forward; C=1, Dk=1, Dv=1, no biases; 1×1×1; float32, channels_last'
    """
    abilities = set(claims.abilities) | {"forward"}
    asks = [ask for ask in _WEIGHTS if _ABILITIES.get(ask, set()) <= abilities]
    weighted = [ask for ask in asks for _ in range(_WEIGHTS[ask])]
    places = ("", "", "", "", "", "input", "input", "layer")
    slots = [(choose((False, True)), Step(choose(weighted), choose(places))) for _ in range(_MOST_STEPS)]
    steps = tuple(step for kept, step in slots if kept) or (slots[0][1],)
    # Equal steps in a row show state that a call leaves behind.
    if choose((False, False, False, True)):
        steps += steps[:1]
    # A compiler takes a hundred times as long as a call. What it keeps for a size shows at a second call.
    compiled, of = choose((*[False] * 24, True)), choose(("forward", "vjp"))
    if compiled and "compiled" in abilities and (of == "forward" or of in abilities):
        steps = tuple(Step(f"compiled_{of}", place) for place in ("", "input", ""))
    many = choose((*[""] * 253, *_MANY_CALLS))
    if many and _ABILITIES.get(many, set()) <= abilities:
        steps = (Step(many),)
    dtypes = [dtype for dtype in ("float32", "float64") if dtype in claims.dtypes]
    narrow = [dtype for dtype in SIXTEEN_BITS if dtype in claims.dtypes]
    dtype = choose([*dtypes[:1] * 8, *dtypes[1:] * 5, *narrow * 2] or list(claims.dtypes))
    layout = choose(tuple(claims.layouts))
    form = choose(("plain", "plain", "pooled", "out", "official", "any", "any", "any"))
    channels, qk, value = choose(_CHANNELS), choose(_NARROW), choose(_CHANNELS)
    alike = choose(("", "", "", "qk", "value", "both", "eighth"))
    out, bias, pool = choose((False, True)), choose((False, True, True)), choose((1, 2, 1, 2, 3, 4, 5))
    norm = choose((False, False, True)) and "spectral_norm" in abilities
    kind = choose((*["small"] * 11, *["square"] * 11, *["block"] * 8, "large"))
    kind = "small" if small and kind in ("block", "large") else kind
    batch, height, width = choose(_BATCHES), choose(_SIDES), choose(_SIDES)
    side, block, large = choose((2, 3, 4, 5, 8, 12, 16)), choose(_BLOCKS), choose(_LARGE)
    other = (choose((1, 2, 3)), choose(_SIDES), choose(_SIDES))
    probe = Probe(
        steps,
        channels,
        qk,
        value,
        out,
        bias,
        pool,
        norm,
        batch,
        height,
        width,
        other,
        dtype,
        layout,
        seed=choose(range(_SEEDS)),
        logits=choose((3.0, 3.0, 1.0, 8.0, 0.1, 30.0, 120.0)),
        gamma=choose((0.7, 1.0, -0.7, -1.0, 0.0, 2.5, 4.5, -6.0, 40.0, 0.01, -300.0)),
        x_scale=choose((0, 0, 0, 0, 0, 4, -4, 10, -10)),
        dy_scale=choose((0, 0, 0, 0, 0, 4, -4, 16, -16)),
        value_scale=choose((0, 0, 0, 0, 0, 4, -4, 8, -8)),
        balance=choose((0, 0, 0, 0, 0, 3, -3, 6, -6)),
        x_mean=choose((0.0, 0.0, 0.0, 0.0, 0.0, 1.0, -3.0)),
        key_mean=choose((0.0, 0.0, 0.0, 0.0, 0.0, 20.0, -20.0, 500.0)),
        query_mean=choose((0.0, 0.0, 0.0, 0.0, 0.0, 2.0, -4.0)),
        zero_biases=choose((False, False, False, True)),
        rows=choose(("", "", "", "", "", "positive", "integers", "repeated", "equal")),
        x_view=choose(("", "", "", "reversed", "transposed", "strided", "still")),
        dy_view=choose(("", "", "", "still", "reversed", "transposed", "strided")),
        state=choose(("scaled", "unit", "random")),
        sigma=choose((0, 0, 0, -6, 6, -12)),
        zero=choose(("", "", "", "", "", "", "query", "out", "all")),
        poison=choose((*[""] * 14, "x", "dy")),
    )
    probe = _of_kind(probe, kind, _Sizes(batch, side, side), block, large)
    # Two inputs of one size show what a layer keeps for a size.
    if choose((False, False, True)) or (compiled and choose((False, True))):
        probe = replace(probe, other=probe.shape)
    probe = _of_form(probe, form, alike)
    return fitted(probe)


def _of_kind(
    probe: Probe, kind: str, square: _Sizes, block: tuple[int, int], large: tuple[int, int]
) -> Probe:
    if kind == "square":
        return replace(probe, height=square.height, width=square.width)
    if kind == "block":
        return replace(probe, height=block[0], width=block[1])
    if kind == "large":
        return replace(probe, height=large[0], width=large[1])
    return probe


def _of_form(probe: Probe, form: str, alike: str) -> Probe:
    channels = probe.channels
    if alike in ("qk", "both"):
        probe = replace(probe, qk=channels)
    if alike == "eighth" and channels >= 8:
        probe = replace(probe, qk=channels // 8)
    if alike in ("value", "both"):
        probe = replace(probe, value=channels)
    if form == "plain":
        probe = replace(probe, out=False, pool=1)
    if form == "pooled":
        probe = replace(probe, out=False, pool=2)
    if form == "out":
        probe = replace(probe, out=True, pool=1)
    if form == "official":
        probe = replace(
            probe, out=True, pool=2, bias=False, qk=max(1, channels // 8), value=max(1, channels // 2)
        )
    return probe


def fitted(probe: Probe) -> Probe:
    """The probe with everything changed that would make it no layer, or a question that rounding decides.

    The rules for ranges say why. None of them is about the error of one backend.

    Args:
        probe: any probe.
    """
    if any(step.ask in _MANY_CALLS for step in probe.steps):
        probe = replace(
            probe,
            batch=min(probe.batch, 2),
            height=min(probe.height, 3),
            width=min(probe.width, 3),
            channels=min(probe.channels, 4),
            qk=min(probe.qk, 4),
            value=min(probe.value, 4),
        )
    if probe.height * probe.width > _MANY:
        # The definition takes seconds for second derivatives of such a size, and for more than one call.
        probe = replace(
            probe,
            steps=tuple(step for step in probe.steps if step.ask not in _SECOND)[:1] or (Step("forward"),),
        )
    orders = {step.ask for step in probe.steps}
    probe = _fitted_form(probe, orders)
    alike = probe.other == probe.shape
    probe = _fitted_sizes(probe)
    probe = replace(probe, other=probe.shape) if alike else probe
    probe = _fitted_rows(probe, orders)
    probe = _fitted_ranges(probe, orders)
    return replace(probe, steps=_fitted_steps(probe))


_DERIVATIVES = {"vjp", "r1", "mixed", "per_sample", "compiled_vjp", "training_vjp"}
_SECOND = {"r1", "mixed"}


def _fitted_form(probe: Probe, asks: set[str]) -> Probe:
    if not probe.out:
        probe = replace(probe, value=probe.channels)
    if asks & {"training_pass", "training_vjp"}:
        probe = replace(probe, norm=True)
    if probe.norm:
        # The state would be rounded to 16 bits after each pass, and the rounded states differ by whole units.
        dtype = "float32" if probe.dtype in SIXTEEN_BITS else probe.dtype
        # The scale of the kernels belongs to sigma. The applied ones do not have it.
        probe = replace(
            probe,
            dtype=dtype,
            x_scale=0,
            value_scale=0,
            balance=0,
            rows="" if probe.rows == "integers" else probe.rows,
        )
    else:
        probe = replace(probe, sigma=0, state="scaled", zero="")
    if probe.zero == "out" and not probe.out:
        probe = replace(probe, zero="")
    # Nothing is left to compare where all kernels are zero, except the state.
    if probe.zero == "all" and asks - {"training_pass", "params", "forward"}:
        probe = replace(probe, zero="")
    if not probe.bias:
        probe = replace(probe, zero_biases=False, key_mean=0.0, query_mean=0.0)
    return probe


def _fitted_sizes(probe: Probe) -> Probe:
    """Sizes that take a fraction of a second."""
    pool, (batch, height, width) = probe.pool, probe.shape
    height, width = max(height, pool), max(width, pool)
    other = (probe.other[0], max(probe.other[1], pool), max(probe.other[2], pool))
    positions = height * width
    channels, qk, value = probe.channels, probe.qk, probe.value
    # The more numbers a pooling window compares, the more often two of them are too close.
    if pool > 1 and probe.rows != "integers":
        most = 64 if pool == 2 else 24
        channels, qk, value = min(channels, most), min(qk, most), min(value, most)
    if positions > 300:
        batch = min(batch, 1 if positions > _MANY else 2)
        channels, qk, value = min(channels, 8), min(qk, 4), min(value, 8)
    if positions > 2200 and pool == 1:
        height, width = 46, 45
    positions = height * width
    # The width of a batch gives way to that of the channels, which is the one that kernels divide.
    widest = max(channels, value, qk)
    batch = min(batch, max(1, _MOST_NUMBERS // (positions * widest)), max(1, _MOST_SCORES // positions**2))
    if positions * widest > _MOST_NUMBERS:
        height = width = max(pool, 7)
    # With spectral norm a kernel of one number has no gradient, only rounding.
    if probe.norm and channels == 1:
        channels = 2
    if not probe.out:
        value = channels
    dtype = probe.dtype
    if dtype in SIXTEEN_BITS and (positions > 100 or max(channels, value) > 48):
        dtype = "float32"
    return replace(
        probe,
        batch=batch,
        height=height,
        width=width,
        other=other,
        channels=channels,
        qk=qk,
        value=value,
        dtype=dtype,
    )


def _fitted_rows(probe: Probe, asks: set[str]) -> Probe:
    derived = bool(asks & _DERIVATIVES)
    rows, x_view, dy_view, zero = probe.rows, probe.x_view, probe.dy_view, probe.zero
    # Derivatives by q and k of equal keys cancel entirely, and what is left is only rounding.
    if rows == "equal" and (derived or probe.pool > 1):
        rows = ""
    if x_view == "still" and (derived or probe.pool > 1 or rows not in ("", "equal") or probe.poison):
        x_view = ""
    # Equal rows in one pooling window tie, and rounding may part them.
    if rows == "repeated" and probe.pool > 1:
        rows = ""
    # The roundings of a sum of equal terms all have one sign, and grow with their number to half of it.
    if probe.height * probe.width > _MOST_EQUAL_TERMS or max(probe.other[1:]) ** 2 > _MOST_EQUAL_TERMS:
        rows = "" if rows == "equal" else rows
        x_view = "" if x_view == "still" else x_view
        zero = "" if zero == "all" else zero
    if "refilled" in asks and x_view == "still":
        x_view = ""
    if probe.poison == "dy" or rows == "positive":
        dy_view = "" if dy_view == "still" else dy_view
    return replace(probe, rows=rows, x_view=x_view, dy_view=dy_view, zero=zero)


def _fitted_ranges(probe: Probe, asks: set[str]) -> Probe:
    if probe.rows == "integers":
        probe = replace(probe, x_scale=0, value_scale=0, balance=0, x_mean=0.0, key_mean=0.0, query_mean=0.0)
    if asks & _SECOND:
        # A second derivative is a difference of products with the scores, and loses what they exceed.
        probe = replace(probe, logits=min(probe.logits, 30.0))
    if probe.dtype in SIXTEEN_BITS:
        probe = replace(
            probe,
            logits=min(probe.logits, 8.0),
            gamma=max(-6.0, min(probe.gamma, 4.5)),
            x_scale=0,
            dy_scale=0,
            value_scale=0,
            balance=0,
            x_mean=0.0,
            key_mean=0.0,
            query_mean=0.0,
        )
    if probe.poison:
        # Where a score is NaN, the size of the scores is unknown, and with it how far their rounding grows.
        probe = replace(probe, logits=min(probe.logits, 3.0), x_mean=0.0, key_mean=0.0, query_mean=0.0)
    if probe.pool > 1:
        # A constant hides the lead of a window's winner.
        probe = replace(probe, key_mean=max(-20.0, min(probe.key_mean, 20.0)))
    if probe.dtype == "float16" and probe.rows == "positive":
        # Sums without cancellation would exceed the format.
        probe = replace(
            probe, batch=min(probe.batch, max(1, 1000 // (probe.height * probe.width * probe.channels)))
        )
    if probe.poison and (asks & (_DERIVATIVES - {"vjp"}) or probe.pool > 1 or probe.dtype in SIXTEEN_BITS):
        probe = replace(probe, poison="")
    return probe


def _fitted_steps(probe: Probe) -> tuple[Step, ...]:
    """The steps without those that this probe cannot be asked."""
    kept: list[Step] = []
    ended: set[str] = set()
    narrow = probe.dtype in SIXTEEN_BITS
    for step in probe.steps:
        own = "layer" if step.place == "layer" else ""
        if own in ended:
            continue
        # A training pass of the gradient may or may not keep the state that it moves.
        if step.ask == "training_vjp":
            ended.add(own)
        if (
            (step.ask == "permuted" and probe.pool > 1)
            or (step.ask == "alone" and probe.batch < 2 and step.place != "input")
            or (step.ask in ("alone", "per_sample") and 0 in (probe.batch, probe.other[0]))
            or (step.ask == "shifted" and not probe.bias)
            or (step.ask in ("doubled", "shifted") and (narrow or probe.norm))
            or (step.ask == "refilled" and (step.place == "input" or probe.poison == "x"))
            or (narrow and step.ask in ("r1", "mixed", "per_sample", "compiled_forward", "compiled_vjp"))
            or (narrow and probe.pool > 1 and step.ask == "vjp")
        ):
            continue
        kept.append(step)
    return tuple(kept) or (Step("forward"),)
