"""`selfattn_flax.convert`: NNX models of other people with our layer in the place of theirs."""

import functools
import subprocess
import sys

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import selfattn_flax
from selfattn_core.porting import port
from selfattn_core.porting.errors import PortError
from selfattn_core.porting.formats import open_tensors
from selfattn_core.porting.networks.conversion import ConversionError
from selfattn_flax import SelfAttention2D, SelfAttention2DWithMap, convert
from selfattn_flax.converting.places import places

C, DK, DV = 16, 3, 5

DIALECT = """
name = "mine"
title = "the layers of this test"
source = "tests/porting/test_convert_flax.py"
layout = "BHWC"
{top}

[layer]
out_projection = {out}
use_bias = {bias}
kv_pool = {pool}

[roles]
query = "to_g"
key = "to_f"
value = "to_h"
{out_role}

[gamma]
{gamma}
{rest}
[[kernels]]
axes = "{axes}"
kernel = "{{path}}/kernel"
bias = "{{path}}/bias"
"""

# One power iteration from the stored u, as `nnx.SpectralNorm` in evaluation; the keys are those that Orbax gives its state.
SPECTRAL = """
[[kernels]]
axes = "HWIO"
kernel = "{path}/layer_instance/kernel"
bias = "{path}/layer_instance/bias"
ignore = ["{path}/batch_stats/('kernel', 'sigma')"]

[kernels.spectral_norm]
u = "{path}/batch_stats/('kernel', 'u')"
sigma = "iterate"
normalize = "root-add"
eps = 1e-12
"""


def dialect(tmp_path, *, pool=1, out=False, bias=True, axes="HWIO", gamma='key = "gain"', top="", rest=""):
    path = tmp_path / "mine.toml"
    path.write_text(
        DIALECT.format(
            top=top,
            pool=pool,
            out=str(out).lower(),
            bias=str(bias).lower(),
            out_role='out = "to_o"' if out else "",
            axes=axes,
            gamma=gamma,
            rest=rest,
        )
    )
    return str(path)


def rows(maps):
    return maps.reshape(*maps.shape[:-3], -1, maps.shape[-1])


def randomised(module, seed=0):
    """Every parameter drawn anew, so that no bias and no gain is 0."""
    generator = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Param):
            value = node.get_value()
            node.set_value(jnp.asarray(generator.standard_normal(value.shape) * 0.5, value.dtype))
    return module


class Flat(nnx.Module):
    """The children of the dialect "flax", in a layer of somebody else's."""

    def __init__(self, rngs, *, param_dtype=jnp.float32, dtype=None, pair=False, axis=-1, param=nnx.Param):
        make = functools.partial(
            nnx.Conv, kernel_size=(1, 1), dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query, self.key, self.value = make(C, DK), make(C, DK), make(C, C)
        self.gamma = param(jnp.full((1,), 0.7, param_dtype))
        self.pair, self.axis = pair, axis

    def __call__(self, x):
        q, k, v = (rows(conv(x)) for conv in (self.query, self.key, self.value))
        A = jax.nn.softmax(q @ k.mT, axis=self.axis)
        y = self.gamma[...] * (A @ v).reshape(x.shape) + x
        return (y, A) if self.pair else y


class Mine(nnx.Module):
    """Pooled, with an output projection of `nnx.Linear`s, without biases; and with dropout, which must be off."""

    def __init__(self, rngs, rate=0.0):
        make = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.to_f, self.to_g, self.to_h, self.to_o = make(C, DK), make(C, DK), make(C, DV), make(DV, C)
        self.gain = nnx.Param(jnp.full((), 0.7))
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        f, h = (nnx.max_pool(one(x), (2, 2), (2, 2)) for one in (self.to_f, self.to_h))
        A = self.drop(jax.nn.softmax(rows(self.to_g(x)) @ rows(f).mT))
        return self.gain[...] * self.to_o((A @ rows(h)).reshape(*x.shape[:-1], DV)) + x


class Spectral(nnx.Module):
    def __init__(self, rngs):
        def make(out):
            return nnx.SpectralNorm(nnx.Conv(C, out, (1, 1), rngs=rngs), rngs=rngs)

        self.to_f, self.to_g, self.to_h = make(DK), make(DK), make(C)
        self.gain = nnx.Param(jnp.full((1,), 0.7))

    def __call__(self, x):
        f, g, h = (rows(one(x)) for one in (self.to_f, self.to_g, self.to_h))
        return self.gain[...] * (jax.nn.softmax(g @ f.mT) @ h).reshape(x.shape) + x


class Small(nnx.Module):
    """One layer at two places."""

    def __init__(self, make, rngs):
        self.stem = nnx.Linear(5, C, rngs=rngs)
        self.attention = make(rngs)
        self.blocks = nnx.List([self.attention])

    def __call__(self, x):
        return self.blocks[0](self.attention(self.stem(x)))


class Net(nnx.Module):
    """Places of every kind: an attribute, NNX's containers, plain ones, one layer in two of them, and random streams."""

    def __init__(self, make, rngs):
        self.stem = nnx.Conv(5, C, (3, 3), rngs=rngs)
        self.attention = make(rngs)
        self.blocks = nnx.List([nnx.BatchNorm(C, rngs=rngs), make(rngs)])
        self.named = nnx.Dict({"attention": make(rngs)})
        self.sequence = nnx.Sequential(make(rngs), jnp.tanh)
        self.plain = nnx.data(({"here": make(rngs)}, [self.attention]))
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.shared = self.blocks

    def __call__(self, x):
        x = self.attention(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.sequence(self.named.attention(x))
        return self.drop(self.plain[1][0](self.plain[0]["here"](x)))


PLACES = [
    ("attention", "plain.1.0"),
    ("blocks.1", "shared.1"),
    ("named.attention",),
    ("sequence.layers.0",),
    ("plain.0.here",),
]


@pytest.fixture
def rngs():
    return nnx.Rngs(3)


def images(channels=C, shape=(2, 6, 8), seed=1, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, channels)), dtype)


