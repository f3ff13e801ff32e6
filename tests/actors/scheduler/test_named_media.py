"""Media named by uuid: what is found, what is kept for whom, and what happens when it is gone all the same."""

from __future__ import annotations

import msgspec
import pytest

from tests.actors.scheduler.driver import Driver, error_of, image, messages, needs
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.actors.scheduler.media_aliases import MAX_LOOKUPS, MediaAliases
from vlmrt.actors.scheduler.media_work import PAGES_PATIENCE_S
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    CacheReset,
    CancelEncode,
    DecodeFailed,
    Encode,
    ForgetLookUp,
    KnownMedia,
    LookUpMedia,
    MediaFound,
    MediaItem,
    MmHash,
    ResetCache,
    TokenBatch,
)


def sent(name: str, start: int, num_tokens: int) -> MediaItem:
    """An image with its bytes, under the uuid u-NAME."""
    return msgspec.structs.replace(image(name, start, num_tokens), uuid=f"u-{name}")


def named(name: str, start: int, num_tokens: int) -> MediaItem:
    """The same without its bytes."""
    return msgspec.structs.replace(sent(name, start, num_tokens), has_bytes=False)


def look_up(driver: Driver, lookup_id: int, *names: str, edge: str = "edge:0", salt: str = "") -> list[bool]:
    """Which of u-NAME... are found."""
    lookup = LookUpMedia(lookup_id, salt, tuple(f"u-{name}" for name in names))
    (found,) = messages(driver.event(edge, lookup), MediaFound, edge)
    assert found.lookup_id == lookup_id
    assert all(item is None or item.mm_hash == name for item, name in zip(found.items, names, strict=True))
    return [item is not None for item in found.items]


def forget(driver: Driver, lookup_id: int, edge: str = "edge:0") -> None:
    driver.event(edge, ForgetLookUp(lookup_id))


def seen(driver: Driver, *names: str) -> None:
    """Requests with these images of 4 rows have been served; nothing but the caches is left of them."""
    for name in names:
        driver.submit(f"first {name}", [*range(10)], (sent(name, 2, 4),), max_tokens=1)
        driver.make_ready(name)
        driver.run()


def test_a_name_given_once_stands_for_the_image() -> None:
    driver = Driver()
    seen(driver, "a")
    (found,) = messages(driver.event("edge:1", LookUpMedia(7, "", ("u-b", "u-a"))), MediaFound, "edge:1")
    assert found == MediaFound(7, (None, KnownMedia(MmHash("a"), 4, (1, 1, 4))))
    assert (driver.state.totals()["media_lookups_total"], driver.state.totals()["media_lookup_hits_total"]) == (2, 1)
    assert driver.state.gauges()["media_aliases"] == 1


def test_a_named_image_is_neither_asked_for_nor_decoded_nor_encoded() -> None:
    driver = Driver(prefix_caching=False)
    seen(driver, "a")
    assert look_up(driver, 1, "a") == [True]
    assert driver.submit("r1", 12, (named("a", 3, 4),), lookup_id=1) == []
    assert "r1" in driver.run()
    assert driver.state.counters.encodes == 1
    check_nothing_is_held(driver.state)


def test_a_name_belongs_to_its_salt() -> None:
    driver = Driver()
    driver.submit("r1", 10, (sent("a", 2, 4),), max_tokens=1, cache_salt="mine")
    driver.make_ready("a")
    driver.run()
    assert look_up(driver, 1, "a", salt="yours") == [False]
    assert look_up(driver, 2, "a") == [False]
    assert look_up(driver, 3, "a", salt="mine") == [True]


def test_bytes_sent_again_under_a_name_are_what_it_names_from_then_on() -> None:
    driver = Driver()
    seen(driver, "a")
    driver.submit("r2", 10, (msgspec.structs.replace(image("b", 2, 3), uuid="u-a"),), max_tokens=1)
    driver.make_ready("b")
    driver.run()
    (found,) = messages(driver.event("edge:0", LookUpMedia(1, "", ("u-a",))), MediaFound)
    assert found.items == (KnownMedia(MmHash("b"), 3, (1, 1, 3)),)


def test_names_that_were_used_least_recently_are_forgotten_first() -> None:
    aliases = MediaAliases(max_aliases=2)
    for name in ("a", "b"):
        aliases.register("", sent(name, 0, 1))
    aliases.find("", "u-a")
    aliases.register("", sent("c", 0, 1))
    assert [aliases.find("", f"u-{name}") is not None for name in "abc"] == [True, False, True]


def test_an_image_whose_rows_were_evicted_is_not_found() -> None:
    driver = Driver(num_pages=2)
    seen(driver, "a", "b")
    assert look_up(driver, 1, "a", "b") == [False, True]


