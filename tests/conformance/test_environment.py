"""The environment variables of the processes of backends."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.digits import frameworks
from selfattn_core.config import SelfAttentionConfig
from selfattn_core.conformance.cases.table import all_runs
from selfattn_core.conformance.execution import environment as module
from selfattn_core.conformance.execution import runner
from selfattn_core.conformance.execution.environment import environment, kept_programs
from selfattn_core.conformance.execution.runner import run_backend, run_backends
from selfattn_core.conformance.release import calibrate
from selfattn_core.params import parameter_table
from selfattn_core.porting import verify

PROGRAMS = tuple(kept_programs(Path()))
WAITING = "OMP_WAIT_POLICY"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


@pytest.fixture(autouse=True)
def _plain(on_path, monkeypatch):
    for name in (*THREADS, *PROGRAMS, WAITING):
        monkeypatch.delenv(name, raising=False)


def test_one_process_has_all_threads():
    assert not {*THREADS, WAITING} & set(environment({}))


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 2, "4"), (3, 2, "1"), (1, 2, "1")])
def test_processes_share_the_cores(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(module, "cores", lambda: cores)
    found = environment({}, processes=processes)
    assert {found[name] for name in THREADS} == {threads}
    assert found[WAITING] == "PASSIVE", "a thread that spins takes the core of another process"
    found = environment({}, processes=processes, least_threads=2)
    assert {found[name] for name in THREADS} == {str(max(2, int(threads)))}


def test_the_callers_own_wishes_count(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept")
    found = environment({}, processes=2, programs=tmp_path)
    assert found["OMP_NUM_THREADS"] == "7"
    assert found["JAX_COMPILATION_CACHE_DIR"] == "kept"
    assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in found


def test_but_not_where_they_change_numbers(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    found = environment({"KERAS_BACKEND": "jax"})
    assert (found["JAX_ENABLE_X64"], found["KERAS_BACKEND"]) == ("1", "jax")


@pytest.mark.parametrize(
    ("name", "asked", "found"),
    [
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "STRICT"),
        ("TF_SET_ONEDNN_FPMATH_MODE", "BF16", "STRICT"),
        ("NVIDIA_TF32_OVERRIDE", "1", "0"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "0"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX2"),
        ("TF_ENABLE_ONEDNN_OPTS", "0", "0"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math", ""),
        (
            "XLA_FLAGS",
            "--xla_dump_to=a --xla_cpu_enable_fast_math=true  --xla_enable_fast_math=1 --xla_cpu_multi_thread_eigen=false",
            "--xla_dump_to=a --xla_cpu_multi_thread_eigen=false",
        ),
        (
            "XLA_FLAGS",
            "--xla_cpu_enable_fast_math_of_another_kind",
            "--xla_cpu_enable_fast_math_of_another_kind",
        ),
        ("XLA_FLAGS", "folder/flags", "folder/flags"),
    ],
)
def test_less_precision_is_switched_off_and_other_instructions_are_not(monkeypatch, name, asked, found):
    monkeypatch.setenv(name, asked)
    assert environment({})[name] == found


def test_backends_run_with_it(monkeypatch, tmp_path):
    """Two processes at once get half of the cores each. They share a folder of programs, which is removed afterwards."""
    monkeypatch.setenv("TOY_PROCESSES", str(tmp_path / "processes"))
    for each in (module, runner):
        monkeypatch.setattr(each, "cores", lambda: 6)
    reports = run_backends(["toy_backends:Surroundings", "toy_backends:Surroundings"], level="core")
    first, second = (report.versions for report in reports)
    assert first == second
    assert first["OMP_NUM_THREADS"] == "3"
    assert not Path(first["JAX_COMPILATION_CACHE_DIR"]).exists()
    assert first["JAX_ENABLE_X64"] == "1"
    assert len(set((tmp_path / "processes").read_text().split())) == 2
    alone = run_backend("toy_backends:Surroundings", runs=all_runs(level="core")[:1])
    assert set(alone.versions) == {"JAX_ENABLE_X64"}


def test_a_single_backend_has_both_processes(monkeypatch, tmp_path):
    """Each process answers half of the runs. The report keeps their order, and a crash affects only one half."""
    for each in (module, runner):
        monkeypatch.setattr(each, "cores", lambda: 2)
    monkeypatch.setenv("TOY_PROCESSES", str(tmp_path / "processes"))
    (report,) = run_backends(["toy_backends:Surroundings"], level="core")
    assert len(set((tmp_path / "processes").read_text().split())) == 2
    assert report.versions["OMP_NUM_THREADS"] == "2"
    assert [outcome.run.id for outcome in report.outcomes] == [run.id for run in all_runs(level="core")]
    whole = run_backend("toy_backends:Surroundings", runs=all_runs(level="core"))
    assert [outcome.status for outcome in report.outcomes] == [outcome.status for outcome in whole.outcomes]


def test_a_part_that_dies():
    runs = [run for run in all_runs() if run.case.id in ("SA-FWD-001", "SA-MAP-001")]
    report = run_backend("toy_backends:Dies", runs=runs, parts=2)
    whole = run_backend("toy_backends:Dies", runs=runs)
    assert [outcome.status for outcome in report.outcomes] == [outcome.status for outcome in whole.outcomes]
    assert {outcome.status for outcome in report.outcomes} == {"pass", "error", "unclaimed"}
    assert run_backend("toy_backends:Lacking", runs=runs, parts=2).refused


def test_a_backend_that_only_one_process_can_hold(monkeypatch, tmp_path):
    """If one of two processes cannot start, its runs start again when the other process has ended."""
    monkeypatch.setenv("TOY_LOCK", str(tmp_path / "lock"))
    runs = all_runs(level="core")[:6]
    report = run_backend("toy_backends:Exclusive", runs=runs, parts=2)
    assert not report.error
    assert [outcome.run.id for outcome in report.outcomes] == [run.id for run in runs]
    assert {outcome.status for outcome in report.outcomes} == {"pass", "unclaimed"}


def test_only_memory_may_be_past_measuring():
    runs = [run for run in all_runs() if run.case.id == "SA-FWD-001"]
    report = run_backend("toy_backends:SaysMemory", runs=runs)
    assert "pass" not in {outcome.status for outcome in report.outcomes}
    assert "error" in {outcome.status for outcome in report.outcomes}


def _calibrate(folder):
    calibrate.main()


def _port(folder):
    config = SelfAttentionConfig(16)
    generator = np.random.default_rng(3)
    params = {row.name: generator.normal(size=row.shape) for row in parameter_table(config).values()}
    verify.check_framework("flax", {"": (config, params)})


def _score(folder):
    frameworks.ask("flax-nnx", folder)


@pytest.mark.parametrize(
    ("start", "asking"), [(_calibrate, calibrate), (_port, verify), (_score, frameworks)]
)
def test_whoever_checks_full_precision_shows_that_flax_asks_for_it(start, asking, monkeypatch, tmp_path):
    asked = []

    def instead(command, *, env, **_):
        asked.append(env)
        raise subprocess.TimeoutExpired(command, 0)

    monkeypatch.setattr(asking.subprocess, "run", instead)
    monkeypatch.setattr(sys, "argv", ["calibrate", "flax-nnx"])
    with contextlib.suppress(subprocess.TimeoutExpired):
        start(tmp_path)
    assert {env["JAX_DEFAULT_MATMUL_PRECISION"] for env in asked} == {"BF16_BF16_F32"}
