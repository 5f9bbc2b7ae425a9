"""Every cell: a form of the layer through an exporter and a runtime ends as right, as refused, or as wrong."""

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from selfattn_core import save
from selfattn_core.verifying import VerifyError, VerifyReport, verify
from tests.exports.cells import CONFIGS, EXPORTERS, FORMS, Exporter, Form, params_of
from tests.exports.exporting import SAID, artifact

__all__ = ["RECORD", "Cell", "Record", "judged", "kept", "sweep", "weights_of"]

ROOT = Path(__file__).parents[2]
RECORD = "record.json"
_SECONDS = 1200
# What a process ends with that was interrupted, by the signal or after it.
_INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT)
# The distribution that a runtime comes from, where it has another name.
_RUNTIMES = {
    "tensorflow-lite": "tensorflow",
    "keras-tensorflow": "keras",
    "keras-jax": "keras",
    "keras-torch": "keras",
}


@dataclass(frozen=True)
class Cell:
    """How one of them ended.

    Args:
        exporter: name of the exporter.
        form: words of the form.
        runtime: that ran the file; empty where none does.
        ending: "right", "refused" or "wrong".
        floors: the largest error in noise floors, of a right cell.
        said: why it was refused, in the words of the tool; how it is wrong; or what a right one does not take.
    """

    exporter: str
    form: str
    runtime: str
    ending: str
    floors: float = 0.0
    said: str = ""


@dataclass(frozen=True)
class Record:
    """How all forms of the layer ended, through one exporter.

    Args:
        exporter: its name.
        date: of the run.
        versions: of the exporter and its runtimes.
        cells: one for each form and runtime.
    """

    exporter: str
    date: str
    versions: dict[str, str]
    cells: tuple[Cell, ...]


def weights_of(config: str, folder: Path) -> Path:
    """The canonical file of the weights of a config, written if it is not there.

    Args:
        config: name in `CONFIGS`.
        folder: for it.
    """
    path = folder / f"{config}.safetensors"
    if not path.exists():
        save(path, CONFIGS[config], params_of(config))
    return path


def judged(exporter: Exporter, form: Form, runtime: str, folder: Path) -> Cell:
    """One file in one runtime, held to the definition by `selfattn verify`.

    Args:
        exporter: that wrote it.
        form: of the layer in it.
        runtime: of its container; empty for the only one.
        folder: with the weights, and the exporter's own folder.
    """
    path = artifact(folder / exporter.name, form.words, exporter.suffix)
    try:
        report = verify(path, weights_of(form.config, folder), runtime=runtime or None)
    except VerifyError as error:
        said = str(error).replace(f"{path}: ", "")
        if "No module named 'selfattn" in said:
            raise ModuleNotFoundError(f"{said}: install this checkout once more.") from error
        return Cell(exporter.name, form.words, runtime, "refused", said=said.splitlines()[0])
    return Cell(exporter.name, form.words, runtime, *_ending(report, form))


def _ending(report: VerifyReport, form: Form) -> tuple[str, float, str]:
    failed = [finding for finding in report.findings if not finding.passed and not finding.refused]
    if report.with_map != form.with_map:
        return "wrong", 0.0, f"the map is {'' if report.with_map else 'not '}among its outputs"
    if any(finding.verdicts for finding in failed):
        wrong = next(finding for finding in failed if finding.verdicts)
        return "wrong", 0.0, "; ".join((f"{wrong.question}: {wrong.words}", *report.diagnosis))
    if failed:
        return "refused", 0.0, f"{failed[0].question}: {failed[0].error}"
    floors = max(verdict.ratio for finding in report.findings for verdict in finding.verdicts)
    refused = [finding for finding in report.findings if finding.refused]
    said = f"not at every size: {refused[0].question}: {refused[0].error}" if refused else ""
    return "right", floors, said


def _exported(exporter: Exporter, forms: Sequence[Form], folder: Path) -> dict[str, str]:
    """What stopped the export of each form; empty where nothing did."""
    own = folder / exporter.name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    said: dict[str, str] = {}
    while left := [form.words for form in forms if form.words not in said]:
        command = [sys.executable, "-m", "tests.exports.exporting", exporter.name, str(own), *left]
        with (own / "printed.txt").open("ab") as stream:
            code = 0
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | exporter.environment,
                    stdout=stream,
                    stderr=stream,
                    timeout=_SECONDS,
                    check=False,
                ).returncode
                how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            except subprocess.TimeoutExpired:
                how = f"no end after {_SECONDS} seconds"
        lines = (own / SAID).read_text(encoding="utf-8").splitlines() if (own / SAID).exists() else []
        said |= {line["form"]: line["problem"] for line in map(json.loads, lines)}
        if code in _INTERRUPTED:
            raise KeyboardInterrupt
        if in_hand := next((word for word in left if word not in said), None):
            said[in_hand] = f"the exporter's process ended: {how}"
    return said


def sweep(
    exporters: Sequence[Exporter] = EXPORTERS,
    forms: Sequence[Form] = FORMS,
    *,
    folder: Path,
    at_once: int = 2,
    tell: Callable[[Cell], object] = lambda _: None,
) -> list[Cell]:
    """Run the cells; each file is exported once, and run in a process for each runtime.

    Args:
        exporters: which.
        forms: which.
        folder: for what is exported, in a folder for each exporter; if all forms were asked, with their record.
        at_once: exporters that are run beside one another.
        tell: called with each cell as it ends.

    Raises:
        ModuleNotFoundError: if a runtime is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS:
        weights_of(config, folder)

    def cells(exporter: Exporter) -> Iterator[Cell]:
        problems = _exported(exporter, forms, folder)
        for form in forms:
            for runtime in exporter.runtimes:
                if problem := problems[form.words]:
                    yield Cell(exporter.name, form.words, runtime, "refused", said=problem)
                else:
                    yield judged(exporter, form, runtime, folder)

    def told(exporter: Exporter) -> list[Cell]:
        found = []
        for cell in cells(exporter):
            tell(cell)
            found.append(cell)
        if tuple(forms) == FORMS:
            record = Record(exporter.name, _today(), _versions(exporter), tuple(found))
            content = json.dumps(asdict(record), indent=1, ensure_ascii=False)
            (folder / exporter.name / RECORD).write_text(f"{content}\n", encoding="utf-8")
        return found

    with ThreadPoolExecutor(at_once) as pool:
        return [cell for some in pool.map(told, exporters) for cell in some]


def kept(folder: Path) -> list[Record]:
    """The record of each exporter that has been run with every form, in their order.

    Args:
        folder: of the sweeps.
    """
    found = []
    for exporter in EXPORTERS:
        path = folder / exporter.name / RECORD
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            cells = tuple(Cell(**each) for each in content.pop("cells"))
            found.append(Record(**content, cells=cells))
    return found


def _today() -> str:
    return dt.datetime.now(tz=dt.UTC).date().isoformat()


def _versions(exporter: Exporter) -> dict[str, str]:
    names = {*exporter.versions, *(_RUNTIMES.get(each, each) for each in exporter.runtimes if each)}
    found = {}
    for name in sorted(names):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
