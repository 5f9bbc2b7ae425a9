"""Images from the SavedModel, with TensorFlow alone. Nothing from selfattn is imported.

Run as `python -m examples.gan_serve.serve SAVEDMODEL REQUEST ANSWER`. REQUEST is an .npz file with `latents` (B, LATENT) and
`labels` (B,). The images are written to the .npy file ANSWER.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

__all__ = ["main"]


def main(saved: Path, request: Path, answer: Path) -> None:
    """Load the SavedModel, generate images and write them."""
    served = tf.saved_model.load(saved)
    with np.load(request) as archive:
        latents, labels = archive["latents"], archive["labels"]
    np.save(answer, served.serve([latents, labels]).numpy())
    ours = sorted(name for name in sys.modules if name.startswith("selfattn"))
    if ours:
        raise RuntimeError(f"serving should need TensorFlow alone, but {', '.join(ours)} was imported too.")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
