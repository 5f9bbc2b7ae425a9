"""Mutants of everything around the function: state, layouts, dtypes, loading and saving of weights, and compilers."""

from dataclasses import replace
from typing import Any

import numpy as np

from selfattn_core.arrays import Array
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.families import FamilyName
from selfattn_core.conformance.mutants.edits import edited_spec
from selfattn_core.conformance.mutants.mutant import Mutant, named
from selfattn_core.conformance.reference import Model, Reference
from selfattn_core.params import glorot_limit, init_params

__all__ = ["MUTANTS"]


class NewProjections(Reference):
    def forward(self, model: Model, x: Array) -> Array:
        drawn = np.random.default_rng().normal(size=model.params["value.kernel"].shape)
        kernel = drawn.astype(model.params["value.kernel"].dtype)
        return super().forward(replace(model, params={**model.params, "value.kernel": kernel}), x)


class Jitters(Reference):
    def forward(self, model: Model, x: Array) -> Array:
        y = super().forward(model, x)
        return np.where(
            np.random.default_rng().random(y.shape) < 0.5, y, np.nextafter(y, y.dtype.type(np.inf))
        )


class StateMoves(Reference):
    """Every call changes the weights, as in a layer that updates spectral norm in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def build(self, *arguments: Any) -> Model:
        self.calls = 0
        return super().build(*arguments)

    def forward(self, model: Model, x: Array) -> Array:
        self.calls += 1
        kernel = model.params["query.kernel"] * (1 + self.calls * np.finfo(x.dtype).eps)
        return super().forward(
            replace(model, params={**model.params, "query.kernel": kernel.astype(x.dtype)}), x
        )


class SizeBakedIn(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[int, ...]] = {}

    def forward(self, model: Model, x: Array) -> Array:
        size = self.sizes.setdefault(id(model), x.shape[1:3])
        return super().forward(model, np.resize(x, (x.shape[0], *size, x.shape[3])))


class BatchBakedIn(SizeBakedIn):
    def forward(self, model: Model, x: Array) -> Array:
        (batch,) = self.sizes.setdefault(id(model), x.shape[:1])
        return super(SizeBakedIn, self).forward(model, x[:batch])


class RemembersByShape(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[int, ...], Array] = {}

    def build(self, *arguments: Any) -> Model:
        self.seen = {}
        return super().build(*arguments)

    def forward(self, model: Model, x: Array) -> Array:
        return self.seen.setdefault(x.shape, super().forward(model, x))


class CentredOverBatch(Reference):
    def forward(self, model: Model, x: Array) -> Array:
        if len(x) < 2:
            return super().forward(model, x)
        return super().forward(model, x - x.mean(axis=0) * x.dtype.type(1e-4))


class NarrowsFloat64(Reference):
    def forward(self, model: Model, x: Array) -> Array:
        narrow = {name: array.astype(np.float32) for name, array in model.params.items()}
        return super().forward(replace(model, params=narrow), x).astype(x.dtype)


class ChannelsFirstReshaped(Reference):
    def native(self, maps: Array, model: Model) -> Array:
        if model.layout == "channels_last":
            return super().native(maps, model)
        batch, height, width, channels = maps.shape
        return maps.reshape(batch, channels, height, width).astype(model.params["gamma"].dtype)


class ChannelsFirstAsWidthHeight(Reference):
    def canonical(self, maps: Array, model: Model) -> Array:
        back = super().canonical(maps, model)
        if model.layout == "channels_last":
            return back
        batch, height, width, channels = back.shape
        return back.swapaxes(1, 2).reshape(batch, height, width, channels)


def as_contiguous_memory(maps: Array) -> Array:
    """The memory from the first entry on, read as if it were contiguous."""
    strides = np.zeros(maps.shape, maps.dtype).strides
    return np.lib.stride_tricks.as_strided(maps, maps.shape, strides, writeable=False)


class StridesIgnored(Reference):
    """Ignores the strides of x, as compiled code that only gets its address."""

    def forward(self, model: Model, x: Array) -> Array:
        return super().forward(model, as_contiguous_memory(x))


class OrderOfMemory(Reference):
    """Flattens in the order of memory, which differs from the order of the axes after a transposition."""

    def forward(self, model: Model, x: Array) -> Array:
        return super().forward(model, x.ravel(order="K").reshape(x.shape))


class StridesOfGradientIgnored(Reference):
    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        return super().vjp(model, x, as_contiguous_memory(dy))


class PenaltySpoilsKernels(Reference):
    """The penalty scales the arrays of the layer and never restores them."""

    def r1(self, model: Model, x: Array, w: Array) -> tuple[float, dict[str, Array]]:
        found = super().r1(model, x, w)
        for name in model.params:
            if name.endswith("kernel"):
                model.params[name][...] *= 0.5
        return found


class MapSpoilsGamma(Reference):
    """Leaves gamma at zero after `attention_map`, as a layer that switches gamma off to compute the map."""

    def attention_map(self, model: Model, x: Array) -> Array:
        found = super().attention_map(model, x)
        model.params["gamma"][...] = 0
        return found


class GradientsInOneBuffer(Reference):
    """Returns its own buffers, which the next call overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Array] = {}

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        found = super().vjp(model, x, dy)
        for name, gradient in found.items():
            kept = self.buffers.get(name)
            if kept is None or (kept.shape, kept.dtype) != (gradient.shape, gradient.dtype):
                self.buffers[name] = gradient.copy()
            self.buffers[name][...] = gradient
        return {name: self.buffers[name] for name in found}