def numbers(model):
    return {
        path: np.asarray(jax.random.key_data(value) if isinstance(leaf, nnx.RngKey) else value)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
        for value in [leaf.get_value()]
    }


def assert_untouched(model, before, structure):
    after = numbers(model)
    assert list(after) == list(before)
    assert all(np.array_equal(after[path], before[path]) for path in before)
    assert [(name, id(node)) for name, node in places(model)] == structure


@pytest.fixture
def untouched():
    """A context that sees that nothing in a model changes."""

    class Watch:
        def __init__(self, model):
            self.model = model

        def __enter__(self):
            self.before = numbers(self.model), [(name, id(node)) for name, node in places(self.model)]

        def __exit__(self, *error):
            assert_untouched(self.model, *self.before)

    return Watch


def refused(model, words, watch, kind=PortError, **options):
    with watch(model), pytest.raises(kind, match=words) as caught:
        convert(model, **options)
    return caught.value


def assert_near_floors(layer):
    for errors in (layer.old, layer.new):
        assert max(errors.values()) <= 8


def moved(tree):
    """The same numbers, each moved by up to one eps."""
    generator = np.random.default_rng(9)

    def move(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        eps = float(jnp.finfo(leaf.dtype).eps)
        return (leaf * (1 + eps * generator.uniform(-1, 1, leaf.shape))).astype(leaf.dtype)

    return jax.tree.map(move, tree)


def output(model, x):
    return model(x)


def assert_same(new, old, x, function=output):
    """What a function makes of copies of both: apart by at most 32 times what moving every number by up to one eps does."""
    graph, state = nnx.split(old)
    wanted, near, got = (
        [np.float64(one) for one in jax.tree.leaves(function(*each))]
        for each in (
            (nnx.clone(old), x),
            (nnx.merge(graph, moved(state)), moved(x)),
            (nnx.clone(new), x),
        )
    )
    for mine, want, other in zip(got, wanted, near, strict=True):
        allowed = 32 * np.abs(other - want).max()
        assert mine.shape == want.shape
        assert np.abs(mine - want).max() <= allowed < 0.1 * np.abs(want).max()


def test_a_network_with_layers_in_every_kind_of_place(rngs, untouched):
    net = randomised(Net(Flat, rngs))
    with untouched(net):
        report = convert(net, dialect="flax", match=Flat)
    assert report.passed
    assert sorted(layer.names for layer in report.layers) == sorted(PLACES)
    for layer in report.layers:
        assert set(layer.new) == {"y", "x", "gamma"} | {
            f"{role}.{part}" for role in ("query", "key", "value") for part in ("kernel", "bias")
        }
        assert set(layer.old) == set(layer.new)
        assert_near_floors(layer)
    new = report.model
    kinds = {name: type(node) for name, node in places(new)}
    assert all(kinds[name] is SelfAttention2D for names in PLACES for name in names)
    assert new.attention is new.plain[1][0]
    assert new.shared is new.blocks
    assert not new.drop.deterministic
    assert type(new.plain) is tuple
    x = images(5)

    @nnx.jit
    def answers(model, x):
        found = nnx.grad(lambda model, x: (model(x) ** 2).mean())(nnx.clone(model), x)
        kernels = [found["attention"][one]["kernel"][...] for one in ("query", "key", "value")]
        return [model(x), found["stem"]["kernel"][...], *kernels]

    # In training mode, from the same random streams.
    assert_same(new, net, x, answers)


def test_in_place_and_without_a_match(rngs):
    net = randomised(Small(Flat, rngs))
    old = nnx.clone(net)
    attention, bystander = net.attention, net.stem.kernel
    report = convert(net, dialect="flax", inplace=True)
    assert report.model is net
    assert [layer.names for layer in report.layers] == [("attention", "blocks.0")]
    assert isinstance(net.attention, SelfAttention2D)
    assert net.attention is net.blocks[0]
    assert not any(node is attention for _, node in places(net))
    assert net.stem.kernel is bystander
    assert_same(net, old, images(5))
    with pytest.raises(PortError, match="has no module with the keys of flax"):
        convert(net, dialect="flax")


def test_the_copy_shares_no_array(rngs):
    net = randomised(Small(Flat, rngs))
    new = convert(net, dialect="flax", match=Flat).model
    assert not new.attention.query.kernel[...].committed
    step = jax.jit(lambda state: jax.tree.map(lambda one: one, state), donate_argnums=0)
    step(nnx.state(new, nnx.Param))
    assert np.isfinite(net.stem.kernel[...]).all()
    assert np.isfinite(net.attention.query.kernel[...]).all()


def test_a_layer_alone_and_a_dry_run(rngs, untouched):
    layer = randomised(Flat(rngs))
    with untouched(layer):
        report = convert(layer, dialect="flax", match=Flat, dry_run=True)
        assert report.model is None
        assert report.passed
        assert report.layers[0].names == ("",)
        new = convert(layer, dialect="flax", match=Flat, block_size=7).model
    assert type(new) is SelfAttention2D
    assert new.block_size == 7
    assert_same(new, layer, images())
    refused(layer, "cannot be replaced in place", untouched, dialect="flax", match=Flat, inplace=True)


def test_a_dialect_of_ones_own_pooled_with_an_output_projection(rngs, tmp_path):
    mine = dialect(tmp_path, pool=2, out=True, bias=False, axes="IO")
    layer = randomised(Mine(rngs))
    report = convert(nnx.List([layer]), dialect=mine, size=(4, 6))
    assert_near_floors(report.layers[0])
    assert {"out.kernel", "gamma"} <= set(report.layers[0].old)
    assert report.layers[0].config["kv_pool"] == 2
    assert_same(report.model[0], layer, images())


def test_one_dialect_serves_a_model_and_its_files(rngs, tmp_path):
    """The keys in memory are those that the porter reads from npz, msgpack and Orbax."""
    mine = dialect(tmp_path, pool=2, out=True, bias=False, axes="IO")
    layer = randomised(Mine(rngs))
    new = convert(layer, dialect=mine, match=Mine).model
    state = nnx.state(layer, nnx.Param)
    tree = nnx.to_pure_dict(state)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}
    np.savez(tmp_path / "layer.npz", **flat)
    (tmp_path / "layer.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    from orbax import checkpoint

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "orbax").absolute(), state)
    want = selfattn_flax.to_canonical(new)
    for name in ("layer.npz", "layer.msgpack", "orbax"):
        port(tmp_path / name, tmp_path / f"{name}.safetensors", dialect=mine)
        got = selfattn_flax.to_canonical(selfattn_flax.load(tmp_path / f"{name}.safetensors"))
        assert all(np.array_equal(got[key], want[key]) for key in want)


