"""Images from the SavedModel, with TensorFlow alone: nothing of selfattn is imported.

Run as `python -m examples.gan_serve.serve SAVEDMODEL REQUEST ANSWER`; REQUEST is an .npz with `latents` (B, LATENT) and `labels`
(B,), ANSWER the .npy that is written with the images.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

__all__ = ["main"]


def main(saved: Path, request: Path, answer: Path) -> None:
    """Load, generate, write."""
    served = tf.saved_model.load(saved)
    with np.load(request) as archive:
        latents, labels = archive["latents"], archive["labels"]
    np.save(answer, served.serve([latents, labels]).numpy())
    ours = sorted(name for name in sys.modules if name.startswith("selfattn"))
    if ours:
        raise RuntimeError(f"serving was to need TensorFlow alone; {', '.join(ours)} was imported as well.")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