class GradientOverwritesItsArgument(Reference):
    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        found = super().vjp(model, x, dy)
        dy[...] = 0
        return found


class KernelsRepeat(Reference):
    """Repeats the first half of a kernel, as a generator that is seeded again for every tile."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        found = super().initial(config, seed)
        for name in found:
            if name.endswith("kernel"):
                half = len(found[name]) // 2
                found[name][half : 2 * half] = found[name][:half]
        return found


class Exports(Reference):
    """Computes with the right weights and returns wrong ones."""

    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return params

    def params(self, model: Model) -> dict[str, Array]:
        return self.export(dict(model.params))


class KeyBiasLost(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name: 0 * array if name == "key.bias" else array for name, array in params.items()}


class KernelsTransposed(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name: array.T for name, array in params.items()}


class ForeignNames(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name.replace("kernel", "weight"): array for name, array in params.items()}


class GammaPerSample(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {
            name: array.reshape(1, 1, 1, 1) if name == "gamma" else array for name, array in params.items()
        }


class GammaUnregistered(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name: array for name, array in params.items() if name != "gamma"}


class HalfWeights(Exports):
    def export(self, params: dict[str, Array]) -> dict[str, Array]:
        return {name: array.astype(np.float16).astype(array.dtype) for name, array in params.items()}


class Draws(Reference):
    """New layers whose weights have another distribution."""

    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        return array

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        generator = np.random.default_rng(seed)
        drawn = init_params(config, seed)
        return {
            name: self.changed(name, array, generator).astype(np.float32) for name, array in drawn.items()
        }


class GammaOne(Draws):
    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        return array + 1 if name == "gamma" else array


class BiasesDrawn(Draws):
    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        return generator.uniform(-0.1, 0.1, array.shape) if name.endswith("bias") else array


class HeUniform(Draws):
    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        limit = (6 / array.shape[0]) ** 0.5
        return generator.uniform(-limit, limit, array.shape) if name.endswith("kernel") else array


class GlorotNormal(Draws):
    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        spread = glorot_limit(*array.shape) / 3**0.5 if name.endswith("kernel") else 0
        return generator.normal(0, spread, array.shape) if name.endswith("kernel") else array


class TorchDefault(Draws):
    """U(±1/sqrt(C_in)), the initial distribution of a 1×1 Conv2d in PyTorch."""

    def changed(self, name: str, array: Array, generator: np.random.Generator) -> Array:
        limit = array.shape[0] ** -0.5
        return generator.uniform(-limit, limit, array.shape) if name.endswith("kernel") else array


class OneSeedForAll(Draws):
    """Draws every projection from a new generator with the same seed."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        drawn = super().initial(config, seed)
        return drawn | {"key.kernel": drawn["query.kernel"].copy()}


class SeedIgnored(Draws):
    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        return super().initial(config, 0)


class OutLikeValue(Draws):
    """Draws two kernels of equal size from generators with the same seed."""

    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        drawn = super().initial(config, seed)
        value = drawn["value.kernel"]
        return drawn | ({"out.kernel": value.reshape(value.T.shape)} if config.out_projection else {})


