"""Spectral norm in the PyTorch layer: state and mode, next to PyTorch's own, and through PyTorch's machinery."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from selfattn_core import spec, spectral_norm
from selfattn_core.params import fold_spectral_norm, init_params, projections, state_table
from selfattn_torch import (
    SelfAttention2d,
    attention_grid,
    from_canonical,
    load,
    refresh_spectral_norm,
    save,
    to_canonical,
)
from selfattn_torch.conformance.backend import TorchBackend
from selfattn_torch.spectral_norm import SpectralConv2d
from tests.backends.torch.layers import channels_first, channels_last
from tests.support import NORMALISED, designed

BACKEND = TorchBackend()


def layer_and_maps(dtype="float64", config=NORMALISED):
    params, x, w = designed(config, dtype)
    layer = from_canonical(config, params)
    return layer, channels_first(x), channels_first(w)


def assert_state(layer, want, rtol=1e-12):
    got = to_canonical(layer)
    for name in state_table(layer.config):
        np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol, err_msg=name)


def gradients(layer):
    """Gradients of the trained parameters, canonical; a penalty does not depend on the biases after the map."""
    found = {}
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name.replace("weight", "kernel")] = (
            gradient[:, :, 0, 0].T if name.endswith("weight") else gradient
        ).numpy()
    return found


def test_the_grid_is_that_of_evaluation_and_leaves_state_and_mode():
    params, x, _ = designed(NORMALISED, "float64")
    layer, maps, _ = layer_and_maps()
    layer.train()
    layer.key.eval()
    A = spec.attention_map(NORMALISED, params, x)
    np.testing.assert_allclose(attention_grid(layer, maps).detach().reshape(A.shape), A, atol=1e-12)
    with pytest.raises(ValueError, match="SelfAttention2d"):
        attention_grid(layer, maps[:, :3])
    got = to_canonical(layer)
    assert all(np.array_equal(got[name], params[name]) for name in params)
    modes = {name: module.training for name, module in layer.named_modules()}
    assert modes == {"": True, "query": True, "key": False, "value": True, "out": True}


def test_a_training_pass_moves_the_state_once_and_an_evaluation_pass_does_not():
    params, x, _ = designed(NORMALISED, "float64")
    layer, maps, _ = layer_and_maps()
    moved = spec.power_iteration(NORMALISED, params)
    np.testing.assert_allclose(
        channels_last(layer(maps)), spec.forward(NORMALISED, moved, x), rtol=1e-11, atol=1e-12
    )
    assert_state(layer, moved)
    with torch.no_grad():
        layer(maps)
    twice = spec.power_iteration(NORMALISED, moved)
    assert_state(layer, twice)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    np.testing.assert_allclose(
        channels_last(layer(maps)), spec.forward(NORMALISED, twice, x), rtol=1e-11, atol=1e-12
    )
    _, attention = layer(maps, need_weights=True)
    np.testing.assert_allclose(attention.detach(), spec.attention_map(NORMALISED, twice, x), rtol=1e-11)
    assert layer.query.weight.shape == (3, 11, 1, 1)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    np.testing.assert_array_equal(layer.query.weight.detach()[:, :, 0, 0].T, params["query.kernel"])


def test_a_step_with_a_penalty_moves_the_state_once_and_has_the_specifications_gradients():
    params, x, w = designed(NORMALISED, "float64")
    layer, maps, weights = layer_and_maps()
    maps.requires_grad_()
    y = layer(maps)
    (dx,) = torch.autograd.grad(y, maps, weights, create_graph=True)
    penalty = dx.square().sum()
    penalty.backward()
    params = spec.power_iteration(NORMALISED, params)
    assert_state(layer, params)
    value, want = spec.r1(NORMALISED, params, x, w)
    np.testing.assert_allclose(penalty.item(), value, rtol=1e-11)
    np.testing.assert_allclose(channels_last(maps.grad), want.pop("x"), rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(layer).items():
        np.testing.assert_allclose(
            gradient, want[name], rtol=1e-9, atol=1e-9 * np.abs(want["query.kernel"]).max()
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_follows_the_specification(training_run, dtype):
    run = training_run(dtype)
    layer = from_canonical(run.config, run.start)
    for x, w in run.steps:
        maps = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
        weights = torch.from_numpy(w).permute(0, 3, 1, 2)
        loss = (weights * layer(maps)).sum()
        (dx,) = torch.autograd.grad(loss, maps, create_graph=True)
        layer.zero_grad()
        (loss + run.penalty * dx.square().sum()).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(run.rate * parameter.grad)
    run.check(to_canonical(layer))


def test_it_is_the_parametrization_of_pytorch():
    """Output and gradients of three training steps against the layer whose convolutions PyTorch normalises."""
    layer, maps, weights = layer_and_maps()
    plain = from_canonical(*_without(layer))
    for name in projections(NORMALISED):
        ours, theirs = getattr(layer, name), parametrizations.spectral_norm(getattr(plain, name))
        theirs.parametrizations.weight[0]._u.copy_(ours.u)
        theirs.parametrizations.weight[0]._v.copy_(ours.v)
    for _ in range(3):
        ours, theirs = layer(maps), plain(maps)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        for model, y in ((layer, ours), (plain, theirs)):
            model.zero_grad()
            y.backward(weights)
        for name in projections(NORMALISED):
            weight, original = (
                getattr(layer, name).weight,
                getattr(plain, name).parametrizations.weight.original,
            )
            torch.testing.assert_close(weight.grad, original.grad, rtol=1e-10, atol=1e-11)
            with torch.no_grad():
                for parameter in (weight, original):
                    parameter.sub_(0.05 * parameter.grad)


def _without(layer):
    """The config without spectral norm, and the raw kernels."""
    config, params = fold_spectral_norm(layer.config, to_canonical(layer))
    raw = to_canonical(layer)
    return config, {name: raw[name] for name in params}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_passes_before_the_backward_pass_do_not_disturb_it(mode):
    layer, maps, weights = layer_and_maps()
    getattr(layer, mode)()
    twin = copy.deepcopy(layer)
    twin(maps).backward(weights)
    y = layer(maps)
    layer.train()(maps.flip(0))
    y.backward(weights)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_move_the_state_again(use_reentrant):
    layer, maps, weights = layer_and_maps()
    twin = copy.deepcopy(layer)
    twin(maps).backward(weights)
    checkpoint(layer, maps.requires_grad_(), use_reentrant=use_reentrant).backward(weights)
    for name, value in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_a_backward_after_each_of_two_forwards(use_reentrant):
    layer, maps, weights = layer_and_maps()
    twin = copy.deepcopy(layer)
    real, fake = maps.clone().requires_grad_(), (-2 * maps).requires_grad_()
    torch.add(*((twin(batch) * weights).sum() for batch in (real, fake))).backward()
    for batch in (real, fake):
        checkpoint(layer, batch, use_reentrant=use_reentrant).backward(weights)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_state_dict_is_frozen():
    names = {name: tuple(value.shape) for name, value in layer_and_maps()[0].state_dict().items()}
    assert {name: shape for name, shape in names.items() if not name.endswith("bias")} == {
        "gamma": (1,),
        "query.weight": (3, 11, 1, 1),
        "query.u": (3,),
        "query.v": (11,),
        "key.weight": (3, 11, 1, 1),
        "key.u": (3,),
        "key.v": (11,),
        "value.weight": (5, 11, 1, 1),
        "value.u": (5,),
        "value.v": (11,),
        "out.weight": (11, 5, 1, 1),
        "out.u": (11,),
        "out.v": (5,),
    }
    layer = layer_and_maps()[0]
    assert {name for name, _ in layer.named_buffers()} == set(state_table(NORMALISED))
    assert not any(buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_state_dicts_of_both_spectral_norms_of_pytorch_load(normalise):
    """Also with a prefix, as part of a model; what the source computes in evaluation is what the layer computes."""
    source = nn.ModuleDict({"attention": from_canonical(*_without(layer_and_maps()[0]))})
    for name in projections(NORMALISED):
        normalise(getattr(source["attention"], name))
    _, maps, _ = layer_and_maps()
    source["attention"](maps)
    target = nn.ModuleDict({"attention": layer_and_maps()[0]})
    state = source.state_dict()
    assert any("orig" in name for name in state)
    before = dict(state)
    target.load_state_dict(state)
    assert list(state) == list(before), "the caller's dict stays as it was"
    ours, theirs = (model.eval()["attention"](maps) for model in (target, source))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_file_of_an_old_layer_without_state_is_refused():
    layer = SelfAttention2d(16, spectral_norm=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*query\.u"):
        layer.load_state_dict(SelfAttention2d(16).state_dict())


def test_initialisation_is_warmed_up_and_redrawn():
    torch.manual_seed(0)
    layer = SelfAttention2d(64, spectral_norm=True)
    first = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(1)
    layer.reset_parameters()
    second = layer.state_dict()
    for name in projections(layer.config):
        child = getattr(layer, name)
        top = torch.linalg.svdvals(child.weight[:, :, 0, 0])[0]
        sigma = child.u @ child.weight[:, :, 0, 0] @ child.v
        assert 0.9 * top < sigma <= 1.00001 * top
        for part in ("u", "v"):
            torch.testing.assert_close(second[f"{name}.{part}"].norm(), torch.tensor(1.0))
            assert not torch.equal(first[f"{name}.{part}"], second[f"{name}.{part}"])


def test_late_initialisation():
    layer = SelfAttention2d(16, spectral_norm=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    for child in layer.children():
        child.reset_parameters()
    for child in layer.children():
        assert isinstance(child, SpectralConv2d)
        sigma = child.u @ child.weight[:, :, 0, 0] @ child.v
        assert 0.8 < sigma / torch.linalg.svdvals(child.weight[:, :, 0, 0])[0] < 1.0001
    skipped = nn.utils.skip_init(SelfAttention2d, 16, spectral_norm=True)
    skipped.reset_parameters()
    assert torch.isfinite(skipped(torch.randn(1, 16, 3, 4))).all()


def test_copies_have_the_state_and_a_life_of_their_own(tmp_path):
    layer, maps, _ = layer_and_maps()
    layer(maps)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own bytes
        assert all(torch.equal(twin.state_dict()[name], value) for name, value in layer.state_dict().items())
        torch.testing.assert_close(twin(maps), copy.deepcopy(layer)(maps), rtol=0, atol=0)
        twin(maps)
        assert not torch.equal(twin.query.u, layer.query.u)
        twin.load_state_dict(layer.state_dict())
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = SelfAttention2d.from_config(NORMALISED, dtype=torch.float64)
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(fresh.eval()(maps), layer.eval()(maps))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_canonical_arrays_and_files_carry_the_state(tmp_path, dtype):
    params, *_ = designed(NORMALISED, dtype)
    save(from_canonical(NORMALISED, params), tmp_path / "layer.safetensors")
    layer = load(tmp_path / "layer.safetensors")
    assert layer.config == NORMALISED
    got = to_canonical(layer)
    assert list(got) == list(params)
    assert all(got[name].tobytes() == array.tobytes() for name, array in params.items())


def test_a_child_is_the_projection_that_the_layer_applies():
    layer, maps, _ = layer_and_maps()
    layer.eval()
    config, folded = fold_spectral_norm(NORMALISED, to_canonical(layer))
    want = from_canonical(config, folded).query(maps)
    torch.testing.assert_close(layer.query(maps), want, rtol=1e-12, atol=1e-12)
    seen = []
    layer.query.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    layer(maps)
    torch.testing.assert_close(seen[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiling_in_one_graph(mode):
    layer, maps, weights = layer_and_maps("float32")
    getattr(layer, mode)()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, theirs = compiled(maps), twin(maps)
        torch.testing.assert_close(ours, theirs)
        ours.backward(weights)
        theirs.backward(weights)
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value)
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    moved = not torch.equal(layer.query.u, layer_and_maps("float32")[0].query.u)
    assert moved == (mode == "train")


def test_functional_transforms():
    layer, maps, _ = layer_and_maps()
    layer.eval()
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())

    def loss(state, sample):
        return torch.func.functional_call(layer, state, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, maps)
    for index in range(2):
        layer.zero_grad()
        layer(maps[index : index + 1]).square().sum().backward()
        torch.testing.assert_close(per_sample["query.weight"][index], layer.query.weight.grad)
    others = [layer, from_canonical(NORMALISED, init_params(NORMALISED, 3, np.float64)).eval()]
    stacked = torch.func.stack_module_state(others)
    ensemble = torch.func.vmap(
        lambda params, buffers: torch.func.functional_call(layer, (params, buffers), (maps,))
    )(*stacked)
    for index, other in enumerate(others):
        torch.testing.assert_close(ensemble[index], other(maps))


def test_an_ensemble_in_training_moves_every_state():
    layers = [SelfAttention2d(16, spectral_norm=True, dtype=torch.float64) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(layers)
    before = {name: value.clone() for name, value in buffers.items()}
    maps = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (maps,)))(params, buffers)
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.query.v, before["query.v"][index])
        layer(maps)
        torch.testing.assert_close(buffers["query.v"][index], layer.query.v)
        assert not torch.equal(before["query.v"][index], layer.query.v)


def test_under_autocast_the_norm_is_in_float32():
    layer, maps, _ = layer_and_maps("float32")
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(maps)
    assert y.dtype == torch.float32
    twin(maps)
    assert_state(layer, to_canonical(twin), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sixteen_bit_layer_rounds_where_it_stores(dtype):
    layer, maps, _ = layer_and_maps("float32")
    layer.to(dtype)
    rounded = {name: array.astype(np.float32) for name, array in to_canonical(layer).items()}
    want = spec.power_iteration(NORMALISED, rounded)
    assert layer(maps.to(dtype)).dtype == dtype
    # One rounding of numbers below 1; arithmetic in 16 bits would add its own.
    half_ulp = torch.finfo(dtype).eps / 4
    for name in state_table(NORMALISED):
        got = to_canonical(layer)[name].astype(np.float32)
        np.testing.assert_allclose(got, want[name], rtol=0, atol=1.01 * half_ulp)


def test_the_options_are_the_cores():
    with pytest.raises(ValueError, match="spectral_norm=1 must be True or False"):
        SelfAttention2d(16, spectral_norm=1)
    assert SelfAttention2d.from_config(NORMALISED).config == NORMALISED


def shares(layer):
    params = to_canonical(layer)
    return [
        spectral_norm.share(*(params[f"{name}.{part}"] for part in ("kernel", "u", "v")))
        for name in projections(layer.config)
    ]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_that_are_drawn_from_outside_and_refreshed(dtype):
    layer = SelfAttention2d.from_config(NORMALISED, dtype=getattr(torch, dtype))
    model = nn.Sequential(nn.Conv2d(3, 11, 1), layer)
    model.apply(lambda module: nn.init.normal_(module.weight, 0, 0.02) if hasattr(module, "weight") else None)
    assert min(shares(layer)) < 0.9
    refresh_spectral_norm(model)
    eps = torch.finfo(getattr(torch, dtype)).eps
    np.testing.assert_allclose(shares(layer), 1, rtol=4 * eps)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_without_vectors_is_loaded_with_those_of_its_weights(assign, device):
    if device == "meta" and not assign:
        return  # torch itself loads nothing then
    source = layer_and_maps()[0]
    partial = {name: value for name, value in source.state_dict().items() if not name.endswith((".u", ".v"))}
    layer = SelfAttention2d.from_config(NORMALISED, dtype=torch.float64, device=device)
    answer = layer.load_state_dict(partial, strict=False, assign=assign)
    assert set(answer.missing_keys) == set(state_table(NORMALISED))
    np.testing.assert_allclose(shares(layer), 1, rtol=16 * np.finfo(float).eps)
    # One that has no weights either leaves the state as it is.
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"gamma": torch.ones(1, dtype=torch.float64)}, strict=False)
    assert torch.equal(layer.state_dict()["query.u"], before["query.u"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_a_weight_of_zeros_trains_and_leaves_zero(dtype, run):
    _, maps, weights = layer_and_maps("float32")
    kind = getattr(torch, dtype)
    layer = SelfAttention2d.from_config(NORMALISED, dtype=kind)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter) if parameter.dim() > 1 else nn.init.constant_(parameter, 0.5)
    layer.query.reset_state()
    assert 0.99 < layer.query.v.float().norm() < 1.01
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if run == "compiled" else layer
    maps = maps.to(kind).requires_grad_()
    for step in range(4):
        layer.zero_grad()
        (call(maps) * weights.to(kind)).sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(0.01 * parameter.grad)
        assert step > 2 or all(torch.isfinite(value).all() for value in layer.state_dict().values())
    y = layer(maps)
    if run == "eager" and kind.itemsize > 2:
        (slope,) = torch.autograd.grad(y, maps, weights.to(kind), create_graph=True)
        slope.square().sum().backward()
    assert layer.out.weight.any()
    sigma = layer.out.u.float() @ layer.out.weight.float()[:, :, 0, 0] @ layer.out.v.float()
    assert sigma > 0.9 * torch.linalg.matrix_norm(layer.out.weight.float()[:, :, 0, 0], 2)
    assert torch.isfinite(y).all()
