"""The newest releases of the frameworks, held to the numpy definition: `make test-newest`.

Run by the interpreter of an environment of its own, which it fills with the newest release of each framework that the
package index has a build for. Of torch on Linux only builds labelled `+cpu` are taken: the plain ones bring gigabytes of
CUDA. Then it runs `selfattn conform`, and puts the table of what was tried into `docs/versions.md`.
"""

import argparse
import datetime as dt
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["exit_code", "in_page", "table", "usable"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "versions.md"
REPORT = ROOT / "build" / "newest.json"
FRAMEWORKS = ("torch", "tensorflow", "jax", "keras", "flax")
START, END = "<!-- newest -->", "<!-- /newest -->"


def usable(name: str, versions: Sequence[str], platform: str = sys.platform) -> str:
    """The newest version with a build for the CPU, or "".

    Args:
        name: of the framework.
        versions: that the index has builds of, newest first.
        platform: as `sys.platform` has it.

    Example:
        >>> usable("torch", ["2.15.0", "2.14.1+cpu", "2.14.1"], "linux")
        '2.14.1+cpu'
    """
    if name == "torch" and platform == "linux":
        versions = [version for version in versions if version.endswith("+cpu")]
    return next(iter(versions), "")


def table(data: Mapping[str, Any], offered: Mapping[str, Sequence[str]], usable: Mapping[str, str]) -> str:
    """What was tried and how it went, a row for each backend.

    Args:
        data: the report of `selfattn conform --json`.
        offered: versions of each framework on the index, newest first.
        usable: the version of each that could be installed, or "".
    """
    date = dt.datetime.fromisoformat(data["created"]).date().isoformat()
    where = f"Python {data['versions']['python']}, numpy {data['versions']['numpy']}, {data['versions']['machine']}"
    lines = [f"{where}, {date}:", "", "| backend | versions | level reached | checks |", "|---|---|---|---|"]
    for backend in data["backends"]:
        if backend["missing"]:
            why = "; ".join(_absent(name, offered, usable) for name in backend["missing"])
            lines.append(f"| `{backend['name']}` | not tried: {why} | – | – |")
            continue
        versions = ", ".join(
            _version(name, version, offered) for name, version in backend["versions"].items()
        )
        counts = Counter(outcome["status"] for outcome in backend["outcomes"])
        checks = ", ".join(f"{count} {status}" for status, count in counts.items()) or "did not start"
        lines.append(f"| `{backend['name']}` | {versions} | {backend['level'] or 'none'} | {checks} |")
    return "\n".join(lines)


def _version(name: str, version: str, offered: Mapping[str, Sequence[str]]) -> str:
    newest = next(iter(offered.get(name, ())), version)
    behind = "" if version.partition("+")[0] == newest.partition("+")[0] else f" ({newest} is out)"
    return f"{name} {version}{behind}"


def _absent(name: str, offered: Mapping[str, Sequence[str]], usable: Mapping[str, str]) -> str:
    if usable[name]:
        return f"{name} {usable[name]} is on the package index, and was not installed"
    if offered[name]:
        return f"no build of {name} for the CPU alone on the package index, where {offered[name][0]} is the newest"
    return f"no build of {name} for this Python on the package index"


def exit_code(code: int, data: Mapping[str, Any], usable: Mapping[str, str], missing: int) -> int:
    """That of the kit, or 0 if all it complains of are frameworks that the index has no build of.

    Args:
        code: the kit's.
        data: its report.
        usable: the version of each framework that could be installed, or "".
        missing: the code by which the kit says that a framework is missing, and nothing worse.
    """
    tried = [backend for backend in data["backends"] if not backend["missing"]]
    absent = {name for backend in data["backends"] for name in backend["missing"]}
    excused = code == missing and tried and not any(usable[name] for name in absent)
    return 0 if excused else code


def in_page(page: str, text: str) -> str:
    """The page with the table between its two marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected {START} and {END} in the page, to put the table between them.")
    return f"{before}{START}\n{text}\n{END}{after}"


def _offered(name: str, options: Sequence[str]) -> list[str]:
    command = ["index", "versions", "--json", "--only-binary", ":all:", *options, name]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        return []
    versions: list[str] = json.loads(done.stdout)["versions"]
    return versions


def main() -> int:
    """Install, run, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-index", metavar="URL", help="an index with builds of torch for the CPU")
    options = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        parser.error("expected the interpreter of an environment of its own: make test-newest")
    index = ["--extra-index-url", options.torch_index] if options.torch_index else []
    offered = {name: _offered(name, index if name == "torch" else []) for name in FRAMEWORKS}
    found = {name: usable(name, versions) for name, versions in offered.items()}
    wanted = [name for name in FRAMEWORKS if found[name] and name != "torch"]
    wanted += [f"torch=={found['torch']}"] if found["torch"] else []
    install = ["install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", *index, "-e", str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *install, *wanted], check=True)

    # Only now are they sure to be there.
    from selfattn_core.cli.exit_codes import MISSING
    from selfattn_core.files.writing import write_atomically

    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    kit = [str(Path(sys.executable).with_name("selfattn")), "conform", "--level", "deploy"]
    code = subprocess.run([*kit, "--json", str(REPORT)], check=False).returncode
    if not REPORT.exists():
        return code or 1
    data = json.loads(REPORT.read_text(encoding="utf-8"))
    tried = table(data, offered, found)
    sys.stdout.write(f"\n{tried}\n")
    write_atomically(PAGE, in_page(PAGE.read_text(encoding="utf-8"), tried).encode(), overwrite=True)
    return exit_code(code, data, found, MISSING)


if __name__ == "__main__":
    sys.exit(main())
