"""The `backends` command."""

import click

__all__ = ["backends"]


@click.command()
def backends() -> None:
    """List backends, their versions and devices.

    For a backend that is not installed, the list shows what to install.
    """
    from selfattn_core.conformance.backends import REGISTRY
    from selfattn_core.conformance.execution.visible_devices import devices_of
    from selfattn_core.installed import missing_modules

    installed = [each.framework for each in REGISTRY.values() if not missing_modules(each.requires)]
    seen = devices_of(list(dict.fromkeys(installed)))
    for name, registered in REGISTRY.items():
        missing = missing_modules(registered.requires)
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'selfattn[{registered.extra}]'"
        else:
            versions = ", ".join(f"{module} {_version(module)}" for module in registered.requires)
            state = f"{versions}; {seen[registered.framework]}"
        click.echo(f"{name:<17} {state}")


def _version(module: str) -> str:
    """The version of the distribution that contains a module, without importing the module."""
    import importlib.metadata

    distributions = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(distributions[0])
