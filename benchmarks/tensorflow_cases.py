"""The implementations in TensorFlow and Keras. Every one is a `tf.function`."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"  # before keras is imported: it cannot change afterwards

import keras
import numpy as np
import tensorflow as tf

from benchmarks.problem import Problem
from benchmarks.products import products, row_local
from benchmarks.step import RefusedError, Step
from selfattn_ops.tensorflow import attend

__all__ = ["about", "array", "build", "forget", "on", "peak_memory", "synchronize"]

Function = Callable[..., tf.Tensor]

# Parameters that our layers do not have. Their gradients are computed, as in training, but not compared.
_FOREIGN = "foreign/"


def about() -> dict[str, Any]:
    """Versions and numbers of threads. With 0, TensorFlow chooses, and uses every CPU."""
    threading = tf.config.threading
    return {
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "threads": {
            "intra_op": threading.get_intra_op_parallelism_threads(),
            "inter_op": threading.get_inter_op_parallelism_threads(),
        },
    }


def array(values: np.ndarray, dtype: str = "float32") -> tf.Tensor:
    """A tensor of these values."""
    return tf.cast(tf.constant(values), dtype)


def synchronize() -> None:
    """Wait until all computations are done."""
    if tf.config.list_physical_devices("GPU"):
        tf.test.experimental.sync_devices()


def forget() -> None:
    """Do nothing, because every `tf.function` ends with its cell."""


@contextlib.contextmanager
def on(device: str) -> Iterator[Mapping[str, str]]:
    """Run operations on this device inside a `with` block, and yield its model and driver."""
    from selfattn_ops.devices import tensorflow as devices

    with devices.OnDevices().on(device) as found:
        yield found


def peak_memory(call: Callable[[], object], device: str) -> int:
    """The peak memory of a call, by TensorFlow's counters of the device."""
    from selfattn_ops.devices import tensorflow as devices

    return devices.peak_memory(call, device)


def build(name: str, problem: Problem) -> Step:
    """One implementation on one problem.

    Raises:
        RefusedError: if the implementation cannot compute the problem.
    """
    inputs = [array(operand, problem.cell.dtype) for operand in problem.operands.values()]
    variables: dict[str, tf.Variable] = {}
    if name == "matmul-blocks":
        return _in_blocks(problem, *inputs)
    if name == "matmul":

        def compute(inputs: list[tf.Tensor], weight: tf.Tensor) -> dict[str, tf.Tensor]:
            return products(problem.cell.step, _dot, *inputs, weight)

    else:
        function, variables = (_core(name), {}) if problem.cell.level == "core" else _layer(name, problem)
        compute = {"forward": _forward, "train": _train, "r1": _r1}[problem.cell.step](
            function, list(problem.operands), variables
        )
    compiled = tf.function(compute, autograph=False)

    def prepare() -> None:
        compiled.get_concrete_function(inputs, array(problem.weight, problem.cell.dtype))

    return Step(
        lambda weight: compiled(inputs, weight),
        lambda answers: {
            key: _to_numpy(values) for key, values in answers.items() if not key.startswith(_FOREIGN)
        },
        prepare,
    )


def _dot(a: tf.Tensor, b: tf.Tensor, transposed: str = "") -> tf.Tensor:
    return tf.matmul(a, b, transpose_a=transposed == "ta", transpose_b=transposed == "tb")


