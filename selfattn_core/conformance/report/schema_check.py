"""Checking the report files that `selfattn conform --diff` reads, because somebody may have edited them.

Only the tests install jsonschema. Seventy lines here implement the part of JSON Schema that `schema.json` uses, so that
the schema stays the only description of a report.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from selfattn_core.conformance.report.document import schema

__all__ = ["report_problems"]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def report_problems(data: object) -> list[str]:
    """The places where data is not a valid report: values of a wrong type, missing names, and unknown words.

    Names that the schema does not list are allowed, because a later version may have written the report.

    Args:
        data: the content of a JSON file.

    Example:
        >>> report_problems({"schema": 1, "backends": 3})[-1]
        'backends: got 3, expected array'
    """
    whole = schema()
    problems = list(_problems(data, whole, whole["$defs"], ""))
    return problems or list(_loose_ends(data))


def _problems(data: Any, rule: Mapping[str, Any], rules: Mapping[str, Any], place: str) -> Iterator[str]:
    if "$ref" in rule:
        rule = rules[rule["$ref"].removeprefix("#/$defs/")]
    if "oneOf" in rule:
        if all(list(_problems(data, choice, rules, place)) for choice in rule["oneOf"]):
            yield f"{place}: got {_short(data)}, which fits no alternative of the schema"
        return
    types = rule.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is_of(data, name) for name in types):
        yield f"{place or 'the whole'}: got {_short(data)}, expected {' or '.join(types)}"
        return
    if "enum" in rule and data not in rule["enum"]:
        yield f"{place}: got {_short(data)}, expected one of {', '.join(rule['enum'])}"
    yield from (f"{_inside(place, name)}: missing" for name in rule.get("required", []) if name not in data)
    if isinstance(data, dict):
        further = rule.get("additionalProperties") or {}
        for name, value in data.items():
            inner = rule.get("properties", {}).get(name, further)
            yield from _problems(value, inner, rules, _inside(place, name))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _problems(value, rule.get("items", {}), rules, f"{place}[{index}]")


def _loose_ends(data: Any) -> Iterator[str]:
    """The names that a value refers to and the report does not define."""
    dtypes = {outcome["dtype"] for backend in data["backends"] for outcome in backend["outcomes"]}
    dtypes |= {
        outcome["label"]
        for backend in data["backends"]
        for outcome in backend["outcomes"]
        if "label" in outcome
    }
    yield from (f"factors.{dtype}: missing" for dtype in sorted(dtypes - set(data["factors"])))
    levels = {data["level"], *(backend["level"] for backend in data["backends"])} - {None}
    yield from (f"levels.{level}: missing" for level in sorted(levels - set(data["levels"])))


def _is_of(data: object, name: str) -> bool:
    """Whether a value has a JSON type. In JSON, True is not a number."""
    return isinstance(data, _TYPES[name]) and (name == "boolean" or not isinstance(data, bool))


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _short(data: object) -> str:
    words = repr(data)
    return words if len(words) <= 40 else f"{words[:39]}…"
