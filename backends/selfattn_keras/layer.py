"""The layer for Keras 3. `selfattn_core.spec` defines the function that it computes.

Source: Zhang et al., "Self-Attention Generative Adversarial Networks", 2018, section 3.
"""

import copy
import importlib
import math
import zlib
from collections.abc import Sequence
from typing import Any, Self

import keras
from keras import ops

from selfattn_core import SelfAttentionConfig
from selfattn_core.config import check_options
from selfattn_core.params import KV_POOL, projections
from selfattn_keras.projection import Projection
from selfattn_keras.spectral_norm import SpectralConv2D
from selfattn_ops.blocks import check_block_size

# Tensors of the framework, symbolic or not. Keras has no common type for them.
Tensor = Any
Shape = Sequence[int | None]


def _core() -> Any:
    """The attention operators of the framework that Keras runs on, which is fixed when Keras is imported."""
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax", "torch"):
        raise ImportError(
            f"selfattn_keras: got the Keras backend {backend!r}; expected tensorflow, jax or torch: "
            "set KERAS_BACKEND to one of them before keras is imported."
        )
    return importlib.import_module(f"selfattn_ops.{backend}")


_ops = _core()


@keras.saving.register_keras_serializable(package="selfattn")
class SelfAttention2D(keras.layers.Layer):
    """Self-attention over the positions of a feature map.

    ```
    A = softmax(query(x) · key(x)ᵀ)        y = gamma · out(A · value(x)) + x
    ```

    The softmax runs over the keys. gamma starts at zero, so a new layer returns
    its input. Unlike `keras.layers.MultiHeadAttention` there is no 1/sqrt(d)
    scale, and queries and keys can have a different width from values.

    | array | shape |
    |---|---|
    | x, y | (B, H, W, C), or (B, C, H, W) with "channels_first" |
    | A | (B, N, M) in both data formats |

    N = H·W, and M is the number of keys: N, or fewer with `kv_pool`. Row h·W+w
    of A belongs to one output position, its columns to the positions that it
    attends to, and it sums to 1.

    The children `query`, `key`, `value` and, with `out_projection`, `out` are
    1×1 `Conv2D` (`selfattn_keras.projection.Projection`). They are
    channels-last in both data formats and have the same weights in both. In the
    paper f is `key`, g is `query` and h is `value`; much PyTorch code calls the
    query f and the key g. With `spectral_norm` the children are
    `selfattn_keras.spectral_norm.SpectralConv2D`, which divide their raw kernel
    by its spectral norm.

    Args:
        qk_channels: Dk, by default C // 8.
        value_channels: Dv, by default C.
        out_projection: whether `out` maps A · value(x) from Dv back to C
            channels. Required if Dv differs from C.
        use_bias: whether the projections have biases.
        kv_pool: size of the max-pooling window over key and value; 1 means no
            pooling.
        spectral_norm: whether each kernel is divided by its spectral norm. A
            call with `training=True` improves the estimate of the norm by one
            power iteration; any other call changes nothing.
        block_size: how many query positions are computed at a time; None
            chooses by size. Changes memory, not the result.
        data_format: "channels_last" or "channels_first"; by default that of the
            Keras configuration.
        kernel_initializer: initializer of the kernels. Each projection has its
            own copy. If the initializer has a seed, each copy has a seed
            derived from it, so query and key never start equal.
        bias_initializer: initializer of the biases, copied in the same way.
        gamma_initializer: initializer of gamma.
        kernel_regularizer: regularizer of the kernels, a copy for each.
        bias_regularizer: regularizer of the biases, a copy for each.
        gamma_regularizer: regularizer of gamma.
        kernel_constraint: constraint of the kernels, a copy for each.
        bias_constraint: constraint of the biases, a copy for each.
        gamma_constraint: constraint of gamma.
        **kwargs: `name`, `dtype`, `trainable` and the other arguments of
            `keras.layers.Layer`.

    Raises:
        ValueError: if the options do not make a layer, or (when built or
            called) the input's shape does not fit.
        TypeError: if the input is not floating-point.

    Example:
        >>> layer = SelfAttention2D()
        >>> x = keras.random.normal((2, 5, 7, 64))
        >>> bool(ops.all(layer(x) == x))  # gamma is 0 at first
        True
        >>> y, A = layer(x, return_attention_scores=True)
        >>> tuple(A.shape)
        (2, 35, 35)
    """

    def __init__(
        self,
        qk_channels: int | None = None,
        value_channels: int | None = None,
        *,
        out_projection: bool = False,
        use_bias: bool = True,
        kv_pool: int = 1,
        spectral_norm: bool = False,
        block_size: int | None = None,
        data_format: str | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        gamma_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        gamma_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_options(
            qk_channels,
            value_channels,
            out_projection=out_projection,
            use_bias=use_bias,
            kv_pool=kv_pool,
            spectral_norm=spectral_norm,
        )
        data_format = keras.config.image_data_format() if data_format is None else data_format
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f"SelfAttention2D: data_format={data_format!r} must be 'channels_last' or 'channels_first', "
                "or None for that of the Keras configuration."
            )
        self.qk_channels = qk_channels
        self.value_channels = value_channels
        self.out_projection = out_projection
        self.use_bias = use_bias
        self.kv_pool = kv_pool
        self.spectral_norm = spectral_norm
        self.block_size = check_block_size(block_size)
        self.data_format = data_format
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self._config: SelfAttentionConfig | None = None
        self._layout = "BHWC" if data_format == "channels_last" else "BCHW"

    @classmethod
    def from_spec(
        cls,
        config: SelfAttentionConfig,
        *,
        block_size: int | None = None,
        data_format: str | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        gamma_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        gamma_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> Self:
        """A new layer of this config. It is built at once, because the config contains the number of channels.

        The arguments are those of `SelfAttention2D`. (`from_config` is Keras' own, and takes the result of `get_config`.)
        """
        layer = cls(
            config.qk_channels,
            config.value_channels,
            out_projection=config.out_projection,
            use_bias=config.use_bias,
            kv_pool=config.kv_pool,
            spectral_norm=config.spectral_norm,
            block_size=block_size,
            data_format=data_format,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            gamma_initializer=gamma_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            gamma_regularizer=gamma_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        layer.build(tuple(config.channels if axis == "C" else None for axis in layer._layout))
        return layer

    @property
    def config(self) -> SelfAttentionConfig:
        """The options of the layer, once it is built.

        Raises:
            ValueError: if the layer is not built yet, so its number of channels is unknown.
        """
        if self._config is None:
            raise ValueError(
                "SelfAttention2D: config exists once the layer is built, because the input sets the number of channels. "
                "Call the layer first, or create it with SelfAttention2D.from_spec."
            )
        return self._config

    def build(self, input_shape: Shape) -> None:
        """Create the projections and gamma for the channels of this input."""
        config = self._config_for(input_shape)
        config.check_input(input_shape, layout=self._layout, layer="SelfAttention2D")
        projection = SpectralConv2D if self.spectral_norm else Projection
        for name, (channels_in, channels_out) in projections(config).items():
            conv = projection(
                channels_out,
                1,
                data_format="channels_last",
                use_bias=config.use_bias,
                kernel_initializer=own_copy(self.kernel_initializer, name),
                bias_initializer=own_copy(self.bias_initializer, name),
                kernel_regularizer=own_copy(self.kernel_regularizer, name),
                bias_regularizer=own_copy(self.bias_regularizer, name),
                kernel_constraint=own_copy(self.kernel_constraint, name),
                bias_constraint=own_copy(self.bias_constraint, name),
                dtype=self.dtype_policy,
                name=name,
            )
            setattr(self, name, conv)
            conv.build((None, None, None, channels_in))
        self.gamma = self.add_weight(
            name="gamma",
            shape=(1,),
            initializer=self.gamma_initializer,
            regularizer=self.gamma_regularizer,
            constraint=self.gamma_constraint,
            # The residual is computed in float32, so gamma must not be rounded to the compute dtype first.
            autocast=False,
        )
        self._config = config
        self.input_spec = keras.InputSpec(ndim=4, axes={self._layout.index("C"): config.channels})

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; see `call`."""
        # Checked before Keras builds the layer and compares with input_spec, because its message gives no advice.
        if hasattr(x, "shape"):
            self._check(x)
        return super().__call__(x, *args, **kwargs)

    def call(self, x: Tensor, *, return_attention_scores: bool = False, training: bool | None = None) -> Any:
        """The output and, on request, the map, which takes N·M numbers of memory.

        Args:
            x: (B, H, W, C), or (B, C, H, W) with "channels_first".
            return_attention_scores: whether to return (y, A) instead of y.
            training: whether this is a step of training. Only spectral norm uses it.

        Raises:
            ValueError: if the input's shape does not fit. If a `tf.function` is traced with an unknown map size, its calls
                raise `tf.errors.InvalidArgumentError` instead. Compiled by XLA, which has no assertions, they raise nothing.
        """
        self._check(x)
        # For some dtypes TensorFlow has no channels-first convolution on the CPU, and Keras adds its bias to the wrong
        # axis if W equals the number of channels. For a 1×1 kernel the two formats are equivalent.
        maps = x if self.data_format == "channels_last" else ops.transpose(x, (0, 2, 3, 1))  # (B, H, W, C)
        _check_running(maps, self.kv_pool)
        given, maps = maps, _never_empty(maps)
        batch, height, width = ops.shape(maps)[:3]
        # Passed on explicitly, because Keras' own context contains it in `__call__`, but not in `stateless_call`.
        mode = {} if training is None else {"training": training}
        query = _rows(self.query(maps, **mode))  # (B, N, Dk)
        key = _rows(_pool(self.key(maps, **mode), self.kv_pool))  # (B, M, Dk)
        value = _rows(_pool(self.value(maps, **mode), self.kv_pool))  # (B, M, Dv)
        if return_attention_scores:
            attended, attention = _ops.attend_with_map(query, key, value, block_size=self.block_size)
        else:
            attended = _ops.attend(query, key, value, block_size=self.block_size)  # (B, N, Dv)
        attended = ops.reshape(attended, (batch, height, width, value.shape[-1]))  # (B, H, W, Dv)
        if self.out_projection:
            attended = self.out(attended, **mode)  # (B, H, W, C)
        arithmetic = "float64" if self.compute_dtype == "float64" else "float32"
        gamma, attended, maps = (ops.cast(term, arithmetic) for term in (self.gamma, attended, maps))
        y = ops.cast(gamma * attended + maps, self.compute_dtype)  # (B, H, W, C)
        y = y if maps is given else y[: ops.shape(given)[0]]
        y = y if self.data_format == "channels_last" else ops.transpose(y, (0, 3, 1, 2))  # the shape of x
        if not return_attention_scores:
            return y
        return y, (attention if maps is given else attention[: ops.shape(given)[0]])

    def compute_output_shape(self, input_shape: Shape) -> tuple[int | None, ...]:
        """The shape of y, which equals that of x."""
        return tuple(input_shape)

    def compute_output_spec(
        self,
        x: Tensor,
        *,
        return_attention_scores: bool = False,
        training: bool | None = None,  # noqa: ARG002 - shapes are the same
    ) -> Any:
        """Shapes and dtypes of the result of `call`. Sizes that are not known yet stay None."""
        self._check(x)
        y = keras.KerasTensor(x.shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return y
        sizes = dict(zip(self._layout, x.shape, strict=True))
        grid = (sizes["H"], sizes["W"])
        positions, keys = (
            None if None in grid else math.prod(side // window for side in grid)
            for window in (1, self.kv_pool)
        )
        return y, keras.KerasTensor((sizes["B"], positions, keys), dtype=self.compute_dtype)

    def save_own_variables(self, store: Any) -> None:
        """Put the weights into the store. In an HDF5 file, add the pooling, which no weight shows."""
        super().save_own_variables(store)
        # Keras has no other way to write an attribute, and would count one more array as a weight.
        group = getattr(store, "_h5_entry_group", None)
        if group is not None and hasattr(group, "attrs"):
            group.attrs[KV_POOL] = str(self.kv_pool)

    def get_config(self) -> dict[str, Any]:
        """Every argument of the constructor, for `from_config`."""
        config: dict[str, Any] = super().get_config()
        for name in (
            "qk_channels",
            "value_channels",
            "out_projection",
            "use_bias",
            "kv_pool",
            "spectral_norm",
        ):
            config[name] = getattr(self, name)
        config |= {"block_size": self.block_size, "data_format": self.data_format}
        for name in ("kernel", "bias", "gamma"):
            config[f"{name}_initializer"] = keras.initializers.serialize(getattr(self, f"{name}_initializer"))
            config[f"{name}_regularizer"] = keras.regularizers.serialize(getattr(self, f"{name}_regularizer"))
            config[f"{name}_constraint"] = keras.constraints.serialize(getattr(self, f"{name}_constraint"))
        return config

    def _config_for(self, input_shape: Shape) -> SelfAttentionConfig:
        """The config that follows from the layer's options and the channels of this input."""
        shape = tuple(input_shape)
        channels = shape[self._layout.index("C")] if len(shape) == 4 else None
        if channels is None:
            problem = "its channels must be known" if len(shape) == 4 else f"its rank is {len(shape)}"
            raise ValueError(
                f"SelfAttention2D: got input of shape {shape}; expected ({', '.join(self._layout)}): {problem}."
            )
        return SelfAttentionConfig(
            channels,
            self.qk_channels,
            self.value_channels,
            out_projection=self.out_projection,
            use_bias=self.use_bias,
            kv_pool=self.kv_pool,
            spectral_norm=self.spectral_norm,
        )

    def _check(self, x: Tensor) -> None:
        dtype = keras.backend.standardize_dtype(x.dtype)
        config = self._config or self._config_for(x.shape)
        config.check_input(
            x.shape,
            layout=self._layout,
            layer="SelfAttention2D",
            dtype=dtype,
            floating=keras.backend.is_float_dtype(dtype),
        )


def _pool(maps: Tensor, side: int) -> Tensor:
    """(B, H, W, D) to (B, H // side, W // side, D): the first largest value of each window, or NaN if it contains one.

    On TensorFlow this replaces `ops.max_pool`, which ignores NaN and whose second derivative under XLA is wrong or missing.
    Windows are made by reshaping there, because strided slices and their gradients take ten times as long.
    """
    if side == 1:
        return maps
    if keras.backend.backend() != "tensorflow":
        return ops.max_pool(maps, side, side, data_format="channels_last")
    batch, height, width, channels = ops.shape(maps)
    down, across = height // side, width // side
    if not (isinstance(height, int) and isinstance(width, int) and height % side == width % side == 0):
        maps = maps[:, : down * side, : across * side]
    windows = ops.reshape(maps, (batch, down, side, across, side * channels))
    candidates = [
        candidate
        for row in ops.unstack(windows, num=side, axis=2)
        for candidate in ops.split(row, side, axis=-1)
    ]
    largest = candidates[0]
    for candidate in candidates[1:]:
        wins = ops.logical_or(candidate > largest, ops.isnan(candidate))
        largest = ops.where(wins, candidate, largest)
    return largest


def _rows(maps: Tensor) -> Tensor:
    """(B, H, W, D) to (B, N, D), positions in row-major order."""
    batch, height, width, channels = ops.shape(maps)
    return ops.reshape(maps, (batch, height * width, channels))


def _check_running(maps: Tensor, side: int) -> None:
    """Refuse maps (B, H, W, C) smaller than a pooling window if only TensorFlow's running graph knows their size."""
    if side == 1 or keras.backend.backend() != "tensorflow" or None not in maps.shape[1:3]:
        return
    tf = importlib.import_module("tensorflow")
    tf.debugging.assert_greater_equal(
        tf.shape(maps)[1:3],
        side,
        f"SelfAttention2D: its map of (H, W) positions is smaller than one {side}×{side} pooling window "
        f"(kv_pool={side}).",
    )


def _never_empty(maps: Tensor) -> Tensor:
    """Maps (B, H, W, C). If B is 0 on TensorFlow, one sample of zeros, because a convolution of no sample fails there."""
    if keras.backend.backend() != "tensorflow" or maps.shape[0]:
        return maps
    batch, *sizes = ops.shape(maps)
    missing = ops.cast(ops.equal(batch, 0), "int32")
    return ops.concatenate([maps, ops.zeros((missing, *sizes), maps.dtype)], axis=0)


def own_copy(option: Any, child: str) -> Any:
    """A child's own copy of an initializer, regularizer or constraint.

    Random initializers draw from a fixed seed. If query and key shared one, or copies with the same seed, they would get
    the same values. A `SeedGenerator` advances with each draw and is meant to be shared.
    """
    config = option.get_config() if isinstance(option, keras.initializers.Initializer) else {}
    if "seed" not in config:
        return copy.deepcopy(option)
    if isinstance(config["seed"], int):
        config["seed"] = zlib.crc32(f"{child} {config['seed']}".encode()) % 2**31
    elif config["seed"] is not None:
        return option
    return type(option).from_config(config)
