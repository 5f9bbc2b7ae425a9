"""A whole checkpoint of a network with somebody's attention becomes one of the same network with ours."""

import argparse
import json
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from selfattn_core.cli import main
from selfattn_core.porting import PortError, load, open_tensors, port, verify
from selfattn_torch import SelfAttention2d


class Foreign(nn.Module):
    """As the most copied layer has it, in our own words."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.tensor([0.6]))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = torch.softmax(q.mT @ k, -1)
        return self.gamma * (v @ attention.mT).view_as(x) + x


class Net(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Conv2d(3, 16, 3))
        self.norm = nn.BatchNorm2d(16)
        self.attn1 = attention(16)
        self.middle = nn.utils.parametrizations.spectral_norm(nn.Conv2d(16, 24, 3))
        self.attn2 = attention(24)

    def forward(self, x):
        return self.attn2(self.middle(self.attn1(self.norm(self.first(x)))))


@pytest.fixture
def old():
    torch.manual_seed(0)
    net = Net(Foreign)
    net(torch.randn(2, 3, 9, 8))
    return net.eval()


@pytest.fixture(autouse=True)
def no_frameworks(monkeypatch):
    monkeypatch.setattr(verify, "BACKENDS", {})


def check_loads(old, state, seed=1):
    """Strictly into the new network, whose outputs are the old one's."""
    new = Net(SelfAttention2d).eval()
    new.load_state_dict(state)
    torch.manual_seed(seed)
    x = torch.randn(2, 3, 11, 10)
    with torch.no_grad():
        torch.testing.assert_close(new(x), old(x))


def test_a_state_dict(old, tmp_path):
    torch.save(old.state_dict(), tmp_path / "old.pth")
    report = port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)
    assert [block.prefix for block in report.blocks] == ["attn1.", "attn2."]
    (check,) = (check for check in report.checks if check.name == "everything else")
    assert check.detail == f"{len(old.state_dict()) - 14} tensors are equal to the source's, bit for bit"
    state = torch.load(tmp_path / "new.pth", weights_only=True)
    check_loads(old, state)
    # torch's versions of modules, by which its own spectral norm reads a file, and ours.
    assert state._metadata["first"] == old.state_dict()._metadata["first"]
    assert state._metadata["attn2"]["selfattn kv_pool"] == 1
    assert "attn1.query_conv" not in state._metadata
    order = list(state)
    assert (
        order.index("norm.num_batches_tracked")
        < order.index("attn1.query.weight")
        < order.index("middle.bias")
    )
    assert load(tmp_path / "new.pth", dialect="torch", prefix="attn1")[0].kv_pool == 1


def test_a_training_checkpoint_of_a_parallel_module(old, tmp_path):
    """Nested dictionaries, `module.`, other dtypes and numbers stay; an optimiser's state does not, and is spoken of."""
    optimiser = torch.optim.Adam(old.parameters())
    old(torch.randn(2, 3, 9, 8)).sum().backward()
    optimiser.step()
    old.eval()
    parallel = nn.DataParallel(old)
    half = {
        "table": torch.randn(3, 5).bfloat16().t(),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(7),
    }
    content = {
        "nets": {"G": parallel.state_dict(), "G_ema": old.state_dict()},
        "optim_G": optimiser.state_dict(),
        "epoch": 3,
        "log": [{"loss": 0.5}, "text"],
        "extra": half,
    }
    torch.save(content, tmp_path / "old.pth")
    report = port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)
    assert report.optimiser_state > 0
    assert "are an optimiser's state, which was not ported" in report.to_text()
    new = torch.load(tmp_path / "new.pth", weights_only=True)
    assert list(new) == ["nets", "epoch", "log", "extra"]
    assert (new["epoch"], new["log"]) == (content["epoch"], content["log"])
    for name, value in half.items():
        assert new["extra"][name].dtype == value.dtype
        assert torch.equal(new["extra"][name], value)
    check_loads(old, new["nets"]["G_ema"])
    wrapped = nn.DataParallel(Net(SelfAttention2d))
    wrapped.load_state_dict(new["nets"]["G"])
    for name, value in old.state_dict().items():
        if "attn" not in name:
            assert torch.equal(new["nets"]["G"][f"module.{name}"], value)


