"""The routes of the Open Inference Protocol, version 2, over HTTP.

The specification is at github.com/kserve/open-inference-protocol. The server's metadata lists the
extensions; they are Triton's (docs/protocol in github.com/triton-inference-server/server).
"""

import re
import zlib
from collections.abc import Sequence
from time import perf_counter
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Path, Request, Response

from service import __version__
from service.errors import BadRequest, NotFound, NotReady
from service.http.admission import Admission
from service.http.exchange import Answer, Exchange, Handler
from service.model.artefact import IMAGE_SIZE, INPUT, OUTPUT, ModelInfo
from service.model.classifier import Classifier
from service.model.inference import Models
from service.routes.open_inference_schemas import (
    EXAMPLE,
    INDEX_REQUEST,
    INFER_REQUEST,
    AllStatistics,
    IndexedModel,
    InferenceResponse,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorConfig,
    TensorMetadata,
    infer_answer,
)
from service.routes.tensors import MAX_BATCH_SIZE, MAX_JSON_BYTES, decode, encode
from service.telemetry.metrics import Collect, Metrics
from service.telemetry.metrics import statistics as statistics_of
from service.telemetry.tallies import Stages

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics"]
PLATFORM = "onnxruntime_onnx"  # Triton's name for ONNX files
INDEX_PATH = "/v2/repository/index"
MAX_INDEX_BYTES = 2**10  # of a request for the index; its only field is a boolean
MAX_BODY_BYTES = MAX_JSON_BYTES + 4 * IMAGE_SIZE * MAX_BATCH_SIZE  # JSON, then a batch of floats
MIN_COMPRESSED_BYTES = 500  # a smaller answer fits into one packet anyway
HAS_ZERO_WEIGHT = re.compile(rb"q=0(\.0*)?").fullmatch
BINARY_TYPE = (b"content-type", b"application/octet-stream")


def infer_handler(models: Models, metrics: Metrics) -> Handler:
    """Return the handler of the infer routes, which the gate and FastAPI both call."""
    observe_decode, answered = metrics.decode.observe, metrics.answered

    async def handle(exchange: Exchange) -> Answer:
        headers = exchange.headers
        body = await exchange.body()
        begin = perf_counter()
        request = decode(body, headers.get(b"inference-header-content-length"))
        stages = Stages()
        stages.decode = perf_counter() - begin
        observe_decode(stages.decode)
        model, infer = models[request.preprocessing]
        probabilities = await infer(request.pixels, stages)
        begin = perf_counter()
        body, json_length = encode(model, request, probabilities)
        answer = Answer(body)
        if json_length is not None:
            length = (b"inference-header-content-length", b"%d" % json_length)
            answer = Answer(body, headers=[BINARY_TYPE, length])
        if len(body) >= MIN_COMPRESSED_BYTES and b"accept-encoding" in headers:
            answer = _compress(answer, headers[b"accept-encoding"])
        stages.encode = perf_counter() - begin
        answered(stages)
        return answer

    return handle


def index_handler(model: ModelInfo) -> Handler:
    """Return the handler of the repository index, which also reads a body."""
    index = orjson.dumps([IndexedModel(name=model.name, version=model.version).model_dump()])

    async def handle(exchange: Exchange) -> Answer:
        body = (await exchange.body() if exchange.announces_body() else b"") or b"{}"
        try:
            ready = orjson.loads(body).get("ready")
        except (ValueError, AttributeError):
            raise _bad_index() from None
        if ready is not None and type(ready) is not bool:
            raise _bad_index()
        return Answer(index)  # the only model is ready, so `ready` changes nothing

    return handle


def _bad_index() -> BadRequest:
    return BadRequest('Send no body, or the JSON object {"ready": true}.', code="invalid_input")


def _compress(answer: Answer, accepted: bytes) -> Answer:
    """Compress the answer with the best method in `Accept-Encoding`, if there is one.

    Only inference answers are compressed: Triton's client decompresses no others.
    """
    offers = dict(map(_offer, accepted.lower().split(b",")))
    for name, window in ((b"gzip", 31), (b"deflate", 15)):
        if name in offers and not HAS_ZERO_WEIGHT(offers[name]):
            body = zlib.compress(answer.body, 1, window)
            return Answer(body, 200, [*answer.headers, (b"content-encoding", name)])
    return answer


def _offer(text: bytes) -> tuple[bytes, bytes]:
    name, _, weight = text.partition(b";")
    return name.strip(), weight.strip()


def _response(answer: Answer) -> Response:
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, answer.status, headers)


def _metadata(name: str, kind: str, shape: list[int]) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=kind, shape=[-1, *shape])


def _config(name: str, kind: str, dims: list[int], form: str | None = None) -> TensorConfig:
    return TensorConfig(name=name, data_type=f"TYPE_{kind}", format=form, dims=dims)


