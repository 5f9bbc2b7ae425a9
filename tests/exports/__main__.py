"""Every exporter and runtime, held to the numpy definition: `make test-exports`.

Prints how each cell ended and the counts, writes the table into `docs/exports.md`, and ends with 1 if any is wrong, or if a block of the
pages that needs these packages does not run.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from selfattn_core.cli.exit_codes import CHECK_FAILED, MISSING
from selfattn_core.cli.guard import ended_by_signals
from selfattn_core.files.writing import write_atomically
from tests.exports.cells import EXPORTERS, FORMS
from tests.exports.page import in_page, table
from tests.exports.sweep import Cell, kept, sweep
from tests.test_docs import failures, fenced

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "exports.md"
FOLDER = ROOT / "build" / "exports"


def _tell(cell: Cell) -> None:
    what = f"{cell.floors:.2f} ×" if cell.ending == "right" else ""
    words = " ".join((cell.ending, cell.exporter, cell.runtime, cell.form, what, cell.said[:300]))
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def main() -> int:
    """Run the cells, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="exporters whose name has it")
    parser.add_argument("--form", default="", metavar="TEXT", help="forms whose name has it")
    options = parser.parse_args()
    exporters = [each for each in EXPORTERS if options.only in each.name]
    forms = [form for form in FORMS if options.form in form.words]
    try:
        with ended_by_signals():
            cells = sweep(exporters, forms, folder=FOLDER, tell=_tell)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return MISSING
    counts = Counter(cell.ending for cell in cells)
    sys.stdout.write(f"{counts['right']} right, {counts['refused']} refused, {counts['wrong']} wrong\n")
    # Exporters that were left out are in the table as they were last run, with the date and the versions of that.
    if records := kept(FOLDER):
        page = in_page(PAGE.read_text(encoding="utf-8"), table(records))
        write_atomically(PAGE, page.encode(), overwrite=True)
    # Blocks of the pages that need one of these packages.
    broken = failures(fenced("python", elsewhere=True))
    for place, error in broken.items():
        sys.stderr.write(f"{place}: {error}\n")
    return CHECK_FAILED if counts["wrong"] or broken else 0


if __name__ == "__main__":
    sys.exit(main())
