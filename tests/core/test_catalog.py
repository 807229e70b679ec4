"""Who shares a GPU with whom, who coexists, and what a request means."""

from __future__ import annotations

import pytest

from gpumgr.core.card import GpuReading, Reading
from gpumgr.errors import ConsumerUnknown, KindUnknown
from tests.worlds import catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])
FAR = consumer("far", 1000, gpus=(1,))
SPAN = consumer("span", (1000, 5000), gpus=(0, 1))
ALL = catalog(PAINT, CHAT, HEAR, FAR, SPAN, image="paint", llm="chat", draw="paint")


def test_a_kind_leads_to_its_consumer_and_a_name_to_itself() -> None:
    assert ALL.resolve(kind="image", consumer=None) is PAINT
    assert ALL.resolve(kind=None, consumer="hear") is HEAR
    assert ALL.kinds_of("paint") == ["image", "draw"]
    assert ALL.kinds_of("far") == []


def test_the_unknown_is_told_what_there_is() -> None:
    with pytest.raises(KindUnknown, match=r"'video'.*draw, image, llm") as kind:
        ALL.resolve(kind="video", consumer=None)
    assert kind.value.details == {"kind": "video"}
    with pytest.raises(ConsumerUnknown, match=r"'nobody'.*chat, far, hear, paint") as name:
        ALL.resolve(kind=None, consumer="nobody")
    assert name.value.details == {"consumer": "nobody"}
    with pytest.raises(ConsumerUnknown):
        ALL.resolve(kind=None, consumer=None)
    with pytest.raises(KindUnknown, match="none"):
        catalog(PAINT).resolve(kind="image", consumer=None)


@pytest.mark.parametrize(
    ("a", "b", "shares", "coexists", "excludes"),
    [
        ("paint", "chat", True, False, True),
        ("chat", "hear", True, True, False),
        ("paint", "far", False, False, False),
        ("span", "far", True, False, True),
        ("span", "paint", True, False, True),
        ("paint", "paint", True, True, False),
    ],
)
def test_relations_are_symmetric(a: str, b: str, shares: bool, coexists: bool, excludes: bool) -> None:
    for x, y in ((a, b), (b, a)):
        assert (ALL.share_gpu(x, y), ALL.may_coexist(x, y), ALL.exclude(x, y)) == (shares, coexists, excludes)


def test_coexistence_must_be_mutual() -> None:
    one_sided = catalog(consumer("a", beside=["b"]), consumer("b"))
    assert not one_sided.may_coexist("a", "b")
    assert not one_sided.may_coexist("b", "a")


def test_sizes_are_per_gpu() -> None:
    assert [SPAN.needs_mib(gpu) for gpu in (0, 1, 2)] == [1000, 5000, 0]
    assert ALL.gpus == (0, 1)
    assert [c.name for c in ALL.on_gpu(1)] == ["far", "span"]


def test_two_names_of_one_card_become_one() -> None:
    named = catalog(PAINT, consumer("chat", gpus=("GPU-a",)), consumer("lost", gpus=("GPU-x",)))
    assert named.share_gpu("paint", "chat"), "an unresolved UUID may be the card of any index"
    assert not named.share_gpu("chat", "lost"), "two UUIDs are two cards"
    assert named.unresolved == ["GPU-a", "GPU-x"]
    reading = Reading(1.0, (GpuReading(0, "GPU-a", "card", 24000, 0, 24000),))
    known = named.resolved(reading)
    assert known.consumers["chat"].gpus == (0,)
    assert known.share_gpu("paint", "chat")
    assert known.unresolved == ["GPU-x"]
    assert known.gpus == (0, "GPU-x")
    assert named.consumers["chat"].gpus == ("GPU-a",), "a catalog is a value"
