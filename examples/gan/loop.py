"""The training loop of every framework: progress, samples, an animation of the map, scalars and checkpoints."""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray
from tqdm import tqdm

from examples.command import FAILED
from examples.digits import data
from examples.gan import agreement, files, program
from examples.gan.batches import Batch, draw
from examples.gan.journal import Journal
from examples.gan.watch import Watch

__all__ = ["Training", "train"]

Array = NDArray[Any]


class Training(Protocol):
    """The interface of a program's training. Arrays are numpy arrays with channels last."""

    step: int
    """The number of completed steps."""

    def update(self, batch: Batch) -> dict[str, float]:
        """Make one step of each network, and return the losses and gains before it."""

    def generate(self, latents: Array, labels: Array) -> Array:
        """Images (B, 8, 8, 1) of the averaged generator."""

    def attend(self, latents: Array, labels: Array) -> Array:
        """The map (B, 8, 8, 8, 8) for these images."""

    def gain(self) -> float:
        """The gamma of that map's layer."""

    def samples(self, latents: Array, labels: Array) -> files.Samples:
        """Images and the discriminator's scores of them."""

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on."""

    def load(self, folder: Path) -> None:
        """Continue from the last call of `save`."""

    def export(self, folder: Path) -> None:
        """Write the networks as files that every framework reads."""


def train(training: Training, options: argparse.Namespace) -> int:
    """Train from the first step or the last checkpoint, and return the exit code.

    Args:
        training: a new training, or one with the networks of another run.
        options: options from `program.arguments`.
    """
    began, folder = time.monotonic(), options.folder
    if options.start and not _moved(training, options.start):
        return FAILED
    if options.resume:
        training.load(folder)
    if options.overwrite:
        # The other files are replaced by name. In these folders, files of the old run would remain beside the new ones.
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    digits, _ = data.load()
    journal, watch = Journal(folder, training.step), Watch(folder, options.seed, training.step)

    def look() -> None:
        if watch.recorded(training.step):
            return  # this is the checkpoint from which the run was resumed
        quality = watch.record(training.step, training.generate, training.attend, training.gain())
        bar.write(f"   step {training.step:5}: {quality}; gamma {training.gain():+.3f}", file=sys.stdout)
        sys.stdout.flush()
        journal.write()
        training.save(folder)

    with tqdm(
        initial=training.step, total=options.steps, unit="step", disable=not sys.stderr.isatty()
    ) as bar:
        while training.step < options.steps:
            if training.step % options.every == 0:
                look()
            journal.add(training.step, training.update(draw(digits, options.seed, training.step)))
            bar.update()
        look()
    watch.save_film()
    training.export(folder)
    files.save_samples(folder, training.samples(watch.latents, watch.labels))
    print(f"{watch.quality}. Written to {folder} ({time.monotonic() - began:.0f} s).")
    return program.conclude(options, watch.quality)


def _moved(training: Training, folder: Path) -> bool:
    """Whether the networks of another run give the same outputs as there."""
    wanted = files.load_samples(folder)
    difference = agreement.compare(training.samples(wanted.latents, wanted.labels), wanted)
    print(f"The networks of {folder}: {difference}", flush=True)
    return difference.agrees
