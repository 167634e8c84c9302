"""The forms of a body: their limits, and forms that are read in memory."""

import sys
import tempfile

import pytest

from service.errors import BadRequest, InvalidInput, UnsupportedMediaType
from service.routes.bodies import MAX_CONTENT_TYPE_BYTES, body_limit, read_body

FORM = b"multipart/form-data; boundary=b"


def form(content: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return head + content + b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("content_type", "limit"),
    [
        (b"application/octet-stream", 1024),
        (b"application/json", 262_144),
        (b"Application/JSON ; charset=utf-8", 262_144),
        (FORM, sys.maxsize),
        (b"image/png", sys.maxsize),
        (b"IMAGE/x-unknown", sys.maxsize),
    ],
)
def test_the_limit_of_a_body_depends_on_its_media_type(content_type: bytes, limit: int) -> None:
    """For pictures and forms, only the service's own limit counts."""
    assert body_limit({b"content-type": content_type}) == limit


@pytest.mark.parametrize(
    "headers", [{}, {b"content-type": b"text/plain"}, {b"content-type": b"imagepng"}]
)
def test_another_media_type_is_refused(headers: dict[bytes, bytes]) -> None:
    with pytest.raises(UnsupportedMediaType, match="Set Content-Type to application/json"):
        body_limit(headers)


def test_json_in_any_layout_is_below_its_limit() -> None:
    """Also each pixel in a line of its own, far from the margin."""
    layout = b'{"pixels": [\n' + b",\n".join([b" " * 300 + b"255"] * 784) + b"]}"
    assert len(layout) < body_limit({b"content-type": b"application/json"})
    assert not isinstance(image := read_body(b"application/json", layout), bytes)
    assert (image.pixels == 255).all()


def test_a_forms_file_is_never_written_to_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The container's file system is read-only."""

    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, full)
    content = bytes(range(256)) * 20_000
    assert read_body(FORM, form(content)) == content


def test_a_form_has_at_most_a_hundred_delimiters() -> None:
    """Those in its file count too, and so does the one at the end."""
    assert read_body(FORM, form(b"\r\n--bx" * 99)) == b"\r\n--bx" * 99
    with pytest.raises(InvalidInput, match="one file in the form"):
        read_body(FORM, form(b"\r\n--bx" * 100))


@pytest.mark.parametrize("more", [0, 1])
def test_the_content_type_of_a_form_is_short(more: int) -> None:
    """Its parser would block the event loop for 40 ms, for a head of 32 KB."""
    content_type = FORM.ljust(MAX_CONTENT_TYPE_BYTES + more, b";")
    if more:
        with pytest.raises(BadRequest, match="Content-Type"):
            read_body(content_type, form(b"content"))
    else:
        assert read_body(content_type, form(b"content")) == b"content"


def test_a_part_of_a_form_has_a_short_head() -> None:
    """Its parser takes a microsecond for each byte of it; old versions had no limit."""
    long = form(b"content").replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 1)
    with pytest.raises(BadRequest, match="form is damaged"):
        read_body(FORM, long)
