"""The examples in the docstrings of every module are run."""

import doctest
import importlib
import pkgutil

import pytest

import selfattn_keras

MODULES = [
    "selfattn_keras",
    *(module.name for module in pkgutil.walk_packages(selfattn_keras.__path__, "selfattn_keras.")),
]
WITH_EXAMPLES = {"selfattn_keras.layer", "selfattn_keras.weights"}


# A warning is an error to the other tests, but not to a reader who runs an example.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


def test_no_module_was_overlooked():
    assert set(MODULES) >= WITH_EXAMPLES
