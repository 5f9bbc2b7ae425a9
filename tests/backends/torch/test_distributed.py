"""A critic with a gradient penalty, trained by two processes: which ways of distributing it give the gradients of one."""

import pytest

from tests.backends.torch.ranks import answers


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    first, second = answers("distributed.py", 2, tmp_path_factory.mktemp("gloo") / "store")
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
