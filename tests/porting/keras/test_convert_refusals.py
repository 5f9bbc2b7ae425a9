"""What `selfattn_keras.convert` refuses, with the model untouched."""

import keras
import pytest
from keras import layers, ops

from selfattn_core.porting.errors import PortError
from selfattn_core.porting.networks.conversion import ConversionError
from selfattn_keras import convert
from tests.porting.keras.foreign import (
    Block,
    Book,
    Flat,
    Generator,
    Normalised,
    Small,
    Uncopied,
    WrongAxis,
    arrays,
    assert_untouched,
    rows,
    shaken,
)


def test_constraints_go_over_and_others_are_refused():
    old = Flat(16, rule=keras.constraints.MaxNorm(0.7, axis=[0, 1, 2]))
    old(ops.zeros((1, 5, 4, 16)))
    old.gamma.regularizer = keras.regularizers.L2(0.1)
    shaken(old)
    new = convert(old, dialect="keras", match=Flat).model
    assert new.value.kernel.constraint.max_value == 0.7
    penalty, wanted = (float(ops.convert_to_numpy(each.losses[0])) for each in (new, old))
    assert penalty == pytest.approx(wanted)
    old.value.kernel.constraint = None
    with pytest.raises(PortError, match="constraint MaxNorm of its kernels is not the same everywhere"):
        convert(old, dialect="keras", match=Flat)


def test_a_layer_that_computes_something_else_is_refused():
    old = shaken(keras.Sequential([keras.Input((5, 4, 16)), Flat(16), WrongAxis(16, name="wrong")]))
    before, held = arrays(old), list(old.layers)
    with pytest.raises(ConversionError, match=r"1 of 2 layers .*\n.*wrong \(WrongAxis\).*off by y"):
        convert(old, dialect="keras", match=Flat)
    assert_untouched(old, before)
    assert old.layers == held


def test_zeros_hide_nothing():
    """A layer whose value begins with zeros adds nothing: it is asked with other numbers there."""
    old = shaken(keras.Sequential([keras.Input((5, 4, 16)), Flat(16)]))
    for each in old.layers[-1].value.weights:
        each.assign(ops.zeros_like(each))
    (layer,) = convert(old, dialect="keras", dry_run=True).layers
    assert layer.old["y"] > 0


def _built(layer, shape=(1, 5, 4, 16)):
    layer(ops.zeros(shape))
    return layer


def _unbuilt():
    return Flat(16), {"match": Flat}


def _no_match():
    return _built(keras.Sequential([layers.Conv2D(16, 1)])), {}


def _no_such_layer():
    return _built(keras.Sequential([layers.Conv2D(16, 1, name="conv")])), {"match": "conv"}


def _quantised():
    class Matrices(Flat):
        def __init__(self, channels):
            layers.Layer.__init__(self)
            self.query, self.key, self.value = (layers.Dense(width) for width in (2, 2, channels))
            self.gamma = self.add_weight(shape=(1,), initializer="zeros", name="gamma")
            self.data_format, self.pair = "channels_last", False

    layer = _built(Matrices(16))
    layer.query.quantize("int8")
    return layer, {"match": Flat}


def _lent():
    class Lent(Generator):
        def __init__(self):
            super().__init__()
            self.first_query = self._last.query

    return _built(Lent(), (1, 5, 4, 3)), {"match": Flat}


def _in_a_graph():
    return _built(keras.Sequential([keras.Input((5, 4, 16)), Flat(16, name="a")])), {
        "match": Flat,
        "inplace": True,
    }


def _uncopied():
    model = _built(Uncopied(16), (1, 5, 4, 3))
    model.strength = 0.5
    return model, {"match": Flat}


def _several_dialects():
    return _built(Flat(16)), {"match": Flat, "dialect": None}


def _normalised():
    return _built(Normalised(16)), {"match": Flat}


def _nested():
    return _built(Block(16)), {"match": (Block, Flat)}


def _no_layer():
    return object(), {"match": Flat}


def _unused_map():
    inputs = keras.Input((5, 4, 16))
    y, attention = Flat(16, pair=True, name="a")(inputs)
    return keras.Model(inputs, [y, attention]), {"match": Flat, "returns": "output"}


def _two_inputs():
    class Two(Flat):
        def call(self, x, other):
            return super().call(x + other)

    layer = Two(16)
    layer(ops.zeros((1, 5, 4, 16)), ops.zeros((1, 5, 4, 16)))
    return layer, {"match": Flat}


def _cut_windows():
    class Cut(Book):
        def call(self, x):
            keys, values = (
                rows(ops.max_pool(f(x), 2, 2, padding="same")) for f in (self.conv_phi, self.conv_g)
            )
            scores = ops.matmul(rows(self.conv_theta(x)), ops.transpose(keys, (0, 2, 1)))
            attended = ops.reshape(ops.matmul(ops.softmax(scores), values), (-1, *x.shape[1:3], 8))
            return x + self.sigma * self.conv_attn_g(attended)

    return shaken(_built(Cut(16), (1, 5, 7, 16))), {"match": Book, "dialect": "keras-book"}


