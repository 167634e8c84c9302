"""The page in a real Chromium, with mouse, keyboard, clipboard and phone."""

import io
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.contract.browser import CONTRASTS, INSECURE, draw, gray, opened, visited
from tests.contract.conftest import Serve
from training.dataset import CLASS_NAMES

KEY = "open sésame €"
EXAMPLES = {
    "t-shirt": "T-shirt/top",
    "trouser": "Trouser",
    "pullover": "Pullover",
    "dress": "Dress",
    "coat": "Coat",
    "sandal": "Sandal",
    "shirt": "Shirt",
    "sneaker": "Sneaker",
    "bag": "Bag",
    "ankle-boot": "Ankle boot",
}
PAGES = ["", "inside", "docs"]
READY = ["name", "version", "revision", "provider", "test_accuracy"]
WEB = Path(__file__).parents[2] / "service" / "routes" / "web"
FILES = [*PAGES, *(f"static/{path.name}" for path in sorted(WEB.iterdir()))]

GIVE = """([kind, type, name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt());
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const stage = document.getElementById("stage");
  stage.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
COPY = """async (base64) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt());
  const picture = new Blob([bytes], { type: "image/png" });
  await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
}"""


SQUARE = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75), (0.25, 0.25)]


def symmetric(*half: tuple[float, float]) -> list[tuple[float, float]]:
    """Return a closed outline, made from its left half and the mirror image."""
    return [*half, *((1 - x, y) for x, y in reversed(half)), half[0]]


DRAWINGS = {
    "T-shirt/top": [
        symmetric((0.42, 0.15), (0.33, 0.13), (0.12, 0.28), (0.2, 0.42), (0.3, 0.36), (0.3, 0.85))
    ],
    "Trouser": [
        symmetric((0.34, 0.08), (0.28, 0.92), (0.45, 0.92), (0.5, 0.38)),
    ],
    "Pullover": [
        symmetric(
            *((0.42, 0.15), (0.33, 0.14), (0.22, 0.25), (0.12, 0.8)),
            *((0.22, 0.83), (0.3, 0.45), (0.3, 0.85)),
        )
    ],
    "Dress": [symmetric((0.44, 0.08), (0.38, 0.08), (0.38, 0.28), (0.42, 0.45), (0.28, 0.92))],
    "Coat": [
        symmetric(
            *((0.44, 0.1), (0.34, 0.12), (0.24, 0.22), (0.14, 0.78)),
            *((0.24, 0.8), (0.3, 0.48), (0.27, 0.92)),
        ),
        [(0.5, 0.12), (0.5, 0.92)],
    ],
    "Sandal": [
        [
            *((0.08, 0.62), (0.3, 0.6), (0.55, 0.45), (0.75, 0.28), (0.88, 0.25), (0.92, 0.4)),
            *((0.92, 0.68), (0.85, 0.68), (0.84, 0.5), (0.6, 0.62), (0.4, 0.7), (0.08, 0.7)),
            (0.08, 0.62),
        ],
        [(0.35, 0.62), (0.25, 0.5), (0.15, 0.6)],
        [(0.75, 0.3), (0.7, 0.2), (0.85, 0.2), (0.88, 0.26)],
    ],
    "Shirt": [
        symmetric(
            *((0.44, 0.14), (0.36, 0.12), (0.24, 0.22), (0.14, 0.7)),
            *((0.23, 0.73), (0.31, 0.42), (0.31, 0.86)),
        ),
        [(0.44, 0.14), (0.5, 0.24), (0.56, 0.14)],
        [(0.5, 0.24), (0.5, 0.86)],
    ],
    "Sneaker": [
        [
            *((0.08, 0.45), (0.1, 0.65), (0.9, 0.65), (0.92, 0.55), (0.75, 0.5), (0.55, 0.38)),
            *((0.48, 0.33), (0.38, 0.4), (0.25, 0.42), (0.18, 0.33), (0.08, 0.45)),
        ]
    ],
    "Bag": [
        [(0.18, 0.4), (0.82, 0.4), (0.85, 0.85), (0.15, 0.85), (0.18, 0.4)],
        [(0.35, 0.4), (0.38, 0.22), (0.5, 0.16), (0.62, 0.22), (0.65, 0.4)],
    ],
    "Ankle boot": [
        [
            *((0.25, 0.15), (0.52, 0.15), (0.54, 0.5), (0.85, 0.62), (0.88, 0.8)),
            *((0.25, 0.8), (0.22, 0.6), (0.25, 0.15)),
        ]
    ],
}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def trousers() -> bytes:
    """Return a PNG of drawn trousers, dark on white."""
    image = Image.new("RGB", (300, 400), "white")
    outline = [(90, 40), (210, 40), (240, 360), (180, 360), (150, 140), (120, 360), (60, 360)]
    ImageDraw.Draw(image).polygon(outline, (60, 80, 130))
    return png(image)


@pytest.fixture
def page(tab: Page, base_url: str) -> Iterator[Page]:
    tab.context.clear_permissions()
    with visited(tab, base_url) as page:
        yield page


def choose(page: Page, content: bytes, name: str = "trousers.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def expect_answer(page: Page, answer: dict[str, Any]) -> None:
    """Wait until the page shows the whole answer."""
    expected = {each["label"]: percent(each["probability"]) for each in answer["predictions"]}
    expect(page.locator("#bars .first span").first).to_have_text(answer["label"])
    unsure = any(note.startswith("Not sure") for note in answer.get("notes", []))
    verdict = f"Not sure: perhaps {answer['label']}" if unsure else answer["label"]
    expect(page.locator("#label")).to_have_text(verdict)
    rows = [re.split(r"\s*\n+\s*", row) for row in page.locator("#bars li").all_inner_texts()]
    assert [tuple(row) for row in rows] == list(expected.items())  # most probable first
    assert (gray(page, "seen") == np.array(answer["pixels"])).all()


@pytest.fixture
def answer(client: httpx.Client, trousers: bytes) -> dict[str, Any]:
    """Return the service's answer for the trousers."""
    return ask(client, trousers)


