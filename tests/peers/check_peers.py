"""Ports of real layers of published packages compute what the originals do: output and every gradient, in float64.

Run by `make test-peers`, in an environment of its own.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from selfattn_core import load as load_canonical
from selfattn_core import spec
from selfattn_core.porting import PortError, inspect, load, port
from tests.peers.originals import PEERS, prepare_torchvision

EPS = np.finfo(np.float64).eps
# Of the largest number in the comparison.
OUTPUT = 1e-12
# A central difference with the best step errs by about eps to the power of two thirds.
STEP = EPS ** (1 / 3)
GRADIENT = 100 * EPS ** (2 / 3)


def trained(peer, seed=0):
    """The package's model after a few steps in training mode, so that u, v, averages and gamma are no longer new."""
    torch.manual_seed(seed)
    model, layer = peer.build()
    model.double()
    generator = torch.Generator().manual_seed(seed + 1)
    layer.train()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * (0.4 if parameter.ndim > 1 else 0.3))
            if name == "gamma":
                parameter.fill_(-0.7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for _ in range(3):
        x = torch.randn(2, peer.channels, 4, 6, generator=generator, dtype=torch.float64)
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model, layer


def relative(got, want):
    return float(np.abs(got - want).max() / max(1e-30, np.abs(want).max()))


def channels_last(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


@pytest.fixture(params=PEERS)
def ported(request, tmp_path):
    peer = PEERS[request.param]
    model, layer = trained(peer)
    source = peer.save(model, tmp_path)
    target = tmp_path / "ported.safetensors"
    report = port(
        source, target, dialect=peer.dialect, settings=peer.settings, prefix=peer.prefix.rstrip(".") or None
    )
    assert report.passed
    return peer, layer, source, load_canonical(target)


def test_output_and_gradients(ported):
    peer, layer, source, (config, params) = ported
    assert params["gamma"].dtype == np.float64
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, peer.channels, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, peer.channels, 4, 6, generator=generator, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    got = spec.forward(config, params, channels_last(x))
    assert relative(got - channels_last(x), channels_last(y - x)) < OUTPUT
    # The attention is far from uniform, and adds something.
    attention = spec.attention_map(config, params, channels_last(x))
    assert attention.max() > 3 / attention.shape[-1]
    assert float((y - x).detach().abs().max()) > 0.05

    gradients = spec.vjp(config, params, channels_last(x), channels_last(dy))
    assert relative(gradients["x"], channels_last(x.grad)) < OUTPUT

    for name, parameter in layer.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        want = float((parameter.grad * direction).sum())
        size = float((parameter.grad * direction).abs().sum())
        moved = _along(peer, source, f"{peer.prefix}{name}", direction)
        mine = sum(float((gradients[key] * moved[key]).sum()) for key in moved)
        if (
            name.startswith(("query", "key", "phi", "theta", "p."))
            and name.endswith("bias")
            and size < OUTPUT
        ):
            # A bias of the keys: its gradient is zero, and what is computed is noise.
            assert abs(mine) < OUTPUT
            continue
        assert abs(mine - want) < GRADIENT * max(size, abs(want)), name


def _along(peer, source: Path, key: str, direction) -> dict[str, np.ndarray]:
    """How the ported parameters move when one of the original's does: the dialect, differentiated."""
    ends = []
    for sign in (1, -1):
        content = torch.load(source, weights_only=True)
        state = content.get("model_state_dict", content)
        state[key] = state[key] + sign * STEP * direction
        path = source.with_name("moved.pth")
        torch.save(content, path)
        ends.append(
            load(path, dialect=peer.dialect, settings=peer.settings, prefix=peer.prefix.rstrip(".") or None)[
                1
            ]
        )
    return {name: (ends[0][name] - ends[1][name]) / (2 * STEP) for name in ends[0]}


def test_inspect_finds_the_block_and_its_dialect(ported):
    peer, _, source, _ = ported
    (block,) = inspect(source).blocks
    assert block.prefix.replace("/", ".").rstrip(".") == peer.prefix.rstrip(".")
    assert peer.dialect in {fit.dialect for fit in block.fits if fit.verdict == "fits"}


def test_torchgan_is_refused(tmp_path):
    """Its softmax is over the outputs, which no exchange of weights mends; its keys are those of correct layers."""
    prepare_torchvision()
    from torchgan.layers import SelfAttention2d

    layer = SelfAttention2d(24)
    torch.save(layer.state_dict(), tmp_path / "torchgan.pth")
    with pytest.raises(PortError, match="quer"):
        port(tmp_path / "torchgan.pth", tmp_path / "ported.safetensors", dialect="torchgan")
    assert [path.name for path in tmp_path.iterdir()] == ["torchgan.pth"]
    x = torch.randn(1, 24, 4, 6)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
        layer.return_attn = True
        _, attention = layer(x)
    # Rows of its map are attended positions: what reaches one output does not sum to one.
    assert not torch.allclose(attention.sum(dim=1), torch.ones(1, 24))
