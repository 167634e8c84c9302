"""Every wrong request gets the right status, in the one error shape, without touching the model."""

import gzip
import io
import json
import re
import socket
import struct
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

ROWS = [[0] * 28 for _ in range(28)]
JSON = {"content-type": "application/json"}
BYTES = {"content-type": "application/octet-stream"}
PNG = {"content-type": "image/png"}


def with_pixel(value: Any) -> Any:
    rows: list[list[Any]] = [row.copy() for row in ROWS]
    rows[27][27] = value
    return rows


def png_header(width: int, height: int) -> bytes:
    """Begin a PNG that declares a size and has hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def small_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(file, "PNG")
    return file.getvalue()


def pixels(value: Any) -> dict[str, Any]:
    return {"content": json.dumps({"pixels": value}), "headers": JSON}


PARAMETERS = ("0", "11", "-1", "1.0", "ten", "", "1e1", "٣", "9" * 5000)
NO_PIXELS: tuple[Any, ...] = (-1, 256, 2**70, 1.5, True, False, None, "0", [], [0], {})
WRONG: dict[str, tuple[int, str, dict[str, Any]]] = {
    # name: status, code, request
    "no body announced": (411, "length_required", {}),
    "no content type": (415, "unsupported_media_type", {"content": bytes(784)}),
    "unknown content type": (
        *(415, "unsupported_media_type"),
        {"content": b"x", "headers": {"content-type": "text/plain"}},
    ),
    "form without files": (415, "unsupported_media_type", {"data": {"image": "x"}}),
    "empty bytes": (422, "invalid_input", {"content": b"", "headers": BYTES}),
    "a byte too few": (422, "invalid_input", {"content": bytes(783), "headers": BYTES}),
    "a byte too many": (422, "invalid_input", {"content": bytes(785), "headers": BYTES}),
    "empty JSON": (400, "malformed_json", {"content": b"", "headers": JSON}),
    "cut JSON": (400, "malformed_json", {"content": b'{"pixels": [1,', "headers": JSON}),
    "not UTF-8": (400, "malformed_json", {"content": b'{"pixels": "\xff"}', "headers": JSON}),
    "NaN": (400, "malformed_json", {"content": b'{"pixels": [NaN]}', "headers": JSON}),
    "deep JSON": (400, "malformed_json", {"content": b"[" * 100_000, "headers": JSON}),
    "deep valid JSON": (
        422,
        "invalid_input",
        {"content": b"[" * 500 + b"]" * 500, "headers": JSON},
    ),
    "long JSON": (413, "payload_too_large", pixels([0] * 200_000)),
    "JSON null": (422, "invalid_input", {"content": b"null", "headers": JSON}),
    "no pixels": (422, "invalid_input", {"content": b"{}", "headers": JSON}),
    "pixels null": (422, "invalid_input", pixels(None)),
    "pixels a number": (422, "invalid_input", pixels(784)),
    "pixels text": (422, "invalid_input", pixels("0" * 784)),
    "pixels an object": (422, "invalid_input", pixels({"0": 0})),
    "pixels empty": (422, "invalid_input", pixels([])),
    "27 rows": (422, "invalid_input", pixels(ROWS[:27])),
    "a short row": (422, "invalid_input", pixels([*ROWS[:27], [0] * 27])),
    "784 numbers in 28 uneven rows": (
        *(422, "invalid_input"),
        pixels([[0] * 27, [0] * 29, *ROWS[2:]]),
    ),
    "counts in place of rows": (422, "invalid_input", pixels([28] * 28)),
    "counts in place of some rows": (422, "invalid_input", pixels([*ROWS[:27], 28])),
    "text in place of a row": (422, "invalid_input", pixels([*ROWS[:27], "0" * 28])),
    "783 numbers": (422, "invalid_input", pixels([0] * 783)),
    "one level too deep": (422, "invalid_input", pixels([ROWS])),
    **{
        f"pixel {value!r}": (422, "invalid_input", pixels(with_pixel(value))) for value in NO_PIXELS
    },
    "flat pixel true": (422, "invalid_input", pixels([0] * 783 + [True])),
    "not an image": (415, "unsupported_media_type", {"content": b"hello", "headers": PNG}),
    "empty image": (415, "unsupported_media_type", {"content": b"", "headers": PNG}),
    "cut image": (422, "invalid_input", {"content": small_png()[:-30], "headers": PNG}),
    "bomb by its header": (
        *(413, "payload_too_large"),
        {"content": png_header(60_000, 60_000), "headers": PNG},
    ),
    "form without boundary": (
        *(400, "malformed_form"),
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ),
    "form of other bytes": (
        *(400, "malformed_form"),
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ),
    "form with another field": (422, "invalid_input", {"files": {"file": small_png()}}),
    "form with two images": (
        *(422, "invalid_input"),
        {"files": [("image", small_png()), ("image", small_png())]},
    ),
    "form with a hundred parts": (
        *(422, "invalid_input"),
        {"files": [("image", b"") for _ in range(100)]},
    ),
    "not gzip": (
        *(400, "bad_content_encoding"),
        {"content": b"x", "headers": {**BYTES, "content-encoding": "gzip"}},
    ),
    "cut gzip": (
        *(400, "bad_content_encoding"),
        {
            "content": gzip.compress(bytes(784))[:-4],
            "headers": {**BYTES, "content-encoding": "gzip"},
        },
    ),
    "gzip bomb": (
        *(413, "payload_too_large"),
        {
            "content": gzip.compress(bytes(50_000_000)),
            "headers": {**BYTES, "content-encoding": "gzip"},
        },
    ),
    "unknown content encoding": (
        *(415, "unsupported_content_encoding"),
        {"content": bytes(784), "headers": {**BYTES, "content-encoding": "br"}},
    ),
    "body over the limit": (
        *(413, "payload_too_large"),
        {"content": bytes(10 * 2**20 + 1), "headers": PNG},
    ),
    **{
        f"top_k {value[:9]!r}": (
            *(422, "invalid_input"),
            {"content": bytes(784), "headers": BYTES, "params": {"top_k": value}},
        )
        for value in PARAMETERS
    },
    "unknown preprocessing": (
        *(422, "invalid_input"),
        {"content": bytes(784), "headers": BYTES, "params": {"preprocessing": "x"}},
    ),
    "unknown echo": (
        *(422, "invalid_input"),
        {"content": bytes(784), "headers": BYTES, "params": {"echo": "x"}},
    ),
}


def assert_error(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error", "code", "request_id"}
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert re.fullmatch(r"[A-Z].+[.]", body["error"]), "an error is a sentence"
    assert not re.search(r"Traceback|Error\(|site-packages|<class|0x[0-9a-f]{6}", response.text)


def model_runs(client: httpx.Client) -> float:
    metrics = client.get("/metrics").text
    found = re.search(r"^bnlenet_inference_duration_seconds_count (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_before_the_model(client: httpx.Client, name: str) -> None:
    status, code, request = WRONG[name]
    before = model_runs(client)
    message = client.build_request("POST", "/predict", **request)
    if name == "no body announced":
        del message.headers["content-length"]
    assert_error(client.send(message), status, code)
    assert model_runs(client) == before


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "/livez/", "/PREDICT", "/static/../x"])
def test_an_unknown_path_is_404(client: httpx.Client, path: str) -> None:
    assert_error(client.get(path), 404, "not_found")


@pytest.mark.parametrize("path", ["/", "/livez", "/metrics", "/v2/models/bn-lenet/ready"])
@pytest.mark.parametrize("end", ["%0A", "%0D", "%00", "%09", "%20", "%2F", "%3F", "%0A%0A", ";x"])
def test_a_path_with_more_characters_is_another_path(
    client: httpx.Client, path: str, end: str
) -> None:
    """Starlette's patterns end in `$`, which also matches before a line feed."""
    response = client.get(path + end)
    assert response.status_code == 404, response.text
    assert response.headers["content-type"] == "application/json"


