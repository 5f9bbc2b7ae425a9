"""A critic with a gradient penalty, trained by two processes: which ways of distributing it give the gradients of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "programs" / "distributed.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), str(rank), str(store)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "".join(error[-3000:] for _, error in done)
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in done)
    assert first == second
    return first


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("kind", ["", ", in blocks", ", spectral norm"])
def test_gradients_are_those_of_one_process(results, way, kind):
    # float64: the order of sums is the only difference.
    assert results[way + kind] < 1e-13


# Where torch can do it one day, these fail, and the guide may promise more.
def test_a_penalty_outside_the_sharded_root_raises(results):
    assert results["penalty outside"].startswith("RuntimeError")


def test_a_penalty_across_groups_of_shards_raises_or_loses_gradients(results):
    assert results["nested groups"].startswith("RuntimeError")
    assert results["nested groups, kept"].endswith("parameters without a gradient")


def test_shards_are_not_exported(results):
    assert "with these problems: the parameters are sharded" in results["export of shards"]
