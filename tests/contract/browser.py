"""The pages in a real Chromium: how they are opened, drawn on and looked at in tests."""

import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import BrowserContext, ConsoleMessage, Error, Page, Request, expect

INSECURE = "shop.example"  # a name, which to Chromium is not this machine's own
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
    f"--host-resolver-rules=MAP {INSECURE} 127.0.0.1",
]
FAILED = r"Failed to load resource: (the server responded with a status of [45]|net::ERR_F)"
CONTRASTS = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (color) => numbers(color).slice(0, 3)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return numbers(color)[3] === 0 ? ground(e.parentElement) : color;
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && e.innerText
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((e) => !e.matches(":disabled"))
    .map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => x - y);
      return [e.innerText, (b + 0.05) / (a + 0.05)];
    });
}"""  # WCAG 2.2, "contrast ratio" and "relative luminance"; it asks nothing of what is disabled
LISTEN = (
    "addEventListener('securitypolicyviolation',"
    " (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"
)


@contextmanager
def opened(context: BrowserContext, url: str, path: str = "/") -> Iterator[Page]:
    """Open a page in a tab of its own; in the end, nothing may have gone wrong behind its face."""
    page = context.new_page()
    with visited(page, url, path):
        yield page
    page.close()


@contextmanager
def visited(page: Page, url: str, path: str = "/") -> Iterator[Page]:
    """Open a page in a tab that others use, too, which takes half the time of a new one."""
    problems: list[str] = []

    def failed(error: Error) -> None:
        problems.append(str(error))

    def told(message: ConsoleMessage) -> None:
        if message.type == "error":
            problems.append(message.text)

    def asked(request: Request) -> None:
        problems.append(request.url)

    page.set_default_timeout(15_000)
    size = page.viewport_size
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.add_init_script(LISTEN)
    page.on("pageerror", failed)
    page.on("console", told)
    page.on("request", asked)
    page.goto(f"{url}{path}")
    if path == "/":
        expect(page.locator("#revision")).to_have_text(re.compile("^[0-9a-f]{12}$"))
    yield page
    page.unroute_all()
    page.goto("about:blank")
    if size is not None:
        page.set_viewport_size(size)
    page.remove_listener("pageerror", failed)
    page.remove_listener("console", told)
    page.remove_listener("request", asked)
    harmless = re.compile(rf"{url}/|blob:{url}/|about:blank|{FAILED}")
    assert [problem for problem in problems if not harmless.match(problem)] == []


def draw(page: Page, *points: tuple[float, float]) -> None:
    """Draw a line with the mouse; positions are shares of the paper's sides."""
    box = page.locator("#paper").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


def gray(page: Page, canvas: str) -> NDArray[np.uint8]:
    """Return the red of every pixel of a canvas, [height, width]."""
    width, data = page.evaluate(
        """(id) => {
        const canvas = document.getElementById(id);
        const { data, width } = canvas.getContext("2d")
          .getImageData(0, 0, canvas.width, canvas.height);
        return [width, data.filter((_, i) => i % 4 === 0).toHex?.() ?? [...data].filter(
          (_, i) => i % 4 === 0).map((v) => v.toString(16).padStart(2, "0")).join("")];
        }""",
        canvas,
    )
    return np.frombuffer(bytes.fromhex(data), np.uint8).reshape(-1, width)


def in_hash(pixels: Sequence[int] | NDArray[np.uint8]) -> str:
    """Return the address of /inside for 784 pixels."""
    return f"/inside#{b64encode(bytes(np.asarray(pixels, np.uint8))).decode()}"
