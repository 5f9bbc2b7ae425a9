"""The whole test suite as processors with other instruction sets would run it: `make test-processors`.

MKL and oneDNN (of PyTorch and TensorFlow), ATen (PyTorch's own kernels) and XLA are different libraries, and none reads the
variables of another. So a row of `ROWS` sets one value of each at once: three runs of the suite instead of eight. Where
a row fails, its variables one by one tell which library it is; the command is printed.

    python -m tests.processors                                  every row, the whole suite
    python -m tests.processors baseline avx2                    these rows
    python -m tests.processors baseline -- tests/ops -k large   what follows -- goes to pytest, instead of the whole suite
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from selfattn_core.conformance.execution.environment import THREADS

__all__ = ["ROWS", "main", "settings"]

ROOT = Path(__file__).parents[1]
WHOLE_SUITE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
XLA = "--xla_cpu_max_isa="


class Row(NamedTuple):
    """What one run of the suite sets.

    Args:
        needs: the flag of the processor in /proc/cpuinfo without which the row would say nothing.
        variables: by name.
        threads: of each library.
    """

    needs: str
    variables: Mapping[str, str]
    threads: int


ROWS: Mapping[str, Row] = {
    # AVX is as narrow as XLA goes: with SSE4_2 jaxlib 0.10 has no function that converts float16 on Linux, and ends in an
    # error of LLVM (symbol __truncsfhf2 not found).
    "baseline": Row(
        "sse4_2",
        {
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "XLA_FLAGS": XLA + "AVX",
        },
        threads=1,
    ),
    "avx2": Row(
        "avx2",
        {
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "XLA_FLAGS": XLA + "AVX2",
        },
        threads=2,
    ),
    # ATen believes ATEN_CPU_CAPABILITY=avx512 also where the processor has no such instructions; it and the others take
    # the widest there is by themselves.
    "avx512": Row("avx512f", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, threads=2),
}


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def settings(row: Row, vendor: str) -> dict[str, str]:
    """The variables of a row on a processor of this vendor.

    MKL reads MKL_ENABLE_INSTRUCTIONS on Intel's processors alone. On others the narrowest row sets MKL_CBWR, which it
    reads on all; it would also overrule the former, so Intel's go without it.
    """
    found = {**row.variables, **dict.fromkeys(THREADS, str(row.threads))}
    if vendor != "GenuineIntel" and found["MKL_ENABLE_INSTRUCTIONS"] == "SSE4_2":
        found["MKL_CBWR"] = "COMPATIBLE"
    return found


def environment(chosen: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with the settings; flags of XLA are added to those that are there."""
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), chosen.get("XLA_FLAGS")]))
    return {**os.environ, **chosen, **({"XLA_FLAGS": flags} if flags else {})}


def asked(variables: Mapping[str, str]) -> dict[str, str]:
    """What the libraries say of themselves, and digests of what they compute; see `processor_report.py`."""
    command = [sys.executable, str(Path(__file__).with_name("processor_report.py"))]
    done = subprocess.run(command, env=dict(variables), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"The libraries do not start with these settings:\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    found: dict[str, str] = json.loads(lines[-1])
    # MKL and oneDNN write their lines past Python.
    found["MKL"] = next(
        (line.partition(" oneMKL ")[2] for line in lines if " oneMKL " in line), "says nothing"
    )
    isa = (
        line.rpartition("isa:")[2] for line in lines if line.startswith("onednn_verbose") and "isa:" in line
    )
    found["oneDNN"] = next(isa, "says nothing")
    return found


def run_row(name: str, row: Row, arguments: list[str], plain: Mapping[str, str]) -> bool:
    """Run the tests under one row, print what came of it, and say whether all passed."""
    chosen = settings(row, cpuinfo("vendor_id"))
    print(f"\n{name}: {' '.join(f'{key}={value}' for key, value in chosen.items())}")
    found = asked(environment(chosen))
    for library in ("ATen", "MKL", "oneDNN"):
        print(f"  {library}: {found[library]}")
    for framework in ("torch", "tensorflow", "jax"):
        bits = "the same bits as" if found[framework] == plain[framework] else "other bits than"
        print(f"  {framework} computes {bits} without the settings")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junit-xml={report}"]
        status = subprocess.run(command, cwd=ROOT, env=environment(chosen), check=False).returncode
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314 - our own file
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    print(
        f"{name}: {len(cases) - len(wrong) - skipped} passed, {len(wrong)} failed, {skipped} skipped; "
        f"pytest ended with {status}"
    )
    if wrong:
        print("To find the setting that does it, try each by itself:")
        for key, value in chosen.items():
            print(f"  {key}='{value}' {sys.executable} -m pytest -k '{wrong[0].get('name')}'")
    return status == 0


def main() -> int:
    """Run the rows; 1 if any test failed or a row could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; default: all")
    own, after = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, after = own[:at], own[at + 1 :]
    rows = parser.parse_args(own).rows or list(ROWS)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    flags = cpuinfo("flags").split()
    print(f"This processor: {cpuinfo('model name') or platform.machine()}")
    plain = asked(os.environ)
    passed = True
    for name in rows:
        if ROWS[name].needs in flags:
            passed &= run_row(name, ROWS[name], after or list(WHOLE_SUITE), plain)
        else:
            print(f"\n{name}: not on this processor, which has no {ROWS[name].needs}; not tested")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
