"""The prepared script writes its table whatever is missing, failing or too slow; a small run of it is done by hand."""

import json
import sys

import pytest

from benchmarks import device_check
from benchmarks.device_check import main


@pytest.fixture
def here(monkeypatch):
    """A machine in which torch alone sees a card."""

    def seen(framework, variables):
        kinds = {"cpu": ["cpu:0"], "cuda": [], "gpu": []}
        if framework == "torch":
            kinds["cuda"] = ["cuda:0"]
        return {"kinds": kinds, "models": {"cuda:0": "A Card 100"}}

    monkeypatch.setattr(device_check, "seen", seen)
    monkeypatch.setattr(device_check, "missing_modules", lambda _: [])


def table(folder) -> list[list[str]]:
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][
        1:
    ]


def test_no_framework_has_the_word(tmp_path, capsys):
    assert main(["--device", "abacus", "--out", str(tmp_path / "out")]) == 2
    assert "torch: cpu, cuda, mps, xpu; jax:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_framework_sees_the_device(here, tmp_path):
    assert main(["--device", "gpu:7", "--out", str(tmp_path)]) == 3
    rows = table(tmp_path)
    assert [row[:3] for row in rows] == [
        ["the device", name, "missing"] for name in ("torch", "jax", "tensorflow")
    ]
    assert "there is no device 'cuda:7' here; there are: cpu:0, cuda:0." in rows[0][3]


def test_when_the_time_is_over_it_says_so(here, tmp_path):
    assert main(["--device", "cuda", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert [row[:3] for row in table(tmp_path) if row[2] != "missing"] == [
        ["conform", "torch", "not reached"],
        ["conform", "keras-torch", "not reached"],
        ["training", "torch", "not reached"],
        ["bench", "torch", "not reached"],
    ]
    assert "- torch: cuda:0, A Card 100" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_parts_pass_fail_and_are_ended(here, tmp_path, monkeypatch):
    check = device_check._Check(device_check._options(["--device", "cuda", "--out", str(tmp_path)]))
    report = tmp_path / "found.json"
    report.write_text(json.dumps({"steps": 2, "finite": True, "seconds_per_step": 0.5, "last": {"loss": 1}}))

    def found() -> str:
        return device_check._trained(report)

    check.run("good", "torch", ["-c", "pass"], found)
    check.run("bad", "torch", ["-c", "raise SystemExit('a bug')"], found)
    report.write_text(report.read_text().replace("true", "false"))
    check.run("not finite", "torch", ["-c", "pass"], found)
    check.end = device_check.time.monotonic() + 2
    started = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    check.run("slow", "torch", ["-c", started], found)
    assert [(part.name, part.verdict) for part in check.parts] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("not finite", "failed"),
        ("slow", "not reached"),
    ]
    assert check.parts[0].words == "2 steps, 500 ms each; at the end loss 1"
    assert "a loss is not finite" in check.parts[2].words
    assert check.parts[3].seconds < 20


def test_an_earlier_run_does_not_stand_in_for_this_one(here, tmp_path):
    (tmp_path / "bench").mkdir()
    old = [
        "conform-torch.json",
        "conform-torch.html",
        "training-torch.json",
        "bench/a-card.json",
        "bench/a-card.md",
    ]
    for name in old:
        (tmp_path / name).write_text("{}")
    (tmp_path / "mine.txt").write_text("kept")
    assert main(["--device", "cuda", "--out", str(tmp_path), "--minutes", "0"]) == 1
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"mine.txt", "README.md"}


@pytest.mark.parametrize(("absent", "code"), [(None, 0), ("sklearn", 1), ("keras", 1), ("jax", 0)])
def test_a_part_that_is_missing_of_a_framework_that_is_there(here, tmp_path, monkeypatch, absent, code):
    monkeypatch.setattr(device_check, "missing_modules", lambda names: [n for n in names if n == absent])

    def run(self, name, framework, *_):
        self.parts.append(device_check.Part(name, framework, "passed", ""))

    monkeypatch.setattr(device_check._Check, "run", run)
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == code
    rows = [row[:2] for row in table(tmp_path) if row[2] == "missing" and row[1] == "torch"]
    assert rows == {"sklearn": [["training", "torch"]], "keras": [["conform", "torch"]]}.get(absent, [])
