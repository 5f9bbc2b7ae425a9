"""A probe as a short literal that a command line can carry."""

import zlib
from dataclasses import fields

from selfattn_core.conformance.cases.case import DTYPES, LAYOUTS
from selfattn_core.conformance.search.probe import ASKS, STEP_PLACES, Probe, Step

__all__ = ["VERSION", "TokenError", "from_token", "to_token"]


VERSION = 1
"""The version of tokens. It changes whenever an old token would give other numbers or other calls."""

_WORDS = {
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "rows": ("", "equal", "repeated", "integers", "positive"),
    "x_view": ("", "strided", "transposed", "reversed", "still"),
    "dy_view": ("", "strided", "transposed", "reversed", "still"),
    "state": ("scaled", "unit", "random"),
    "zero": ("", "query", "key", "value", "out", "all"),
    "poison": ("", "x", "dy"),
}
"""The words that a field of text may hold."""

_MOST_STEPS = 20
_LARGEST = 2**20


class TokenError(ValueError):
    """A token that this version cannot replay."""


def to_token(probe: Probe) -> str:
    """The token of a probe. It names only what differs from the smallest probe.

    Args:
        probe: the probe.

    Example:
        >>> to_token(Probe(channels=5, value=5, gamma=-1.0))
        'S1:channels=5,value=5,gamma=-1.0:a49b'
    """
    plain = Probe()
    parts = [
        f"{field.name}={_text(getattr(probe, field.name))}"
        for field in fields(Probe)
        if getattr(probe, field.name) != getattr(plain, field.name)
    ]
    content = f"S{VERSION}:{','.join(parts)}"
    return f"{content}:{_sum(content)}"


def from_token(token: str) -> Probe:
    """The probe of a token.

    Args:
        token: from `to_token`.

    Raises:
        TokenError: if the token has another version, or was damaged, or does not make a layer.

    Example:
        >>> from_token("S1:channels=5,value=5,gamma=-1.0:a49b").gamma
        -1.0
    """
    token = token.strip()
    head, _, rest = token.partition(":")
    if not (head[:1] == "S" and head[1:].isdecimal()):
        raise TokenError(f"token {token!r}: expected S{VERSION}:NAME=VALUE,…:SUM, as --explore prints it.")
    if int(head[1:]) != VERSION:
        raise TokenError(
            f"token {token!r}: got a token of version {head[1:]}, expected version {VERSION}: "
            "replay it with the version of selfattn that printed it, or search again."
        )
    content, _, found = token.rpartition(":")
    if found != _sum(content):
        raise TokenError(
            f"token {token!r}: its check sum is {found or 'missing'}, expected {_sum(content)}: "
            "a part is missing or was changed, so copy the whole token."
        )
    given: dict[str, object] = {}
    kinds = {field.name: getattr(Probe(), field.name) for field in fields(Probe)}
    for part in filter(None, rest.rpartition(":")[0].split(",")):
        name, _, text = part.partition("=")
        if name not in kinds:
            raise TokenError(f"token {token!r}: unknown name {name!r}; expected some of {', '.join(kinds)}.")
        try:
            given[name] = _value(name, text, kinds[name])
        except ValueError as error:
            raise TokenError(f"token {token!r}: {name}={text}: {error}.") from error
    probe = Probe(**given)  # type: ignore[arg-type]
    if problem := _problem(probe):
        raise TokenError(f"token {token!r}: {problem}")
    return probe


def _text(value: object) -> str:
    if isinstance(value, tuple):
        if all(isinstance(each, Step) for each in value):
            return "+".join(step.words for step in value)
        return "x".join(map(str, value))
    if isinstance(value, bool):
        return str(int(value))
    return value if isinstance(value, str) else repr(value)


def _value(name: str, text: str, like: object) -> object:
    if name == "steps":
        return _steps(text)
    if isinstance(like, tuple):
        return tuple(_number(part) for part in text.split("x"))
    if isinstance(like, bool):
        if text not in ("0", "1"):
            raise ValueError("expected 0 or 1")
        return text == "1"
    if isinstance(like, int):
        return _number(text)
    if isinstance(like, float):
        return float(text)
    if text not in _WORDS[name]:
        raise ValueError(f"expected one of {', '.join(filter(None, _WORDS[name]))}")
    return text


def _steps(text: str) -> tuple[Step, ...]:
    steps = [Step(*part.split("@", 1)) for part in text.split("+")]
    for step in steps:
        if step.ask not in ASKS or step.place not in STEP_PLACES:
            raise ValueError(f"unknown step {step.words!r}, expected some of {', '.join(ASKS)}")
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"got {len(steps)} steps, expected at most {_MOST_STEPS}")
    return tuple(steps)


def _number(text: str) -> int:
    number = int(text)
    if abs(number) > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST}")
    return number


def _problem(probe: Probe) -> str:
    """Why a probe cannot be asked. Empty if it can."""
    if len(probe.other) != 3:
        return f"other={_text(probe.other)}: expected three sizes, as in 1x3x2."
    sizes = (*probe.shape, *probe.other)
    if any(size < 0 for size in sizes):
        return "a size is negative."
    try:
        config = probe.config
        config.check_input((*probe.shape, probe.channels))
        config.check_input((*probe.other_shape, probe.channels))
    except ValueError as error:
        return str(error)
    return ""


def _sum(content: str) -> str:
    return f"{zlib.crc32(content.encode()) & 0xFFFF:04x}"