def test_an_image_on_its_way_is_found_and_encoded_once() -> None:
    driver = Driver(prefix_caching=False)
    driver.submit("r1", 10, (sent("a", 2, 4),), max_tokens=1)
    assert look_up(driver, 1, "a") == [True]
    driver.submit("r2", 11, (named("a", 2, 4),), max_tokens=1, lookup_id=1)
    driver.make_ready("a")
    assert {"r1", "r2"} == set(driver.run())
    assert driver.state.counters.encodes == 1


# ---------------------------------------------------------------- what a lookup keeps


def pages_are_free_for(driver: Driver, name: str) -> bool:
    """Whether an urgent request gets pages for another image of 4 rows at once."""
    driver.submit(f"urgent {name}", 10, (image(name, 2, 4),), max_tokens=1, priority=-1)
    return bool(messages(driver.pixels(name), Encode))


def test_what_a_lookup_found_is_not_evicted_before_it_ends() -> None:
    driver = Driver(num_pages=2)
    seen(driver, "a")
    look_up(driver, 1, "a")
    assert not pages_are_free_for(driver, "b")
    driver.now_s = 2 * PAGES_PATIENCE_S
    assert driver.state.advance(driver.now_s) == []  # however long it takes
    forget(driver, 2)
    forget(driver, 1, edge="edge:1")
    (encode,) = messages(driver.event("edge:0", ForgetLookUp(1)), Encode)
    assert encode.mm_hash == "b"


@pytest.mark.parametrize("has_reader", [True, False])
def test_the_death_of_an_edge_ends_its_lookups(has_reader: bool) -> None:
    driver = Driver(num_pages=2)
    seen(driver, "a")
    look_up(driver, 1, "a", edge="edge:1")
    if has_reader:
        driver.submit("young", 10, (image("a", 1, 4),), priority=5)
    assert not pages_are_free_for(driver, "b")
    assert [encode.mm_hash for encode in messages(driver.down("edge:1"), Encode)] == ["b"]


def test_a_request_that_is_refused_ends_its_lookup() -> None:
    driver = Driver(max_num_seqs=1, max_waiting=0)
    seen(driver, "a")
    driver.submit("r1", 5)
    look_up(driver, 1, "a")
    assert error_of(driver.submit("r2", 10, (named("a", 2, 4),), lookup_id=1)) == (429, "too_many_requests")
    assert not driver.state.embeds.holds


def test_an_encode_that_a_lookup_found_goes_on_without_its_request() -> None:
    driver = Driver()
    driver.submit("r1", 10, (sent("a", 2, 4),))
    (encode,) = messages(driver.pixels("a"), Encode)
    look_up(driver, 1, "a")
    assert messages(driver.abort("r1"), CancelEncode) == []
    driver.submit("r2", 11, (named("a", 2, 4),), max_tokens=1, lookup_id=1)
    driver.embeds(encode)
    assert "r2" in driver.run()
    check_nothing_is_held(driver.state)


def test_an_encode_that_a_lookup_found_is_cancelled_with_it() -> None:
    driver = Driver()
    driver.submit("r1", 10, (sent("a", 2, 4),))
    driver.pixels("a")
    look_up(driver, 1, "a")
    driver.abort("r1")
    assert len(messages(driver.event("edge:0", ForgetLookUp(1)), CancelEncode)) == 1
    assert look_up(driver, 2, "a") == [False]


def test_an_edge_has_a_bounded_number_of_open_lookups() -> None:
    driver = Driver()
    seen(driver, "a")
    for lookup_id in range(1, MAX_LOOKUPS + 1):
        driver.state.on_event("edge:0", LookUpMedia(lookup_id, "", ("u-a",)), 0.0)  # type: ignore[arg-type]
    assert look_up(driver, MAX_LOOKUPS + 1, "a") == [False]
    assert look_up(driver, 1, "a", edge="edge:1") == [True]
    forget(driver, 5)
    assert look_up(driver, MAX_LOOKUPS + 2, "a") == [True]


def test_a_lookup_id_in_use_finds_nothing_and_holds_nothing() -> None:
    driver = Driver()
    seen(driver, "a")
    assert look_up(driver, 1, "a") == [True]
    assert look_up(driver, 1, "a") == [False]
    forget(driver, 1)
    check_nothing_is_held(driver.state)


# ---------------------------------------------------------------- what a request keeps, and may lose


