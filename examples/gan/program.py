"""Options, folders and exit codes of the three SAGAN programs."""

import argparse
import sys
from pathlib import Path

from examples.command import BAD_INPUT, FAILED, MISSING, positive
from examples.gan.files import ATTENTION
from examples.gan.journal import HISTORY
from examples.gan.quality import Quality

__all__ = ["arguments", "conclude", "missing", "refusal"]

QUICK_STEPS = 6
LEAST_RECOGNISED = 0.97


def arguments(framework: str, description: str, *, steps: int) -> argparse.Namespace:
    """The options of a program.

    Args:
        framework: framework in the name of the program.
        description: text for `--help`.
        steps: number of steps of a whole training.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.sagan_{framework}", description=description)
    parser.add_argument("--quick", action="store_true", help=f"train for {QUICK_STEPS} steps, as a quick try")
    parser.add_argument("--steps", type=positive, help=f"last step of the training (default: {steps})")
    parser.add_argument(
        "--every", type=positive, help="steps from one sample and checkpoint to the next (default: a tenth)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=["bfloat16", "float32"],
        default="float32",
        help="precision of convolutions and matrix products; bfloat16 is slower on processors without such instructions "
        "(default: %(default)s)",
    )
    if framework == "torch":
        parser.add_argument(
            "--compiler",
            choices=["inductor", "aot_eager", "none"],
            default="none",
            help="compiler of the losses; inductor needs a C++ compiler and minutes, which such small networks do not repay "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--device",
            default="cpu",
            help="device to train on, as torch names it, such as cuda:1 (default: %(default)s)",
        )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/sagan") / framework,
        help="folder of the run (default: %(default)s)",
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="continue the run in the folder")
    begin.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument(
        "--start",
        type=Path,
        help="start with the networks of a finished run in this folder, from any framework",
    )
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else steps)
    options.every = options.every or max(1, options.steps // 10)
    return options


def missing(error: ModuleNotFoundError, extra: str) -> int:
    """Print which package is missing and how to install it, and return the exit code.

    Args:
        error: the error of the import.
        extra: the extra of selfattn that installs the framework.
    """
    command = f"pip install 'selfattn[{extra},viz]' safetensors scikit-learn tqdm"
    print(f"This example needs {error.name}: {command}", file=sys.stderr)
    return MISSING


def refusal(options: argparse.Namespace) -> int:
    """Check the options before the training begins, and print every problem. Returns 0 or the exit code.

    A run of hours must not fail at its end because its target exists.
    """
    problems = []
    begun = (options.folder / HISTORY).exists()
    if begun and not (options.resume or options.overwrite):
        problems.append(
            f"{options.folder} holds a run: pass --resume to continue it, --overwrite to replace it, or another --folder."
        )
    if options.resume and not begun:
        problems.append(f"{options.folder} holds no run that could be resumed.")
    if options.resume and options.start:
        problems.append("--start is for the beginning of a run, not for --resume.")
    if options.start and not (options.start / ATTENTION).exists():
        problems.append(
            f"--start: there is no finished run in {options.start}: run python -m examples.sagan_torch first."
        )
    if options.folder.exists() and not options.folder.is_dir():
        problems.append(f"{options.folder} is a file; expected a folder.")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return BAD_INPUT
    options.folder.mkdir(parents=True, exist_ok=True)
    return 0


def conclude(options: argparse.Namespace, quality: Quality) -> int:
    """The exit code of a finished training."""
    if not options.quick and quality.recognised < LEAST_RECOGNISED:
        print(
            f"FAILED: the training fell short. Expected at least {LEAST_RECOGNISED:.0%} of the images to be recognised; "
            f"got: {quality}.",
            file=sys.stderr,
        )
        return FAILED
    return 0
