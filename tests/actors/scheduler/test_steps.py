"""What runs, in which step, with which slots and blocks; how requests end."""

from __future__ import annotations

import pytest

from tests.actors.scheduler.driver import STOP, Driver, error_of, image, messages, outputs_of
from tests.actors.scheduler.invariants import check_nothing_is_held
from vlmrt.runtime.messages import StepPlan, StepResult, TokenBatch, TokenLogprobs


def rows(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(row.slot, row.start, row.num_tokens, row.sample) for row in plan.rows]


def test_the_next_step_is_planned_before_the_token_it_feeds_is_known() -> None:
    driver = Driver()
    driver.submit("r1", 6)
    first, second = driver.advance()
    assert rows(first) == [(0, 0, 6, True)]
    assert rows(second) == [(0, 6, 1, True)]
    assert driver.advance() == []
    driver.result()
    (third,) = driver.advance()
    assert rows(third) == [(0, 7, 1, True)]


def test_with_nothing_to_run_nothing_is_sent() -> None:
    driver = Driver()
    assert driver.advance() == []


def test_no_step_is_planned_past_max_tokens() -> None:
    driver = Driver()
    driver.submit("r1", 6, max_tokens=2)
    assert len(driver.advance()) == 2
    driver.result(1)
    assert driver.advance() == []
    (last,) = outputs_of(driver.result(2))
    assert (last.token_ids, last.finish_reason, last.usage.num_output_tokens) == ((2,), "length", 2)
    check_nothing_is_held(driver.state)


def test_a_token_of_a_step_planned_past_a_stop_token_is_never_sent_counted_or_hashed() -> None:
    driver = Driver(block_size=1)
    driver.submit("r1", 3)
    driver.advance()
    (last,) = outputs_of(driver.result(STOP))
    assert (last.token_ids, last.finish_reason, last.usage.num_output_tokens) == ((STOP,), "stop", 1)
    assert driver.result(5) == []
    assert driver.state.counters.output_tokens == 1
    assert driver.state.counters.discarded_tokens == 1
    assert len(driver.state.planner.kv) == 3  # the prompt
    check_nothing_is_held(driver.state)


def test_a_stop_token_does_not_stop_before_min_tokens() -> None:
    driver = Driver()
    driver.submit("r1", 3, min_tokens=2)
    driver.advance()
    assert outputs_of(driver.result(STOP))[0].finish_reason is None
    assert outputs_of(driver.result(STOP))[0].finish_reason == "stop"


def test_a_long_prompt_runs_in_chunks_beside_decode_rows_which_come_first() -> None:
    driver = Driver(max_num_batched_tokens=8, prefix_caching=False)
    driver.submit("r1", 4, max_tokens=20)
    driver.advance()
    driver.submit("r2", 20)
    driver.result()
    (plan,) = driver.advance()
    assert rows(plan) == [(0, 5, 1, True), (1, 0, 7, False)]
    driver.result()
    (plan,) = driver.advance()
    assert rows(plan) == [(0, 6, 1, True), (1, 7, 7, False)]
    driver.result()
    (plan,) = driver.advance()
    assert rows(plan) == [(0, 7, 1, True), (1, 14, 6, True)]


def test_smaller_priorities_run_first_and_equal_ones_in_order_of_arrival() -> None:
    driver = Driver(max_num_batched_tokens=4, max_num_seqs=8)
    for name, priority in (("late", 1), ("a", 0), ("b", 0), ("urgent", -1)):
        driver.submit(name, 4, priority=priority, max_tokens=1)
    order = list(driver.run())
    assert order == ["urgent", "a", "b", "late"]


def test_a_slot_is_released_in_the_plan_that_gives_it_to_the_next_request() -> None:
    driver = Driver(max_num_seqs=1)
    driver.submit("r1", 3, max_tokens=1)
    driver.submit("r2", 3, max_tokens=1)
    (first,) = driver.advance()
    assert first.release == ()
    driver.result()
    (second,) = driver.advance()
    assert second.release == (0,)
    assert [(new.slot, new.request_id) for new in second.admit] == [(0, "r2")]


def test_more_open_requests_than_slots_and_waiting_places_are_refused_with_429() -> None:
    driver = Driver(max_num_seqs=1, max_waiting=1)
    driver.submit("r1", 3)
    driver.submit("r2", 3)
    refused = driver.submit("r3", 3)
    assert error_of(refused) == (429, "too_many_requests")
    assert outputs_of(refused)[0].error is not None
    assert outputs_of(refused)[0].error.retry_after_s == 1  # type: ignore[union-attr]


