"""The benchmark runs, refuses wrong answers, and measures what its targets need. No time is asserted."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import processes
from benchmarks.answers import Answers
from benchmarks.cells import DIFFUSE, FRAMEWORKS, IN_FLOAT32, MODES, OURS, Cell, too_large
from benchmarks.inputs import draw
from benchmarks.plots import plot
from benchmarks.problem import Problem
from benchmarks.products import PRODUCTS, products
from benchmarks.report import markdown
from benchmarks.results import SCHEMA, exponent, file_stem, instructions, merge, write_text
from benchmarks.targets import TARGETS, Finding, Target, evaluate
from benchmarks.turns import Partner, interleaved
from selfattn_core.conformance.cases.inputs import rounded

ROOT = Path(__file__).parents[2]
ABOUT = {
    "cpu": "A CPU",
    "instructions": ["AVX2", "AVX-512"],
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
    runs = json.loads(files[".json"].read_text(encoding="utf-8"))["runs"]
    assert [run["group"] for run in runs] == list(MODES["toy"].groups)
    assert sum(len(run["cells"]) for run in runs) == len(MODES["toy"].cells)
    for run in runs:
        assert run["commit"]
        assert run["versions"]
        for cell in run["cells"]:
            assert cell["results"]["ours"]["status"] == "ok"
            assert {"seconds", "peak_bytes"} & set(cell["results"]["ours"])
    page = files[".md"].read_text(encoding="utf-8")
    assert ("## Targets" in page) == (not device)
    assert (f"On {device}" in page) == bool(device)


def test_a_checkout_is_compared_with_this_one(tmp_path):
    """The other one is a copy whose layer is wrong, which its answers must show."""
    other = tmp_path / "other"
    for name in ("selfattn_ops", "selfattn_torch"):
        shutil.copytree(ROOT / "backends" / name, other / "backends" / name)
    (other / "selfattn_core").symlink_to(ROOT / "selfattn_core")
    with (other / "backends" / "selfattn_torch" / "layer.py").open("a", encoding="utf-8") as file:
        file.write("right = SelfAttention2d.forward\n")
        file.write("SelfAttention2d.forward = lambda self, x: 1.5 * right(self, x)\n")
    arguments = ("--toy", "--framework", "torch", "--group", "small,memory", "--against", str(other))
    done = bench(*arguments, "--out", str(tmp_path / "out"))
    (path,) = (tmp_path / "out").glob("*.json")
    small, memory = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert small["against"]
    (found,) = [cell["results"] for cell in small["cells"]]
    assert found["now"]["status"] == "ok"
    assert found["now"]["seconds"]["samples"] >= 9
    assert found["before"]["status"] == "wrong"
    assert done.returncode == 1
    (found,) = [cell["results"] for cell in memory["cells"]]
    assert [len(found[name]["peaks"]) for name in ("now", "before")] == [3, 3]
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| flat train C = 16 at 8×8, B = 2 | wrong |" in page


def test_a_folder_that_is_no_checkout_is_a_wrong_option(tmp_path):
    done = bench("--toy", "--against", str(tmp_path))
    assert done.returncode == 2
    assert "is no checkout of this repository" in done.stderr


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
    assert not {"cudnn", "sdpa-memory-efficient"} & {
        name for framework in FRAMEWORKS for name in cell.implementations(framework)
    }
    assert "sdpa-memory-efficient" in cell.implementations("torch", "cuda:0")
    assert "cudnn" in cell.implementations("jax", "gpu:0")
    assert "cudnn" not in dataclasses.replace(cell, level="flat").implementations("jax", "gpu:0")


def test_ours_takes_part_on_the_problem_that_the_cell_is_compared_with():
    cell = Cell("time", "core", "train", 64, 64, dtype="bfloat16")
    assert cell.implementations("jax")[:3] == (OURS, IN_FLOAT32, "dense")
    assert cell.posed(IN_FLOAT32) == (OURS, dataclasses.replace(cell, dtype="float32"))
    peaked = Cell("time", "flat", "r1", 64, 64, logits=25.0)
    assert peaked.implementations("tensorflow")[:3] == (OURS, DIFFUSE, "dense")
    assert peaked.posed(DIFFUSE) == (OURS, dataclasses.replace(peaked, logits=1.0))
    assert peaked.posed("dense") == ("dense", peaked)


STEPS = ("forward", "train", "r1")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["ours", "matmul"])
def test_answers_from_a_few_rows_are_those_of_the_whole(step, name):
    few = draw(Cell("time", "core", step, 16, 34))
    assert len(few.rows) < few.cell.positions
    whole = Answers(dataclasses.replace(few, rows=np.arange(few.cell.positions)))
    answers = (whole.products if name == "matmul" else whole.attention).wanted
    verdicts = Answers(few).check(name, {key: value.astype(np.float32) for key, value in answers.items()})
    assert all(verdict.passed for verdict in verdicts)


@pytest.mark.parametrize("step", ["train", "r1"])
@pytest.mark.parametrize("side", [5, 34])
@pytest.mark.parametrize("quantity", ["query", "key", "value"])
def test_a_wrong_answer_is_seen(step, side, quantity):
    problem = draw(Cell("time", "core", step, 16, side, batch=2))
    whole = Answers(dataclasses.replace(problem, rows=np.arange(problem.cell.positions)))
    answers = {key: value.astype(np.float32) for key, value in whole.attention.wanted.items()}
    answers[quantity][1, -1, 0] += 0.01 * np.abs(answers[quantity]).max()
    checked = Answers(problem)
    wrong = [verdict.quantity for verdict in checked.check("ours", answers) if not verdict.passed]
    assert wrong == [quantity]
    del answers[quantity]
    with pytest.raises(ValueError, match=f"no {quantity} in the answer"):
        checked.check("ours", answers)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["ours", "matmul"])
def test_bfloat16_has_its_own_noise(step, name):
    answers = Answers(draw(Cell("time", "core", step, 16, 8, dtype="bfloat16")))
    wanted = (answers.products if name == "matmul" else answers.attention).wanted
    nearest = {key: rounded(value, "bfloat16") for key, value in wanted.items()}
    assert all(verdict.passed for verdict in answers.check(name, nearest))
    wrong = {key: rounded(value * np.float32(1.3), "bfloat16") for key, value in wanted.items()}
    assert not any(verdict.passed for verdict in answers.check(name, wrong))
    exact = {key: value.astype(np.float32) for key, value in wanted.items()}
    assert "cannot represent" in answers.check(name, exact)[0].message


@pytest.mark.parametrize("step", STEPS)
def test_mixed_precision_has_its_own_noise(step):
    answers = Answers(draw(Cell("time", "flat", step, 16, 8, dtype="bfloat16")))
    exact = {key: value.astype(np.float32) for key, value in answers.attention.wanted.items()}
    assert all(verdict.passed for verdict in answers.check("ours", exact))
    name = "y" if step == "forward" else "query.kernel"
    exact[name] = exact[name] * np.float32(1.3)
    assert [verdict.quantity for verdict in answers.check("ours", exact) if not verdict.passed] == [name]


@pytest.mark.parametrize(
    ("implementation", "factor", "status"),
    [("sdpa", 1 + 1e-5, "coarse"), ("sdpa", 1.01, "wrong"), ("ours", 1 + 1e-5, "wrong"), ("ours", 1, "ok")],
)
def test_code_of_others_may_round_more(implementation, factor, status, tmp_path):
    cell = Cell("time", "core", "forward", 16, 8)
    answer = Answers(draw(cell)).attention.wanted["y"] * factor
    np.savez(tmp_path / "answers.npz", y=answer.astype(np.float32))
    contestant = {"implementation": implementation, "cell": dataclasses.asdict(cell)}
    record = {"status": "ok", "answers": "answers.npz", "samples": [1.0, 2.0, 3.0]}
    processes.judge_record(contestant, record, tmp_path)
    assert record["status"] == status
    assert ("seconds" in record) == (status != "wrong")


def test_noise_that_overflows_lets_nothing_pass():
    problem = draw(Cell("time", "flat", "r1", 16, 8, dtype="bfloat16"))
    loud = dataclasses.replace(problem, weight=problem.weight * np.float32(2**16))
    with pytest.raises(OverflowError, match="any answer would pass"), np.errstate(over="ignore"):
        Answers(loud).attention  # noqa: B018


@pytest.mark.parametrize("level", ["core", "flat", "pooled"])
@pytest.mark.parametrize("step", STEPS)
def test_gamma_logits_and_biases_leave_no_bug_invisible(level, step):
    problem = draw(Cell("time", level, step, 16, 8))
    assert 2 < Answers(problem).attention.logits < 40
    for name, params in problem.params.items():
        assert np.abs(params).max() > 0, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", ["core", "flat"])
def test_scores_have_the_wanted_spread(level, dtype):
    problem = draw(Cell("time", level, "forward", 64, 16, dtype=dtype, logits=25.0))
    query, key = (
        (problem.operands["x"].reshape(-1, 64) @ problem.params[f"{name}.kernel"])
        if level == "flat"
        else problem.operands[name][0]
        for name in ("query", "key")
    )
    assert (query @ key.T).std() == pytest.approx(25, rel=0.2)


def test_a_problem_survives_its_file(tmp_path):
    problem = draw(Cell("time", "pooled", "train", 16, 4, batch=3))
    problem.save(tmp_path / "problem.npz")
    same = Problem.load(problem.cell, tmp_path / "problem.npz")
    assert same.config == problem.config
    assert same.operands["x"].shape == (3, 4, 4, 16)
    for kind in ("operands", "params"):
        one, other = getattr(problem, kind), getattr(same, kind)
        assert list(one) == list(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    for name in ("weight", "checked_weight", "rows"):
        assert np.array_equal(getattr(problem, name), getattr(same, name))


def test_the_products_are_counted():
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

    problem = draw(Cell("time", "core", "train", 16, 8, dtype="bfloat16"))
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


def test_no_call_that_follows_another_function_is_timed(monkeypatch):
    """Such a call takes a hundred times as long here, because it pays for what the other has left behind."""
    clock, last = [0.0], [None]

    def call(name):
        clock[0] += 0.02 if last[0] == name else 2.0
        last[0] = name

    monkeypatch.setattr("benchmarks.turns.time.perf_counter", lambda: clock[0])
    samples = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, 0.0)
    assert [max(seconds) for seconds in samples.values()] == pytest.approx([0.02, 0.02])


@pytest.fixture
def partners():
    """The two ends of two processes that take turns."""
    (first, to_first), (second, to_second) = os.pipe(), os.pipe()
    yield Partner(first, to_second, leads=True), Partner(second, to_first, leads=False)
    for end in (first, to_first, second, to_second):
        os.close(end)


def test_two_processes_take_turns(partners):
    order = []
    found = {"a": [], "b": []}

    def measure(name, partner):
        for _ in range(2):  # two cells
            assert partner.agree(ready=True)
            found[name].append(interleaved({name: lambda: order.append(name)}, 0.0, partner)[name])

    thread = threading.Thread(target=measure, args=("b", partners[1]))
    thread.start()
    measure("a", partners[0])
    thread.join()
    assert [len(samples) for samples in found["a"] + found["b"]] == [9, 9, 9, 9]
    runs = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert "".join(runs) == "ab" * (len(runs) // 2)


@pytest.mark.parametrize("ready", [(True, False), (False, True)])
def test_a_cell_that_one_of_two_processes_cannot_measure_is_left_out_by_both(ready, partners):
    agreed = []
    thread = threading.Thread(target=lambda: agreed.append(partners[1].agree(ready=ready[1])))
    thread.start()
    agreed.append(partners[0].agree(ready=ready[0]))
    thread.join()
    assert agreed == [False, False]


def test_a_process_does_not_wait_for_one_that_has_ended():
    reads, writes = os.pipe()
    os.close(writes)
    with pytest.raises(EOFError, match="has ended"):
        Partner(reads, writes, leads=True).wait()
    os.close(reads)


def invented(mode: str = "full", frameworks=FRAMEWORKS) -> dict:
    """Results in which everything that is not skipped took N seconds and N bytes, also in another build."""
    runs = []
    for framework in frameworks:
        for group, rows in MODES[mode].groups.items():
            cells, pairs = [], []
            for cell in [cell for row in rows for cell in row]:
                n = float(cell.positions)
                record = (
                    {"status": "ok", "peak_bytes": n, "single_call_seconds": n}
                    if cell.measure == "memory"
                    else {"status": "ok", "seconds": {"min": n, "median": n, "max": n, "samples": 3}}
                )
                found = {
                    name: {"status": "skipped", "reason": "large"} if too_large(name, cell, None) else record
                    for name in cell.implementations(framework)
                }
                cells.append(cell.key | {"results": found})
                pairs.append(cell.key | {"results": {"now": record | {"of_before": 1.0}, "before": record}})
            for against, measured in ((None, cells), ("def", pairs)):
                runs.append(
                    {
                        "framework": framework,
                        "group": group,
                        "against": against,
                        "date": "2030-01-02",
                        "commit": "abc",
                        "load_before": 0.0,
                        "seconds": 60.0,
                        "versions": {framework: "1"},
                        "threads": {"intra_op": 2},
                        "cells": measured,
                    }
                )
    return {"schema": SCHEMA, "mode": mode, "machine": ABOUT, "runs": runs}


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


@pytest.mark.parametrize(("at_least", "value", "words"), [(True, 0.5, "one"), (False, 3.0, "three")])
def test_the_worst_of_several_measurements_counts(at_least, value, words, monkeypatch):
    target = Target(
        "row", "torch", lambda *_: [(0.5, "one"), (3.0, "three"), (1.0, "two")], 1.0, at_least=at_least
    )
    monkeypatch.setattr("benchmarks.targets.TARGETS", (target,))
    (finding,) = evaluate(invented("toy", ("torch",)))
    assert (finding.value, finding.verdict) == (value, "missed")
    assert finding.words == f"in {words} (1 of 3 miss it)"


def slowed(results, name, where):
    """The same, with one implementation three times as slow in some cells."""
    for run in results["runs"]:
        for cell in run["cells"]:
            if name in cell["results"] and "seconds" in cell["results"][name] and where(cell):
                seconds = cell["results"][name]["seconds"]
                cell["results"][name] = {
                    "status": "ok",
                    "seconds": seconds | {"median": 3 * seconds["median"]},
                }
    return results


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ("layers, 8² to 32²", lambda cell: cell["level"] == "flat" and cell["batch"] == 16),
        ("peaked maps", lambda cell: cell["logits"] == 50),
        ("bfloat16, forward and backward, C = 256 and 512", lambda cell: cell["dtype"] == "bfloat16"),
        ("bfloat16, forward and backward: time of dense", lambda cell: cell["dtype"] == "bfloat16"),
    ],
)
def test_a_slow_cell_misses_its_target(row, where):
    findings = evaluate(slowed(invented(), OURS, where))
    missed = {f.target.framework for f in findings if f.target.row.startswith(row) and f.value == 3.0}
    assert missed == set(FRAMEWORKS)


def test_the_page_has_every_table_and_says_what_is_missing():
    page = markdown(invented(), {"Time": "time.png"})
    assert "![Time](time.png)" in page
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Targets",
        "## Time",
        "## Small maps",
        "## Peaked maps",
        "## bfloat16",
        "## Peak memory above the inputs, core",
        "## Against another build",
        "## Not measured, or less exact",
    ]
    assert page.count("### ") == 8 + 6 + 6 + 6 + 2
    assert "It has AVX2 and AVX-512. " in page
    assert "tensorflow, dense: skipped: large – core train C = 64 at 256×256 (memory)" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_page_says_what_the_processor_has(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16\n", "utf-8")
    assert instructions(file) == ["AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16"]
    file.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n", "utf-8")
    assert instructions(file) == ["NEON", "BF16"]
    assert instructions(tmp_path / "nowhere") is None
    results = invented("toy", ("jax",))
    results["machine"] = {**ABOUT, "instructions": None}
    assert "Its instructions are not known. " in markdown(results, {})


def test_a_missed_speed_is_shown_beside_the_products():
    page = markdown(invented(), {})
    missed = [line for line in page.splitlines() if line.startswith("| forward, C = 64 at 64×64: faster")]
    # All implementations of the invented results take equally long, the ceilings too.
    assert missed == [
        (
            "| forward, C = 64 at 64×64: faster than dense "
            "| 1 × (≥ 3.5) **missed**, 1.00 × the time of the products "
            "| 1 × (≥ 1.6) **missed**, 1.00 × the time of the products | 1 × (≥ 1) |"
        )
    ]


def test_a_page_of_one_framework_and_no_numbers():
    results = invented("toy", ("jax",))
    for run in results["runs"]:
        run["cells"] = []
    assert "**not measured**" in markdown(results, {})


@pytest.mark.parametrize("quantity", ["time", "memory"])
def test_plots_are_pictures(quantity):
    assert plot(invented(), quantity).startswith(b"\x89PNG")


def test_one_run_is_replaced_and_the_others_are_kept(tmp_path):
    old = invented("toy")
    write_text(tmp_path / "old.json", json.dumps(old))
    other_mode, other_machine = invented("quick"), invented("toy")
    other_machine["machine"] = ABOUT | {"cores": 64}
    write_text(tmp_path / "quick.json", json.dumps(other_mode))
    write_text(tmp_path / "zoo.json", json.dumps(other_machine))
    new = next(run for run in old["runs"] if run["framework"] == "jax" and run["group"] == "peaked")
    merged = merge(tmp_path, ABOUT, "toy", {**new, "commit": "new"})["runs"]
    replaced = [run for run in merged if run["commit"] == "new"]
    assert [(run["framework"], run["group"], run["against"]) for run in replaced] == [("jax", "peaked", None)]
    assert len(merged) == len(old["runs"])
    assert sum(len(run["cells"]) for run in merged) == 2 * len(FRAMEWORKS) * len(MODES["toy"].cells)


def test_another_device_is_another_machine(tmp_path):
    old = invented("toy")
    write_text(tmp_path / "cpu.json", json.dumps(old))
    card = ABOUT | {"device": "cuda", "device_model": "A Card 100"}
    assert merge(tmp_path, card, "toy", old["runs"][0])["runs"] == [old["runs"][0]]
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