def test_keys_with_the_level_that_orbax_adds(rngs, tmp_path):
    path = dialect(tmp_path, pool=2, out=True, bias=False, axes="IO", gamma='key = "gain/value"')
    text = (tmp_path / "mine.toml").read_text().replace("/kernel", "/kernel/value")
    (tmp_path / "mine.toml").write_text(text)
    report = convert(randomised(Mine(rngs)), dialect=path)
    assert {"value.kernel", "gamma"} <= set(report.layers[0].old)


@pytest.mark.parametrize("evaluation", [False, True])
def test_spectral_norm_of_nnx(rngs, tmp_path, evaluation):
    mine = dialect(tmp_path, rest=SPECTRAL)
    layer = randomised(Spectral(rngs))
    for seed in range(2):
        layer(images(seed=seed))
    if evaluation:
        layer.eval()
    report = convert(layer, dialect=mine)
    assert_near_floors(report.layers[0])
    assert report.layers[0].config["spectral_norm"]
    assert any("moves its to_f/layer_instance/kernel" in note for note in report.layers[0].notes)
    new = report.model
    assert new.query.use_running_average is evaluation
    assert isinstance(new.query.u, nnx.BatchStat)
    layer.eval()
    new.eval()
    x = images()
    assert_same(new, layer, x)
    if not evaluation:
        return
    folded = convert(layer, dialect=mine, keep_spectral_norm=False)
    assert not folded.layers[0].config["spectral_norm"]
    assert any("no longer limits" in note for note in folded.layers[0].notes)
    assert_same(folded.model, layer, x)


