"""Runs the checks of `device_checks` in a process that has eight devices: JAX fixes their number when it starts."""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).parent / "device_checks"


def test_on_eight_devices():
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *map(str, sorted(CHECKS.glob("check_*.py")))],
        cwd=Path(__file__).parents[3],
        env=os.environ
        | {
            "PYTHONPATH": path,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(done.stdout)  # noqa: T201 - pytest shows it where the test fails
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
