"""`POST /predict`: the body's four forms, the answer, and their schemas."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as FormField
from python_multipart.multipart import File, parse_options_header

from service.errors import (
    BadRequest,
    InvalidInput,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from service.http.exchange import Answer, Exchange
from service.http.gate import Handler
from service.model.artefact import ModelInfo
from service.model.classifier import Classifier
from service.model.inference import Inference
from service.pictures.conversion import ModelInput, Preprocessing, read_picture
from service.pictures.decoding import is_raw_28x28
from service.telemetry.metrics import Metrics

PATH = "/predict"
SIDE = 28
SIZE = SIDE * SIDE
MAX_JSON_BYTES = 2**18  # ten times what 784 numbers take however they are laid out
MAX_WAITING_BYTES = 64 * 2**20  # of pictures' files that wait for the decoder's thread
MAX_DELIMITERS = 100  # of a form, which needs two; its parser is slow where they come
PREPROCESSING = frozenset(get_args(Preprocessing))
RING = [
    [255 * (36 <= (2 * row - 27) ** 2 + (2 * column - 27) ** 2 <= 400) for column in range(SIDE)]
    for row in range(SIDE)
]  # the documentation's image: a ring, from a formula

Probability = Annotated[float, Field(ge=0, le=1)]
ClassId = Annotated[int, Field(ge=0, le=9, description="The data set's number of the class.")]


class ClassProbability(BaseModel):
    """One class and how probable it is."""

    class_id: ClassId
    label: str
    probability: Probability


class Model(BaseModel):
    """The model that answered."""

    name: str
    version: str
    revision: Annotated[str, Field(description="Begins the model file's SHA-256.")]


class Prediction(BaseModel):
    """What the image shows: the most probable class, and the `top_k` most probable."""

    class_id: ClassId
    label: str
    confidence: Probability
    predictions: Annotated[
        list[ClassProbability],
        Field(min_length=1, max_length=10, description="By falling probability."),
    ]
    preprocessing: Annotated[
        Literal["none", "dataset"],
        Field(description="Pixels taken as they came, or converted as the data set was made."),
    ]
    notes: Annotated[
        list[str] | None, Field(description="What the conversion had to guess or leave out.")
    ] = None
    pixels: Annotated[
        list[list[int]] | None, Field(description="What the model saw, with `echo=pixels`.")
    ] = None
    model: Model


class Renderer:
    """Writes answers, of which all but the numbers is known beforehand and kept as bytes.

    Args:
        model: what answers.
    """

    def __init__(self, model: ModelInfo) -> None:
        classes = [(i, orjson.dumps(name)) for i, name in enumerate(model.classes)]
        self._first = [b'{"class_id":%d,"label":%b,"confidence":' % c for c in classes]
        self._listed = [b'{"class_id":%d,"label":%b,"probability":' % c for c in classes]
        self._ids = range(len(classes))
        served_by = {"name": model.name, "version": model.version, "revision": model.revision}
        self._end = b'","model":%b' % orjson.dumps(served_by)

    def __call__(
        self, probabilities: NDArray[np.float32], image: ModelInput, top_k: int, echo: bool
    ) -> bytes:
        """Return the answer as JSON.

        Args:
            probabilities: float32 [1, 10].
            image: what the model saw.
            top_k: how many classes to list.
            echo: whether to return the pixels too.
        """
        # As Python floats: what a reader gets are the very float32 values, in any width.
        values: list[float] = probabilities[0].tolist()
        # Sorting is stable, so of equally probable classes the lower id comes first.
        order = sorted(self._ids, key=values.__getitem__, reverse=True)[:top_k]
        numbers = orjson.dumps(values)[1:-1].split(b",")
        listed = b"},".join([self._listed[i] + numbers[i] for i in order])
        first = order[0]
        preprocessing = image.preprocessing.encode()
        parts = (self._first[first], numbers[first], listed, preprocessing, self._end)
        answer = b'%b%b,"predictions":[%b}],"preprocessing":"%b%b' % parts
        if image.notes:
            answer += b',"notes":' + orjson.dumps(image.notes)
        if echo:
            answer += b',"pixels":' + orjson.dumps(image.pixels.reshape(SIDE, SIDE).tolist())
        return answer + b"}"


class Pictures:
    """Decodes pictures, those that take long in a thread of their own, one after the other.

    So they do not hold up the event loop, and small requests are answered meanwhile.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._waiting = 0

    async def decode(self, data: bytes, preprocessing: Preprocessing) -> ModelInput:
        """Decode a file; when the request ends before its turn comes, it is never decoded.

        Raises:
            ServiceError: as `service.pictures.conversion.read_picture` does.
            Overloaded: too many files wait already.
        """
        if preprocessing != "dataset" and is_raw_28x28(data):
            return read_picture(data, preprocessing)
        if self._waiting and self._waiting + len(data) > MAX_WAITING_BYTES:
            raise Overloaded(
                "Too many pictures are waiting; try again in a second.",
                headers={"Retry-After": "1"},
            )
        self._waiting += len(data)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, read_picture, data, preprocessing)
        finally:
            self._waiting -= len(data)


