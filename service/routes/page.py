"""The pages at `/`, `/inside` and `/docs`. A strict policy lets them load from this server only.

`/inside` runs the unfolded network in the browser, with the committed run's weights.
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
NO_RUN = "There is nothing to show: this page needs the committed model and the folder models/run."


def page_router(model: ModelInfo) -> APIRouter:
    """Return the routes. This reads the folder `web`, and the weights of the served model's run.

    Browsers cache the files, but ask each time whether they are current. So page, scripts and
    service always have the same version.

    Args:
        model: the served model.
    """
    files = {file.name: file.read_bytes() for file in WEB.iterdir() if file.suffix in MEDIA_TYPES}
    run = _run(model)
    if run is not None:
        files[RUN] = run
    answers = {name: (body, _headers(name, body)) for name, body in files.items()}
    router = APIRouter(include_in_schema=False)

    def answer(request: Request, name: str) -> Response:
        if name not in answers:
            raise NotFound(NO_RUN if name == RUN else "The page has no file of this name.")
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
    """Return the committed run's weights as safetensors, if the served model is its export.

    The file's metadata name what else the export used: which statistics, and the temperature.
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
    text += b" " * (-len(text) % 8)  # the format aligns the weights to 8 bytes
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
