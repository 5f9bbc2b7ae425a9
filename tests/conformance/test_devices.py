"""Backends compute on the requested device, named as their framework names it, and on no other."""

import json
import re
from dataclasses import replace

import jsonschema
import pytest
from click.testing import CliRunner

from selfattn_core.cli import main
from selfattn_core.conformance.backends import REGISTRY
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_core.conformance.cases.table import CASES, all_runs
from selfattn_core.conformance.execution.devices import (
    WORDS,
    Device,
    DeviceAbsentError,
    DeviceUnknownError,
    chosen,
    device_problem,
    device_variables,
)
from selfattn_core.conformance.execution.runner import run_backend
from selfattn_core.conformance.questions.ask import answers
from selfattn_core.conformance.questions.peak_memory import PeakUnknownError
from selfattn_core.conformance.report import (
    as_data,
    as_html,
    as_junit,
    as_markdown,
    as_table,
    difference,
    schema,
)
from selfattn_core.conformance.report.summary import device_words
from selfattn_core.conformance.results import BackendReport, Outcome

pytestmark = pytest.mark.usefixtures("on_path")
ONE = [run for run in all_runs() if run.id == "SA-FWD-001/float32/channels_last"]
FEW = [
    run
    for run in all_runs()
    if run.case.id in ("SA-FWD-001", "SA-MAP-001", "SA-PAR-001", "SA-MEM-004", "SA-SHP-001")
    and run.dtype == "float32"
    and run.layout == "channels_last"
]


class NeverResets:
    """The counters of JAX: 100 bytes are in use, the earlier peak was 900, and a whole map needs 2900 more."""

    in_use, peak, counts = 100, 900, True

    def build(self, config, params, dtype, layout):
        return None

    def forward(self, model, x):
        assert self.counts
        self.peak = max(self.peak, self.in_use + (2900 if x.shape[1] > 8 else 90))
        return x

    def peak_memory(self, call):
        if not self.counts:
            raise PeakUnknownError("it keeps no peak")
        from selfattn_ops.devices.jax import peak_between

        before = {"bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}
        call()
        return peak_between(before, self.peak)


def statuses(report) -> dict[str, str]:
    return {outcome.run.case.family: outcome.status for outcome in report.outcomes}


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "cpu:0"), ("cpu:1", "cpu:1"), ("CUDA:1", "gpu:1"), ("gpu", "gpu:0")]
)
def test_a_device_has_a_word_and_a_number(device, name):
    here = {"cpu": ("cpu:0", "cpu:1"), "cuda": ("gpu:0", "gpu:1"), "gpu": ("gpu:0", "gpu:1"), "tpu": ()}
    assert chosen(device, here) == name


@pytest.mark.parametrize("device", ["cpu:2", "tpu", "cuda:17"])
def test_a_device_that_is_not_there(device):
    here = {"cpu": ("cpu:0", "cpu:1"), "cuda": ("gpu:0",), "gpu": ("gpu:0",), "tpu": ()}
    with pytest.raises(
        DeviceAbsentError, match=rf"no device '{device}' here; there are: cpu:0, cpu:1, gpu:0\."
    ):
        chosen(device, here)


@pytest.mark.parametrize("device", ["", "card", "cpu:", "cpu:x", "cpu:-1", "cpu:0,cpu:1", "cpu 0"])
def test_what_is_no_device(device):
    with pytest.raises(DeviceUnknownError, match="expected one of cpu, cuda"):
        chosen(device, {"cpu": ("cpu:0",), "cuda": ()})


def test_every_framework_has_words():
    assert {registered.framework for registered in REGISTRY.values()} == set(WORDS)
    assert device_problem("mps", WORDS["torch"]) == ""
    assert "cpu, gpu, cuda, rocm, tpu" in device_problem("mps", WORDS["jax"])


