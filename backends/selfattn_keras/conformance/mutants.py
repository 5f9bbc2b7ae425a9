"""Mutants with errors that only a Keras layer can have, for the tests of the kit."""

from collections.abc import Mapping
from typing import Any

import keras

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_keras.conformance.backend import KerasBackend
from selfattn_keras.conformance.model import Model
from selfattn_keras.layer import SelfAttention2D, Tensor

__all__ = ["GammaUntracked", "MovesInEvaluation", "ProjectsAnew"]


class GammaUntracked(KerasBackend):
    """A layer whose gamma is a variable of the framework, such as `tf.Variable`. Keras 3 does not train or save it."""

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, with its weight replaced."""
        model = super().build(config, params, dtype, layout)
        gamma = model.layer.gamma.value
        del model.layer.gamma
        model.layer.gamma = gamma
        return model


class ProjectsAnew(KerasBackend):
    """A layer that creates the value projection in `call`, so every call has different weights."""

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The broken layer, with these weights in the variables that it keeps."""
        layer = _ProjectingAnew.from_spec(config, data_format=layout, dtype=dtype)
        return self.eager(self.update(Model(layer), params))


class MovesInEvaluation(KerasBackend):
    """A layer whose spectral norm moves in every pass, like Keras' wrapper when it is called without `training`."""

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The broken layer with these weights."""
        layer = _MovingAlways.from_spec(config, data_format=layout, dtype=dtype)
        model = self.update(Model(layer), params)
        return self.compiled(model) if keras.backend.backend() == "jax" else self.eager(model)


class _MovingAlways(SelfAttention2D):
    def call(self, x: Tensor, *, return_attention_scores: bool = False, training: bool | None = None) -> Any:
        y = super().call(x, return_attention_scores=return_attention_scores, training=training)
        self.query.normalised_kernel(training=True)
        return y


class _ProjectingAnew(SelfAttention2D):
    def call(self, x: Tensor, *, return_attention_scores: bool = False, training: bool | None = None) -> Any:
        value = keras.layers.Conv2D(
            self.config.value_channels, 1, data_format="channels_last", dtype=self.dtype_policy
        )
        # Set past Keras, which would refuse because the layer is built.
        object.__setattr__(self, "value", value)
        return super().call(x, return_attention_scores=return_attention_scores, training=training)
