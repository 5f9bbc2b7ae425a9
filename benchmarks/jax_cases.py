"""The implementations in JAX. Every one is compiled by `jax.jit`."""

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from benchmarks.problem import Problem
from benchmarks.products import products, row_local
from benchmarks.step import RefusedError, Step
from selfattn_ops.jax import attend

__all__ = ["about", "array", "build", "forget", "on", "peak_memory", "synchronize"]

Function = Callable[..., jax.Array]


def about() -> dict[str, Any]:
    """Versions and devices. XLA uses one thread for every CPU of the process."""
    return {
        "versions": {"jax": jax.__version__, "flax": flax.__version__},
        "threads": {"devices": " ".join(map(str, jax.devices()))},
    }


def array(values: np.ndarray, dtype: str = "float32") -> jax.Array:
    """A JAX array of these values."""
    return jnp.asarray(values, dtype)


def synchronize() -> None:
    """Do nothing, because every step waits for its own answers."""


def forget() -> None:
    """Forget what was compiled."""
    jax.clear_caches()


@contextlib.contextmanager
def on(device: str) -> Iterator[Mapping[str, str]]:
    """Make this the default device inside a `with` block, and yield its model and driver."""
    from selfattn_ops.devices import jax as devices

    with devices.OnDevices().on(device) as found:
        yield found


def peak_memory(call: Callable[[], object], device: str) -> int:
    """The peak memory of a call, by JAX's counters of the device."""
    from selfattn_ops.devices import jax as devices

    return devices.peak_memory(call, device)


def build(name: str, problem: Problem) -> Step:
    """One implementation on one problem.

    Raises:
        RefusedError: if the implementation cannot compute the problem.
    """
    inputs = [array(operand, problem.cell.dtype) for operand in problem.operands.values()]
    if name == "matmul-blocks":
        return _in_blocks(problem, *inputs)
    if name == "matmul":

        def compute(_parameters: Any, inputs: Any, weight: jax.Array) -> Any:
            return products(problem.cell.step, _dot, *inputs, weight)

        parameters: Any = {}
    else:
        function, parameters = (_core(name), {}) if problem.cell.level == "core" else _layer(name, problem)
        compute = {"forward": _forward, "train": _train, "r1": _r1}[problem.cell.step](
            function, list(problem.operands)
        )
    compiled: list[Any] = []

    def prepare() -> None:
        if not compiled:
            weight = array(problem.weight, problem.cell.dtype)
            compiled.append(jax.jit(compute).lower(parameters, inputs, weight).compile())

    def run(weight: jax.Array) -> Any:
        if not compiled:
            prepare()
        return jax.block_until_ready(compiled[0](parameters, inputs, weight))

    return Step(run, _to_numpy, prepare)


def _dot(a: jax.Array, b: jax.Array, transposed: str = "") -> jax.Array:
    return (a.mT if transposed == "ta" else a) @ (b.mT if transposed == "tb" else b)


def _in_blocks(problem: Problem, query: jax.Array, key: jax.Array, value: jax.Array) -> Step:
    """The products, with one call for each block of query rows."""
    step = problem.cell.step

    @functools.partial(jax.jit, static_argnames="size")
    def compute(
        query: jax.Array, key: jax.Array, value: jax.Array, weight: jax.Array, start: int, *, size: int
    ) -> Any:
        rows = (jax.lax.dynamic_slice_in_dim(each, start, size, axis=1) for each in (query, weight))
        few, few_weights = rows
        return products(step, _dot, few, key, value, few_weights)

    def run(weight: jax.Array) -> Any:
        found = []
        for rows in problem.blocks:
            block = compute(query, key, value, weight, rows.start, size=rows.stop - rows.start)
            found.append({kept: block[kept] for kept in ("rows", "query") if kept in block})
        return jax.block_until_ready(found)

    def join(found: Any) -> dict[str, np.ndarray]:
        return row_local(
            step, found, lambda parts: np.concatenate([np.asarray(p, np.float32) for p in parts], axis=1)
        )

    return Step(run, join)


def _forward(function: Function, _names: list[str]) -> Callable[..., Any]:
    return lambda parameters, inputs, _weight: {"y": function(parameters, *inputs)}


def _train(function: Function, names: list[str]) -> Callable[..., Any]:
    def loss(parameters: Any, inputs: Any, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = function(parameters, *inputs)
        return jnp.sum(y * weight), y

    def compute(parameters: Any, inputs: Any, weight: jax.Array) -> Any:
        gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, inputs, weight)
        return {"y": y, "parameters": gradients[0], **dict(zip(names, gradients[1], strict=True))}

    return compute


