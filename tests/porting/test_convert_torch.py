"""`selfattn_torch.convert`: foreign attention layers in networks become ours, or nothing changes."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_norm

from selfattn_core.conformance.verdicts.tolerance import FACTOR
from selfattn_core.porting import PortError
from selfattn_core.porting.networks.conversion import ConversionError
from selfattn_torch import SelfAttention2d, SelfAttention2dWithMap, convert
from selfattn_torch.spectral_norm import SpectralConv2d
from tests.porting.networks import check_network


class Wrapper(nn.Module):
    """A spectral norm that keeps its raw weight as `weight_bar` and iterates in every call, as old repositories have it."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        weight = module.weight
        del module._parameters["weight"]
        module.register_parameter("weight_bar", nn.Parameter(weight.data))
        rows = weight.shape[0]
        module.register_parameter("weight_u", nn.Parameter(torch.randn(rows), requires_grad=False))
        module.register_parameter(
            "weight_v", nn.Parameter(torch.randn(weight[0].numel()), requires_grad=False)
        )

    def forward(self, x):
        inner = self.module
        w = inner.weight_bar
        matrix = w.reshape(w.shape[0], -1)
        v = matrix.data.T @ inner.weight_u.data
        inner.weight_v.data = v / (v.norm() + 1e-12)
        u = matrix.data @ inner.weight_v.data
        inner.weight_u.data = u / (u.norm() + 1e-12)
        inner.weight = w / (inner.weight_u @ (matrix @ inner.weight_v))
        return inner(x)


def same(module):
    return module


NORMS = {
    "no norm": same,
    "parametrization": parametrizations.spectral_norm,
    "hook": hooked_norm,
    "wrapper class": Wrapper,
}


