"""The facts that a file does not contain: the published default, or the setting that replaces it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from selfattn_core.porting.dialects.dialect import Dialect
from selfattn_core.porting.errors import PortError
from selfattn_core.problems import Problem

__all__ = ["Assumption", "Settings", "settings_of"]

Value = bool | int | float


@dataclass(frozen=True)
class Assumption:
    """A fact that a port relies on and that the file does not show.

    Args:
        setting: the name of the setting that changes it, "" if there is none.
        text: the assumption.
    """

    setting: str
    text: str

    def __str__(self) -> str:
        # Reports use the words of the command.
        return f"{self.text} (--set {self.setting}=…)" if self.setting else self.text


@dataclass(frozen=True)
class Settings:
    """The settings of a dialect, with the user's values and the defaults.

    Args:
        given: the names that the user set.
        kv_pool: the pooling. None for the variant's.
        use_scale: whether the scores are multiplied by the dialect's factor.
        gamma: the gain, for a file that does not contain it. None if the user did not pass it.
        sn_eps: the eps of the power iteration. None for the dialect's.
        bn_eps: the eps of the batch norm. None for the dialect's.
        ema: whether averaged copies are preferred.
        plain: whether the file records that it was trained without spectral norm.
    """

    given: frozenset[str]
    kv_pool: int | None = None
    use_scale: bool = True
    gamma: float | None = None
    sn_eps: float | None = None
    bn_eps: float | None = None
    ema: bool = True
    plain: bool = False


def settings_of(dialect: Dialect, given: Mapping[str, str | Value]) -> Settings:
    """The settings of a port from this dialect.

    Args:
        dialect: the dialect of the source.
        given: values by name. A value may be text.

    Raises:
        PortError: with every setting that the dialect does not have, and every impossible value.

    Example:
        >>> from selfattn_core.porting.dialects.catalogue import dialect
        >>> settings_of(dialect("mmcv"), {"use_scale": "false"}).use_scale
        False
        >>> settings_of(dialect("heykeetae"), {"use_scale": "false"})
        Traceback (most recent call last):
        ...
        selfattn_core.porting.errors.PortError: dialect heykeetae: use_scale is not a setting of this dialect; it has sn_eps.
    """
    kinds = _kinds(dialect)
    problems = []
    fields: dict[str, Value] = {}
    for name, value in given.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            rest = f"did you mean {near[0]}?" if near else f"it has {', '.join(kinds) or 'none'}."
            problems.append(
                Problem("unknown_setting", f"{name} is not a setting of this dialect; {rest}", (name,))
            )
            continue
        field, kind = kinds[name]
        parsed = _parse(value, kind)
        if parsed is None:
            problems.append(Problem("bad_setting", f"{name}={value} should be {_WANTED[kind]}", (name,)))
        else:
            fields[field] = parsed
    if problems:
        raise PortError.of(f"dialect {dialect.name}: ", problems, between="; ")
    return Settings(frozenset(given), **({"ema": dialect.ema_first} | fields))  # type: ignore[arg-type]


_WANTED = {
    "flag": "true or false",
    "whole": "a positive whole number",
    "number": "a finite number",
    "eps": "0 or more",
}


def _kinds(dialect: Dialect) -> dict[str, tuple[str, str]]:
    """Field and kind of each setting of a dialect, by the user's name for it."""
    kinds = {}
    if not dialect.kv_pool_stored:
        kinds["kv_pool"] = ("kv_pool", "whole")
    if dialect.scale_setting:
        kinds[dialect.scale_setting] = ("use_scale", "flag")
    if not dialect.gamma_saved:
        kinds["gamma"] = ("gamma", "number")
    if any(form.spectral_norm and form.spectral_norm.sigma == "iterate" for form in dialect.kernels):
        kinds["sn_eps"] = ("sn_eps", "eps")
    if any(variant.batch_norm for variant in dialect.variants):
        kinds["bn_eps"] = ("bn_eps", "eps")
    if dialect.ema:
        kinds["ema"] = ("ema", "flag")
    return kinds


def _parse(value: str | Value, kind: str) -> Value | None:
    text = str(value).strip().lower()
    if kind == "flag":
        return {"true": True, "false": False}.get(text)
    try:
        number = float(text)
    except ValueError:
        return None
    if not abs(number) < float("inf") or isinstance(value, bool):
        return None
    if kind == "whole":
        return int(number) if number == int(number) and number > 0 else None
    return None if kind == "eps" and number < 0 else number
