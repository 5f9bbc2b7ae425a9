"""The bytes of a `.safetensors` file, with the library of that name as the judge."""

import io

import numpy as np
import pytest
import safetensors.numpy

from selfattn_core.files.safetensors import SafetensorsError, pieces, read_all, whole_file


def arrays():
    generator = np.random.default_rng(0)
    return {
        "b.half": generator.standard_normal(3).astype(np.float16),
        "a.double": generator.standard_normal((3, 5)),
        "scalar": np.ones((), np.float32),
        "é": np.zeros((0, 3), np.float32),
        "kernel": generator.standard_normal((2, 7)).astype(np.float32),
    }


@pytest.mark.parametrize("metadata", [None, {"source": 'é " \n /'}])
def test_the_library_writes_the_same_bytes(metadata):
    assert whole_file(arrays(), metadata) == safetensors.numpy.save(arrays(), metadata)


def test_the_library_reads_what_is_written_and_the_other_way_round():
    for back in (
        safetensors.numpy.load(b"".join(pieces(arrays(), {}))),
        read_all(io.BytesIO(safetensors.numpy.save(arrays())))[1],
    ):
        assert set(back) == set(arrays())
        for name, array in arrays().items():
            assert back[name].dtype == array.dtype
            assert back[name].shape == array.shape
            assert back[name].tobytes() == array.tobytes()


def test_memory_in_another_order_is_stored_as_it_reads():
    plain = {name: np.array(array.T, order="C") for name, array in arrays().items()}
    assert whole_file({name: array.T for name, array in arrays().items()}) == whole_file(plain)


def test_metadata_keep_their_order():
    """Equal weights are equal files."""
    fields = dict.fromkeys("dacb", "1")
    assert b'{"__metadata__":{"d":"1","a":"1","c":"1","b":"1"}' in whole_file(arrays(), fields)


def test_a_dtype_without_a_place():
    with pytest.raises(SafetensorsError, match=r"name: <U1 has no place in .safetensors; it has float64"):
        whole_file({"name": np.array(["a"])})