class Flat(nn.Module):
    """With heykeetae's names."""

    def __init__(self, channels, norm=same, pair=False, axis=-1):
        super().__init__()
        self.pair, self.axis = pair, axis
        self.query_conv = norm(nn.Conv2d(channels, channels // 8, 1))
        self.key_conv = norm(nn.Conv2d(channels, channels // 8, 1))
        self.value_conv = norm(nn.Conv2d(channels, channels, 1))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        attention = (q.mT @ k).softmax(self.axis)
        y = self.gamma * (v @ attention.mT).view_as(x) + x
        return (y, attention) if self.pair else y


class Pooled(nn.Module):
    """With BigGAN's names."""

    def __init__(self, channels, norm=same):
        super().__init__()
        self.theta, self.phi = (norm(nn.Conv2d(channels, channels // 8, 1, bias=False)) for _ in "12")
        self.g = norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.o = norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        batch, channels, height, width = x.shape
        pool = nn.functional.max_pool2d
        theta = self.theta(x).view(batch, channels // 8, height * width)
        # Whole windows only, as in the original.
        phi = pool(self.phi(x), 2).view(batch, channels // 8, height * width // 4)
        g = pool(self.g(x), 2).view(batch, channels // 2, height * width // 4)
        beta = (theta.mT @ phi).softmax(-1)
        return self.gamma * self.o((g @ beta.mT).view(batch, channels // 2, height, width)) + x


class Normed(nn.Module):
    """With mmcv's names: scaled scores, and a batch norm behind the last projection."""

    def __init__(self, channels):
        super().__init__()
        for name in ("theta", "phi", "g"):
            self.add_module(name, nn.Sequential())
            self.get_submodule(name).add_module("conv", nn.Conv2d(channels, channels // 2, 1))
        self.conv_out = nn.Sequential()
        self.conv_out.add_module("conv", nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.conv_out.add_module("bn", nn.BatchNorm2d(channels))

    def forward(self, x):
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        attention = (theta.mT @ phi / theta.shape[1] ** 0.5).softmax(-1)
        return x + self.conv_out((g @ attention.mT).unflatten(2, x.shape[2:]))


class Own(nn.Module):
    """That no dialect of ours has names for, and which acts as if query and key were exchanged."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Linear(channels, channels // 8) for _ in "12")
        # Square, with the input channels first: no shape tells the axes apart.
        self.content = nn.Parameter(torch.randn(channels, channels) / channels**0.5)
        self.shift = nn.Parameter(torch.randn(channels))
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        rows = x.flatten(2).mT
        attention = (self.second(rows) @ self.first(rows).mT).softmax(-1)
        return x + self.gain * (attention @ (rows @ self.content + self.shift)).mT.unflatten(2, x.shape[2:])


INPUT = (torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(5)),)
OWN = """
name = "own"
title = "an own layer"
source = "tests"
layout = "BCHW"
[roles]
query = "second"
key = "first"
value = "content"
[gamma]
key = "gain"
[[kernels]]
axes = "OI"
kernel = "{path}.weight"
bias = "{path}.bias"
[[kernels]]
axes = "IO"
kernel = "content"
bias = "shift"
"""


class Network(nn.Module):
    """A layer as an attribute, the same once more under another name, and one in a list."""

    def __init__(self, make, channels=24):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.attention = make(channels)
        self.blocks = nn.ModuleList([nn.Tanh(), make(channels)])
        self.again = self.attention
        self.head = nn.Sequential(nn.Conv2d(channels, 5, 1))

    def forward(self, x):
        x = self.stem(x)
        for layer in (self.attention, *self.blocks, self.again):
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def trained(make, seed=0, **options):
    """A network after two steps in training mode, so that nothing in it is as it was made."""
    torch.manual_seed(seed)
    network = Network(lambda channels: make(channels, **options))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "gain")):
                parameter.fill_(0.6 if "attention" in name else -0.8)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    for _ in range(2):
        network(torch.randn(3, 3, 4, 6)).square().mean().backward()
        optimizer.step()
    if options.get("norm") is Wrapper:
        with torch.no_grad():
            # It iterates in evaluation too: only an estimate that has arrived stays where it is.
            for _ in range(500):
                network(torch.randn(1, 3, 2, 2))
    # As a user would meet it, with gradients and with weights that the last forward pass computed.
    network(torch.randn(3, 3, 4, 6))
    return network


def unchanged(network):
    """What must be as it was: modules by identity, numbers by bits."""
    return {name: (module, type(module)) for name, module in network.named_modules()}, {
        name: tensor.clone() for name, tensor in network.state_dict().items()
    }


def check_untouched(network, before):
    modules, tensors = unchanged(network)
    assert modules == before[0]
    assert all(torch.equal(tensors[name], before[1][name]) for name in before[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pair", [False, True], ids=["y", "y and A"])
def test_flat_in_a_network(norm, pair):
    network = trained(Flat, norm=NORMS[norm], pair=pair)
    network.attention.eval()
    before = unchanged(network)
    report = convert(network, dialect="heykeetae")
    check_untouched(network, before)
    assert [layer.names for layer in report.layers] == [("attention", "again"), ("blocks.1",)]
    for layer in report.layers:
        assert set(layer.old) == set(layer.new) >= {"y", "x", "query.kernel", "value.bias", "gamma"}
        assert max(*layer.old.values(), *layer.new.values()) <= FACTOR
        assert ("map" in layer.old) == layer.returns_map == pair
    model = report.model
    assert model.attention is model.again
    assert type(model.blocks) is nn.ModuleList
    assert isinstance(model.attention, SelfAttention2dWithMap) == pair
    assert (model.attention.training, model.blocks[1].training) == (False, True)
    assert isinstance(model.attention.query, SpectralConv2d) == (norm != "no norm")
    check_network(INPUT, network, model)


def test_training_goes_on_alike():
    """The next steps of training, spectral norm's power iteration among them, are those of the old network."""
    old = trained(Flat, norm=parametrizations.spectral_norm).double()
    new = convert(old, dialect="heykeetae").model
    losses = {}
    for name, network in (("old", old), ("new", new)):
        generator = torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
        losses[name] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = network(torch.randn(3, 3, 4, 6, generator=generator, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert np.allclose(losses["old"], losses["new"], rtol=1e-12, atol=0)
    assert len(set(losses["old"])) == 4


@pytest.mark.parametrize("norm", NORMS)
def test_pooled_in_a_network(norm):
    network = trained(Pooled, norm=NORMS[norm])
    report = convert(network, dialect="biggan" if norm == "no norm" else "mimicry")
    assert report.layers[0].config["kv_pool"] == 2
    assert report.layers[0].config["out_projection"]
    check_network(INPUT, network, report.model)


def test_scaled_and_normed():
    network = trained(Normed)
    report = convert(network, dialect="mmcv", match=Normed)
    layer = report.layers[0]
    assert "scores are multiplied" in " ".join(layer.assumptions)
    assert any("batch norm" in note for note in layer.notes)
    assert any(note.startswith("gamma: not in the old layer") for note in layer.notes)
    frozen = [
        name for name, parameter in report.model.attention.named_parameters() if not parameter.requires_grad
    ]
    assert frozen == ["gamma"]
    check_network(INPUT, network, report.model)
    with pytest.raises(ConversionError, match=r"off by y .* noise floors"):
        convert(network, dialect="mmcv", match=Normed, settings={"use_scale": False})


@pytest.mark.parametrize(
    "match", [Own, (Own, nn.Identity), "*attention", lambda _, module: isinstance(module, Own)]
)
def test_own_dialect(match, tmp_path):
    (tmp_path / "own.toml").write_text(OWN)
    network = trained(Own)
    report = convert(network, dialect=str(tmp_path / "own.toml"), match=match)
    assert len(report.layers) == (1 if match == "*attention" else 2)
    assert report.layers[0].names == ("attention", "again")
    check_network(INPUT, network, report.model)


def test_dtype_and_requires_grad():
    network = trained(Flat).to(torch.bfloat16)
    network.attention.key_conv.requires_grad_(False)
    report = convert(network, dialect="heykeetae")
    new = report.model.attention
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert [name for name, p in new.named_parameters() if not p.requires_grad] == ["key.weight", "key.bias"]
    assert torch.equal(new.key.weight, network.attention.key_conv.weight)
    assert convert(trained(Flat).double(), dialect="heykeetae").model.again.gamma.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folded_spectral_norm(dtype):
    network = trained(Flat, norm=parametrizations.spectral_norm).to(dtype)
    report = convert(network, dialect="heykeetae", keep_spectral_norm=False)
    assert type(report.model.attention.key) is not SpectralConv2d
    assert any("divided by their spectral norms" in note for note in report.layers[0].notes)
    assert any("rounded to the dtype of the old layer" in note for note in report.layers[0].notes) == (
        dtype == torch.float16
    )
    if dtype == torch.float32:
        check_network(INPUT, network, report.model)


def test_spectral_norm_of_some():
    def some(channels):
        layer = Flat(channels)
        layer.key_conv = parametrizations.spectral_norm(layer.key_conv)
        return layer

    network = trained(some)
    before = unchanged(network)
    with pytest.raises(PortError, match=r"the query .* has no state of it(.|\n)*keep_spectral_norm=False"):
        convert(network, dialect="heykeetae")
    check_untouched(network, before)
    check_network(INPUT, network, convert(network, dialect="heykeetae", keep_spectral_norm=False).model)


def test_in_place():
    network = trained(Flat)
    stem, others = network.stem, dict(network.head.named_parameters())
    wanted = convert(network, dialect="heykeetae").model
    assert convert(network, dialect="heykeetae", inplace=True).model is network
    assert network.stem is stem
    assert network.attention is network.again
    assert all(network.head.get_parameter(name) is parameter for name, parameter in others.items())
    assert isinstance(network.blocks[1], SelfAttention2d)
    assert len(network.blocks) == 2
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_a_copy_shares_nothing():
    network = trained(Flat)
    model = convert(network, dialect="heykeetae").model
    places = {parameter.data_ptr() for parameter in network.parameters()}
    assert not places & {parameter.data_ptr() for parameter in model.parameters()}


def test_a_weight_that_another_module_has_computed():
    """An older spectral norm outside of attention leaves one behind, which torch does not copy."""
    network = nn.Sequential(hooked_norm(nn.Conv2d(3, 24, 1)), Flat(24))
    network(torch.randn(1, 3, 4, 5))
    model = convert(network, dialect="heykeetae").model
    check_network(INPUT, network, model)


def test_the_layer_alone():
    layer = trained(Flat).attention
    assert isinstance(convert(layer, dialect="heykeetae").model, SelfAttention2d)
    with pytest.raises(PortError, match="the model itself is the layer"):
        convert(layer, dialect="heykeetae", inplace=True)


def test_dry_run_and_output_alone():
    network = trained(Flat, pair=True)
    before = unchanged(network)
    report = convert(network, dialect="heykeetae", returns="output", dry_run=True, inplace=True)
    check_untouched(network, before)
    assert report.model is None
    assert report.passed
    assert "would be replaced" in str(report)
    assert any("change its callers" in note for note in report.layers[0].notes)
    made = convert(network, dialect="heykeetae", returns="output").model.attention
    assert type(made) is SelfAttention2d
    assert report.to_dict()["layers"][0]["was"] == "Flat"


def test_a_state_dict_in_the_old_names_does_not_load():
    """A user who forgets `port --whole` is told by torch itself."""
    network = trained(Flat)
    with pytest.raises(RuntimeError, match="Missing key"):
        convert(network, dialect="heykeetae").model.load_state_dict(network.state_dict())


def test_zeros_hide_nothing():
    """Also not behind the batch norm of a new layer, which would add nothing whatever the layer computed."""
    layer = Normed(24)
    nn.init.zeros_(layer.conv_out.bn.weight)
    assert convert(layer, dialect="mmcv").layers[0].old["y"] > 0
    with pytest.raises(ConversionError):
        convert(layer, dialect="mmcv", settings={"use_scale": False})


@pytest.mark.parametrize(
    ("dialect", "hint"),
    [("pytorch-advanced", "the layer computes what danet and heykeetae describe"), ("heykeetae", "off by y")],
)
def test_another_function(dialect, hint):
    network = trained(Flat, axis=1 if dialect == "heykeetae" else -1)
    before = unchanged(network)
    with pytest.raises(ConversionError, match=hint) as caught:
        convert(network, dialect=dialect)
    check_untouched(network, before)
    assert caught.value.report.model is None
    assert not caught.value.report.passed
    assert caught.value.report.layers[0].old["y"] > 1e3


def test_several_dialects_are_named_and_not_chosen():
    network = trained(Flat)
    with pytest.raises(
        PortError, match=r"its keys fit .*the layer computes what danet and heykeetae describe"
    ):
        convert(network, match=Flat)


@pytest.mark.parametrize("norm", NORMS)
def test_a_state_that_a_question_would_move_stays(norm):
    torch.manual_seed(0)
    layer = Flat(24, norm=NORMS[norm])
    before = unchanged(layer)
    notes = convert(layer, dialect="heykeetae", dry_run=True).layers[0].notes
    check_untouched(layer, before)
    told = "the old layer moves its query_conv.module.weight_u, query_conv.module.weight_v"
    assert any(note.startswith(told) for note in notes) == (norm == "wrapper class")


class Ceil(Pooled):
    """That pools a cut-off window, which ours drops; a map of whole windows does not show it."""

    def forward(self, x):
        batch, _, height, width = x.shape
        theta, phi, g = (
            self.theta(x),
            *(nn.functional.max_pool2d(f(x), 2, ceil_mode=True) for f in (self.phi, self.g)),
        )
        weights = (theta.flatten(2).mT @ phi.flatten(2)).softmax(-1)
        return self.gamma * self.o((g.flatten(2) @ weights.mT).view(batch, -1, height, width)) + x


class Local(Flat):
    """That attends within neighbourhoods of 8×8, which is everything on a small map."""

    def forward(self, x):
        if x.shape[2] <= 8:
            return super().forward(x)
        parts = [
            torch.cat([Flat.forward(self, part) for part in row.split(8, 3)], 3) for row in x.split(8, 2)
        ]
        return torch.cat(parts, 2)


class Dropping(Flat):
    """That drops out by a function, in training alone."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.3, self.training)


class Telling(Flat):
    """That returns the map in training alone."""

    def forward(self, x):
        self.pair = self.training
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "dialect", "words"),
    [
        (Ceil, "biggan", "at 17×19 the old layer is off by y"),
        (Local, "heykeetae", "at 17×19 the old layer is off by y"),
        (Dropping, "heykeetae", "in training the old layer computes something else"),
        (Telling, "heykeetae", r"it returns y in one mode and \(y, A\) in the other"),
    ],
)
def test_what_a_small_map_in_evaluation_does_not_show(make, dialect, words):
    torch.manual_seed(0)
    with pytest.raises(ConversionError, match=words):
        convert(make(24), dialect=dialect)


def test_a_size_at_which_it_returns_something_else_is_no_size_at_which_it_does_not_run():
    class Cropped(Flat):
        def forward(self, x):
            return super().forward(x)[:, :, :16]

    with pytest.raises(
        PortError, match=r"returned a tensor \(2, 24, 16, 19\) for an input \(2, 24, 17, 19\)"
    ):
        convert(Cropped(24), dialect="heykeetae")


def test_a_layer_for_whole_windows_says_so():
    torch.manual_seed(0)
    (layer,) = convert(Pooled(24), dialect="biggan").layers
    assert any(note.startswith("it does not run at 17×19") for note in layer.notes)


def test_several_power_iterations_are_told():
    torch.manual_seed(0)
    several = lambda conv: parametrizations.spectral_norm(conv, n_power_iterations=4)  # noqa: E731 - as `norm` is given
    for norm, told in ((several, True), (parametrizations.spectral_norm, False)):
        (layer,) = convert(Flat(24, norm=norm), dialect="heykeetae").layers
        assert any("its spectral norm is updated differently" in note for note in layer.notes) == told


def test_further_arguments_and_other_shapes_of_the_map_are_told():
    class More(Flat):
        def forward(self, x, strength=1.0):
            y, attention = super().forward(x)
            return x + strength * (y - x), attention[:, None]

    (layer,) = convert(More(24, pair=True), dialect="heykeetae").layers
    assert any("also takes strength=1.0" in note for note in layer.notes)
    assert any(note.startswith("the old map had the shape (2, 1, 12, 12)") for note in layer.notes)


def test_a_failure_halfway_leaves_the_network_as_it_was():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Flat(24), Flat(24)

        def __setattr__(self, name, value):
            if name == "second" and name in self._modules:
                raise RuntimeError("frozen")
            super().__setattr__(name, value)

    network = Stubborn()
    before = unchanged(network)
    with pytest.raises(PortError, match=r"second could not be replaced.*frozen"):
        convert(network, dialect="heykeetae", inplace=True)
    check_untouched(network, before)


def test_what_cannot_be_copied_is_said_in_a_dry_run_too():
    network = trained(Flat)
    network.lock = threading.Lock()
    with pytest.raises(PortError, match="the model cannot be copied"):
        convert(network, dialect="heykeetae", dry_run=True)
    assert convert(network, dialect="heykeetae", dry_run=True, inplace=True).passed


def test_maps_that_were_kept_and_inference_mode():
    network = trained(Flat, pair=True)
    network.kept = [network.attention(torch.randn(1, 24, 3, 4))[1]]
    with torch.inference_mode():
        model = convert(network, dialect="heykeetae").model
    model(torch.randn(1, 3, 4, 6)).sum().backward()


def frozen_in_part(network):
    network.attention.key_conv.eval()


def mixed(network):
    network.attention.key_conv.bfloat16()


def tied_within(network):
    network.attention.key_conv.weight = network.attention.query_conv.weight


def part_elsewhere(network):
    network.other = network.attention.query_conv


def another_forward(network):
    network.forward = network.forward


def hooked(network):
    network.attention.value_conv.register_forward_hook(print)


def tied(network):
    network.blocks[1].query_conv.weight = network.attention.query_conv.weight


def quantised(network):
    with warnings.catch_warnings(
        action="ignore"
    ):  # torch 2.13 deprecates the module, which old networks still have.
        network.blocks[1].query_conv = torch.ao.nn.quantized.Conv2d(24, 3, 1)


def compiled(network):
    with warnings.catch_warnings(
        action="ignore"
    ):  # torch 2.13 imports torch.jit.script_method, which it deprecates.
        network.attention.compile()


def listening(network):
    network.attention.gamma.register_hook(print)


def dropping(network):
    network.attention.query_conv = nn.Sequential(network.attention.query_conv, nn.Dropout2d(0.1))


BAD = {
    "parts in another mode": (frozen_in_part, "in another mode than the layer"),
    "several dtypes": (mixed, "its parameters are bfloat16 and float32"),
    "tied within": (tied_within, "query_conv.weight and key_conv.weight are one parameter"),
    "a part elsewhere": (part_elsewhere, "its query_conv is also other"),
    "another forward": (another_forward, "has a function in the place of its forward"),
    "dropout in it": (dropping, r"attention \(Flat\): query_conv.1 drops out a share of 0.1"),
    "hooks on a part of it": (hooked, r"attention \(Flat\): value_conv has the hooks print"),
    "a hook on a parameter": (listening, "gamma has a hook"),
    "tied weights": (tied, "query_conv.weight is also a parameter of another module"),
    "on the meta device": (lambda network: network.attention.to("meta"), "meta device"),
    "quantised": (quantised, "query_conv is quantised"),
    "compiled in place": (compiled, r"attention \(Flat\) is compiled"),
    "not finite": (lambda network: network.attention.gamma.data.fill_(float("nan")), "gamma holds NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused(kind):
    spoil, message = BAD[kind]
    network = trained(Flat)
    spoil(network)
    before = dict(network.named_modules())
    with pytest.raises(PortError, match=message):
        convert(network, dialect="heykeetae", match=Flat, inplace=True)
    assert dict(network.named_modules()) == before


def test_refused_as_a_whole():
    with warnings.catch_warnings(action="ignore"):  # As above, and torch.jit.trace is deprecated itself.
        whole = torch.compile(trained(Flat))
        traced = torch.jit.trace(trained(Flat).eval(), torch.randn(1, 3, 4, 6))
    with pytest.raises(PortError, match=r"the model \(OptimizedModule\) is compiled; convert the module"):
        convert(whole, dialect="heykeetae", match=Flat)
    with pytest.raises(PortError, match="scripted or traced"):
        convert(traced, dialect="heykeetae")


def test_a_layer_held_outside_the_modules():
    network = trained(Flat)
    network.all_attention = [network.attention]
    with pytest.raises(PortError, match=r"the model.all_attention holds a layer"):
        convert(network, dialect="heykeetae", inplace=True)
    model = convert(network, dialect="heykeetae").model
    assert model.all_attention == [model.attention]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither dialect nor match"),
        ({"dialect": "heykeetae", "match": nn.LSTM}, "has no module that match="),
        (
            {"dialect": "fgh"},
            "has no module with the keys of fgh, .* Its modules are of the classes Conv2d, Flat",
        ),
        (
            {"dialect": "heykeetae", "match": "stem"},
            r"stem \(Conv2d\): is not heykeetae .*it has no query_conv",
        ),
        ({"dialect": "heykeetae", "match": "*"}, "lies inside"),
        ({"dialect": "torchgan", "match": Flat}, "cannot be converted"),
        ({"dialect": "heykeetae", "settings": {"use_scale": True}}, "use_scale is not a setting"),
        ({"dialect": "heykeetae", "returns": "both"}, "expected 'same' or 'output'"),
        (
            {"dialect": 3, "match": 123, "settings": "x", "size": 5},
            r"match=123.*size=5.*settings='x'.*dialect=3",
        ),
        ({"dialect": "heykeetae", "match": (Flat, "x")}, "expected a class of modules"),
        ({"dialect": "heykeetae", "size": (2.5, 3)}, "two whole numbers"),
        ({"dialect": "heykeetae", "block_size": -1}, "block_size=-1"),
        ({"dialect": "heykeetae", "size": (0, 3)}, r"expected \(H, W\) of at least"),
    ],
)
def test_what_is_asked_for_wrongly(options, message):
    network = trained(Flat)
    before = unchanged(network)
    with pytest.raises(ValueError, match=message):
        convert(network, **options)
    check_untouched(network, before)


def test_a_layer_that_takes_something_else():
    class Two(Flat):
        def forward(self, x, y):
            return super().forward(x + y)

    class Three(Flat):
        def forward(self, x):
            return super().forward(x), x, x

    for kind, message in ((Two, "does not run on an input"), (Three, r"returned \(a tensor .*expected y")):
        with pytest.raises(PortError, match=message):
            convert(nn.Sequential(kind(24)), dialect="heykeetae")