class TestFiles:
    def test_load_from_this_server_only(self, client: httpx.Client) -> None:
        for path in FILES:
            headers = client.get(f"/{path}").raise_for_status().headers
            rules = headers["content-security-policy"].split("; ")
            assert dict(rule.split(" ", 1) for rule in rules) == {
                "default-src": "'none'",
                "script-src": "'self'",
                "style-src": "'self'",
                "img-src": "'self' blob:",
                "connect-src": "'self'",
                "base-uri": "'none'",
                "form-action": "'none'",
                "frame-ancestors": "'none'",
            }
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"

    def test_are_cached_and_revalidated(self, client: httpx.Client) -> None:
        for path in FILES:
            first = client.get(f"/{path}")
            assert first.headers["cache-control"] == "no-cache"
            again = client.get(f"/{path}", headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            other = client.get(f"/{path}", headers={"if-none-match": '"other"'})
            assert (other.status_code, other.content) == (200, first.content)
            assert client.head(f"/{path}").headers["content-length"] == str(len(first.content))

    @pytest.mark.parametrize("name", ["nothing.js", "../page.py", "%2e%2e%2fpage.py"])
    def test_are_the_only_ones(self, client: httpx.Client, name: str) -> None:
        response = client.get(f"/static/{name}")
        assert response.status_code == 404
        assert response.json()["code"] == "not_found"

    def test_name_no_other_host(self, client: httpx.Client) -> None:
        for path in FILES:
            text = client.get(f"/{path}").text.replace("http://www.w3.org/2000/svg", "")
            assert re.findall(r"(?:https?:)?//[a-z]", text) == []


class TestPicture:
    def test_chosen_is_answered_in_full(
        self, page: Page, client: httpx.Client, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        assert page.locator("#notes li").all_inner_texts() == answer.get("notes", [])
        expect(page.locator("#preprocessing")).to_contain_text("made the way the data set was")
        expect(page.locator("#latency")).to_have_text(re.compile(r"^[\d.]+ ms$"))
        ready = client.get("/readyz").json()
        expect(page.locator("#model")).to_have_text("bn-lenet 1")
        model = ready["picture_model"]  # it answered; before, the page names the other
        assert model["revision"] == answer["model"]["revision"]
        expect(page.locator("#revision")).to_have_text(model["revision"])
        accuracy = float(page.locator("#accuracy").inner_text().removesuffix(" %")) / 100
        assert accuracy == pytest.approx(float(model["test_accuracy"]), abs=6e-4)
        assert model["provider"].startswith(page.locator("#provider").inner_text())

    def test_has_bars_as_long_as_the_probabilities(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        shares = page.evaluate(
            """() => [...document.querySelectorAll("#bars i")].map((bar) =>
            parseFloat(getComputedStyle(bar, "::before").width) / bar.clientWidth)"""
        )
        probable = [each["probability"] for each in answer["predictions"]]
        assert shares == pytest.approx(probable, abs=0.005)

    def test_that_takes_long_replaces_the_old_answer_by_a_message(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        held: list[Route] = []
        page.route("**/predict?echo=pixels", lambda route: held.append(route))  # noqa: PLW0108 - Playwright takes no methods of lists
        choose(page, trousers, "again.png")
        expect(page.locator("#label")).to_have_text("Looking …")
        expect(page.locator("#bars .first")).to_have_count(0)  # the old answer is gone
        expect(page.locator("#latency")).not_to_contain_text("ms")
        held[0].continue_()
        expect_answer(page, answer)

    def test_that_is_small_is_not_said_to_be_scaled(self, page: Page) -> None:
        """The service reads no icons, so the browser makes a PNG of it."""
        icon = io.BytesIO()
        Image.linear_gradient("L").convert("RGBA").save(icon, "ICO", sizes=[(64, 64)])
        choose(page, icon.getvalue(), "bar.ico", "image/x-icon")
        expect(page.locator("#preprocessing")).to_contain_text("What the model saw")
        expect(page.locator("#preprocessing")).not_to_contain_text("Scaled down")
        expect(page.locator("#command")).to_contain_text("@bar-small.png")

    def test_chosen_again_after_a_change_is_sent_again(
        self, page: Page, trousers: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / "same.png"
        path.write_bytes(trousers)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.method))
        for _ in range(2):
            with page.expect_file_chooser() as chooser:
                page.get_by_label("Choose a picture").press("Enter")
            chooser.value.set_files(path)
            expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
            expect(page.locator("#bars .first")).to_have_count(1)
        assert requests.count("POST") == 2

    def test_can_have_any_file_name(self, page: Page, trousers: bytes) -> None:
        name = "<img src=x onerror=alert(1)>&lt;b>.png"
        choose(page, trousers, name)
        expect(page.get_by_role("img", name=name)).to_be_visible()
        expect(page.locator("#command")).to_contain_text(f"'@{name}'")
        assert page.locator("img").count() == 1 + len(EXAMPLES)

    def test_of_28_x_28_is_used_unchanged(self, page: Page) -> None:
        gray = (np.outer(np.arange(28), np.arange(28)) % 256).astype(np.uint8)
        choose(page, png(Image.fromarray(gray)))
        expect(page.locator("#preprocessing")).to_contain_text("unchanged")

    def test_of_an_example_is_classified_correctly(self, page: Page) -> None:
        """All ten of them, one for each class."""
        named = {}
        for label in EXAMPLES.values():
            page.get_by_role("list").get_by_role("button", name=label, exact=True).click()
            expect(page.locator("#command")).to_contain_text("@")
            expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
            named[label] = page.locator("#label").inner_text()
            expect(page.get_by_role("img", name=label).last).to_be_visible()
        assert named == {label: label for label in EXAMPLES.values()}

    @pytest.mark.parametrize(
        ("size", "kind", "orientation", "small"),
        [
            ((3000, 4000), "jpeg", 1, (768, 1024)),
            ((3000, 4000), "jpeg", 6, (1024, 768)),  # turned by a quarter
            ((2560, 1440), "png", 1, (1024, 576)),
        ],
    )
    def test_is_sent_smaller_when_it_is_large(
        self,
        page: Page,
        tmp_path: Path,
        size: tuple[int, int],
        kind: str,
        orientation: int,
        small: tuple[int, int],
    ) -> None:
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((900, 300, 1500, 1200), "navy")
        path = tmp_path / f"large.{kind}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        page.set_input_files("#file", path)
        expect(page.locator("#preprocessing")).to_contain_text("Scaled down in your browser")
        picture = Image.open(io.BytesIO(sent(page)))
        assert picture.size == small
        expect(page.locator("#command")).to_contain_text(f"image/{kind}")
        expect(page.locator("#command")).to_contain_text(f"@large-small.{kind}")
        paper = np.array(picture.convert("L"))
        assert paper[5, 5] == pytest.approx(255, abs=4)
        assert (paper < 128).mean() == pytest.approx(600 * 900 / np.prod(size), rel=0.05)

    def test_taken_with_the_camera(self, page: Page, client: httpx.Client) -> None:
        page.context.grant_permissions(["camera"])
        page.locator("label", has_text="Camera").click()
        expect(page.get_by_role("button", name="Take it")).to_be_attached()
        page.wait_for_function("() => document.getElementById('viewfinder').videoWidth > 0")
        page.locator("label", has_text="Take it").click()
        expect(page.locator("#bars .first")).to_have_count(1)
        expect_answer(page, ask(client, sent(page)))
        expect(page.get_by_role("button", name="Camera")).to_be_attached()
        assert page.evaluate("document.getElementById('viewfinder').srcObject.active") is False

    def test_taken_by_a_phone_can_be_saved_for_the_command(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        """It is in no folder; a chosen file is."""
        save = page.get_by_role("link", name="Save the picture")
        choose(page, trousers)
        expect_answer(page, answer)
        expect(save).to_be_hidden()
        page.set_input_files(
            "#camera", {"name": "image.png", "mimeType": "image/png", "buffer": trousers}
        )
        expect(page.locator("#command")).to_contain_text("@image.png")
        expect(save).to_be_visible()

    def test_cannot_be_taken_where_the_camera_is_denied(self, page: Page) -> None:
        page.locator("label", has_text="Camera").click()
        expect(page.get_by_role("alert")).to_contain_text("The camera cannot be used")
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()

    def test_dropped(self, page: Page, trousers: bytes, answer: dict[str, Any]) -> None:
        given = ["image/png", "trousers.png", b64encode(trousers).decode()]
        page.evaluate(GIVE, ["dragenter", *given])
        expect(page.locator("#stage")).to_have_class(re.compile("over"))
        page.evaluate(GIVE, ["drop", *given])
        expect_answer(page, answer)
        expect(page.locator("#stage")).not_to_have_class(re.compile("over"))
        expect(page.get_by_role("img", name="trousers.png")).to_be_visible()

    def test_dragged_from_one_element_to_the_next_keeps_the_mark(self, page: Page) -> None:
        page.evaluate(GIVE, ["dragenter", "image/png", "trousers.png", ""])
        leave = """(relatedTarget) => stage.dispatchEvent(
            new DragEvent("dragleave", { relatedTarget, bubbles: true }))"""
        page.evaluate(leave, page.locator("#label").element_handle())
        expect(page.locator("#stage")).to_have_class(re.compile("over"))
        page.evaluate(leave, None)  # out of the window
        expect(page.locator("#stage")).not_to_have_class(re.compile("over"))

    def test_pasted_from_the_real_clipboard(
        self, page: Page, client: httpx.Client, trousers: bytes
    ) -> None:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.evaluate(COPY, b64encode(trousers).decode())
        page.keyboard.press("Control+V")
        expect(page.locator("#bars .first")).to_have_count(1)
        expect_answer(page, ask(client, sent(page)))

    def test_that_comes_later_replaces_one_still_in_flight(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        held = iter(range(1))  # the first request gets no answer

        def hold(route: Route) -> None:
            if next(held, None) is None:
                route.continue_()

        page.route("**/predict?echo=pixels", hold)
        choose(page, png(Image.new("L", (28, 28))), "black.png")
        expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
        choose(page, trousers)
        expect_answer(page, answer)


def sent(page: Page) -> bytes:
    """Wait for the answer, and return its picture."""
    expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save the picture").click()
    assert page.locator("#command").inner_text().endswith(f"@{download.value.suggested_filename}")
    return download.value.path().read_bytes()


def ask(client: httpx.Client, picture: bytes) -> dict[str, Any]:
    """Ask the service without the page."""
    headers = {"content-type": "image/png"}
    response = client.post("/predict?echo=pixels", content=picture, headers=headers)
    document: dict[str, Any] = response.json()
    return document


class TestDrawing:
    def test_is_classified_while_it_is_drawn(self, page: Page, client: httpx.Client) -> None:
        page.emulate_media(color_scheme="dark")  # the sent picture must not depend on it
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.method))
        expect(page.get_by_role("button", name="Clear")).to_be_disabled()
        draw(page, (0.5, 0.2), (0.5, 0.5))
        expect(page.locator("#bars .first")).to_have_count(1)
        before = requests.count("POST")
        draw(page, (0.5, 0.5), (0.3, 0.8))
        picture = sent(page)
        assert 1 <= before < requests.count("POST")
        expect_answer(page, ask(client, picture))
        paper = np.array(Image.open(io.BytesIO(picture)).convert("L"))
        side = len(paper)
        for x, y, ink in ((0.5, 0.3, 0), (0.4, 0.65, 0), (0.1, 0.1, 255), (0.9, 0.9, 255)):
            assert paper[int(y * side), int(x * side)] == ink

    def test_keeps_its_answer_while_the_next_takes_long(self, page: Page) -> None:
        """Unlike a new picture, a further line leaves the old answer nearly right."""
        draw(page, *SQUARE)
        expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
        before = page.locator("#label").inner_text()
        held: list[Route] = []
        page.route("**/predict?echo=pixels", lambda route: held.append(route))  # noqa: PLW0108 - Playwright takes no methods of lists
        draw(page, (0.4, 0.4), (0.6, 0.6))
        expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
        page.wait_for_timeout(600)  # "Looking …" would come after 400
        assert page.locator("#label").inner_text() == before
        for route in held:
            route.continue_()

    def test_can_be_cleared_and_started_again(self, page: Page) -> None:
        draw(page, (0.2, 0.2), (0.8, 0.8))
        expect(page.locator("#bars .first")).to_have_count(1)
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#bars .first")).to_have_count(0)
        expect(page.get_by_text("Draw one here")).to_be_visible()
        expect(page.get_by_role("button", name="Copy")).to_be_disabled()
        draw(page, (0.8, 0.2), (0.8, 0.2))
        paper = np.array(Image.open(io.BytesIO(sent(page))).convert("L"))
        assert 0 < (paper < 128).mean() < 0.02  # one dot, and nothing of the first drawing

    def test_follows_the_mouse_without_tls(self, browser: Browser, base_url: str) -> None:
        """Browsers treat 127.0.0.1 as secure; other addresses without TLS have fewer functions."""
        url, found = re.subn(r"^http://(127\.0\.0\.1|localhost)\b", f"http://{INSECURE}", base_url)
        if not found:
            pytest.skip("the server under test is not on this machine, or has TLS")
        with browser.new_context() as context, opened(context, url) as page:
            assert page.evaluate("isSecureContext") is False
            draw(page, (0.2, 0.5), (0.8, 0.5))
            paper = np.array(Image.open(io.BytesIO(sent(page))).convert("L"))
            assert (paper[len(paper) // 2] < 128).mean() > 0.6  # a line from end to end

    def test_follows_a_finger(self, browser: Browser, base_url: str) -> None:
        with (
            browser.new_context(
                has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844}
            ) as context,
            opened(context, base_url) as page,
        ):
            box = page.locator("#paper").bounding_box()
            assert box is not None
            page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            expect(page.locator("#bars .first")).to_have_count(1)
            assert page.evaluate("document.documentElement.scrollWidth") == 390

    def test_has_one_pen(self, page: Page) -> None:
        """A second finger adds nothing to the first one's stroke, and does not end it."""
        box = page.locator("#paper").bounding_box()
        assert box is not None
        session = page.context.new_cdp_session(page)
        for kind, places in (
            ("Start", [(0.2, 0.2)]),
            ("Start", [(0.2, 0.2), (0.8, 0.2)]),
            ("Move", [(0.2, 0.4), (0.8, 0.4)]),
            ("Move", [(0.2, 0.4)]),  # the second finger is lifted
            ("Move", [(0.2, 0.8)]),
            ("End", []),
        ):
            points = [
                {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": i}
                for i, (x, y) in enumerate(places)
            ]
            session.send(
                "Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points}
            )
        drawn = ink(page)
        assert (drawn[130:430, 112] == 0).all()
        assert (drawn[:, 280:] == 255).all()

    def test_outline_is_filled_lighter_than_its_lines(self, page: Page) -> None:
        draw(page, *SQUARE, (0.26, 0.24))  # not quite closed
        draw(page, (0.5, 0.35), (0.5, 0.65))
        paper = ink(page)
        assert paper[10, 10] == 255
        assert paper[280, 140] == paper[280, 280] == 0  # an edge, and the line inside
        assert 0 < paper[280, 200] < 128
        assert ((paper > 0) & (paper < 128)).mean() == pytest.approx(0.25, abs=0.05)

    def test_outline_of_several_lines_is_filled(self, page: Page) -> None:
        for line in pairwise(SQUARE):
            assert ink(page)[280, 280] == 255
            draw(page, *line)
        assert 0 < ink(page)[280, 280] < 128

    def test_line_whose_ends_are_near_is_closed(self, page: Page) -> None:
        """Up to 60 pixels apart; at 67 it stays open."""
        draw(page, *SQUARE[:-1], (0.25, 0.33))
        paper = ink(page)
        assert 0 < paper[280, 280] < 128
        assert paper[162, 140] == 0  # the line that closes it
        page.get_by_role("button", name="Undo").click()
        draw(page, *SQUARE[:-1], (0.25, 0.37))
        assert ink(page)[280, 280] == 255

    def test_small_gap_between_lines_counts_as_closed(self, page: Page) -> None:
        for line in pairwise(SQUARE):
            draw(page, *line if line[0] != (0.75, 0.25) else ((0.75, 0.29), line[1]))
        paper = ink(page)
        assert paper[151, 420] == 255  # the gap itself, outside the lines' round ends
        assert 0 < paper[280, 280] < 128

    def test_starts_where_a_picture_was_when_a_pen_is_taken(self, page: Page) -> None:
        page.get_by_role("button", name="Coat", exact=True).click()
        expect(page.locator("#label")).to_have_text("Coat")
        page.get_by_label("Fine pen").click()  # the one that was chosen already
        expect(page.get_by_text("Draw one here")).to_be_visible()
        expect(page.locator("#bars .first")).to_have_count(0)
        draw(page, *SQUARE)
        first = ink(page)
        page.get_by_label("Broad pen").click()
        assert (ink(page) == first).all()

    def test_does_not_come_back_in_place_of_a_picture(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        draw(page, *SQUARE)
        draw(page, (0.1, 0.1), (0.9, 0.1))
        choose(page, trousers)
        expect_answer(page, answer)
        page.keyboard.press("Control+z")
        expect(page.locator("#picture")).to_be_visible()
        expect_answer(page, answer)

    def test_needs_the_main_button(self, page: Page) -> None:
        page.locator("#paper").click(button="right")
        page.locator("#paper").click(button="middle")
        assert (ink(page) == 255).all()
        expect(page.get_by_role("button", name="Undo")).to_be_disabled()

    def test_open_line_is_not_filled(self, page: Page) -> None:
        draw(page, *SQUARE[:-1])
        assert ink(page)[280, 280] == 255

    def test_erased_hole_stays(self, page: Page) -> None:
        draw(page, *SQUARE)
        page.get_by_label("Eraser").check()
        draw(page, (0.45, 0.5), (0.55, 0.5))
        assert ink(page)[280, 280] == 255
        page.get_by_label("Fine pen").check()
        draw(page, (0.1, 0.1), (0.2, 0.1))
        assert ink(page)[280, 280] == 255
        assert 0 < ink(page)[180, 280] < 128

    def test_pens_have_two_sizes(self, page: Page) -> None:
        widths = []
        for pen in ("Fine pen", "Broad pen"):
            page.get_by_label(pen).check()
            draw(page, (0.2, 0.5), (0.8, 0.5))
            widths.append(int((ink(page)[:, 280] < 128).sum()))
            page.get_by_role("button", name="Undo").click()
        assert 8 <= widths[0] <= 20
        assert widths[1] > 2 * widths[0]

    def test_uses_the_pen_that_is_marked_after_a_way_back(self, page: Page) -> None:
        page.get_by_label("Broad pen").check()
        page.get_by_role("link", name="Documentation").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Documentation")
        page.go_back()
        expect(page.locator("#revision")).to_have_text(re.compile("^[0-9a-f]{12}$"))
        draw(page, (0.2, 0.5), (0.8, 0.5))
        broad = page.get_by_label("Broad pen").is_checked()  # browsers differ
        assert ((ink(page)[:, 280] < 128).sum() > 30) == broad

    def test_is_undone_stroke_by_stroke(self, page: Page) -> None:
        undo = page.get_by_role("button", name="Undo")
        expect(undo).to_be_disabled()
        draw(page, *SQUARE)
        first = ink(page)
        draw(page, (0.1, 0.1), (0.9, 0.1))
        assert (ink(page) != first).any()
        undo.click()
        assert (ink(page) == first).all()
        assert np.array_equal(np.array(Image.open(io.BytesIO(sent(page))).convert("L")), first)
        page.keyboard.press("Control+Shift+z")  # in other programs, the opposite
        page.evaluate("document.getElementById('key-form').hidden = false")
        page.get_by_label("API key").press("Control+z")  # undoes what is typed there
        assert (ink(page) == first).all()
        page.get_by_label("API key").blur()  # hiding it would take the focus only a moment later
        page.evaluate("document.getElementById('key-form').hidden = true")
        page.keyboard.press("Control+z")
        expect(page.get_by_text("Draw one here")).to_be_visible()
        expect(page.locator("#bars .first")).to_have_count(0)
        expect(undo).to_be_disabled()

    def test_is_usually_classified_correctly(self, page: Page) -> None:
        """Ten simple drawings, outlines of a few lines each."""
        right = []
        for label, lines in DRAWINGS.items():
            page.get_by_role("button", name="Clear").click(force=True)
            for line in lines:
                draw(page, *line)
            expect(page.locator("#output")).to_have_attribute("aria-busy", "false")
            answer = page.locator("#label").inner_text().removeprefix("Not sure: perhaps ")
            right.append(answer == label)
        assert sum(right) >= 8, list(zip(DRAWINGS, right, strict=True))


def ink(page: Page) -> NDArray[np.uint8]:
    """Return the drawing's pixels [560, 560], 0 for black and 255 for white."""
    return gray(page, "paper")


def drop(page: Page, data: dict[str, Any]) -> None:
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 200, "y": 300, "data": data | {"dragOperationsMask": 1}}
        session.send("Input.dispatchDragEvent", event)


class TestCommand:
    @pytest.mark.parametrize(
        "name",
        [
            "mum's old trousers $1.png",
            "`touch x`!!\\\\.png",
            "été 👖.png",
            "-",
            "-d.png",
            "line\nbreak\x03'\t.png",
        ],
    )
    def test_does_what_the_page_did(
        self, page: Page, trousers: bytes, answer: dict[str, Any], tmp_path: Path, name: str
    ) -> None:
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed: apt-get install curl")
        (tmp_path / name).write_bytes(trousers)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        choose(page, trousers, name)
        expect_answer(page, answer)
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_text("Copied.")).to_be_visible()
        command = page.evaluate("navigator.clipboard.readText()")
        assert command.startswith("curl ")
        assert command.count("\n") == 2  # the name's control characters are escaped
        assert re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", command) == []
        done = subprocess.run(
            ["bash", "-c", command],  # noqa: S607 - whichever bash there is
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        del answer["pixels"]
        assert httpx.Response(200, content=done.stdout).json() == answer

    def test_is_copied_even_where_the_clipboard_is_denied(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        page.evaluate("delete Navigator.prototype.clipboard")  # as at insecure addresses
        choose(page, trousers)
        expect_answer(page, answer)
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_text("Copied.")).to_be_visible()
        assert page.evaluate("getSelection().toString()").startswith("curl ")


class TestErrors:
    def test_are_the_services_sentences(
        self, page: Page, client: httpx.Client, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        choose(page, b"no picture", "letter.txt", "text/plain")
        sentence = client.post(
            "/predict", content=b"no picture", headers={"content-type": "image/png"}
        ).json()["error"]
        expect(page.get_by_role("alert")).to_have_text(sentence)
        expect(page.locator("#bars .first")).to_have_count(0)  # the former answer is gone
        expect(page.locator("#label")).to_have_text("No answer")
        expect(page.locator("#latency")).not_to_contain_text("ms")
        expect(page.get_by_text("letter.txt")).to_be_visible()
        expect(page.locator("#picture")).to_be_hidden()  # a broken image's icon
        choose(page, trousers)
        expect_answer(page, answer)
        expect(page.get_by_role("alert")).to_be_empty()

    def test_are_sentences_when_the_service_is_gone(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        page.route("**/predict?echo=pixels", lambda route: route.abort(), times=1)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        choose(page, trousers)
        expect_answer(page, answer)

    @pytest.mark.parametrize(
        ("status", "body"),
        [(200, "{}"), (200, "null"), (413, "<html>"), (502, '{"error": {"id": 1}}')],
    )
    def test_are_sentences_when_another_server_answers(
        self, page: Page, trousers: bytes, answer: dict[str, Any], status: int, body: str
    ) -> None:
        def other(route: Route) -> None:
            route.fulfill(status=status, body=body)

        page.route("**/predict?echo=pixels", other, times=1)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_contain_text(f"is not the service: {status}")
        choose(page, trousers)
        expect_answer(page, answer)

    def test_of_the_service_itself_have_an_id_to_report(
        self, page: Page, client: httpx.Client, trousers: bytes
    ) -> None:
        statuses = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["responses"]
        examples = statuses["500"]["content"]["application/json"]["examples"]
        error = examples["internal_error"]["value"]
        page.route(
            "**/predict?echo=pixels", lambda route: route.fulfill(status=500, json=error), times=1
        )
        page.route("**/readyz", lambda route: route.abort())  # so that it is not tried again
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_contain_text(
            f"report the request id {error['request_id']}."
        )

    def test_speak_of_the_file_in_megabytes(self, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        path.write_bytes(bytes(12_000_000))
        page.set_input_files("#file", path)
        expect(page.get_by_role("alert")).to_have_text("The file is too large; send at most 10 MB.")

    def test_of_a_folder_are_not_the_services(self, page: Page, tmp_path: Path) -> None:
        drop(page, {"items": [], "files": [str(tmp_path)]})
        expect(page.get_by_role("alert")).to_have_text("The file cannot be read; choose another.")

    def test_of_dropped_text_leave_the_answer(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        drop(page, {"items": [{"mimeType": "text/plain", "data": "https://shop.example/1.jpg"}]})
        expect(page.get_by_role("alert")).to_contain_text("Save the picture first")
        expect_answer(page, answer)

    def test_about_the_key_ask_for_it_and_do_not_store_it(
        self, context: BrowserContext, serve: Serve, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        with (
            serve(api_key=KEY) as (url, _),
            opened(context, url) as page,
        ):
            expect(page.get_by_label("API key")).to_be_hidden()
            choose(page, trousers)
            field = page.get_by_label("API key")
            expect(field).to_be_focused()
            expect(page.get_by_role("alert")).to_have_text("The service needs an API key.")
            page.get_by_role("button", name="Clear").click()
            expect(field).to_be_hidden()
            choose(page, trousers)
            field.fill("wrong")
            field.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("does not accept this key")
            field.fill(f" {KEY} ")
            field.press("Enter")
            expect_answer(page, answer)
            expect(field).to_be_hidden()
            page.get_by_role("button", name="Why?").click()
            expect(page.locator("#heat")).to_be_visible()
            command = page.locator("#command").inner_text()
            assert '-H "Authorization: Bearer $BNLENET_API_KEY"' in command
            kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]
            assert KEY not in page.content() + page.url

    def test_have_a_button_to_try_again(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        retry = page.get_by_role("button", name="Try again")
        expect(retry).to_be_hidden()
        gone = [True]

        def meet(route: Route) -> None:
            route.abort() if gone[0] else route.continue_()

        page.route("**/readyz", lambda route: route.abort())  # it does not come back by itself
        page.route("**/predict?echo=pixels", meet)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        gone[0] = False
        retry.click()
        expect_answer(page, answer)
        expect(retry).to_be_hidden()

    @pytest.mark.parametrize("refusal", [503, 408, 429])
    def test_disappear_when_the_service_is_back(
        self, page: Page, trousers: bytes, answer: dict[str, Any], refusal: int
    ) -> None:
        status = [refusal]

        def meet(route: Route) -> None:
            if status[0] == 200:
                route.continue_()
            else:
                body = '{"error": "Busy.", "code": "overloaded", "request_id": "1"}'
                route.fulfill(status=status[0], body=body)

        page.route("**/readyz", meet)
        page.route("**/predict?echo=pixels", meet)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_have_text("Busy.")
        status[0] = 200
        expect_answer(page, answer)
        expect(page.get_by_role("alert")).to_be_empty()

    def test_make_the_page_ask_less_and_less_often_whether_the_service_is_back(
        self, browser: Browser, base_url: str, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        """After 1, 2, 4, 8 and 8 seconds; after an answer it begins anew."""
        gone, asked = [True], []

        def meet(route: Route) -> None:
            route.abort() if gone[0] else route.continue_()

        with (
            browser.new_context() as context,  # whose clock no other test uses
            opened(context, base_url) as page,
        ):
            page.on("requestfailed", lambda request: asked.append(request.url))
            page.clock.install(time=0)
            page.clock.pause_at(3600)
            page.route("**/readyz", lambda route: route.abort())
            page.route("**/predict?echo=pixels", meet)
            for pauses in ((1, 2, 4, 8, 8), (1, 2)):
                gone[0] = True
                choose(page, trousers)
                expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
                for seconds in pauses:
                    asked.clear()
                    page.clock.run_for(1000 * seconds - 1)
                    page.evaluate(
                        "fetch('livez')"
                    )  # a round trip, after which a check would be seen
                    assert asked == []
                    with page.expect_event("requestfailed"):
                        page.clock.run_for(1)
                    page.evaluate("fetch('livez')")
                gone[0] = False
                page.get_by_role("button", name="Try again").click()
                expect_answer(page, answer)

    def test_of_pictures_are_not_tried_again(self, page: Page) -> None:
        requests: list[str] = []
        choose(page, b"no picture", "letter.txt")
        expect(page.get_by_role("alert")).not_to_be_empty()
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()
        page.on("request", lambda request: requests.append(request.url))
        page.wait_for_timeout(1500)
        assert requests == []

    def test_of_replaced_pictures_are_not_shown(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        page.route("**/predict?echo=pixels", lambda _: None, times=1)  # gets no answer
        page.evaluate(
            """() => {
            globalThis.said = [];
            const alert = document.getElementById("error");
            new MutationObserver(() => said.push(alert.textContent))
              .observe(alert, { childList: true, characterData: true, subtree: true });
            }"""
        )
        choose(page, png(Image.new("L", (28, 28))), "black.png")
        expect(page.locator("#output")).to_have_attribute("aria-busy", "true")
        choose(page, trousers)
        expect_answer(page, answer)
        assert set(page.evaluate("said")) <= {""}


class TestAnswer:
    """The page shows any text from the service literally."""

    def meet(self, page: Page, answer: dict[str, Any], status: int = 200) -> None:
        page.route(
            "**/predict?echo=pixels",
            lambda route: route.fulfill(status=status, json=answer),
            times=1,
        )

    def test_is_text_whatever_it_looks_like(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        html = "<img src=x onerror=alert(1)><b>&lt;"
        images = page.locator("img").count()
        self.meet(page, {"error": html, "code": "x", "request_id": "1"}, 422)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_have_text(html)
        for each in (answer, *answer["predictions"]):
            each["label"] = html
        answer["notes"] = [html]
        answer["model"]["revision"] = html
        page.route(
            "**/readyz",
            lambda route: route.fulfill(json={"model": dict.fromkeys(READY, html)}),
            times=1,
        )
        self.meet(page, answer)
        choose(page, trousers)
        expect(page.locator("#label")).to_have_text(html)
        expect(page.locator("#bars .first span").first).to_have_text(html)
        expect(page.locator("#notes li")).to_have_text([html])
        expect(page.locator("#revision")).to_have_text(html)
        expect(page.locator("#spoken")).to_contain_text(html)
        page.get_by_role("button", name="Why?").click()
        expect(page.locator("#reason")).to_contain_text(html)
        assert page.locator("img").count() == images
        assert page.locator("#output b, #notes b, #reason b, footer b, #error b").count() == 0

    def test_loses_its_notes_to_the_next(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        self.meet(page, answer | {"notes": ["First.", "Second."]})
        choose(page, trousers)
        expect(page.locator("#notes li")).to_have_text(["First.", "Second."])
        self.meet(page, answer | {"notes": ["Third."]})
        choose(page, trousers)
        expect(page.locator("#notes li")).to_have_text(["Third."])
        choose(page, trousers)
        expect_answer(page, answer)
        expect(page.locator("#notes li")).to_have_count(0)
        self.meet(page, answer | {"notes": ["Fourth."]})
        choose(page, trousers)
        expect(page.locator("#notes li")).to_have_count(1)
        choose(page, b"no picture", "letter.txt")
        expect(page.get_by_role("alert")).not_to_be_empty()
        expect(page.locator("#notes li")).to_have_count(0)

    def test_is_not_a_verdict_if_the_model_is_unsure(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        unsure = "Not sure: two classes are about as likely."
        self.meet(page, answer | {"notes": ["The background is not plain.", unsure]})
        choose(page, trousers)
        expect(page.locator("#label")).to_have_text(f"Not sure: perhaps {answer['label']}")
        expect(page.locator("#notes li").last).to_have_text(unsure)
        expect(page.locator("#spoken")).to_contain_text("Not sure")
        color = (
            """getComputedStyle(document.querySelector("#bars i"), "::before").backgroundColor"""
        )
        pale = page.evaluate(color)
        choose(page, trousers)
        expect_answer(page, answer)
        assert page.evaluate(color) != pale

    def test_names_no_garment_on_a_blank_picture(self, page: Page) -> None:
        page.get_by_label("Eraser").check()
        draw(page, (0.4, 0.5), (0.6, 0.5))  # nothing is there to erase
        expect(page.locator("#label")).to_have_text("No garment")
        expect(page.locator("#output")).to_have_class(re.compile("unsure"))
        expect(page.locator("#spoken")).to_have_text("No garment")

    def test_is_explained_by_what_covering_a_part_changes(
        self, page: Page, client: httpx.Client
    ) -> None:
        why = page.get_by_role("button", name="Why?")
        expect(why).to_be_disabled()
        page.get_by_role("button", name="Coat", exact=True).click()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        expect(why).to_be_enabled()
        why.click()
        expect(page.locator("#heat")).to_be_visible()
        assert [url.rpartition("/")[2] for url in requests if "/v2/" in url] == ["infer"]
        pixels = gray(page, "seen")
        losses, answers = occluded(client, pixels)
        worst = max(losses, key=losses.__getitem__)
        label, share = answers[worst]
        expect(page.locator("#reason")).to_contain_text(f"Without the framed part: {label}, ")
        expect(page.locator("#reason")).to_contain_text(percent(share))
        frame = gray(page, "heat")[[y + 5 for y in range(worst[1] * 10, worst[1] * 10 + 50)], :]
        assert (frame[:, worst[0] * 10] == 255).all()  # the white line on the left of it
        sums, counts = np.zeros((28, 28)), np.zeros((28, 28))
        for (x, y), loss in losses.items():
            sums[y : y + 6, x : x + 6] += loss
            counts[y : y + 6, x : x + 6] += 1
        means = sums / counts
        red = gray(page, "heat")[5::10, 5::10]  # the middle of each pixel
        assert red[means == means.max()].min() > 220  # orange speaks for the answer
        assert means.min() < -0.1 * means.max()
        assert red[means == means.min()].max() < 120  # blue speaks against it
        why.click()
        expect(page.locator("#heat")).to_be_hidden()
        expect(page.locator("#reason")).to_be_empty()
        why.click()
        expect(page.locator("#heat")).to_be_visible()
        page.get_by_role("button", name="Bag", exact=True).click()
        expect(page.locator("#label")).to_have_text("Bag")
        expect(page.locator("#heat")).to_be_hidden()  # the map was the coat's

    def test_is_not_explained_if_the_service_does_not_answer(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        why, reason = page.get_by_role("button", name="Why?"), page.locator("#reason")
        choose(page, trousers)
        expect_answer(page, answer)
        page.route("**/infer", lambda route: route.abort(), times=1)
        why.click()
        expect(reason).to_have_text("The service did not answer; try again.")
        expect(page.locator("#heat")).to_be_hidden()
        expect(why).to_have_attribute("aria-pressed", "false")
        why.click()
        expect(page.locator("#heat")).to_be_visible()

    def test_that_no_part_changes_is_explained_in_a_sentence(self, page: Page) -> None:
        """Covering any part of a picture of 0 changes nothing."""
        choose(page, png(Image.new("L", (28, 28))))
        page.get_by_role("button", name="Why?").click()
        expect(page.locator("#reason")).to_contain_text("No single part matters")
        assert not (gray(page, "heat") == 255).any()  # no part has a frame

    def test_of_another_picture_is_not_explained(self, page: Page, trousers: bytes) -> None:
        """The map of the first one arrives when the second one is shown."""
        held: list[Route] = []
        page.route("**/infer", lambda route: held.append(route), times=1)  # noqa: PLW0108 - Playwright takes no methods of lists
        choose(page, trousers)
        why = page.get_by_role("button", name="Why?")
        expect(why).to_be_enabled()
        why.click()
        page.get_by_role("button", name="Bag", exact=True).click()
        expect(page.locator("#label")).to_have_text("Bag")
        with page.expect_response("**/infer"):
            held[0].continue_()
        page.wait_for_timeout(100)  # for what must not happen
        expect(page.locator("#heat")).to_be_hidden()
        expect(page.locator("#reason")).to_be_empty()

    def test_has_a_link_that_opens_it_inside(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        page.get_by_role("link", name="Inside", exact=True).click()
        expect(page.locator("#verdict")).to_contain_text(answer["label"])
        assert (gray(page, "given") == np.array(answer["pixels"])).all()


def occluded(
    client: httpx.Client, pixels: NDArray[np.uint8]
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], tuple[str, float]]]:
    """Return, for each covered square of a picture, the loss in log-odds and the new answer."""
    shape = [1, 1, 28, 28]

    def classify(image: NDArray[np.uint8]) -> dict[str, float]:
        tensor = {"name": "pixels", "shape": shape, "datatype": "UINT8", "data": image.tolist()}
        request = {"inputs": [tensor], "parameters": {"preprocessing": "dataset"}}
        answer = client.post("/v2/models/bn-lenet/infer", json=request).json()
        return dict(zip(CLASS_NAMES, answer["outputs"][0]["data"], strict=True))

    def odds(answer: dict[str, float]) -> float:
        return float(np.log(answer[label]) - np.log(sum(answer.values()) - answer[label]))

    whole = classify(pixels)
    label = max(whole, key=whole.__getitem__)
    losses, answers = {}, {}
    steps = [int(step * 22 / 9 + 0.5) for step in range(10)]
    for x, y in ((x, y) for y in steps for x in steps):
        covered = pixels.copy()
        covered[y : y + 6, x : x + 6] = 0
        answer = classify(covered)
        losses[x, y] = odds(whole) - odds(answer)
        best = max(answer, key=answer.__getitem__)
        answers[x, y] = (f"still {best}" if best == label else best, answer[best])
    return losses, answers


class TestEverybody:
    def test_can_reach_every_control_with_the_tab_key(self, page: Page, trousers: bytes) -> None:
        choose(page, trousers)
        expect(page.get_by_role("button", name="Copy")).to_be_enabled()
        met = []
        for _ in range(19):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(
                """() => {
                const e = document.activeElement;
                const { outlineStyle } = getComputedStyle(e.closest("label") ?? e);
                return [e.id || e.title || e.value || e.textContent, outlineStyle];
                }"""
            )
            met.append(name)
            assert outline == "solid", name
        assert met == [  # and no others
            *("Look inside", "Documentation", "file", "camera"),
            *EXAMPLES.values(),
            *("fine", "clear", "why", "inside", "copy"),
        ]

    def test_opens_the_chooser_with_the_keyboard(self, page: Page) -> None:
        page.on("filechooser", lambda _: None)  # from now on, not only from the key on
        page.get_by_label("Choose a picture").focus()
        with page.expect_file_chooser():
            page.get_by_label("Choose a picture").press("Space")

    def test_hears_the_answer(self, page: Page, trousers: bytes, answer: dict[str, Any]) -> None:
        choose(page, trousers)
        confidence = percent(answer["confidence"])
        heard = page.get_by_role("status").filter(has_text=f"{answer['label']}, {confidence}")
        expect(heard).to_have_count(1)
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        bars = page.get_by_role("region", name="The answer").get_by_role("listitem")
        expect(bars).to_have_count(10)
        for name in ("The picture", "What the model saw", "The same request from a terminal"):
            expect(page.get_by_role("region", name=name)).to_have_count(1)
        nameless = page.locator("button, a, input, canvas").filter(visible=True)
        for i in range(nameless.count()):
            expect(nameless.nth(i)).to_have_accessible_name(re.compile(r"\w"))

    def test_can_read_it_in_light_and_dark_schemes(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        texts = []
        for dark in (False, True):
            page.emulate_media(color_scheme="dark" if dark else "light")
            ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 3 * 128) == dark
            texts += page.evaluate(CONTRASTS)
            choose(page, b"no picture", "letter.txt")
            expect(page.get_by_role("alert")).not_to_be_empty()
            texts += page.evaluate(CONTRASTS)
            choose(page, trousers)
            expect_answer(page, answer)
            texts += page.evaluate(CONTRASTS)
            page.get_by_role("button", name="Clear").click()
        assert len(texts) > 120
        assert [(text, ratio) for text, ratio in texts if ratio < 4.5] == []

    def test_scrolls_in_one_direction_only(self, page: Page, trousers: bytes) -> None:
        for width in (320, 390, 800):
            page.set_viewport_size({"width": width, "height": 700})
            for name in ("a.png", f"{'very' * 40}.png"):
                choose(page, trousers, name)
                expect(page.locator("#command")).to_contain_text(name)
                assert page.evaluate("document.documentElement.scrollWidth") <= width

    def test_sees_picture_and_answer_together_at_twice_the_size(self, page: Page) -> None:
        page.set_viewport_size({"width": 640, "height": 450})  # of a screen of 1280 x 900
        stage, answer = (page.locator(name).bounding_box() for name in ("#stage", "#label"))
        assert stage is not None
        assert answer is not None
        assert answer["x"] > stage["x"] + stage["width"]
        assert answer["y"] < 450

    def test_sees_picture_and_answer_on_a_phone_while_drawing(self, page: Page) -> None:
        page.set_viewport_size({"width": 375, "height": 667})
        draw(page, *SQUARE)
        expect(page.locator("#bars .first")).to_have_count(1)
        assert page.evaluate("scrollY") == 0
        own = ("label:has(#file)", "label:has(#camera)")
        for place in (*own, "#paper", "#seen", "#label", "#bars li:nth-child(5)"):
            box = page.locator(place).bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 667
        paper, seen = (page.locator(name).bounding_box() for name in ("#paper", "#seen"))
        assert paper is not None
        assert seen is not None
        assert seen["x"] >= paper["x"] + paper["width"]  # the space where a finger scrolls
        assert seen["width"] > 100

    def test_can_tap_on_a_phone(self, browser: Browser, base_url: str) -> None:
        """The targets are large, and no tap scrolls the drawing out of sight."""
        with (
            browser.new_context(
                has_touch=True, is_mobile=True, viewport={"width": 375, "height": 667}
            ) as context,
            opened(context, base_url) as page,
        ):
            draw(page, *SQUARE)
            expect(page.locator("#bars .first")).to_have_count(1)
            for target in page.locator("button, .button, .tools label").filter(visible=True).all():
                box = target.bounding_box()
                assert box is not None
                assert box["height"] >= 40
            page.get_by_role("button", name="Clear").tap()
            expect(page.get_by_label("Fine pen")).to_be_focused()
            assert page.evaluate("scrollY") == 0

    def test_needs_few_bytes(self, client: httpx.Client) -> None:
        """Each page with all its files, except the weights."""
        sizes = {name: len(client.get(f"/{name}").content) for name in FILES}
        pictures = sum(size for name, size in sizes.items() if name.endswith(".svg"))
        shared = pictures + sizes["static/style.css"]
        drawing = sizes["static/examples.js"] + sizes["static/paper.js"]
        ask = sizes[""] + sizes["static/app.js"] + sizes["static/why.js"] + shared + drawing
        assert ask < 50_000
        inside = [f"static/inside.{kind}" for kind in ("js", "css")]
        inside += ["inside", "static/network.js"]
        assert sum(sizes[name] for name in inside) + shared + drawing < 50_000
        assert sizes["docs"] + sizes["static/docs.js"] + sizes["static/docs.css"] + shared < 50_000

    def test_sees_no_motion_with_reduced_motion(self, page: Page) -> None:
        bar = """getComputedStyle(document.querySelector("#bars i"), "::before")"""
        assert page.evaluate(f"{bar}.transitionDuration") == "0s"
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate(f"{bar}.transitionDuration") == "0.35s"
