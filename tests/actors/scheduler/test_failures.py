"""Peers die and return: what is redone, what fails, what is kept."""

from __future__ import annotations

from tests.actors.scheduler.driver import Driver, error_of, image, messages, needs, outputs_of
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.runtime.errors import WireError
from vlmrt.runtime.messages import AttachSlab, DetachSlab, Encode, StepPlan


def test_what_a_dead_media_worker_was_decoding_is_asked_for_once_more() -> None:
    driver = Driver(medias=2)
    (asked,) = needs(driver.submit("r1", 10, (image("a", 0, 4),)))
    assert asked == ("r1", "a", "media:0")
    assert needs(driver.down("media:0")) == [("r1", "a", "media:1")]
    assert error_of(driver.down("media:1")) == (500, "media_worker_died")
    check_nothing_is_held(driver.state)


def test_an_item_is_asked_for_through_whoever_still_wants_it_when_a_media_worker_returns() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.submit("r2", 10, (image("a", 0, 4),))
    driver.down("media:0")
    driver.abort("r1")
    assert needs(driver.up("media:0", epoch=2)) == [("r2", "a", "media:0")]


def test_pixels_in_a_dead_arena_are_decoded_again() -> None:
    driver = Driver(vits=0)
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.pixels("a")
    assert driver.down("media:0") == []
    assert needs(driver.up("media:0", epoch=2)) == [("r1", "a", "media:0")]


def test_an_encode_whose_arena_vanished_is_begun_again_with_fresh_pixels() -> None:
    driver = Driver(medias=2)
    driver.submit("r1", 10, (image("a", 0, 4),))
    (encode,) = messages(driver.pixels("a"), Encode)
    sends = driver.encode_failed(encode, WireError(500, "gone", "pixels_lost"))
    assert len(needs(sends)) == 1
    (encode,) = messages(driver.pixels("a"), Encode)
    assert error_of(driver.encode_failed(encode, WireError(500, "gone", "pixels_lost"))) == (500, "pixels_lost")


def test_what_a_dead_vit_was_encoding_is_encoded_once_more_from_the_same_pixels() -> None:
    driver = Driver(vits=2)
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.submit("r2", 10)
    (encode,) = messages(driver.pixels("a"), Encode, "vit:0")
    (again,) = messages(driver.down("vit:0"), Encode, "vit:1")
    assert again.pixels == encode.pixels
    assert error_of(driver.down("vit:1")) == (500, "vision_worker_died")
    assert set(driver.state.requests) == {"r2"}


