"""A 1×1 convolution divided by its spectral norm; the numerics are those of `selfattn_core.spectral_norm`."""

import importlib
import math
import warnings
from typing import Any

import keras
from keras import ops

from selfattn_core.spectral_norm import EPS, WARM_UP, converged, fallback
from selfattn_keras.projection import Projection

__all__ = ["SpectralConv2D"]

# Tensors of the backend; Keras has no common type for them.
Tensor = Any


@keras.saving.register_keras_serializable(package="selfattn")
class SpectralConv2D(Projection):
    """A 1×1 `keras.layers.Conv2D` that applies kernel / sigma, sigma = vᵀ K u, where K is `kernel` as (C_in, C_out).

    `kernel` is the raw kernel, which is what is trained. A call with `training=True` first moves the non-trainable
    weights `u` and `v` by one power iteration, any other call does not; both are constants to the gradient, which goes
    through K in sigma. Where vᵀ K u is 0, as for a kernel of zeros, sigma is the constant 1. Unlike
    `keras.layers.SpectralNormalization` it leaves the raw kernel as it is.

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

        # v follows from u, so that each can have an initializer of its own, which may be called late.
        self.u = self.add_weight(name="u", shape=(channels_out,), initializer=initial_u, trainable=False)
        self.v = self.add_weight(name="v", shape=(channels_in,), initializer=initial_v, trainable=False)

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras, but the weight is read in its own dtype rather than in that of the computation."""
        return super().add_weight(*args, autocast=False, **kwargs)

    def normalised_kernel(self, training: bool | None = None) -> Tensor:
        """The kernel that is applied, (1, 1, C_in, C_out); in training, after one power iteration."""
        matrix = self._matrix()
        if training and not _is_repeating():
            u, v = _power_iteration(ops.stop_gradient(matrix), ops.cast(self.v, matrix.dtype))
            self.u.assign(ops.cast(u, self.u.dtype))
            self.v.assign(ops.cast(v, self.v.dtype))
        u, v = (ops.stop_gradient(ops.cast(vector, matrix.dtype)) for vector in (self.u, self.v))
        # A tensor of its own: the variables may move again before the gradient is computed.
        direction = v[:, None] * u
        sigma = ops.sum(matrix * direction)
        divisor = ops.where(ops.not_equal(sigma, 0), sigma, ops.ones_like(sigma))
        normalised = ops.cast(matrix / divisor, self.variable_dtype)
        return ops.reshape(normalised, self.kernel.shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """The convolution of the inputs (B, H, W, C_in).

        Args:
            inputs: the maps.
            training: whether u and v move first.
        """
        return self.project(inputs, ops.cast(self.normalised_kernel(training), self.compute_dtype))

    def save_own_variables(self, store: Any) -> None:
        """Put the weights into the store, the state by its names."""
        super().save_own_variables(store)
        if self.built:
            store["u"], store["v"] = self.u, self.v

    def load_own_variables(self, store: Any) -> None:
        """Take the weights out of the store; u and v that are not there are made from the kernel, with a warning."""
        found = {name: store[name] for name in store.keys()}  # noqa: SIM118 - an HDF5 store has no iterator
        absent = [name for name in ("u", "v") if name not in found]
        # Keras counts what there is.
        super().load_own_variables(found | dict.fromkeys(absent) if self.built else found)
        if not self.built:
            return
        if not absent:
            self.u.assign(found["u"])
            self.v.assign(found["v"])
            return
        self.refresh_state()
        warnings.warn(
            f"{self.path}: got weights without {' and '.join(absent)}; expected the vectors of the spectral norm: "
            "they were computed from the kernel that was loaded, as refresh_spectral_norm does.",
            stacklevel=2,
        )

    def refresh_state(self) -> None:
        """Make u and v those of the present kernel, as power iterations without end would; see `refresh_spectral_norm`."""
        u, v = converged(ops.convert_to_numpy(self._matrix()))
        self.u.assign(ops.cast(u, self.u.dtype))
        self.v.assign(ops.cast(v, self.v.dtype))

    def _matrix(self) -> Tensor:
        """K, (C_in, C_out), in at least float32."""
        arithmetic = "float64" if self.variable_dtype == "float64" else "float32"
        return ops.cast(ops.reshape(self.kernel, (-1, self.filters)), arithmetic)


def _is_repeating() -> bool:
    """Whether this call computes once more what has been computed before, as Keras' rematerialisation does on torch.

    On TensorFlow and JAX, Keras 3.15 refuses to rematerialise a layer that is told whether it trains.
    """
    if keras.backend.backend() != "torch":
        return False
    torch = importlib.import_module("torch")
    module_tracker = importlib.import_module("torch.utils.module_tracker")
    return not torch.compiler.is_compiling() and module_tracker.ModuleTracker().is_bw


def _power_iteration(matrix: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The state after one more iteration. Products and sums: a matrix product may be rounded on an accelerator."""
    u = _normalised(ops.sum(matrix * v[:, None], 0))
    return u, _normalised(ops.sum(matrix * u, 1))


def _normalised(vector: Tensor) -> Tensor:
    instead = ops.cast(fallback(vector.shape[0]), vector.dtype)
    vector = ops.where(ops.any(ops.not_equal(vector, 0)), vector, instead)
    norm = ops.sqrt(ops.sum(ops.square(vector)))
    # Not `ops.maximum`, which Keras 3.15 computes in float32 on torch.
    return vector / ops.clip(norm, EPS, math.inf)
