"""The generated parts of pages: the command's help, the dialects, the measurements."""

import inspect
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File

from selfattn_core.cli import main
from selfattn_core.conformance.release.calibrate import kept_results
from selfattn_core.conformance.release.right import HOMES, implementations
from selfattn_core.porting.dialects import parse as schema
from selfattn_core.porting.dialects.catalogue import dialect, dialect_names
from selfattn_core.porting.dialects.dialect import ROLES

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Add the plots of the measurements to the site."""
    for plot in sorted(_RESULTS.glob("*.svg")) + sorted(_RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", content=plot.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the generated parts where the pages ask for them."""
    markdown = markdown.replace("<!-- command -->", command_help())
    markdown = markdown.replace("<!-- dialects -->", dialect_table())
    markdown = markdown.replace("<!-- dialect schema -->", dialect_schema())
    markdown = markdown.replace("<!-- right implementations -->", right_implementations())
    return markdown.replace("<!-- benchmarks -->", measurements())


def command_help() -> str:
    """The help of every subcommand, as the command prints it."""
    context = click.Context(main, info_name="selfattn")
    parts = []
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        if command is None:
            continue
        text = command.get_help(click.Context(command, info_name=name, parent=context))
        parts.append(f"## selfattn {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def dialect_schema() -> str:
    """All fields of a dialect file, from the docstring of the module that reads them."""
    text = inspect.getdoc(schema) or ""
    return text[text.index("```toml") : text.rindex("```") + 3]


def dialect_table() -> str:
    """The table of dialects, with the reason for each that is refused."""
    lines = ["| dialect | implementation | query, key, value, out | notes |", "|---|---|---|---|"]
    for name in dialect_names():
        known = dialect(name)
        roles = known.variants[0].roles
        names = ", ".join(f"`{roles[role]}`" if role in roles else "–" for role in ROLES)
        notes = (
            [f"**Refused**: {known.reason}. Instead: {known.instead}"] if known.refused else [*known.caveats]
        )
        notes += ["keys and values pooled 2×2"] if known.variants[0].kv_pool == 2 else []
        cells = [f"`{name}`", known.title, names, "; ".join(notes)]
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def right_implementations() -> str:
    """The table of right implementations, with the worst error of each."""
    measured = kept_results().get("right", {}).get("implementations", {})
    lines = ["| computes | why it is right | seeds | worst error |", "|---|---|---|---|"]
    for home in HOMES:
        for right in implementations(home):
            found = measured.get(right.name, {"seeds": 0, "worst": {}})
            errors = ", ".join(f"{each['floors']:.1f} in {dtype}" for dtype, each in found["worst"].items())
            lines.append(
                f"| {right.name} | {right.why} | {found['seeds']} | {errors or 'not measured yet'} |"
            )
    return "\n".join(lines)


def measurements() -> str:
    """The committed measurements, with their headings one level down."""
    pages = sorted(_RESULTS.glob("*.md"))
    if not pages:
        return "This checkout has no measurements. `make bench` makes them."
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    text = re.sub(r"^(#+ )", r"##\1", text, flags=re.M)
    return re.sub(r"\]\(([^)/]+\.(?:svg|png))\)", r"](results/\1)", text)