def test_blocks_by_prefix(old, tmp_path):
    torch.save(old.state_dict(), tmp_path / "old.pth")
    port(
        tmp_path / "old.pth",
        tmp_path / "new.pth",
        dialect="heykeetae",
        to="torch",
        whole=True,
        prefix="attn2",
    )
    state = torch.load(tmp_path / "new.pth", weights_only=True)
    assert "attn1.query_conv.weight" in state
    assert "attn2.query.weight" in state


def test_a_file_of_safetensors(old, tmp_path):
    state = {name: value.contiguous() for name, value in old.state_dict().items()}
    more = {
        "extra.narrow": torch.randn(3, 5).bfloat16(),
        "extra.tiny": torch.randn(4).to(torch.float8_e4m3fn),
    }
    safetensors.torch.save_file(state | more, tmp_path / "old.safetensors", metadata={"step": "7"})
    port(
        tmp_path / "old.safetensors",
        tmp_path / "new.safetensors",
        dialect="heykeetae",
        to="torch",
        whole=True,
    )
    new = safetensors.torch.load_file(tmp_path / "new.safetensors")
    for name, value in more.items():
        assert new[name].dtype == value.dtype
        assert torch.equal(new.pop(name).view(torch.uint8), value.view(torch.uint8))
    check_loads(old, new)
    with open_tensors(tmp_path / "new.safetensors") as opened:
        assert opened.metadata["step"] == "7"
        assert json.loads(opened.metadata["port"])["passed"] is True


def test_from_the_command(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(old.state_dict(), "old.pth")
    done = CliRunner().invoke(
        main, ["port", "old.pth", "new.pth", "--from", "heykeetae", "--to", "torch", "--whole"]
    )
    assert done.exit_code == 0, done.output
    assert "passed   everything else" in done.output
    check_loads(old, torch.load("new.pth", weights_only=True))


def test_another_number_elsewhere_is_caught(old, tmp_path, monkeypatch):
    from selfattn_core.porting import whole_checkpoint

    right = whole_checkpoint._renamed

    def wrong(held, *arguments):
        state = right(held, *arguments)
        state["norm.bias"] = state["norm.bias"] + 1
        return state

    torch.save(old.state_dict(), tmp_path / "old.pth")
    monkeypatch.setattr(whole_checkpoint, "_renamed", wrong)
    with pytest.raises(PortError, match=r"round trip: changed: norm\.bias"):
        port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        ("new.safetensors", "torch", "in the source's own format"),
        ("new.pth", "keras", "keras has others"),
        ("old.pth", "torch", "exists already"),
    ],
)
def test_what_cannot_be_whole(target, to, message, old, tmp_path):
    torch.save(old.state_dict(), tmp_path / "old.pth")
    with pytest.raises(PortError, match=message):
        port(tmp_path / "old.pth", tmp_path / target, dialect="heykeetae", to=to, whole=True)
    assert [file.name for file in tmp_path.iterdir()] == ["old.pth"]


def test_a_block_in_several_dictionaries(tmp_path):
    nested = {"attn": {name: dict(module.state_dict()) for name, module in Foreign(16).named_children()}}
    nested["attn"]["gamma"] = torch.ones(1)
    torch.save({"a": nested, "b": {"w": torch.ones(1)}}, tmp_path / "old.pth")
    with pytest.raises(PortError, match="are in several dictionaries, not in one state dict"):
        port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)


def test_settings_that_torch_does_not_load(old, tmp_path):
    torch.save({"G": old.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "old.pth")
    with pytest.raises(PortError, match="save only its state dicts, and port that file"):
        port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)


def test_shared_tensors_stay_shared(old, tmp_path):
    state = OrderedDict(old.state_dict())
    state["tied"] = state["norm.weight"]
    torch.save(state, tmp_path / "old.pth")
    port(tmp_path / "old.pth", tmp_path / "new.pth", dialect="heykeetae", to="torch", whole=True)
    new = torch.load(tmp_path / "new.pth", weights_only=True)
    assert new["tied"].data_ptr() == new["norm.weight"].data_ptr()
    assert np.array_equal(new["tied"], state["tied"])
