"""The networks as files that every framework can read; see `examples.gan.files`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import selfattn_torch
from examples.gan import files
from examples.gan_torch.networks import Discriminator, Generator
from selfattn_core import save_blocks

__all__ = ["answer", "load", "save"]

Array = NDArray[Any]


def save(generator: Generator, discriminator: Discriminator, folder: Path, *, source: str) -> None:
    """Write the networks, replacing those of an earlier run."""
    networks = dict(zip(files.BLOCKS, (generator, discriminator), strict=True))
    blocks = {
        name: (network.attention.config, selfattn_torch.to_canonical(network.attention))
        for name, network in networks.items()
    }
    save_blocks(folder / files.ATTENTION, blocks, overwrite=True, source=source)
    files.save_networks(
        folder,
        {
            name: _to_file(tensor.detach().numpy())
            for prefix, network in networks.items()
            for name, tensor in _tensors(prefix, network)
        },
    )


def load(folder: Path) -> tuple[Generator, Discriminator]:
    """The networks that `save` wrote."""
    arrays = files.load_networks(folder)
    generator, discriminator = Generator(), Discriminator()
    for prefix, network in zip(files.BLOCKS, (generator, discriminator), strict=True):
        network.attention = selfattn_torch.load(folder / files.ATTENTION, block=prefix)
        with torch.no_grad():
            for name, tensor in _tensors(prefix, network):
                tensor.copy_(torch.from_numpy(_from_file(arrays[name])))
    return generator, discriminator


@torch.no_grad()
def answer(
    generator: Generator, discriminator: Discriminator, latents: Array, labels: Array
) -> files.Samples:
    """What the networks, in evaluation mode, make of latents and labels."""
    generator.eval()
    discriminator.eval()
    images = generator(torch.from_numpy(latents), torch.from_numpy(labels))
    scores = discriminator(images, torch.from_numpy(labels))
    generator.train()
    discriminator.train()
    return files.Samples(latents, labels, images.permute(0, 2, 3, 1).numpy(), scores.numpy())


def _tensors(prefix: str, network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of all layers but the attention layer, by their names in the file."""
    for name in ("dense", "conv1", "conv2", "conv3"):
        layer = network.get_submodule(name)
        state = dict(layer.named_parameters()) | dict(layer.named_buffers())
        for key, tensor in state.items():
            part = {"weight": "kernel", "original": "kernel", "_u": "u", "_v": "v"}.get(
                key.rpartition(".")[2], "bias"
            )
            if part == "v":
                # Torch's own order, (C_in, height, width).
                kernel = state["parametrizations.weight.original"]
                tensor = tensor.view(kernel.shape[1:])  # noqa: PLW2901 - the same memory, to be written to
            yield f"{prefix}.{name}.{part}", tensor


def _to_file(array: Array) -> Array:
    """Kernels, and the vectors of their input side, with the channels last."""
    order = {4: (2, 3, 1, 0), 3: (1, 2, 0), 2: (1, 0), 1: (0,)}[array.ndim]
    return array.transpose(order)


def _from_file(array: Array) -> Array:
    order = {4: (3, 2, 0, 1), 3: (2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
    return np.ascontiguousarray(array.transpose(order))
