"""Servers for comparison; `benchmarks.serving` starts them.

- `noop`: an ASGI callable that answers a constant, with the service's uvicorn settings.
- `floor`: the same, but it also reads the body and runs the model.
- `framework`: the service, with the handlers of its hot paths behind FastAPI's routes.
- `timed`: the service, with a timer around every run of the model.
"""

import gc
import json
import sys
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray

from service.app import create_app
from service.http import framework
from service.http.connection import KEEP_ALIVE_SECONDS
from service.http.exchange import Answer, Exchange
from service.http.server import bind, run
from service.model.classifier import Classifier
from service.settings import Settings

WARM_UP = 100
BATCH = 16  # the number of connections in the column that is compared with the bound


def bare(constant: bytes, with_model: bool) -> None:
    """Serve the floor, or the no-op, on BNLENET_PORT.

    Args:
        constant: the body of every answer.
        with_model: read the body, and run the model.
    """
    settings = Settings.from_environment()
    classify = Classifier.load(settings.model_path, settings.device).probabilities
    start: dict[str, Any] = {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(constant)),
        ],
    }
    end = {"type": "http.response.body", "body": constant}

    async def app(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001 - ASGI's signature
        if with_model:
            message = await receive()
            body = message["body"]
            while message["more_body"]:
                message = await receive()
                body += message["body"]
            if body:
                classify(np.frombuffer(body, np.uint8).reshape(1, 1, 28, 28))
        await send(start)
        await send(end)

    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    gc.collect()
    gc.freeze()
    uvicorn.Server(config).run([bind(settings)])


def through_framework() -> None:
    """Run the service on BNLENET_PORT, with its hot paths' handlers behind FastAPI's routes."""
    settings = Settings.from_environment()
    app = create_app(settings, Classifier.load(settings.model_path, settings.device))

    async def handler(exchange: Exchange) -> Answer:
        return await framework.call(app.application, exchange)

    for key, hot_path in app.hot_paths.items():
        app.hot_paths[key] = hot_path._replace(handler=handler)
    run(app, settings, bind(settings))


def timed(images: NDArray[np.uint8], report: Path) -> None:
    """Run the service on BNLENET_PORT; when it ends, write the times of the model's runs.

    Args:
        images: uint8 [n, 1, 28, 28] for the tight loop, which runs before and after serving.
        report: the JSON file to write: the times are in nanoseconds for one image.
    """
    settings = Settings.from_environment()
    sizes: list[int] = []
    nanoseconds: list[int] = []
    classifier = Classifier.load(settings.model_path, settings.device)
    loops = [tight_loop(classifier, images)]
    classify = classifier.probabilities

    def probabilities(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        begin = perf_counter_ns()
        answer = classify(pixels)
        nanoseconds.append(perf_counter_ns() - begin)
        sizes.append(len(pixels))
        return answer

    classifier.probabilities = probabilities  # type: ignore[method-assign] # this adds the timer
    run(create_app(settings, classifier), settings, bind(settings))
    classifier = Classifier.load(settings.model_path, settings.device)
    loops.append(tight_loop(classifier, images))

    runs = list(islice(zip(sizes, nanoseconds, strict=True), WARM_UP, None))
    document = {
        "tight_loop": median(loops),
        "batched": tight_loop(classifier, images, BATCH),
        "batched_256": tight_loop(classifier, images, 256),
        "alone": median([taken for size, taken in runs if size == 1] or [0]),
        "an_image": sum(taken for _, taken in runs) / max(1, sum(size for size, _ in runs)),
        "batch": sum(size for size, _ in runs) / max(1, len(runs)),
    }
    report.write_text(json.dumps(document))


def tight_loop(classifier: Classifier, images: NDArray[np.uint8], batch: int = 1) -> float:
    """Return the median nanoseconds for one image, in batches, with nothing in between."""
    taken = []
    for _ in range(3):
        for first in range(0, len(images) - batch + 1, batch):
            pixels = images[first : first + batch]
            begin = perf_counter_ns()
            classifier.probabilities(pixels)
            taken.append((perf_counter_ns() - begin) / batch)
    return median(taken[WARM_UP // batch :])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["floor" | "noop" as kind, body]:
            bare(body.encode(), kind == "floor")
        case ["framework"]:
            through_framework()
        case ["timed", images, report]:
            timed(np.load(images), Path(report))
