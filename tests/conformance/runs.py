"""The few runs that the toy backends answer."""

from selfattn_core.conformance.cases.table import all_runs

ASKED = ("forward", "map", "vjp", "r1", "params")
FEW = [
    run
    for run in all_runs()
    if run.case.id.endswith(("-001", "-002")) and run.layout == "channels_last" and run.case.family in ASKED
]
