"""The error messages of the PyTorch layer for an input that is not a tensor."""

from torch.fx import Proxy
from torch.fx.proxy import TraceError

__all__ = ["refuse"]


def refuse(x: object) -> None:
    """Refuse an input that is not a tensor, unless it overrides torch's functions and so acts as one.

    Args:
        x: an input that is not a `torch.Tensor`.

    Raises:
        TypeError: if it is an array, a list or a similar object.
        torch.fx.proxy.TraceError: if `torch.fx` is tracing through the layer.

    Example:
        >>> refuse([1.0])
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
