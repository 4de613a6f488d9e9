"""The page at /: a chat for people, of one HTML, one CSS and one JavaScript file beside this one, and an icon.

Anyone may read these files, which hold nothing of the server's; what the page then asks for needs the key. The policy
lets the browser take nothing from elsewhere, run nothing but page.js, and turn no text into markup.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a new release's page is seen at once
}


def routes() -> list[Route]:
    """A route for each of FILES, which are read now.

    Raises:
        OSError: the installation is not complete.
    """
    return [_route(path, *file) for path, file in FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    data = (Path(__file__).parent / name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(data, headers={**HEADERS, "content-type": kind})

    return Route(path, page, methods=["GET"])