def test_rows_of_a_named_image_stay_until_its_request_ends() -> None:
    driver = Driver(num_pages=2)
    seen(driver, "a")
    look_up(driver, 1, "a")
    driver.submit("r1", 11, (named("a", 2, 4),), max_tokens=2, lookup_id=1)
    driver.submit("r2", 10, (image("b", 2, 4),), max_tokens=1)
    driver.pixels("b")
    driver.advance()
    assert messages(driver.result(), Encode) == []  # r1 has consumed its image and goes on
    assert [encode.mm_hash for encode in messages(driver.result(), Encode)] == ["b"]


def test_a_preempted_request_computes_its_named_image_again() -> None:
    driver = Driver(num_blocks=7, prefix_caching=False)
    seen(driver, "a")
    driver.submit("old", 8, max_tokens=12)
    look_up(driver, 1, "a")
    driver.submit("young", 9, (named("a", 2, 4),), max_tokens=8, lookup_id=1)
    outputs = driver.run()
    assert driver.state.counters.preemptions > 0
    assert outputs["young"][-1].finish_reason == "length"
    assert driver.state.counters.encodes == 1


def test_a_named_image_that_nobody_has_is_an_error_at_once() -> None:
    driver = Driver()
    assert error_of(driver.submit("r1", 10, (named("a", 2, 4),))) == (400, "media_not_cached")
    check_nothing_is_held(driver.state)


def test_an_image_that_a_request_also_has_the_bytes_of_is_asked_for() -> None:
    driver = Driver()
    assert needs(driver.submit("r1", 12, (named("a", 0, 4), sent("a", 5, 4)))) == [("r1", "a", "media:0")]


def test_rows_that_died_with_their_vit_fail_the_request_that_named_them() -> None:
    driver = Driver()
    seen(driver, "a")
    look_up(driver, 1, "a")
    driver.submit("r1", 11, (named("a", 2, 4),), lookup_id=1)
    sends = driver.down("vit:0")
    assert error_of(sends) == (400, "media_not_cached")
    (batch,) = messages(sends, TokenBatch)
    assert batch.outputs[0].error is not None
    assert "'u-a'" in batch.outputs[0].error.message
    check_nothing_is_held(driver.state)


