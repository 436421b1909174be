"""The steering page at `/`: chat with a slider per attribute of the served schema, as one file without outside parts.

Style sheet and program are put into the page here, so that one response carries all, and their hashes are the only
ones that its Content-Security-Policy lets run. Nothing of the page needs the token: what it asks the API for does.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


async def page(request: Request) -> Response:
    """GET /."""
    content, policy = _page()
    return Response(
        content,
        media_type="text/html",
        headers={
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


@functools.cache
def _page() -> tuple[str, str]:
    """The whole page, and the policy for it."""
    folder = files("steerlm_nemo.serving") / "static"
    names = ("page.html", "page.css", "requests.js", "page.js")
    content, style, requests, own = ((folder / name).read_text("utf-8") for name in names)
    script = f"{requests}\n{own}"
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return content.replace("/*page.css*/", style).replace("/*script*/", script), policy


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