def test_the_keys_of_spectral_norm_are_those_of_orbax(rngs, tmp_path):
    state = nnx.merge_state(*nnx.state(Spectral(rngs), nnx.Param, nnx.BatchStat))
    from orbax import checkpoint

    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "orbax").absolute(), state)
    with open_tensors(tmp_path / "orbax") as tensors:
        assert "to_f/batch_stats/('kernel', 'u')" in tensors


def test_spectral_norm_that_no_dialect_knows_is_refused(rngs, tmp_path, untouched):
    net = Net(Spectral, rngs)
    path = dialect(tmp_path, axes="HWIO")
    text = (tmp_path / "mine.toml").read_text().replace("{path}/", "{path}/layer_instance/")
    (tmp_path / "mine.toml").write_text(text)
    refused(net, "unused: to_f/batch_stats", untouched, dialect=path)


def test_ours_stays_ours(rngs):
    net = nnx.List([Flat(rngs), SelfAttention2D(C, DK, spectral_norm=True, rngs=rngs)])
    new = convert(net, dialect="flax").model
    assert new[1].config == net[1].config
    assert type(new[0]) is SelfAttention2D


def test_a_layer_that_returns_the_map(rngs):
    class Caller(nnx.Module):
        def __init__(self, rngs):
            self.attention = randomised(Flat(rngs, pair=True))

        def __call__(self, x):
            y, A = self.attention(x)
            return y * A.mean(-2).reshape(*x.shape[:-1], 1)

    model = Caller(rngs)
    report = convert(model, dialect="flax", match=Flat)
    assert "map" in report.layers[0].old
    assert "map" in report.layers[0].new
    assert_near_floors(report.layers[0])
    assert report.layers[0].returns_map
    assert type(report.model.attention) is SelfAttention2DWithMap
    assert_same(report.model, model, images())
    plain = convert(model, dialect="flax", match=Flat, returns="output")
    assert not plain.layers[0].returns_map
    assert any("change its callers" in note for note in plain.layers[0].notes)
    assert type(plain.model.attention) is SelfAttention2D
    with pytest.raises(ValueError, match="'same' or 'output'"):
        convert(model, dialect="flax", returns="map")


def test_the_layer_with_a_map_sows_too(rngs):
    layer = SelfAttention2DWithMap(C, rngs=rngs)
    (_, A), sown = nnx.capture(layer, nnx.Intermediate)(images(), sow_weights=True)
    assert np.array_equal(sown["attention_weights"][0], A)
    assert np.array_equal(selfattn_flax.attention_grid(layer, images()).reshape(A.shape), A)


def test_what_the_variables_are_stays(rngs):
    class Frozen(nnx.Variable):
        pass

    layer = randomised(Flat(rngs))
    layer.key.kernel = Frozen(layer.key.kernel[...] + 1, decays=False)
    new = convert(layer, dialect="flax", match=Flat).model
    assert type(new.key.kernel) is Frozen
    assert new.key.kernel.get_metadata("decays") is False
    assert type(new.query.kernel) is nnx.Param
    gradient = nnx.grad(lambda model, x: model(x).sum())(new, images())
    assert "kernel" not in gradient["key"]
    assert np.array_equal(new.key.kernel[...], layer.key.kernel[...])


