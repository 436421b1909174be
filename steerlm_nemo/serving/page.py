"""The steering page at `/`: chat with a slider per attribute of the served schema, without outside parts.

It is the files of `static/`, as they lie there. Its Content-Security-Policy lets in nothing but them and the API beside
them. The page itself has no line of style or program, so that a proxy may add `default-src 'self'` and take nothing
away. Nothing of the page needs the token: what it asks the API for does.
"""

from __future__ import annotations

import functools
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PARTS = "/page/"  # what the page consists of, one path per file

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page(request: Request) -> Response:
    """GET /."""
    return _file("page.html")


async def part(request: Request) -> Response:
    """GET /page/NAME."""
    return _file(request.path_params["name"])


ROUTES = (Route("/", page), Route(PARTS + "{name}", part))


def _file(name: str) -> Response:
    content = _static().get(name)
    if content is None:
        raise HTTPException(404, f"the page has no file {name[:100]!r}")
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)


@functools.cache
def _static() -> dict[str, bytes]:
    """The files of the page by their names, and nothing that an editor or a file manager left beside them."""
    folder = files("steerlm_nemo.serving") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}
