"""A Flax layer whose answers are on the first device, even if another one is requested."""

import jax

from selfattn_flax.conformance.backend import FlaxBackend, nnx_backend


class Strays(FlaxBackend):
    def __init__(self):
        super().__init__("strays", nnx_backend.kind)

    def forward(self, model, x):
        with jax.default_device(jax.devices("cpu")[0]):
            return super().forward(model, x)
