"""Searching a backend by name, in its own process."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from selfattn_core.conformance.execution.devices import Device
from selfattn_core.conformance.execution.environment import environment
from selfattn_core.conformance.execution.runner import named, placed
from selfattn_core.conformance.results import BackendReport
from selfattn_core.conformance.search.explore import explore, replay
from selfattn_core.conformance.search.process import NotStartedError, Process
from selfattn_core.conformance.search.token import from_token
from selfattn_core.installed import missing_modules

__all__ = ["search_backend"]


def search_backend(
    name: str,
    *,
    seed: int = 0,
    seconds: float = 60.0,
    tokens: Sequence[str] = (),
    past: Iterable[str] = (),
    timeout: float = 120.0,
    device: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> BackendReport:
    """Search a backend for failures, or repeat what an earlier search found.

    Args:
        name: a name in `KNOWN`, or "module:object" for another backend.
        seed: the seed of the search.
        seconds: the time of the search.
        tokens: tokens to replay. With tokens nothing else is asked.
        past: tokens of past failures, which a search asks first.
        timeout: the seconds that one probe may take.
        device: the device to compute on, as for `run_backend`.
        tell: called with a line for each failure and each skipped token, and every ten seconds.

    Returns:
        A report without outcomes, with the results in `search`. A search that Ctrl-C or a signal stopped has those so far,
        and `exit_code` has what the signal asked for.

    Raises:
        ValueError: if the name has neither form, the framework cannot have the device, a token cannot be replayed, or the
            time is not a positive number of seconds.
        NotInstalledError: if hypothesis is not installed. A replay does not need it.
    """
    registered = named(name, device)
    for token in tokens:
        from_token(token)
    if missing := missing_modules(registered.requires):
        return BackendReport(name, missing=tuple(missing), extra=registered.extra)
    variables = placed(name, device, environment(registered.in_full))
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="selfattn-explore-") as folder,
        Process(registered.target, variables, Path(folder), timeout, device) as process,
    ):
        try:
            ready = process.start()
            found = (
                replay(process, tokens)
                if tokens
                else explore(process, seed=seed, seconds=seconds, past=past, tell=tell)
            )
        except NotStartedError as error:
            return BackendReport(name, error=str(error), refused=error.refused, absent=error.absent)
    return BackendReport(
        name,
        ready.versions,
        ready.abilities,
        tuple(ready.claims.layouts),
        tuple(ready.claims.dtypes),
        device=Device(ready.device["name"], ready.device["model"], ready.device["driver"]),
        seconds=time.monotonic() - began,
        search=found,
    )
