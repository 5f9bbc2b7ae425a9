"""Layers with one planted bug each, of kinds that no case of the table shows. Tests name them "planted:Class"."""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfattn_core import spec, spectral_norm
from selfattn_core.conformance.reference import LayerReference, Model, Reference
from selfattn_core.spec import Layer, _Kernel, _Normalised


class Right(Reference):
    name = "right"


class TransposesSquares(Reference):
    def forward(self, model, x):
        square = x.shape[1] == x.shape[2]
        return super().forward(model, x.swapaxes(1, 2)) if square else super().forward(model, x)


class SixteenRows(Reference):
    """Whole blocks of 16 positions lose the last one."""

    def forward(self, model, x):
        y = super().forward(model, x)
        if x.shape[1] * x.shape[2] % 16 == 0 and y.size:
            y[:, -1, -1] = x[:, -1, -1]
        return y


class OneChannel(Reference):
    def forward(self, model, x):
        return x.copy() if model.config.value_channels == 1 else super().forward(model, x)


class WideQuery(Reference):
    def attention_map(self, model, x):
        found = super().attention_map(model, x)
        return found[:, ::-1] if model.config.qk_channels > 64 else found


class WideValue(Reference):
    def forward(self, model, x):
        y = super().forward(model, x)
        if model.config.value_channels > 256:
            y[..., -1] = 0
        return y


class WindowsOfFive(Reference):
    def forward(self, model, x):
        y = super().forward(model, x)
        return y[:, ::-1] if model.config.kv_pool == 5 else y


class ManySamples(Reference):
    """Takes 16 samples at a time, and forgets the rest."""

    def forward(self, model, x):
        y = super().forward(model, x)
        y[16:] = x[16:]
        return y


class ThirdBlock(Layer):
    """Blocks of 64 keys, of which the third is left out."""

    def attend(self, config):
        scores = self.q @ self.k.mT
        scores[..., 128:192] = -np.inf
        self.A = spec._softmax(scores)
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o


class FarKeys(ThirdBlock):
    def attend(self, config):
        super().attend(config)
        scores = self.q @ self.k.mT
        scores[..., 2048:] = -np.inf
        self.A = spec._softmax(scores)
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o


class ManyScores(Layer):
    """Rounds the map to 16 bits if it has more than 2²² entries."""

    def attend(self, config):
        super().attend(config)
        if self.A.shape[-2] * self.A.shape[-1] > 2**22:
            self.A = self.A.astype(np.float16).astype(self.arithmetic)
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o


class SaturatingQuery(Layer):
    def attend(self, config):
        self.q = np.clip(self.q, -60, 60)
        super().attend(config)


class ClampedScores(Layer):
    def attend(self, config):
        self.A = spec._softmax(np.clip(self.q @ self.k.mT, -1000, 1000))
        self.o = self.store(self.A @ self.v)
        self.z = self.project("out", self.o) if config.out_projection else self.o


class LeastSigma(Layer):
    def _kernel(self, name):
        kernel = super()._kernel(name)
        if not isinstance(kernel, _Normalised) or kernel.sigma >= 0.1:
            return kernel
        raw = self.params[f"{name}.kernel"]
        return _Normalised(raw / raw.dtype.type(0.1), kernel.direction, raw.dtype.type(0.1))


class ExchangedVectors(Layer):
    """Exchanges u and v of an out projection with as many channels in as out."""

    def _kernel(self, name):
        if name == "out" and self.config.spectral_norm:
            raw, u, v = (self.params[f"out.{part}"] for part in ("kernel", "u", "v"))
            if u.size == v.size and raw.any():
                sigma = spectral_norm.sigma(raw, v, u)
                return _Normalised(raw / sigma, np.outer(u, v), sigma)
        return super()._kernel(name)


class NoNormWithoutBiases(Layer):
    def _kernel(self, name):
        return _Kernel(self.params[f"{name}.kernel"]) if not self.config.use_bias else super()._kernel(name)


class NaNOfZeros(Layer):
    def _kernel(self, name):
        kernel = self.params[f"{name}.kernel"]
        if self.config.spectral_norm and not kernel.any():
            return _Kernel(kernel * kernel.dtype.type(np.nan))
        return super()._kernel(name)


class ClampedGamma(Layer):
    def attend(self, config):
        self.gamma = np.clip(self.gamma, -3, 3)
        super().attend(config)


class ClampedBelow(Layer):
    def attend(self, config):
        self.gamma = np.maximum(self.gamma, -0.9)
        super().attend(config)


def with_layer(layer):
    return lambda: LayerReference(layer)


