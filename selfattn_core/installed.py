"""The one message for a framework that is not installed."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["NotInstalledError", "imported", "missing_modules", "require"]


class NotInstalledError(ModuleNotFoundError):
    """A library that is needed and not installed; its message says what to type. Other modules that are missing are faults."""


def missing_modules(modules: Sequence[str]) -> list[str]:
    """Which of these top-level modules are not installed; nothing is imported.

    Example:
        >>> missing_modules(["json", "no_such_module"])
        ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def require(package: str, modules: Sequence[str], extra: str, *, otherwise: str = "") -> None:
    """Raise if a module is not installed; a module that is installed and broken speaks for itself.

    Args:
        package: the package of ours that needs them.
        modules: top-level modules.
        extra: the extra that installs them.
        otherwise: what else would help, after "or".

    Raises:
        NotInstalledError: a ModuleNotFoundError that says what to type.

    Example:
        >>> require("selfattn_torch", ["no_such_module"], "torch")
        Traceback (most recent call last):
        ...
        selfattn_core.installed.NotInstalledError: selfattn_torch needs no_such_module, which is not installed: pip install 'selfattn[torch]'
    """
    missing = missing_modules(modules)
    if missing:
        raise NotInstalledError(
            f"{package} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'selfattn[{extra}]'{f', or {otherwise}' if otherwise else ''}",
            name=missing[0],
        )


def imported(module: str) -> Any:
    """A module that is installed, by its name, so that nothing of ours imports a framework before it is needed.

    Args:
        module: its full name.

    Raises:
        ImportError: if it cannot be loaded, for whatever reason; a shared library that is missing or of another processor
            is an OSError to Python.

    Example:
        >>> imported("json").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except OSError as error:
        raise ImportError(str(error), name=module) from error
