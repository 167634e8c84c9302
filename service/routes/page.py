"""The pages at `/`, `/inside` and `/docs`, bound to this server by a strict policy.

`/inside` runs the network in the browser, unfolded, with the weights of the committed run.
"""

import hashlib
import json
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.errors import NotFound
from service.model.artefact import ModelInfo

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".safetensors": "application/octet-stream",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
WEB = Path(__file__).parent / "web"
MODELS = Path(__file__).parents[2] / "models"
COMMITTED = MODELS / "bn_lenet.onnx"
CHECKPOINT = MODELS / "run" / "checkpoint.safetensors"
RUN = "run.safetensors"
NO_RUN = "The model that is served is not the export of the run kept here; nothing to look into."


def page_router(model: ModelInfo) -> APIRouter:
    """Return the routes; reads the folder `web`, and the run that the served model comes from.

    Browsers keep the files but ask each time whether they still hold, so that page, script and
    service are always of one version.

    Args:
        model: what is served.
    """
    files = {file.name: file.read_bytes() for file in WEB.iterdir() if file.suffix in MEDIA_TYPES}
    run = _run(model)
    if run is not None:
        files[RUN] = run
    answers = {name: (body, _headers(name, body)) for name, body in files.items()}
    router = APIRouter(include_in_schema=False)

    def answer(request: Request, name: str) -> Response:
        if name not in answers:
            raise NotFound(NO_RUN if name == RUN else "The page has no such file.")
        body, headers = answers[name]
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(None, 304, headers)
        return Response(body, 200, headers)

    @router.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        return answer(request, name)

    @router.get("/")
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @router.get("/inside")
    async def inside(request: Request) -> Response:
        return answer(request, "inside.html")

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return answer(request, "docs.html")

    return router


def _run(model: ModelInfo) -> bytes | None:
    """Return the committed run's weights in safetensors' format, if its export is what is served.

    The metadata that the format has room for tell what the export used beside the weights: which
    statistics, and the temperature.
    """
    try:
        revision = hashlib.sha256(COMMITTED.read_bytes()).hexdigest()
        checkpoint = CHECKPOINT.read_bytes()
    except OSError:  # an installation without the repository's files
        return None
    if not revision.startswith(model.revision):
        return None
    length = int.from_bytes(checkpoint[:8], "little")
    header = json.loads(checkpoint[8 : 8 + length])
    statistics = model.metadata["statistics"]
    if statistics != "moving" and f"{statistics}.norm1.mean" not in header:
        return None
    header["__metadata__"] = {
        "revision": model.revision,
        "statistics": statistics,
        "temperature": model.metadata["temperature"],
        "classes": json.dumps(model.classes),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns what follows
    return len(text).to_bytes(8, "little") + text + checkpoint[8 + length :]


def _headers(name: str, body: bytes) -> dict[str, str]:
    return {
        "Content-Type": MEDIA_TYPES[Path(name).suffix],
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"',
    }
