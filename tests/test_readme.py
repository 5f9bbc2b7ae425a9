"""The code blocks of the README are run as a reader would run them, one process a block."""

import re
from pathlib import Path

import click
import pytest

from selfattn_core.cli import main
from tests.documents import blocks_of, failures

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(block.title, block.code) for block in blocks_of(ROOT / "README.md") if block.language == "python"]


@pytest.mark.parametrize(
    "backend",
    [
        "jax",
        pytest.param("tensorflow", marks=pytest.mark.slow),
        pytest.param("torch", marks=pytest.mark.slow),
    ],
)
def test_the_keras_block(backend):
    assert not failures([block for block in BLOCKS if block[0] == "keras"], KERAS_BACKEND=backend)


@pytest.mark.parametrize(
    ("label", "code"), [block for block in BLOCKS if block[0] != "keras"], ids=lambda text: text[:11]
)
def test_the_other_blocks(label, code):
    assert not failures([(label, code)])


def test_every_framework_has_a_block():
    assert {label for label, _ in BLOCKS} == {"torch", "keras", "flax"}


def test_it_fits_on_two_screens():
    assert len(README.splitlines()) <= 100


def test_every_command_and_option_of_the_table_exists():
    commands = [line.split() for line in re.findall(r"`(selfattn [^`]+)`", README)]
    assert {words[1] for words in commands} >= {"inspect", "port", "conform", "verify", "attend"}
    for words in commands:
        command = main.get_command(click.Context(main), words[1])
        assert command is not None, words
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words


def test_the_targets_of_the_makefile_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"`make ([a-z]+)`", text)) | set(re.findall(r"^make ([a-z]+)", text, re.M))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.M))