def test_one_batch_per_edge_brings_all_news_of_a_step() -> None:
    driver = Driver()
    driver.submit("r1", 3)
    driver.submit("r2", 3)
    driver.submit("r3", 3, edge="edge:1")
    driver.advance()
    sends = driver.result(1, 2, 3)
    assert [len(batch.outputs) for batch in messages(sends, TokenBatch, "edge:0")] == [2]
    assert [len(batch.outputs) for batch in messages(sends, TokenBatch, "edge:1")] == [1]


def test_a_prompt_longer_than_the_model_allows_is_refused_naming_the_sizes() -> None:
    driver = Driver(max_model_len=20)
    refused = driver.submit("r1", 20)
    assert error_of(refused) == (400, "context_length_exceeded")
    message = outputs_of(refused)[0].error.message  # type: ignore[union-attr]
    assert "20 tokens" in message
    assert "holds 20" in message


def test_a_prompt_larger_than_the_kv_cache_is_refused() -> None:
    driver = Driver(num_blocks=4)
    assert error_of(driver.submit("r1", 16)) == (400, "context_length_exceeded")


def test_a_request_that_came_before_the_group_is_measured_when_the_kv_cache_is_known() -> None:
    driver = Driver(num_blocks=4)
    driver.down("llm:0")
    assert driver.submit("r1", 16) == []
    assert error_of(driver.llm_up(epoch=2)) == (400, "context_length_exceeded")
    check_nothing_is_held(driver.state)


def test_max_tokens_is_capped_to_what_fits_the_kv_cache() -> None:
    driver = Driver(num_blocks=4)
    driver.submit("r1", 10, max_tokens=100)
    outputs = driver.run()["r1"]
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].usage.num_output_tokens == 6


def test_max_tokens_is_capped_to_the_model_length() -> None:
    driver = Driver(max_model_len=12)
    driver.submit("r1", 10, max_tokens=100)
    assert driver.run()["r1"][-1].usage.num_output_tokens == 2


@pytest.mark.parametrize("tokens", [(), (1, -1, 2, 3)])
def test_a_prompt_that_is_no_prompt_is_refused(tokens: tuple[int, ...]) -> None:
    assert error_of(Driver().submit("r1", tokens))[0] == 400


def test_media_spans_outside_the_prompt_are_refused() -> None:
    driver = Driver()
    assert error_of(driver.submit("r1", 6, (image("a", 4, 3),))) == (400, "bad_media_span")
    assert error_of(driver.submit("r1", 6, (image("a", 1, 3), image("b", 2, 1)))) == (400, "bad_media_span")


def test_a_request_id_in_use_is_refused() -> None:
    driver = Driver()
    driver.submit("r1", 3)
    assert error_of(driver.submit("r1", 3, edge="edge:1")) == (400, "duplicate_request")


def test_when_blocks_run_out_the_youngest_is_preempted_and_resumes_with_what_is_confirmed() -> None:
    driver = Driver(num_blocks=5, prefix_caching=False)
    driver.submit("old", 4, max_tokens=12)
    driver.submit("young", 4, max_tokens=8)
    outputs = driver.run()
    assert driver.state.counters.preemptions >= 1
    assert [len(outputs[name]) for name in ("old", "young")] == [12, 8]
    check_nothing_is_held(driver.state)


def test_log_probabilities_travel_once_each_with_their_token_also_with_the_last() -> None:
    driver = Driver()
    driver.submit("r1", 4, max_tokens=2)
    driver.submit("r2", 4, max_tokens=9)
    driver.submit("r3", 4, max_tokens=9)
    driver.advance()
    found = TokenLogprobs(-0.5, ((8, -0.25),))
    outputs = outputs_of(driver.result(8, 9, 6, logprobs=(found, None, TokenLogprobs(-2.0))))
    assert [output.logprobs for output in outputs] == [(found,), (), (TokenLogprobs(-2.0),)]
    driver.advance()
    driver.abort("r2")
    outputs = outputs_of(driver.result(8, 9, STOP, logprobs=(found, None, TokenLogprobs(-3.0))))
    assert [output.logprobs for output in outputs] == [(found,), (TokenLogprobs(-3.0),)]
    assert [output.finish_reason for output in outputs] == ["length", "stop"]
    driver.submit("r4", 4, max_tokens=1)
    driver.advance()
    with pytest.raises(ValueError, match="log-probabilities"):
        driver.result(logprobs=(found,) * 5)


