"""A few damaged files for each reader; `make fuzz` reads twenty thousand."""

import pytest

from tests.porting.formats import fuzz


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files(samples, reader, tmp_path):
    sample = samples / fuzz.READERS[reader]
    fuzz.prepare(sample, tmp_path)
    outcomes = {fuzz.one(reader, sample, tmp_path, 1, number) for number in range(40)}
    assert "refused" in outcomes
    assert outcomes <= {"read", "refused"}
