"""The whole suite under other instruction sets and numbers of threads: `make test-processors`.

A test whose limit holds by luck of one processor fails on another. Libraries choose their instructions by the processor, and
each can be told to use older ones: MKL and ATen under PyTorch, oneDNN under PyTorch and TensorFlow, XLA under JAX. They do
not look at each other's variables, so that one run of the suite sets a value for all of them: two or three runs instead of
nine. Where one fails, the variables of its row are tried one by one on the tests that failed.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROWS", "Row", "closing_counts", "missing_flags", "narrowing"]

ROOT = Path(__file__).parents[1]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


@dataclass(frozen=True)
class Row:
    """One run of the suite.

    Args:
        instructions: by variable, what each library may use at most.
        threads: of each library.
        needs: flags of the processor without which this row would say nothing new.
    """

    instructions: Mapping[str, str]
    threads: int
    needs: frozenset[str] = frozenset()

    @property
    def variables(self) -> dict[str, str]:
        """What stands in the environment."""
        return {**self.instructions, **dict.fromkeys(_THREADS, str(self.threads))}


ROWS: Mapping[str, Row] = {
    "sse4": Row(
        {
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
        },
        threads=1,
    ),
    "avx2": Row(
        {
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        },
        threads=2,
        needs=frozenset({"avx2"}),
    ),
    "avx512": Row(
        {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ATEN_CPU_CAPABILITY": "avx512"},
        threads=2,
        needs=frozenset({"avx512f"}),
    ),
}


def missing_flags(row: Row, cpuinfo: str) -> list[str]:
    """What a row needs and a processor has not.

    Args:
        row: of `ROWS`.
        cpuinfo: as `/proc/cpuinfo` has it.

    Example:
        >>> missing_flags(ROWS["avx512"], "flags : fpu sse2 avx2")
        ['avx512f']
    """
    flags = {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}
    return sorted(row.needs - flags)


def closing_counts(output: str) -> str:
    r"""The last word of pytest, or that there is none.

    Args:
        output: of pytest.

    Example:
        >>> closing_counts("...\n===== 1 failed, 2935 passed in 700.00s (0:11:40) =====\n")
        '1 failed, 2935 passed in 700.00s (0:11:40)'
    """
    found = re.findall(r"^=* ?(\d+ (?:passed|failed|error).*?) ?=*$", output, flags=re.MULTILINE)
    return found[-1] if found else "it did not come to its end"


def narrowing(row: Row, output: str) -> list[str]:
    r"""Commands that tell which variable makes a test fail, one for each variable.

    Args:
        row: that failed.
        output: of pytest.

    Example:
        >>> narrowing(Row({"ATEN_CPU_CAPABILITY": "default"}, 1), "FAILED tests/x.py::test[1] - assert 1 == 2\n")[0]
        "ATEN_CPU_CAPABILITY=default python -m pytest 'tests/x.py::test[1]'"
    """
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)
    tests = " ".join(f"'{name}'" for name in failed)
    return (
        [f"{name}={value} python -m pytest {tests}" for name, value in row.variables.items()]
        if failed
        else []
    )


def _run(name: str, row: Row, arguments: Sequence[str]) -> bool:
    """Run the suite; whether all passed."""
    environment = os.environ | row.variables
    print(f"{name}: {' '.join(f'{key}={value}' for key, value in row.variables.items())}", flush=True)
    asked = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    told = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=False
    )
    print(f"  ATen says it uses: {told.stdout.strip() or told.stderr.strip()[-200:]}", flush=True)
    suite = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *suite],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:])
        print("\n".join(["  which variable is it?", *(f"  {line}" for line in narrowing(row, done.stdout))]))
    print(f"  {closing_counts(done.stdout)}", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", action="append", choices=list(ROWS), help="by default all; may be repeated")
    parser.add_argument("tests", nargs="*", help="for pytest; by default the whole suite")
    asked = parser.parse_args()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, flags=re.MULTILINE)
    print(f"processor: {model[1] if model else 'unknown'}")
    passed = []
    for name in asked.row or ROWS:
        missing = missing_flags(ROWS[name], cpuinfo)
        if missing:
            print(f"{name}: not tried, this processor has no {', '.join(missing)}", flush=True)
        else:
            passed.append(_run(name, ROWS[name], asked.tests))
    if not passed:
        print("nothing was tried")
        return 1
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
