"""Rows in a ViT's host memory: kept as they are encoded, restored when they are wanted again, lost with their ViT."""

from __future__ import annotations

from tests.actors.scheduler.driver import PAGE_ROWS, WIDTH, Driver, error_of, image, messages, needs
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.actors.scheduler.state import Send
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import CancelEncode, EmbedsReady, Encode, Restore

CANCELLED = WireError(499, "nobody waits", "cancelled")
REFUSED = WireError(500, "restore refused", "bad_restore")
PAGE_BYTES = PAGE_ROWS * WIDTH * 4


def small(**options: int) -> Driver:
    """Room for one image of 4 rows in the slab, for three in host memory."""
    return Driver(**{"num_pages": 2, "num_host_pages": 6, "prefix_caching": False, **options})


def show(driver: Driver, name: str, *, request_id: str = "") -> None:
    """A request that reads one image, from beginning to end, wherever its rows are."""
    request_id = request_id or f"{name} alone"
    sends = driver.submit(request_id, 10, (image(name, 2, 4),), max_tokens=1)
    if needs(sends):
        driver.make_ready(name)
    for restore in messages(sends, Restore):
        driver.restored(restore)
    assert request_id in driver.run()


def kept(driver: Driver) -> list[str]:
    return [mm_hash for slab in driver.state.embeds.slabs.values() for mm_hash in slab.host.pages]


def want(driver: Driver, name: str, request_id: str = "again") -> list[Send]:
    return driver.submit(request_id, 10, (image(name, 2, 4),), max_tokens=1)


def test_an_encode_names_where_its_rows_are_kept_and_a_restore_finds_them_there() -> None:
    driver = small()
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    (encode,) = messages(driver.pixels("a"), Encode, "vit:0")
    assert len(encode.host_pages) == len(encode.pages) == 2
    driver.embeds(encode)
    driver.run()
    show(driver, "b")
    sends = want(driver, "a")
    assert needs(sends) == []
    (restore,) = messages(sends, Restore, "vit:0")
    assert (restore.mm_hash, restore.num_rows, restore.host_pages) == ("a", 4, encode.host_pages)
    assert len(restore.pages) == 2
    driver.restored(restore)
    (plan,) = driver.advance()
    assert plan.rows[0].embeds[0].pages == restore.pages
    driver.result()
    check_nothing_is_held(driver.state)


def test_rows_that_are_still_in_the_slab_are_not_restored() -> None:
    driver = small(num_pages=4)
    show(driver, "a")
    assert want(driver, "a") == []
    assert "again" in driver.run()
    counters = driver.state.counters
    assert (counters.embed_hits, counters.embed_host_hits, counters.embed_misses) == (1, 0, 1)


def test_copies_are_evicted_least_recently_used_first() -> None:
    driver = small()
    for name in ("a", "b", "c", "a", "d"):
        show(driver, name, request_id=f"{name}{driver.state.counters.requests}")
    assert kept(driver) == ["c", "a", "d"]
    assert needs(want(driver, "b")) == [("again", "b", "media:0")]


def test_images_that_wait_to_be_restored_keep_their_copies() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    driver.submit("urgent", 10, (image("c", 2, 4),), max_tokens=1, priority=-1)
    driver.make_ready("c")
    assert want(driver, "a") == []  # the slab is full of rows that are wanted earlier
    driver.submit("most urgent", 10, (image("d", 2, 4),), max_tokens=1, priority=-2)
    assert kept(driver) == ["b", "c", "a"]
    driver.make_ready("d")
    assert kept(driver) == ["c", "a", "d"]
    for name in ("c", "a"):
        driver.advance()
        (restore,) = messages(driver.result(), Restore)
        assert restore.mm_hash == name
        driver.restored(restore)
    assert "again" in driver.run()


def test_identical_images_in_flight_are_restored_once() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    assert want(driver, "a", "too") == []
    driver.restored(restore)
    assert {new.request_id for new in driver.advance()[0].admit} == {"again", "too"}


def test_a_restore_nobody_waits_for_is_cancelled_and_its_copy_stays() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    assert messages(driver.abort("again"), CancelEncode, "vit:0") == [CancelEncode(restore.encode_id)]
    driver.encode_failed(restore, CANCELLED)
    check_nothing_is_held(driver.state)
    assert len(messages(want(driver, "a"), Restore)) == 1


def test_a_cancelled_restore_that_is_wanted_again_is_done_again() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    driver.abort("again")
    assert want(driver, "a", "more") == []
    (again,) = messages(driver.encode_failed(restore, CANCELLED), Restore)
    driver.restored(again)
    assert "more" in driver.run()


def test_an_image_that_cannot_be_restored_is_decoded_afresh_as_often_as_any_other() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    assert needs(driver.encode_failed(restore, REFUSED)) == [("again", "a", "media:0")]
    assert kept(driver) == ["b"]
    (encode,) = messages(driver.pixels("a"), Encode)
    assert needs(driver.encode_failed(encode, WireError(500, "gone", "pixels_lost"))) == [("again", "a", "media:0")]
    driver.make_ready("a")
    assert "again" in driver.run()


