"""Completes the OpenAPI document: errors, the API key, and names for request bodies."""

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
        "malformed_form": "The form is damaged, or Content-Type lacks its boundary.",
        "bad_content_encoding": "The body is not the gzip that Content-Encoding says.",
        "invalid_input": "The shape must be [n, 1, 28, 28], n from 1 to 256.",
    },
    401: {"unauthorized": "Send the API key as `Authorization: Bearer KEY`."},
    404: {
        "not_found": "This path does not exist; see /docs for those that do.",
        "unknown_model": "Request for unknown model: the server has only `bn-lenet`.",
        "unknown_version": "Request for unknown model version: `bn-lenet` has only 1.",
    },
    405: {"method_not_allowed": "This path does not take this method; see the Allow header."},
    408: {"request_timeout": "The request came too slowly; send all of it at once."},
    411: {"length_required": "Send a body, with its Content-Length."},
    413: {"payload_too_large": "The body has more than 10,485,760 bytes."},
    415: {
        "unsupported_media_type": "Set Content-Type to the body's type.",
        "unsupported_content_encoding": "Content-Encoding must be gzip, deflate or identity.",
    },
    422: {"invalid_input": "Send exactly 784 bytes, one for each pixel; the body has 3."},
    431: {"headers_too_large": "The header fields are too large."},
    500: {"internal_error": "The server failed. If it fails again, report the request id."},
    501: {"unsupported_transfer_coding": "The only transfer coding taken is chunked."},
    503: {
        "overloaded": "The server is at its limit; try again in a second.",
        "not_ready": "The server is stopping; send requests to another instance.",
    },
    504: {"deadline_exceeded": "The answer was not ready in time; try again later."},
    505: {"unsupported_http_version": "The server speaks HTTP/1.1."},
}
"""An example message for each status and code."""

CODES = sorted({code for codes in ERRORS.values() for code in codes})
BEARER = {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
# FastAPI adds these; no route answers with them.
VALIDATION = ("HTTPValidationError", "ValidationError")


class Error(BaseModel):
    """Every error answer has this form."""

    error: Annotated[str, Field(description="A sentence for people: what is wrong, or what to do.")]
    code: Annotated[str, Field(json_schema_extra={"enum": CODES})]
    request_id: Annotated[
        str, Field(description="The same id as in the header field X-Request-ID.")
    ]


def documented(*statuses: int) -> dict[int | str, Json]:
    """Return the OpenAPI descriptions of these error answers."""
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
    """Return a route's operation id, which names the function in generated clients."""
    versioned = "{model_version}" in route.path
    return f"{route.name}_of_version" if versioned else route.name


class DocumentedAPI(FastAPI):
    """FastAPI with a complete document: the API key, named request bodies, only real answers.

    Args:
        open_paths: paths that need no key; `*` at the end stands for any ending.
        key_needed: whether requests need a key; if not, any key is accepted.
        options: for FastAPI.
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
        """Return the document. FastAPI makes it once; completing it twice changes nothing."""
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
                    operation["requestBody"] = _moved_to_schemas(operation["requestBody"], schemas)
        return document


def _moved_to_schemas(part: Any, schemas: Json) -> Any:
    """Move objects with a title to `schemas`, and replace them with references."""
    if isinstance(part, list):
        return [_moved_to_schemas(item, schemas) for item in part]
    if not isinstance(part, dict):
        return part
    part = {
        key: value if key == "example" else _moved_to_schemas(value, schemas)
        for key, value in part.items()
    }
    if part.get("type") != "object" or "title" not in part:
        return part
    schemas[part["title"]] = part
    return {"$ref": f"#/components/schemas/{part['title']}"}
