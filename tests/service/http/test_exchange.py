"""Bodies are read and decompressed within limits."""

import asyncio
import gzip
import sys
import zlib
from collections.abc import Callable
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
from service.http.budget import BodyBudget
from service.http.exchange import (
    DECOMPRESSED_CHUNK_BYTES,
    MAX_GZIP_MEMBERS,
    MAX_INLINE_BYTES,
    Exchange,
)

LIMIT = 1000


def make_budget(bytes_left: int = 8 * LIMIT) -> BodyBudget:
    budget = BodyBudget(LIMIT, lambda: False)
    budget.bytes_left = bytes_left
    return budget


def make_exchange(headers: dict[bytes, bytes], budget: BodyBudget | None = None) -> Exchange:
    return Exchange("POST", "/", b"", headers, budget or make_budget())


def read(
    pieces: list[bytes],
    headers: dict[bytes, bytes] | None = None,
    *,
    budget: BodyBudget | None = None,
    limit: int = LIMIT,
) -> bytes:
    """Return a body; check that all its bytes are given back to the budget, even after an error."""
    headers = {b"transfer-encoding": b"chunked"} if headers is None else headers
    budget = budget or make_budget()
    before = budget.bytes_left
    exchange = make_exchange(headers, budget)
    try:
        exchange.limit_body(limit)
        for piece in pieces:
            exchange.extend(piece)
        assert budget.bytes_left == before - sum(map(len, pieces))
        body = asyncio.run(exchange.body())
        packed = sum(map(len, pieces)) if b"content-encoding" in headers else 0
        if headers.get(b"content-encoding", b"identity").strip() != b"identity":
            assert budget.bytes_left == before - packed - len(body)
        return body
    finally:
        exchange.release()
        assert budget.bytes_left == before


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_a_body_in_any_pieces_is_the_same(pieces: list[bytes]) -> None:
    assert read(pieces) == b"".join(pieces)


@pytest.mark.parametrize("name", [b"gzip", b"x-gzip", b"GZIP ", b"deflate", b"raw", b"identity"])
@given(plain=st.binary(max_size=LIMIT))
def test_an_encoded_body_is_decompressed(name: bytes, plain: bytes) -> None:
    packers: dict[bytes, Callable[[bytes], bytes]] = {
        b"deflate": zlib.compress,
        b"raw": lambda data: zlib.compress(data, wbits=-15),
        b"identity": bytes,
    }
    packed = packers.get(name, gzip.compress)(plain)
    encoding = b"deflate" if name == b"raw" else name
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": encoding}
    if len(packed) <= LIMIT:
        assert read([packed], headers) == plain


@given(st.binary(max_size=300), st.sampled_from([b"gzip", b"deflate"]))
def test_bytes_in_another_encoding_are_a_bad_request(body: bytes, encoding: bytes) -> None:
    headers = {b"content-length": b"%d" % len(body), b"content-encoding": encoding}
    try:
        plain = read([body], headers)
    except (BadRequest, PayloadTooLarge):
        return
    assert zlib.decompressobj(-15 if encoding == b"deflate" else 47).decompress(body) == plain


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("kind", ["declared", "pieces", "one piece", "unpacked"])
def test_a_body_may_have_exactly_the_limit(kind: str, more: int) -> None:
    plain = bytes(LIMIT + more)
    headers = {b"transfer-encoding": b"chunked"}
    pieces = [plain]
    if kind == "declared":
        headers = {b"content-length": b"%d" % len(plain)}
    elif kind == "pieces":
        pieces = [plain[:1], plain[1:-1], plain[-1:]]
    elif kind == "unpacked":
        headers[b"content-encoding"] = b"gzip"
        pieces = [gzip.compress(plain)]
    if more:
        with pytest.raises(PayloadTooLarge, match="at most 1,000 bytes"):
            read(pieces if kind != "declared" else [], headers)
    else:
        assert read(pieces, headers) == plain


def test_all_bodies_together_are_bounded() -> None:
    budget = make_budget(500)
    with pytest.raises(Overloaded) as caught:
        read([bytes(300)] * 2, budget=budget)
    assert caught.value.headers == {"Retry-After": "1"}
    assert read([bytes(300), bytes(200)], budget=budget) == bytes(500)


