"""A grader's attributes against people's, as one page."""

from __future__ import annotations

from steerlm_nemo.evaluation.grading import Comparison
from steerlm_nemo.report.pages import render


def comparison_page(comparison: Comparison, title: str) -> str:
    """One page: the table and a confusion table per attribute."""
    return render("comparison", title=title, comparison=comparison)
