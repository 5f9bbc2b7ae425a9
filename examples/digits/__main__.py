"""Train a digit classifier with one self-attention layer in PyTorch, run it in Keras and Flax, compare the logits.

Run as `python -m examples.digits`. Exit codes: 0 all frameworks agree, 1 a framework disagrees or the training fell short,
3 something is not installed, 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from examples.command import FAILED, MISSING, positive, run
from examples.digits import data, files, numpy_model
from examples.digits.compare import Row, compare, expect, table
from examples.digits.frameworks import PROGRAMS, ask
from examples.digits.picture import draw
from selfattn_core.conformance.verdicts.tolerance import FACTOR, Expectation
from selfattn_core.installed import missing_modules

LEAST_ACCURACY = 0.95
LEAST_GAMMA = 0.1


def main() -> int:
    """Run the example and return the exit code."""
    arguments = _arguments()
    if missing := missing_modules(["torch", "safetensors", "sklearn", "tqdm", "matplotlib"]):
        print(
            f"This example needs {', '.join(missing)}: pip install 'selfattn[torch,viz]' safetensors scikit-learn tqdm",
            file=sys.stderr,
        )
        return MISSING
    start = time.monotonic()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    training, held_out = data.load()
    say(f"1. Real scans of digits, 8×8: {len(training)} to train on, {len(held_out)} held out.")

    say("2. Train in PyTorch: conv, conv, SelfAttention2d (gamma starts at 0), max, dense.")
    _train(training, arguments, folder)
    np.save(folder / files.IMAGES, held_out.images)
    model = numpy_model.load(folder)
    expectation = expect(model, held_out.images)
    gamma = float(model.gamma[0])
    reached = data.accuracy(expectation.want, held_out.labels)
    without = data.accuracy(model.without_attention()(held_out.images), held_out.labels)
    say(
        f"   Held-out accuracy {reached:.1%}, gamma {gamma:+.3f}; with gamma put back to 0 it is {without:.1%}."
    )
    if reached <= LEAST_ACCURACY or abs(gamma) < LEAST_GAMMA:
        print(
            f"FAILED: the training fell short. Expected more than {LEAST_ACCURACY:.0%} held-out accuracy and a gamma of "
            f"at least ±{LEAST_GAMMA}; got {reached:.1%} and {gamma:+.3f} after {arguments.epochs} epochs.",
            file=sys.stderr,
        )
        return FAILED

    say(f"3. The weights are files now: {files.ATTENTION} (canonical) and {files.NETWORK_FILE}, in {folder}.")

    say("4. Each framework reads them and scores the held-out images in its own process:")
    rows = _score(folder, expectation, held_out)
    say(f"\n{table(rows, expectation, held_out)}\n")
    say(
        f"Noise floor of float32: {expectation.floor:.1e}, allowed: {FACTOR:g} of them. Trained gamma: {gamma:+.4f}."
    )
    draw(model, held_out, folder / files.PICTURE)
    say(f"5. What three points of three held-out digits attend to: {folder / files.PICTURE}\n")
    return _conclude(rows, time.monotonic() - start)


def say(line: str) -> None:
    """Print without buffering, also into a pipe."""
    print(line, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--epochs", type=positive, default=10, help="epochs of the training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/digits"),
        help="folder for the files (default: %(default)s)",
    )
    return parser.parse_args()


def _train(training: data.Digits, arguments: argparse.Namespace, folder: Path) -> None:
    """Train and write the weights. torch is imported here, so that the first steps show at once."""
    from examples.digits import torch_model
    from examples.digits.train import train

    model = train(training, epochs=arguments.epochs, seed=arguments.seed)
    torch_model.save(model, folder, source=f"examples.digits, seed {arguments.seed}")


def _score(folder: Path, expectation: Expectation, held_out: data.Digits) -> list[Row]:
    """Run one framework after the other. Each line of output starts before the framework answers."""
    rows = []
    for framework in PROGRAMS:
        print(f"   {framework:<18}", end="", flush=True)
        begun = time.monotonic()
        row = compare(ask(framework, folder), expectation, held_out)
        rows.append(row)
        say(f"{time.monotonic() - begun:5.1f} s{'   no usable answer' if row.accuracy is None else ''}")
    return rows


def _conclude(rows: list[Row], seconds: float) -> int:
    """Print the last lines and return the exit code."""
    wrong = [row.framework for row in rows if row.problem and not row.missing]
    absent = [row.framework for row in rows if row.missing]
    if wrong or absent:
        parts = [f"{', '.join(wrong)} did not agree"] if wrong else []
        parts += [f"{', '.join(absent)} could not be asked"] if absent else []
        print(f"FAILED: {'; '.join(parts)}.", file=sys.stderr)
        return FAILED if wrong else MISSING
    worst = max(row.ratio for row in rows)
    say(f"Same numbers everywhere: the worst difference is {worst:.1f} × the noise floor ({seconds:.0f} s).")
    say("\nNext:")
    for command, purpose in (
        (f"{_program('selfattn')} conform", "every backend against the definition, with derivatives"),
        ("make test", "all tests"),
        (f"{_program('python')} -m examples.digits --seed 1", "another training, the same agreement"),
    ):
        say(f"   {command:<46}{purpose}")
    return 0


def _program(name: str) -> str:
    """The command for a program of this Python's environment."""
    programs = Path(sys.executable).parent
    return str((programs / name).relative_to(Path.cwd())) if programs.is_relative_to(Path.cwd()) else name


if __name__ == "__main__":
    run(main)