def _in_blocks(problem: Problem, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> Step:
    """The products, with one call for each block of query rows."""
    step = problem.cell.step

    def few(whole: tf.Tensor, start: tf.Tensor, size: int) -> tf.Tensor:
        return tf.slice(whole, (0, start, 0), (whole.shape[0], size, whole.shape[-1]))

    @tf.function(autograph=False)
    def compute(weight: tf.Tensor, start: tf.Tensor, size: int) -> dict[str, tf.Tensor]:
        return products(step, _dot, few(query, start, size), key, value, few(weight, start, size))

    # The size is part of the graph, but the start is not. So there are at most two graphs, because the last block is shorter.
    blocks = [(tf.constant(rows.start), rows.stop - rows.start) for rows in problem.blocks]

    def run(weight: tf.Tensor) -> list[dict[str, tf.Tensor]]:
        found = []
        for start, size in blocks:
            block = compute(weight, start, size)
            found.append({kept: block[kept] for kept in ("rows", "query") if kept in block})
        return found

    def join(found: list[dict[str, tf.Tensor]]) -> dict[str, np.ndarray]:
        return row_local(
            step, found, lambda parts: np.concatenate([p.numpy().astype(np.float32) for p in parts], axis=1)
        )

    return Step(run, join)


def _forward(function: Function, _names: list[str], _variables: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda inputs, _weight: {"y": function(*inputs)}


def _train(function: Function, names: list[str], variables: Mapping[str, Any]) -> Callable[..., Any]:
    def compute(inputs: list[tf.Tensor], weight: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs)
            loss = tf.reduce_sum(y * weight)
        gradients = tape.gradient(loss, [*inputs, *variables.values()])
        return {"y": y, **dict(zip([*names, *variables], gradients, strict=True))}

    return compute


def _r1(function: Function, names: list[str], variables: Mapping[str, Any]) -> Callable[..., Any]:
    def compute(inputs: list[tf.Tensor], weight: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = tf.reduce_sum(function(*inputs) * weight)
            penalty = tf.add_n([tf.reduce_sum(tf.square(g)) for g in inner.gradient(loss, inputs)])
        gradients = outer.gradient(
            penalty, [*inputs, *variables.values()], unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return dict(zip([*names, *variables], gradients, strict=True))

    return compute


def _to_numpy(values: tf.Tensor) -> np.ndarray:
    answer = tf.convert_to_tensor(values).numpy().astype(np.float32)
    return answer[0, 0] if answer.shape[:2] == (1, 1) and answer.ndim == 4 else answer


def _core(name: str) -> Function:
    if name == "ours":
        return attend
    if name == "dense":
        return lambda query, key, value: tf.matmul(
            tf.nn.softmax(tf.matmul(query, key, transpose_b=True)), value
        )
    raise ValueError(name)


def _layer(name: str, problem: Problem) -> tuple[Function, dict[str, tf.Variable]]:
    """The layer as a function of x, and its variables by canonical or foreign name."""
    if name == "ours":
        from selfattn_keras import from_canonical

        mixed = None if problem.cell.dtype == "float32" else f"mixed_{problem.cell.dtype}"
        layer = from_canonical(problem.config, problem.params, dtype=mixed)
        return layer, {
            ".".join(variable.path.split("/")[-2:])
            if "gamma" not in variable.path
            else "gamma": variable.value
            for variable in layer.trainable_variables
        }
    variables = {key: tf.Variable(values) for key, values in problem.params.items()}
    if name == "dense":
        return lambda x: _published(variables, x, problem.config.kv_pool), variables
    if name == "keras-mha":
        return _multi_head(problem)
    raise ValueError(name)


def _published(variables: Mapping[str, tf.Variable], x: tf.Tensor, side: int) -> tf.Tensor:
    """The published layer, in channels-last form. The pooled one is that of github.com/brain-research/self-attention-gan."""

    def project(name: str, maps: tf.Tensor) -> tf.Tensor:
        projected = tf.nn.conv2d(maps, parameters[f"{name}.kernel"][None, None], 1, "SAME")
        return projected + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else projected

    parameters = {name: tf.cast(values, x.dtype) for name, values in variables.items()}
    query, key, value = (project(name, x) for name in ("query", "key", "value"))
    if side > 1:
        key, value = (tf.nn.max_pool2d(maps, side, side, "VALID") for maps in (key, value))
    query, key, value = (
        tf.reshape(maps, (maps.shape[0], -1, maps.shape[-1])) for maps in (query, key, value)
    )
    attention = tf.nn.softmax(tf.matmul(query, key, transpose_b=True))  # (B, N, M)
    out = tf.reshape(tf.matmul(attention, value), (*x.shape[:3], value.shape[-1]))
    if "out.kernel" in parameters:
        out = project("out", out)
    return parameters["gamma"] * out + x


def _multi_head(problem: Problem) -> tuple[Function, dict[str, tf.Variable]]:
    """Keras' own layer, adapted to compute ours: its scale is folded into the query, its extra projection is the identity."""
    config = problem.config
    if config.kv_pool > 1:
        raise RefusedError("no pooling of keys and values")
    layer = keras.layers.MultiHeadAttention(1, config.qk_channels, value_dim=config.value_channels)
    rows = (problem.cell.batch, problem.cell.positions, config.channels)
    layer.build(rows, rows)
    scale = np.float32(math.sqrt(config.qk_channels))
    weights = []
    for name in ("query", "key", "value"):
        factor = scale if name == "query" else np.float32(1)
        weights += [
            factor * problem.params[f"{name}.kernel"][:, None],
            factor * problem.params[f"{name}.bias"][None],
        ]
    layer.set_weights(
        [*weights, np.eye(config.channels, dtype=np.float32)[None], np.zeros(config.channels, np.float32)]
    )
    gamma = tf.Variable(problem.params["gamma"])

    def function(x: tf.Tensor) -> tf.Tensor:
        maps = tf.reshape(x, rows)
        return gamma * tf.reshape(layer(maps, maps), x.shape) + x

    variables = {f"{_FOREIGN}{variable.path}": variable.value for variable in layer.trainable_variables}
    return function, {**variables, "gamma": gamma}
