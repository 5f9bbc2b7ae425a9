"""The report as JUnit XML, for continuous-integration services that show each test."""

from xml.etree import ElementTree as ET

from selfattn_core.conformance.report.summary import (
    Data,
    command_line,
    device_words,
    replay_line,
    run_id,
    search_words,
    unanswered,
)

__all__ = ["as_junit"]


def as_junit(data: Data) -> str:
    """One test suite for each backend, and one for the mutants. Unclaimed runs are skipped tests.

    Args:
        data: the report.
    """
    root = ET.Element("testsuites", name="selfattn conform")
    for backend in data["backends"]:
        _backend(root, data, backend)
    if data["kills"]:
        suite = ET.SubElement(root, "testsuite", name="self-test")
        for kill in data["kills"]:
            case = ET.SubElement(suite, "testcase", name=kill["mutant"], classname="self-test")
            if not kill["killed"]:
                ET.SubElement(
                    case, "failure", message=f"none of {kill['asked']} runs of {kill['family']} catches it"
                )
        _count(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _backend(root: ET.Element, data: Data, backend: Data) -> None:
    suite = ET.SubElement(root, "testsuite", name=backend["name"], time=f"{backend['seconds']:.3f}")
    device = device_words(backend)
    if backend["versions"] or device:
        properties = ET.SubElement(suite, "properties")
        for name, version in [*backend["versions"].items(), *([("device", device)] if device else [])]:
            ET.SubElement(properties, "property", name=name, value=version)
    if backend["missing"] or backend["error"]:
        case = ET.SubElement(suite, "testcase", name="start", classname=backend["name"])
        words = backend["error"] or f"{', '.join(backend['missing'])} not installed"
        ET.SubElement(case, "error", message=words.splitlines()[-1]).text = words
    if nothing := unanswered(data, backend):
        case = ET.SubElement(suite, "testcase", name="claims", classname=backend["name"])
        ET.SubElement(case, "failure", message=nothing)
    for outcome in backend["outcomes"]:
        case = ET.SubElement(
            suite, "testcase", name=run_id(outcome), classname=f"{backend['name']}.{outcome['family']}"
        )
        status, message = outcome["status"], outcome["message"]
        again = command_line(
            backend["name"], run_id(outcome), seed=data["seed"], device=data.get("device", "")
        )
        if status == "fail":
            ET.SubElement(case, "failure", message=message).text = f"{outcome['title']}\n{again}"
        elif status == "error":
            ET.SubElement(
                case, "error", message=message.splitlines()[-1] if message else ""
            ).text = f"{message}\n{again}"
        elif status == "unclaimed":
            ET.SubElement(case, "skipped", message=f"unclaimed{f': {message}' if message else ''}")
        elif status == "expected-failure":
            ET.SubElement(case, "skipped", message=f"expected: {outcome['reason']} ({outcome['link']})")
    if search := backend.get("search"):
        _search(suite, data, backend, search)
    _count(suite)


def _search(suite: ET.Element, data: Data, backend: Data, search: Data) -> None:
    """One test for the search as a whole, and one for each failure that it found."""
    whole = ET.SubElement(suite, "testcase", name="search", classname=f"{backend['name']}.search")
    ET.SubElement(whole, "system-out").text = search_words(backend)
    for found in search["findings"]:
        case = ET.SubElement(suite, "testcase", name=found["token"], classname=f"{backend['name']}.search")
        kind = "error" if found["status"] == "error" else "failure"
        again = replay_line(backend["name"], found["token"], device=data.get("device", ""))
        message = f"{found['property']}: {found['message'].splitlines()[-1] if found['message'] else ''}"
        ET.SubElement(case, kind, message=message).text = f"{found['words']}\n{found['message']}\n{again}"


def _count(suite: ET.Element) -> None:
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for kind in ("failure", "error", "skipped"):
        name = {"failure": "failures", "error": "errors"}.get(kind, kind)
        suite.set(name, str(sum(case.find(kind) is not None for case in cases)))
