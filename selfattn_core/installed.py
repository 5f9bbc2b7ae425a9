"""The error for a framework that is not installed, and imports of installed modules by name."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["NotInstalledError", "imported", "missing_modules", "require"]


class NotInstalledError(ModuleNotFoundError):
    """A library that is needed and not installed; its message says what to type. Other modules that are missing are faults."""


def missing_modules(modules: Sequence[str]) -> list[str]:
    """The top-level modules among these that are not installed. Nothing is imported.

    Example:
        >>> missing_modules(["json", "no_such_module"])
        ['no_such_module']
    """
    return [module for module in modules if find_spec(module) is None]


def require(package: str, modules: Sequence[str], extra: str, *, otherwise: str = "") -> None:
    """Raise an error if a module is not installed. A broken module raises its own error when it is imported.

    Args:
        package: our package that needs the modules.
        modules: top-level modules.
        extra: the extra that installs them.
        otherwise: another remedy, which follows "or" in the message.

    Raises:
        NotInstalledError: if a module is missing. The message contains the command to type. It is a ModuleNotFoundError.

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
    """Import an installed module by its name, so that a framework is imported only when it is needed.

    Args:
        module: full name of the module.

    Raises:
        ImportError: if it cannot be loaded for any reason. This includes Python's OSError for a shared library that is
            missing or made for another processor.

    Example:
        >>> imported("json").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except OSError as error:
        raise ImportError(str(error), name=module) from error