def predict_handler(model: ModelInfo, infer: Inference, metrics: Metrics) -> Handler:
    """Return the one implementation of `POST /predict`, for the gate and for the framework."""
    observe_decode, observe_encode = metrics.decode.observe, metrics.encode.observe
    render = Renderer(model)
    pictures = Pictures()

    async def predict(exchange: Exchange) -> Answer:
        top_k, preprocessing, echo = _parameters(exchange)
        body = await exchange.body()
        begin = perf_counter()
        image = _read(exchange.headers.get(b"content-type", b""), body)
        if isinstance(image, bytes):
            image = await pictures.decode(image, preprocessing)
        observe_decode(perf_counter() - begin)
        probabilities = await infer(image.pixels.reshape(1, 1, SIDE, SIDE))
        begin = perf_counter()
        answer = Answer(render(probabilities, image, top_k, echo))
        observe_encode(perf_counter() - begin)
        return answer

    return predict


def example(classifier: Classifier) -> dict[str, Any]:
    """Return the real answer to the documentation's image."""
    image = ModelInput(np.array(RING, np.uint8), "none")
    probabilities = classifier.probabilities(image.pixels.reshape(1, 1, SIDE, SIDE))
    answer: dict[str, Any] = orjson.loads(
        Renderer(classifier.info)(probabilities, image, top_k=3, echo=False)
    )
    return answer


def predict_router(handler: Handler, example: dict[str, Any]) -> APIRouter:
    """Return the documented route.

    Args:
        handler: as made by `predict_handler`.
        example: the answer to the documentation's image.
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
        """Take one image, as pixels or as a picture, and tell which garment it shows."""
        answer = await handler(request.scope["exchange"])
        return Response(answer.body, answer.status, media_type="application/json")

    return router


def _parameters(exchange: Exchange) -> tuple[int, Preprocessing, bool]:
    if not exchange.scope["query_string"]:
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
        raise InvalidInput("The parameter echo must be pixels, or be left out.")
    return int(top_k), cast(Preprocessing, preprocessing), echo is not None


def _read(content_type: bytes, body: bytes) -> ModelInput | bytes:
    """Turn a body into pixels or, if it has a picture, into that picture's file."""
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type == b"application/octet-stream":
        pixels = _from_bytes(body)
    elif media_type == b"application/json":
        pixels = _from_json(body)
    elif media_type.startswith(b"image/"):
        return body
    elif media_type == b"multipart/form-data":
        return _from_form(content_type, body)
    else:
        raise UnsupportedMediaType(
            "Say what the body is in Content-Type: application/json, application/octet-stream,"
            " image/png (or another picture format), or multipart/form-data."
        )
    return ModelInput(
        pixels, "none"
    )  # pixels are what the model takes; there is nothing to convert


def _from_bytes(body: bytes) -> NDArray[np.uint8]:
    if len(body) != SIZE:
        raise InvalidInput(f"Send exactly {SIZE} bytes, one a pixel; there are {len(body)}.")
    return np.frombuffer(body, np.uint8)


def _from_json(body: bytes) -> NDArray[np.uint8]:
    """Read 28 rows of 28 whole numbers, or 784 of them in a row.

    `bytes` checks in C that all are integers from 0 to 255; what it would let through besides
    (true and false, a bare count, other iterables) is looked for here.
    """
    if len(body) > MAX_JSON_BYTES:
        raise PayloadTooLarge(f"Send at most {MAX_JSON_BYTES:,} bytes of JSON.")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.", code="malformed_json") from None
    pixels = document.get("pixels") if isinstance(document, dict) else None
    try:
        if not isinstance(pixels, list):
            raise ValueError
        if len(pixels) == SIDE and set(map(type, pixels)) == {list}:
            if set(map(len, pixels)) != {SIDE}:
                raise ValueError
            flat = b"".join(map(bytes, pixels))
            # The letters first: finding one takes a fraction of looking at 784 types.
            booleans = (b"t" in body or b"f" in body) and any(bool in map(type, r) for r in pixels)
        else:
            flat = bytes(pixels)
            booleans = (b"t" in body or b"f" in body) and bool in map(type, pixels)
        if booleans or len(flat) != SIZE:
            raise ValueError
    except (TypeError, ValueError):
        raise InvalidInput(
            'Send {"pixels": …}: 28 rows of 28 whole numbers from 0 to 255, or 784 of them.'
        ) from None
    return np.frombuffer(flat, np.uint8)


def _from_form(content_type: bytes, body: bytes) -> bytes:
    parts: list[File] = []
    too_much = InvalidInput("Send one file in the form, in the field `image`, and nothing else.")

    def keep(part: File | FormField) -> None:
        if parts or not isinstance(part, File) or part.field_name != b"image":
            raise too_much
        parts.append(part)

    _, options = parse_options_header(content_type)
    if body.count(b"\r\n--" + options.get(b"boundary", b"")) > MAX_DELIMITERS:
        raise too_much

    headers = {"Content-Type": content_type}
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = create_form_parser(headers, keep, keep, config=in_memory)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError):
        raise BadRequest(
            "The form is damaged, or its boundary is not in Content-Type.", code="malformed_form"
        ) from None
    if not parts:
        raise InvalidInput("Send one file in the form, in the field `image`.")
    file = parts[0].file_object
    file.seek(0)
    return file.read()


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
        "description": "For pictures: `dataset` converts them as the data set was made, `none`"
        " takes only 28x28 8-bit grayscale, `auto` takes 28x28 without colours as it is and"
        " converts the rest.",
        "schema": {"type": "string", "enum": sorted(PREPROCESSING), "default": "auto"},
    },
    {
        "name": "echo",
        "in": "query",
        "description": "`pixels` also returns what the model saw.",
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
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
        },
    },
}
