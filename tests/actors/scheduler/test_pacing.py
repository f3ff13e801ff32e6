"""Prefill beside decoding streams stays within the inter-token target."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.actors.scheduler.driver import Driver
from vlmrt.actors.scheduler.pacing import NUM_STEPS, Pacing
from vlmrt.tools.cli import build_parser
from vlmrt.tools.launch import PRESETS, itl_target_ms


def learned(target_ms: float, base_ms: float, token_ms: float, min_tokens: int = 16) -> Pacing:
    pacing = Pacing(target_ms, min_tokens)
    for _ in range(NUM_STEPS):
        pacing.observe(8, 0, base_ms)
    for _ in range(NUM_STEPS):
        pacing.observe(8, 100, base_ms + 100 * token_ms)
    return pacing


@given(st.floats(1, 100), st.floats(0.1, 120), st.floats(1e-3, 5))
def test_the_predicted_step_ends_within_the_target_or_is_the_smallest(
    target_ms: float, base_ms: float, token_ms: float
) -> None:
    most = learned(target_ms, base_ms, token_ms).max_prefill_tokens(8)
    assert most is not None
    assert most == 16 or base_ms + most * token_ms <= target_ms * (1 + 1e-6)
    assert most == 16 or base_ms + (most + 1) * token_ms >= target_ms * (1 - 1e-6)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9000), st.floats()), max_size=60))
def test_whatever_is_observed_a_block_may_run(steps: list[tuple[int, int, float]]) -> None:
    pacing = Pacing(40.0, 16)
    for step in steps:
        pacing.observe(*step)
        most = pacing.max_prefill_tokens(1)
        assert most is None or most >= 16


def test_nothing_is_bounded_without_a_target_without_decode_rows_or_without_experience() -> None:
    assert Pacing(40.0, 16).max_prefill_tokens(8) is None
    assert learned(40.0, 3.0, 0.1).max_prefill_tokens(0) is None
    free = Pacing(None, 16)
    free.observe(8, 100, 1e6)
    assert free.max_prefill_tokens(8) is None


def test_after_a_long_prefill_one_step_only_decodes() -> None:
    pacing = learned(40.0, 5.0, 0.05)
    pacing.planned(8, 600)
    assert pacing.max_prefill_tokens(8) == 0
    assert pacing.max_prefill_tokens(0) is None
    pacing.planned(8, 0)
    assert pacing.max_prefill_tokens(8) == 700


@pytest.mark.parametrize(("num_decode_rows", "num_prefill_tokens"), [(8, 60), (0, 600)])
def test_after_a_short_prefill_or_one_that_nobody_decoded_beside_the_next_may_follow(
    num_decode_rows: int, num_prefill_tokens: int
) -> None:
    pacing = learned(40.0, 5.0, 0.05)
    pacing.planned(num_decode_rows, num_prefill_tokens)
    assert pacing.max_prefill_tokens(8) == 700


def test_slow_first_steps_and_stalls_do_not_move_the_estimates() -> None:
    pacing = learned(40.0, 4.0, 0.05)
    before = pacing.max_prefill_tokens(8)
    for _ in range(NUM_STEPS // 2 - 1):
        pacing.observe(8, 0, 500.0)
        pacing.observe(8, 100, 900.0)
    assert pacing.max_prefill_tokens(8) == before


def test_tails_of_cached_prompts_do_not_move_the_cost_of_long_prefills() -> None:
    pacing = Pacing(40.0, 16)
    for _ in range(NUM_STEPS):
        pacing.observe(8, 0, 4.0)
    for number in range(NUM_STEPS):
        pacing.observe(8, *((1, 9.0) if number % 4 else (500, 4.0 + 500 * 0.05)))
    assert pacing.token_ms == pytest.approx(0.05)


@pytest.mark.parametrize(("base_ms", "token_ms", "overhead_ms"), [(3.0, 0.02, 4.0), (7.0, 0.1, 8.0), (7.0, 0.1, 0.0)])
def test_steps_of_a_noisy_device_soon_stay_near_the_target(base_ms: float, token_ms: float, overhead_ms: float) -> None:
    """A step that prefills also pays for leaving the decode graph; the first steps compile."""
    drawn = random.Random(5)
    pacing = Pacing(40.0, 16)
    times = []
    pacing.observe(0, 600, 3000.0)
    for step in range(200):
        if step % 3 == 0:
            pacing.observe(8, 0, base_ms * drawn.uniform(1.0, 1.2))
            continue
        num_tokens = min(1024, pacing.max_prefill_tokens(8) or 1024)
        duration_ms = base_ms + overhead_ms + num_tokens * token_ms * drawn.uniform(1.0, 1.1)
        pacing.observe(8, num_tokens, duration_ms)
        times.append((duration_ms, num_tokens))
    late = times[len(times) // 2 :]
    assert max(duration_ms for duration_ms, _ in late) < 40.0 * 1.15
    within = min(1024, int((40.0 - base_ms - overhead_ms) / token_ms))
    assert min(num_tokens for _, num_tokens in late) > 0.75 * within


def test_a_long_prompt_beside_a_stream_runs_in_chunks_within_the_target() -> None:
    driver = Driver(itl_target_ms=10.0, max_num_batched_tokens=100, prefix_caching=False, block_size=4)
    driver.submit("stream", 50, max_tokens=60)
    driver.advance()
    driver.result(duration_ms=50.0)  # 1 ms a token, alone
    for _ in range(8):
        driver.advance()
        driver.result(duration_ms=2.0)
    driver.submit("long", 90)
    chunks = []
    for _ in range(30):
        for plan in driver.advance():
            chunks += [row.num_tokens for row in plan.rows if row.num_tokens > 1]
        step = driver.state.llm.in_flight[0]
        driver.result(duration_ms=2.0 + step.num_prefill_tokens)
    assert sum(chunks) == 90
    assert max(chunks) == 8
    driver.run()


def test_a_prompt_runs_whole_where_nothing_decodes() -> None:
    driver = Driver(itl_target_ms=1.0, max_num_batched_tokens=100, prefix_caching=False)
    for number in range(3):
        driver.submit(f"r{number}", 90, max_tokens=1)
        (plan,) = driver.advance()
        assert [row.num_tokens for row in plan.rows] == [90]
        driver.result(duration_ms=500.0)


def test_options_resolve_to_a_target() -> None:
    interactive = build_parser().parse_args(["launch"])
    assert itl_target_ms(interactive.itl_target_ms, interactive.preset, "cuda") == 30.0
    assert itl_target_ms(interactive.itl_target_ms, interactive.preset, "cpu") is None
    assert itl_target_ms(None, "throughput", "cuda") is None
    assert itl_target_ms(0.0, "interactive", "cuda") is None
    assert itl_target_ms(25.0, "throughput", "cpu") == 25.0
    assert PRESETS["throughput"].max_num_batched_tokens["cuda"] > PRESETS["interactive"].max_num_batched_tokens["cuda"]


@pytest.mark.parametrize("wrong", [["--itl-target-ms", "-1"], ["--itl-target-ms", "nan"], ["--preset", "fast"]])
def test_wrong_options_are_usage_errors(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["launch", *wrong])
    assert wrong[0] in capsys.readouterr().err