def _dropout():
    class Dropped(Flat):
        def call(self, x, training=False):
            y = super().call(x)
            return x + keras.random.dropout(y - x, 0.5, seed=3) if training else y

    return _built(Dropped(16)), {"match": Flat}


def _pair_in_training():
    class Pair(Flat):
        def call(self, x, training=False):
            self.pair = training
            return super().call(x)

    return _built(Pair(16)), {"match": Flat}


class Forgetful(layers.Layer):
    def __init__(self, scale=(1.0,), act="relu", **options):
        super().__init__(**options)
        self._scale, self.act = {"by": list(scale)}, keras.activations.get(act)
        self.bent = lambda x: self.act(scale[0] * x)
        self.attention = Flat(16)

    def call(self, x):
        return self.attention(self.bent(x))

    def get_config(self):
        return super().get_config()


def _forgetful():
    return _built(keras.Sequential([Forgetful((3.0,), "tanh")])), {"match": Flat, "dry_run": True}


def _compiled():
    class Compiled(Small):
        def call(self, x):
            return self.attention(x)

        # What tf.function leaves on a function.
        call.python_function = call

    return _built(Compiled()), {"match": Flat, "inplace": True}


def _frozen():
    class Frozen(keras.Model):
        def __init__(self):
            super().__init__()
            self.several, self.last = [Flat(16), (Flat(16),)], Flat(16)
            self.done = True

        def __setattr__(self, name, value):
            if name == "last" and getattr(self, "done", False):
                raise RuntimeError("no more")
            super().__setattr__(name, value)

        def call(self, x):
            return self.last(self.several[1][0](self.several[0](x)))

    return _built(Frozen()), {"match": Flat, "inplace": True}


class Strong(Flat):
    def call(self, x, strength=1.0):
        return x + strength * (super().call(x) - x)


def _argument():
    inputs = keras.Input((5, 4, 16))
    return keras.Model(inputs, Strong(16, name="a")(inputs, strength=0.5)), {"match": Flat}


def _other_policy():
    layer = Flat(16)
    layer.key.dtype_policy = "mixed_bfloat16"
    return _built(layer), {"match": Flat}


def test_what_goes_is_noted():
    class Losing(Strong):
        def call(self, x, strength=1.0):
            self.add_loss(ops.mean(ops.square(self.gamma)))
            return super().call(x, strength)

    notes = " ".join(convert(_built(Losing(16)), dialect="keras", match=Flat).layers[0].notes)
    assert "takes strength too" in notes
    assert "add_loss" in notes


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (_unbuilt, "has no weights yet; build it"),
        (_no_match, "no layer with the keys of keras.*Its layers are of the classes Conv2D, Sequential"),
        (_no_such_layer, "is not keras .*it has no query"),
        (_quantised, "is quantised .*convert the floating-point model"),
        (_lent, "is a layer of lent.* too, and would no longer be shared"),
        (_in_a_graph, "in the graph of the model .Sequential., which Keras cannot change"),
        (_uncopied, "strength of uncopied.*is 0.5.*inplace=True"),
        (_several_dialects, "choose its dialect with dialect=: its keys fit .*keras"),
        (_normalised, "SpectralNormalization"),
        (_nested, "attention lies inside the model, and both match"),
        (_no_layer, "got a builtins.object; expected a model or a layer of Keras 3"),
        (_unused_map, "the model cannot be copied"),
        (_cut_windows, "at 5×7 the old layer is off by y"),
        (_dropout, "in training the old layer computes something else"),
        (_pair_in_training, r"returns y alone in evaluation, and .y, A. in training"),
        (_forgetful, "_scale of .*act of .*bent of "),
        (_compiled, "call of .*is compiled"),
        (_frozen, "last cannot be set: RuntimeError: no more"),
        (_argument, "a .Strong.: the graph of .* calls it with x and strength"),
        (_other_policy, "has the dtype policy mixed_bfloat16, and the layer float32"),
        (_two_inputs, "does not run on an input .*several inputs"),
    ],
)
def test_bad_input(case, said):
    model, options = case()
    held = model._flatten_layers() if isinstance(model, layers.Layer) else []
    before = arrays(model) if held else []
    with pytest.raises(PortError, match=f"(?s){said}"):
        convert(model, **({"dialect": "keras"} | options))
    if held:
        assert model._flatten_layers() == held
        assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"returns": "map"}, "expected 'same' or 'output'"),
        ({"dialect": None}, "neither dialect nor match"),
        ({"match": 123, "size": 5}, "match=123.*size=5"),
    ],
)
def test_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        convert(Flat(16), **({"dialect": "keras"} | options))
