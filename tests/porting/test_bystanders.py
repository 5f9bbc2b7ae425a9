"""What lies beside a layer's weights: an optimiser's state is passed over with a word, averaged copies are offered by name."""

import numpy as np
import pytest
import torch
from flax import serialization

import selfattn_core
from selfattn_core.porting import PortError, inspect, load, port
from selfattn_core.porting.blocks.bystanders import optimiser_keys
from tests.porting.originals import ORIGINALS


def layer(name, scale=1.0):
    """Tensors of one layer, without the prefix, times a number."""
    original = ORIGINALS[name]()
    return {
        key.removeprefix(original.prefix): (value * scale).astype("f4")
        for key, value in original.tensors.items()
    }


def tree(flat):
    root: dict = {}
    for name, array in flat.items():
        *folders, leaf = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return root


def under(prefix, tensors, ending=""):
    return {f"{prefix}{name}{ending}": value for name, value in tensors.items()}


def blocks(path):
    return [block.prefix for block in inspect(path).blocks]


ADAM = ("exp_avg", "exp_avg_sq")
FORMS = {
    "torch": under("optimizer.state.", {f"{n}.{s}": np.ones(3) for n in range(3) for s in ADAM}),
    "torch, by name": under(
        "optimizer_D.state.net.attn.",
        {f"{n}.{s}": np.ones(3) for n in ("query.weight", "gamma") for s in ADAM},
    ),
    "Lightning": under("optimizer_states.0.state.", {f"{n}.momentum_buffer": np.ones(3) for n in range(3)}),
    "optax in a TrainState": {"opt_state/0/count": 1}
    | under("opt_state/0/mu/attn/", layer("flax"))
    | under("opt_state/0/nu/attn/", layer("flax")),
    "optax in a tree of one's own": {"o/count": 1}
    | under("o/mu/attn/", layer("flax"))
    | under("o/nu/attn/", layer("flax")),
    "optax, a chain in a list": under("opt/1/mu/attn/", layer("flax"))
    | under("opt/1/nu/attn/", layer("flax")),
    "optax' momentum": under("opt_g/trace/attn/", layer("flax")),
    "Keras 3": under("optimizer/vars/", {str(n): np.ones(3) for n in range(4)}),
    "Keras 3 in a Checkpoint": under(
        "discriminator/optimizer/_variables/", {str(n): np.ones(3) for n in range(4)}
    ),
    "TF2": under("net/attn/", layer("keras"), "/.OPTIMIZER_SLOT/opt/m"),
    "TF1": {"attn/gamma": 1}
    | under("attn/gamma", {f"/{s}": 1 for s in ("Adam", "Adam_1", "RMSProp", "Momentum")})
    | {"beta1_power": 1, "beta2_power_1": 1},
    "Paddle": {"conv2d_0.w_0_moment1_0": 1, "conv2d_0.w_0_beta1_pow_acc_0": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_optimiser_s_state_is_known(form):
    live = {
        "attn/gamma",
        "net.attn.mu.weight",
        "net.attn.nu.weight",
        "opt.0.weight",
        "optional.state",
        "net.momentum.weight",
    }
    assert optimiser_keys({*FORMS[form], *live}) == set(FORMS[form]) - live - {"o/count"}


def test_moments_of_optax_are_no_layers(tmp_path):
    flat = under("params/attn/", layer("flax"))
    flat |= {"opt_state/0/count": np.ones(1, np.int32)}
    for number, name in ((2, "mu"), (3, "nu")):
        flat |= under(f"opt_state/0/{name}/attn/", layer("flax", number))
    path = tmp_path / "state.msgpack"
    path.write_bytes(serialization.to_bytes(tree(flat)))
    assert blocks(path) == ["params/attn/"]
    assert "ignored: " in inspect(path).to_text()
    with pytest.raises(
        PortError,
        match=r"is the state of an optimiser, which has a layer's keys but not its weights[.] .*: params/attn",
    ):
        port(path, tmp_path / "o.safetensors", dialect="flax", prefix="opt_state/0/nu/attn/")
    _, params = load(path, dialect="flax", settings={"kv_pool": 2})
    assert params["gamma"] == layer("flax")["gamma"]
    report = port(path, tmp_path / "o.safetensors", dialect="flax")
    assert report.optimiser_state == len(flat) - len(layer("flax"))
    assert report.tensors_elsewhere == 0
    assert "are an optimiser's state, which was not ported" in report.to_text()


def test_slots_of_tf1_do_not_hide_a_layer(tmp_path):
    """They lie inside it, under names of its own variables."""
    tensors = layer("taki0112")
    flat = (
        under("g/attn/", tensors)
        | under("g/attn/", layer("taki0112", 2), "/Adam")
        | under("g/attn/", layer("taki0112", 3), "/Adam_1")
    )
    np.savez(tmp_path / "a.npz", **flat)
    assert blocks(tmp_path / "a.npz") == ["g/attn/"]
    assert load(tmp_path / "a.npz", dialect="taki0112")[1]["gamma"] == tensors["gamma"]


def test_averages_of_tf1_are_offered_by_name(tmp_path):
    averaged = {name: value for name, value in layer("taki0112", 2).items() if not name.endswith("/u")}
    flat = under("g/attn/", layer("taki0112")) | under("g/attn/", averaged, "/ExponentialMovingAverage")
    np.savez(tmp_path / "a.npz", **flat)
    (fit,) = (fit for fit in inspect(tmp_path / "a.npz").blocks[0].fits if fit.verdict == "fits")
    assert fit.dialect == "taki0112"
    assert "the raw copies of kernels, biases and gamma are used (--set ema=…)" in fit.assumptions
    report = port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect="taki0112")
    assert report.blocks[0].unused == ()
    gamma = layer("taki0112")["gamma"]
    assert selfattn_core.load(tmp_path / "o.safetensors")[1]["gamma"] == gamma
    assert load(tmp_path / "a.npz", dialect="taki0112", settings={"ema": "true"})[1]["gamma"] == 2 * gamma
    # Where there are none, nothing is said of them.
    np.savez(tmp_path / "b.npz", **under("g/attn/", layer("taki0112")))
    (fit,) = (fit for fit in inspect(tmp_path / "b.npz").blocks[0].fits if fit.verdict == "fits")
    assert not any("copies" in text for text in fit.assumptions)


@pytest.mark.parametrize(
    "names", [("params", "params_ema"), ("G", "G_ema"), ("model", "shadow"), ("online_model", "ema_model")]
)
def test_averages_in_a_container_of_their_own_are_blocks_by_name(names, tmp_path):
    state = {
        name: {
            f"attn.{key}": torch.from_numpy(value) for key, value in layer("heykeetae, plain", number).items()
        }
        for number, name in enumerate(names, 1)
    }
    torch.save(state, tmp_path / "a.pth")
    assert blocks(tmp_path / "a.pth") == sorted(f"{name}.attn." for name in names)
    assert inspect(tmp_path / "a.pth").to_text().count("averaged copies, judging by the name") == 1
    with pytest.raises(PortError, match="holds 2 blocks that look like heykeetae"):
        load(tmp_path / "a.pth", dialect="heykeetae")
    found = load(tmp_path / "a.pth", dialect="heykeetae", prefix=f"{names[1]}.attn")[1]["gamma"]
    assert found == 2 * layer("heykeetae, plain")["gamma"]


def test_averages_without_names_are_spoken_of(tmp_path):
    live = {f"net.attn.{key}": torch.from_numpy(value) for key, value in layer("heykeetae, plain").items()}
    torch.save(
        {"model": live, "ema": {"decay": 0.9, "shadow_params": list(live.values())}}, tmp_path / "a.pth"
    )
    assert "note: shadow_params holds averaged copies without names" in inspect(tmp_path / "a.pth").to_text()
    joined = {f"model_ema.{key.replace('.', '')}": value for key, value in live.items()}
    torch.save({f"model.{key}": value for key, value in live.items()} | joined, tmp_path / "b.pth")
    text = inspect(tmp_path / "b.pth").to_text()
    assert "note: model_ema holds averaged copies under names without dots, as LitEma writes them" in text
