"""Pages from templates (templates/*.html). Every value is escaped unless it is a drawing of ours, which is markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(template: str, *, helpers: Mapping[str, Any] | None = None, **values: Any) -> str:
    """`templates/TEMPLATE.html` with these values, as text. `helpers` are functions: its filters and tests.

    A name that the template uses and nobody gives is an error, not an empty text.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("steerlm_nemo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(helpers or {})
    environment.tests.update(helpers or {})
    return environment.get_template(f"{template}.html").render(values)