def test_what_the_old_layer_has_not_is_not_trained(rngs, tmp_path):
    class Rows(nnx.Module):
        """A kernel (C_out, C_in), whose gradient is turned, too."""

        def __init__(self, out):
            self.kernel, self.bias = nnx.Param(jnp.ones((out, C))), nnx.Param(jnp.ones(out))

        def __call__(self, x):
            return x @ self.kernel[...].T + self.bias[...]

    class Ones(nnx.Module):
        """No gain at all."""

        def __init__(self):
            self.to_f, self.to_g, self.to_h = (Rows(out) for out in (DK, DK, C))

        def __call__(self, x):
            A = jax.nn.softmax(rows(self.to_g(x)) @ rows(self.to_f(x)).mT)
            return (A @ rows(self.to_h(x))).reshape(x.shape) + x

    layer = randomised(Ones())
    report = convert(layer, dialect=dialect(tmp_path, axes="OI", gamma="value = 1.0"), match=Ones)
    assert any(note.startswith("gamma: not in the old layer") for note in report.layers[0].notes)
    assert type(report.model.gamma) is nnx.Variable
    assert_same(report.model, layer, images())


@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", None),
        pytest.param("float16", "float16", marks=pytest.mark.slow),
    ],
)
def test_dtypes(rngs, param_dtype, dtype):
    layer = randomised(Flat(rngs, param_dtype=jnp.dtype(param_dtype), dtype=dtype and jnp.dtype(dtype)))
    report = convert(layer, dialect="flax", match=Flat)
    assert_near_floors(report.layers[0])
    new = report.model
    for leaf in jax.tree.leaves(nnx.state(new, nnx.Param)):
        assert leaf.dtype == param_dtype
    assert np.array_equal(new.query.kernel[...], layer.query.kernel[...])
    for kind in ("float32", "bfloat16"):
        x = images(dtype=kind)
        assert new(x).dtype == layer(x).dtype


@pytest.mark.slow
def test_float64(rngs):
    with jax.enable_x64(True):
        layer = randomised(Flat(rngs, param_dtype=jnp.float64))
    report = convert(layer, dialect="flax", match=Flat)
    assert_near_floors(report.layers[0])
    assert report.model.query.kernel[...].dtype == np.float64
    assert np.array_equal(report.model.query.kernel[...], layer.query.kernel[...])


def test_a_layer_with_the_softmax_over_the_wrong_axis(rngs, untouched):
    net = nnx.List([randomised(Flat(rngs, axis=-2))])
    error = refused(net, "do not compute", untouched, ConversionError, dialect="flax", dry_run=True)
    assert error.report.model is None
    assert "the old layer is off by" in error.report.layers[0].failures[0]


def test_one_wrong_layer_keeps_all(rngs, untouched):
    net = randomised(Net(Flat, rngs))
    net.named.attention.axis = -2
    error = refused(net, "1 of 5 layers", untouched, ConversionError, dialect="flax", inplace=True)
    assert "named.attention (Flat)" in str(error)


def test_query_and_key_exchanged_are_told(rngs, tmp_path, untouched):
    layer = randomised(Mine(rngs))
    path = dialect(tmp_path, pool=2, out=True, bias=False, axes="IO")
    text = (tmp_path / "mine.toml").read_text().replace('"to_g"', '"x"').replace('"to_f"', '"to_g"')
    (tmp_path / "mine.toml").write_text(text.replace('"x"', '"to_f"'))
    refused(layer, "the old layer is off by", untouched, ConversionError, dialect=path, match=Mine)


def test_zeros_hide_nothing(rngs, untouched):
    layer = randomised(Flat(rngs))
    layer.gamma[...] = jnp.zeros(1)
    report = convert(layer, dialect="flax", match=Flat)
    assert not report.model.gamma[...].any()
    wrong = randomised(Flat(rngs, axis=-2))
    wrong.value.kernel[...] = jnp.zeros((1, 1, C, C))
    refused(wrong, "the old layer is off by", untouched, ConversionError, dialect="flax", match=Flat)


def test_calls_inside_a_compiled_function(rngs):
    class Compiled(Flat):
        @nnx.jit
        def __call__(self, x):
            return super().__call__(x)

    layer = randomised(Compiled(rngs))
    assert_same(convert(layer, dialect="flax", match=Flat).model, layer, images())


class Cyclic(nnx.Module):
    def __init__(self, rngs):
        self.attention = randomised(Flat(rngs))
        self.inner = nnx.Dict(parent=self)

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_that_holds_its_parent(rngs, inplace):
    model = Cyclic(rngs)
    old = nnx.clone(model)
    new = convert(model, dialect="flax", match="attention", inplace=inplace).model
    assert new.inner.parent is new
    assert_same(new, old, images())