third_block = with_layer(ThirdBlock)
far_keys = with_layer(FarKeys)
many_scores = with_layer(ManyScores)
saturating_query = with_layer(SaturatingQuery)
clamped_scores = with_layer(ClampedScores)
least_sigma = with_layer(LeastSigma)
exchanged_vectors = with_layer(ExchangedVectors)
no_norm_without_biases = with_layer(NoNormWithoutBiases)
nan_of_zeros = with_layer(NaNOfZeros)
clamped_gamma = with_layer(ClampedGamma)
clamped_below = with_layer(ClampedBelow)


class SmallGradients(Reference):
    """Clips the gradient of y, as against loss scaling."""

    def vjp(self, model, x, dy):
        return super().vjp(model, x, np.clip(dy, -1000, 1000))


class OverflowsInSecondOrder(Reference):
    """The exponential of scores without their maximum, in second derivatives only."""

    def r1(self, model, x, w):
        penalty, gradients = super().r1(model, x, w)
        logits = spec.magnitudes(*self.arguments(model, x)[:2], self.arguments(model, x)[2])["logits"]
        return (np.nan if logits > 80 else penalty), gradients


class LeakingNaN(Reference):
    def vjp(self, model, x, dy):
        found = super().vjp(model, x, dy)
        return found | {"x": found["x"] * np.nan} if np.isnan(dy).any() else found


class MaskedNaN(Reference):
    def vjp(self, model, x, dy):
        return super().vjp(model, x, np.nan_to_num(dy))


class NarrowTraining(Reference):
    """Float64 computed in float32, in training gradients alone."""

    def training_vjp(self, model, x, dy):
        narrow = self.build(model.config, model.params, "float32", model.layout)
        found = super().training_vjp(narrow, x, dy)
        return {name: array.astype(model.params["gamma"].dtype) for name, array in found.items()}


class NarrowCompiled(Reference):
    def compiled(self, model):
        return Compiled(
            self.build(model.config, model.params, "float32", model.layout), str(model.params["gamma"].dtype)
        )

    def forward(self, model, x):
        if isinstance(model, Compiled):
            return super().forward(model.model, x).astype(model.dtype)
        return super().forward(model, x)

    def vjp(self, model, x, dy):
        if isinstance(model, Compiled):
            return {name: a.astype(model.dtype) for name, a in super().vjp(model.model, x, dy).items()}
        return super().vjp(model, x, dy)


class NarrowMixed(Reference):
    def vjp_of_vjp(self, model, x, dy, cotangents):
        narrow = self.build(model.config, model.params, "float32", model.layout)
        found = super().vjp_of_vjp(narrow, x, dy, cotangents)
        return {name: array.astype(model.params["gamma"].dtype) for name, array in found.items()}


class Compiled:
    def __init__(self, model, dtype=""):
        self.model, self.dtype, self.last = model, dtype, None


class SecondCompiledCall(Reference):
    """The compiled form gives its first answer for ever."""

    def compiled(self, model):
        return Compiled(model)

    def forward(self, model, x):
        if not isinstance(model, Compiled):
            return super().forward(model, x)
        if model.last is None or model.last.shape != x.shape:
            model.last = super().forward(model.model, x)
        return model.last.copy()

    def vjp(self, model, x, dy):
        return super().vjp(model.model if isinstance(model, Compiled) else model, x, dy)


class NegativeStrides(Reference):
    def forward(self, model, x):
        return super().forward(model, x[:, ::-1] if x.strides[1] < 0 else x)


class StillGradient(Reference):
    """Reads a gradient with strides of 0 as one number followed by zeros."""

    def vjp(self, model, x, dy):
        if dy.size > 1 and not any(dy.strides):
            first = np.zeros(dy.shape, dy.dtype)
            first.flat[0] = dy.flat[0]
            dy = first
        return super().vjp(model, x, dy)


class StridedPenalty(Reference):
    def r1(self, model, x, w):
        return super().r1(model, x if x.flags.c_contiguous else x[:, ::-1], w)


class MapOverwrites(Reference):
    def attention_map(self, model, x):
        found = super().attention_map(model, x)
        if x.flags.writeable:
            x *= 2
        return found


class MixedOverwrites(Reference):
    def vjp_of_vjp(self, model, x, dy, cotangents):
        found = super().vjp_of_vjp(model, x, dy, cotangents)
        cotangents["gamma"][...] = 0
        return found


class OwnParams(Reference):
    def params(self, model):
        return dict(model.params)


class AddsUp(Reference):
    """The gradients of the penalty add up over calls."""

    def build(self, config, params, dtype, layout):
        model = super().build(config, params, dtype, layout)
        self.sums = [*getattr(self, "sums", []), (model, {})]
        return model

    def r1(self, model, x, w):
        penalty, gradients = super().r1(model, x, w)
        for sums in (sums for owner, sums in self.sums if owner is model):
            for name in set(gradients) - {"x"}:
                gradients[name] = sums[name] = gradients[name] + sums.get(name, 0)
        return penalty, gradients


