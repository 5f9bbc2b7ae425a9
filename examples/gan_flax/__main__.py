"""Continue the GAN training of `examples.gan_torch` in Flax, from its checkpoint.

Run as `python -m examples.gan_flax`, after `python -m examples.gan_torch`. Exit codes: 0 continued, 1 the networks or the
training are not what they were, 2 there is no checkpoint, 3 something is not installed, 130 interrupted.
"""

import argparse
import sys
import time
from pathlib import Path

from examples.command import BAD_INPUT, FAILED, MISSING, positive, run
from examples.digits import data
from examples.gan import files
from selfattn_core.installed import missing_modules

FULL_STEPS = 1000
QUICK_STEPS = 3
MOST_LOST = 0.1
"""Of the images recognised before; the training only goes on, so that it should not fall back."""


def main() -> int:
    """Run the example; returns the exit code."""
    arguments = _arguments()
    if missing := missing_modules(["jax", "flax", "optax", "sklearn", "tqdm", "PIL"]):
        print(
            f"This example needs {', '.join(missing)}: pip install 'selfattn[flax,viz]' scikit-learn tqdm",
            file=sys.stderr,
        )
        return MISSING
    folder, target = arguments.folder, arguments.folder / "flax"
    if not (folder / files.ATTENTION).exists():
        print(f"There is no checkpoint in {folder}: run python -m examples.gan_torch first.", file=sys.stderr)
        return BAD_INPUT
    from examples.gan import agreement, pictures, quality
    from examples.gan_flax import networks
    from examples.gan_flax.train import train

    start = time.monotonic()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else FULL_STEPS)
    training, held_out = data.load()
    generator, discriminator = networks.load(folder)
    wanted = files.load_samples(folder)

    print(f"1. The networks of {folder}, in Flax:", flush=True)
    moved = networks.answer(generator, discriminator, wanted.latents, wanted.labels)
    difference = agreement.compare(moved, wanted)
    print(f"   {difference}", flush=True)
    if not difference.agrees:
        print("FAILED: the networks are not those of the checkpoint.", file=sys.stderr)
        return FAILED

    latest, reached = moved, []

    def watch(_: int) -> str:
        nonlocal latest
        latest = networks.answer(generator, discriminator, wanted.latents, wanted.labels)
        reached.append(quality.measure(latest.images, wanted.labels, training, held_out))
        gains = [float(network.attention.gamma[0]) for network in (generator, discriminator)]
        return f"{reached[-1]}; gamma {gains[0]:+.3f} in the generator, {gains[1]:+.3f} in the discriminator"

    print(f"2. Train for {steps} steps more:", flush=True)
    train(
        generator,
        discriminator,
        training,
        steps=steps,
        seed=arguments.seed,
        watch=watch,
        every=max(1, steps // 5),
    )
    target.mkdir(exist_ok=True)
    networks.save(generator, discriminator, target, source=f"examples.gan_flax, {steps} steps more")
    files.save_samples(target, latest)
    pictures.save_sheet(target / "samples.png", latest.images)
    print(f"3. Written to {target}: samples.png, and the checkpoint ({time.monotonic() - start:.0f} s).")
    if not arguments.quick and reached[-1].recognised < reached[0].recognised - MOST_LOST:
        print(f"FAILED: the training fell back from {reached[0]} to {reached[-1]}.", file=sys.stderr)
        return FAILED
    print(
        f"\nNext:\n   python -m examples.gan_keras --folder {target}   serve this generator from a SavedModel"
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gan_flax", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, to see it run")
    parser.add_argument("--steps", type=positive, help=f"of the training (default: {FULL_STEPS})")
    parser.add_argument("--seed", type=int, default=1, help="of the training (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/gan"), help="with the checkpoint (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
