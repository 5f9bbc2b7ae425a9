"""A port from file to file: the numbers, the report, what is verified, and what is refused with nothing written."""

import json
import os
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import selfattn_core
from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.porting import (
    PortError,
    VerificationError,
    inspect,
    load,
    open_tensors,
    port,
    verify,
    write_tensors,
)
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.problems import Remedy
from tests.porting.checkpoints import io_file, output, written
from tests.porting.originals import ORIGINALS, C

# Some originals' vectors are 0.9 long on purpose: whoever makes unit vectors of stored ones is seen.
pytestmark = pytest.mark.filterwarnings("ignore:.*should have the length 1:UserWarning")


def outcomes(report):
    return {check.name: check.outcome for check in report.checks}


def details(report):
    return {check.name: check.detail for check in report.checks}


def failed_report(*arguments, **options):
    """The report of a port whose check fails, which is raised."""
    with pytest.raises(VerificationError, match="nothing was written, because a check failed") as caught:
        port(*arguments, **options)
    assert not caught.value.report.passed
    assert not caught.value.report.written
    return caught.value.report


def error_of(config, params, original):
    x, y = output(original)
    wide = {key: value.astype(np.float64) for key, value in params.items()}
    return np.abs(spec.forward(config, wide, x) - y).max() / max(1, np.abs(y - x).max())


@pytest.mark.parametrize("name", ORIGINALS)
def test_from_file_to_file(name, tmp_path):
    path, original = written(tmp_path, name)
    target = tmp_path / "out.safetensors"
    io = io_file(tmp_path, original)
    report = port(path, target, dialect=original.dialect, settings=original.settings, check=io)
    assert outcomes(report)["source's own output"] == "passed"
    assert report.passed
    assert report.written
    config, params = selfattn_core.load(target)
    assert {value.dtype for value in params.values()} == {np.dtype("float32")}
    # Rounded once to float32.
    assert error_of(config, params, original) < 30 * np.finfo(np.float32).eps
    wide = load(path, dialect=original.dialect, settings=original.settings, dtype="float64")
    assert error_of(*wide, original) < 1e-12


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_dtype_of_the_target(dtype, tmp_path):
    path, original = written(tmp_path, "biggan, ajbrock")
    report = port(path, tmp_path / "out.safetensors", dialect="biggan", dtype=dtype)
    config, params = selfattn_core.load(tmp_path / "out.safetensors")
    assert {str(value.dtype) for value in params.values()} == {dtype}
    assert error_of(config, params, original) < (
        1e-12 if dtype == "float64" else 30 * np.finfo(np.float16).eps
    )
    assert any(f"float32 → {dtype}" in tensor.steps[-1] for tensor in report.blocks[0].tensors)


def test_without_arithmetic_the_bits_stay(tmp_path):
    path, original = written(tmp_path, "pytorch-advanced, plain")
    config, params = load(path, dialect="pytorch-advanced")
    assert config == SelfAttentionConfig(C)
    kernel = original.tensors["net.attn.key_conv.weight"]
    assert params["query.kernel"].tobytes() == np.ascontiguousarray(kernel[:, :, 0, 0].T).tobytes()
    assert params["key.bias"].tobytes() == original.tensors["net.attn.query_conv.bias"].tobytes()


def test_the_report_is_whole(tmp_path):
    path, original = written(tmp_path, "timm")
    target = tmp_path / "out.safetensors"
    report = port(path, target, dialect="timm")
    (block,) = report.blocks
    (out,) = (tensor for tensor in block.tensors if tensor.target == "out.kernel")
    prefix = original.prefix
    assert out.sources == (f"{prefix}z.weight", f"{prefix}norm.weight", f"{prefix}norm.running_var")
    assert (out.source_shape, out.source_dtype) == ((C, 8, 1, 1), "float32")
    assert (out.shape, out.dtype) == ((8, C), "float32")
    (query,) = (tensor for tensor in block.tensors if tensor.target == "query.bias")
    assert query.steps == (f"× {C**-0.5:.6g}, the scale of the scores",)
    assert block.ignored == (f"{prefix}norm.num_batches_tracked",)
    assert any("use_scale = true" in text and "--set use_scale" in text for text in block.assumptions)
    assert any("bn_eps = 1e-05" in text for text in block.assumptions)
    with open_tensors(target) as tensors:
        for tensor in block.tensors:
            from selfattn_core.porting.translation.lazy import checksum

            assert tensor.sha256 == checksum(tensors.read(tensor.target))
        stored = json.loads(tensors.metadata["port"])
    assert stored["blocks"] == json.loads(json.dumps(report.to_dict()))["blocks"]
    assert stored["format"] == "selfattn port report"
    text = report.to_text()
    for part in (
        "timm",
        "z.weight",
        "× batch norm's factor",
        "assumed: use_scale",
        "not run  source's own output",
        "written",
    ):
        assert part in text
    assert outcomes(report) == {
        "source's own output": "not run",
        "round trip": "passed",
        "read back as canonical": "passed",
        "target's layer": "not run",
    }


