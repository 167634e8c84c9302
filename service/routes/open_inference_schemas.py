"""The schemas of the Open Inference Protocol's messages.

Answers are pydantic models; FastAPI renders some of them. Requests are plain JSON Schema:
`service/routes/tensors.py` reads them, faster than a model and with more exact errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from service.model.artefact import INPUT, OUTPUT
from service.routes.tensors import MAX_BATCH_SIZE


class ServerMetadata(BaseModel):
    """The server and its extensions."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process answers."""

    live: Literal[True] = True


class ServerReady(BaseModel):
    """The model can take requests."""

    ready: Literal[True] = True


class ModelReady(BaseModel):
    """The model of this name can take requests."""

    name: str
    ready: Literal[True] = True


class TensorMetadata(BaseModel):
    """A tensor of the model; the batch dimension is -1."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    properties: Annotated[
        dict[str, str],
        Field(
            description="`provider`: the execution provider that runs it; `revision`: the first"
            " digits of the model file's SHA-256."
        ),
    ]


class TensorConfig(BaseModel):
    """A tensor in Triton's terms: its shape without the batch dimension."""

    name: str
    data_type: str
    format: str | None = None
    dims: list[int]


class ModelConfig(BaseModel):
    """The model's configuration in Triton's terms."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[TensorConfig]
    output: list[TensorConfig]


class Duration(BaseModel):
    """A count of events, and their total time."""

    count: int = 0
    ns: int = 0


class InferenceStatistics(BaseModel):
    """The time of all requests, by stage."""

    success: Annotated[Duration, Field(description="Answered requests, from arrival to answer.")]
    fail: Annotated[Duration, Field(description="Refused or failed requests.")]
    queue: Annotated[Duration, Field(description="Time waiting for the model.")]
    compute_input: Annotated[Duration, Field(description="From complete body to pixels.")]
    compute_infer: Annotated[
        Duration, Field(description="The model's runs; a run counts once for each of its requests.")
    ]
    compute_output: Annotated[Duration, Field(description="From probabilities to answer.")]
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class BatchStatistics(BaseModel):
    """The runs of batches of one size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(BaseModel):
    """The model's work since the start, for `POST /predict` and for this protocol."""

    name: str
    version: str
    last_inference: Annotated[int, Field(description="Milliseconds since 1970.")]
    inference_count: Annotated[int, Field(description="Images classified.")]
    execution_count: Annotated[
        int, Field(description="Runs of the model; a run classifies a batch.")
    ]
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics] = []


class AllStatistics(BaseModel):
    """The statistics of all models; the service has one."""

    model_stats: list[ModelStatistics]


class IndexedModel(BaseModel):
    """A model in the repository."""

    name: str
    version: str
    state: Literal["READY"] = "READY"
    reason: str = ""


class InferenceOutput(BaseModel):
    """A tensor of the answer."""

    name: str
    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Annotated[
        list[float] | list[str] | None,
        Field(description="Row by row; absent if sent as binary data."),
    ] = None


class InferenceResponse(BaseModel):
    """The answer to an inference request."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferenceOutput]


def _object(title: str, required: list[str], **properties: Any) -> dict[str, Any]:
    return {"title": title, "type": "object", "required": required, "properties": properties}


def _parameters(title: str, **properties: Any) -> dict[str, Any]:
    description = "Other parameters are ignored."
    return {**_object(title, [], **properties), "description": description}


def _one(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 1}


PIXELS: dict[str, Any] = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": 255, "multipleOf": 1},
            {"type": "array", "items": {}, "description": "Nested like the shape."},
        ]
    },
    "description": "Whole numbers from 0 to 255 in both datatypes; 0 is the background. Nested or"
    " flat, row by row. Absent if sent as binary data.",
}
INPUT_SCHEMA = _object(
    "InferenceInput",
    ["name", "shape", "datatype"],
    name={"type": "string", "enum": [INPUT[0]]},
    shape={
        "type": "array",
        "items": {"type": "integer"},
        "prefixItems": [
            {"type": "integer", "minimum": 1, "maximum": MAX_BATCH_SIZE},
            *({"const": length} for length in INPUT[2]),
        ],
        "minItems": 4,
        "maxItems": 4,
    },
    datatype={"type": "string", "enum": ["UINT8", "FP32"]},
    data=PIXELS,
    parameters=_parameters(
        "InferenceInputParameters",
        binary_data_size={
            "type": "integer",
            "minimum": 0,
            "description": "The tensor's bytes, which follow the JSON in place of `data`.",
        },
    ),
)
OUTPUT_SCHEMA = _object(
    "InferenceRequestedOutput",
    ["name"],
    name={"type": "string", "enum": [OUTPUT[0]]},
    parameters=_parameters(
        "InferenceRequestedOutputParameters",
        binary_data={"type": "boolean"},
        classification={
            "type": "integer",
            "minimum": 0,
            "description": "Answer the k most probable classes as `value:index:label`.",
        },
    ),
)
REQUEST_SCHEMA = _object(
    "InferenceRequest",
    ["inputs"],
    id={"type": "string"},
    parameters=_parameters("InferenceRequestParameters", binary_data_output={"type": "boolean"}),
    inputs=_one(INPUT_SCHEMA),
    outputs=_one(OUTPUT_SCHEMA),
)
EXAMPLE_IMAGE = [[[[(row * column) % 256 for column in range(28)] for row in range(28)]]]
EXAMPLE = {
    "id": "42",
    "inputs": [
        {"name": INPUT[0], "shape": [1, *INPUT[2]], "datatype": "UINT8", "data": EXAMPLE_IMAGE}
    ],
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
JSON_LENGTH: dict[str, Any] = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**9 - 1},
    "description": "The length of the JSON at the start of the body, in bytes; binary tensors"
    " follow. 0: the body is one image of 784 bytes without JSON.",
}
INFER_REQUEST = {
    "parameters": [JSON_LENGTH],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": REQUEST_SCHEMA, "example": EXAMPLE},
            "application/octet-stream": BINARY,
        },
    },
}
INDEX_REQUEST = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": _object("IndexRequest", [], ready={"type": ["boolean", "null"]})
            }
        }
    }
}


def infer_answer(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of an answer to an inference request.

    Args:
        example: the model's answer to `EXAMPLE`.
    """
    length = {k: JSON_LENGTH[k] for k in ("schema", "description")}
    return {
        200: {
            "content": {
                "application/json": {"example": example},
                "application/octet-stream": BINARY,
            },
            "headers": {
                JSON_LENGTH["name"]: {**length, "description": "Only with binary tensors."}
            },
        }
    }
