"""Runs the checks of `keras_checks` on each Keras backend, in processes of their own: Keras fixes its backend at import."""

import pytest

from tests.backends.test_keras import ROOT, python

CHECKS = ROOT / "tests" / "porting" / "keras_checks"


# What is refused is the same on each of them, but for what a layer computes.
@pytest.mark.parametrize(
    ("backend", "files"),
    [
        pytest.param("tensorflow", ["check_convert.py"], marks=pytest.mark.slow),
        pytest.param("jax", ["check_convert.py"], marks=pytest.mark.slow),
        ("torch", ["check_convert.py", "check_convert_refusals.py"]),
    ],
)
def test_convert(backend, files):
    done = python("-m", "pytest", "-q", *(str(CHECKS / file) for file in files), KERAS_BACKEND=backend)
    print(done.stdout)  # noqa: T201 - pytest shows it where the test fails
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