def test_rows_of_a_dead_vit_are_never_served() -> None:
    driver = Driver(prefix_caching=False)
    driver.submit("r1", 10, (image("a", 0, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.down("vit:0")
    driver.up("vit:0", epoch=2)
    assert needs(driver.submit("r2", 10, (image("a", 0, 4),))) == [("r2", "a", "media:0")]


def test_ready_rows_that_died_with_their_vit_are_wanted_anew_by_those_that_wait_to_run() -> None:
    driver = Driver(max_num_seqs=1)
    driver.submit("r1", [1, 2, 3], max_tokens=50)
    driver.advance()
    driver.submit("r2", 10, (image("a", 0, 4),))
    driver.make_ready("a")
    assert needs(driver.down("vit:0")) == [("r2", "a", "media:0")]


def test_ranks_attach_every_live_slab_before_plans_and_detach_dead_ones() -> None:
    driver = Driver(tp=2)
    assert [send.peer for send in driver.down("vit:0")] == ["llm:0", "llm:1"]
    sends = driver.up("vit:0", epoch=2)
    assert [(send.peer, send.message.epoch) for send in sends if isinstance(send.message, AttachSlab)] == [
        ("llm:0", 2),
        ("llm:1", 2),
    ]
    driver.down("llm:1", "llm:0")
    assert driver.down("vit:0", epoch=2) == []
    driver.up("vit:0", epoch=3)
    assert [message.epoch for message in messages(driver.llm_up(epoch=2), AttachSlab)] == [3, 3]


def test_a_new_incarnation_ends_the_one_before_it_even_unannounced() -> None:
    driver = Driver()
    sends = driver.up("vit:0", epoch=2)
    assert [type(send.message) for send in sends] == [DetachSlab, AttachSlab]


def test_the_group_is_up_only_when_all_ranks_of_one_epoch_are() -> None:
    driver = Driver(tp=2)
    driver.down("llm:0", "llm:1")
    driver.submit("r1", 5)
    driver.up("llm:0", epoch=2)
    assert driver.advance() == []
    driver.up("llm:1", epoch=3)
    assert driver.advance() == []
    driver.up("llm:0", epoch=3)
    assert driver.advance() != []


def test_every_rank_gets_the_same_plan() -> None:
    driver = Driver(tp=3)
    driver.submit("r1", 5)
    sends = driver.state.advance(0.0)
    assert [send.peer for send in sends[:3]] == ["llm:0", "llm:1", "llm:2"]
    assert all(send.message is sends[0].message for send in sends[:3])


def test_requests_resume_by_recomputation_when_the_group_returns_and_tokens_in_flight_are_forgotten() -> None:
    driver = Driver()
    driver.submit("r1", 6, max_tokens=4)
    driver.advance()
    assert [output.token_ids for output in outputs_of(driver.result(42))] == [(42,)]
    driver.down("llm:0")
    assert driver.advance() == []
    driver.llm_up(epoch=2)
    plan = driver.advance()[0]
    (new,) = plan.admit
    assert (new.token_ids[6:], new.num_prompt_tokens, new.block_ids) == ((42,), 6, ())
    assert plan.release == ()
    outputs = driver.run()["r1"]
    assert [output.usage.num_output_tokens for output in outputs] == [2, 3, 4]
    check_nothing_is_held(driver.state)


def test_a_second_loss_of_the_group_ends_the_requests_that_were_running() -> None:
    driver = Driver(max_num_seqs=1)
    driver.submit("r1", 6)
    driver.submit("waiting", 6)
    driver.advance()
    driver.down("llm:0")
    driver.llm_up(epoch=2)
    driver.advance()
    assert error_of(driver.down("llm:0", epoch=2)) == (500, "llm_group_died")
    driver.llm_up(epoch=3)
    assert set(driver.run()) == {"waiting"}


def test_rows_outlive_the_group_that_read_them() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.make_ready("a")
    driver.advance()
    assert needs(driver.down("llm:0")) == []
    driver.llm_up(epoch=2)
    assert driver.advance()[0].rows[0].embeds


def test_with_the_group_go_the_prefix_cache_and_the_loans() -> None:
    driver = Driver(embedding_caching=False)
    driver.submit("r1", 10, (image("a", 0, 4),), max_tokens=1)
    driver.make_ready("a")
    driver.run()
    driver.submit("r2", 10, (image("a", 0, 4),), max_tokens=1)  # all of the image is in the KV cache
    assert needs(driver.down("llm:0")) == [("r2", "a", "media:0")]


def test_word_of_an_incarnation_that_was_replaced_is_ignored() -> None:
    driver = Driver()
    driver.up("llm:0", "vit:0", "media:0", "edge:0", epoch=2)
    driver.submit("r1", 5)
    assert driver.down("llm:0", "vit:0", "media:0", "edge:0", epoch=1) == []
    assert messages(driver.state.advance(0.0), StepPlan)


def test_requests_of_a_dead_edge_are_aborted() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 0, 4),))
    driver.submit("r2", 5)
    driver.advance()
    driver.down("edge:0")
    assert driver.result() == []
    driver.result()
    assert len(driver.pixels("a")) == 1
    check_nothing_is_held(driver.state)


