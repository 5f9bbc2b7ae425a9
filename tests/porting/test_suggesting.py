"""What `inspect` says where no dialect fits: the nearest ones, and a dialect file as far as shapes tell."""

import json

import numpy as np
import pytest

import selfattn_core
from selfattn_core import spec
from selfattn_core.porting import PortError, inspect, port
from selfattn_core.porting.dialects.catalogue import dialect
from selfattn_core.porting.dialects.parse import parse_dialect


def kernels(shapes, seed=0):
    make = np.random.Generator(np.random.PCG64(seed))
    return {name: make.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def inspected(folder, shapes):
    np.savez(folder / "net.npz", **kernels(shapes))
    return inspect(folder / "net.npz")


TORCH = {
    "net.4.first.conv.weight": (5, 40, 1, 1),
    "net.4.first.conv.bias": (5,),
    "net.4.second.conv.weight": (5, 40, 1, 1),
    "net.4.second.conv.bias": (5,),
    "net.4.third.conv.weight": (40, 40, 1, 1),
    "net.4.third.conv.bias": (40,),
    "net.4.strength": (1,),
    "net.3.weight": (40, 12, 3, 3),
    "net.5.weight": (7, 40, 1, 1),
}


def test_shapes_make_a_dialect_file_with_questions(tmp_path):
    report = inspected(tmp_path, TORCH)
    assert report.blocks == ()
    (group,) = report.groups
    assert group.prefix == "net.4."
    assert group.kernels == {
        "net.4.first.conv.weight": (40, 5),
        "net.4.second.conv.weight": (40, 5),
        "net.4.third.conv.weight": (40, 40),
    }
    assert group.numbers == ("net.4.strength",)
    assert group.others == ()
    text = report.to_text()
    assert text.count('= "?"') == 2
    for part in (
        "which one acts as query, key",
        'value = "third"',
        'kernel = "{path}.conv.weight"',
        "1/sqrt",
    ):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["groups"][0]["prefix"] == "net.4."


def test_a_question_is_no_dialect_until_it_is_answered(tmp_path):
    (group,) = inspected(tmp_path, TORCH).groups
    (tmp_path / "mine.toml").write_text(group.toml, encoding="utf-8")
    with pytest.raises(PortError, match=r'roles.query = "\?" is an open question.*\n.*roles.key = "\?"'):
        port(tmp_path / "net.npz", tmp_path / "o.safetensors", dialect=str(tmp_path / "mine.toml"))
    assert not (tmp_path / "o.safetensors").exists()


def test_the_answered_file_ports_the_layer(tmp_path):
    (group,) = inspected(tmp_path, TORCH).groups
    answered = group.toml.replace('query = "?"', 'query = "second"').replace('key = "?"', 'key = "first"')
    (tmp_path / "mine.toml").write_text(answered, encoding="utf-8")
    tensors = kernels(TORCH)
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((2, 3, 5, 40))
    flat = x.reshape(2, 15, 40)

    def project(name):
        kernel, bias = (tensors[f"net.4.{name}.conv.{part}"].astype(float) for part in ("weight", "bias"))
        return flat @ kernel[:, :, 0, 0].T + bias

    scores = project("second") @ project("first").swapaxes(1, 2)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    out = (e / e.sum(-1, keepdims=True)) @ project("third")
    y = (tensors["net.4.strength"] * out + flat).reshape(x.shape)
    np.savez(tmp_path / "io.npz", x=x.transpose(0, 3, 1, 2), y=y.transpose(0, 3, 1, 2))
    report = port(
        tmp_path / "net.npz",
        tmp_path / "o.safetensors",
        dialect=str(tmp_path / "mine.toml"),
        check=tmp_path / "io.npz",
    )
    assert report.checks[0].outcome == "passed"
    assert any("kv_pool = 1" in text for text in report.blocks[0].assumptions)
    config, params = selfattn_core.load(tmp_path / "o.safetensors")
    wide = {name: value.astype(float) for name, value in params.items()}
    # Of the largest number, because a sum that cancels keeps the rounding of its terms.
    np.testing.assert_allclose(spec.forward(config, wide, x), y, rtol=0, atol=1e-12 * np.abs(y).max())


def roles(group):
    table = group.toml.partition("[roles]")[2].partition("[gamma]")[0]
    content = {line.split(" = ")[0]: line for line in table.splitlines() if " = " in line}
    return {
        role: content[role].count('"') // 2 - ("?" in content[role])
        for role in ("query", "key", "value", "out")
        if role in content
    }


@pytest.mark.parametrize(
    ("shapes", "axes", "choices"),
    [
        # Keras, the authors' form; the vectors u of TensorFlow's spectral norm lie beside.
        (
            {
                **{f"g/{n}/w": (1, 1, 40, 5) for n in "ab"},
                "g/c/w": (1, 1, 40, 20),
                "g/d/w": (1, 1, 20, 40),
                "g/a/u": (1, 5),
                "g/s": (),
            },
            "HWIO",
            {"query": 2, "key": 2, "value": 1, "out": 1},
        ),
        # As narrow inside as the query: any of three.
        (
            {**{f"{n}.weight": (5, 40, 1) for n in "abc"}, "d.weight": (40, 5, 1), "s": (1,)},
            "OIL",
            {"query": 3, "key": 3, "value": 3, "out": 1},
        ),
        # As wide as the map: value and out too.
        (
            {**{f"{n}.k": (5, 40) for n in "ab"}, **{f"{n}.k": (40, 40) for n in "cd"}, "s": (1,)},
            "OI",
            {"query": 2, "key": 2, "value": 2, "out": 2},
        ),
        (
            {**{f"{n}.k": (40, 5) for n in "ab"}, "c.k": (40, 40), "s": ()},
            "IO",
            {"query": 2, "key": 2, "value": 1},
        ),
    ],
)
def test_what_shapes_tell(shapes, axes, choices, tmp_path):
    (group,) = inspected(tmp_path, shapes).groups
    assert f'axes = "{axes}"' in group.toml
    assert roles(group) == choices
    assert group.others == tuple(name for name in shapes if name.endswith("/u"))
    assert any("g/a/u" in question for question in group.questions) == bool(group.others)


def test_kernels_with_pytorch_s_spectral_norm_and_no_gain(tmp_path):
    shapes = {}
    for name, out in {"a": 5, "b": 5, "c": 40}.items():
        shapes |= {
            f"m.{name}.parametrizations.weight.original": (out, 40, 1, 1),
            f"m.{name}.parametrizations.weight.0._u": (out,),
            f"m.{name}.parametrizations.weight.0._v": (40,),
        }
    shapes |= {"m.a.bias": (5,), "m.b.bias": (5,)}
    (group,) = inspected(tmp_path, shapes).groups
    assert group.others == ()
    answered = (
        group.toml.replace('query = "?"', 'query = "a"')
        .replace('key = "?"  # "a"', 'key = "b"  # "a"')
        .replace('key = "?"', "value = 1.0")
    )
    (tmp_path / "mine.toml").write_text(answered, encoding="utf-8")
    assert 'bias_free = ["value"]' in answered
    report = port(tmp_path / "net.npz", tmp_path / "o.safetensors", dialect=str(tmp_path / "mine.toml"))
    assert any("uᵀWv" in step for tensor in report.blocks[0].tensors for step in tensor.steps)


@pytest.mark.parametrize(
    "shapes",
    [
        # Three layers of a perceptron; a bottleneck with a 3×3 kernel; widths that are added to nothing; integers.
        {"a.weight": (40, 40), "b.weight": (40, 40), "c.weight": (40, 40), "a.bias": (40,)},
        {
            "a.weight": (5, 40, 1, 1),
            "b.weight": (5, 40, 1, 1),
            "c.weight": (40, 40, 1, 1),
            "d.weight": (5, 5, 3, 3),
            "s": (1,),
        },
        {"a.weight": (5, 40, 1, 1), "b.weight": (5, 40, 1, 1), "c.weight": (20, 40, 1, 1), "s": (1,)},
        {"a.weight": (5, 40, 1, 1), "b.weight": (6, 40, 1, 1), "c.weight": (40, 40, 1, 1), "s": (1,)},
        {"a.weight": (3, 4), "s": (1,)},
    ],
)
def test_what_is_no_such_layer_is_not_called_one(shapes, tmp_path):
    report = inspected(tmp_path, shapes)
    assert report.groups == ()
    text = report.to_text()
    assert (
        "no tensors under one prefix have the shapes of an attention layer: 1×1 kernels C → D, C → D and C → C"
        in text
    )


def test_the_nearest_dialects_with_the_first_key_that_differs(tmp_path):
    report = inspected(
        tmp_path,
        {
            "a.theta.weight": (5, 40, 1, 1),
            "a.phi.weight": (5, 40, 1, 1),
            "a.value.weight": (20, 40, 1, 1),
            "a.o.weight": (40, 20, 1, 1),
            "a.gamma": (),
        },
    )
    first = report.nearest[0]
    assert (first.dialect, first.prefix, first.missing) == ("biggan", "a.", "g/weight")
    assert "near    biggan: BigGAN-PyTorch, layers.Attention, at a., missing: g/weight" in report.to_text()
    assert len(report.groups) == 1


def test_a_fitting_dialect_leaves_nothing_to_suggest(tmp_path):
    shapes = {
        **{f"attn.{n}_conv.weight": (5, 40, 1, 1) for n in ("query", "key")},
        "attn.value_conv.weight": (40, 40, 1, 1),
        **{f"attn.{n}_conv.bias": (k,) for n, k in (("query", 5), ("key", 5), ("value", 40))},
        "attn.gamma": (1,),
    }
    report = inspected(tmp_path, shapes | {f"other.{n}": shape for n, shape in TORCH.items()})
    assert report.groups == ()
    assert report.nearest == ()


def test_a_refusal_says_its_reason_before_anything_fits(tmp_path):
    shapes = {
        **{f"attn.{n}.weight": (5, 40, 1, 1) for n in ("query", "key")},
        "attn.value.weight": (40, 40, 1, 1),
        **{f"attn.{n}.bias": (k,) for n, k in (("query", 5), ("key", 5), ("value", 40))},
        "attn.gamma": (1,),
    }
    (block,) = inspected(tmp_path, shapes).blocks
    assert [(fit.dialect, fit.verdict) for fit in block.fits][:2] == [
        ("torchgan", "refused"),
        ("torch", "fits"),
    ]


def test_a_block_that_almost_is_a_refused_one_says_why(tmp_path):
    shapes = {f"vae.{n}.weight": (40, 40) for n in ("query", "key", "value", "proj_attn")}
    shapes |= {f"vae.{n}.bias": (40,) for n in ("query", "key", "value", "proj_attn")}
    report = inspected(tmp_path, shapes | {"vae.group_norm.weight": (40,)})
    (fit,) = (fit for fit in report.blocks[0].fits if fit.dialect == "diffusers")
    assert fit.verdict == "almost"
    assert dialect("diffusers").reason in " ".join(fit.reasons)
    assert dialect("diffusers").instead in report.to_text()


def test_a_question_in_any_field_is_one(tmp_path):
    text = dialect("biggan").text.replace('key = "gamma"', 'key = "?"')
    with pytest.raises(PortError, match=r'gamma.key = "\?" is an open question; answer it from the code'):
        parse_dialect(text, "mine.toml")