def test_decompressed_bodies_count_until_they_are_released() -> None:
    """Ten kilobytes may become ten megabytes, which a handler holds while others arrive."""
    packed = gzip.compress(bytes(LIMIT))
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": b"gzip"}
    budget = make_budget(2 * LIMIT + 3 * len(packed))
    exchanges = [make_exchange(headers, budget) for _ in range(3)]
    for exchange in exchanges:
        exchange.limit_body(LIMIT)
        exchange.extend(packed)
    for exchange in exchanges[:2]:
        assert len(asyncio.run(exchange.body())) == LIMIT
    with pytest.raises(Overloaded):
        asyncio.run(exchanges[2].body())
    for exchange in exchanges:
        exchange.release()
    assert budget.bytes_left == 2 * LIMIT + 3 * len(packed)


def test_bodies_are_decompressed_in_threads_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1_000_000
    packed = gzip.compress(bytes(limit))
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": b"gzip"}
    budget = make_budget(8 * limit)
    at_once: list[int] = []
    to_thread = asyncio.to_thread

    async def counted(*call: Any) -> Any:
        at_once.append(at_once.pop() + 1 if at_once else 1)
        assert at_once == [1]
        assert budget.bytes_left < 7 * limit  # the most that it may need is held
        rest = await to_thread(*call)
        at_once[0] -= 1
        return rest

    monkeypatch.setattr(asyncio, "to_thread", counted)

    async def unpack() -> bytes:
        exchange = make_exchange(headers, budget)
        exchange.limit_body(limit)
        exchange.extend(packed)
        body = await exchange.body()
        exchange.release()
        return body

    async def unpack_many() -> list[bytes]:
        return await asyncio.gather(*(unpack() for _ in range(5)))

    assert asyncio.run(unpack_many()) == [bytes(limit)] * 5
    assert at_once == [0]
    assert budget.bytes_left == 8 * limit


@pytest.mark.parametrize("name", ["gzip", "deflate"])
@pytest.mark.parametrize("more", [-1, 0, 1, 257, 1_000_000])
def test_only_a_long_body_is_decompressed_in_a_thread(
    name: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte is lost where the thread takes over."""
    threads = 0
    to_thread = asyncio.to_thread

    async def counted(*call: Any) -> Any:
        nonlocal threads
        threads += 1
        return await to_thread(*call)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    plain = (b"0123456789" * 200_000)[: DECOMPRESSED_CHUNK_BYTES + more]
    packed = (gzip.compress if name == "gzip" else zlib.compress)(plain)
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": name.encode()}
    budget = make_budget(10_000_000)
    assert read([packed], headers, budget=budget, limit=2_000_000) == plain
    assert threads == (more >= 0)
    with pytest.raises(BadRequest):
        read([packed[:-1]], headers, budget=budget, limit=2_000_000)
    for limit in {len(plain) - 1, min(len(plain), DECOMPRESSED_CHUNK_BYTES) - 1, LIMIT}:
        with pytest.raises(PayloadTooLarge):
            read([packed], headers, budget=budget, limit=limit)


@pytest.mark.parametrize("more", [0, 1])
def test_a_long_body_that_unpacks_to_little_leaves_the_event_loop_free(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten megabytes of empty blocks took over a second."""
    threads: list[Any] = []
    to_thread = asyncio.to_thread

    async def counted(*call: Any) -> Any:
        threads.append(call)
        return await to_thread(*call)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    size = MAX_INLINE_BYTES + more
    plain = b"last"[: size % 5]
    empty, end = b"\x00\x00\x00\xff\xff", b"\x01%c\x00%c\xff" % (len(plain), 255 - len(plain))
    packed = empty * (size // 5 - 1) + end + plain  # blocks as in RFC 1951, section 3.2.4
    assert len(packed) == size
    headers = {b"content-length": b"%d" % len(packed), b"content-encoding": b"deflate"}
    budget = make_budget(1_000_000)
    assert read([packed], headers, budget=budget, limit=2 * MAX_INLINE_BYTES) == plain
    assert len(threads) == more


def test_a_bomb_is_decompressed_no_further_than_the_limit() -> None:
    bomb = zlib.compress(bytes(500_000))
    assert len(bomb) < LIMIT
    with pytest.raises(PayloadTooLarge):
        read([bomb], {b"content-length": b"%d" % len(bomb), b"content-encoding": b"deflate"})


def test_a_bomb_in_the_thread_is_decompressed_no_further_than_the_limit() -> None:
    """All of it would need more memory than the budget has, which is another error."""
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) > MAX_INLINE_BYTES
    headers = {b"content-length": b"%d" % len(bomb), b"content-encoding": b"gzip"}
    with pytest.raises(PayloadTooLarge):
        read([bomb], headers, budget=make_budget(2_000_000), limit=1_000_000)


def test_a_body_that_was_read_is_its_readers_alone() -> None:
    """The reader can free its memory before the answer is sent."""
    exchange = make_exchange({b"content-length": b"500"})
    exchange.limit_body(LIMIT)
    exchange.extend(bytes(500))
    body = asyncio.run(exchange.body())
    references = sys.getrefcount(body)
    exchange.release()
    assert sys.getrefcount(body) == references


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5))
def test_all_members_of_a_gzip_body_are_read(plain: list[bytes]) -> None:
    """`cat a.gz b.gz` makes such a body (RFC 1952, section 2.2)."""
    packed = b"".join(map(gzip.compress, plain))
    headers = {b"content-length": b"0", b"content-encoding": b"gzip"}
    if sum(map(len, plain)) <= LIMIT:
        assert read([packed], headers, limit=2 * LIMIT) == b"".join(plain)
    with pytest.raises(BadRequest):
        read([packed[:-1]], headers, limit=2 * LIMIT)


