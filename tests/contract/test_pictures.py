"""Large photographs on a real server do not delay other requests."""

import io
import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from time import perf_counter

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.contract.conftest import Serve

BYTES = {"Content-Type": "application/octet-stream"}
PICTURE = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def large() -> bytes:
    """Save a PNG that is slow for its size: smooth, with a camera's noise."""
    random = np.random.default_rng(0)
    pixels = np.linspace(90, 160, 1600)[None, :, None] + random.normal(0, 2, (1600, 1600, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


def send(url: str, picture: bytes) -> httpx.Response:
    return httpx.post(f"{url}/predict", content=picture, headers=PICTURE, timeout=60)


def ask(client: httpx.Client) -> float:
    """Classify one small image; return the seconds it took."""
    begin = perf_counter()
    client.post("/predict", content=bytes(784), headers=BYTES).raise_for_status()
    return perf_counter() - begin


def test_small_requests_stay_quick_while_photographs_are_decoded(
    serve: Serve, large: bytes, pool: ThreadPoolExecutor
) -> None:
    with serve() as (url, _), httpx.Client(base_url=url) as client:
        send(url, large)
        begin = perf_counter()
        send(url, large)
        alone = perf_counter() - begin
        answers = [pool.submit(send, url, large) for _ in range(8)]
        seconds = []
        while not all(answer.done() for answer in answers):
            seconds.append(ask(client))
        assert {answer.result().status_code for answer in answers} == {200}
    assert len(seconds) > 5 * len(answers)  # on the event loop, there would be about one for each
    assert np.median(seconds) < alone / 4


def test_photographs_that_wait_too_long_get_an_error(serve: Serve) -> None:
    """The picture has few bytes, so that all of them arrive before most are read."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((2000, 2000)).save(file, "PNG")
    with serve(request_timeout_seconds=0.1) as (url, _), httpx.Client(base_url=url) as client:
        connections = [HTTPConnection(url.removeprefix("http://"), timeout=60) for _ in range(20)]
        for connection in connections:
            connection.request("POST", "/predict", file.getvalue(), PICTURE)
        answers = [connection.getresponse() for connection in connections]
        results = [(answer.status, json.loads(answer.read())) for answer in answers]
        for connection in connections:
            connection.close()
        # 408: the upload took too long; 503: too many wait; 504: it was too late when it was read.
        assert {status for status, _ in results} <= {200, 408, 503, 504}
        refused = Counter(result["code"] for status, result in results if status != 200)
        assert refused
        metrics = client.get("/metrics").text
        for code, count in refused.items():
            assert f'bnlenet_rejected_total{{reason="{code}"}} {count}.0' in metrics


def test_senders_who_leave_do_not_stop_others(serve: Serve, large: bytes) -> None:
    with serve() as (url, _), httpx.Client(base_url=url) as client:
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
        for _ in range(4):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(f"{head}Content-Length: {len(large)}\r\n\r\n".encode() + large)
        assert send(url, large).status_code == 200
        assert ask(client) < 1