def test_the_cpu_is_all_that_a_process_on_it_sees():
    for given in ({}, {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda"}):
        assert device_variables("jax", "cpu:3", given) == {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        assert device_variables("torch", "cpu", given) == {"CUDA_VISIBLE_DEVICES": ""}
    assert device_variables("torch", "cuda", {"CUDA_VISIBLE_DEVICES": "1"}) == {}
    assert device_variables("jax", "tpu", {}) == {}


def test_a_backend_of_ones_own_computes_where_it_is_asked_to():
    report = run_backend("toy_backends:OnTwo", runs=FEW, device="toy")
    assert statuses(report) == dict.fromkeys(("forward", "map", "params", "memory", "shipped"), "pass")
    assert (report.device.name, report.device.model, report.device.driver) == ("toy:0", "A processor", "7")
    assert report.device.precisions == {"matrix product": "tf32"}
    assert {outcome.label for outcome in report.outcomes} == {"", "tf32"}


def test_by_default_it_is_the_cpu_and_memory_is_what_its_counters_say():
    report = run_backend("toy_backends:OnTwo", runs=FEW)
    assert report.device.name == "cpu:0"
    assert statuses(report)["memory"] == "fail"


def test_a_peak_that_is_never_forgotten_still_measures_what_exceeds_it():
    """Earlier computations have left a peak above the memory in use, as in any process."""
    pytest.importorskip("jax")
    case = next(case for case in CASES if case.family == "memory" and case.of == "forward")
    counter = NeverResets()
    assert answers(counter, case, inputs(case, "float32"), "float32", "channels_last")["bytes"] == 2900
    counter.counts = False
    with pytest.raises(PeakUnknownError, match="keeps no peak"):
        answers(counter, case, inputs(case, "float32"), "float32", "channels_last")


def test_answers_on_another_device_are_failures():
    report = run_backend("toy_backends:Strays", runs=ONE, device="cpu:1")
    assert [outcome.message for outcome in report.outcomes] == ["answers are on cpu:0, expected cpu:1"]
    assert statuses(report) == {"forward": "fail"}
    assert run_backend("toy_backends:Strays", runs=ONE, device="cpu:0").passed


def test_answers_of_which_no_place_was_noted_are_failures():
    report = run_backend("toy_backends:Silent", runs=ONE, device="cpu:1")
    assert [outcome.message for outcome in report.outcomes] == [
        "places() named no device after an answer, expected cpu:1"
    ]
    assert statuses(report) == {"forward": "fail"}


def test_a_device_without_memory_for_one_case_answers_the_others():
    report = run_backend("toy_backends:RunsOut", runs=FEW, device="toy:0")
    assert statuses(report) == {
        "forward": "pass",
        "map": "error",
        "params": "pass",
        "memory": "pass",
        "shipped": "pass",
    }
    (message,) = [outcome.message for outcome in report.outcomes if outcome.status == "error"]
    assert "toy:0: out of memory" in message


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("NoProducts", "the framework's default products: .*no such product here"),
        ("CoarseProducts", "coarser than any format"),
        (
            "DiesOfProducts",
            "died by signal 9 while the framework's default products were measured: an illegal",
        ),
        ("HangsInProducts", "ended after 5 s while the framework's default products were measured"),
        ("DiesAsShipped", "did not start: the process exited with code 7"),
    ],
)
def test_products_that_cannot_be_measured_are_errors_of_the_family_shipped_alone(backend, words):
    report = run_backend(f"toy_backends:{backend}", runs=FEW, device="toy", timeout=5)
    assert statuses(report) == {
        "forward": "pass",
        "map": "pass",
        "params": "pass",
        "memory": "pass",
        "shipped": "error",
    }
    assert (report.error, report.device.name, report.device.precisions) == ("", "toy:0", {})
    (message,) = [outcome.message for outcome in report.outcomes if outcome.status == "error"]
    assert re.search(words, message, re.DOTALL), message


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("Good", "cpu", "this backend accepts none: it has no methods devices, on and places"),
        ("OnTwo", "cuda", "got device 'cuda'; expected one of cpu, toy, card"),
        ("WithoutPlaces", "", "lacks on, places"),
        ("NoPlaces", "", "lacks places"),
        ("NowhereToGo", "cpu", "this backend accepts none"),
        (
            "NamesAreAWord",
            "",
            "devices() returns cpu: 'cpu:0', card: (0, 1), expected the names of all devices of a kind",
        ),
    ],
)
def test_what_is_refused(backend, device, words):
    report = run_backend(f"toy_backends:{backend}", runs=ONE, device=device)
    assert report.refused
    assert words in report.error


def test_methods_that_are_none_claim_no_device():
    report = run_backend("toy_backends:NowhereToGo", runs=ONE)
    assert report.passed
    assert report.device.name == ""


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["conform", *arguments])


