"""Every dialect against the mathematics of its original: the same numbers before anything is rounded."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from selfattn_core import spec
from selfattn_core.porting.blocks.bystanders import optimiser_keys
from selfattn_core.porting.blocks.keys import KeyIndex
from selfattn_core.porting.blocks.match import match, prefixes
from selfattn_core.porting.blocks.plan import plan
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.settings import settings_of
from selfattn_core.porting.translation.from_dialect import import_block
from tests.porting.originals import ORIGINALS, C


def infos(tensors):
    return {key: SimpleNamespace(shape=value.shape, dtype=str(value.dtype)) for key, value in tensors.items()}


def imported(original, read_by=None, **options):
    chosen = read_by or dialect(original.dialect)
    index = KeyIndex(original.tensors.keys() - optimiser_keys(original.tensors))
    prefix = original.prefix.replace(".", "/")
    settings = settings_of(chosen, original.settings)
    found = match(chosen, index, prefix, averaged=settings.ema)
    assert found.fits, (found.missing, found.unused)
    planned = plan(found, infos(original.tensors), settings)
    assert not planned.problems
    return import_block(planned, original.tensors.__getitem__, **options)


def error(original, read_by=None, **options):
    """The largest difference between the original and the spec, and the size of what attention adds."""
    result = imported(original, read_by, **options)
    x = np.random.Generator(np.random.PCG64(99)).standard_normal((2, C, 4, 6))
    local = {
        key.removeprefix(original.prefix): value
        for key, value in original.tensors.items()
        if key.startswith(original.prefix)
    }
    last = x.transpose(0, 2, 3, 1)
    if original.layout == "BCHW":
        want = original.forward(local, x).transpose(0, 2, 3, 1)
    else:
        want = original.forward(local, last)
    got = spec.forward(result.config, result.params, last)
    return np.abs(got - want).max(), np.abs(want - last).max()


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_spec_computes_what_the_original_does(name):
    difference, size = error(ORIGINALS[name]())
    assert size > 0.1
    assert difference < 1e-12 * max(1, size)


@pytest.mark.parametrize("name", ORIGINALS)
def test_it_is_found_whole_under_its_own_prefix(name):
    original = ORIGINALS[name]()
    found = prefixes(dialect(original.dialect), KeyIndex(original.tensors))
    assert found == [original.prefix.replace(".", "/")]


@pytest.mark.parametrize("name", ORIGINALS)
def test_query_and_key_exchanged_is_another_function(name):
    original = ORIGINALS[name]()
    right = dialect(original.dialect)
    swapped = tuple(
        replace(v, roles=v.roles | {"query": v.roles["key"], "key": v.roles["query"]}) for v in right.variants
    )
    try:
        difference, _ = error(original, replace(right, variants=swapped))
    except AssertionError:
        # mmcv and nonlocal with pooling: the names differ, so the file does not fit at all.
        assert "pooled" in name
        return
    assert difference > 1e-3


def test_every_dialect_that_is_not_refused_has_an_original():
    portable = {name for name in dialect_names() if not dialect(name).refused}
    assert {build().dialect for build in ORIGINALS.values()} == portable
