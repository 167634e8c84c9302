"""Builds the application: FastAPI with all routes and errors, behind the gate."""

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service import __version__
from service.errors import (
    INTERNAL_ERROR,
    BadRequest,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    ServiceError,
)
from service.http.admission import Admission
from service.http.channel import Channel
from service.http.exchange import error_answer
from service.http.gate import Gate, HotPath
from service.model.classifier import CPU, Classifier
from service.model.inference import Inference, Models, Served, ThreadedInference
from service.pictures.decoding import configure_pillow
from service.pictures.thread import PictureThread
from service.routes import open_inference, operations, page, predict
from service.routes.bodies import body_limit
from service.routes.document import DocumentedAPI, documented
from service.settings import Settings
from service.telemetry.metrics import Metrics

OPEN_PATHS = frozenset(
    {"/", "/inside", "/docs", "/static/*", "/openapi.json"}
    | {"/livez", "/readyz", "/metrics", "/v2/health/*"}
)


def create_app(
    settings: Settings,
    classifier: Classifier,
    of_pictures: Classifier | None = None,
    channel: Channel | None = None,
) -> Gate:
    """Build the application; all routes and hot paths are registered here.

    Args:
        settings: limits, API key, origins.
        classifier: the loaded model.
        of_pictures: the loaded model for converted pictures; None means the same.
        channel: connects a worker to its supervisor; None in a single process.

    Returns:
        the gate; its attribute `application` is FastAPI.
    """
    configure_pillow()
    model = classifier.info
    metrics = Metrics(model)
    collect = metrics.collect
    if channel is not None:
        channel.report(metrics.totals)
        collect = channel.totals
    framework = DocumentedAPI(
        OPEN_PATHS,
        key_needed=settings.api_key is not None,
        title="BN-LeNet",
        version=__version__,
        description="Classifies pictures of garments with LeNet, whose batch norms are folded into"
        " its weights.",
        docs_url=None,  # page.py serves /docs
        redoc_url=None,
        redirect_slashes=False,
    )
    framework.state.count_refusal = metrics.count_refusal
    admission = Admission(
        settings.max_in_flight,
        settings.request_timeout_seconds,
        settings.max_body_bytes,
        metrics.in_flight,
    )

    def served(loaded: Classifier) -> Served:
        kind = Inference if loaded.info.provider == CPU else ThreadedInference
        return Served(loaded.info, kind(loaded, metrics.inference, admission))

    of_pixels = served(classifier)
    other = of_pictures or classifier
    models: Models = {
        "none": of_pixels,
        "dataset": of_pixels if other is classifier else served(other),
    }
    pictures = PictureThread(
        max_pictures=max(1, settings.max_in_flight // 2),
        max_wait=settings.request_timeout_seconds / 2,
    )
    handle_predict = predict.predict_handler(models, metrics, pictures)
    handle_infer = open_inference.infer_handler(models, metrics)
    handle_index = open_inference.index_handler(model)
    infer_paths = open_inference.infer_paths(model)
    hot_paths = {
        ("POST", predict.PATH): HotPath(handle_predict, body_limit),
        **{
            ("POST", path): HotPath(handle_infer, lambda _: open_inference.MAX_BODY_BYTES)
            for path in infer_paths
        },
        ("POST", open_inference.INDEX_PATH): HotPath(
            handle_index, lambda _: open_inference.MAX_INDEX_BYTES
        ),
    }
    framework.include_router(
        predict.predict_router(handle_predict, predict.example(classifier)),
        responses=documented(400, 401, 408, 411, 413, 415, 422, 500, 503, 504),
    )
    framework.include_router(
        open_inference.open_inference_router(
            classifier, handle_infer, handle_index, collect, admission, [predict.PATH]
        ),
        responses=documented(400, 401, 404, 408, 411, 413, 415, 500, 503, 504),
    )
    framework.include_router(
        operations.operations_router(models, metrics, collect, admission),
        responses=documented(500, 503),
    )
    framework.include_router(page.page_router(model))
    for kind in (ServiceError, HTTPException, RequestValidationError, Exception):
        framework.add_exception_handler(kind, _answer_error)
    return Gate(framework, hot_paths, admission, OPEN_PATHS, settings, metrics)


async def _answer_error(request: Request, exc: Exception) -> Response:
    """Answer FastAPI's own errors, and those raised in its routes, in the shape of all errors."""
    match exc:
        case ServiceError():
            error = exc
        case RequestValidationError():
            problem = exc.errors()[0]
            error = InvalidInput(f"The parameter {problem['loc'][-1]}: {problem['msg']}.")
        case HTTPException(status_code=404):
            error = NotFound("This path does not exist; see /docs for those that do.")
        case HTTPException(status_code=405, headers=headers):
            allowed = set((headers or {})["Allow"].split(", "))
            allowed |= {"HEAD"} if "GET" in allowed else set()  # service/http/framework.py adds it
            error = MethodNotAllowed(
                "This path does not take this method; see the Allow header.",
                headers={"Allow": ", ".join(sorted(allowed))},
            )
        case HTTPException():
            error = BadRequest("The request cannot be read; see /docs for the format.")
        case _:  # FastAPI raises it again, and the gate answers, logs and counts it
            error = ServiceError(INTERNAL_ERROR)
    if error.status != ServiceError.status:
        request.app.state.count_refusal(error.code)
    exchange = request.scope["exchange"]
    exchange.error_code = error.code
    answer = error_answer(error, exchange.request_id)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, answer.status, headers)
