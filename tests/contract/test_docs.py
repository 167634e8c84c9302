"""The page at /docs shows what the service answers, and needs no other server."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from tests.contract.browser import CONTRASTS, opened, visited
from tests.contract.conftest import Serve

KEY = "secret"


@pytest.fixture
def docs(tab: Page, base_url: str) -> Iterator[Page]:
    """Open the page; `visited` fails if it uses another server."""
    with visited(tab, base_url, "/docs") as page:
        expect(page.locator("#routes section").first).to_be_visible()
        yield page


@pytest.fixture
def api(client: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def commands(page: Page) -> list[str]:
    """Return the curl command of each route, for each type of body."""
    lines = []
    for section in page.locator("#routes section").all():
        types = section.locator("select option").all_inner_texts() or [""]
        for kind in types:
            if kind:
                section.locator("select").select_option(kind)
            lines.append(section.locator(".curl").inner_text())
    return lines


def test_shows_every_route_with_its_description(docs: Page, api: dict[str, Any]) -> None:
    shown = docs.locator("#routes h3").all_inner_texts()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in api["paths"].items()
        for method, operation in methods.items()
    }
    assert shown == list(operations)
    predict = docs.locator("section", has=docs.get_by_role("heading", name="/predict"))
    expect(predict).to_contain_text(operations["POST /predict"]["description"])
    predict.get_by_text("Parameters").click()
    for parameter in operations["POST /predict"]["parameters"]:
        expect(predict).to_contain_text(parameter["name"])
        expect(predict).to_contain_text(parameter["description"].replace("`", ""))
    predict.get_by_text("Answer", exact=True).click()
    example = operations["POST /predict"]["responses"]["200"]["content"]["application/json"]
    details = predict.locator("details", has=docs.get_by_text("Answer", exact=True))
    shown_example = details.locator("pre").last.inner_text()
    assert json.loads(shown_example) == example["example"]
    predict.get_by_text("Errors").click()
    unsupported = operations["POST /predict"]["responses"]["415"]["content"]["application/json"]
    expect(predict).to_contain_text("415 Unsupported Media Type")
    for example in unsupported["examples"].values():
        expect(predict).to_contain_text(f"{example['value']['code']} {example['value']['error']}")
    expect(predict).to_contain_text("request_id: string")


def test_shapes_are_described_in_a_few_words(docs: Page) -> None:
    """Optional fields have a question mark; numbers have their limits, arrays their length."""
    docs.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    predict, infer = (
        docs.locator("section", has=docs.get_by_role("heading", name=name)).first
        for name in ("POST /predict", "POST /v2/models/{model_name}/infer")
    )
    expect(predict.locator("dd").first).to_have_text(re.compile(r"^integer 1…10\. "))

    def shape(section: Locator, kind: str) -> str:
        section.locator("select").select_option(kind)
        return section.locator("details", has=docs.get_by_text("Body", exact=True)).inner_text()

    assert shape(predict, "application/json").splitlines()[2] == (
        "  pixels: array of 28: array of 28: integer 0…255 | array of 784: integer 0…255"
        "  — 0 is the background, as in the data set."
    )
    assert shape(predict, "application/octet-stream").splitlines()[1:] == ["784 bytes"]
    assert shape(predict, "image/png").splitlines()[1:] == ["bytes"]
    tensors = shape(infer, "application/json")
    for line in (
        "\n  id?: string\n",
        '\n  inputs: array of 1: {\n    name: "pixels"\n    shape: [integer 1…256, 1, 28, 28]\n',
        '\n    datatype: "UINT8" | "FP32"\n    data?: array: number 0…255 | array: anything  — ',
        "\n      binary_data_size?: integer 0…  — ",
    ):
        assert line in tensors


def test_curl_commands_work(docs: Page, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install curl")
    image = Image.new("RGB", (60, 80), "white")
    ImageDraw.Draw(image).rectangle((20, 10, 40, 70), "navy")
    for suffix in ("png", "jpeg", "webp"):
        image.save(tmp_path / f"picture.{suffix}")
    (tmp_path / "pixels.bin").write_bytes(bytes(784))
    lines = commands(docs)
    assert len(lines) > 20
    assert not any("Authorization" in line for line in lines)  # no key is set
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", f"{line} --silent --output answer --write-out '%{{http_code}}'"],  # noqa: S607 - whichever bash there is
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        answer = (tmp_path / "answer").read_bytes()[:200]
        assert done.stdout == "200", (line[:300], answer)


def test_command_is_copied(docs: Page) -> None:
    docs.context.grant_permissions(["clipboard-read", "clipboard-write"])
    section = docs.locator("#routes section").last
    section.get_by_role("button", name="Copy").click()
    expect(docs.get_by_role("status")).to_have_text("Copied.")
    copied = docs.evaluate("navigator.clipboard.readText()")
    assert copied == section.locator(".curl").inner_text()


def test_command_has_the_key_if_it_is_needed(context: BrowserContext, serve: Serve) -> None:
    with serve(api_key=KEY) as (url, _), opened(context, url, "/docs") as page:
        expect(page.locator("#routes section").first).to_be_visible()
        needs = {
            line.split("'")[1].removeprefix(url): "Bearer $BNLENET_API_KEY" in line
            for line in commands(page)
        }
        assert needs["/predict"]
        assert needs["/v2/models/bn-lenet/infer"]
        assert not needs["/livez"]


def test_shows_html_as_text(docs: Page, api: dict[str, Any]) -> None:
    evil = "<img src=x onerror=alert(1)>"
    operation = api["paths"]["/livez"]["get"]
    operation["summary"] = operation["description"] = evil
    api["info"]["description"] = evil
    docs.route("**/openapi.json", lambda route: route.fulfill(json=api))
    docs.reload()
    expect(docs.locator("#about")).to_contain_text(evil)
    expect(docs.locator("#routes").get_by_text(evil)).to_be_visible()
    assert docs.locator("img").count() == 0


def test_can_be_tried_again(docs: Page) -> None:
    def fail(route: Route) -> None:
        route.abort()

    docs.route("**/openapi.json", fail, times=1)
    docs.reload()
    expect(docs.get_by_role("alert")).to_contain_text("cannot be reached")
    docs.get_by_role("button", name="Try again").click()
    expect(docs.locator("#routes section").first).to_be_visible()
    expect(docs.get_by_role("alert")).to_be_empty()


def test_can_be_read_in_both_schemes_on_any_screen(docs: Page) -> None:
    docs.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    for scheme in ("light", "dark"):
        docs.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        texts = docs.evaluate(CONTRASTS)
        assert len(texts) > 100
        assert [(text, ratio) for text, ratio in texts if ratio < 4.5] == []
    for width in (320, 800):
        docs.set_viewport_size({"width": width, "height": 700})
        assert docs.evaluate("document.documentElement.scrollWidth") <= width
    for link in docs.locator("#contents a").all():
        target = link.get_attribute("href")
        assert target is not None
        assert re.fullmatch(r"#\w+", target)
        assert docs.locator(target).count() == 1


def test_list_of_routes_opens_on_a_phone(docs: Page) -> None:
    link = docs.get_by_role("link", name="Prometheus metrics")
    expect(link).to_be_visible()
    docs.set_viewport_size({"width": 375, "height": 667})
    docs.reload()
    expect(docs.locator("#routes section").first).to_be_in_viewport()
    expect(link).to_be_hidden()
    docs.get_by_text("Routes", exact=True).click()
    link.click()
    expect(docs.locator("#prometheus")).to_be_in_viewport()
    for group in docs.locator("#contents ul").all():
        names = group.locator("a").all_inner_texts()
        assert len(set(names)) == len(names) > 0
