"""A mutant for the kit's own tests: what layers of PyTorch get wrong that numpy cannot show."""

from collections.abc import Mapping

from selfattn_core import SelfAttentionConfig
from selfattn_core.arrays import Array
from selfattn_torch.conformance.backend import TorchBackend
from selfattn_torch.conformance.model import Model

__all__ = ["PlainGamma"]


class PlainGamma(TorchBackend):
    """Gamma is a tensor and no parameter, so that it is neither trained nor saved."""

    def build(
        self, config: SelfAttentionConfig, params: Mapping[str, Array], dtype: str, layout: str
    ) -> Model:
        """The layer, with its parameter replaced."""
        model = super().build(config, params, dtype, layout)
        gamma = model.layer.gamma.detach()
        del model.layer.gamma
        model.layer.gamma = gamma
        return model
