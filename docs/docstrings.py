"""A griffe extension for two conventions of the sources that its parser does not know."""

import re
from typing import Any

from griffe import Attribute, Class, Extension, Function, Object, Parameter, ParameterKind, Parameters


class Sources(Extension):
    """Shows examples as code, and the fields of a Linen module as its arguments."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Name the section of examples as griffe does."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Give a Linen module the constructor that flax gives it."""
        if "nn.Module" not in map(str, cls.bases) or "linen" not in cls.canonical_path:
            return
        kind = ParameterKind.positional_or_keyword
        parameters = [Parameter("self", kind=kind)]
        for field in cls.members.values():
            if not isinstance(field, Attribute) or field.annotation is None:
                continue
            if field.name == "_":
                kind = ParameterKind.keyword_only
            else:
                parameters.append(
                    Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value)
                )
        cls.set_member("__init__", Function("__init__", parameters=Parameters(*parameters)))
