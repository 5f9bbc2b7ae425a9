"""A 1×1 convolution divided by its spectral norm, with the numerics of `selfattn_core.spectral_norm`."""

import importlib
import math
import warnings
from typing import Any

import keras
from keras import ops

from selfattn_core.spectral_norm import EPS, WARM_UP, converged, fallback
from selfattn_keras.projection import Projection

__all__ = ["SpectralConv2D"]

# Tensors of the framework. Keras has no common type for them.
Tensor = Any


@keras.saving.register_keras_serializable(package="selfattn")
class SpectralConv2D(Projection):
    """A 1×1 `keras.layers.Conv2D` that applies kernel / sigma, sigma = vᵀ K u, where K is `kernel` as (C_in, C_out).

    `kernel` is the raw kernel, and it is trained. A call with `training=True` first moves the non-trainable weights `u` and
    `v` by one power iteration. Any other call does not. The gradient treats u and v as constants and goes through K in
    sigma. If vᵀ K u is 0, as for a kernel of zeros, sigma is the constant 1. Unlike `keras.layers.SpectralNormalization`,
    this layer does not change the raw kernel.

    The arguments are those of `keras.layers.Conv2D`.

    Example:
        >>> conv = SpectralConv2D(3, 1)
        >>> for _ in range(100):
        ...     y = conv(keras.random.normal((1, 2, 2, 6)), training=True)
        >>> round(float(ops.norm(conv.normalised_kernel()[0, 0], 2)), 3)
        1.0
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create kernel, bias, u and v."""
        super().build(input_shape)
        draw = keras.initializers.RandomNormal(
            stddev=1.0, seed=getattr(self.kernel_initializer, "seed", None)
        )
        channels_in, channels_out = self._matrix().shape

        def initial_u(shape: tuple[int, ...], dtype: str) -> Tensor:  # noqa: ARG001 - Keras' signature
            matrix = self._matrix()
            v = draw((channels_in,), matrix.dtype)
            for _ in range(WARM_UP):
                u, v = _power_iteration(matrix, v)
            return ops.cast(u, dtype)

        def initial_v(shape: tuple[int, ...], dtype: str) -> Tensor:  # noqa: ARG001
            matrix = self._matrix()
            return ops.cast(_normalised(ops.sum(matrix * ops.cast(self.u, matrix.dtype), 1)), dtype)

        # v is computed from u, so that each can have its own initializer, even if Keras calls it late.
        self.u = self.add_weight(name="u", shape=(channels_out,), initializer=initial_u, trainable=False)
        self.v = self.add_weight(name="v", shape=(channels_in,), initializer=initial_v, trainable=False)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras, but the weight is read in its own dtype instead of that of the computation."""
        return super().add_weight(*args, autocast=False, **kwargs)

    def normalised_kernel(self, training: bool | None = None) -> Tensor:
        """The divided kernel (1, 1, C_in, C_out). In training, one power iteration runs first."""
        matrix = self._matrix()
        if training and not _is_repeating():
            u, v = _power_iteration(ops.stop_gradient(matrix), ops.cast(self.v, matrix.dtype))
            self.u.assign(ops.cast(u, self.u.dtype))
            self.v.assign(ops.cast(v, self.v.dtype))
        u, v = (ops.stop_gradient(ops.cast(vector, matrix.dtype)) for vector in (self.u, self.v))
        # New tensors, because the variables may move again before the gradient is computed.
        direction = v[:, None] * u
        sigma = ops.sum(matrix * direction)
        divisor = ops.where(ops.not_equal(sigma, 0), sigma, ops.ones_like(sigma))
        normalised = ops.cast(matrix / divisor, self.variable_dtype)
        return ops.reshape(normalised, self.kernel.shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in).

        Args:
            inputs: feature maps (B, H, W, C_in).
            training: whether u and v move first.
        """
        return self.project(inputs, ops.cast(self.normalised_kernel(training), self.compute_dtype))

    def save_own_variables(self, store: Any) -> None:
        """Put the weights into the store, with u and v under these names."""
        super().save_own_variables(store)
        if self.built:
            store["u"], store["v"] = self.u, self.v

    def load_own_variables(self, store: Any) -> None:
        """Take the weights from the store. Missing u and v are computed from the kernel, with a warning."""
        found = {name: store[name] for name in store.keys()}  # noqa: SIM118 - an HDF5 store has no iterator
        absent = [name for name in ("u", "v") if name not in found]
        # Keras compares the number of arrays in the store.
        super().load_own_variables(found | dict.fromkeys(absent) if self.built else found)
        if not self.built:
            return
        if not absent:
            self.u.assign(found["u"])
            self.v.assign(found["v"])
            return
        self.refresh_state()
        warnings.warn(
            f"{self.path}: got weights without {' and '.join(absent)}; expected the vectors of the spectral norm. They "
            "were computed from the loaded kernel, as refresh_spectral_norm does.",
            stacklevel=2,
        )

    def refresh_state(self) -> None:
        """Set u and v to the limit of power iterations on the current kernel; see `refresh_spectral_norm`."""
        u, v = converged(ops.convert_to_numpy(self._matrix()))
        self.u.assign(ops.cast(u, self.u.dtype))
        self.v.assign(ops.cast(v, self.v.dtype))

    def _matrix(self) -> Tensor:
        """The kernel as a matrix (C_in, C_out), in at least float32."""
        arithmetic = "float64" if self.variable_dtype == "float64" else "float32"
        return ops.cast(ops.reshape(self.kernel, (-1, self.filters)), arithmetic)


def _is_repeating() -> bool:
    """Whether this call repeats an earlier one, as Keras' rematerialisation does on torch.

    On TensorFlow and JAX, Keras 3.15 refuses to rematerialise a layer that is called with `training`.
    """
    if keras.backend.backend() != "torch":
        return False
    torch = importlib.import_module("torch")
    module_tracker = importlib.import_module("torch.utils.module_tracker")
    return not torch.compiler.is_compiling() and module_tracker.ModuleTracker().is_bw


def _power_iteration(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The state after one more iteration. It uses products and sums: an accelerator may round a matrix product."""
    u = _normalised(ops.sum(matrix * v[:, None], 0))
    return u, _normalised(ops.sum(matrix * u, 1))


def _normalised(vector: Tensor) -> Tensor:
    instead = ops.cast(fallback(vector.shape[0]), vector.dtype)
    vector = ops.where(ops.any(ops.not_equal(vector, 0)), vector, instead)
    norm = ops.sqrt(ops.sum(ops.square(vector)))
    # Keras 3.15 computes `ops.maximum` in float32 on torch, so it is not used here.
    return vector / ops.clip(norm, EPS, math.inf)