class SeedIgnoredByValue(Draws):
    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        return super().initial(config, seed) | {"value.kernel": super().initial(config, 0)["value.kernel"]}


class SeedlessDraws(Draws):
    def initial(self, config: SelfAttentionConfig, seed: int) -> dict[str, Array]:
        return super().initial(config, int(np.random.default_rng().integers(2**31)))


class SavesWithoutGamma(Reference):
    def saved(self, model: Model, folder: str) -> Model:
        loaded = super().saved(model, folder)
        return replace(loaded, params={**loaded.params, "gamma": 0 * loaded.params["gamma"]})


class SavesHalf(Reference):
    def saved(self, model: Model, folder: str) -> Model:
        loaded = super().saved(model, folder)
        params = {name: array.astype(np.float16).astype(array.dtype) for name, array in loaded.params.items()}
        return replace(loaded, params=params)


class SavesNothing(Reference):
    def saved(self, model: Model, folder: str) -> Model:
        dtype = model.params["gamma"].dtype
        return replace(model, params=init_params(model.config, 0, dtype))


class CompiledInHalf(Reference):
    def compiled(self, model: Model) -> Model:
        params = {name: array.astype(np.float16).astype(array.dtype) for name, array in model.params.items()}
        return replace(model, params=params)


class KnowsItsForms(Reference):
    """Tells the compiled forms of its layers from the layers, for bugs that only one of the two has."""

    def __init__(self) -> None:
        super().__init__()
        self._forms: list[Model] = []

    def compiled(self, model: Model) -> Model:
        self._forms.append(replace(model))
        return self._forms[-1]

    def is_compiled(self, model: Model) -> bool:
        return any(form is model for form in self._forms)


