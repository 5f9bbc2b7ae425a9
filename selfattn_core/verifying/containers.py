"""The formats of exported layers and their runtimes, as data. Nothing is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from selfattn_core.conformance.backends import is_target
from selfattn_core.verifying.errors import VerifyError

__all__ = ["CONTAINERS", "Container", "Runtime", "container_of"]


@dataclass(frozen=True)
class Runtime:
    """A program that runs files of a format.

    Args:
        name: name for `--runtime`.
        target: "module:function" that opens a file; see `selfattn_runtimes`.
        requires: top-level modules that it needs.
        install: packages for `pip install`.
        environment: environment variables of its process.
    """

    name: str
    target: str
    requires: tuple[str, ...]
    install: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Container:
    """A format of exported files.

    Args:
        title: name of the format as its makers write it.
        suffixes: suffixes of its files. Empty if the format is recognised by something else.
        runtimes: programs that run it, the usual one first.
        refused: why its files cannot be run here, and what to do instead. Empty if they can.
    """

    title: str
    suffixes: tuple[str, ...]
    runtimes: tuple[Runtime, ...] = ()
    refused: str = ""


def _keras(framework: str) -> Runtime:
    return Runtime(
        f"keras-{framework}",
        "selfattn_runtimes.keras:open_artifact",
        ("keras", framework),
        f"'selfattn[keras-{framework}]'",
        {"KERAS_BACKEND": framework},
    )


_OPENVINO = Runtime("openvino", "selfattn_runtimes.openvino:open_artifact", ("openvino",), "openvino")

CONTAINERS: Mapping[str, Container] = {
    "onnx": Container(
        "ONNX",
        (".onnx",),
        (
            Runtime(
                "onnxruntime",
                "selfattn_runtimes.onnx:open_artifact",
                ("onnxruntime", "onnx"),
                "onnxruntime onnx",
            ),
            _OPENVINO,
        ),
    ),
    "litert": Container(
        "LiteRT",
        (".tflite",),
        (
            Runtime(
                "ai-edge-litert",
                "selfattn_runtimes.litert:open_artifact",
                ("ai_edge_litert",),
                "ai-edge-litert",
            ),
            Runtime(
                "tensorflow-lite",
                "selfattn_runtimes.tensorflow_lite:open_artifact",
                ("tensorflow",),
                "'selfattn[tensorflow]'",
            ),
        ),
    ),
    "saved-model": Container(
        "SavedModel",
        (),
        (
            Runtime(
                "tensorflow",
                "selfattn_runtimes.saved_model:open_artifact",
                ("tensorflow",),
                "'selfattn[tensorflow]'",
            ),
        ),
    ),
    "keras": Container("Keras", (".keras",), (_keras("tensorflow"), _keras("jax"), _keras("torch"))),
    "torch-export": Container(
        "torch.export",
        (".pt2",),
        (Runtime("torch", "selfattn_runtimes.torch_export:open_artifact", ("torch",), "'selfattn[torch]'"),),
    ),
    "executorch": Container(
        "ExecuTorch",
        (".pte",),
        (Runtime("executorch", "selfattn_runtimes.executorch:open_artifact", ("executorch",), "executorch"),),
    ),
    "jax-export": Container(
        "jax.export",
        (".jax", ".jax_export", ".stablehlo"),
        (Runtime("jax", "selfattn_runtimes.jax_export:open_artifact", ("jax",), "'selfattn[jax]'"),),
    ),
    "openvino": Container("OpenVINO", (".xml",), (_OPENVINO,)),
    "coreml": Container(
        "Core ML",
        (".mlpackage", ".mlmodel", ".mlmodelc"),
        refused=(
            "Core ML runs on macOS alone, and is not among the runtimes here: write a function that calls "
            "MLModel.predict there, and verify module:function"
        ),
    ),
    "callable": Container(
        "module:callable",
        (),
        (Runtime("python", "selfattn_runtimes.function:open_artifact", (), ""),),
    ),
}
"""The formats by the name for `--container`."""


def container_of(artifact: str, name: str | None = None) -> str:
    """The format of an artifact, by the suffix of a file or by the content of a folder.

    Args:
        artifact: a file, the folder of a SavedModel, or "module:function".
        name: name in `CONTAINERS`, if the suffix does not determine the format.

    Raises:
        VerifyError: if the format is unknown, or the artifact does not exist.

    Example:
        >>> container_of("layer.onnx", "onnx")
        Traceback (most recent call last):
        ...
        selfattn_core.verifying.errors.VerifyError: layer.onnx: no such file or folder.
        >>> container_of("my_package.serving:layer")
        'callable'
    """
    path = Path(artifact)
    if name is not None and name not in CONTAINERS:
        raise VerifyError(f"container {name!r}: expected one of {', '.join(CONTAINERS)}.")
    if not path.exists():
        if name in (None, "callable") and is_target(artifact):
            return "callable"
        raise VerifyError(f"{artifact}: no such file or folder.")
    found = name or _guessed(path)
    if found is None:
        known = ", ".join(suffix for container in CONTAINERS.values() for suffix in container.suffixes)
        raise VerifyError(
            f"{artifact}: its name does not say what format it is. Expected {known}, the folder of a SavedModel or "
            f"module:function; or name it with container, one of {', '.join(CONTAINERS)}."
        )
    if refused := CONTAINERS[found].refused:
        raise VerifyError(f"{artifact}: {refused}.")
    return found


def _guessed(path: Path) -> str | None:
    if path.is_dir() and (path / "saved_model.pb").is_file():
        return "saved-model"
    suffix = path.suffix.lower()
    return next((name for name, container in CONTAINERS.items() if suffix in container.suffixes), None)
