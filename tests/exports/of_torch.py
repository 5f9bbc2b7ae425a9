"""The PyTorch layer through its exporters; each writes the file of a form."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfattn_torch import from_canonical
from tests.exports.cells import CONFIGS, SIZES, Form, params_of

# Sides of more than one window of any pooling, and no two sizes alike: of a size of 1, or a shared one, PyTorch makes a
# constant.
_TRACED = (3, 6, 8)
_LARGEST = 64


class _WithMap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, need_weights=True)


def _layer(form: Form) -> nn.Module:
    config = CONFIGS[form.config]
    layer = from_canonical(config, params_of(form.config), block_size=form.block_size).eval()
    return _WithMap(layer) if form.with_map else layer


def _example(form: Form) -> torch.Tensor:
    batch, height, width = _TRACED if form.open else SIZES
    return torch.zeros(batch, CONFIGS[form.config].channels, height, width)


def _names(form: Form) -> list[str]:
    return ["y", "map"] if form.with_map else ["y"]


def _dynamic(form: Form, size: Any = torch.export.Dim.DYNAMIC) -> Any:
    return ({0: size, 2: size, 3: size},) if form.open else None


def _program(form: Form) -> Any:
    return torch.export.export(_layer(form), (_example(form),), dynamic_shapes=_dynamic(form))


def _traced(form: Form) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(_layer(form), (_example(form),))


def torch_export(form: Form, path: Path) -> None:
    torch.export.save(_program(form), path)


def onnx_dynamo(form: Form, path: Path) -> None:
    torch.onnx.export(
        _layer(form),
        (_example(form),),
        path,
        dynamo=True,
        dynamic_shapes=_dynamic(form),
        input_names=["x"],
        output_names=_names(form),
        verbose=False,
    )


def onnx_traced(form: Form, path: Path) -> None:
    axes = {"x": dict(zip((0, 2, 3), "bhw", strict=True))} if form.open else None
    torch.onnx.export(
        _layer(form),
        (_example(form),),
        path,
        dynamo=False,
        dynamic_axes=axes,
        input_names=["x"],
        output_names=_names(form),
    )


def _openvino(model: Any, form: Form, path: Path, **options: Any) -> None:
    import openvino

    batch, height, width = (-1, -1, -1) if form.open else SIZES
    # Without it, also the fixed sizes of a program of torch.export become open in the file, and others are refused.
    shape = [batch, CONFIGS[form.config].channels, height, width]
    openvino.save_model(openvino.convert_model(model, input=shape, **options), path, compress_to_fp16=False)


def openvino_traced(form: Form, path: Path) -> None:
    _openvino(_layer(form), form, path, example_input=_example(form))


def openvino_exported(form: Form, path: Path) -> None:
    _openvino(_program(form), form, path)


def executorch(form: Form, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # A program plans its memory for the largest sizes, and is asked at these.
    sizes = [torch.export.Dim(name, min=4, max=16) for name in "hw"]
    dynamic = ({0: torch.export.Dim("b", max=3), 2: sizes[0], 3: sizes[1]},) if form.open else None
    program = torch.export.export(_layer(form), (_example(form),), dynamic_shapes=dynamic)
    to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().save(str(path))


def litert_torch(form: Form, path: Path) -> None:
    import litert_torch as converter

    sizes = [
        torch.export.Dim(name, min=least, max=_LARGEST) for name, least in zip("bhw", (1, 4, 4), strict=True)
    ]
    dynamic = ({0: sizes[0], 2: sizes[1], 3: sizes[2]},) if form.open else None
    converter.convert(_layer(form), (_example(form),), dynamic_shapes=dynamic).export(str(path))


def _coreml(program: Any, form: Form, path: Path, *, named: bool) -> None:
    import coremltools

    batch, height, width = [coremltools.RangeDim(2, _LARGEST)] * 3 if form.open else SIZES
    shape = (batch, CONFIGS[form.config].channels, height, width)
    converted = coremltools.convert(
        program,
        # The shape of a program of torch.export is in it.
        inputs=[coremltools.TensorType(name="x", shape=shape)] if named else None,
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,
    )
    converted.save(str(path))


def coreml_exported(form: Form, path: Path) -> None:
    _coreml(_program(form).run_decompositions({}), form, path, named=False)


def coreml_traced(form: Form, path: Path) -> None:
    _coreml(_traced(form), form, path, named=True)