def _r1(function: Function, names: list[str]) -> Callable[..., Any]:
    def loss(inputs: Any, parameters: Any, weight: jax.Array) -> jax.Array:
        return jnp.sum(function(parameters, *inputs) * weight)

    def penalty(parameters: Any, inputs: Any, weight: jax.Array) -> jax.Array:
        return sum(jnp.sum(jnp.square(g)) for g in jax.grad(loss)(inputs, parameters, weight))

    def compute(parameters: Any, inputs: Any, weight: jax.Array) -> Any:
        gradients = jax.grad(penalty, argnums=(0, 1))(parameters, inputs, weight)
        return {"parameters": gradients[0], **dict(zip(names, gradients[1], strict=True))}

    return compute


def _to_numpy(answers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rename parameters, in a flat dict or in the tree of Flax, to their canonical names."""
    answers = dict(answers)
    tree = answers.pop("parameters", {})
    for name, values in flax.traverse_util.flatten_dict(tree.get("params", tree), sep=".").items():
        answers[name] = values[0, 0] if values.ndim == 4 else values
    return {name: np.asarray(values, np.float32) for name, values in answers.items()}


def _core(name: str) -> Function:
    if name == "ours":
        return lambda _, *operands: attend(*operands)
    if name == "dense":
        return lambda _, query, key, value: jax.nn.softmax(query @ key.mT, axis=-1) @ value
    if name == "cudnn":
        cudnn = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")
        return lambda _, *operands: cudnn(*(operand[..., None, :] for operand in operands))[..., 0, :]
    if name == "flax":
        return _with_heads(linen.dot_product_attention)
    if name == "memory-efficient-attention":
        return _with_heads(_memory_efficient_attention())
    raise ValueError(name)


def _with_heads(attention: Function) -> Function:
    """Turn an attention of (B, N, heads, D) that divides by sqrt(Dk) into a function of (B, N, D)."""

    def function(_: Any, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scaled = query * math.sqrt(query.shape[-1])
        return attention(scaled[..., None, :], key[..., None, :], value[..., None, :])[..., 0, :]

    return function


def _memory_efficient_attention() -> Function:
    """The function of the PyPI package, without its `__init__`, which would also import torch, whose memory and threads would count."""
    package = "memory_efficient_attention"
    found = importlib.util.find_spec(package)
    if found is None:
        raise RefusedError("not installed: pip install --group bench")
    if package not in sys.modules:
        hollow = types.ModuleType(package)
        hollow.__path__ = list(found.submodule_search_locations or [])
        sys.modules[package] = hollow
    return importlib.import_module(f"{package}.attention_jax").efficient_dot_product_attention


def _layer(name: str, problem: Problem) -> tuple[Function, Any]:
    """The layer as a function of (parameters, x), and its parameters."""
    if name == "ours":
        from selfattn_flax.linen import from_canonical

        # In mixed precision the parameters stay float32.
        module, variables = from_canonical(
            problem.config, problem.params, dtype=problem.cell.dtype, param_dtype="float32"
        )
        return module.apply, jax.tree.map(jnp.asarray, variables)
    if name == "dense":
        side = problem.config.kv_pool
        return (
            lambda parameters, x: _published(parameters, x, side),
            {key: jnp.asarray(values) for key, values in problem.params.items()},
        )
    raise ValueError(name)


def _published(parameters: Mapping[str, jax.Array], x: jax.Array, side: int) -> jax.Array:
    """The published layer, in channels-last form. The pooled one is that of github.com/brain-research/self-attention-gan."""

    def project(name: str, maps: jax.Array) -> jax.Array:
        projected = maps @ parameters[f"{name}.kernel"]
        return projected + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else projected

    parameters = {name: values.astype(x.dtype) for name, values in parameters.items()}
    query, key, value = (project(name, x) for name in ("query", "key", "value"))
    if side > 1:
        key, value = (linen.max_pool(maps, (side, side), (side, side)) for maps in (key, value))
    query, key, value = (maps.reshape(maps.shape[0], -1, maps.shape[-1]) for maps in (query, key, value))
    attention = jax.nn.softmax(query @ key.mT, axis=-1)  # (B, N, M)
    out = (attention @ value).reshape(*x.shape[:3], -1)
    if "out.kernel" in parameters:
        out = project("out", out)
    return parameters["gamma"] * out + x
