"""What `selfattn_keras.convert` refuses, with the model untouched."""

import keras
import pytest
from keras import layers, ops

from selfattn_core.porting.converting import ConversionError
from selfattn_core.porting.errors import PortError
from selfattn_keras import convert
from tests.porting.keras_checks.foreign import (
    Block,
    Flat,
    Generator,
    Normalised,
    Uncopied,
    WrongAxis,
    arrays,
    assert_untouched,
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


def _nothing_said():
    return _built(Flat(16)), {"dialect": None}


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


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (_unbuilt, "has no weights yet; build it"),
        (_no_match, "no layer with the keys of keras.*its layers are of Conv2D, Sequential"),
        (_no_such_layer, "is not keras .*it has no query"),
        (_quantised, "is quantised .*convert the floating-point model"),
        (_lent, "is a layer of lent.* too, and the two would part"),
        (_in_a_graph, "in the graph of the model .Sequential., which Keras cannot change"),
        (_uncopied, "strength of uncopied.*is 0.5.*inplace=True"),
        (_several_dialects, "say with dialect= what it is: its keys fit .*keras"),
        (_normalised, "SpectralNormalization"),
        (_nested, "attention lies inside the model, and both match"),
        (_nothing_said, "say with dialect="),
        (_no_layer, "got a builtins.object; expected a model or a layer of Keras 3"),
        (_unused_map, "the model cannot be copied"),
        (_two_inputs, "does not run on an input .*more than one input"),
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


def test_a_word_that_returns_does_not_know():
    with pytest.raises(ValueError, match="expected 'same' or 'output'"):
        convert(Flat(16), dialect="keras", returns="map")
