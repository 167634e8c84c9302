"""The pages: the one at `/`, bound to this server by a strict policy, and the one at `/docs`."""

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

from service.errors import NotFound

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PLACE = b'<div id="swagger-ui">'  # is filled by Swagger UI, if it comes
WITHOUT_INTERNET = b"""
    <p>The documentation is shown by Swagger UI, which your browser takes from cdn.jsdelivr.net.
    Without internet, read <a href="openapi.json">openapi.json</a>: it describes the same.</p>"""


def page_router() -> APIRouter:
    """Return the routes; reads the folder `web`.

    Browsers keep the files but ask each time whether they still hold, so that page, script and
    service are always of one version.
    """
    folder = Path(__file__).parent / "web"
    files = [file for file in folder.iterdir() if file.suffix in MEDIA_TYPES]
    answers = {file.name: (file.read_bytes(), _headers(file)) for file in files}
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def page(request: Request, name: str = "index.html") -> Response:
        if name not in answers:
            raise NotFound("The page has no such file.")
        body, headers = answers[name]
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(None, 304, headers)
        return Response(body, 200, headers)

    documentation = bytes(
        get_swagger_ui_html(
            openapi_url="./openapi.json", title="BN-LeNet", swagger_favicon_url="static/icon.svg"
        ).body
    ).replace(PLACE, PLACE + WITHOUT_INTERNET)

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs() -> Response:
        return Response(documentation, media_type="text/html")

    return router


def _headers(file: Path) -> dict[str, str]:
    return {
        "Content-Type": MEDIA_TYPES[file.suffix],
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"',
    }