class KeepsMap(Reference):
    """The map of the last forward pass with as many positions."""

    kept = (None, None)

    def forward(self, model, x):
        self.kept = (model, super().attention_map(model, x))
        return super().forward(model, x)

    def attention_map(self, model, x):
        found = super().attention_map(model, x)
        return self.kept[1] if self.kept[0] is model and self.kept[1].shape == found.shape else found


class StaticBuffer(Reference):
    def __init__(self):
        super().__init__()
        self.buffers = {}

    def forward(self, model, x):
        y = super().forward(model, x)
        buffer = self.buffers.setdefault((y.shape, y.dtype.str), np.empty_like(y))
        buffer[...] = y
        return buffer


class BeginsAnew(Reference):
    """A training pass returns the new state, and the layer keeps the old one."""

    def training_pass(self, model, x):
        return super().training_pass(Model(model.config, dict(model.params), model.layout), x)


class StaleSigma(Reference):
    """A layer divides by the norm that it found before its training passes."""

    def training_pass(self, model, x):
        old = dict(model.params)
        found = super().training_pass(model, x)
        self.stale = (model, old)
        return found

    stale = (None, None)

    def forward(self, model, x):
        if self.stale[0] is model:
            return super().forward(Model(model.config, self.stale[1], model.layout), x)
        return super().forward(model, x)


class SamplesMove(Reference):
    """Gradients of each sample move the state."""

    def per_sample_vjp(self, model, x, dy):
        found = super().per_sample_vjp(model, x, dy)
        model.params.update(spec.power_iteration(model.config, model.params))
        return found


class DropsState(Reference):
    """An update keeps u and v of the old weights."""

    def update(self, model, params):
        kept = {name: array for name, array in model.params.items() if name.endswith((".u", ".v"))}
        return super().update(model, {**params, **kept})


class LoadsPoolOfTwo(Reference):
    def saved(self, model, folder):
        loaded = super().saved(model, folder)
        options = model.config.to_dict()
        pool = 2 if options["kv_pool"] > 1 else 1
        return Model(type(model.config).from_dict(options | {"kv_pool": pool}), loaded.params, model.layout)


class ByOrder(Reference):
    """Takes query and key by their place, not by their name."""

    def build(self, config, params, dtype, layout):
        names = list(params)
        if names.index("key.kernel") < names.index("query.kernel"):
            params = dict(params)
            for part in ("kernel", "bias", "u", "v"):
                if f"key.{part}" in params:
                    pair = params[f"key.{part}"], params[f"query.{part}"]
                    params[f"query.{part}"], params[f"key.{part}"] = pair
        return super().build(config, params, dtype, layout)


class SamplesInRow(Reference):
    """The rounding of one sample depends on the samples beside it: a mean over the batch."""

    def forward(self, model, x):
        y = super().forward(model, x)
        return y + y.dtype.type(1e-3) * y.mean(axis=0, keepdims=True) if x.shape[0] > 1 else y


class KnowsPositions(Reference):
    def forward(self, model, x):
        y = super().forward(model, x)
        return y * (1 + np.linspace(0, 1e-3, x.shape[1], dtype=y.dtype))[:, None, None]


class LowestIndex(Reference):
    """Attends to the first of several equal keys only."""

    def forward(self, model, x):
        y = super().forward(model, x)
        flat = x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
        half = flat.shape[1] // 2
        if half and x.size and (flat[:, :half] == flat[:, half : 2 * half]).all():
            y = y + y.dtype.type(0.1)
        return y


class ZeroBiases(Reference):
    """Takes a layer whose biases are zero for one without gradients by biases."""

    def vjp(self, model, x, dy):
        found = super().vjp(model, x, dy)
        biases = [name for name in model.params if name.endswith("bias")]
        if biases and not any(model.params[name].any() for name in biases):
            found |= {name: np.zeros_like(found[name]) for name in biases}
        return found


class SometimesWrong(Reference):
    calls, every = 0, 97

    def forward(self, model, x):
        self.calls += 1
        y = super().forward(model, x)
        return y + 1 if self.calls % self.every == 0 else y


class OftenWrong(SometimesWrong):
    every = 5


class RarelyWrong(SometimesWrong):
    every = 2000


@dataclass(frozen=True)
class Updated(Model):
    updates: int = 0


class WearsOut(Reference):
    """A layer that is wrong after a thousand updates."""

    def update(self, model, params):
        updated = super().update(model, params)
        updates = getattr(model, "updates", 0) + 1
        return Updated(updated.config, updated.params, updated.layout, updates)

    def forward(self, model, x):
        y = super().forward(model, x)
        return y + 1 if getattr(model, "updates", 0) >= 1000 else y


