"""SAGAN-style 2-D self-attention for PyTorch."""

from selfattn_core import __version__
from selfattn_core.installed import require

require("selfattn_torch", ["torch"], "torch")

from selfattn_torch.converting.conversion import convert  # noqa: E402 - the message above must come first
from selfattn_torch.layer import SelfAttention2d  # noqa: E402
from selfattn_torch.maps import attention_grid  # noqa: E402
from selfattn_torch.spectral_norm import refresh_spectral_norm  # noqa: E402
from selfattn_torch.weights import from_canonical, load, save, to_canonical  # noqa: E402
from selfattn_torch.with_map import SelfAttention2dWithMap  # noqa: E402

__all__ = [
    "SelfAttention2d",
    "SelfAttention2dWithMap",
    "__version__",
    "attention_grid",
    "convert",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
