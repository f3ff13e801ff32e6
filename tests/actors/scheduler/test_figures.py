"""The scheduler's counters and gauges follow what happens to requests."""

from __future__ import annotations

from tests.actors.scheduler.driver import Driver


def test_requests_are_counted_where_they_are() -> None:
    driver = Driver(max_num_seqs=2)

    def where() -> tuple[float, float]:
        gauges = driver.state.gauges()
        return gauges["requests_waiting"], gauges["requests_running"]

    for number in range(3):
        driver.submit(f"r{number}", 8, max_tokens=2)
    assert where() == (3, 0)
    driver.advance()
    assert where() == (1, 2)
    assert driver.state.gauges()["kv_cache_usage_ratio"] > 0
    driver.run()
    assert where() == (0, 0)


def test_work_that_is_done_twice_is_counted() -> None:
    driver = Driver(num_blocks=6, max_num_seqs=2)
    for number in range(2):  # both need 4 blocks by their end
        driver.submit(f"r{number}", [number * 50 + token for token in range(8)], max_tokens=8)
    driver.run()
    assert driver.state.totals()["preemptions_total"] == 1
    driver.submit("r2", range(200, 208), max_tokens=8)
    driver.advance()
    driver.result()
    driver.down("llm:0")
    driver.llm_up(epoch=2)
    driver.run()
    totals = driver.state.totals()
    assert totals["recomputations_total"] == 1
    assert (totals["prompt_tokens_total"], totals["generation_tokens_total"]) == (24, 24)
