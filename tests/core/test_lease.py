"""The book of leases: dead at ``expires_at``, never revived, one lease per request."""

from __future__ import annotations

import math

import pytest

from gpumgr.config import LeaseSettings
from gpumgr.core.lease import EndReason, Lease, LeaseBook, RequestKey
from gpumgr.errors import LeaseUnknown, RequestEnded, RequestMismatch
from tests.worlds import request

DAY = 24 * 3600.0


def granted(
    book: LeaseBook, now: float = 100.0, *, ttl: float = 60.0, key: RequestKey | None = None, name: str = "paint"
) -> Lease:
    fence = book.next_fence()
    lease = Lease(
        lease_id=f"id-{fence}",
        token=f"token-{fence}",
        consumer=name,
        holder="somebody",
        gpus=(0,),
        gpu_uuids=("GPU-0",),
        seq=fence,
        fence=fence,
        granted_at=0.0,
        ttl_seconds=ttl,
        expires_at=0.0,
        request=key,
    )
    return book.publish(lease, now)


def test_a_lease_lives_its_full_ttl_from_its_publication() -> None:
    book = LeaseBook()
    lease = granted(book, now=100.0, ttl=60.0)
    assert (lease.granted_at, lease.expires_at) == (100.0, 160.0)
    assert (len(book), list(book), book.next_expiry()) == (1, [lease], 160.0)


def test_alive_just_before_expires_at_and_dead_at_it() -> None:
    book = LeaseBook()
    lease = granted(book)
    just_before = math.nextafter(lease.expires_at, 0.0)
    assert book.get(lease.token, just_before) == lease
    assert book.expired(just_before) == []
    assert book.expired(lease.expires_at) == [lease]
    with pytest.raises(LeaseUnknown):
        book.get(lease.token, lease.expires_at)


def test_a_lease_is_found_by_its_public_name_while_it_lives() -> None:
    book = LeaseBook()
    lease = granted(book)
    assert book.named(lease.lease_id, math.nextafter(lease.expires_at, 0.0)) == lease
    for name, now in ((lease.lease_id, lease.expires_at), (lease.token, 100.0), ("", 100.0)):
        with pytest.raises(LeaseUnknown):
            book.named(name, now)


def test_renew_at_the_last_moment_counts_from_that_moment() -> None:
    book = LeaseBook()
    lease = granted(book)
    last = math.nextafter(lease.expires_at, 0.0)
    assert book.renew(lease.token, last, None).expires_at == last + 60.0
    assert book.get(lease.token, last + 59.0).fence == lease.fence


def test_a_renew_may_shorten_and_its_ttl_stays() -> None:
    book = LeaseBook()
    lease = granted(book)
    assert book.renew(lease.token, 110.0, 10.0).expires_at == 120.0
    assert book.renew(lease.token, 119.0, None).expires_at == 129.0
    assert book.next_expiry() == 129.0


def test_an_expired_lease_is_never_revived_whoever_looks_first() -> None:
    book = LeaseBook()
    lease = granted(book)
    for _ in range(2):
        with pytest.raises(LeaseUnknown):
            book.renew(lease.token, lease.expires_at, None)
        assert book.expired(lease.expires_at) == [lease]
    book.end(lease, EndReason.EXPIRED, lease.expires_at)
    for instant in (lease.expires_at, 0.0):  # not even where a clock went back
        with pytest.raises(LeaseUnknown):
            book.renew(lease.token, instant, None)
    assert (len(book), book.next_expiry()) == (0, None)


def test_a_token_nobody_was_given() -> None:
    for use in (LeaseBook().get, lambda token, now: LeaseBook().renew(token, now, None)):
        with pytest.raises(LeaseUnknown):
            use("nobody's", 1.0)


@pytest.mark.parametrize(("asked", "given"), [(0.001, 10), (10, 10), (11, 11), (600, 600), (9999, 600)])
def test_ttl_is_clamped(asked: float, given: float) -> None:
    assert LeaseSettings().clamp_ttl(asked) == given


