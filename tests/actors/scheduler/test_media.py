"""The way of an image from NeedMedia to rows that were read; who may take places from whom."""

from __future__ import annotations

import msgspec

from tests.actors.scheduler.driver import Driver, clip, error_of, image, messages, needs
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import (
    ActorName,
    CancelEncode,
    DecodeFailed,
    EmbedSlice,
    EmbedsReady,
    Encode,
    Epoch,
    FreePixels,
    MediaUnsent,
    MmHash,
    RequestId,
    StepPlan,
)

CANCELLED = WireError(499, "nobody waits", "cancelled")


def rows(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(row.slot, row.start, row.num_tokens) for row in plan.rows]


def test_an_image_goes_from_edge_to_media_worker_to_vit_to_the_step_that_reads_it() -> None:
    driver = Driver()
    assert needs(driver.submit("r1", 10, (image("a", 2, 5),), max_tokens=1)) == [("r1", "a", "media:0")]
    (encode,) = messages(driver.pixels("a"), Encode, "vit:0")
    assert (encode.mm_hash, len(encode.pages)) == ("a", 3)
    (freed,) = messages(driver.embeds(encode), FreePixels, "media:0")
    assert freed.pixels == (encode.pixels,)
    (plan,) = driver.advance()
    (row,) = plan.rows
    assert row.embeds == (EmbedSlice(ActorName("vit:0"), Epoch(1), encode.pages, 0, 5, 2),)
    driver.result()
    check_nothing_is_held(driver.state)


def test_an_encode_says_whether_more_images_are_being_decoded() -> None:
    driver = Driver()
    driver.submit("r1", 20, (image("a", 2, 4), image("b", 8, 4)))
    (first,) = messages(driver.pixels("a"), Encode)
    (last,) = messages(driver.pixels("b"), Encode)
    assert (first.more_follow, last.more_follow) == (True, False)


def test_text_and_first_images_go_ahead_while_later_ones_are_encoded() -> None:
    driver = Driver()
    driver.submit("r1", 100, (image("a", 70, 4), image("b", 78, 4)))
    (plan,) = driver.advance()
    assert rows(plan) == [(0, 0, 70)]
    driver.make_ready("a")
    (plan,) = driver.advance()
    assert rows(plan) == [(0, 70, 8)]
    assert driver.advance() == []
    driver.make_ready("b")
    driver.result()
    assert rows(driver.advance()[0]) == [(0, 78, 22)]


def test_a_few_tokens_of_text_wait_for_the_image_behind_them() -> None:
    driver = Driver()
    driver.submit("r1", 100, (image("a", 63, 4),))
    assert driver.advance() == []
    driver.make_ready("a")
    assert rows(driver.advance()[0]) == [(0, 0, 100)]


def test_a_chunk_may_end_within_an_image() -> None:
    driver = Driver(max_num_batched_tokens=6)
    driver.submit("r1", 12, (image("a", 2, 8),))
    driver.make_ready("a")
    first, second = driver.advance()
    assert [(e.first_row, e.num_rows, e.offset) for e in first.rows[0].embeds] == [(0, 4, 2)]
    assert [(e.first_row, e.num_rows, e.offset) for e in second.rows[0].embeds] == [(4, 4, 0)]