def _example(classifier: Classifier) -> dict[str, Any]:
    """Return the model's answer to the example request."""
    request = decode(orjson.dumps(EXAMPLE))
    body, _ = encode(classifier.info, request, classifier.probabilities(request.pixels))
    answer: dict[str, Any] = orjson.loads(body)
    return answer


def infer_paths(model: ModelInfo) -> list[str]:
    """Return the two paths of the infer route."""
    path = f"/v2/models/{model.name}"
    return [f"{path}/infer", f"{path}/versions/{model.version}/infer"]


def open_inference_router(
    classifier: Classifier,
    handle_infer: Handler,
    handle_index: Handler,
    collect: Collect,
    admission: Admission,
    other_paths: Sequence[str],
) -> APIRouter:
    """Return the documented routes.

    Args:
        classifier: the loaded model.
        handle_infer: as made by `infer_handler`.
        handle_index: as made by `index_handler`.
        collect: returns the totals of all workers.
        admission: knows whether the server drains.
        other_paths: other routes that run the model; the statistics count them too.
    """
    model = classifier.info

    def check_model(
        model_name: Annotated[str, Path(description=f"`{model.name}`", examples=[model.name])],
    ) -> None:
        if model_name != model.name:
            raise NotFound(  # NVIDIA's clients search for "unknown model"
                f"Request for unknown model: the server has only `{model.name}`.",
                code="unknown_model",
            )

    def check_version(
        model_version: Annotated[
            str, Path(description=f"`{model.version}`", examples=[model.version])
        ],
    ) -> None:
        if model_version != model.version:
            raise NotFound(
                f"Request for unknown model version: `{model.name}` has only {model.version}.",
                code="unknown_version",
            )

    def check_ready() -> None:
        if admission.draining:
            raise NotReady("The server is stopping; send requests to another instance.")

    router = APIRouter(tags=["Open Inference Protocol"])

    @router.get("/v2", summary="Server metadata")
    @router.get("/v2/", include_in_schema=False)  # the specification's OpenAPI file has this path
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(name="bn-lenet-service", version=__version__, extensions=EXTENSIONS)

    @router.get("/v2/health/live", summary="Is the process alive?")
    async def server_live() -> ServerLive:
        return ServerLive()

    @router.get(
        "/v2/health/ready",
        summary="Can the server take requests?",
        dependencies=[Depends(check_ready)],
    )
    async def server_ready() -> ServerReady:
        return ServerReady()

    @router.post(INDEX_PATH, summary="List the models", openapi_extra=INDEX_REQUEST)
    async def repository_index(request: Request) -> list[IndexedModel]:
        return _response(await handle_index(request.scope["exchange"]))  # type: ignore[return-value] # the answer is rendered already; the type is for the document

    @router.get("/v2/models/stats", summary="Statistics of all models")
    async def statistics() -> AllStatistics:
        counted = statistics_of(await collect(), [*other_paths, *infer_paths(model)])
        named = {"name": model.name, "version": model.version, **counted}
        return AllStatistics.model_validate({"model_stats": [named]})

    def models_router(prefix: str, *checks: Any) -> APIRouter:
        # The prefix belongs to this router: a prefix added by `include_router` is missing from the
        # route's template, which logs and metrics use.
        models = APIRouter(prefix=prefix, dependencies=checks)
        models.get("/stats", summary="Model statistics", name="model_statistics")(statistics)

        @models.get("", summary="Model metadata")
        async def model_metadata() -> ModelMetadata:
            return ModelMetadata(
                name=model.name,
                versions=[model.version],
                platform=PLATFORM,
                inputs=[_metadata(*INPUT)],
                outputs=[_metadata(*OUTPUT)],
                properties={"provider": model.provider, "revision": model.revision},
            )

        @models.get("/ready", summary="Is the model ready?", dependencies=[Depends(check_ready)])
        async def model_ready() -> ModelReady:
            return ModelReady(name=model.name)

        @models.get("/config", summary="Model configuration", response_model_exclude_none=True)
        async def model_config() -> ModelConfig:
            return ModelConfig(
                name=model.name,
                platform=PLATFORM,
                backend="onnxruntime",
                max_batch_size=MAX_BATCH_SIZE,
                input=[_config(*INPUT, "FORMAT_NCHW")],
                output=[_config(*OUTPUT)],
            )

        @models.post(
            "/infer",
            response_model=InferenceResponse,
            summary="Classify images",
            openapi_extra=INFER_REQUEST,
            responses=infer_answer(_example(classifier)),
        )
        async def infer(request: Request) -> Response:
            """Classify up to 256 images.

            Tensors are JSON, or binary data after the JSON. With binary data, the header field
            `Inference-Header-Content-Length` is the length of the JSON. If it is 0, the body is one
            image of 784 bytes without JSON.
            """
            return _response(await handle_infer(request.scope["exchange"]))

        return models

    name, number = Depends(check_model), Depends(check_version)
    router.include_router(models_router("/v2/models/{model_name}", name))
    versioned = "/v2/models/{model_name}/versions/{model_version}"
    router.include_router(models_router(versioned, name, number))
    return router
