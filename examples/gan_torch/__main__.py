"""Train a small SAGAN on real digits in PyTorch; write its samples, its attention and a checkpoint.

Run as `python -m examples.gan_torch`. Exit codes: 0 trained, 1 the training fell short, 3 something is not installed, 130
interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

from examples.command import FAILED, MISSING, positive, run
from examples.digits import data
from selfattn_core.installed import missing_modules

FULL_STEPS = 3000
QUICK_STEPS = 20
FRAMES, QUICK_FRAMES = 15, 4
LEAST_RECOGNISED = 0.8


def main() -> int:
    """Run the example; returns the exit code."""
    arguments = _arguments()
    if missing := missing_modules(["torch", "sklearn", "tqdm", "matplotlib"]):
        print(
            f"This example needs {', '.join(missing)}: pip install 'selfattn[torch,viz]' scikit-learn tqdm",
            file=sys.stderr,
        )
        return MISSING
    import torch

    from examples.gan import files, pictures
    from examples.gan_torch import checkpoint
    from examples.gan_torch.networks import Discriminator, Generator
    from examples.gan_torch.train import train
    from examples.gan_torch.watch import Watch

    start = time.monotonic()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else FULL_STEPS)
    training, held_out = data.load()
    print(f"1. {len(training)} real scans of digits, 8×8.", flush=True)

    # Images this small gain nothing from a second thread, and one thread adds in the same order on every machine.
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    generator, discriminator = Generator(), Discriminator()
    watch = Watch(generator, discriminator, training, held_out, arguments.seed)
    print(
        f"2. Train for {steps} steps: hinge loss, R1, spectral norm; gamma of both layers starts at 0.",
        flush=True,
    )
    frames = QUICK_FRAMES if arguments.quick else FRAMES
    train(generator, discriminator, training, steps=steps, watch=watch, every=max(1, steps // frames))

    pictures.save_sheet(folder / "samples.png", watch.samples.images)
    pictures.save_map_animation(folder / "attention.gif", watch.snapshots)
    checkpoint.save(
        generator, discriminator, folder, source=f"examples.gan_torch, seed {arguments.seed}, step {steps}"
    )
    files.save_samples(folder, watch.samples)
    print(
        f"3. Written to {folder}: samples.png, attention.gif, and the checkpoint ({time.monotonic() - start:.0f} s)."
    )
    if not arguments.quick and watch.quality.recognised < LEAST_RECOGNISED:
        print(
            f"FAILED: the training fell short. Expected at least {LEAST_RECOGNISED:.0%} of the images to be recognised; "
            f"got: {watch.quality}.",
            file=sys.stderr,
        )
        return FAILED
    print("\nNext:\n   python -m examples.gan_flax    continue this training in Flax")
    print("   python -m examples.gan_keras   serve the generator from a SavedModel")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gan_torch", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, to see it run")
    parser.add_argument("--steps", type=positive, help=f"of the training (default: {FULL_STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/gan"), help="for the files (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
