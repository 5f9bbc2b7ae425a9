"""The loop around the steps, the same in every framework: progress, samples, a film of the map, scalars, checkpoints."""

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
    """What a program's training can do; arrays are numpy's, and channels last."""

    step: int
    """How many steps were made."""

    def update(self, batch: Batch) -> dict[str, float]:
        """One step of each network; losses and gains before it."""

    def generate(self, latents: Array, labels: Array) -> Array:
        """Images (B, 8, 8, 1) of the averaged generator."""

    def attend(self, latents: Array, labels: Array) -> Array:
        """The map (B, 8, 8, 8, 8) that they are made with."""

    def gain(self) -> float:
        """The gamma of that map's layer."""

    def samples(self, latents: Array, labels: Array) -> files.Samples:
        """Images, and the discriminator's scores of them."""

    def save(self, folder: Path) -> None:
        """Write all that the next step depends on."""

    def load(self, folder: Path) -> None:
        """Go on where `save` was called."""

    def export(self, folder: Path) -> None:
        """Write the networks as files that every framework reads."""


def train(training: Training, options: argparse.Namespace) -> int:
    """Train from the first step or the last checkpoint; returns the exit code.

    Args:
        training: new, or with the networks of another run.
        options: from `program.arguments`.
    """
    began, folder = time.monotonic(), options.folder
    if options.start and not _moved(training, options.start):
        return FAILED
    if options.resume:
        training.load(folder)
    if options.overwrite:
        # Of the other files only the name counts; in these folders those of the old run would stay beside the new ones.
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    digits, _ = data.load()
    journal, watch = Journal(folder, training.step), Watch(folder, options.seed, training.step)

    def look() -> None:
        if watch.recorded(training.step):
            return  # the checkpoint that the run was resumed from
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
    """Whether the networks of another run answer as they did there."""
    wanted = files.load_samples(folder)
    difference = agreement.compare(training.samples(wanted.latents, wanted.labels), wanted)
    print(f"The networks of {folder}: {difference}", flush=True)
    return difference.agrees