def test_the_fence_grows_with_every_lease() -> None:
    book = LeaseBook()
    fences = []
    for _ in range(5):
        lease = granted(book)
        fences.append(lease.fence)
        book.end(lease, EndReason.RELEASED, 101.0)
    assert fences == sorted(set(fences))


def test_the_token_is_in_no_log_line() -> None:
    lease = granted(LeaseBook())
    assert lease.token not in repr(lease)
    assert lease.token not in str(lease)


# -- requests -----------------------------------------------------------------------------------------------


def test_a_request_has_one_lease() -> None:
    book = LeaseBook()
    key = request("r1", "me")
    assert book.of_request(key, "paint", 100.0) is None
    lease = granted(book, key=key)
    assert book.of_request(key, "paint", 110.0) == lease
    renewed = book.renew(lease.token, 110.0, None)
    assert book.of_request(key, "paint", 165.0) == renewed


def test_a_request_id_is_one_caller_s() -> None:
    book = LeaseBook()
    granted(book, key=request("r1", "me"))
    for other in (request("r1"), request("r1", "you"), request("r2", "me"), RequestKey("bearer", "me", "r1")):
        assert book.of_request(other, "paint", 101.0) is None


def test_a_known_id_cannot_ask_for_another_consumer() -> None:
    book = LeaseBook()
    key = request("r1")
    lease = granted(book, key=key)
    with pytest.raises(RequestMismatch, match="'r1' already asked for 'paint'"):
        book.of_request(key, "chat", 101.0)
    book.end(lease, EndReason.RELEASED, 102.0)
    with pytest.raises(RequestMismatch):
        book.of_request(key, "chat", 103.0)


@pytest.mark.parametrize("reason", list(EndReason))
def test_an_ended_request_says_why(reason: EndReason) -> None:
    book = LeaseBook()
    key = request("r1")
    book.end(granted(book, key=key), reason, 150.0)
    with pytest.raises(RequestEnded) as ended:
        book.of_request(key, "paint", 151.0)
    assert ended.value.details == {"reason": reason.value}


def test_an_expired_request_has_ended_though_no_watchdog_came_yet() -> None:
    book = LeaseBook()
    key = request("r1")
    lease = granted(book, key=key)
    with pytest.raises(RequestEnded) as ended:
        book.of_request(key, "paint", lease.expires_at)
    assert ended.value.details == {"reason": "expired"}
    with pytest.raises(RequestMismatch):
        book.of_request(key, "chat", lease.expires_at)


def test_an_ended_request_is_forgotten_after_a_day() -> None:
    book = LeaseBook()
    key = request("r1")
    book.end(granted(book, key=key), EndReason.RELEASED, 150.0)
    with pytest.raises(RequestEnded):
        book.of_request(key, "paint", math.nextafter(150.0 + DAY, 0.0))
    assert book.of_request(key, "paint", 150.0 + DAY) is None
    again = granted(book, now=150.0 + DAY, key=key)
    assert book.of_request(key, "paint", 160.0 + DAY) == again


def test_what_is_forgotten_takes_no_memory() -> None:
    book = LeaseBook()
    for number in range(50):
        book.end(granted(book, key=request(f"r{number}")), EndReason.RELEASED, 150.0)
    assert len(book._ended) == 50
    book.end(granted(book, key=request("late")), EndReason.RELEASED, 150.0 + DAY)
    assert list(book._ended) == [request("late")]


def test_at_most_so_many_are_remembered_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseBook, "ENDED_KEPT_COUNT", 3)
    book = LeaseBook()
    for number in range(5):
        book.end(granted(book, key=request(f"r{number}")), EndReason.RELEASED, 150.0 + number)
    assert [key.request_id for key in book._ended] == ["r2", "r3", "r4"]


def test_a_lease_without_a_request_id_is_not_remembered() -> None:
    book = LeaseBook()
    book.end(granted(book), EndReason.RELEASED, 150.0)
    assert not book._ended