def test_matches(rngs, untouched):
    net = randomised(Small(Flat, rngs))
    for match in ((Flat, Mine), "blocks/?", lambda name, _: name == "attention"):
        (layer,) = convert(net, dialect="flax", match=match, dry_run=True).layers
        assert layer.names == ("attention", "blocks.0")
    refused(net, "query lies inside attention, and both match", untouched, dialect="flax", match="attention*")


def test_the_arguments_of_the_old_layer_are_told(rngs):
    class Flagged(Flat):
        def __call__(self, x, train=False):
            self.sow(nnx.Intermediate, "scores", x.sum())
            return super().__call__(x)

    notes = convert(randomised(Flagged(rngs)), dialect="flax", match=Flat).layers[0].notes
    assert any("takes no argument train" in note for note in notes)
    assert any("the old layer sows scores" in note for note in notes)


def sharded(net):
    net.attention.query.kernel.set_metadata(out_sharding=(None, None, None, "model"))


def hooked(net):
    net.attention.gamma.set_metadata(on_get_value=lambda _, value: value)


def tied(net):
    net.stem.extra = nnx.data(net.attention.query.bias)


def tied_inside(net):
    net.attention.query.kernel = net.attention.key.kernel


def abstract(net):
    net.attention.query.kernel.set_value(jax.ShapeDtypeStruct((1, 1, C, DK), jnp.float32))


def abstract_elsewhere(net):
    net.stem.kernel.set_value(jax.ShapeDtypeStruct((5, C), jnp.float32))


def quantised(net):
    net.attention.query.kernel.set_value(jnp.zeros((1, 1, C, DK), jnp.int8))


def narrow(net):
    net.attention.query.kernel.set_value(jnp.zeros((1, 1, C, DK), jnp.float8_e4m3fn))


def compiled(net):
    net.fast = nnx.jit(net.attention)


def bound(net):
    net.call = net.attention.__call__


def partly_evaluating(net):
    net.attention.one = nnx.Dropout(0.0, deterministic=True)
    net.attention.two = nnx.Dropout(0.0, deterministic=False)


def computing_apart(net):
    net.attention.query.dtype = jnp.bfloat16


def referenced(net):
    net.attention.gamma = nnx.Param(jnp.ones(1), ref=True)


def optimised(net):
    net.optimiser = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)


def module_tied(net):
    net.aux = net.attention.query


OBSTACLES = {
    module_tied: "its module attention.query is also aux, and would no longer be shared",
    sharded: "attention .Flat.: query.kernel is sharded, or annotated",
    hooked: "gamma has the hooks on_get_value",
    tied: "query.bias is also a variable of another module",
    tied_inside: "key.kernel and query.kernel are one",
    abstract: "attention.query.kernel .Param. is abstract",
    abstract_elsewhere: "stem.kernel .Param. is abstract",
    quantised: "query.kernel is int8: a quantised layer",
    narrow: "query.kernel is float8_e4m3fn: a quantised layer",
    compiled: "fast .JitWrapped. holds a layer",
    bound: "call .method. holds a layer",
    partly_evaluating: "in training mode in some of its parts only",
    computing_apart: "its projections compute in different ways",
    referenced: "gamma .Param. is a reference",
    optimised: "optimiser .Optimizer. holds a state",
}


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
@pytest.mark.parametrize("spoil", OBSTACLES, ids=lambda spoil: spoil.__name__)
def test_what_stands_against_it(rngs, spoil):
    net = Small(Flat, rngs)
    spoil(net)
    structure = [(name, id(node)) for name, node in places(net)]
    for inplace in (False, True):
        with pytest.raises(PortError, match=OBSTACLES[spoil]) as caught:
            convert(net, dialect="flax", match=Flat, inplace=inplace)
        assert "nothing was replaced" in str(caught.value)
        assert [(name, id(node)) for name, node in places(net)] == structure


def test_every_problem_at_once(rngs, untouched):
    net = randomised(Small(Mine, rngs))
    net.attention.drop.rate = 0.1
    net.attention.other = nnx.Dropout(0.2)
    net.fast = nnx.jit(net.attention)
    error = refused(net, "drops out at a rate of 0.1", untouched, match=Mine)
    assert "drops out at a rate of 0.2" in str(error)
    assert "fast (JitWrapped)" in str(error)


def test_a_function_that_holds_a_part_of_the_model(rngs, untouched):
    net = randomised(Small(Flat, rngs))
    net.call = functools.partial(lambda stem, x: stem(x), net.stem)
    refused(net, "call .partial. holds a part of the model", untouched, dialect="flax", match=Flat)
    assert convert(net, dialect="flax", match=Flat, inplace=True).passed