def test_a_preempted_request_is_admitted_again_with_its_prompt_and_confirmed_tokens() -> None:
    driver = Driver(num_blocks=5, prefix_caching=False)
    driver.submit("old", 4, max_tokens=16)
    driver.submit("young", 3, max_tokens=4)
    admissions = []
    for _ in range(100):
        for plan in driver.advance():
            admissions += [new for new in plan.admit if new.request_id == "young"]
        if not driver.state.llm.in_flight:
            break
        driver.result()
    assert admissions[0].token_ids == (100, 101, 102)
    for again in admissions[1:]:
        assert again.token_ids == (100, 101, 102, *[7] * (len(again.token_ids) - 3))
        assert again.num_prompt_tokens == 3


def test_the_second_request_with_the_same_beginning_computes_only_the_rest() -> None:
    driver = Driver()
    driver.submit("r1", 10)
    driver.run()
    driver.submit("r2", 10)
    plan = driver.advance()[0]
    assert rows(plan) == [(0, 8, 2, True)]
    assert len(plan.admit[0].block_ids) == 2
    assert driver.run()["r2"][-1].usage.num_cached_tokens == 8


def test_requests_with_different_salts_share_no_blocks() -> None:
    driver = Driver()
    driver.submit("r1", 10, cache_salt="x")
    driver.run()
    driver.submit("r2", 10, cache_salt="y")
    assert rows(driver.advance()[0]) == [(0, 0, 10, True)]


def test_the_youngest_waits_for_blocks_that_are_about_to_be_free_instead_of_being_preempted() -> None:
    driver = Driver(num_blocks=3, prefix_caching=False)
    driver.submit("old", 6, max_tokens=2)
    driver.submit("young", 3, max_tokens=8)
    outputs = driver.run()
    assert [len(outputs[name]) for name in ("old", "young")] == [2, 8]
    assert driver.state.counters.preemptions == 0


def test_a_second_turn_finds_the_generated_tokens_of_the_first() -> None:
    driver = Driver()
    driver.submit("r1", 6, max_tokens=7)
    driver.run()
    driver.submit("r2", [*range(100, 106), *[7] * 7, 55])
    assert rows(driver.advance()[0])[0][1] == 12


def test_a_block_can_be_found_only_once_its_step_has_ended() -> None:
    driver = Driver()
    driver.submit("r1", 10)
    driver.advance()
    driver.submit("r2", 10)
    driver.result()
    (plan,) = driver.advance()
    assert rows(plan)[-1] == (1, 8, 2, True)
    other = Driver(max_num_seqs=2)
    other.submit("r1", 10)
    other.submit("r2", 10)
    assert [row[1] for row in rows(other.advance()[0])] == [0, 0]


def test_aborting_in_any_stage_gives_everything_back() -> None:
    driver = Driver()
    driver.submit("waiting", 4)
    driver.abort("waiting")
    check_nothing_is_held(driver.state)
    driver.submit("running", 4)
    driver.advance()
    driver.abort("running")
    assert driver.result() == []
    assert driver.result() == []
    check_nothing_is_held(driver.state)


def test_an_abort_of_another_edges_request_is_ignored() -> None:
    driver = Driver()
    driver.submit("r1", 4)
    driver.abort("r1", edge="edge:1")
    assert driver.run()["r1"][-1].finish_reason == "length"


def test_results_nobody_waits_for_are_ignored() -> None:
    driver = Driver()
    assert driver.event("llm:0", StepResult(3, (1,), 1.0)) == []
    driver.submit("r1", 4)
    driver.advance()
    assert driver.event("llm:0", StepResult(2, (1,), 1.0)) == []


def test_a_result_with_too_few_tokens_is_an_error_of_the_rank() -> None:
    driver = Driver()
    driver.submit("r1", 4)
    driver.advance()
    with pytest.raises(ValueError, match="samples 1 tokens, its result has 0"):
        driver.state.on_event(driver.state.llm.names[0], StepResult(1, (), 1.0), 0.0)


def test_requests_of_an_edge_that_missed_news_are_given_up() -> None:
    driver = Driver()
    driver.submit("r1", 4)
    driver.submit("r2", 4, edge="edge:1")
    driver.state.give_up_edge(next(iter(driver.state.edges)), 0.0)
    assert list(driver.run()) == ["r2"]
