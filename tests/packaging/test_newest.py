"""What `make test-newest` says of a run: nothing is left out, and only what the index lacks is excused."""

import pytest

from selfattn_core.cli.exit_codes import CHECK_FAILED, MISSING
from selfattn_core.conformance import REGISTRY
from tests.packaging import newest

OFFERED = {"torch": ["2.15.0"], "jax": ["0.12.0"], "flax": ["0.12.12"], "keras": ["3.15.1"], "tensorflow": []}
USABLE = {name: newest.usable(name, versions, "linux") for name, versions in OFFERED.items()}


def backend(name, statuses=(), missing=(), versions=()):
    outcomes = [{"status": status} for status in statuses]
    level = "deploy" if outcomes else None
    return {
        "name": name,
        "missing": [*missing],
        "versions": dict(versions),
        "outcomes": outcomes,
        "level": level,
    }


def report(*backends):
    versions = {"python": "3.13.0", "numpy": "2.5.5", "machine": "x86_64"}
    return {"created": "2026-11-28T10:00:00+00:00", "versions": versions, "backends": backends}


FLAX = backend("flax-nnx", ["pass", "pass", "fail"], versions={"jax": "0.11.0", "flax": "0.12.12"})
TORCH = backend("torch", missing=["torch"])
TENSORFLOW = backend("keras-tensorflow", missing=["tensorflow"])


def test_the_plain_builds_of_torch_for_linux_are_not_taken():
    assert newest.usable("torch", ["2.15.0", "2.14.1+cpu", "2.14.1"], "linux") == "2.14.1+cpu"
    assert newest.usable("torch", ["2.15.0", "2.15.0+cu130"], "linux") == ""
    assert newest.usable("torch", ["2.15.0"], "darwin") == "2.15.0"
    assert newest.usable("jax", ["0.12.0", "0.11.0"], "linux") == "0.12.0"


def test_the_table_names_what_was_tried_what_was_not_and_what_is_newer():
    rows = newest.table(report(FLAX, TORCH, TENSORFLOW), OFFERED, USABLE).splitlines()
    assert rows[0] == "Python 3.13.0, numpy 2.5.5, x86_64, 2026-11-28:"
    assert rows[4:] == [
        "| `flax-nnx` | jax 0.11.0 (0.12.0 is out), flax 0.12.12 | deploy | 2 pass, 1 fail |",
        "| `torch` | not tried: no build of torch for the CPU alone on the package index, where 2.15.0 is the newest | – | – |",
        "| `keras-tensorflow` | not tried: no build of tensorflow for this Python on the package index | – | – |",
    ]


@pytest.mark.parametrize(
    ("code", "backends", "want"),
    [
        (0, [FLAX], 0),
        (MISSING, [FLAX, TORCH], 0),
        (CHECK_FAILED, [FLAX, TORCH], CHECK_FAILED),
        # Nothing was tried, and so nothing passed.
        (MISSING, [TORCH], MISSING),
        # The index has it, so it should have been installed.
        (MISSING, [FLAX, backend("keras-jax", missing=["jax"])], MISSING),
    ],
)
def test_only_what_the_index_lacks_is_excused(code, backends, want):
    assert newest.exit_code(code, report(*backends), USABLE, MISSING) == want


def test_the_table_goes_between_its_marks():
    page = f"a\n{newest.START}\nold\n{newest.END}\nb\n"
    assert newest.in_page(page, "new") == f"a\n{newest.START}\nnew\n{newest.END}\nb\n"
    with pytest.raises(ValueError, match="expected <!-- newest -->"):
        newest.in_page("a", "new")


def test_the_page_has_a_row_for_every_backend():
    page = newest.PAGE.read_text(encoding="utf-8")
    assert all(f"\n| `{name}` | " in page for name in REGISTRY)