def test_no_such_layer(rngs, untouched):
    net = Small(Flat, rngs)
    refused(net, "neither dialect nor match", untouched, ValueError)
    refused(net, "has no module that match=", untouched, dialect="flax", match="nowhere")
    refused(net, "has no module with the keys of biggan", untouched, dialect="biggan")
    refused(net, "stem .Linear.: is not flax", untouched, dialect="flax", match=nnx.Linear)
    refused(net, "choose its dialect with dialect=: its keys fit", untouched, match=nnx.Linear)
    refused(net, "attention lies inside the model itself", untouched, dialect="flax", match=(Small, Flat))
    refused(net, "'flux' is unknown", untouched, dialect="flux")


def test_keys_that_two_dialects_fit(rngs, untouched):
    """Ours of Flax and of Keras have the same names, which are named and not chosen."""
    net = randomised(Small(Flat, rngs))
    error = refused(net, "keras, flax", untouched, match=Flat)
    assert "the layer computes what keras and flax describe" in str(error)


def test_a_layer_of_two_inputs(rngs, untouched):
    class Two(Flat):
        def __call__(self, x, other):
            return super().__call__(x) + other

    refused(Two(rngs), "does not run on an input", untouched, dialect="flax", match=Flat)


def test_a_layer_that_returns_something_else(rngs, untouched):
    class Flattened(Flat):
        def __call__(self, x):
            return rows(super().__call__(x))

    class Three(Flat):
        def __call__(self, x):
            return super().__call__(x), x, x

    class Wide(Flat):
        def __call__(self, x):
            return super().__call__(x), jnp.ones((2, 3))

    refused(
        Flattened(rngs),
        "returned an array .* expected y of the same shape",
        untouched,
        dialect="flax",
        match=Flat,
    )
    refused(Three(rngs), "returned .an array", untouched, dialect="flax", match=Flat)
    refused(
        Wide(rngs),
        "returned y and a tensor .2, 3.; expected y and a map",
        untouched,
        dialect="flax",
        match=Flat,
    )


def test_inside_a_traced_function(rngs, untouched):
    net = randomised(Small(Flat, rngs))

    @nnx.jit
    def traced(net):
        convert(net, dialect="flax", match=Flat)

    with pytest.raises(PortError, match="is traced; convert outside"):
        traced(net)


