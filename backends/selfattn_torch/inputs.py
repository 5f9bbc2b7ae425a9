"""What the PyTorch layer accepts as input, and its messages for everything else."""

import torch
from torch.fx import Proxy
from torch.fx.proxy import TraceError

from selfattn_core import SelfAttentionConfig

__all__ = ["check"]


def check(x: torch.Tensor, config: SelfAttentionConfig) -> None:
    """Refuse an invalid input before anything is computed.

    Args:
        x: the input of the layer.
        config: the config of the layer.

    Raises:
        TypeError: if x is not a tensor, or not floating-point.
        ValueError: if its shape does not fit.
        torch.fx.proxy.TraceError: if `torch.fx` is tracing through the layer.

    Example:
        >>> check(torch.zeros(2, 16, 5, 7), SelfAttentionConfig(16))
    """
    if not isinstance(x, torch.Tensor):
        _refuse(x)
    shape = x.shape
    # The check with the messages takes a fiftieth of a small map's time.
    if not (
        len(shape) == 4
        and shape[1] == config.channels
        and shape[2] >= config.kv_pool <= shape[3]
        and x.is_floating_point()
    ):
        config.check_input(
            shape,
            layout="BCHW or CHW",
            layer="SelfAttention2d",
            dtype=x.dtype,
            floating=x.is_floating_point(),
        )


def _refuse(x: object) -> None:
    """Refuse an input that is not a tensor, unless it overrides torch's functions and so acts as one.

    Args:
        x: an input that is not a `torch.Tensor`.

    Raises:
        TypeError: if it is an array, a list or a similar object.
        torch.fx.proxy.TraceError: if `torch.fx` is tracing through the layer.

    Example:
        >>> _refuse([1.0])
        Traceback (most recent call last):
        ...
        TypeError: SelfAttention2d: got input of type list; expected a torch.Tensor: convert it first, with torch.as_tensor(x).
    """
    if isinstance(x, Proxy):
        raise TraceError(
            "SelfAttention2d: got a torch.fx.Proxy; expected a tensor, because the computation depends on the input's shape. "
            "Use torch.export, or make the layer a leaf: subclass Tracer so that is_leaf_module returns True for it."
        )
    if hasattr(type(x), "__torch_function__"):
        return
    kind = type(x)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    how = "torch.from_numpy(x)" if name == "numpy.ndarray" else "torch.as_tensor(x)"
    raise TypeError(
        f"SelfAttention2d: got input of type {name}; expected a torch.Tensor: convert it first, with {how}."
    )
