"""The reports of a conformance run: the data, and the forms that people and programs read."""

from selfattn_core.conformance.report.difference import Difference, difference
from selfattn_core.conformance.report.document import as_data, schema
from selfattn_core.conformance.report.html import as_html
from selfattn_core.conformance.report.junit import as_junit
from selfattn_core.conformance.report.markdown import as_markdown
from selfattn_core.conformance.report.terminal import as_table, show

__all__ = [
    "Difference",
    "as_data",
    "as_html",
    "as_junit",
    "as_markdown",
    "as_table",
    "difference",
    "schema",
    "show",
]
