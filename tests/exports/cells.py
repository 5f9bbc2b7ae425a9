"""What is exported, by what and for what: the cells of the sweep, as data; no framework here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from numpy.typing import NDArray

from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs

__all__ = ["CONFIGS", "EXPORTERS", "FORMS", "ROWS_A_BLOCK", "SIZES", "Exporter", "Form", "params_of"]

CONFIGS: Mapping[str, SelfAttentionConfig] = {
    "flat": SelfAttentionConfig(11, 3),
    "pooled": SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2),
}

SIZES = (2, 7, 9)
"""Batch, height and width of an export with fixed sizes: 63 positions, and a row and a column in no pooling window."""

ROWS_A_BLOCK = 10
"""Query rows of an export in several blocks, of which the last is shorter."""


@dataclass(frozen=True)
class Form:
    """Which layer is exported, and how.

    Args:
        config: name in `CONFIGS`.
        blocks: whether `block_size` makes several blocks of the map; otherwise one holds it.
        open: whether batch, height and width are open.
        with_map: whether the map is an output too.
    """

    config: str = "flat"
    blocks: bool = False
    open: bool = False
    with_map: bool = False

    @property
    def words(self) -> str:
        """As it stands in reports and file names."""
        blocks, sizes = "blocks" if self.blocks else "one-block", "open" if self.open else "fixed"
        return "-".join((self.config, blocks, sizes, *(("map",) if self.with_map else ())))

    @property
    def block_size(self) -> int | None:
        """For the constructor of the layer."""
        return ROWS_A_BLOCK if self.blocks else None


FORMS = tuple(
    Form(config, blocks, open_, with_map)
    for config, blocks, open_, with_map in product(CONFIGS, *[(False, True)] * 3)
)


@dataclass(frozen=True)
class Exporter:
    """A way out of a framework.

    Args:
        name: unique; also of the function in the module `source`.
        source: module beside this one: `of_torch`, `of_keras` or `of_flax`.
        layer: whose layer it is, as in the page.
        words: how it is exported, as in the page.
        suffix: of the files, by which `selfattn verify` knows their format.
        runtimes: of that format, each a cell.
        versions: distributions that the page names.
        environment: of the process that exports.
    """

    name: str
    source: str
    layer: str
    words: str
    suffix: str
    runtimes: tuple[str, ...]
    versions: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def _keras(
    framework: str, name: str, words: str, suffix: str, runtimes: tuple[str, ...], *versions: str
) -> Exporter:
    distribution = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}[framework]
    return Exporter(
        f"keras_{framework}_{name}",
        "of_keras",
        f"Keras on {'PyTorch' if framework == 'torch' else {'tensorflow': 'TensorFlow', 'jax': 'JAX'}[framework]}",
        words,
        suffix,
        runtimes,
        ("keras", distribution, *versions),
        {"KERAS_BACKEND": framework},
    )


def _torch(name: str, words: str, suffix: str, runtimes: tuple[str, ...], *versions: str) -> Exporter:
    return Exporter(name, "of_torch", "PyTorch", words, suffix, runtimes, ("torch", *versions))


def _flax(name: str, words: str, suffix: str, runtimes: tuple[str, ...], *versions: str) -> Exporter:
    return Exporter(name, "of_flax", "Flax", words, suffix, runtimes, ("flax", "jax", *versions))


_ONNX, _LITERT = ("onnxruntime", "openvino"), ("ai-edge-litert", "tensorflow-lite")

EXPORTERS: tuple[Exporter, ...] = (
    _torch("torch_export", "`torch.export`", ".pt2", ("torch",)),
    _torch("onnx_dynamo", "ONNX, `torch.onnx.export`", ".onnx", _ONNX, "onnx"),
    _torch("onnx_traced", "ONNX, `torch.onnx.export(dynamo=False)`", ".onnx", _ONNX, "onnx"),
    _torch("openvino_traced", "OpenVINO, from a trace", ".xml", ("openvino",), "openvino"),
    _torch("openvino_exported", "OpenVINO, from `torch.export`", ".xml", ("openvino",), "openvino"),
    _torch("executorch", "ExecuTorch, XNNPACK", ".pte", ("executorch",), "executorch"),
    _torch("litert_torch", "LiteRT, `litert-torch`", ".tflite", _LITERT, "litert-torch"),
    _torch("coreml_exported", "Core ML, from `torch.export`", ".mlpackage", ("",), "coremltools"),
    _torch("coreml_traced", "Core ML, from a trace", ".mlpackage", ("",), "coremltools"),
    _keras("tensorflow", "keras", "`.keras`", ".keras", ("keras-tensorflow",)),
    _keras("tensorflow", "saved_model", "SavedModel", "", ("tensorflow",)),
    _keras("tensorflow", "onnx", "ONNX", ".onnx", _ONNX, "tf2onnx"),
    _keras("tensorflow", "litert", "LiteRT", ".tflite", _LITERT),
    _keras("tensorflow", "openvino", "OpenVINO", ".xml", ("openvino",), "openvino"),
    _keras("jax", "keras", "`.keras`", ".keras", ("keras-jax",)),
    _keras("jax", "saved_model", "SavedModel", "", ("tensorflow",), "tensorflow"),
    _keras("jax", "onnx", "ONNX", ".onnx", _ONNX, "jax2onnx"),
    _keras("jax", "openvino", "OpenVINO", ".xml", ("openvino",), "openvino"),
    _keras("torch", "keras", "`.keras`", ".keras", ("keras-torch",)),
    _keras("torch", "torch", "`torch.export`", ".pt2", ("torch",)),
    _keras("torch", "onnx", "ONNX", ".onnx", _ONNX, "onnx"),
    _keras("torch", "litert", "LiteRT", ".tflite", _LITERT, "litert-torch"),
    _keras("torch", "openvino", "OpenVINO", ".xml", ("openvino",), "openvino"),
    _flax("jax_export", "`jax.export`", ".jax", ("jax",)),
    _flax("saved_model", "SavedModel, `jax2tf`", "", ("tensorflow",), "tensorflow"),
    _flax("orbax_export", "SavedModel, `orbax-export`", "", ("tensorflow",), "orbax-export"),
    _flax("onnx", "ONNX, `jax2onnx`", ".onnx", _ONNX, "jax2onnx"),
)


def params_of(config: str) -> dict[str, NDArray[Any]]:
    """The weights of every export of a config, float32: gamma and biases are not zero, logits are about 8.

    Args:
        config: name in `CONFIGS`.
    """
    case = Case("export", "forward", "", CONFIGS[config], SIZES)
    return dict(inputs(case, "float32").params)
