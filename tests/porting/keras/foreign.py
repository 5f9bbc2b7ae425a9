"""Attention layers of somebody else's, and models with them, for the checks of `selfattn_keras.convert`."""

import keras
import numpy as np
from keras import layers, ops

FRAMEWORK = keras.backend.backend()
EPS = float(np.finfo(np.float32).eps)


def rows(maps):
    return ops.reshape(maps, (-1, maps.shape[1] * maps.shape[2], maps.shape[3]))


@keras.saving.register_keras_serializable("tests")
class Flat(layers.Layer):
    """With biases, and the names of our own layer; returns y, or (y, A)."""

    axis = -1

    def __init__(self, channels, pair=False, data_format="channels_last", rule=None, **options):
        super().__init__(**options)
        self.pair, self.data_format = pair, data_format
        same = {"data_format": data_format, "dtype": self.dtype_policy, "kernel_constraint": rule}
        self.query = layers.Conv2D(channels // 8, 1, **same)
        self.key = layers.Conv2D(channels // 8, 1, **same)
        self.value = layers.Conv2D(channels, 1, **same)
        self.gamma = self.add_weight(shape=(1,), initializer="zeros", name="gamma")

    def call(self, x):
        last = self.data_format == "channels_last"
        turned = (lambda maps: maps) if last else (lambda maps: ops.transpose(maps, (0, 2, 3, 1)))
        q, k, v = (rows(turned(conv(x))) for conv in (self.query, self.key, self.value))
        attention = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))), self.axis)
        height, width = x.shape[1:3] if last else x.shape[2:]
        attended = ops.reshape(ops.matmul(attention, v), (-1, height, width, v.shape[-1]))
        y = self.gamma * (attended if last else ops.transpose(attended, (0, 3, 1, 2))) + x
        return (y, attention) if self.pair else y


class WrongAxis(Flat):
    """The softmax over the queries."""

    axis = 1


class Stopped(Flat):
    """Right forwards, with a gradient that stops at the keys."""

    def call(self, x):
        q, k, v = rows(self.query(x)), rows(self.key(x)), rows(self.value(x))
        attention = ops.softmax(ops.matmul(q, ops.transpose(ops.stop_gradient(k), (0, 2, 1))), -1)
        return self.gamma * ops.reshape(ops.matmul(attention, v), (-1, *x.shape[1:])) + x


class Normalised(Flat):
    """In wrappers of Keras'."""

    def __init__(self, channels, **options):
        layers.Layer.__init__(self, **options)
        self.query, self.key, self.value = (
            layers.SpectralNormalization(layers.Conv2D(width, 1)) for width in (2, 2, channels)
        )
        self.gamma = self.add_weight(shape=(1,), initializer="zeros", name="gamma")
        self.data_format, self.pair = "channels_last", False


