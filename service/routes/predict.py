"""`POST /predict`: the route, its parameters, and its documentation."""

from time import perf_counter
from typing import Any, cast, get_args

import numpy as np
from fastapi import APIRouter, Request, Response

from service.errors import InvalidInput
from service.http.exchange import Answer, Exchange, Handler
from service.model.classifier import Classifier
from service.model.inference import Models
from service.pictures.conversion import ModelInput, Preprocessing
from service.pictures.thread import PictureThread
from service.routes.bodies import SIDE, SIZE, read_body
from service.routes.prediction import Prediction, Renderer
from service.telemetry.metrics import Metrics
from service.telemetry.tallies import Stages

PATH = "/predict"
PREPROCESSING = frozenset(get_args(Preprocessing))
RING = [
    [255 * (36 <= (2 * row - 27) ** 2 + (2 * column - 27) ** 2 <= 400) for column in range(SIDE)]
    for row in range(SIDE)
]  # the example image in the documentation: a ring


def predict_handler(models: Models, metrics: Metrics, pictures: PictureThread) -> Handler:
    """Return the handler of `POST /predict`, which the gate and FastAPI both call."""
    observe_decode, answered = metrics.decode.observe, metrics.answered
    ways = {name: (served.infer, Renderer(served.model)) for name, served in models.items()}

    async def predict(exchange: Exchange) -> Answer:
        top_k, preprocessing, echo = _parameters(exchange)
        body = await exchange.body()
        begin = perf_counter()
        image = read_body(exchange.headers.get(b"content-type", b""), body)
        del body  # free the form while its picture waits for the thread
        if isinstance(image, bytes):
            image = await pictures.read(image, preprocessing)
        stages = Stages()
        stages.decode = perf_counter() - begin
        observe_decode(stages.decode)
        infer, render = ways[image.preprocessing]
        probabilities = await infer(image.images, stages)
        begin = perf_counter()
        answer = Answer(render(probabilities, image, top_k, echo))
        stages.encode = perf_counter() - begin
        answered(stages)
        return answer

    return predict


def example(classifier: Classifier) -> dict[str, Any]:
    """Return the model's answer to the example image."""
    image = ModelInput(np.array(RING, np.uint8), "none")
    probabilities = classifier.probabilities(image.images)
    answer = Prediction.of(classifier.info, probabilities, image, top_k=3)
    return answer.model_dump(exclude_none=True)


def predict_router(handler: Handler, example: dict[str, Any]) -> APIRouter:
    """Return the documented route.

    Args:
        handler: as made by `predict_handler`.
        example: the answer to the example image.
    """
    router = APIRouter(tags=["prediction"])

    @router.post(
        PATH,
        response_model=Prediction,
        summary="Classify one image",
        openapi_extra={"parameters": PARAMETERS, "requestBody": REQUEST_BODY},
        responses={200: {"content": {"application/json": {"example": example}}}},
    )
    async def predict(request: Request) -> Response:
        """Classify one garment, sent as pixels or as a picture."""
        answer = await handler(request.scope["exchange"])
        return Response(answer.body, answer.status, media_type="application/json")

    return router


def _parameters(exchange: Exchange) -> tuple[int, Preprocessing, bool]:
    if not exchange.query_string:
        return 10, "auto", False
    query = exchange.query()
    top_k = query.get("top_k", "10")
    if not (top_k.isascii() and top_k.isdigit() and len(top_k) <= 2 and 1 <= int(top_k) <= 10):
        raise InvalidInput("The parameter top_k must be a whole number from 1 to 10.")
    preprocessing = query.get("preprocessing", "auto")
    if preprocessing not in PREPROCESSING:
        raise InvalidInput("The parameter preprocessing must be auto, none or dataset.")
    echo = query.get("echo")
    if echo not in (None, "pixels"):
        raise InvalidInput("The parameter echo must be pixels; or leave it out.")
    return int(top_k), cast(Preprocessing, preprocessing), echo is not None


PARAMETERS = [
    {
        "name": "top_k",
        "in": "query",
        "description": "How many classes to list.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 10, "default": 10},
    },
    {
        "name": "preprocessing",
        "in": "query",
        "description": "For pictures. `none` takes only 28x28 8-bit grayscale; `dataset` converts"
        " every picture as the data set was made; `auto` takes a 28x28 picture without colours as"
        " it is, and converts all others.",
        "schema": {"type": "string", "enum": sorted(PREPROCESSING), "default": "auto"},
    },
    {
        "name": "echo",
        "in": "query",
        "description": "`pixels` adds the pixels that the model saw to the answer.",
        "schema": {"type": "string", "enum": ["pixels"]},
    },
]
PIXEL: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 255}


def _exactly(length: int, items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


PICTURE = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "title": "PredictionRequest",
                "type": "object",
                "required": ["pixels"],
                "properties": {
                    "pixels": {
                        "description": "0 is the background, as in the data set.",
                        "anyOf": [_exactly(SIDE, _exactly(SIDE, PIXEL)), _exactly(SIZE, PIXEL)],
                    }
                },
            },
            "example": {"pixels": RING},
        },
        "application/octet-stream": {
            "schema": {
                "type": "string",
                "format": "binary",
                "minLength": SIZE,
                "maxLength": SIZE,
                "description": "784 bytes, row by row.",
            }
        },
        "image/png": PICTURE,
        "image/jpeg": PICTURE,
        "image/webp": PICTURE,
        "multipart/form-data": {
            "schema": {
                "title": "PredictionForm",
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}