def test_a_prefix_hit_in_the_middle_of_an_image_reads_only_the_rest_of_its_rows() -> None:
    driver = Driver()
    tokens = list(range(12))
    driver.submit("r1", tokens[:10], (image("a", 2, 8),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.submit("r2", tokens, (image("a", 2, 8),), max_tokens=1)
    (plan,) = driver.advance()
    (row,) = plan.rows
    assert (row.start, row.num_tokens) == (8, 4)
    assert [(e.first_row, e.num_rows, e.offset) for e in row.embeds] == [(6, 2, 0)]


def test_an_image_that_the_kv_prefix_covers_needs_nothing() -> None:
    driver = Driver(embedding_caching=False)
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    assert not driver.state.embeds.entries
    assert needs(driver.submit("r2", 10, (image("a", 2, 4),), max_tokens=1)) == []
    assert "r2" in driver.run()


def test_an_image_whose_rows_are_cached_is_neither_decoded_nor_encoded_again() -> None:
    driver = Driver(prefix_caching=False)
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    assert needs(driver.submit("r2", 9, (image("a", 3, 4),), max_tokens=1)) == []
    assert "r2" in driver.run()


def test_identical_images_in_flight_are_decoded_and_encoded_once() -> None:
    driver = Driver(prefix_caching=False)
    assert len(needs(driver.submit("r1", 10, (image("a", 2, 4), image("a", 6, 4))))) == 1
    assert needs(driver.submit("r2", 10, (image("a", 2, 4),), edge="edge:1")) == []
    sends = driver.pixels("a")
    (encode,) = messages(sends, Encode)
    assert needs([*sends, *driver.submit("r3", 10, (image("a", 1, 4),), edge="edge:1")]) == []
    driver.embeds(encode)
    assert {new.request_id for new in driver.advance()[0].admit} == {"r1", "r2", "r3"}
    assert driver.state.counters.encodes == 1


def test_text_only_requests_do_not_wait_behind_media() -> None:
    driver = Driver()
    driver.submit("media", 10, (image("a", 0, 4),))
    driver.submit("text", 5)
    assert [new.request_id for new in driver.advance()[0].admit] == ["text"]


def test_text_only_requests_get_the_slot_of_one_that_waits_for_media() -> None:
    driver = Driver(max_num_seqs=1)
    driver.submit("media", 80, (image("a", 70, 4),))
    driver.advance()
    driver.result()
    driver.submit("text", [5] * 5)
    (plan, _) = driver.advance()
    assert plan.release == (0,)
    assert [new.request_id for new in plan.admit] == ["text"]


def test_a_request_gives_way_to_younger_ones_only_once() -> None:
    driver = Driver(max_num_seqs=1, prefix_caching=False)
    driver.submit("media", 80, (image("a", 70, 4),))
    driver.advance()
    driver.result()
    driver.submit("text1", [5] * 5, max_tokens=1)
    driver.advance()
    driver.result()
    (plan,) = driver.advance()
    assert [new.request_id for new in plan.admit] == ["media"]
    driver.result()
    driver.submit("text2", [6] * 5, max_tokens=1)
    assert driver.advance() == []
    driver.make_ready("a")
    assert set(driver.run()) == {"media", "text2"}


def test_the_least_loaded_media_worker_and_vit_are_chosen() -> None:
    driver = Driver(vits=2, medias=2)
    asked = needs(driver.submit("r1", 12, (image("a", 0, 4), image("b", 4, 4), image("c", 8, 4))))
    assert sorted(worker for _, _, worker in asked) == ["media:0", "media:0", "media:1"]
    sends = [driver.pixels(name, worker) for _, name, worker in asked[:2]]
    assert sorted(send.peer for part in sends for send in part) == ["vit:0", "vit:1"]


def test_only_a_bounded_number_of_decodes_is_asked_for() -> None:
    driver = Driver()
    media = tuple(image(f"i{n}", n, 1) for n in range(10))
    assert len(needs(driver.submit("r1", 12, media))) == 4
    assert [name for _, name, _ in needs(driver.pixels("i0"))] == ["i4"]


def test_without_a_media_worker_or_vit_requests_wait_for_one() -> None:
    driver = Driver(medias=0, vits=0)
    assert driver.submit("r1", 10, (image("a", 0, 4),)) == []
    assert needs(driver.up("media:0")) == [("r1", "a", "media:0")]
    assert driver.pixels("a") == []
    (encode,) = messages(driver.up("vit:0"), Encode)
    driver.embeds(encode)
    assert "r1" in driver.run()


def test_an_item_that_its_edge_could_not_hand_over_is_asked_for_again_a_little_later() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    assert driver.event("edge:0", MediaUnsent(RequestId("r1"), MmHash("a"))) == []
    assert driver.state.wake_at_s is not None
    assert needs(driver.state.advance(driver.state.wake_at_s)) == [("r1", "a", "media:0")]
    assert driver.state.wake_at_s is None


def test_when_the_request_that_was_asked_ends_another_is_asked() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.submit("r2", 10, (image("a", 0, 4),), edge="edge:1")
    assert needs(driver.abort("r1")) == [("r2", "a", "media:0")]


def test_pixels_nobody_wants_any_more_are_freed() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.abort("r1")
    assert len(messages(driver.pixels("a"), FreePixels, "media:0")) == 1


def test_embeddings_of_an_aborted_request_are_cancelled_and_cached_when_they_arrive_all_the_same() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    (encode,) = messages(driver.pixels("a"), Encode)
    assert messages(driver.abort("r1"), CancelEncode, "vit:0") == [CancelEncode(encode.encode_id)]
    assert len(messages(driver.embeds(encode), FreePixels)) == 1
    check_nothing_is_held(driver.state)
    assert needs(driver.submit("r2", 10, (image("a", 0, 4),))) == []


def test_a_cancelled_encode_that_is_wanted_again_is_done_again_from_its_pixels() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    (encode,) = messages(driver.pixels("a"), Encode)
    driver.abort("r1")
    assert driver.submit("r2", 10, (image("a", 0, 4),)) == []
    (again,) = messages(driver.encode_failed(encode, CANCELLED), Encode)
    assert (again.pixels, again.encode_id) == (encode.pixels, encode.encode_id + 1)
    driver.embeds(again)
    assert "r2" in driver.run()


def test_without_embedding_cache_rows_go_with_their_last_reader_but_not_under_a_step_that_reads_them() -> None:
    driver = Driver(embedding_caching=False)
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.advance()
    driver.abort("r1")
    books = driver.state.embeds.slabs[ActorName("vit:0")].books
    assert not driver.state.embeds.entries
    assert books.num_free == books.num_pages - 2
    driver.result()
    assert books.num_free == books.num_pages


def test_rows_are_evicted_least_recently_used_first_and_only_when_pages_are_needed() -> None:
    driver = Driver(num_pages=6, prefix_caching=False)
    for name in ("a", "b", "c"):
        driver.submit(name, 10, (image(name, 2, 4),), max_tokens=1)
        driver.make_ready(name)
        driver.run()
    assert set(driver.state.embeds.entries) == {"a", "b", "c"}
    driver.submit("again", 10, (image("a", 2, 4),), max_tokens=1)
    driver.run()
    driver.submit("d", 10, (image("d", 2, 4),), max_tokens=1)
    driver.make_ready("d")
    assert set(driver.state.embeds.entries) == {"a", "c", "d"}


def test_an_older_request_takes_pages_from_a_younger_one_which_then_needs_its_image_again() -> None:
    driver = Driver(num_pages=2, max_num_seqs=2)
    driver.submit("old", 10, (image("a", 0, 4),), max_tokens=1)
    driver.submit("young", 10, (image("b", 0, 4),), max_tokens=1)
    driver.make_ready("b")
    sends = driver.pixels("a")
    assert [encode.mm_hash for encode in messages(sends, Encode)] == ["a"]
    assert needs(sends) == [("young", "b", "media:0")]


def test_rows_lent_to_a_step_in_flight_are_not_taken() -> None:
    driver = Driver(num_pages=2)
    driver.submit("young", 10, (image("b", 0, 4),), max_tokens=1, priority=1)
    driver.make_ready("b")
    driver.advance()
    driver.submit("old", 10, (image("a", 0, 4),), max_tokens=1)
    assert messages(driver.pixels("a"), Encode) == []
    assert [encode.mm_hash for encode in messages(driver.result(), Encode)] == ["a"]


def test_a_younger_request_does_not_take_pages_from_an_older_one() -> None:
    driver = Driver(num_pages=2)
    driver.submit("old", 10, (image("x", 0, 1), image("a", 1, 4)), max_tokens=1)
    driver.submit("young", 10, (image("b", 0, 4),), max_tokens=1)
    driver.make_ready("a")
    assert messages(driver.pixels("b"), Encode) == []


def test_an_earlier_image_takes_pages_from_a_later_one_of_the_same_request() -> None:
    driver = Driver(num_pages=2)
    driver.submit("r1", 10, (image("a", 0, 4), image("b", 5, 4)), max_tokens=1)
    driver.make_ready("b")
    assert [encode.mm_hash for encode in messages(driver.pixels("a"), Encode)] == ["a"]


def test_an_image_larger_than_the_slab_is_refused() -> None:
    driver = Driver(num_pages=2)
    driver.submit("r1", 10, (image("a", 0, 5),))
    sends = driver.pixels("a")
    assert error_of(sends) == (400, "image_too_large")
    assert len(messages(sends, FreePixels)) == 1
    check_nothing_is_held(driver.state)


def test_the_arena_is_never_promised_twice_and_the_oldest_request_gets_room_in_it() -> None:
    driver = Driver(arena_bytes=8 * 768, vits=0)
    driver.submit("young", 10, (image("b", 0, 8),), priority=1)
    driver.pixels("b", num_bytes=8 * 768)
    sends = driver.submit("old", 10, (image("a", 0, 4),))
    assert len(messages(sends, FreePixels)) == 1
    assert needs(sends) == [("old", "a", "media:0")]


def test_when_an_urgent_decode_takes_very_long_later_pixels_in_its_arena_give_way() -> None:
    driver = Driver(vits=0)
    driver.submit("old", 10, (image("a", 0, 4),))
    driver.submit("young", 10, (image("b", 0, 8),))
    driver.pixels("b")
    assert driver.state.wake_at_s is not None
    assert driver.state.advance(driver.state.wake_at_s / 2) == []
    sends = driver.state.advance(driver.state.wake_at_s)
    assert len(messages(sends, FreePixels, "media:0")) == 1
    assert needs(sends) == [("young", "b", "media:0")]


def test_a_picture_that_is_none_fails_exactly_the_requests_that_need_it() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.submit("r2", 10, (image("a", 0, 4),), edge="edge:1")
    driver.submit("r3", 10, (image("b", 0, 4),))
    sends = driver.event("media:0", DecodeFailed(MmHash("a"), WireError(400, "no picture", "bad_image")))
    assert error_of([send for send in sends if send.peer == "edge:0"]) == (400, "bad_image")
    assert error_of([send for send in sends if send.peer == "edge:1"]) == (400, "bad_image")
    assert set(driver.state.requests) == {"r3"}


def test_a_busy_media_worker_is_tried_once_more() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    failed = DecodeFailed(MmHash("a"), WireError(503, "full", "media_worker_busy"))
    assert needs(driver.event("media:0", failed)) == [("r1", "a", "media:0")]
    assert error_of(driver.event("media:0", failed)) == (503, "media_worker_busy")


def test_rows_that_do_not_match_the_prompt_fail_the_request() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    (encode,) = messages(driver.pixels("a"), Encode)
    assert error_of(driver.event("vit:0", EmbedsReady(encode.encode_id, 3, 0.0, 0.0))) == (500, "vision_rows_mismatch")
    check_nothing_is_held(driver.state)


def test_a_reset_of_both_caches_forgets_what_nobody_uses() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.state.reset_prefix_cache(0.0)
    driver.state.reset_embedding_cache(0.0)
    assert needs(driver.submit("r2", 10, (image("a", 2, 4),))) == [("r2", "a", "media:0")]


def test_a_reset_of_one_cache_leaves_the_other() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.state.reset_prefix_cache(0.0)
    assert needs(driver.submit("r2", 10, (image("a", 2, 4),), max_tokens=1)) == []
    assert driver.advance()[0].rows[0].start == 0
    driver.run()
    driver.state.reset_embedding_cache(0.0)
    assert needs(driver.submit("r3", 10, (image("a", 2, 4),), max_tokens=1)) == []
    assert driver.advance()[0].rows[0].start == 8


# ---------------------------------------------------------------- clips


def workers_of(asked: list[tuple[str, str, str]]) -> dict[str, str]:
    return {mm_hash: media for _, mm_hash, media in asked}


def test_the_groups_of_a_clip_are_asked_of_one_worker_in_prompt_order() -> None:
    driver = Driver(medias=3, num_pages=100)
    asked = needs(driver.submit("r1", 120, (image("before", 1, 4), *clip("c", 10, 20), image("after", 100, 4))))
    assert [mm_hash for _, mm_hash, _ in asked] == ["before", *(f"c{group}" for group in range(20)), "after"]
    workers = workers_of(asked)
    (of_clip,) = {worker for mm_hash, worker in workers.items() if mm_hash.startswith("c")}
    assert workers["before"] != of_clip != workers["after"] != workers["before"]


def test_later_groups_of_a_clip_follow_the_first_ones_although_others_are_less_busy() -> None:
    driver = Driver(medias=2, num_pages=400, arena_bytes=12_000)
    first = workers_of(needs(driver.submit("r1", 100, clip("c", 0, 40, 2))))
    home = first["c0"]
    assert [first[f"c{group}"] == home for group in range(7)] == [True] * 7
    (other,) = {worker for worker in first.values() if worker != home}  # where its home had no room
    away = next(mm_hash for mm_hash, worker in first.items() if worker == other)
    later = workers_of(needs(driver.make_ready_on(home, "c0")))
    assert set(later.values()) == {home}
    assert away not in later
    assert set(workers_of(needs(driver.submit("r2", 20, (image("a", 2, 2),)))).values()) <= {other}


def test_a_clip_takes_one_of_the_places_for_files_that_are_decoded() -> None:
    driver = Driver(num_pages=200)
    asked = [mm_hash for _, mm_hash, _ in needs(driver.submit("r1", 100, clip("c", 0, 40, 2)))]
    assert asked == [f"c{group}" for group in range(32)]
    driver = Driver(num_pages=200)
    media = (*clip("c", 0, 9, 2), *(image(f"i{index}", 20 + 2 * index, 2) for index in range(9)))
    asked = [mm_hash for _, mm_hash, _ in needs(driver.submit("r1", 100, media))]
    assert asked == [*(f"c{group}" for group in range(9)), "i0", "i1", "i2"]


def test_the_groups_of_a_dead_workers_clip_are_redone_once_by_another() -> None:
    driver = Driver(medias=2, num_pages=100)
    first = workers_of(needs(driver.submit("r1", 30, clip("c", 2, 5))))
    (dead,) = set(first.values())
    again = workers_of(needs(driver.down(dead)))
    assert list(again) == list(first)
    (other,) = set(again.values())
    assert other != dead
    assert error_of(driver.down(other)) == (500, "media_worker_died")
    check_nothing_is_held(driver.state)


def test_a_group_that_does_not_go_on_with_the_item_before_it_is_refused() -> None:
    first, second = clip("c", 2, 2)
    gap = msgspec.structs.replace(second, start=second.start + 1)
    back = msgspec.structs.replace(first, time_offset=-1)
    for media in ((second,), (first, gap), (back, second)):
        driver = Driver()
        assert error_of(driver.submit("r1", 20, media)) == (400, "bad_media_span")


def test_groups_that_come_one_after_the_other_are_no_sign_of_a_full_arena() -> None:
    """Each is asked for with the first, and waits from the one before it on."""
    driver = Driver(num_pages=2)
    driver.submit("r0", 10, (image("busy", 2, 4),))
    driver.pixels("busy")
    driver.submit("r1", 60, clip("c", 0, 6, 4))
    driver.submit("r2", 20, (image("later", 2, 4),))
    driver.pixels("later")
    for group in range(2):
        driver.now_s += 0.7
        sends = driver.pixels(f"c{group}")
        sends += driver.state.advance(driver.now_s)
        assert not messages(sends, FreePixels)
    driver.now_s += 1.5
    assert driver.state.wake_at_s is not None
    assert messages(driver.state.advance(driver.now_s), FreePixels)