@keras.saving.register_keras_serializable("tests")
class Book(layers.Layer):
    """Pooled, with a projection of the output, built for one size, and without a `get_config`; as in the book."""

    def __init__(self, channels, **options):
        super().__init__(**options)
        self.conv_theta = layers.Conv2D(channels // 8, 1)
        self.conv_phi = layers.Conv2D(channels // 8, 1)
        self.conv_g = layers.Conv2D(channels // 2, 1)
        self.conv_attn_g = layers.Conv2D(channels, 1)
        self.not_to_be_copied = object()

    def build(self, shape):
        _, self.height, self.width, self.channels = shape
        self.sigma = self.add_weight(shape=(1,), initializer="zeros", name="sigma")

    def call(self, x):
        places = self.height * self.width
        theta = ops.reshape(self.conv_theta(x), (-1, places, self.channels // 8))
        phi = ops.reshape(ops.max_pool(self.conv_phi(x), 2, 2), (-1, places // 4, self.channels // 8))
        g = ops.reshape(ops.max_pool(self.conv_g(x), 2, 2), (-1, places // 4, self.channels // 2))
        attended = ops.matmul(ops.softmax(ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))), g)
        attended = ops.reshape(attended, (-1, self.height, self.width, self.channels // 2))
        return x + self.sigma * self.conv_attn_g(attended)


class Dense(layers.Layer):
    """Matrices without biases, kept as (C_out, C_in) in a dict, and a gain that is no vector."""

    def __init__(self, channels, **options):
        super().__init__(**options)
        for name, width in (("q", 3), ("k", 3), ("v", channels)):
            setattr(self, name, self.add_weight(shape=(width, channels), name=name))
        self.gain = self.add_weight(shape=(), initializer="zeros", name="gain")

    def call(self, x):
        q, k, v = (ops.matmul(rows(x), ops.transpose(each)) for each in (self.q, self.k, self.v))
        attended = ops.matmul(ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1)))), v)
        return x + self.gain * ops.reshape(attended, (-1, *x.shape[1:]))


DENSE = """
name = "dense"
title = "of the test"
source = "here"
layout = "BHWC"

[layer]
out_projection = false
use_bias = false
kv_pool = 1

[roles]
query = "vars/0"
key = "vars/1"
value = "vars/2"

[gamma]
key = "vars/3"

[[kernels]]
axes = "OI"
kernel = "{path}"

[[variants]]
name = "only"
"""


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer with an attention inside."""

    def __init__(self, channels, **options):
        super().__init__(**options)
        self.channels = channels
        self.before = layers.Conv2D(channels, 3, padding="same")
        self.attention = Flat(channels)

    def call(self, x):
        return self.attention(ops.relu(self.before(x)))

    def get_config(self):
        return super().get_config() | {"channels": self.channels}


@keras.saving.register_keras_serializable("tests")
class Generator(keras.Model):
    """Layers as attributes: one by itself, some in lists and dicts, one twice."""

    def __init__(self, channels=16, **options):
        super().__init__(**options)
        self.channels = channels
        self.first = layers.Conv2D(channels, 3, padding="same")
        self.stages = [layers.Conv2D(channels, 1), Flat(channels, name="a"), [Flat(channels, name="b")]]
        self.named = {"again": self.stages[1], "norm": layers.BatchNormalization()}
        self.several = (Flat(channels, pair=True, name="c"), layers.Dropout(0.3))
        self._last = Flat(channels, name="d")

    def call(self, x, training=False):
        x = self.first(x)
        for stage in (*self.stages[:2], self.stages[2][0], self.named["again"], self.named["norm"]):
            x = stage(x, training=training) if stage is self.named["norm"] else stage(x)
        x, attention = self.several[0](x)
        x = self.several[1](x, training=training) + ops.mean(attention)
        return self._last(x)

    def get_config(self):
        return super().get_config() | {"channels": self.channels}


class Small(keras.Model):
    """An attention and nothing else."""

    def __init__(self):
        super().__init__()
        self.attention = Flat(16)

    def call(self, x):
        return self.attention(x)


class Uncopied(Generator):
    """With something that its config does not say."""

    def __init__(self, channels=16, **options):
        super().__init__(channels, **options)
        self.strength = 1.0


def shaken(model, seed=0, scale=0.4):
    """A model whose weights are all drawn, those of variances positive."""
    generator = np.random.default_rng(seed)
    for each in model.weights:
        if not np.issubdtype(keras.backend.standardize_dtype(each.dtype), np.integer):
            drawn = generator.standard_normal(each.shape) * scale
            each.assign(np.abs(drawn) + 0.5 if "variance" in each.path else drawn)
    return model


def arrays(model):
    return [(each.path, ops.convert_to_numpy(each)) for each in model.variables]


def assert_untouched(model, before):
    for (path, array), (other, now) in zip(before, arrays(model), strict=True):
        assert path == other
        np.testing.assert_array_equal(array, now)


def output(model, x):
    found = model(keras.tree.map_structure(ops.convert_to_tensor, x), training=False)
    return [np.float64(ops.convert_to_numpy(each)) for each in keras.tree.flatten(found)]


def assert_same_function(old, new, x):
    """As far apart at most as 32 times what half a unit in the last place of every weight moves the old network by."""
    want = output(old, x)
    kept = old.get_weights()
    generator = np.random.default_rng(1)
    old.set_weights([each * (1 + EPS * generator.uniform(-1, 1, each.shape)) for each in kept])
    moved = output(old, x)
    old.set_weights(kept)
    got = output(new, x)
    assert len(got) == len(want)
    for each, other, one in zip(want, moved, got, strict=True):
        assert each.shape == one.shape
        assert np.abs(each - one).max() <= 32 * np.abs(each - other).max()
        assert np.abs(each).max() > 1e4 * np.abs(each - other).max()


def image(*shape, seed=3):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def functional():
    """Everything that must stay: names, shared layers, frozen ones, states; the attention is called at two sites."""
    picture = keras.Input((5, 4, 3), name="picture")
    label = keras.Input((4,), name="label")
    trunk = keras.Sequential(
        [keras.Input((5, 4, 16)), Flat(16, name="inner"), layers.Conv2D(16, 1)], name="trunk"
    )
    shared = layers.Conv2D(16, 1, name="shared")
    attention = Flat(16, name="attention")
    x = layers.Conv2D(16, 3, padding="same", name="frozen", trainable=False)(picture)
    x = layers.BatchNormalization(name="norm")(attention(shared(x)))
    x = layers.Lambda(lambda maps: FACTOR * maps, name="factor")(layers.Dropout(0.5, name="drop")(x))
    x = trunk(ops.relu(shared(attention(x))) + layers.Reshape((1, 1, 16))(layers.Dense(16)(label)))
    y, attended = Flat(16, pair=True, name="pair")(x)
    model = keras.Model(
        {"picture": picture, "label": label}, [Block(16, name="block")(y), attended], name="whole"
    )
    model.get_layer("shared").bias.trainable = False
    return shaken(model, scale=0.2)


FACTOR = 1.5