def test_the_command_asks_for_a_device(tmp_path):
    path = tmp_path / "report.json"
    result = invoke("toy_backends:OnTwo", "--level", "core", "--device", "toy", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "toy:0, A processor, driver 7; float32 by default: not measured" in result.output
    data = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(data, schema())
    assert data["device"] == "toy"


def test_a_device_that_is_not_there_is_missing():
    result = invoke("toy_backends:OnTwo", "--level", "core", "--device", "card")
    assert result.exit_code == 3
    assert "there is no device 'card' here; there are: cpu:0, cpu:1, toy:0." in result.output
    assert "did not start" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["torch", "--device", "gpu"], ["torch: got device 'gpu'; expected one of cpu, cuda, mps, xpu"]),
        (
            ["--device", "cuda"],
            ["keras-tensorflow: got device 'cuda'; expected one of cpu, gpu"],
        ),
        (
            ["--device", "mps"],
            ["keras-tensorflow: got", "keras-jax, flax-nnx, flax-linen: got", "cpu, gpu, cuda, rocm, tpu"],
        ),
        (["torch", "--device", "cuda:0", "--device", "cuda:1"], ["got cuda:0 and cuda:1; expected one"]),
        (["torch", "--device", "cuda:0,cuda:1"], ["got device 'cuda:0,cuda:1'"]),
        (["torch", "--device", ""], ["torch: got device ''; expected one of cpu, cuda, mps, xpu"]),
        (["toy_backends:OnTwo", "--device", ""], ["got device ''; expected a word of this backend's own"]),
        (["--self-test", "--device", "cpu"], ["name a BACKEND"]),
        (["--device", "cpu", "--diff", "a.json", "b.json"], ["--diff compares two files and runs nothing"]),
    ],
)
def test_wrong_usage(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    for each in words:
        assert each in said
    assert "torch: got" not in said or "torch" in arguments


def test_every_form_of_a_report_names_the_device():
    report = run_backend("toy_backends:OnTwo", runs=FEW, device="toy")
    data = as_data([report], device="toy")
    jsonschema.validate(data, schema())
    assert data["factors"]["tf32"] == 4
    words = "toy:0, A processor, driver 7; float32 by default: matrix product in tf32"
    for form in (as_html, as_junit, as_markdown, as_table):
        assert words in form(data)


def test_a_report_says_why_default_precisions_are_not_known():
    device = Device("toy:0", "A processor")
    claims = ("forward", "shipped")
    runs = {run.case.family: run for run in FEW}
    found = []
    for claimed, family in ((claims, "forward"), (claims, "shipped"), (("forward",), "shipped")):
        outcomes = (Outcome(runs[family], "unclaimed"),)
        report = BackendReport("mine", {}, claimed, ("channels_last",), ("float32",), outcomes, device=device)
        found.append(device_words(as_data([report])["backends"][0]).partition("by default: ")[2])
    assert found == [
        "not measured, only the level deploy measures it",
        "could not be measured",
        "not measured, because the backend does not claim default precision",
    ]


def test_a_report_from_before_there_were_devices_has_no_other():
    report = run_backend("toy_backends:OnTwo", runs=ONE, device="toy")
    new, old = as_data([report], device="toy"), as_data([report], device="toy")
    del old["backends"][0]["device"]
    assert str(difference(old, new)) == "nothing changed"
    other = as_data([replace(report, device=replace(report.device, name="toy:1"))])
    assert "device toy:0" in str(difference(new, other))


@pytest.mark.parametrize("device", ["cpu", "cpu:3"])
def test_jax_on_one_of_several_devices(monkeypatch, device):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    asked = [run for run in FEW if run.case.family in ("forward", "params")]
    report = run_backend("flax-nnx", runs=asked, device=device)
    assert report.passed, report
    assert report.device.name == (device if ":" in device else "cpu:0")
    assert report.device.model


def test_jax_on_another_device_than_asked_for(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    report = run_backend("toy_jax:Strays", runs=ONE, device="cpu:3")
    assert [outcome.message for outcome in report.outcomes] == ["answers are on cpu:0, expected cpu:3"]


@pytest.mark.parametrize("visible", ["", None])
def test_with_and_without_cards_hidden_the_default_is_the_cpu(monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    report = run_backend("torch", runs=ONE)
    assert report.passed
    assert report.device.name == "cpu:0"
