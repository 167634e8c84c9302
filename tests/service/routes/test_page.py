"""The pages' files and their header fields; the weights are those of the served model's run."""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import load

from service.errors import NotFound
from service.model.artefact import ModelInfo
from service.model.classifier import Classifier
from service.routes import page

pytestmark = pytest.mark.anyio
Get = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="module")
def committed() -> ModelInfo:
    return Classifier.load(page.COMMITTED).info


def client(model: ModelInfo) -> Get:
    """Return a function that asks the routes alone."""
    app = FastAPI(docs_url=None)
    app.include_router(page.page_router(model))

    async def get(path: str, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            return await session.get(path, headers=headers)

    return get


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        *((path, "text/html; charset=utf-8") for path in ("/", "/inside", "/docs")),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
        ("/static/run.safetensors", "application/octet-stream"),
    ],
)
async def test_a_file_has_its_media_type(committed: ModelInfo, path: str, media_type: str) -> None:
    answer = await client(committed)(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)


@pytest.mark.parametrize(
    ("path", "name"), [("/", "index"), ("/inside", "inside"), ("/docs", "docs")]
)
async def test_each_page_is_its_own_file(committed: ModelInfo, path: str, name: str) -> None:
    content = (page.WEB / f"{name}.html").read_bytes()
    answer = await client(committed)(path)
    assert answer.content == content
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()[:16]}"'


async def test_a_file_is_not_sent_again_if_one_of_the_tags_is_current(
    committed: ModelInfo,
) -> None:
    get = client(committed)
    tag = (await get("/")).headers["etag"]
    for tags in (tag, f'"other", {tag}', f"W/{tag}"):
        answer = await get("/", **{"if-none-match": tags})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == tag
    assert (await get("/static/app.js", **{"if-none-match": tag})).status_code == 200


async def test_the_weights_name_the_model_and_what_its_export_used(committed: ModelInfo) -> None:
    data = (await client(committed)("/static/run.safetensors")).content
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0  # the format aligns the weights
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    assert about.pop("classes") == json.dumps(committed.classes)
    assert about == {
        "revision": hashlib.sha256(page.COMMITTED.read_bytes()).hexdigest()[:12],
        "statistics": committed.metadata["statistics"],
        "temperature": committed.metadata["temperature"],
    }
    ours, theirs = load(data), load(page.CHECKPOINT.read_bytes())
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


async def test_the_weights_of_another_model_are_not_there(committed: ModelInfo) -> None:
    lacking = {**committed.metadata, "statistics": "imagined"}
    for model in (replace(committed, revision="0" * 12), replace(committed, metadata=lacking)):
        get = client(model)
        with pytest.raises(NotFound, match="needs the committed model"):
            await get("/static/run.safetensors")
        with pytest.raises(NotFound, match="no file of this name"):
            await get("/static/other.js")


@pytest.mark.parametrize("name", ["COMMITTED", "CHECKPOINT"])
async def test_the_pages_need_no_run(
    committed: ModelInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """As in an installation without the repository's files."""
    monkeypatch.setattr(page, name, tmp_path / "nowhere")
    get = client(committed)
    with pytest.raises(NotFound, match="nothing to show"):
        await get("/static/run.safetensors")
    assert (await get("/")).status_code == 200
