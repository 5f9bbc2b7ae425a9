"""The layer compiled, exported and run by ONNX Runtime."""

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from selfattn_core import spec
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.verdicts.expected import expect
from selfattn_core.conformance.verdicts.tolerance import judge
from selfattn_torch import SelfAttention2d
from tests.backends.torch.layers import CASE, channels_last, layer_of_case

BOTH = pytest.mark.parametrize("layer_of", ["001", "006"], ids=["flat", "pooled"])
SIZES = ((2, 5, 7), (3, 8, 4), (4, 9, 11))
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}

# torch's own compiler and exporter on their own older parts.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script", "ignore:`isinstance.treespec", "ignore::DeprecationWarning:torch.*"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def maps_of(size, channels, seed=1):
    batch, height, width = size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


def assert_close(got, want):
    """Equal but for rounding, since an exported layer computes its projections one by one."""
    assert (got - want).abs().max() <= 16 * torch.finfo(torch.float32).eps * want.abs().max()


@BOTH
def test_one_compilation_serves_every_size_forward_and_backward(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-VJP-{layer_of}"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for size in SIZES:
        maps = maps_of(size, x.shape[1]).requires_grad_()
        twin = maps.detach().clone().requires_grad_()
        cotangent = maps_of(size, x.shape[1], seed=2)
        got = torch.autograd.grad(compiled(maps), [maps, *layer.parameters()], cotangent)
        want = torch.autograd.grad(layer(twin), [twin, *layer.parameters()], cotangent)
        for one, other in zip(got, want, strict=True):
            scale = max(value.abs().max() for value in want)
            assert (one - other).abs().max() <= 128 * torch.finfo(torch.float32).eps * scale
    assert counter.frame_count == 1


@BOTH
def test_sizes_found_to_vary_are_compiled_for_once(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-FWD-{layer_of}"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in SIZES:
        maps = maps_of(size, x.shape[1])
        assert_close(compiled(maps), layer(maps))
    assert counter.frame_count == 2


@BOTH
def test_the_map_and_unbatched_input_compile_too(layer_of):
    case = CASE[f"SA-MAP-{layer_of}"]
    layer, x, _ = layer_of_case(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, attention = compiled(x, need_weights=True)
    verdict = judge("map", attention.detach().numpy(), expect(case, "float32")["map"], "float32")
    assert verdict.passed, verdict.message
    assert_close(compiled(x[0]), y[0])


def test_a_compiled_layer_refuses_what_does_not_fit():
    layer, x, _ = layer_of_case(CASE["SA-FWD-001"])
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(ValueError, match="its 23 channels should be 24"):
        compiled(x[:, :23])


@BOTH
def test_the_penalty_inside_a_compiled_step(layer_of):
    case = CASE[f"SA-GAN-{layer_of}"]
    layer, x, w = layer_of_case(case, "float64")

    def step(x):
        (slope,) = torch.autograd.grad((layer(x) * w).sum(), x, create_graph=True)
        return slope.square().sum()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        penalty = torch.compile(step, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    penalty.backward()
    expected = expect(case, "float64")
    assert judge("r1", np.array(penalty.item()), expected["r1"], "float64").passed
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        array = gradient[:, :, 0, 0].T if gradient.dim() == 4 else gradient
        canonical = name.replace("weight", "kernel")
        verdict = judge(canonical, array.numpy(), expected[canonical], "float64")
        assert verdict.passed, verdict.message


def test_a_penalty_around_a_compiled_layer_raises():
    layer, x, _ = layer_of_case(CASE["SA-GAN-001"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.square().sum().backward()


def exported(layer, x, **keywords):
    shapes = {"x": DYNAMIC} | dict.fromkeys(keywords)
    return torch.export.export(layer, (x,), keywords, dynamic_shapes=shapes)


@BOTH
def test_an_exported_layer_is_saved_loaded_and_equal_at_any_size(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-FWD-{layer_of}"])
    buffer = io.BytesIO()
    torch.export.save(exported(layer, x), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer)
    assert {
        str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"
    } <= {
        "aten",
        "<built-in function floordiv>",
        "<built-in function mul>",
    }
    twin = program.module()
    for size in SIZES:
        maps = maps_of(size, x.shape[1])
        assert_close(twin(maps), layer(maps))


@BOTH
def test_the_map_is_exported_if_it_is_asked_for_then(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-FWD-{layer_of}"])
    twin = exported(layer, x, need_weights=True).module()
    maps = maps_of(SIZES[1], x.shape[1])
    for got, want in zip(twin(maps, need_weights=True), layer(maps, need_weights=True), strict=True):
        assert_close(got, want)


def test_the_map_of_a_layer_exported_without_it_is_refused():
    layer, x, _ = layer_of_case(CASE["SA-FWD-001"])
    twin = exported(layer, x).module()
    with pytest.raises(ValueError, match="need_weights"):
        twin(x, need_weights=True)
    with pytest.raises(ValueError, match="same number"):
        twin(x, True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@BOTH
def test_a_traced_layer_is_equal_at_any_size(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-FWD-{layer_of}"])
    traced = torch.jit.trace(layer, (x,))
    for size in SIZES:
        maps = maps_of(size, x.shape[1])
        assert_close(traced(maps), layer(maps))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@BOTH
def test_scripting_is_refused_and_a_traced_layer_stands_in_a_scripted_module(layer_of):
    layer, x, _ = layer_of_case(CASE[f"SA-FWD-{layer_of}"])
    for module in (layer, nn.Sequential(nn.Identity(), layer)):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.* torch\.jit\.trace\(layer, x\)"):
            torch.jit.script(module)
    scripted = torch.jit.script(nn.Sequential(nn.Identity(), torch.jit.trace(layer, (x,))))
    for size in SIZES:
        maps = maps_of(size, x.shape[1])
        assert_close(scripted(maps), layer(maps))


class Whole(torch.fx.Tracer):
    """Takes a layer as one node."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, SelfAttention2d) or super().is_leaf_module(m, module_qualified_name)


def test_fx_traces_around_the_layer_and_not_through_it():
    layer, x, _ = layer_of_case(CASE["SA-FWD-006"])
    network = nn.Sequential(nn.Conv2d(x.shape[1], x.shape[1], 1), layer)
    with pytest.raises(torch.fx.proxy.TraceError, match=r"Use torch\.export, or make the layer a leaf"):
        torch.fx.symbolic_trace(network)
    traced = torch.fx.GraphModule(network, Whole().trace(network))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert torch.equal(traced(x), network(x))


@BOTH
def test_onnx_runtime_gives_the_same_at_any_size(layer_of, tmp_path):
    case = CASE[f"SA-FWD-{layer_of}"]
    layer, x, _ = layer_of_case(case)
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes={"x": DYNAMIC}, verbose=False)
    program.save(tmp_path / "layer.onnx")
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    (y,) = session.run(None, {name: x.numpy()})
    verdict = judge("y", y.transpose(0, 2, 3, 1), expect(case, "float32")["y"], "float32")
    assert verdict.passed, verdict.message
    params = inputs(case, "float64").params
    for size in SIZES[1:]:
        maps = maps_of(size, x.shape[1])
        (y,) = session.run(None, {name: maps.numpy()})
        want = spec.forward(case.config, params, channels_last(maps.double()))
        error = np.abs(y.transpose(0, 2, 3, 1) - want).max()
        assert error <= 16 * np.finfo("float32").eps * np.abs(want).max()


# The older exporter is deprecated, and warns of each size that the layer checks.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@BOTH
def test_onnx_by_the_older_exporter_which_traces(layer_of, tmp_path):
    case = CASE[f"SA-FWD-{layer_of}"]
    layer, x, _ = layer_of_case(case)
    axes = dict(enumerate("bchw"))
    torch.onnx.export(
        layer, (x,), tmp_path / "layer.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": axes}
    )
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    verdict = judge("y", y.transpose(0, 2, 3, 1), expect(case, "float32")["y"], "float32")
    assert verdict.passed, verdict.message


def test_an_exported_layer_has_operators_that_converters_know():
    layer, x, _ = layer_of_case(CASE["SA-FWD-006"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, (x,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    kinds |= {str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes}
    assert {"aten::transpose", "aten.transpose.int"} <= kinds
    # Tracing converters stop at the first, Core ML's at the others.
    assert kinds.isdisjoint({"aten::mT", "aten::addcmul", "aten.addcmul.default"})


def test_onnx_with_the_map(tmp_path):
    layer, x, _ = layer_of_case(CASE["SA-FWD-006"])
    torch.onnx.export(
        layer,
        (x,),
        tmp_path / "layer.onnx",
        kwargs={"need_weights": True},
        dynamo=True,
        dynamic_shapes={"x": DYNAMIC, "need_weights": None},
        output_names=["y", "map"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    maps = maps_of(SIZES[1], x.shape[1])
    attention = session.run(["map"], {session.get_inputs()[0].name: maps.numpy()})[0]
    want = layer(maps, need_weights=True)[1].detach().numpy()
    np.testing.assert_allclose(attention, want, atol=16 * np.finfo("float32").eps * want.max())
