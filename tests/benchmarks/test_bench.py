"""The benchmark runs, refuses wrong answers, and measures what its targets need. No time is asserted."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cells import FRAMEWORKS, MODES, Cell, too_large
from benchmarks.measure import interleaved
from benchmarks.problem import Problem, products
from benchmarks.report import markdown, plot
from benchmarks.results import SCHEMA, exponent, file_stem, merge, write_text
from benchmarks.targets import TARGETS, Finding, evaluate
from selfattn_core.conformance.cases.inputs import rounded

ROOT = Path(__file__).parents[2]
ABOUT = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_bytes": 2**30,
    "system": "Linux",
    "architecture": "x86_64",
    "python": "3.11.7",
}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("framework", "device"),
    [
        ("torch", ""),
        pytest.param("jax", "cpu:0", marks=pytest.mark.slow),
        pytest.param("tensorflow", "", marks=pytest.mark.slow),
    ],
)
def test_a_toy_run(framework, device, tmp_path):
    place = ["--device", device] if device else []
    done = bench("--toy", "--framework", framework, *place, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 4
    assert set(files) == {".json", ".md", ".png"}
    run = json.loads(files[".json"].read_text(encoding="utf-8"))["frameworks"][framework]
    assert len(run["cells"]) == len(MODES["toy"].cells)
    for cell in run["cells"]:
        assert cell["results"]["ours"]["status"] == "ok"
        assert {"seconds", "peak_bytes"} & set(cell["results"]["ours"])
    assert run["commit"]
    assert run["versions"]
    page = files[".md"].read_text(encoding="utf-8")
    assert ("## Targets" in page) == (not device)
    assert (f"On {device}" in page) == (f"{framework} in bfloat16" in page) == bool(device)


def test_an_unknown_framework_is_a_wrong_option():
    done = bench("--framework", "theano")
    assert done.returncode == 2
    assert "there are torch, jax, tensorflow" in done.stderr


@pytest.mark.parametrize(
    ("device", "code", "words"),
    [
        ("", 2, "jax: got device ''; expected one of cpu, gpu"),
        ("mps", 2, "jax: got device 'mps'; expected one of cpu, gpu"),
        ("tpu", 3, "there is no device 'tpu' here"),
    ],
)
def test_a_device_that_cannot_be_measured(device, code, words):
    done = bench("--toy", "--framework", "jax", "--device", device)
    assert done.returncode == code
    assert words in done.stderr


def test_peers_of_cards_are_asked_there_alone():
    cell = Cell("time", "core", "train", 64, 64)
    assert "cudnn" not in cell.implementations("jax")
    assert {"sdpa-memory-efficient", "flex-attention"} <= set(cell.implementations("torch", "cuda:0"))
    assert "cudnn" in cell.implementations("jax", "gpu:0")
    assert "cudnn" not in dataclasses.replace(cell, level="flat").implementations("jax", "gpu:0")


STEPS = ("forward", "train", "r1")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["ours", "matmul"])
def test_answers_from_a_few_rows_are_those_of_the_whole(step, name):
    few = Problem.of(Cell("time", "core", step, 16, 34))
    assert len(few.rows) < few.cell.positions
    whole = dataclasses.replace(few, rows=np.arange(few.cell.positions))
    answers = (whole._products if name == "matmul" else whole._attention).wanted
    if step == "forward":
        answers = {key: value * np.ones_like(value) for key, value in answers.items()}
    assert all(
        verdict.passed for verdict in few.check(name, {k: v.astype(np.float32) for k, v in answers.items()})
    )


@pytest.mark.parametrize("step", ["train", "r1"])
@pytest.mark.parametrize("side", [5, 34])
@pytest.mark.parametrize("quantity", ["query", "key", "value"])
def test_a_wrong_answer_is_seen(step, side, quantity):
    problem = Problem.of(Cell("time", "core", step, 16, side))
    whole = dataclasses.replace(problem, rows=np.arange(problem.cell.positions))
    answers = {key: value.astype(np.float32) for key, value in whole._attention.wanted.items()}
    answers[quantity][0, -1, 0] += 0.01 * np.abs(answers[quantity]).max()
    assert [verdict.quantity for verdict in problem.check("ours", answers) if not verdict.passed] == [
        quantity
    ]
    del answers[quantity]
    with pytest.raises(ValueError, match=f"no {quantity} in the answer"):
        problem.check("ours", answers)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["ours", "matmul"])
def test_bfloat16_has_its_own_noise(step, name):
    problem = Problem.of(Cell("time", "core", step, 16, 8), dtype="bfloat16")
    answers = problem._products if name == "matmul" else problem._attention
    assert all(verdict.passed for verdict in problem.check(name, answers.noisy))
    wrong = {key: rounded(value * np.float32(1.3), "bfloat16") for key, value in answers.noisy.items()}
    assert not any(verdict.passed for verdict in problem.check(name, wrong))
    exact = {key: value.astype(np.float32) for key, value in answers.wanted.items()}
    assert "cannot represent" in problem.check(name, exact)[0].message


@pytest.mark.parametrize("level", ["core", "flat", "pooled"])
@pytest.mark.parametrize("step", STEPS)
def test_gamma_logits_and_biases_leave_no_bug_invisible(level, step):
    problem = Problem.of(Cell("time", level, step, 16, 8))
    assert 2 < problem._attention.logits < 40
    for name, params in problem.params.items():
        assert np.abs(params).max() > 0, name


def test_the_products_are_counted():
    from benchmarks.problem import PRODUCTS

    for step, (narrow, wide) in PRODUCTS.items():
        widths = []

        def dot(a, b, transposed="", widths=widths):
            result = (a.mT if transposed == "ta" else a) @ (b.mT if transposed == "tb" else b)
            widths.append(min(a.shape[-1], a.shape[-2], b.shape[-1], b.shape[-2]))
            return result

        q, v = np.ones((1, 20, 3)), np.ones((1, 20, 5))
        products(step, dot, q, q, v, v)
        assert (widths.count(3), widths.count(5)) == (narrow, wide)


def test_on_the_cpu_nothing_stands_in_the_way_of_torch():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_cases

    with torch_cases.on("cpu:0"):
        assert torch.overrides._get_current_function_mode_stack() == []
        assert torch.get_default_device().type == "cpu"


def test_a_step_of_jax_casts_no_weights_while_it_is_timed():
    pytest.importorskip("jax")
    from benchmarks import jax_cases

    problem = Problem.of(Cell("time", "core", "train", 16, 8), dtype="bfloat16")
    weight = jax_cases.array(problem.weight, "bfloat16")
    for name in ("ours", "matmul-blocks"):
        step = jax_cases.build(name, problem)
        step.run(weight)
        with pytest.raises((TypeError, AttributeError)):
            step.run(Uncastable())
        assert not Uncastable.asked


class Uncastable:
    """Weights that see whether somebody casts them."""

    asked = False

    def astype(self, _):
        Uncastable.asked = True


def test_turns_are_taken():
    order = []
    samples = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 5, "b": 5}
    runs = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert "".join(runs) == "ab" * (len(runs) // 2)


def invented(mode: str = "full", frameworks=FRAMEWORKS) -> dict:
    """Results in which everything that is not skipped took N seconds and N bytes."""
    runs = {}
    for framework in frameworks:
        cells = []
        for cell in MODES[mode].cells:
            found = {}
            for name in cell.implementations(framework):
                n = float(cell.positions)
                if too_large(name, cell, None):
                    found[name] = {"status": "skipped", "reason": "large"}
                elif cell.measure == "memory":
                    found[name] = {"status": "ok", "peak_bytes": n, "single_call_seconds": n}
                else:
                    seconds = {"min": n, "median": n, "max": n, "samples": 3}
                    found[name] = {"status": "ok", "seconds": seconds, "times_ours": 1.0}
            keys = ("measure", "level", "step", "channels", "side")
            cells.append({key: getattr(cell, key) for key in keys} | {"results": found})
        runs[framework] = {
            "date": "2030-01-02",
            "commit": "abc",
            "load_before": 0.0,
            "seconds": 60.0,
            "versions": {framework: "1"},
            "threads": {"intra_op": 2},
            "cells": cells,
        }
    return {"schema": SCHEMA, "mode": mode, "machine": ABOUT, "frameworks": runs}


def test_a_full_run_measures_every_target():
    findings = evaluate(invented())
    assert len(findings) == len(TARGETS)
    assert [str(finding) for finding in findings if finding.verdict == "not measured"] == []
    by_row = {(f.target.row, f.target.framework): f.value for f in findings}
    assert by_row["exponent of N in peak memory, 64² to 256², R1 step", "torch"] == 1.0
    assert by_row["R1 step, C = 64 at 64×64: time of dense", "jax"] == 1.0


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.framework}: {target.row}")
def test_a_target_can_be_met_and_missed(target):
    near = 0.001 if target.at_least else -0.001
    assert Finding(target, target.bound + near).verdict == "met"
    assert Finding(target, target.bound - near).verdict == "missed"


def test_the_page_has_every_table_and_says_what_is_missing():
    page = markdown(invented(), {"Time": "time.png"})
    assert "![Time](time.png)" in page
    assert page.count("### ") == 8
    assert "tensorflow, dense: skipped: large – core train C = 64 at 256×256 (memory)" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_a_missed_speed_is_shown_beside_the_matmul_rate():
    results = invented()
    page = markdown(results, {})
    missed = [line for line in page.splitlines() if line.startswith("| forward, C = 64 at 64×64: faster")]
    # All implementations of the invented results take equally long, the ceilings too.
    assert missed == [
        (
            "| forward, C = 64 at 64×64: faster than dense | 1 × (≥ 3.5) **missed**, at 1.00 of the matmul rate "
            "| 1 × (≥ 1.6) **missed**, at 1.00 of the matmul rate | 1 × (≥ 1) |"
        )
    ]


def test_a_page_of_one_framework_and_no_numbers():
    results = invented("toy", ("jax",))
    results["frameworks"]["jax"]["cells"] = []
    assert "**not measured**" in markdown(results, {})


@pytest.mark.parametrize("quantity", ["time", "memory"])
def test_plots_are_pictures(quantity):
    assert plot(invented(), quantity).startswith(b"\x89PNG")


def test_one_framework_is_replaced_and_the_others_are_kept(tmp_path):
    old = invented("toy")
    write_text(tmp_path / "old.json", json.dumps(old))
    other_mode, other_machine = invented("quick"), invented("toy")
    other_machine["machine"] = ABOUT | {"cores": 64}
    write_text(tmp_path / "quick.json", json.dumps(other_mode))
    write_text(tmp_path / "zoo.json", json.dumps(other_machine))
    new = {"torch": old["frameworks"]["torch"] | {"commit": "new"}}
    merged = merge(tmp_path, ABOUT, "toy", new)["frameworks"]
    assert {name: run["commit"] for name, run in merged.items()} == {
        "torch": "new",
        "jax": "abc",
        "tensorflow": "abc",
    }
    assert len(merged["jax"]["cells"]) == len(MODES["toy"].cells)


def test_another_device_is_another_machine(tmp_path):
    write_text(tmp_path / "cpu.json", json.dumps(invented("toy")))
    card = ABOUT | {"device": "cuda", "device_model": "A Card 100"}
    assert merge(tmp_path, card, "toy", {})["frameworks"] == {}
    assert file_stem(card, "device", "2030-01-31") == "a-card-100-cuda-2030-01-31"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    write_text(target, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert target.read_text(encoding="utf-8") == "old"


def test_files_are_named_by_machine_and_date():
    assert (
        file_stem({"cpu": "Some(R) CPU @ 2.5GHz", "cores": 4}, "full", "2030-01-31")
        == "some-4-cores-2030-01-31"
    )


def test_exponents_are_of_power_laws():
    assert exponent([(n, 3 * n**1.25) for n in (64, 256, 1024)]) == 1.25
    assert exponent([(64, 1.0)]) is None
