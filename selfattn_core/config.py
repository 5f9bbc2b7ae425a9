"""The options of a layer, `SelfAttentionConfig`, and all checks of options and input shapes."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

__all__ = ["SelfAttentionConfig", "check_options"]


@dataclass(frozen=True, init=False)
class SelfAttentionConfig:
    """The widths and switches that make one 2-D self-attention layer.

    ```
    q = x Wq + bq           k = pool(x Wk + bk)         v = pool(x Wv + bv)
    A = softmax(q kᵀ)       y = gamma · (A v Wo + bo) + x
    ```

    Widths are resolved when the config is made, so `qk_channels` is never None. The defaults make the layer that the
    paper draws. `pooled` makes the layer of the authors' code and of BigGAN.

    Args:
        channels: C, channels of the feature map.
        qk_channels: Dk, channels of query and key; by default C // 8.
        value_channels: Dv, channels of the value; by default C.
        out_projection: whether a fourth projection takes A v from Dv back to C channels.
        use_bias: whether all projections have biases, or no projection has.
        kv_pool: p, side in positions of the max-pooling window (stride p, floor) over key and value. 1 means no pooling.
        spectral_norm: whether every kernel is divided by its spectral norm, which training estimates by one power
            iteration per step.

    Raises:
        ValueError: if the options do not make a layer. The message lists every problem.

    Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3. The paper calls the
    key f, the query g and the value h; much PyTorch code has f as the query and g as the key, and the authors'
    code has theta, phi and g for query, key and value.

    Example:
        >>> SelfAttentionConfig(64)
        SelfAttentionConfig(channels=64, qk_channels=8, value_channels=64, out_projection=False, use_bias=True, kv_pool=1, spectral_norm=False)
        >>> SelfAttentionConfig(4)
        Traceback (most recent call last):
        ...
        ValueError: SelfAttentionConfig: channels=4 is below 8, so the default qk_channels = channels // 8 would be 0: pass qk_channels, for example qk_channels=1.
    """

    channels: int
    qk_channels: int
    value_channels: int
    out_projection: bool
    use_bias: bool
    kv_pool: int
    spectral_norm: bool

    def __init__(
        self,
        channels: int,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        *,
        out_projection: bool = False,
        use_bias: bool = True,
        kv_pool: int = 1,
        spectral_norm: bool = False,
    ) -> None:
        problems = _option_problems(
            qk_channels, value_channels, out_projection, use_bias, kv_pool, spectral_norm
        )
        width = _width(channels)
        if width is None:
            problems.insert(0, f"channels={channels!r} must be a positive integer")
        else:
            if qk_channels is None and width < 8:
                problems.append(
                    f"channels={width} is below 8, so the default qk_channels = channels // 8 would be 0: "
                    "pass qk_channels, for example qk_channels=1"
                )
            value_width = _width(value_channels)
            if out_projection is False and value_width not in (None, width):
                problems.append(
                    f"value_channels={value_channels} differs from channels={width}, but without an out projection "
                    f"the two are added: pass out_projection=True, or value_channels={width}"
                )
        if problems:
            raise ValueError(f"SelfAttentionConfig: {'; '.join(problems)}.")
        channels = operator.index(channels)
        object.__setattr__(self, "channels", channels)
        object.__setattr__(
            self, "qk_channels", channels // 8 if qk_channels is None else operator.index(qk_channels)
        )
        object.__setattr__(
            self, "value_channels", channels if value_channels is None else operator.index(value_channels)
        )
        object.__setattr__(self, "out_projection", out_projection)
        object.__setattr__(self, "use_bias", use_bias)
        object.__setattr__(self, "kv_pool", operator.index(kv_pool))
        object.__setattr__(self, "spectral_norm", spectral_norm)

    @classmethod
    def pooled(cls, channels: int, *, spectral_norm: bool = False) -> "SelfAttentionConfig":
        """The layer of the official SAGAN code and of BigGAN: Dv = C // 2, out projection, no biases, 2×2 pooling.

        Args:
            channels: C, at least 8.
            spectral_norm: see `SelfAttentionConfig`. Both codes train with it.

        Raises:
            ValueError: if `channels` is not an integer of at least 8.

        Source: github.com/brain-research/self-attention-gan, `sn_non_local_block_sim`.

        Example:
            >>> SelfAttentionConfig.pooled(64).value_channels
            32
        """
        width = _width(channels)
        half = None if width is None or width < 8 else width // 2
        return cls(
            channels, None, half, out_projection=True, use_bias=False, kv_pool=2, spectral_norm=spectral_norm
        )

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> "SelfAttentionConfig":
        """Make a config from the result of `to_dict`.

        Args:
            options: field names and values. Absent fields take their defaults.

        Raises:
            ValueError: if a name is unknown, `channels` is absent or a value is out of range.

        Example:
            >>> SelfAttentionConfig.from_dict({"channels": 16, "kv_pool": 2}).qk_channels
            2
        """
        known = [field.name for field in fields(cls)]
        problems = [f"unknown option {name!r}" for name in options if name not in known]
        if "channels" not in options:
            problems.append("'channels' is missing")
        if problems:
            raise ValueError(
                f"SelfAttentionConfig: {'; '.join(problems)}; the options are {', '.join(known)}."
            )
        return cls(**options)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, int | bool]:
        """All fields, resolved, in a form that JSON can store.

        Example:
            >>> SelfAttentionConfig(16).to_dict()["qk_channels"]
            2
        """
        return asdict(self)

    def key_grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid of keys (H', W') over a map of H×W positions. M = H'·W'.

        Example:
            >>> SelfAttentionConfig.pooled(64).key_grid(5, 8)
            (2, 4)
        """
        return height // self.kv_pool, width // self.kv_pool

    def check_input(
        self,
        shape: Sequence[int | None],
        *,
        layout: str = "BHWC",
        layer: str = "self-attention",
        dtype: object = None,
        floating: bool = True,
    ) -> None:
        """Refuse an invalid input before anything is computed.

        Args:
            shape: the input's shape, with None for a size that is not known yet.
            layout: the accepted axes, one letter each, for example "BHWC" or "BCHW". A leading "…" allows any
                number of leading axes. " or " separates several layouts.
            layer: name of the layer in the message.
            dtype: the input's dtype, for the message.
            floating: whether that dtype is a real floating-point one.

        Raises:
            TypeError: if the input is not floating-point.
            ValueError: if rank, channels or map size do not fit. The message lists every problem.

        Example:
            >>> SelfAttentionConfig(16).check_input((2, 5, 7, 12))
            Traceback (most recent call last):
            ...
            ValueError: self-attention: got input of shape (2, 5, 7, 12); expected (B, H, W, 16): its 12 channels should be 16.
        """
        sizes = tuple(shape)
        layouts = layout.split(" or ")
        if not floating:
            raise TypeError(
                f"{layer}: got input of dtype {dtype}; expected floating point: convert it first, "
                "for example to float32."
            )
        axes = next((axes for axes in layouts if _fits(axes, len(sizes))), None)
        if axes is None:
            raise ValueError(f"{self._received(sizes, layer, layouts)}: its rank is {len(sizes)}.")
        spatial = axes.removeprefix("…")
        offset = len(sizes) - len(spatial)
        channels = sizes[offset + spatial.index("C")]
        grid = [sizes[offset + spatial.index("H")], sizes[offset + spatial.index("W")]]
        problems = []
        if channels is not None and channels != self.channels:
            problems.append(f"its {channels} channels should be {self.channels}")
        if any(side is not None and side < self.kv_pool for side in grid):
            problems.append(
                f"its map of {grid[0]}×{grid[1]} positions is smaller than one "
                + (
                    f"{self.kv_pool}×{self.kv_pool} pooling window (kv_pool={self.kv_pool})"
                    if self.kv_pool > 1
                    else "position"
                )
            )
        if problems:
            raise ValueError(f"{self._received(sizes, layer, layouts)}: {'; '.join(problems)}.")

    def _received(self, sizes: tuple[int | None, ...], layer: str, layouts: Sequence[str]) -> str:
        # Computed only if there is a problem, because the check runs at every call.
        wanted = " or ".join(self._describe(axes) for axes in layouts)
        return f"{layer}: got input of shape {sizes}; expected {wanted}"

    def _describe(self, axes: str) -> str:
        letters = [str(self.channels) if letter == "C" else letter for letter in axes]
        return f"({', '.join(letters)})"


