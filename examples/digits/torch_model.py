"""The classifier in PyTorch. Run as a program, it scores the held-out images with weights read from files."""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

import selfattn_torch
from examples.digits import files
from selfattn_torch import SelfAttention2d

Array = NDArray[Any]


class Classifier(nn.Module):
    """Two convolutions, self-attention over the 8×8 positions, and a dense layer over the maximum of each channel.

    The convolutions see at most 5×5 pixels, and the pooling drops positions. Only the attention can find how the parts of a
    digit are placed.

    Args:
        attention: the attention layer. By default a new one, with gamma = 0.
    """

    def __init__(self, attention: SelfAttention2d | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.attention = SelfAttention2d(32) if attention is None else attention
        self.dense = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        x = torch.relu(self.conv1(images))
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.attention(x))
        return self.dense(x.amax(dim=(2, 3)))


def logits(model: Classifier, images: Array) -> Array:
    """Logits (B, 10) of images (B, 8, 8, 1)."""
    with torch.no_grad():
        return model(to_torch(images)).numpy()


def to_torch(images: Array) -> torch.Tensor:
    """(B, H, W, C) to torch's (B, C, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def save(model: Classifier, folder: Path, *, source: str) -> None:
    """Write the weights where every framework can read them."""
    selfattn_torch.save(model.attention, folder / files.ATTENTION, overwrite=True, source=source)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    network = {
        "conv1.kernel": state["conv1.weight"].transpose(2, 3, 1, 0),
        "conv1.bias": state["conv1.bias"],
        "conv2.kernel": state["conv2.weight"].transpose(2, 3, 1, 0),
        "conv2.bias": state["conv2.bias"],
        "dense.kernel": state["dense.weight"].T,
        "dense.bias": state["dense.bias"],
    }
    files.save_network(folder, network)


def load(folder: Path) -> Classifier:
    """The classifier with the weights that `save` wrote."""
    network = {name: torch.from_numpy(array) for name, array in files.load_network(folder).items()}
    model = Classifier(selfattn_torch.load(folder / files.ATTENTION))
    with torch.no_grad():
        for conv in ("conv1", "conv2"):
            model.get_parameter(f"{conv}.weight").copy_(network[f"{conv}.kernel"].permute(3, 2, 0, 1))
            model.get_parameter(f"{conv}.bias").copy_(network[f"{conv}.bias"])
        model.dense.weight.copy_(network["dense.kernel"].T)
        model.dense.bias.copy_(network["dense.bias"])
    return model


if __name__ == "__main__":
    files.answer(lambda folder, images: logits(load(folder), images))
