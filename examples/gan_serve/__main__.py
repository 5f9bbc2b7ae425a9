"""Export the averaged generator of a run as a SavedModel, load it in a process without selfattn, compare the images.

Run as `python -m examples.gan_serve`, after `python -m examples.sagan_torch` or another of the three. Exit codes: 0 the same
images, 1 different images, 2 there is no finished run, 3 something is not installed, 130 interrupted.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from examples.command import BAD_INPUT, FAILED, MISSING, run
from examples.gan import agreement, files
from selfattn_core.installed import missing_modules

_ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run the example and return the exit code."""
    arguments = _arguments()
    if missing := missing_modules(["keras", "tensorflow"]):
        print(f"This example needs {', '.join(missing)}: pip install 'selfattn[keras]'", file=sys.stderr)
        return MISSING
    folder: Path = arguments.folder
    if not (folder / files.ATTENTION).exists():
        print(
            f"There is no finished run in {folder}: run python -m examples.sagan_torch first.",
            file=sys.stderr,
        )
        return BAD_INPUT
    # Imported before all other modules that import Keras, because it selects TensorFlow, which SavedModels need.
    from examples import sagan_keras

    start = time.monotonic()
    wanted = files.load_samples(folder)
    if arguments.quick:
        wanted = files.Samples(*(values[::20] for values in vars(wanted).values()))
    model = sagan_keras.network_of(folder, "averaged")
    images = model.predict([wanted.latents, wanted.labels], verbose=0)
    in_keras = agreement.compare_images(images, wanted)
    print(f"1. The generator of {folder}, in Keras:\n   {in_keras}", flush=True)

    saved = folder / "served"
    model.export(saved, format="tf_saved_model", verbose=False)
    print(f"2. Exported to {saved}.", flush=True)

    served = _ask(saved, wanted, folder)
    in_service = agreement.compare_images(served, wanted)
    print(f"3. Loaded in a process with TensorFlow alone:\n   {in_service}", flush=True)
    if not (in_keras.agrees and in_service.agrees):
        print("FAILED: these are not the images of the run.", file=sys.stderr)
        return FAILED
    print(f"The same {len(served)} images from all three ({time.monotonic() - start:.0f} s).")
    return 0


def _ask(saved: Path, wanted: files.Samples, folder: Path) -> np.ndarray:
    """The images of the SavedModel, from a separate process."""
    request, answer = folder / "request.npz", folder / "answer.npy"
    np.savez(request, latents=wanted.latents, labels=wanted.labels)
    # Remove the answer of an earlier run, so that it cannot replace a missing answer.
    answer.unlink(missing_ok=True)
    paths = [str(path.resolve()) for path in (saved, request, answer)]
    subprocess.run([sys.executable, "-m", "examples.gan_serve.serve", *paths], cwd=_ROOT, check=True)
    return np.load(answer)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.gan_serve", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/sagan/torch"),
        help="folder of the run (default: %(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