def check_options(
    qk_channels: int | None = None,
    value_channels: int | None = None,
    *,
    out_projection: bool = False,
    use_bias: bool = True,
    kv_pool: int = 1,
    spectral_norm: bool = False,
) -> None:
    """Check the options before the number of channels is known, for layers that infer it.

    Args:
        qk_channels: see `SelfAttentionConfig`.
        value_channels: see `SelfAttentionConfig`.
        out_projection: see `SelfAttentionConfig`.
        use_bias: see `SelfAttentionConfig`.
        kv_pool: see `SelfAttentionConfig`.
        spectral_norm: see `SelfAttentionConfig`.

    Raises:
        ValueError: if an option is invalid for every number of channels. It lists every problem.

    Example:
        >>> check_options(qk_channels=0)
        Traceback (most recent call last):
        ...
        ValueError: SelfAttentionConfig: qk_channels=0 must be a positive integer, or None for channels // 8.
    """
    problems = _option_problems(qk_channels, value_channels, out_projection, use_bias, kv_pool, spectral_norm)
    if problems:
        raise ValueError(f"SelfAttentionConfig: {'; '.join(problems)}.")


def _option_problems(
    qk_channels: object,
    value_channels: object,
    out_projection: object,
    use_bias: object,
    kv_pool: object,
    spectral_norm: object,
) -> list[str]:
    problems = []
    if qk_channels is not None and _width(qk_channels) is None:
        problems.append(f"qk_channels={qk_channels!r} must be a positive integer, or None for channels // 8")
    if value_channels is not None and _width(value_channels) is None:
        problems.append(f"value_channels={value_channels!r} must be a positive integer, or None for channels")
    problems += [
        f"{name}={flag!r} must be True or False"
        for name, flag in (
            ("out_projection", out_projection),
            ("use_bias", use_bias),
            ("spectral_norm", spectral_norm),
        )
        if not isinstance(flag, bool)
    ]
    if _width(kv_pool) is None:
        problems.append(
            f"kv_pool={kv_pool!r} must be a positive integer: 1 for no pooling, 2 for 2×2 windows"
        )
    return problems


def _width(value: object) -> int | None:
    """The value as a positive int, or None if it is not one. True and 8.0 are not."""
    if isinstance(value, bool):
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if number > 0 else None


def _fits(axes: str, rank: int) -> bool:
    return rank >= len(axes) - 1 if axes.startswith("…") else rank == len(axes)
