"""A grader's attributes against people's, as one page."""

from __future__ import annotations

from html import escape

from steerlm_nemo.evaluation.grading import Comparison
from steerlm_nemo.report.charts import heat_table


def comparison_page(comparison: Comparison, title: str) -> str:
    """One page: the table and a confusion table per attribute."""
    figures = []
    for name, grading in comparison.gradings().items():
        scale = [str(value) for value in grading.values]
        table = heat_table(scale, scale, grading.confusion, max(map(max, grading.confusion)))
        figures.append(f"<h2>{escape(name)}</h2>{table}")
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:4px 9px;text-align:right}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{style}</style>"
        f"<h1>{escape(title)}</h1><pre>{escape(comparison.text())}</pre>"
        f"<p>Rows: human grade; columns: the model's; cells: turns.</p>"
        f"{''.join(figures)}</html>\n"
    )
