"""The f/g/h layer that people paste, at the size of its own example, equals ours in every framework: y and the map."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import selfattn_core
from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance import REGISTRY
from tests.support import BACKENDS

CONFIG = SelfAttentionConfig(512)

# Each framework through its backend of the kit, in a process of its own: output first, without asking for the map.
SCRIPT = """
import sys
import numpy as np
import selfattn_core
from selfattn_core.conformance import resolve

target, folder, name = sys.argv[1:]
backend = resolve(target)
model = backend.build(*selfattn_core.load(f"{folder}/published.safetensors"), "float32", backend.layouts()[0])
x = np.load(f"{folder}/x.npy")
np.save(f"{folder}/{name}-y.npy", backend.forward(model, x))
np.save(f"{folder}/{name}-map.npy", backend.attention_map(model, x))
"""


class Published(nn.Module):
    """f is the query, g the key, h the value, and gamma no parameter."""

    def __init__(self, channels):
        super().__init__()
        self.f = nn.Conv2d(channels, channels // 8, 1)
        self.g = nn.Conv2d(channels, channels // 8, 1)
        self.h = nn.Conv2d(channels, channels, 1)
        self.gamma = torch.zeros(1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        f = self.f(x).view(batch, -1, height * width).transpose(1, 2)
        attention = torch.softmax(torch.bmm(f, self.g(x).view(batch, -1, height * width)), dim=-1)
        h = self.h(x).view(batch, -1, height * width)
        out = torch.bmm(h, attention.transpose(1, 2)).view(batch, channels, height, width)
        return self.gamma * out + x, attention


def channels_last(y):
    return y.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder with weights and input, and what the layer as published gives in float32 and in float64."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    layer = Published(512)
    layer.gamma = torch.tensor([0.5])
    assert "gamma" not in layer.state_dict()
    params = {"gamma": layer.gamma.numpy()}
    for ours, theirs in (("query", layer.f), ("key", layer.g), ("value", layer.h)):
        params[f"{ours}.kernel"] = theirs.weight.detach()[:, :, 0, 0].T.numpy()
        params[f"{ours}.bias"] = theirs.bias.detach().numpy()
    selfattn_core.save(folder / "published.safetensors", CONFIG, params)
    x = torch.randn(1, 512, 64, 64)
    np.save(folder / "x.npy", channels_last(x))
    with torch.no_grad():
        y, attention = layer(x)
        exact_y, exact_map = layer.double()(x.double())
    answers = {"y": (channels_last(y), channels_last(exact_y)), "map": (attention.numpy(), exact_map.numpy())}
    return folder, answers


@pytest.mark.parametrize("name", BACKENDS)
def test_the_published_layer_is_ours(published, name):
    folder, answers = published
    entry = REGISTRY[name]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, entry.target, str(folder), name],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | entry.in_full,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for quantity, (theirs, exact) in answers.items():
        got = np.load(folder / f"{name}-{quantity}.npy")
        assert got.shape == exact.shape
        # The published layer's own error in float32, and one ulp, since that error is one draw.
        floor = np.abs(theirs - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()
        error = np.abs(got - exact).max()
        assert error <= 4 * floor, f"{quantity}: {error / floor:.2f} × the noise floor"
