"""Bodies are read whole, within limits, and unpacked within the same limits."""

import asyncio
import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    BadRequest,
    LengthRequired,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from service.http.exchange import UNPACKED_AT_ONCE, ClientGone, Exchange, Room

LIMIT = 1000


def make_room(each: int = LIMIT, left: int = 8 * LIMIT) -> Room:
    return Room(each, left, lambda: False)


def read(
    pieces: list[bytes],
    headers: dict[bytes, bytes] | None = None,
    *,
    room: Room | None = None,
    gone: bool = False,
) -> tuple[bytes, int]:
    """Return the body as read and how many messages were received for it."""
    messages: Iterator[dict[str, Any]] = iter(
        [
            {"type": "http.request", "body": piece, "more_body": gone or i < len(pieces) - 1}
            for i, piece in enumerate(pieces)
        ]
        + [{"type": "http.disconnect"}]
    )
    received = 0

    async def receive() -> Any:
        nonlocal received
        received += 1
        return next(messages)

    headers = {b"transfer-encoding": b"chunked"} if headers is None else headers
    exchange = Exchange({}, receive, headers, b"id", 0.0, room or make_room())
    body = asyncio.run(exchange.body())
    assert exchange.complete
    return body, received


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_a_body_is_the_same_however_it_is_cut(pieces: list[bytes]) -> None:
    room = make_room()
    assert read(pieces, room=room) == (b"".join(pieces), len(pieces))
    assert room.left == 8 * LIMIT


@pytest.mark.parametrize("name", [b"gzip", b"x-gzip", b"GZIP ", b"deflate", b"raw", b"identity"])
@given(plain=st.binary(max_size=LIMIT))
def test_an_encoded_body_is_unpacked(name: bytes, plain: bytes) -> None:
    packers: dict[bytes, Callable[[bytes], bytes]] = {
        b"deflate": zlib.compress,
        b"raw": lambda data: zlib.compress(data, wbits=-15),
        b"identity": bytes,
    }
    packed = packers.get(name, gzip.compress)(plain)
    encoding = b"deflate" if name == b"raw" else name
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": encoding}
    if len(packed) <= LIMIT:
        assert read([packed], headers) == (plain, 1)


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate"]))
def test_other_bytes_in_an_encoding_are_a_bad_request(body: bytes, encoding: bytes) -> None:
    headers = {b"content-length": b"%d" % len(body), b"content-encoding": encoding}
    try:
        plain, _ = read([body], headers)
    except (BadRequest, PayloadTooLarge):
        return
    assert zlib.decompressobj(-15 if encoding == b"deflate" else 47).decompress(body) == plain


def test_a_body_announced_too_large_is_not_read() -> None:
    with pytest.raises(PayloadTooLarge):
        read([], {b"content-length": b"1001"})


def test_reading_stops_where_a_body_grows_too_large() -> None:
    room = make_room()
    with pytest.raises(PayloadTooLarge):
        read([bytes(600)] * 1000, room=room)
    assert room.left == 8 * LIMIT


def test_a_single_piece_too_large_is_refused() -> None:
    with pytest.raises(PayloadTooLarge):
        read([bytes(LIMIT + 1)])


def test_all_unfinished_bodies_together_are_bounded() -> None:
    room = make_room(left=500)
    with pytest.raises(Overloaded) as caught:
        read([bytes(300)] * 3, room=room)
    assert caught.value.headers == {"Retry-After": "1"}
    assert room.left == 500


def test_a_slow_sender_is_sent_away_for_room() -> None:
    asked = 0

    def send_away() -> bool:
        nonlocal asked
        asked += 1
        return asked < 2

    room = Room(LIMIT, 500, send_away)
    assert read([bytes(300)] * 2 + [b""], room=room) == (bytes(600), 3)
    with pytest.raises(Overloaded):
        read([bytes(300)] * 2 + [b""], room=room)
    assert room.left == 500


@pytest.mark.parametrize("name", ["gzip", "deflate"])
@pytest.mark.parametrize("more", [-1, 0, 1, 257, 1_000_000])
def test_what_takes_long_is_unpacked_in_a_thread(
    name: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost where the thread goes on, and what is short needs none."""
    threads = 0
    to_thread = asyncio.to_thread

    async def counted(*call: Any) -> Any:
        nonlocal threads
        threads += 1
        return await to_thread(*call)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    plain = (b"0123456789" * 200_000)[: UNPACKED_AT_ONCE + more]
    packed = (gzip.compress if name == "gzip" else zlib.compress)(plain)
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": name.encode()}
    assert read([packed], headers, room=make_room(2_000_000)) == (plain, 1)
    assert threads == (more >= 0)
    with pytest.raises(BadRequest):
        read([packed[:-1]], headers, room=make_room(2_000_000))
    for limit in {len(plain) - 1, min(len(plain), UNPACKED_AT_ONCE) - 1, LIMIT}:
        with pytest.raises(PayloadTooLarge):
            read([packed], headers, room=make_room(limit))


def test_a_bomb_is_unpacked_no_further_than_the_limit() -> None:
    bomb = zlib.compress(bytes(500_000))
    assert len(bomb) < LIMIT
    with pytest.raises(PayloadTooLarge):
        read([bomb], {b"content-length": b"0", b"content-encoding": b"deflate"})


def test_more_after_the_end_of_an_encoding_is_refused() -> None:
    twice = gzip.compress(b"a") + gzip.compress(b"b")
    with pytest.raises(BadRequest):
        read([twice], {b"content-length": b"0", b"content-encoding": b"gzip"})


def test_an_unknown_encoding_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        read([b"x"], {b"content-length": b"1", b"content-encoding": b"br"})
    assert caught.value.headers == {"Accept-Encoding": "gzip, deflate"}


def test_no_announced_body_is_refused_without_waiting_for_one() -> None:
    with pytest.raises(LengthRequired):
        read([], {})


@pytest.mark.parametrize("pieces", [[], [b"half"], [b"a", b"b"]])
def test_a_client_that_leaves_is_noticed(pieces: list[bytes]) -> None:
    with pytest.raises(ClientGone):
        read(pieces, gone=True)


def test_of_a_repeated_parameter_the_last_counts() -> None:
    scope = {"query_string": b"a=1&b=%C3%A4&a=2&c="}

    async def receive() -> Any:
        raise AssertionError

    query = Exchange(scope, receive, {}, b"", 0.0, make_room()).query()
    assert query == {"a": "2", "b": "ä", "c": ""}