def test_a_request_that_no_longer_fits_a_smaller_kv_cache_ends_with_what_it_has() -> None:
    driver = Driver()
    driver.submit("r1", 10, max_tokens=50)
    driver.advance()
    driver.result()
    driver.down("llm:0")
    driver.num_blocks = 2
    (last,) = outputs_of(driver.llm_up(epoch=2))
    assert (last.finish_reason, last.token_ids, last.usage.num_output_tokens) == ("length", (), 1)


def test_a_row_without_memory_fails_its_request_alone() -> None:
    driver = Driver()
    for name in ("r1", "r2", "r3"):
        driver.submit(name, 6, max_tokens=3)
    driver.advance()
    sends = driver.result(failed=(1,))
    assert error_of(sends) == (503, "out_of_memory")
    (message,) = [output.error.message for output in outputs_of(sends) if output.error is not None]
    assert "--max-num-batched-tokens" in message
    assert "--gpu-memory-fraction" in message
    assert [output.request_id for output in outputs_of(sends) if output.error is None] == ["r1", "r3"]
    outputs = driver.run()
    assert {name: each[-1].finish_reason for name, each in outputs.items()} == {"r1": "length", "r3": "length"}
    assert driver.state.counters.requests_failed == 1
    check_nothing_is_held(driver.state)


def test_a_row_whose_grammar_comes_to_no_next_token_fails_its_request_alone() -> None:
    driver = Driver()
    for name in ("r1", "r2"):
        driver.submit(name, 6, max_tokens=3)
    driver.advance()
    sends = driver.result(failed=(0,), reason="grammar")
    assert error_of(sends) == (400, "grammar_error")
    (message,) = [output.error.message for output in outputs_of(sends) if output.error is not None]
    assert "response_format" in message
    assert {name: each[-1].finish_reason for name, each in driver.run().items()} == {"r2": "length"}
    check_nothing_is_held(driver.state)


def test_the_step_in_flight_behind_a_failed_row_is_discarded_and_its_slot_released_next() -> None:
    """Whether that row has failed as well or not."""
    for failed in ((), (1,)):
        driver = Driver(max_num_seqs=3)
        driver.submit("r1", 4, max_tokens=5)
        driver.submit("r2", 4, max_tokens=5)
        first, second = driver.advance()
        lost = first.rows[1].slot
        assert [row.slot for row in second.rows] == [row.slot for row in first.rows]
        driver.result(failed=(1,))
        (third,) = driver.advance()
        assert third.release == (lost,)
        assert lost not in [row.slot for row in third.rows]
        assert outputs_of(driver.result(failed=failed))[0].token_ids == (7,)
        assert driver.state.counters.discarded_tokens == 1 - len(failed)
        assert list(driver.run()) == ["r1"]
        check_nothing_is_held(driver.state)


def test_the_prefix_cache_learns_no_block_of_a_failed_row() -> None:
    driver = Driver(max_num_batched_tokens=8)
    driver.submit("r1", 20)
    driver.advance()
    driver.result()
    driver.result(failed=(0,))
    driver.submit("r2", 20)
    (plan, *_) = driver.advance()
    assert plan.rows[0].start == 8  # two blocks of the first chunk, none of the second


def test_rows_of_an_image_and_a_step_without_memory_leave_nothing_behind() -> None:
    driver = Driver()
    driver.submit("r1", 10, (image("a", 2, 4),))
    driver.make_ready("a")
    driver.advance()
    assert error_of(driver.result(failed=(0,))) == (503, "out_of_memory")
    driver.run()
    check_nothing_is_held(driver.state)


def test_a_step_that_ran_in_pieces_teaches_pacing_nothing() -> None:
    driver = Driver(itl_target_ms=10.0)
    driver.submit("r1", 4)
    driver.submit("r2", 4)
    driver.advance()
    driver.result(duration_ms=1e6, failed=(1,))
    assert driver.state.planner.pacing.token_ms == 0.0
