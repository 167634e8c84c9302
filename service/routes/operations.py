"""Health, readiness and metrics, for those who run the service."""

from typing import Annotated, Literal, Self

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from service.errors import NotReady
from service.http.admission import Admission
from service.model.artefact import ModelInfo
from service.model.inference import Models
from service.telemetry.metrics import Collect, Metrics


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"] = "live"


class ReadyModel(BaseModel):
    """The model that passed its self-test, and the execution provider that runs it."""

    name: str
    version: str
    revision: str
    provider: str
    test_accuracy: str

    @classmethod
    def of(cls, model: ModelInfo) -> Self:
        """Describe a loaded model."""
        return cls(
            name=model.name,
            version=model.version,
            revision=model.revision,
            provider=model.provider,
            test_accuracy=model.metadata.get("test_accuracy", "unknown"),
        )


class Ready(BaseModel):
    """The service can take traffic."""

    status: Literal["ready"] = "ready"
    model: ReadyModel
    picture_model: Annotated[
        ReadyModel, Field(description="The model for converted pictures; it may be the same.")
    ]


def operations_router(
    models: Models, metrics: Metrics, collect: Collect, admission: Admission
) -> APIRouter:
    """Return the routes.

    Args:
        models: the loaded models; they have passed their self-tests.
        metrics: this process's metrics.
        collect: returns the totals of all workers.
        admission: knows whether the server drains, and how many requests are in flight.
    """
    router = APIRouter(tags=["operations"])
    ready = Ready(
        model=ReadyModel.of(models["none"].model),
        picture_model=ReadyModel.of(models["dataset"].model),
    )

    @router.get("/livez", summary="Is the process alive?")
    async def livez() -> Live:
        return Live()

    @router.get("/readyz", summary="Can the service take requests?")
    async def readyz() -> Ready:
        """Return ready, or 503 while the server stops. The models have passed their self-tests."""
        if admission.draining:
            raise NotReady("The server is stopping; send requests to another instance.")
        return ready

    @router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def prometheus(request: Request) -> Response:
        """Return the sums of all workers, as OpenMetrics if `Accept` asks for it."""
        metrics.in_flight.set(admission.in_flight)
        text, content_type = metrics.render(await collect(), request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    return router
