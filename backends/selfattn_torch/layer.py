"""The layer for PyTorch. `selfattn_core.spec` defines the function that it computes.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3.
"""

from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, overload

import torch
from torch import nn

from selfattn_core import SelfAttentionConfig
from selfattn_core.params import KV_POOL, projections
from selfattn_ops.blocks import check_block_size
from selfattn_ops.torch import attend_transposed, attend_with_map
from selfattn_torch.inputs import check
from selfattn_torch.migrate import accept_older
from selfattn_torch.projection import Projection, project
from selfattn_torch.spectral_norm import SpectralConv2d

__all__ = ["SelfAttention2d", "scaled_sum"]


class SelfAttention2d(nn.Module):
    """Self-attention over the positions of a feature map.

    ```
    A = softmax(query(x) · key(x)ᵀ)        y = gamma · out(A · value(x)) + x
    ```

    The softmax runs over the keys. gamma starts at zero, so a new layer returns
    its input. Unlike `nn.MultiheadAttention` there is no 1/sqrt(d) scale, and
    queries and keys can have a different width from values.

    | array | shape |
    |---|---|
    | x, y | (B, C, H, W) or (C, H, W) |
    | A | (B, N, M) or (N, M) |

    N = H·W, and M is the number of keys: N, or fewer with `kv_pool`. Row h·W+w
    of A belongs to one output position, its columns to the positions that it
    attends to, and it sums to 1.

    The children `query`, `key`, `value` and, with `out_projection`, `out` are
    plain 1×1 `nn.Conv2d`. In the paper f is `key`, g is `query` and h is
    `value`; much PyTorch code calls the query f and the key g. With
    `spectral_norm` the children are
    `selfattn_torch.spectral_norm.SpectralConv2d`, which divide their raw weight
    by its spectral norm.

    The page "Features" of the documentation explains how the layer works with
    `torch.compile`, exporters and FSDP2.

    Args:
        in_channels: C.
        qk_channels: Dk, by default C // 8.
        value_channels: Dv, by default C.
        out_projection: whether `out` maps A · value(x) from Dv back to C
            channels. Required if Dv differs from C.
        bias: whether the projections have biases.
        kv_pool: size of the max-pooling window over key and value; 1 means no
            pooling.
        spectral_norm: whether each kernel is divided by its spectral norm. A
            forward pass in training mode improves the estimate of the norm by
            one power iteration; a pass in evaluation mode changes nothing. With
            activation checkpointing, run the backward pass of each forward pass
            before the next forward pass: see `SpectralConv2d`.
        block_size: how many query positions are computed at a time; None
            chooses by size. Changes memory, not the result.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if the options do not make a layer, or (when called) the
            input's shape does not fit.
        TypeError: if the input is not a tensor or not floating-point.
        NotImplementedError: from `torch.jit.script`, which the layer does not
            support.

    Example:
        >>> layer = SelfAttention2d(64)
        >>> x = torch.randn(2, 64, 5, 7)
        >>> torch.equal(layer(x), x)  # gamma is 0 at first
        True
        >>> y, A = layer(x, need_weights=True)
        >>> A.shape
        torch.Size([2, 35, 35])
    """

    config: SelfAttentionConfig

    def __init__(
        self,
        in_channels: int,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        *,
        out_projection: bool = False,
        bias: bool = True,
        kv_pool: int = 1,
        spectral_norm: bool = False,
        block_size: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = SelfAttentionConfig(
            in_channels,
            qk_channels,
            value_channels,
            out_projection=out_projection,
            use_bias=bias,
            kv_pool=kv_pool,
            spectral_norm=spectral_norm,
        )
        self.block_size = check_block_size(block_size)
        conv = SpectralConv2d if spectral_norm else Projection
        for name, widths in projections(self.config).items():
            self.add_module(name, conv(*widths, 1, bias=bias, device=device, dtype=dtype))
        self.gamma = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(accept_older)

    @classmethod
    def from_config(
        cls,
        config: SelfAttentionConfig,
        *,
        block_size: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A new layer of this config."""
        return cls(
            config.channels,
            config.qk_channels,
            config.value_channels,
            out_projection=config.out_projection,
            bias=config.use_bias,
            kv_pool=config.kv_pool,
            spectral_norm=config.spectral_norm,
            block_size=block_size,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self) -> None:
        """Draw new parameters (Glorot-uniform kernels, zero biases and gamma) and a new state of spectral norm."""
        for name in projections(self.config):
            self.get_submodule(name).reset_parameters()
        nn.init.zeros_(self.gamma)

    @overload
    def forward(self, x: torch.Tensor, need_weights: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, need_weights: Literal[True]) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, need_weights: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The output and, on request, the map, which takes N·M numbers of memory.

        Args:
            x: (B, C, H, W) or (C, H, W). A DTensor can be sharded along B and H: see `selfattn_torch.parallel`.
            need_weights: whether to return (y, A) instead of y.
        """
        if type(x) is not torch.Tensor and hasattr(type(x), "device_mesh"):
            # Most programs need no DTensor, and its module takes time to import.
            from selfattn_torch.parallel.sharded import attend_shards  # noqa: PLC0415

            return attend_shards(self, x, need_weights=need_weights)
        check(x, self.config)
        maps = x if x.dim() == 4 else x.unsqueeze(0)  # (B, C, H, W)
        pool = self.config.kv_pool
        query, key, value = project(maps, *self._projections(), flat=pool == 1)
        if pool > 1:
            query = query.flatten(2)
            key, value = (
                nn.functional.max_pool2d(operand, pool, pool).flatten(2) for operand in (key, value)
            )
        # query (B, Dk, N), key (B, Dk, M) and value (B, Dv, M), positions in row-major order
        if need_weights:
            # The older converters do not support `.mT`.
            rows = (operand.transpose(-2, -1) for operand in (query, key, value))
            attended, attention = attend_with_map(*rows, block_size=self.block_size)  # (B, N, Dv)
            attended = attended.transpose(-2, -1)
        else:
            attended = attend_transposed(query, key, value, block_size=self.block_size)  # (B, Dv, N)
        attended = attended.unflatten(-1, maps.shape[2:])  # (B, Dv, H, W)
        if self.config.out_projection:
            (attended,) = project(attended, self.out, flat=False)  # (B, C, H, W)
        y = scaled_sum(maps, self.gamma, attended)  # (B, C, H, W)
        y = y if x.dim() == 4 else y.squeeze(0)
        if not need_weights:
            return y
        return y, (attention if x.dim() == 4 else attention.squeeze(0))

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        # `self.query` would search three dictionaries, which counts on a small map.
        children: Any = self._modules
        return children["query"], children["key"], children["value"]

    if TYPE_CHECKING:
        # torch declares that calling a module returns Any. With `__call__ = forward` pyright still infers Any.
        @overload
        def __call__(self, x: torch.Tensor, need_weights: Literal[False] = False) -> torch.Tensor: ...
        @overload
        def __call__(
            self, x: torch.Tensor, need_weights: Literal[True]
        ) -> tuple[torch.Tensor, torch.Tensor]: ...
        def __call__(self, x: torch.Tensor, need_weights: bool = False) -> Any:
            """Call the layer with its hooks; see `forward`."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save the weights, and put the pooling, which no weight shows, into the metadata of the state dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        versions = getattr(destination, "_metadata", {})
        # `selfattn port` and `load` read it. The names in the state dict stay the same.
        versions.get(prefix.removesuffix("."), {})[KV_POOL] = self.config.kv_pool

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which calls this method first, also for a layer inside another module."""
        raise NotImplementedError(
            "SelfAttention2d: got a call of torch.jit.script, which cannot compile the layer; expected torch.export, or tracing: "
            "torch.jit.trace(layer, x) returns a module that you can use inside a scripted one."
        )

    def extra_repr(self) -> str:
        """The config, and the block size if it is set."""
        options: dict[str, Any] = self.config.to_dict()
        channels, options["bias"] = options.pop("channels"), options.pop("use_bias")
        if self.block_size is not None:
            options["block_size"] = self.block_size
        return ", ".join([str(channels), *(f"{name}={value}" for name, value in options.items())])


def scaled_sum(maps: torch.Tensor, gain: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Gain times attended, plus maps: the residual sum of the layer."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # Core ML's converter does not support addcmul. Outside an export, a product and a sum would take up to a third
        # longer and another feature map of memory.
        return maps + gain.view(1, 1, 1, 1) * attended
    return torch.addcmul(maps, gain, attended)
