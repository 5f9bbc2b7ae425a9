"""A mutant with an error that only a PyTorch layer can have, for the tests of the kit."""

from collections.abc import Mapping

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_torch.conformance.backend import TorchBackend
from selfattn_torch.conformance.model import Model

__all__ = ["PlainGamma"]


class PlainGamma(TorchBackend):
    """A layer whose gamma is a plain tensor instead of a parameter, so it is not trained and not saved."""

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, with its parameter replaced."""
        model = super().build(config, params, dtype, layout)
        gamma = model.layer.gamma.detach()
        del model.layer.gamma
        model.layer.gamma = gamma
        return model
