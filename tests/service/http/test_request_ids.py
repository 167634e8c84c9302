"""Well-formed ids and traces of the client are used; other ids are replaced."""

import pytest

from service.http.request_ids import RequestIds, trace_id

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.mark.parametrize("given", [b"a", b"A-b_c.d/e+f=@:9", b"x" * 128])
def test_a_well_formed_id_is_used(given: bytes) -> None:
    assert RequestIds().choose({b"x-request-id": given}) == given


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a b", b"a\n", b'"', b"\xe4"])
def test_any_other_id_is_replaced_by_a_new_one(given: bytes | None) -> None:
    ids = RequestIds()
    headers = {} if given is None else {b"x-request-id": given}
    made = {ids.choose(headers) for _ in range(10)} | {RequestIds().choose(headers)}
    assert len(made) == 11
    assert given not in made


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"cc-{TRACE}-{PARENT}-01.more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE[1:]}-{PARENT}-01", False),
        ("", False),
    ],
)
def test_a_valid_trace_is_found(given: str, valid: bool) -> None:
    """Examples and rules of W3C Trace Context, section 3.2."""
    assert trace_id({b"traceparent": given.encode()}) == (TRACE if valid else None)
    assert trace_id({}) is None
