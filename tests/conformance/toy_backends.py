"""Backends for testing the kit: the numpy spec behind the protocol, and broken copies of it.

Named "module:Class" on the command line, like anybody's own backend.
"""

import os
import signal
import sys
import time

import numpy as np

from selfattn_core import spec


class Good:
    name = "good"

    def versions(self):
        return {"toy": "1"}

    def claims(self):
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self):
        return ("channels_last",)

    def build(self, config, params, dtype, layout):
        return config, {name: array.astype(dtype) for name, array in params.items()}

    def forward(self, model, x):
        return spec.forward(*model, x)

    def attention_map(self, model, x):
        return spec.attention_map(*model, x)

    def vjp(self, model, x, dy):
        return spec.vjp(*model, x, dy)

    def r1(self, model, x, w):
        return spec.r1(*model, x, w)

    def params(self, model):
        return model[1]


class Changed(Good):
    """A backend that computes with changed weights."""

    def change(self, params):
        return params

    def build(self, config, params, dtype, layout):
        return config, params | self.change(params)

    def params(self, model):
        return model[1]


class QueryKeyExchanged(Changed):
    def change(self, params):
        swap = {"query": "key", "key": "query"}
        return {
            name: params[f"{swap[name.split('.')[0]]}.{name.split('.')[1]}"]
            for name in params
            if name[:1] in "qk"
        }


class Scaled(Changed):
    def change(self, params):
        scale = params["query.kernel"].shape[1] ** -0.5
        return {
            name: (params[name] * scale).astype(params[name].dtype)
            for name in params
            if name.startswith("query")
        }


class WithoutKeyBias(Changed):
    def change(self, params):
        return {"key.bias": np.zeros_like(params["key.bias"])} if "key.bias" in params else {}


class GammaDropped(Changed):
    def change(self, params):
        return {"gamma": np.ones_like(params["gamma"])}


class SoftmaxOverQueries(Good):
    def attention_map(self, model, x):
        A = super().attention_map(model, x)
        return A / np.maximum(A.sum(axis=1, keepdims=True), 1e-30)


class MapTransposed(Good):
    def attention_map(self, model, x):
        A = super().attention_map(model, x)
        return A.swapaxes(1, 2) if A.shape[1] == A.shape[2] else A


class PositionsTransposed(Good):
    def forward(self, model, x):
        y = super().forward(model, x)
        term = (y - x).reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        return term.swapaxes(1, 2) + x


class ResidualDropped(Good):
    def forward(self, model, x):
        return super().forward(model, x) - x


class GradientWithoutRowSum(Good):
    def vjp(self, model, x, dy):
        gradients = super().vjp(model, x, dy)
        return gradients | {
            "query.kernel": gradients["query.kernel"] * gradients["query.kernel"].dtype.type(1.001)
        }


class NoGradientOfGamma(Good):
    def vjp(self, model, x, dy):
        gradients = super().vjp(model, x, dy)
        return gradients | {"gamma": np.zeros_like(gradients["gamma"])}


class FirstOrderPenalty(Good):
    """The gradient of a penalty whose attention map is treated as a constant."""

    def r1(self, model, x, w):
        value, gradients = super().r1(model, x, w)
        return value, gradients | {"query.kernel": np.zeros_like(gradients["query.kernel"])}


class LowPrecision(Good):
    def forward(self, model, x):
        config, params = model
        narrow = {name: array.astype(np.float16).astype(array.dtype) for name, array in params.items()}
        return spec.forward(config, narrow, x)


class WrongShape(Good):
    def forward(self, model, x):
        return super().forward(model, x)[:, :1]


class WrongDtype(Good):
    def forward(self, model, x):
        return super().forward(model, x).astype(np.float16)


class NotANumber(Good):
    def forward(self, model, x):
        return super().forward(model, x) * np.nan


class WrongNames(Good):
    def vjp(self, model, x, dy):
        return {name.replace("kernel", "weight"): value for name, value in super().vjp(model, x, dy).items()}


class Raises(Good):
    def forward(self, model, x):
        raise RuntimeError("a bug in here")


class Talks(Good):
    def forward(self, model, x):
        print("hello " * 1000)  # noqa: T201 - a backend may print
        sys.stderr.write("noise\n")
        return super().forward(model, x)


class Dies(Good):
    def attention_map(self, model, x):
        os.kill(os.getpid(), signal.SIGSEGV)


class Leaves(Good):
    def attention_map(self, model, x):
        os._exit(9)


class Hangs(Good):
    def attention_map(self, model, x):
        time.sleep(600)


class InferenceOnly:
    """The least that a backend can be."""

    name = "inference"

    def versions(self):
        return {}

    def claims(self):
        return frozenset({"forward"})

    def layouts(self):
        return ("channels_last",)

    def build(self, config, params, dtype, layout):
        return config, params

    def forward(self, model, x):
        return spec.forward(*model, x)


class Lacking(InferenceOnly):
    def claims(self):
        return frozenset({"forward", "map"})


class Boastful(InferenceOnly):
    def claims(self):
        return frozenset({"forward", "telepathy"})