class CompiledLogitsIn16Bits(KnowsItsForms):
    """Only the compiled form rounds its logits to the dtype of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        rounds = "self.A = _softmax(self.store(self.q @ _transpose(self.k)))"
        edit = ("self.A = _softmax(self.q @ _transpose(self.k))", rounds)
        self.rounding = Reference(edited_spec("logits in 16 bits", (edit,)))

    def forward(self, model: Model, x: Array) -> Array:
        return self.rounding.forward(model, x) if self.is_compiled(model) else super().forward(model, x)


class LoadedWide(Reference):
    """A layer of 16 bits that computes in float32 once it is loaded."""

    def saved(self, model: Model, folder: str) -> Model:
        loaded = super().saved(model, folder)
        narrow = model.params["gamma"].dtype == np.float16
        return self.build(loaded.config, loaded.params, "float32", loaded.layout) if narrow else loaded


class CompiledWithoutKeyBackward(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.is_compiled = False

    def build(self, *arguments: Any) -> Model:
        self.is_compiled = False
        return super().build(*arguments)

    def compiled(self, model: Model) -> Model:
        self.is_compiled = True
        return model

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        gradients = super().vjp(model, x, dy)
        return gradients | {"key.kernel": 0 * gradients["key.kernel"]} if self.is_compiled else gradients


class EagerInHalf(CompiledInHalf):
    def compiled(self, model: Model) -> Model:
        return model

    def eager(self, model: Model) -> Model:
        return super().compiled(model)


class EagerWithoutKeyBackward(CompiledWithoutKeyBackward):
    """Lacks the key gradient in eager mode, as if only the compiler had the derivative."""

    def compiled(self, model: Model) -> Model:
        return model

    def eager(self, model: Model) -> Model:
        return super().compiled(model)


class PerSampleMean(Reference):
    def per_sample_vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        whole = self.vjp(model, x, dy)
        batch = len(x)
        repeated = {name: np.stack([array / batch] * batch) for name, array in whole.items() if name != "x"}
        return {"x": whole["x"]} | repeated


class ParametersDetached(Reference):
    """No gradient of gamma, as in a layer that does not register gamma as a parameter."""

    def vjp(self, model: Model, x: Array, dy: Array) -> dict[str, Array]:
        return {name: array for name, array in super().vjp(model, x, dy).items() if name != "gamma"}


class Dense(Reference):
    """Claims linear memory, but allocates an N×N map as the spec does."""

    def claims(self) -> frozenset[str]:
        return super().claims() | {"memory"}


_KERAS = "keras.layers.SpectralNormalization and most spectral norms of peers"

_TABLE: tuple[tuple[str, FamilyName, type[Reference], str], ...] = (
    ("projections created anew at every call", "determinism", NewProjections, "keras copies of PAM"),
    ("last bit is random", "determinism", Jitters, ""),
    ("state moves in evaluation", "determinism", StateMoves, _KERAS),
    ("map size baked in", "sizes", SizeBakedIn, "heykeetae/Self-Attention-GAN#12, #49"),
    ("batch size baked in", "sizes", BatchBakedIn, "taki0112/Self-Attention-GAN-Tensorflow#28"),
    ("answer remembered by the input's shape", "sizes", RemembersByShape, ""),
    ("input centred over the batch", "batch", CentredOverBatch, ""),
    ("float64 computed in float32", "forward", NarrowsFloat64, "JAX without x64"),
    ("channels-first by a reshape", "forward", ChannelsFirstReshaped, ""),
    ("channels-first as (B, C, W, H)", "forward", ChannelsFirstAsWidthHeight, ""),
    ("strides of the input ignored", "forward", StridesIgnored, ""),
    ("input flattened in the order of memory", "forward", OrderOfMemory, ""),
    ("strides of the gradient ignored", "vjp", StridesOfGradientIgnored, ""),
    ("penalty changes the kernels", "r1", PenaltySpoilsKernels, ""),
    ("gamma left at zero after a call of attention_map", "vjp", MapSpoilsGamma, ""),
    ("gradients in memory that the next call overwrites", "vjp", GradientsInOneBuffer, ""),
    ("gradient written over its argument", "vjp", GradientOverwritesItsArgument, ""),
    ("second half of a kernel repeats the first", "init", KernelsRepeat, ""),
    ("key bias not exported", "params", KeyBiasLost, ""),
    ("kernels exported transposed", "params", KernelsTransposed, ""),
    ("parameters under other names", "params", ForeignNames, ""),
    ("gamma of shape (1, 1, 1, 1)", "params", GammaPerSample, "heykeetae/Self-Attention-GAN#1"),
    ("gamma not a parameter", "params", GammaUnregistered, "the published f/g/h layer for PyTorch"),
    ("weights exported in 16 bits", "params", HalfWeights, ""),
    ("gamma starts at one", "init", GammaOne, ""),
    ("biases drawn", "init", BiasesDrawn, "torch.nn.Conv2d"),
    ("He-uniform kernels", "init", HeUniform, ""),
    ("Glorot-normal kernels", "init", GlorotNormal, ""),
    ("torch's default kernels", "init", TorchDefault, "torch.nn.Conv2d"),
    ("query and key start equal", "init", OneSeedForAll, "one seeded initializer for all Keras children"),
    ("seed ignored", "init", SeedIgnored, ""),
    ("seed ignored by the value", "init", SeedIgnoredByValue, ""),
    (
        "out projection starts as the value",
        "init",
        OutLikeValue,
        "one seeded initializer for all Keras children",
    ),
    ("a new draw for one seed", "init", SeedlessDraws, ""),
    ("gamma not saved", "saved", SavesWithoutGamma, "gamma as a plain tensor or an untracked variable"),
    ("saved in 16 bits", "saved", SavesHalf, ""),
    ("nothing saved", "saved", SavesNothing, ""),
    ("16 bits loaded as float32", "saved", LoadedWide, ""),
    ("compiled in 16 bits", "compiled", CompiledInHalf, ""),
    ("compiled with logits in 16 bits", "compiled", CompiledLogitsIn16Bits, ""),
    ("compiled without the key's backward", "compiled", CompiledWithoutKeyBackward, ""),
    ("uncompiled in 16 bits", "compiled", EagerInHalf, ""),
    ("uncompiled without the key's backward", "compiled", EagerWithoutKeyBackward, ""),
    ("mean gradient for each sample", "per_sample", PerSampleMean, ""),
    ("gamma has no gradient", "vjp", ParametersDetached, "the published f/g/h layer for PyTorch"),
    ("N×N array although memory should be linear", "memory", Dense, "every published layer"),
)

MUTANTS: tuple[Mutant, ...] = tuple(
    named(name, family, backend, seen_in=seen_in) for name, family, backend, seen_in in _TABLE
)