def test_the_number_of_gzip_members_is_limited() -> None:
    empty = gzip.compress(b"")
    headers = {b"content-length": b"0", b"content-encoding": b"gzip"}
    budget = make_budget(10**9)
    assert read([empty * MAX_GZIP_MEMBERS], headers, budget=budget, limit=10**6) == b""
    with pytest.raises(BadRequest):
        read([empty * (MAX_GZIP_MEMBERS + 1)], headers, budget=budget, limit=10**6)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        (b"deflate", zlib.compress(b"a") + zlib.compress(b"b")),
        (b"gzip", gzip.compress(b"a") + b"b"),
        (b"gzip", gzip.compress(b"a") + zlib.compress(b"b")),
    ],
    ids=["two of deflate", "other bytes", "deflate after gzip"],
)
def test_bytes_after_the_end_of_an_encoding_are_refused(name: bytes, packed: bytes) -> None:
    with pytest.raises(BadRequest):
        read([packed], {b"content-length": b"0", b"content-encoding": name})


def test_the_refusal_of_an_unknown_encoding_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        read([b"x"], {b"content-length": b"1", b"content-encoding": b"br"})
    assert caught.value.headers == {"Accept-Encoding": "gzip, deflate"}


@pytest.mark.parametrize(
    ("headers", "complete", "too_long"),
    [
        ({b"content-length": b"65536"}, False, False),
        ({b"content-length": b"65537"}, False, True),
        ({b"content-length": b"65537"}, True, False),
        ({b"transfer-encoding": b"chunked"}, False, True),
    ],
)
def test_the_rest_of_a_refused_body_is_read_if_it_is_short(
    headers: dict[bytes, bytes], complete: bool, too_long: bool
) -> None:
    exchange = make_exchange(headers)
    exchange.complete = complete
    assert exchange.too_long_to_discard() == too_long


def test_a_request_without_a_body_is_refused_at_once() -> None:
    with pytest.raises(LengthRequired):
        read([], {})


def test_the_last_value_of_a_repeated_parameter_counts() -> None:
    exchange = Exchange("GET", "/", b"a=1&b=%C3%A4&a=2&c=", {}, make_budget())
    assert exchange.query() == {"a": "2", "b": "ä", "c": ""}


def test_any_byte_may_stand_in_a_query() -> None:
    """The answer to a value that is not UTF-8 is then the route's own refusal, not a 500."""
    assert Exchange("GET", "/", b"top_k=\xff", {}, make_budget()).query() == {"top_k": "\xff"}
