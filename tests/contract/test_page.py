"""The page, as people meet it: in a real Chromium, with mouse, keyboard, clipboard and phone."""

import io
import re
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.contract.browser import CONTRASTS, INSECURE, draw, gray, opened
from tests.contract.conftest import Serve

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


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def trousers() -> bytes:
    """Return a PNG of trousers, drawn here, dark on white."""
    image = Image.new("RGB", (300, 400), "white")
    outline = [(90, 40), (210, 40), (240, 360), (180, 360), (150, 140), (120, 360), (60, 360)]
    ImageDraw.Draw(image).polygon(outline, (60, 80, 130))
    return png(image)


@pytest.fixture
def page(context: BrowserContext, base_url: str) -> Iterator[Page]:
    context.clear_permissions()
    with opened(context, base_url) as page:
        yield page


def choose(page: Page, content: bytes, name: str = "trousers.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def expect_answer(page: Page, answer: dict[str, Any]) -> None:
    """Wait until the page shows this answer, and all of it."""
    expected = {each["label"]: percent(each["probability"]) for each in answer["predictions"]}
    expect(page.locator("#bars .first span").first).to_have_text(answer["label"])
    expect(page.locator("#label")).to_have_text(answer["label"])
    rows = [re.split(r"\s*\n+\s*", row) for row in page.locator("#bars li").all_inner_texts()]
    assert [tuple(row) for row in rows] == list(expected.items())  # by falling probability
    assert (gray(page, "seen") == np.array(answer["pixels"])).all()


@pytest.fixture
def answer(client: httpx.Client, trousers: bytes) -> dict[str, Any]:
    """Return what the service says of the trousers."""
    return ask(client, trousers)


class TestFiles:
    @pytest.mark.parametrize("path", FILES)
    def test_allow_nothing_but_this_server(self, client: httpx.Client, path: str) -> None:
        headers = client.get(f"/{path}").raise_for_status().headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy == {
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

    @pytest.mark.parametrize("path", FILES)
    def test_are_kept_by_browsers_but_asked_about(self, client: httpx.Client, path: str) -> None:
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
        expect(page.locator("#preprocessing")).to_contain_text("Converted")
        expect(page.locator("#latency")).to_have_text(re.compile(r"^[\d.]+ ms$"))
        model = client.get("/readyz").json()["model"]
        expect(page.locator("#model")).to_have_text("bn-lenet 1")
        expect(page.locator("#revision")).to_have_text(model["revision"])
        expect(page.locator("#accuracy")).to_have_text(percent(float(model["test_accuracy"])))
        assert model["provider"].startswith(page.locator("#provider").inner_text())

    def test_has_bars_as_long_as_it_is_probable(
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

    def test_is_known_to_be_awaited_while_it_takes_long(
        self, page: Page, trousers: bytes, answer: dict[str, Any]
    ) -> None:
        choose(page, trousers)
        expect_answer(page, answer)
        held: list[Route] = []
        page.route("**/predict?echo=pixels", lambda route: held.append(route))  # noqa: PLW0108 - Playwright takes no methods of lists
        choose(page, trousers, "again.png")
        expect(page.locator("#label")).to_have_text("Looking …")
        expect(page.locator("#bars .first")).to_have_count(0)  # it was the former picture's
        expect(page.locator("#latency")).not_to_contain_text("ms")
        held[0].continue_()
        expect_answer(page, answer)

    def test_chosen_anew_under_its_name_is_asked_anew(
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

    def test_may_be_named_like_a_page(self, page: Page, trousers: bytes) -> None:
        name = "<img src=x onerror=alert(1)>&lt;b>.png"
        choose(page, trousers, name)
        expect(page.get_by_role("img", name=name)).to_be_visible()
        expect(page.locator("#command")).to_contain_text(f"'@{name}'")
        assert page.locator("img").count() == 1 + len(EXAMPLES)

    def test_of_28_x_28_is_taken_as_it_came(self, page: Page) -> None:
        gray = (np.outer(np.arange(28), np.arange(28)) % 256).astype(np.uint8)
        choose(page, png(Image.fromarray(gray)))
        expect(page.locator("#preprocessing")).to_contain_text("Taken as it came")

    def test_dropped(self, page: Page, trousers: bytes, answer: dict[str, Any]) -> None:
        given = ["image/png", "trousers.png", b64encode(trousers).decode()]
        page.evaluate(GIVE, ["dragenter", *given])
        expect(page.locator("#stage")).to_have_class(re.compile("over"))
        page.evaluate(GIVE, ["drop", *given])
        expect_answer(page, answer)
        expect(page.locator("#stage")).not_to_have_class(re.compile("over"))
        expect(page.get_by_role("img", name="trousers.png")).to_be_visible()

    def test_dragged_over_one_element_and_the_next_is_expected_still(self, page: Page) -> None:
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

    def test_that_comes_later_takes_the_place_of_one_still_under_way(
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
    """Wait for the answer, and return the picture that it is about."""
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
    def test_is_answered_while_it_grows(self, page: Page, client: httpx.Client) -> None:
        page.emulate_media(color_scheme="dark")  # what is sent must not depend on it
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

    def test_is_cleared_and_begun_anew(self, page: Page) -> None:
        draw(page, (0.2, 0.2), (0.8, 0.8))
        expect(page.locator("#bars .first")).to_have_count(1)
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#bars .first")).to_have_count(0)
        expect(page.get_by_text("Draw one here")).to_be_visible()
        expect(page.get_by_role("button", name="Copy")).to_be_disabled()
        draw(page, (0.8, 0.2), (0.8, 0.2))
        paper = np.array(Image.open(io.BytesIO(sent(page))).convert("L"))
        assert 0 < (paper < 128).mean() < 0.02  # one dot, and nothing of the first drawing

    def test_follows_the_mouse_where_pages_come_without_tls(
        self, browser: Browser, base_url: str
    ) -> None:
        """To a browser 127.0.0.1 is secure and may do more than a phone on the same network."""
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
        """A second finger's touches are not joined to the first one's."""
        box = page.locator("#paper").bounding_box()
        assert box is not None
        touches = [
            {"x": box["x"] + share * box["width"], "y": box["y"] + 30} for share in (0.2, 0.8)
        ]
        session = page.context.new_cdp_session(page)
        for points in (touches[:1], touches, []):
            kind = "touchStart" if points else "touchEnd"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        expect(page.locator("#bars .first")).to_have_count(1)
        ink = np.array(Image.open(io.BytesIO(sent(page))).convert("L")) < 128
        half = len(ink) // 2
        assert ink[:, :half].any()
        assert not ink[:, half:].any()


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
        assert command.count("\n") == 2  # none of the name's own, nor other steering of a terminal
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
        page.evaluate("delete Navigator.prototype.clipboard")  # thus on insecure addresses
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
        ("status", "body"), [(200, "{}"), (200, "null"), (413, "<html>"), (502, '{"oops": 1}')]
    )
    def test_are_sentences_when_something_else_answers(
        self, page: Page, trousers: bytes, answer: dict[str, Any], status: int, body: str
    ) -> None:
        def other(route: Route) -> None:
            route.fulfill(status=status, body=body)

        page.route("**/predict?echo=pixels", other, times=1)
        choose(page, trousers)
        expect(page.get_by_role("alert")).to_contain_text(f"is not the service: {status}")
        choose(page, trousers)
        expect_answer(page, answer)

    def test_speak_of_the_file_in_megabytes(self, page: Page, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        path.write_bytes(bytes(12_000_000))
        page.set_input_files("#file", path)
        expect(page.get_by_role("alert")).to_have_text("The file is too large; send at most 10 MB.")

    def test_of_a_folder_are_not_the_services(self, page: Page, tmp_path: Path) -> None:
        session = page.context.new_cdp_session(page)
        data = {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": 200, "y": 300, "data": data}
            session.send("Input.dispatchDragEvent", event)
        expect(page.get_by_role("alert")).to_have_text("The file cannot be read; choose another.")

    def test_about_the_key_ask_for_it_and_keep_it_nowhere(
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
            expect(page.get_by_role("alert")).to_have_text("The service wants an API key.")
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
            command = page.locator("#command").inner_text()
            assert '-H "Authorization: Bearer $BNLENET_API_KEY"' in command
            kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
            assert kept == [0, 0, ""]
            assert KEY not in page.content() + page.url


class TestEverybody:
    def test_tabs_through_visible_places(self, page: Page, trousers: bytes) -> None:
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
        assert met == [  # and nothing that does nothing
            *("Look inside", "Documentation"),
            *EXAMPLES.values(),
            *("fine", "clear", "why", "inside", "file", "camera", "copy"),
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
        for name in ("The picture", "What the model saw", "The same from a terminal"):
            expect(page.get_by_role("region", name=name)).to_have_count(1)
        nameless = page.locator("button, a, input, canvas").filter(visible=True)
        for i in range(nameless.count()):
            expect(nameless.nth(i)).to_have_accessible_name(re.compile(r"\w"))

    def test_can_read_it_by_day_and_by_night(
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

    def test_sees_no_motion_who_wants_none(self, page: Page) -> None:
        bar = """getComputedStyle(document.querySelector("#bars i"), "::before")"""
        assert page.evaluate(f"{bar}.transitionDuration") == "0s"
        page.emulate_media(reduced_motion="no-preference")
        assert page.evaluate(f"{bar}.transitionDuration") == "0.35s"