def test_a_restore_that_fails_when_nobody_waits_any_more_leaves_nothing() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    driver.abort("again")
    driver.encode_failed(restore, REFUSED)
    check_nothing_is_held(driver.state)
    assert kept(driver) == ["b"]


def test_restored_rows_of_another_number_fail_the_request_and_are_forgotten() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    (restore,) = messages(want(driver, "a"), Restore)
    assert error_of(driver.event("vit:0", EmbedsReady(restore.encode_id, 3, 0.0, 0.0))) == (500, "vision_rows_mismatch")
    assert kept(driver) == ["b"]


def test_an_image_is_restored_on_the_vit_that_keeps_it_however_busy_that_is() -> None:
    driver = small(vits=2, num_pages=4, num_host_pages=20)
    for name in ("a", "b", "c", "d", "e"):
        show(driver, name)
    assert set(driver.state.embeds.entries) == {"d", "e"}
    for name in ("x", "y"):
        driver.submit(name, 10, (image(name, 0, 1),))
    encodes = [each for name in ("x", "y") for each in driver.pixels(name) if isinstance(each.message, Encode)]
    assert {send.peer for send in encodes} == {"vit:0", "vit:1"}
    assert [send.peer for send in want(driver, "a")] == ["vit:0"]


def test_what_a_dead_vit_kept_is_never_served() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    driver.down("vit:0")
    driver.up("vit:0", epoch=2)
    assert kept(driver) == []
    assert needs(want(driver, "a")) == [("again", "a", "media:0")]


def test_images_that_were_to_be_restored_by_a_dead_vit_are_decoded() -> None:
    driver = small(num_pages=4, num_host_pages=20)
    for name in ("a", "b", "c", "d"):
        show(driver, name)
    driver.submit("r1", 20, (image("a", 0, 4), image("b", 4, 4), image("c", 8, 4)))
    assert sorted(job.stage.value for job in driver.state.media.jobs.values()) == ["kept", "restoring", "restoring"]
    assert sorted(name for _, name, _ in needs(driver.down("vit:0"))) == ["a", "b", "c"]
    driver.up("vit:0", epoch=2)


def test_rows_displaced_by_a_more_urgent_image_are_restored_and_not_decoded() -> None:
    driver = Driver(num_pages=2, num_host_pages=6, max_num_seqs=2)
    driver.submit("old", 10, (image("a", 0, 4),), max_tokens=1)
    driver.submit("young", 10, (image("b", 0, 4),), max_tokens=1)
    driver.make_ready("b")
    sends = driver.pixels("a")
    (encode,) = messages(sends, Encode)
    assert needs(sends) == []
    driver.embeds(encode)
    driver.advance()
    (restore,) = messages(driver.result(), Restore)
    assert restore.mm_hash == "b"
    driver.restored(restore)
    assert "young" in driver.run()


def test_an_urgent_restore_takes_pages_from_a_later_request() -> None:
    driver = small()
    for name in ("a", "b"):
        show(driver, name)
    driver.submit("young", 10, (image("b", 2, 4),), priority=1)
    (restore,) = messages(want(driver, "a"), Restore)
    assert restore.mm_hash == "a"
    driver.restored(restore)
    driver.advance()
    assert [each.mm_hash for each in messages(driver.result(), Restore)] == ["b"]


def test_a_reset_forgets_copies_that_nobody_waits_for() -> None:
    driver = small(num_pages=4)
    for name in ("a", "b", "c"):
        show(driver, name)
    driver.submit("reader", 10, (image("c", 2, 4),), max_tokens=1)
    driver.state.reset_embedding_cache(0.0)
    assert kept(driver) == ["c"]
    assert set(driver.state.embeds.entries) == {"c"}
    assert needs(want(driver, "a")) == [("again", "a", "media:0")]
    assert needs(want(driver, "b", "too")) == [("too", "b", "media:0")]


def test_without_embedding_cache_nothing_is_kept() -> None:
    driver = small(embedding_caching=False)
    driver.submit("r1", 10, (image("a", 2, 4),), max_tokens=1)
    (encode,) = messages(driver.pixels("a"), Encode)
    assert encode.host_pages == ()
    driver.embeds(encode)
    driver.run()
    assert needs(want(driver, "a")) == [("again", "a", "media:0")]


def test_metrics_tell_the_tiers_apart() -> None:
    driver = small(num_host_pages=4)
    for name in ("a", "b"):
        show(driver, name)
    show(driver, "a", request_id="again")
    show(driver, "a", request_id="once more")
    show(driver, "c")
    totals, gauges = driver.state.totals(), driver.state.gauges()
    assert totals["embedding_cache_queries_total"] == 5
    assert totals["embedding_cache_hits_total"] == 1
    assert totals["embedding_cache_host_hits_total"] == 1
    assert totals["embedding_cache_evictions_total"] == 3
    assert totals["embedding_cache_host_evictions_total"] == 1
    assert gauges["embedding_cache_bytes"] == 2 * PAGE_BYTES
    assert gauges["embedding_cache_host_bytes"] == 4 * PAGE_BYTES
