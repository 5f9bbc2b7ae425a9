"""Two cells of the sweep as `make test-exports` runs them, how a cell can end, and the table."""

import json
from dataclasses import asdict, replace

import pytest

from selfattn_core import load, save
from tests.exports.cells import EXPORTERS, FORMS, Form
from tests.exports.page import in_page, table
from tests.exports.sweep import RECORD, Cell, Record, judged, kept, sweep, weights_of

BY_NAME = {exporter.name: exporter for exporter in EXPORTERS}


def one(name, runtime, form, folder):
    exporter = replace(BY_NAME[name], runtimes=(runtime,))
    (cell,) = sweep([exporter], [form], folder=folder)
    assert (cell.ending, cell.said) == ("right", "")
    assert 0 < cell.floors <= 8
    return exporter


# A loop that counts in 64 bits is read wrongly, in silence; `tests/backends/keras/test_export.py` would see it too.
@pytest.mark.slow
def test_litert_in_blocks_is_right(tmp_path):
    one("keras_tensorflow_litert", "tensorflow-lite", Form("pooled", blocks=True), tmp_path)


def test_a_file_is_right_and_with_other_weights_is_wrong(tmp_path):
    form = Form("flat", blocks=True, with_map=True)
    exporter = one("onnx_traced", "onnxruntime", form, tmp_path)
    config, params = load(weights_of("flat", tmp_path))
    save(tmp_path / "flat.safetensors", config, params | {"gamma": -params["gamma"]}, overwrite=True)
    assert judged(exporter, form, "onnxruntime", tmp_path).ending == "wrong"


@pytest.mark.slow
def test_what_an_exporter_raises_is_what_it_says(tmp_path):
    elsewhere = replace(BY_NAME["keras_torch_torch"], environment={"KERAS_BACKEND": "jax"})
    (cell,) = sweep([elsewhere], FORMS[:1], folder=tmp_path)
    assert cell.ending == "refused"
    assert "requires PyTorch backend" in cell.said


def test_an_exporter_whose_process_ends_is_refused_for_each_form(tmp_path):
    unknown = replace(BY_NAME["torch_export"], name="unknown")
    cells = sweep([unknown], FORMS[:2], folder=tmp_path)
    assert [cell.said for cell in cells] == ["the exporter's process ended: exit code 1"] * 2


def test_the_table_has_a_row_for_each_runtime_and_says_what_was_said_and_what_was_not_run():
    names = {"torch_export": 0.31, "onnx_dynamo": 1.24}
    cells = {
        name: [
            Cell(name, form.words, runtime, "right", floors)
            for form in FORMS
            for runtime in BY_NAME[name].runtimes
        ]
        for name, floors in names.items()
    }
    cells["torch_export"][0] = replace(
        cells["torch_export"][0], ending="wrong", said="softmax over | queries"
    )
    cells["torch_export"][1] = replace(cells["torch_export"][1], ending="refused", said="no `aten::mT`")
    records = [Record(name, "2026-11-28", {"torch": "2.13.0"}, tuple(some)) for name, some in cells.items()]
    lines = table(records).splitlines()
    assert lines[0].startswith("48 cells: 46 right, 1 refused, 1 wrong. Python ")
    assert lines[0].endswith("2026-11-28; torch 2.13.0.")
    assert lines[2].startswith("Not run yet: PyTorch as ONNX, `torch.onnx.export(dynamo=False)`; ")
    rows = [line for line in lines if line[:1] == "|"][2:]
    first = "0.31; refused flat with the map (1); **wrong** flat without the map (2)"
    assert rows == [
        f"| PyTorch | `torch.export` | torch | {first} | 0.31 | 0.31 | 0.31 |",
        "| PyTorch | ONNX, `torch.onnx.export` | onnxruntime | 1.24 | 1.24 | 1.24 | 1.24 |",
        "| PyTorch | ONNX, `torch.onnx.export` | openvino | 1.24 | 1.24 | 1.24 | 1.24 |",
    ]
    assert lines[-2:] == ["1. `no 'aten::mT'`", "2. `softmax over ¦ queries`"]


def test_the_table_stands_between_its_marks():
    page = "before\n<!-- exports -->\nold\n<!-- /exports -->\nafter\n"
    assert in_page(page, "new") == "before\n<!-- exports -->\nnew\n<!-- /exports -->\nafter\n"
    with pytest.raises(ValueError, match="to put the table between them"):
        in_page("nothing", "new")


def test_a_record_has_every_form_and_is_read_again(tmp_path):
    unknown = replace(BY_NAME["torch_export"], name="unknown")
    assert not kept(tmp_path)
    sweep([unknown], FORMS[:1], folder=tmp_path)
    assert not (tmp_path / "unknown" / RECORD).exists()
    (tmp_path / "torch_export").mkdir()
    record = Record(
        "torch_export",
        "2026-11-28",
        {"torch": "2.13.0"},
        (Cell("torch_export", "flat", "torch", "right", 1.0),),
    )
    (tmp_path / "torch_export" / RECORD).write_text(json.dumps(asdict(record)), encoding="utf-8")
    assert kept(tmp_path) == [record]
