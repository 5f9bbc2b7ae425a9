"""What the examples share as programs."""

import argparse

import pytest

from examples.command import BAD_INPUT, FAILED, INTERRUPTED, MISSING, positive, run


def test_a_count_is_a_whole_number_of_at_least_one():
    assert [positive("1"), positive("30")] == [1, 30]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", ""])
def test_what_counts_nothing_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 1"):
        positive(text)


@pytest.mark.parametrize("code", [0, FAILED, BAD_INPUT, MISSING])
def test_the_process_ends_with_the_code_of_the_program(code):
    with pytest.raises(SystemExit) as ended:
        run(lambda: code)
    assert ended.value.code == code


def test_an_interrupt_has_a_code_of_its_own(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == INTERRUPTED == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