def test_no_route_takes_a_body_past_the_limits(client: httpx.Client) -> None:
    """With a line feed, the path is that of no hot path, but FastAPI has the same route."""
    response = client.post("/predict%0A", content=bytes(784), headers=BYTES)
    assert_error(response, 404, "not_found")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_another_method_is_405_and_names_the_right_one(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/predict")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        assert_error(response, 405, "method_not_allowed")


def test_a_refused_upload_is_answered_although_it_is_not_read(base_url: str) -> None:
    """The client keeps sending; it must still be able to read why it was refused."""
    host, port = urlsplit(base_url).hostname, urlsplit(base_url).port
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(head + b"Content-Length: 1000000000\r\n\r\n" + bytes(1_000_000))
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert b'"code":"payload_too_large"' in answer


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"NONSENSE\r\n\r\n", 400, "invalid_http"),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
        (
            b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
            431,
            "headers_too_large",
        ),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 40_000, 431, "headers_too_large"),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "headers_too_large"),
    ],
)
def test_what_is_no_request_gets_the_same_shape(
    base_url: str, client: httpx.Client, request_bytes: bytes, status: int, code: str
) -> None:
    host, port = urlsplit(base_url).hostname, urlsplit(base_url).port
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(request_bytes)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    answer = json.loads(body)
    assert set(answer) == {"error", "code", "request_id"}
    assert answer["code"] == code
    assert f"x-request-id: {answer['request_id']}\r\n".encode() in head + b"\r\n"
    metrics = client.get("/metrics").text
    refused = f'bnlenet_rejected_total{{reason="{code}"}}'
    counted = f'http_requests_total{{method="OTHER",route="unmatched",status="{status}"}}'
    assert refused in metrics
    assert counted in metrics