def test_rows_that_died_with_their_vit_come_again_through_a_request_that_has_the_bytes() -> None:
    driver = Driver(vits=2, prefix_caching=False)
    driver.submit("first", 10, (sent("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    look_up(driver, 1, "a")
    driver.submit("r1", 11, (named("a", 2, 4),), max_tokens=1, lookup_id=1)
    driver.submit("r2", 12, (image("a", 2, 4),), max_tokens=1, edge="edge:1")
    assert needs(driver.down("vit:0")) == [("r2", "a", "media:0")]
    (encode,) = messages(driver.pixels("a"), Encode, "vit:1")
    driver.embeds(encode, "vit:1")
    assert set(driver.run()) == {"r1", "r2"}


def test_rows_that_died_after_they_were_consumed_are_not_missed() -> None:
    driver = Driver()
    seen(driver, "a")
    look_up(driver, 1, "a")
    driver.submit("r1", 11, (named("a", 2, 4),), max_tokens=3, lookup_id=1)
    driver.advance()
    driver.result()
    driver.down("vit:0")
    assert driver.run()["r1"][-1].finish_reason == "length"


def test_a_prefix_that_covers_a_lost_image_is_enough() -> None:
    driver = Driver()
    seen(driver, "a")
    driver.down("vit:0")
    assert driver.submit("r1", [*range(10), 50, 51], (named("a", 2, 4),), max_tokens=1) == []
    assert "r1" in driver.run()


def test_when_the_last_request_with_the_bytes_ends_those_without_them_fail() -> None:
    driver = Driver()
    driver.submit("r1", 10, (sent("a", 2, 4),))
    look_up(driver, 1, "a")
    driver.submit("r2", 11, (named("a", 2, 4),), lookup_id=1)
    assert error_of(driver.abort("r1")) == (400, "media_not_cached")
    check_nothing_is_held(driver.state)


def test_bytes_that_are_no_picture_fail_those_who_named_it_for_the_same_reason() -> None:
    driver = Driver()
    driver.submit("r1", 10, (sent("a", 2, 4),))
    driver.submit("r2", 11, (named("a", 2, 4),), edge="edge:1")
    sends = driver.event("media:0", DecodeFailed(MmHash("a"), WireError(400, "no picture", "bad_image")))
    assert error_of([send for send in sends if send.peer == "edge:1"]) == (400, "bad_image")


def test_for_an_older_request_that_found_no_pages_for_long_a_younger_one_gives_up_what_it_holds() -> None:
    driver = Driver(num_pages=2, max_num_seqs=1)
    seen(driver, "a")
    driver.submit("running", [5, 6, 7], max_tokens=100)
    driver.advance()
    look_up(driver, 1, "a")
    driver.submit("young", 11, (named("a", 2, 4),), lookup_id=1)
    driver.submit("old", 12, (image("b", 2, 4),), priority=-1)
    assert messages(driver.pixels("b"), Encode) == []
    assert driver.state.wake_at_s == PAGES_PATIENCE_S
    assert messages(driver.state.advance(PAGES_PATIENCE_S / 2), Encode) == []
    sends = driver.state.advance(PAGES_PATIENCE_S)
    assert [encode.mm_hash for encode in messages(sends, Encode)] == ["b"]
    assert error_of(sends) == (400, "media_not_cached")
    assert set(driver.state.requests) == {"running", "old"}


def test_a_slab_too_small_for_a_request_alone_takes_its_named_image_once_that_is_consumed() -> None:
    driver = Driver(num_pages=2)
    seen(driver, "a")
    look_up(driver, 1, "a")
    driver.submit("r1", 100, (named("a", 0, 4), image("b", 80, 4)), max_tokens=1, lookup_id=1)
    driver.advance()
    assert messages(driver.pixels("b"), Encode) == []
    driver.result()
    (encode,) = messages(driver.state.advance(PAGES_PATIENCE_S), Encode)
    driver.embeds(encode)
    assert "r1" in driver.run()


# ---------------------------------------------------------------- resets and salts


def test_a_reset_of_the_prefix_cache_leaves_rows_and_names() -> None:
    driver = Driver()
    seen(driver, "a")
    assert messages(driver.event("edge:1", ResetCache(4, "prefix")), CacheReset, "edge:1") == [CacheReset(4)]
    assert len(driver.state.planner.kv) == 0
    assert look_up(driver, 1, "a") == [True]


def test_a_reset_of_the_embedding_cache_leaves_keys_and_values_and_what_is_held() -> None:
    driver = Driver()
    seen(driver, "a", "b")
    look_up(driver, 1, "a")
    assert messages(driver.event("edge:1", ResetCache(4, "embedding")), CacheReset, "edge:1") == [CacheReset(4)]
    assert len(driver.state.planner.kv) > 0
    assert set(driver.state.embeds.entries) == {"a"}
    assert look_up(driver, 2, "a") == [False]
    driver.submit("r1", 11, (named("a", 2, 4),), max_tokens=1, lookup_id=1)
    assert "r1" in driver.run()


def test_two_salts_share_no_block_and_no_name() -> None:
    """An mm_hash binds the salt already (tests/actors/edge/test_identify.py); so they share no row either."""
    driver = Driver()
    for salt in ("mine", "yours"):
        mm_hash = f"a/{salt}"
        assert look_up(driver, 1, mm_hash, salt=salt) == [False]
        forget(driver, 1)
        driver.submit(salt, [*range(40)], (sent(mm_hash, 2, 4),), max_tokens=1, cache_salt=salt)
        driver.make_ready(mm_hash)
        (output,) = driver.run()[salt]
        assert output.usage.num_cached_tokens == 0
    counters = driver.state.counters
    assert (counters.prompt_tokens_cached, counters.embed_hits, counters.media_lookup_hits) == (0, 0, 0)
    assert counters.encodes == 2


def test_cached_tokens_are_those_that_a_turn_does_not_compute() -> None:
    """A dialogue with an image in turns 1 and 4: of what came before, at most one block is computed again."""
    driver = Driver(num_blocks=100, block_size=4)
    tokens: list[int] = []
    media: list[MediaItem] = []
    for turn in range(1, 9):
        num_known = len(tokens)
        if turn in (1, 4):
            media.append(sent(f"image{turn}", num_known + 1, 6))
            tokens += [5, *[0] * 6]
        tokens += [10 + turn, 20 + turn, 30 + turn]
        before = driver.state.counters.prompt_tokens_cached
        driver.submit(f"turn {turn}", tokens, tuple(media), max_tokens=3)
        if turn in (1, 4):
            driver.make_ready(f"image{turn}")
        plans = []
        for _ in range(20):
            plans += driver.advance()
            if not driver.state.llm.in_flight:
                break
            sends = driver.result()
        (usage,) = [output.usage for batch in messages(sends, TokenBatch) for output in batch.outputs]
        num_computed = sum(row.num_tokens for plan in plans for row in plan.rows if row.start < len(tokens))
        assert usage.num_cached_tokens == len(tokens) - num_computed
        assert usage.num_cached_tokens == driver.state.counters.prompt_tokens_cached - before
        assert num_computed <= len(tokens) - num_known + 4
        tokens += [7, 7, 7]  # what every sampled token is
    assert driver.state.counters.encodes == 2