def test_a_dry_run_writes_nothing(tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    report = port(path, tmp_path / "out.safetensors", dialect="heykeetae", dry_run=True)
    assert report.passed
    assert not report.written
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


# ---- what a name does not tell


def test_the_obvious_mapping_of_a_trap_fails_its_check(tmp_path):
    """Same keys, another meaning: only the source's own output tells, and it does."""
    swapped = dialect("torch").text.replace('query = "query"', 'query = "key"', 1)
    mine = tmp_path / "swapped.toml"
    mine.write_text(swapped.replace('key = "key"', 'key = "query"', 1), encoding="utf-8")
    for name, obvious in (
        ("pytorch-advanced, plain", "heykeetae"),
        ("heykeetae, plain", "pytorch-advanced"),
        ("torch, plain", str(mine)),
    ):
        path, original = written(tmp_path, name)
        target = tmp_path / "out.safetensors"
        report = failed_report(path, target, dialect=obvious, check=io_file(tmp_path, original))
        assert outcomes(report)["source's own output"] == "failed"
        assert not target.exists()


def test_sigma_is_the_gain_and_the_logged_singular_value_is_not_used(tmp_path):
    path, original = written(tmp_path, "biggan, ajbrock")
    first = load(path, dialect="biggan")[1]
    for key in original.tensors:
        if key.endswith("sv0"):
            original.tensors[key] = original.tensors[key] * 3
    np.savez(path, **original.tensors)
    assert all((load(path, dialect="biggan")[1][key] == value).all() for key, value in first.items())


def test_without_a_dialect_candidates_are_listed_and_nothing_is_guessed(tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    with pytest.raises(PortError) as caught:
        port(path, tmp_path / "out.safetensors")
    assert caught.value.problems[0].remedies == (Remedy("dialect"),)
    for name in ("heykeetae", "danet", "pytorch-advanced", "heykeetae-2018-06-08 (refused)"):
        assert name in str(caught.value)
    path, _ = written(tmp_path, "torch, plain")
    with pytest.raises(PortError) as caught:
        port(path, tmp_path / "out.safetensors")
    assert "its keys fit torch, torchgan (refused)." in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_old_hook_and_rosinality_differ_on_the_same_keys(tmp_path):
    """A'' takes the stored weight, G divides weight_orig: the dialect decides, not the keys."""
    path, original = written(tmp_path, "rosinality, rosinality")
    flat = {key: value[..., None] if value.ndim == 3 else value for key, value in original.tensors.items()}
    np.savez(path, **flat)
    old = load(path, dialect="torch", settings={"kv_pool": 1})[1]
    weight = flat["net.attn.value.weight"][:, :, 0, 0].T
    assert (old["value.kernel"] == weight).all()
    assert (
        np.abs(
            load(written(tmp_path, "rosinality, rosinality")[0], dialect="rosinality")[1]["value.kernel"]
            - weight
        ).max()
        > 0.1
    )


@pytest.mark.parametrize("name", ["torchgan", "heykeetae-2018-06-08", "taming", "diffusers", "ashpy"])
def test_what_cannot_be_expressed_is_refused_with_a_reason_and_a_way(name, tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    for arguments in ({"dialect": name}, {"dialect": "heykeetae", "to": name}):
        with pytest.raises(PortError) as caught:
            port(path, tmp_path / "out.safetensors", **arguments)
        assert dialect(name).reason in str(caught.value)
        assert dialect(name).instead in str(caught.value)
        assert list(tmp_path.iterdir()) == [path]


def spoiled(name, tmp_path, change):
    path, original = written(tmp_path, name)
    change(SimpleNamespace(t=original.tensors, prefix=original.prefix))
    np.savez(path, **original.tensors)
    return path, original


def refusal(path, tmp_path, **options):
    with pytest.raises(PortError) as caught:
        port(path, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()
    # An option of the command is no word for somebody who calls a function.
    assert "--" not in str(caught.value)
    return str(caught.value)


def put(key, value):
    def change(file):
        file.t[file.prefix + key] = value

    return change


def drop(*keys):
    def change(file):
        for key in keys:
            del file.t[file.prefix + key]

    return change


NAN = np.full((C,), np.nan, np.float32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heykeetae, plain", drop("gamma"), "missing: gamma"),
        ("heykeetae, plain", drop("query_conv.bias", "value_conv.weight"), "missing: value_conv/weight"),
        ("fgh, gamma never saved", lambda _: None, 'settings={"gamma": VALUE}'),
        ("heykeetae, plain", put("gamma", np.ones((5, 1, 1, 1), np.float32)), "A gain per sample"),
        ("heykeetae, plain", put("norm.weight", np.ones(C, np.float32)), "unused: net.attn.norm.weight"),
        ("biggan, plain", put("theta.bias", np.ones(3, np.float32)), "unused: blocks.3.1.theta.bias"),
        ("heykeetae, plain", put("value_conv.bias", NAN), "net.attn.value_conv.bias holds NaN or infinity"),
        (
            "heykeetae, plain",
            put("query_conv.weight", np.ones((3, C, 3, 3), np.float32)),
            "expected a 1×1 kernel",
        ),
        (
            "heykeetae, plain",
            put("key_conv.weight", np.ones((4, C, 1, 1), np.float32)),
            "the key, goes from 24 to 4",
        ),
        (
            "heykeetae, plain",
            put("value_conv.weight", np.ones((5, C, 1, 1), np.float32)),
            "the layer adds the two",
        ),
        ("heykeetae, plain", put("query_conv.bias", np.ones(4, np.float32)), "expected (3,)"),
        (
            "heykeetae, plain",
            put("query_conv.weight", np.ones((3, C, 1, 1), np.int64)),
            "should be floating point",
        ),
        ("biggan, ajbrock", put("theta.u0", np.ones((1, 4), np.float32)), "expected 3 elements"),
        ("biggan, ajbrock", put("theta.u0", np.zeros((1, 3), np.float32)), "its spectral norm"),
        ("studiogan, hook", put("conv1x1_g.weight_v", np.ones(5, np.float32)), "expected 24"),
        ("sagan-tf", drop("sn_conv_g/u"), "missing: sn_conv_g/u"),
        ("timm", put("norm.running_var", np.full(C, -1, np.float32)), "a variance that is not positive"),
        ("timm", drop("norm.running_var"), "missing: norm/running_var"),
        ("mmcv", put("concat_project.conv.weight", np.ones(3, np.float32)), "the mode is concatenation"),
        (
            "mmcv",
            drop("theta.conv.weight", "theta.conv.bias", "phi.conv.weight", "phi.conv.bias"),
            "the mode is gaussian",
        ),
        (
            "nonlocal, pooled",
            drop("theta.weight", "theta.bias", "phi.0.weight", "phi.0.bias"),
            "the mode is gaussian",
        ),
        (
            "compare-gan, auto, averaged",
            drop("conv2d_g/kernel/ExponentialMovingAverage"),
            "missing: conv2d_g/kernel",
        ),
    ],
)
def test_a_file_that_does_not_fit(name, change, message, tmp_path):
    path, original = spoiled(name, tmp_path, change)
    said = refusal(path, tmp_path, dialect=original.dialect)
    assert message in said
    assert str(path) in said


def test_every_problem_is_said_at_once(tmp_path):
    def change(file):
        put("query_conv.bias", np.ones(4, np.float32))(file)
        put("gamma", np.ones(2, np.float32))(file)
        put("key_conv.weight", np.ones((4, C, 1, 1), np.float32))(file)

    path, _ = spoiled("heykeetae, plain", tmp_path, change)
    with pytest.raises(PortError) as caught:
        load(path, dialect="heykeetae")
    assert [(problem.kind, *problem.names) for problem in caught.value.problems] == [
        ("shape", "net.attn.key_conv.weight"),
        ("shape", "net.attn.gamma"),
    ]
    said = refusal(path, tmp_path, dialect="heykeetae")
    assert "the key, goes from" in said
    assert "expected one element" in said


def test_files_of_taki0112_and_of_its_unused_layer_are_not_confused(tmp_path):
    path, _ = written(tmp_path, "taki0112-out")
    assert "value_channels is 24, but taki0112 uses 12" in refusal(path, tmp_path, dialect="taki0112")
    path, _ = written(tmp_path, "taki0112")
    assert "value_channels is 12, but taki0112-out uses 24" in refusal(path, tmp_path, dialect="taki0112-out")


def test_a_copy_with_other_widths_is_read_and_said_to_be_one(tmp_path):
    make = np.random.Generator(np.random.PCG64(0))
    tensors = {f"{n}_conv.weight": make.standard_normal((5, C, 1, 1)) for n in ("query", "key")}
    tensors |= {"value_conv.weight": make.standard_normal((C, C, 1, 1)), "gamma": np.ones(1)}
    tensors |= {
        f"{n}_conv.bias": make.standard_normal(k) for n, k in (("query", 5), ("key", 5), ("value", C))
    }
    np.savez(tmp_path / "a.npz", **tensors)
    report = port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect="heykeetae")
    assert report.blocks[0].config["qk_channels"] == 5
    assert any("qk_channels is 5, but the original uses 3" in text for text in report.blocks[0].assumptions)


def test_unused_tensors_can_be_allowed(tmp_path):
    path, _ = spoiled("heykeetae, plain", tmp_path, put("norm.weight", np.ones(C, np.float32)))
    for way in (
        lambda **options: port(path, tmp_path / "o.safetensors", **options),
        lambda **options: load(path, **options),
    ):
        with pytest.raises(PortError) as caught:
            way(dialect="heykeetae")
        (problem,) = caught.value.problems
        assert (problem.kind, problem.names) == ("unused", ("net.attn.norm.weight",))
        assert "pass strict=False" in str(caught.value)
        assert "pass --allow-unused" in caught.value.in_command()
    assert load(path, dialect="heykeetae", strict=False)[0].channels == C
    report = port(path, tmp_path / "o.safetensors", dialect="heykeetae", strict=False)
    assert report.blocks[0].unused == ("net.attn.norm.weight",)


def test_settings_change_what_is_assumed(tmp_path):
    path, original = written(tmp_path, "mmcv, use_scale=False")
    io = io_file(tmp_path, original)
    target = tmp_path / "o.safetensors"
    failed_report(path, target, dialect="mmcv", check=io)
    assert port(path, target, dialect="mmcv", settings={"use_scale": "false"}, check=io).passed
    path, original = written(tmp_path, "compare-gan, auto, averaged")
    plain = load(path, dialect="compare-gan", settings={"ema": "false"})[1]
    assert plain["gamma"] == np.float32(0.7)
    assert load(path, dialect="compare-gan")[1]["gamma"] == np.float32(0.7 * 1.2)
    path, _ = written(tmp_path, "biggan-v1, wrapper")
    one, other = (load(path, dialect="biggan-v1", settings={"sn_eps": eps})[1] for eps in (1e-4, 1e-12))
    assert np.abs(one["out.kernel"] - other["out.kernel"]).max() > 1e-4
    path, _ = written(tmp_path, "timm")
    one, other = (load(path, dialect="timm", settings={"bn_eps": eps})[1] for eps in (1e-5, 1e-3))
    assert np.abs(one["out.kernel"] - other["out.kernel"]).max() > 1e-5
    path, _ = written(tmp_path, "heykeetae, plain")
    assert "it has sn_eps" in refusal(path, tmp_path, dialect="heykeetae", settings={"gamma": 1.0})
    path, _ = written(tmp_path, "fgh, plain")
    assert "would contradict it" in refusal(path, tmp_path, dialect="fgh", settings={"gamma": 1.0})


def test_what_does_not_fit_into_16_bits_is_refused(tmp_path):
    path, _ = spoiled("heykeetae, plain", tmp_path, put("value_conv.bias", np.full(C, 1e6, np.float32)))
    said = refusal(path, tmp_path, dialect="heykeetae", dtype="float16")
    assert "value.bias is not finite after float32 → float16" in said


def test_keys_that_cannot_be_told_apart(tmp_path):
    path, original = written(tmp_path, "heykeetae, plain")
    np.savez(path, **original.tensors, **{"net/attn/gamma": np.ones(1)})
    assert "keys that differ only in their separators: net.attn.gamma and net/attn/gamma" in refusal(
        path, tmp_path, dialect="heykeetae"
    )


# ---- several blocks


@pytest.fixture
def network(tmp_path):
    """Two heykeetae blocks in a whole network, whose own convolutions are not to be seen."""
    _, original = written(tmp_path, "heykeetae, plain")
    local = {key.removeprefix(original.prefix): value for key, value in original.tensors.items()}
    tensors = {f"attn1.{key}": value for key, value in local.items()}
    tensors |= {f"attn2.{key}": value * 2 for key, value in local.items()}
    tensors |= {"conv1.weight": np.ones((4, 3, 3, 3), np.float32), "attn10": np.ones(1, np.float32)}
    path = tmp_path / "network.npz"
    np.savez(path, **tensors)
    return path


def test_several_blocks_need_a_name(network, tmp_path):
    assert "holds 2 blocks that look like heykeetae: attn1, attn2. Choose" in refusal(
        network, tmp_path, dialect="heykeetae"
    )
    said = refusal(network, tmp_path, dialect="heykeetae", prefix="attn3")
    assert "has no block 'attn3'" in said
    assert "attn1, attn2." in said
    for spelled in ("attn2", "attn2.", "attn2/"):
        assert load(network, dialect="heykeetae", prefix=spelled)[1]["gamma"] == np.float32(1.4)


def test_several_blocks_into_one_file(network, tmp_path):
    target = tmp_path / "o.safetensors"
    report = port(network, target, dialect="heykeetae", prefix="attn*")
    assert [block.block for block in report.blocks] == ["attn1", "attn2"]
    assert report.tensors_elsewhere == 2
    assert selfattn_core.load(target, block="attn1")[1]["gamma"] == np.float32(0.7)
    assert selfattn_core.load(target, block="attn2")[1]["gamma"] == np.float32(1.4)
    again = port(target, tmp_path / "o.npz", to="torch", prefix=["attn1", "attn2"])
    assert "attn2.query.weight" in [tensor.target for tensor in again.blocks[1].tensors]
    assert load(tmp_path / "o.npz", dialect="torch", prefix="attn2")[1]["gamma"] == np.float32(1.4)
    with pytest.raises(PortError, match="names 2 blocks"):
        load(network, dialect="heykeetae", prefix="*")
    with pytest.raises(PortError, match="belong to one block"):
        port(network, tmp_path / "p.safetensors", dialect="heykeetae", prefix="*", check=network)


# ---- the canonical file as a source


def test_a_canonical_file_says_itself_what_it_is(tmp_path):
    config = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=3)
    params = {name: value + 0.25 for name, value in selfattn_core.init_params(config, 0).items()}
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    found, arrays = load(tmp_path / "a.safetensors")
    assert found == config
    assert all(arrays[name].tobytes() == value.tobytes() for name, value in params.items())
    with pytest.raises(PortError, match="would contradict it"):
        load(tmp_path / "a.safetensors", settings={"kv_pool": 2})
    report = port(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    again = load(tmp_path / "b.safetensors")
    assert again[0] == config
    assert all(again[1][name].tobytes() == value.tobytes() for name, value in arrays.items())
    assert report.blocks[0].assumptions == ()
    (block,) = inspect(tmp_path / "a.safetensors").blocks
    assert [fit.assumptions for fit in block.fits if fit.dialect == "canonical"] == [()]


def test_a_canonical_file_that_contradicts_itself_is_refused(tmp_path):
    plain = SelfAttentionConfig(12, 3, 5, out_projection=True)
    normed = SelfAttentionConfig(12, 3, 5, out_projection=True, spectral_norm=True)
    for config, other in ((plain, normed), (normed, plain)):
        metadata = {"format": "selfattn", "version": "1", "config": json.dumps(other.to_dict())}
        write_tensors(
            tmp_path / "a.safetensors",
            selfattn_core.init_params(config, 0),
            format="safetensors",
            metadata=metadata,
            overwrite=True,
        )
        with pytest.raises(PortError, match=f"spectral_norm = {other.spectral_norm}, but its tensors"):
            load(tmp_path / "a.safetensors")
        (fit,) = (
            each for each in inspect(tmp_path / "a.safetensors").blocks[0].fits if each.dialect == "canonical"
        )
        assert fit.verdict == "almost"


def test_what_is_assumed_of_every_kernel_is_said_once(tmp_path):
    np.savez(tmp_path / "a.npz", **selfattn_core.init_params(SelfAttentionConfig(16), 0))
    report = port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect="canonical")
    said = [text for text in report.blocks[0].assumptions if "spectral norm" in text]
    assert said == [
        "query, key, value: there is no u beside the kernel, so it was trained without spectral norm"
    ]


def with_norm(seed=0):
    config = SelfAttentionConfig(12, 3, 5, out_projection=True, spectral_norm=True)
    params = selfattn_core.init_params(config, seed)
    params["gamma"] += 0.7
    params["out.bias"] += 0.3
    return config, params


def test_spectral_norm_is_folded_unless_it_is_kept(tmp_path):
    config, params = with_norm()
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    kept = load(tmp_path / "a.safetensors", keep_spectral_norm=True)
    assert kept[0] == config
    assert all(kept[1][name].tobytes() == value.tobytes() for name, value in params.items())
    folded = load(tmp_path / "a.safetensors", dtype="float64")
    assert not folded[0].spectral_norm
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((2, 3, 5, 12))
    want = spec.forward(config, {name: value.astype(np.float64) for name, value in params.items()}, x)
    np.testing.assert_allclose(spec.forward(*folded, x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("to", "target"), [("canonical", "b.safetensors"), ("torch", "b.pt")])
def test_averaged_vectors_are_said_by_every_command(tmp_path, to, target):
    """Where they are used as they are; averages make the norm too small."""
    config, params = with_norm()

    def said(params):
        selfattn_core.save(tmp_path / "a.safetensors", config, params, overwrite=True)
        port(tmp_path / "a.safetensors", tmp_path / target, to=to, keep_spectral_norm=True, overwrite=True)
        path = tmp_path / target
        fit = next(fit for fit in inspect(path).blocks[0].fits if fit.dialect == to and fit.verdict == "fits")
        report = port(path, tmp_path / "c.safetensors", dialect=to, dry_run=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(path, dialect=to)
        texts = [fit.notes, report.blocks[0].notes, [str(one.message) for one in caught]]
        return [[text for text in given if "key.u: 0.97" in text] for given in texts]

    assert said(params) == [[], [], []]
    params["key.u"] *= np.float32(0.97)
    for (text,) in said(params):
        assert "should have the length 1 but have other lengths (key.u: 0.97)" in text
        assert "refresh_spectral_norm" in text


def test_vectors_that_are_iterated_anew_may_have_any_length(tmp_path):
    original = ORIGINALS["biggan, ajbrock"]()
    tensors = {key: array * (3 if key.endswith("u0") else 1) for key, array in original.tensors.items()}
    assert any(key.endswith("u0") for key in tensors)
    np.savez(tmp_path / "a.npz", **tensors)
    assert not any(
        "length 1" in note for fit in inspect(tmp_path / "a.npz").blocks[0].fits for note in fit.notes
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_kernel_of_zeros_is_ported_as_one(tmp_path, keep):
    config, params = with_norm()
    params["query.kernel"] *= 0
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    got_config, got = load(tmp_path / "a.safetensors", keep_spectral_norm=keep)
    assert not got["query.kernel"].any()
    x = np.random.Generator(np.random.PCG64(1)).standard_normal((2, 3, 5, 12)).astype(np.float32)
    np.testing.assert_allclose(
        spec.forward(got_config, got, x), spec.forward(config, params, x), rtol=0, atol=1e-5
    )
    report = port(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect="canonical", keep_spectral_norm=keep
    )
    steps = " ".join(report.to_text().split())
    assert keep or "zeros, left as they are" in steps
    # A kernel that is not zero, with vectors that are, has no norm to divide by.
    params["key.u"] *= 0
    selfattn_core.save(tmp_path / "c.safetensors", config, params)
    with pytest.raises(PortError, match="a kernel cannot be divided by it"):
        load(tmp_path / "c.safetensors", keep_spectral_norm=keep)


@pytest.mark.parametrize(
    "name",
    [
        "studiogan, hook",
        "studiogan, parametrization",
        "biggan, ajbrock",
        "biggan-v1, wrapper",
        "sagan-tf",
        "tfgan",
        "compare-gan, auto",
        "taki0112",
        "rosinality, rosinality",
        "biggan-tfhub",
    ],
)
def test_kept_state_gives_the_original_output(name, tmp_path):
    path, original = written(tmp_path, name, "float64")
    config, params = load(path, dialect=original.dialect, keep_spectral_norm=True)
    assert config.spectral_norm
    assert error_of(config, params, original) < 1e-12
    assert params["query.u"].shape == (config.qk_channels,)
    assert params["query.v"].shape == (config.channels,)


def test_kept_state_goes_through_other_files(tmp_path):
    path, original = written(tmp_path, "studiogan, hook")
    report = port(path, tmp_path / "a.safetensors", dialect="studiogan", keep_spectral_norm=True)
    assert report.blocks[0].config["spectral_norm"]
    first = selfattn_core.load(tmp_path / "a.safetensors")
    port(tmp_path / "a.safetensors", tmp_path / "b.npz", to="studiogan", keep_spectral_norm=True)
    with open_tensors(tmp_path / "b.npz") as tensors:
        for key in tensors:
            want = original.tensors[f"{original.prefix}{key}"]
            np.testing.assert_array_equal(tensors.read(key).reshape(want.shape), want)
    assert first[0].kv_pool == 2


def test_kept_state_is_where_each_framework_has_it(tmp_path, monkeypatch):
    """Keras' file by names, NNX beside the kernel, Linen in a collection of its own."""
    monkeypatch.setattr(verify, "BACKENDS", {})
    config, params = with_norm()
    selfattn_core.save(tmp_path / "a.safetensors", config, params)

    def same(path, name):
        found, arrays = load(path, dialect=name, keep_spectral_norm=True, settings={"kv_pool": 1})
        assert found == config
        assert all(arrays[key].tobytes() == value.tobytes() for key, value in params.items())

    for name, target in (("torch", "o.pt"), ("keras", "o.weights.h5"), ("flax", "o.npz")):
        port(tmp_path / "a.safetensors", tmp_path / target, to=name, keep_spectral_norm=True)
        same(tmp_path / target, name)
    with np.load(tmp_path / "o.npz") as arrays:
        linen = {
            f"{'batch_stats' if key[-2:] in ('/u', '/v') else 'params'}/net/attn/{key}": arrays[key]
            for key in arrays.files
            if not key.startswith("__")
        }
    np.savez(tmp_path / "linen.npz", **linen)
    same(tmp_path / "linen.npz", "flax")
    with open_tensors(tmp_path / "o.weights.h5") as tensors:
        assert "query/u" in tensors


def test_state_that_is_not_there_cannot_be_kept(tmp_path):
    for name, message in (
        ("studiogan, plain", "has no state of it in the file"),
        ("heykeetae, old hook", "has no state of it in the file"),
        ("timm", "the scale of the scores would be lost"),
    ):
        path, original = written(tmp_path, name)
        assert message in refusal(path, tmp_path, dialect=original.dialect, keep_spectral_norm=True)
    path, _ = written(tmp_path, "studiogan, hook")
    said = refusal(path, tmp_path, dialect="studiogan", keep_spectral_norm=True, to="biggan")
    assert "it has no place for u and v" in said


# ---- checks that fail


def test_a_wrong_output_fails_and_nothing_is_written(tmp_path):
    path, original = written(tmp_path, "fastai, hook")
    target = tmp_path / "o.safetensors"
    target.write_bytes(b"precious")
    io = io_file(tmp_path, original, spoil=1e-3)
    report = failed_report(path, target, dialect="fastai", check=io, overwrite=True)
    assert outcomes(report)["source's own output"] == "failed"
    assert target.read_bytes() == b"precious"


def test_an_output_that_shows_nothing_is_no_proof(tmp_path):
    """At gamma 0 the layer is the identity, whatever was ported."""
    path, original = spoiled("heykeetae, plain", tmp_path, put("gamma", np.zeros(1, np.float32)))
    report = port(
        path, tmp_path / "o.safetensors", dialect="pytorch-advanced", check=io_file(tmp_path, original)
    )
    assert outcomes(report)["source's own output"] == "not run"
    assert "noise of float32" in details(report)["source's own output"]
    assert "is larger than what the layer adds to x (0)" in details(report)["source's own output"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, C, 4, 6), np.float32)}, "lacks y"),
        (
            {"x": np.zeros((2, C, 4)), "y": np.zeros((2, C, 4))},
            "Expected two floating-point arrays of one shape",
        ),
        (
            {"x": np.zeros((2, C, 4, 6), int), "y": np.zeros((2, C, 4, 6))},
            "Expected two floating-point arrays",
        ),
        ({"x": np.zeros((2, 4, 6, C)), "y": np.zeros((2, 4, 6, C))}, "channels should be 24"),
        ({"x": np.zeros((2, C, 4, 6)), "y": np.full((2, C, 4, 6), np.nan)}, "there is NaN or infinity in y"),
        ({"x": np.full((2, C, 4, 6), np.inf), "y": np.zeros((2, C, 4, 6))}, "there is NaN or infinity in x"),
        ({"x": np.zeros((0, C, 4, 6)), "y": np.zeros((0, C, 4, 6))}, "x and y are empty, (0, 24, 4, 6)"),
    ],
)
def test_an_io_file_that_is_none(arrays, message, tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    np.savez(tmp_path / "io.npz", **arrays)
    assert message in refusal(path, tmp_path, dialect="heykeetae", check=tmp_path / "io.npz")


def test_a_target_that_comes_back_changed_fails(tmp_path, monkeypatch):
    from selfattn_core.porting.formats import write

    path, _ = written(tmp_path, "heykeetae, plain")
    right = write._FORMATS["npz"]

    def wrong(tensors, metadata):
        return right.file({**tensors, "gamma": tensors["gamma"] + 1}, metadata)

    monkeypatch.setitem(write._FORMATS, "npz", replace(right, file=wrong))
    report = failed_report(path, tmp_path / "o.npz", dialect="heykeetae", to="heykeetae")
    assert outcomes(report)["round trip"] == "failed"
    assert not (tmp_path / "o.npz").exists()


def test_a_target_that_means_something_else_fails(tmp_path, monkeypatch):
    """The file holds what was to be written, and its dialect reads another layer from it."""
    from selfattn_core.porting.translation.to_dialect import _Exporter

    path, _ = written(tmp_path, "heykeetae, plain")
    monkeypatch.setattr(_Exporter, "_bias", lambda self, role, *_: self.params[f"{role}.bias"] + 1)
    report = failed_report(path, tmp_path / "o.npz", dialect="heykeetae", to="danet")
    assert outcomes(report)["round trip"] == "passed"
    assert outcomes(report)["read back as danet"] == "failed"
    assert not (tmp_path / "o.npz").exists()


WRONG = """
import numpy as np
from selfattn_core import spec

class Backend:
    name = "toy"
    def versions(self): return {}
    def claims(self): return frozenset({"forward"})
    def layouts(self): return ("channels_last",)
    def build(self, config, params, dtype, layout): return config, dict(params)
    def forward(self, model, x):
        config, params = model
        if FAULT == "swap":
            params |= {f"{a}.{p}": model[1][f"{b}.{p}"] for a, b in (("query", "key"), ("key", "query")) for p in ("kernel", "bias")}
        if FAULT == "raise":
            raise RuntimeError("no such device")
        if FAULT == "identity":
            return x
        return spec.forward(config, params, x)
"""


@pytest.mark.parametrize(
    ("fault", "outcome"), [("", "passed"), ("swap", "failed"), ("raise", "failed"), ("identity", "failed")]
)
@pytest.mark.parametrize("gamma", [0.7, 0.0])
def test_a_framework_whose_layer_is_wrong_fails(fault, outcome, gamma, tmp_path, monkeypatch):
    from selfattn_core.conformance.backends import Registered

    (tmp_path / "toy_layer.py").write_text(WRONG.replace("FAULT", repr(fault)), encoding="utf-8")

    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    monkeypatch.setattr(
        verify, "REGISTRY", {"torch": Registered("toy_layer:Backend", (), "torch", environment)}
    )
    path, _ = spoiled("heykeetae, plain", tmp_path, put("gamma", np.full(1, gamma, np.float32)))
    run = port if outcome == "passed" else failed_report
    report = run(path, tmp_path / "o.npz", dialect="heykeetae", to="torch")
    assert outcomes(report)["torch's layer"] == outcome
    assert (tmp_path / "o.npz").exists() == (outcome == "passed")


def test_the_framework_computes_in_full(tmp_path, monkeypatch):
    """In the environment of the conformance kit, where the caller's own asks for less."""
    from selfattn_core.conformance.backends import Registered

    found = tmp_path / "found"
    (tmp_path / "toy_layer.py").write_text(
        f"import os\nfrom pathlib import Path\nPath({str(found)!r}).write_text(os.environ['ONEDNN_DEFAULT_FPMATH_MODE'])\n"
        + WRONG.replace("FAULT", "''"),
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setattr(verify, "REGISTRY", {"torch": Registered("toy_layer:Backend", (), "torch")})
    path, _ = spoiled("heykeetae, plain", tmp_path, put("gamma", np.full(1, 0.7, np.float32)))
    assert (
        outcomes(port(path, tmp_path / "o.npz", dialect="heykeetae", to="torch"))["torch's layer"] == "passed"
    )
    assert found.read_text(encoding="utf-8") == "STRICT"


def test_a_framework_that_is_not_installed_is_listed(tmp_path, monkeypatch):
    from selfattn_core.conformance.backends import Registered

    monkeypatch.setattr(verify, "REGISTRY", {"torch": Registered("x:y", ("no_such_module",), "torch")})
    path, _ = written(tmp_path, "heykeetae, plain")
    report = port(path, tmp_path / "o.npz", dialect="heykeetae", to="torch")
    assert report.written
    (check,) = (check for check in report.checks if check.name == "target's layer")
    assert check.outcome == "not run"
    assert "pip install 'selfattn[torch]'" in check.detail


# ---- biases of zeros


@pytest.mark.parametrize("name", ["heykeetae", "danet", "fgh", "taki0112-out", "mmcv"])
def test_a_layer_without_biases_goes_where_there_are_some(name, tmp_path):
    """Zeros are the same function, and verified as that."""
    out = name in ("taki0112-out", "mmcv")
    config = SelfAttentionConfig(
        24, *([12, 12] if name == "mmcv" else []), out_projection=out, use_bias=False
    )
    params = {key: value + 0.3 for key, value in selfattn_core.init_params(config, 3).items()}
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    report = port(tmp_path / "a.safetensors", tmp_path / "o.npz", to=name)
    assert report.written
    assert outcomes(report)[f"read back as {name}"] == "passed"
    if name != "mmcv":
        assert "query.bias" in details(report)[f"read back as {name}"]
    again, arrays = load(tmp_path / "o.npz", dialect=name)
    assert again.use_bias
    assert not any(value.any() for key, value in arrays.items() if key.endswith("bias"))


def test_biases_of_zeros_may_be_left_out(tmp_path):
    config = SelfAttentionConfig(24, 3, 12, out_projection=True, kv_pool=2)
    params = {
        key: value + 0.3 * (not key.endswith("bias"))
        for key, value in selfattn_core.init_params(config, 3).items()
    }
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    report = port(tmp_path / "a.safetensors", tmp_path / "o.npz", to="biggan")
    assert report.written
    assert "are left out" in details(report)["read back as biggan"]


def test_made_biases_that_are_not_zero_fail(tmp_path, monkeypatch):
    from selfattn_core.porting.translation.to_dialect import _Exporter

    config = SelfAttentionConfig(24, use_bias=False)
    params = {key: value + 0.3 for key, value in selfattn_core.init_params(config, 3).items()}
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    monkeypatch.setattr(_Exporter, "_constant", lambda self, length, _: np.ones(length, self.dtype))
    report = failed_report(tmp_path / "a.safetensors", tmp_path / "o.npz", to="danet")
    assert "these tensors differ: query.bias" in details(report)["read back as danet"]
    assert not (tmp_path / "o.npz").exists()


# ---- targets


def test_a_target_that_exists_is_left_alone(tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    target = tmp_path / "o.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(PortError) as caught:
        port(path, target, dialect="heykeetae")
    assert caught.value.problems[0].kind == "target_exists"
    assert target.read_bytes() == b"precious"
    assert port(path, target, dialect="heykeetae", overwrite=True).written
    assert selfattn_core.load(target)[0] == SelfAttentionConfig(C)


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        ("o.onnx", "canonical", ".onnx cannot be written"),
        ("o.weights.h5", "canonical", "Pass to='keras'"),
        ("o", "torch", "Pass to='flax'"),
        ("o.pt", "canonical", "pass to='torch'"),
        ("o.npz", "canonical", "the canonical form is a .safetensors file, .*[.] Name one[.]"),
        ("absent/o.npz", "torch", "there is no folder"),
        ("o.npz", "nosuch", "dialect 'nosuch' is unknown"),
    ],
)
def test_targets_that_cannot_be(target, to, message, tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    with pytest.raises(PortError, match=message):
        port(path, tmp_path / target, dialect="heykeetae", to=to)
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_dtype(tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    assert "dtype 'int8'" in refusal(path, tmp_path, dialect="heykeetae", dtype="int8")


@pytest.mark.parametrize(
    ("name", "to", "target"),
    [
        ("biggan, ajbrock", "torch", "o.pt"),
        ("biggan, ajbrock", "keras", "o.weights.h5"),
        ("taki0112", "flax", "o"),
    ],
)
def test_into_a_framework(name, to, target, tmp_path):
    """The written file is the layer of the framework, which computes what the original does."""
    path, original = written(tmp_path, name)
    report = port(path, tmp_path / target, dialect=original.dialect, to=to, check=io_file(tmp_path, original))
    found = outcomes(report)
    assert "failed" not in found.values()
    assert [outcome for check, outcome in found.items() if check.endswith("'s layer")] == ["passed"] * (
        1 + (to == "flax")
    )
    config, params = load(tmp_path / target, dialect=to, settings={"kv_pool": 2})
    assert error_of(config, params, original) < 30 * np.finfo(np.float32).eps


def test_every_dialect_can_be_a_source_or_says_why_not():
    assert {name for name in dialect_names() if not dialect(name).refused} == {
        b().dialect for b in ORIGINALS.values()
    }
