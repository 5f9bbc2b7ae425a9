"""Every way in which the command writes a file, over one folder of inputs: for the table of targets and for the sweep."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfattn_core import SelfAttentionConfig, parameter_table, save


@dataclass(frozen=True)
class Writer:
    """One of them.

    Args:
        command: its arguments, with the target, and what replaces an existing one.
        suffix: of the target.
        forced: whether an existing target is only replaced when that is asked for.
        folder: whether the target is a folder.
        reads: the input that the target must not be.
    """

    command: Callable[[str], list[str]]
    suffix: str
    forced: bool = True
    folder: bool = False
    reads: str = "layer.safetensors"


def make_inputs(folder: Path, *, channels: int = 16) -> None:
    """A layer in three formats, features, a picture, a dialect and a report."""
    from PIL import Image

    config = SelfAttentionConfig(channels)
    generator = np.random.default_rng(5)
    params = {
        name: generator.standard_normal(row.shape).astype(np.float32)
        for name, row in parameter_table(config).items()
    }
    save(folder / "layer.safetensors", config, params)
    # Of which the identity is the function.
    save(folder / "new.safetensors", config, params | {"gamma": np.zeros(1, np.float32)})
    np.save(folder / "x.npy", generator.standard_normal((4, 5, channels)).astype(np.float32))
    Image.fromarray(generator.integers(0, 256, (20, 25, 3), dtype=np.uint8)).save(folder / "image.png")


def _port(dialect: str) -> Callable[[str], list[str]]:
    return lambda target: ["port", "layer.safetensors", target, "--to", dialect, "--force"]


def _attend(target: str) -> list[str]:
    return [
        *("attend", "layer.safetensors", "x.npy", "--image", "image.png", "--at", "3,4"),
        *("--out", target, "--force"),
    ]


def _conform(form: str) -> Callable[[str], list[str]]:
    return lambda target: ["conform", "torch", "--level", "core", f"--{form}", target]


WRITERS: Mapping[str, Writer] = {
    "port to canonical": Writer(_port("canonical"), ".safetensors"),
    "port to npz": Writer(_port("fgh"), ".npz"),
    "port to torch": Writer(_port("fgh"), ".pt"),
    "port to keras": Writer(_port("keras"), ".weights.h5"),
    "port to orbax": Writer(_port("flax"), "", folder=True),
    "port --json": Writer(
        lambda target: ["port", "layer.safetensors", "o.npz", "--to", "fgh", "--dry-run", "--json", target],
        ".json",
        forced=False,
    ),
    "inspect --json": Writer(
        lambda target: ["inspect", "layer.safetensors", "--json", target], ".json", forced=False
    ),
    **{
        f"verify --{form}": Writer(
            lambda target, form=form: [
                *("verify", "numpy:copy", "new.safetensors", "--layout", "channels_last", "--size", "3x4"),
                *(f"--{form}", target),
            ],
            f".{form}",
            forced=False,
            reads="new.safetensors",
        )
        for form in ("json", "html")
    },
    "attend": Writer(_attend, ".png", reads="image.png"),
    **{
        f"conform --{form}": Writer(_conform(form), f".{form}", forced=False, reads="")
        for form in ("json", "html", "junit", "markdown")
    },
}