def test_what_is_no_nnx_module(rngs):
    class Describes(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            return flax.linen.Conv(C, (1, 1))(x)

    with pytest.raises(TypeError, match=r"the Linen module Describes, .* `selfattn port`"):
        convert(Describes(), dialect="flax")
    with pytest.raises(
        TypeError, match=r"JitWrapped, expected an nnx.Module: convert the module that it was"
    ):
        convert(nnx.jit(Flat(rngs)), dialect="flax")
    with pytest.raises(TypeError, match=r"dict, expected an nnx.Module"):
        convert({"params": {}}, dialect="flax")


class PoolsWithPadding(Mine):
    """As Mine where windows are whole."""

    def __call__(self, x):
        f, h = (nnx.max_pool(one(x), (2, 2), (2, 2), padding="SAME") for one in (self.to_f, self.to_h))
        A = jax.nn.softmax(rows(self.to_g(x)) @ rows(f).mT)
        return self.gain[...] * self.to_o((A @ rows(h)).reshape(*x.shape[:-1], DV)) + x


class PoolsWhole(Mine):
    """It takes sides that are multiples of 8 alone."""

    def __call__(self, x):
        def pool(maps):
            return maps.reshape(len(x), x.shape[1] // 8, 8, x.shape[2] // 8, 8, -1).max((2, 4))

        A = jax.nn.softmax(rows(self.to_g(x)) @ rows(pool(self.to_f(x))).mT)
        return self.gain[...] * self.to_o((A @ rows(pool(self.to_h(x)))).reshape(*x.shape[:-1], DV)) + x


def test_windows_of_pooling_that_are_cut_off(rngs, tmp_path, untouched):
    mine = dialect(tmp_path, pool=2, out=True, bias=False, axes="IO")
    layer = randomised(PoolsWithPadding(rngs))
    error = refused(layer, "at 17×19 the old layer is off by", untouched, ConversionError, dialect=mine)
    assert "at 8×6" not in str(error)


def test_a_layer_that_takes_whole_windows_alone(rngs, tmp_path):
    mine = dialect(tmp_path, pool=8, out=True, bias=False, axes="IO")
    layer = randomised(PoolsWhole(rngs))
    report = convert(layer, dialect=mine)
    assert any("does not run at 17×25" in note for note in report.layers[0].notes)
    assert_near_floors(report.layers[0])


class MapOfOneSize(Flat):
    def __call__(self, x):
        y, A = super().__call__(x)
        return y, A[:, :48, :48]


class DropsOut(Flat):
    """As a function of `jax.random`, with its own mode."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.deterministic, self.rngs = False, rngs.fork()

    def __call__(self, x):
        y = super().__call__(x)
        if self.deterministic:
            return y
        return x + 2 * (y - x) * jax.random.bernoulli(self.rngs.dropout(), 0.5, y.shape)


class PairInTraining(Flat):
    deterministic = False

    def __call__(self, x):
        y = super().__call__(x)
        return y if self.deterministic else (y, y)


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        (functools.partial(MapOfOneSize, pair=True), "returned y and a tensor", {}),
        (DropsOut, "in training the old layer computes something else", {"size": (4, 3)}),
        (
            PairInTraining,
            "in training mode it returns .an array .*, and in evaluation mode an array",
            {"size": (4, 3)},
        ),
    ],
)
def test_what_shows_at_one_size_or_in_training_alone(rngs, untouched, kind, words, options):
    refused(randomised(kind(rngs)), words, untouched, dialect="flax", match=Flat, **options)


def test_a_map_of_another_shape_is_told(rngs):
    class Heads(Flat):
        def __call__(self, x):
            y, A = super().__call__(x)
            return y, A[:, None]

    report = convert(randomised(Heads(rngs, pair=True)), dialect="flax", size=(4, 3))
    assert "the old map had the shape (2, 1, 12, 12), and the new one has (B, N, M)" in report.layers[0].notes


class Locked(nnx.Module):
    """It keeps what it has."""

    def __init__(self, attention):
        self.attention = attention
        self.locked = True

    def __setattr__(self, name, value):
        if getattr(self, "locked", False):
            raise RuntimeError("is locked")
        super().__setattr__(name, value)


def test_a_place_that_cannot_be_set(rngs, untouched):
    attention = randomised(Flat(rngs))
    net = nnx.Dict({"a": nnx.List([attention]), "b": Locked(attention)})
    options = {"dialect": "flax", "match": Flat, "size": (4, 3)}
    refused(
        net,
        "b.attention of a Locked cannot be set .RuntimeError: is locked",
        untouched,
        inplace=True,
        **options,
    )


def test_a_dry_run_tries_the_copy(rngs, untouched):
    class Handle:
        def __deepcopy__(self, memo):
            raise TypeError("is open")

    net = nnx.Dict({"a": randomised(Flat(rngs)), "b": nnx.Variable(Handle())})
    options = {"dialect": "flax", "match": Flat, "size": (4, 3), "dry_run": True}
    refused(net, "cannot be copied .TypeError: is open.*inplace=True", untouched, **options)
    assert convert(net, inplace=True, **options).passed


def test_power_iterations_are_told(rngs, tmp_path):
    layer = randomised(Spectral(rngs))
    for one in (layer.to_f, layer.to_g, layer.to_h):
        one.n_steps = 4
        kernel = one.layer_instance.kernel
        # Of rank one, so that more iterations give the same.
        kernel.set_value(kernel[:, :, :, :1] * kernel[:, :, :1])
    layer(images())
    report = convert(layer, dialect=dialect(tmp_path, rest=SPECTRAL), size=(4, 3))
    assert (
        "the old layer makes 4 power iterations in each call, and the new one makes 1"
        in report.layers[0].notes
    )


def test_arguments_that_nothing_can_take(rngs, untouched):
    error = refused(
        Flat(rngs), "match=123", untouched, ValueError, dialect="flax", match=123, size=5, block_size=0
    )
    assert "size=5" in str(error)
    assert "block_size=0" in str(error)


DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 3)
from flax import nnx
from tests.porting.test_convert_flax import Flat, images, randomised
from selfattn_flax import convert
layer = randomised(Flat(nnx.Rngs(0)))
there = jax.devices()[2]
nnx.update(layer, jax.device_put(nnx.state(layer), there))
new = convert(layer, dialect="flax", match=Flat).model
assert {leaf.device for leaf in jax.tree.leaves(nnx.state(new))} == {there}
mesh = jax.make_mesh((3,), ("data",))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
nnx.update(layer, jax.device_put(nnx.state(layer), everywhere))
try:
    convert(layer, dialect="flax", match=Flat)
except ValueError as error:
    assert "query.kernel is sharded" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_devices():
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