class OneScratch(Reference):
    """One buffer of each size for all threads."""

    def __init__(self):
        super().__init__()
        self.scratch = {}

    def forward(self, model, x):
        scratch = self.scratch.setdefault(x.dtype.str, np.empty(2**17, x.dtype))[: x.size].reshape(x.shape)
        scratch[...] = x
        y = super().forward(model, x)
        return np.where((scratch == x) | np.isnan(x), y, scratch)


class RightInOneProcess(Reference):
    """Every process but the first takes the wrong sign, as one that depends on what it keeps on disk."""

    def __init__(self):
        super().__init__()
        started = Path(os.environ["PLANTED_STARTED"])
        self.first = not started.exists()
        started.touch()

    def forward(self, model, x):
        y = super().forward(model, x)
        return y if self.first else 2 * x - y


class OverProcesses(Reference):
    """Right while it has its processes, and wrong without them."""

    has_processes = False

    @contextmanager
    def over(self, processes):
        assert processes is None
        self.has_processes = True
        yield
        self.has_processes = False

    def forward(self, model, x):
        y = super().forward(model, x)
        return y if self.has_processes else y + 1


class DiesOfRows(Reference):
    def forward(self, model, x):
        if x.shape[1] == 1 and x.shape[2] > 8:
            os._exit(3)
        return super().forward(model, x)


class HangsOfRows(Reference):
    def forward(self, model, x):
        if x.shape[1] == 1 and x.shape[2] > 8:
            time.sleep(600)
        return super().forward(model, x)


class RaisesOfRows(Reference):
    def forward(self, model, x):
        if x.shape[1] == 1 and x.shape[2] > 2:
            raise RuntimeError("no such rows")
        return super().forward(model, x)


class GrowsAnswers(Reference):
    """An expanded array, far larger than any right answer."""

    def forward(self, model, x):
        return (
            np.broadcast_to(np.float32(0), (2**10, 2**10, 2**10))
            if x.shape[0] == 3
            else super().forward(model, x)
        )


class DiesAndGrows(DiesOfRows, GrowsAnswers):
    """Two failures without an answer, of which neither explains the other."""


class WritesAndErrs(Reference):
    """Two properties that one call violates."""

    def forward(self, model, x):
        y = super().forward(model, x) + 1
        if x.size and x.flags.writeable:
            x.reshape(-1)[0] += 1
        return y


class ForwardOnly(Reference):
    def claims(self):
        return {"forward"}


class StartsOnce(TransposesSquares):
    """A backend that cannot be started again, as when a device is taken by another process."""

    def __init__(self):
        super().__init__()
        started = Path(os.environ["PLANTED_STARTED"])
        if started.exists():
            raise RuntimeError("the device is taken")
        started.touch()


class LeavesChild(Reference):
    """A backend with a child that keeps the pipes open, such as a worker that loads data."""

    def forward(self, model, x):
        if os.fork() == 0:
            if x.shape[0] == 1:
                os.setsid()
            time.sleep(30)
            os._exit(0)
        return super().forward(model, x)


class NarrowRowSums(Layer):
    """The row sums of the softmax in 16 bits."""

    def attend(self, config):
        super().attend(config)
        if self.dtype.itemsize == 2:
            scores = self.q @ self.k.mT
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            total = np.zeros(weights.shape[:-1], np.float16)
            for key in range(weights.shape[-1]):
                total += weights[..., key].astype(np.float16)
            self.A = weights / total[..., None].astype(np.float32)
            self.o = self.store(self.A @ self.v)
            self.z = self.project("out", self.o) if config.out_projection else self.o


narrow_row_sums = with_layer(NarrowRowSums)

PLANTED = (
    "TransposesSquares", "SixteenRows", "OneChannel", "WideQuery", "WideValue", "WindowsOfFive", "ManySamples",
    "third_block", "far_keys", "many_scores", "saturating_query", "clamped_scores", "least_sigma", "exchanged_vectors",
    "no_norm_without_biases", "nan_of_zeros", "clamped_gamma", "clamped_below", "SmallGradients",
    "OverflowsInSecondOrder", "LeakingNaN", "MaskedNaN", "NarrowTraining", "NarrowCompiled", "NarrowMixed",
    "SecondCompiledCall", "NegativeStrides", "StillGradient", "StridedPenalty", "MapOverwrites", "MixedOverwrites",
    "OwnParams", "AddsUp", "KeepsMap", "StaticBuffer", "BeginsAnew", "StaleSigma", "SamplesMove", "DropsState",
    "LoadsPoolOfTwo", "ByOrder", "SamplesInRow", "KnowsPositions", "LowestIndex", "ZeroBiases", "RaisesOfRows",
    "DiesOfRows", "GrowsAnswers", "narrow_row_sums", "RarelyWrong", "WearsOut", "OneScratch",
)  # fmt: skip
