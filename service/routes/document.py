"""The OpenAPI document: what FastAPI writes of the routes, and what it cannot know of them."""

from collections.abc import Collection
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field

Json = dict[str, Any]

ERRORS: dict[int, dict[str, str]] = {
    400: {
        "bad_request": "The query cannot be read.",
        "invalid_http": "The request is not valid HTTP.",
        "cors": "This origin may not call; see BNLENET_CORS_ORIGINS.",
        "malformed_json": "The body is not valid JSON.",
        "malformed_form": "The form is damaged, or its boundary is not in Content-Type.",
        "bad_content_encoding": "The body is not the gzip that Content-Encoding says.",
        "invalid_input": "The shape must be [n, 1, 28, 28], n from 1 to 256.",
    },
    401: {"unauthorized": "Send the API key as `Authorization: Bearer KEY`."},
    404: {
        "not_found": "There is nothing at this path; see /docs for what there is.",
        "unknown_model": "Request for unknown model: the server has only `bn-lenet`.",
        "unknown_version": "Request for unknown model version: `bn-lenet` has only 1.",
    },
    405: {"method_not_allowed": "This path is for other methods; see the Allow header."},
    408: {"request_timeout": "The request came too slowly; send all of it at once."},
    411: {"length_required": "Send a body, with its Content-Length."},
    413: {"payload_too_large": "The body has more than 10,485,760 bytes."},
    415: {
        "unsupported_media_type": "Say what the body is in Content-Type.",
        "unsupported_content_encoding": "Content-Encoding must be gzip, deflate or identity.",
    },
    422: {"invalid_input": "Send exactly 784 bytes, one a pixel; there are 3."},
    431: {"headers_too_large": "The header fields are too large."},
    500: {"internal_error": "The server failed; if it goes on, report the request id."},
    501: {"unsupported_transfer_coding": "The only transfer coding taken is chunked."},
    503: {
        "overloaded": "The server is at its limit; try again in a second.",
        "not_ready": "The server is about to stop; send requests elsewhere.",
    },
    504: {"deadline_exceeded": "The answer was not ready in time; try again later."},
    505: {"unsupported_http_version": "The server speaks HTTP/1.1."},
}
"""Status: code: an example of the sentence that comes with it."""

CODES = sorted({code for codes in ERRORS.values() for code in codes})
BEARER = {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
VALIDATION = ("HTTPValidationError", "ValidationError")  # FastAPI's own, which no route answers


class Error(BaseModel):
    """The one shape of every error."""

    error: Annotated[str, Field(description="A sentence that says what is wrong or what to do.")]
    code: Annotated[str, Field(json_schema_extra={"enum": CODES})]
    request_id: Annotated[str, Field(description="That of the answer's header X-Request-ID.")]


def documented(*statuses: int) -> dict[int | str, Json]:
    """Return OpenAPI's description of these error answers."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Error"},
                    "examples": {
                        code: {"value": {"error": sentence, "code": code, "request_id": "7f3a-1"}}
                        for code, sentence in ERRORS[status].items()
                    },
                }
            },
        }
        for status in statuses
    }


def operation_id(route: APIRoute) -> str:
    """Return a route's id: the name of its function, which clients made from the document get."""
    versioned = "{model_version}" in route.path
    return f"{route.name}_of_version" if versioned else route.name


class DocumentedAPI(FastAPI):
    """FastAPI whose document has the key, named requests, and no answer that never comes.

    Args:
        open_paths: those that need no key; one that ends in `*` stands for all it begins.
        key_needed: whether the service has a key; without one, requests with any key are served.
        options: FastAPI's own.
    """

    def __init__(self, open_paths: Collection[str], *, key_needed: bool, **options: Any) -> None:
        super().__init__(
            servers=[{"url": "/", "description": "This service."}],
            generate_unique_id_function=operation_id,
            **options,
        )
        self._open_paths = frozenset(open_paths)
        self._open_prefixes = tuple(path[:-1] for path in open_paths if path.endswith("*"))
        self._security: list[Json] = [{"HTTPBearer": []}, *([] if key_needed else [{}])]

    def openapi(self) -> Json:
        """Return the document, which FastAPI makes once; to complete it again changes nothing."""
        document = super().openapi()
        schemas: Json = document["components"]["schemas"]
        for name in VALIDATION:
            schemas.pop(name, None)
        schemas["Error"] = Error.model_json_schema()
        document["components"]["securitySchemes"] = BEARER
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path not in self._open_paths and not path.startswith(self._open_prefixes):
                    operation["security"] = self._security
                if VALIDATION[0] in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                if "requestBody" in operation:
                    operation["requestBody"] = _named(operation["requestBody"], schemas)
        return document


def _named(part: Any, schemas: Json) -> Any:
    """Move objects with a title to the document's schemas, and leave references to them."""
    if isinstance(part, list):
        return [_named(item, schemas) for item in part]
    if not isinstance(part, dict):
        return part
    part = {
        key: value if key == "example" else _named(value, schemas) for key, value in part.items()
    }
    if part.get("type") != "object" or "title" not in part:
        return part
    schemas[part["title"]] = part
    return {"$ref": f"#/components/schemas/{part['title']}"}
