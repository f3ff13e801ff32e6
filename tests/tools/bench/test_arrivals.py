"""When the requests of an open loop are sent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmrt.tools.bench.arrivals import Arrivals


def test_without_a_rate_all_are_sent_at_once() -> None:
    assert list(Arrivals().times_s(3, seed=1)) == [0.0, 0.0, 0.0]
    assert list(Arrivals(rate=5.0).times_s(1, seed=1)) == [0.0]


def test_the_same_seed_gives_the_same_times_and_another_gives_others() -> None:
    arrivals = Arrivals(rate=5.0)
    assert arrivals.times_s(50, seed=1) == arrivals.times_s(50, seed=1)
    assert arrivals.times_s(50, seed=1) != arrivals.times_s(50, seed=2)


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0, math.inf])
def test_the_rate_is_the_one_asked_for_whatever_the_burstiness(burstiness: float) -> None:
    times = Arrivals(4.0, burstiness).times_s(401, seed=3)
    assert times[0] == 0.0
    assert list(times) == sorted(times)
    assert times[-1] == pytest.approx(100.0)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_intervals_vary_as_those_of_a_gamma_distribution(burstiness: float) -> None:
    intervals = np.diff(Arrivals(10.0, burstiness).times_s(20_001, seed=4))
    variation = float(intervals.std() / intervals.mean())
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)  # 1 of a Poisson process


def test_infinite_burstiness_is_an_even_pace() -> None:
    assert np.diff(Arrivals(8.0, math.inf).times_s(5, seed=1)) == pytest.approx([0.125] * 4)


def test_a_ramp_goes_from_its_first_rate_to_its_last() -> None:
    linear = Arrivals(ramp="linear", start_rate=1.0, end_rate=5.0, burstiness=math.inf)
    assert linear.rates(5) == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    assert np.diff(linear.times_s(5, seed=1)) == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5])
    exponential = Arrivals(ramp="exponential", start_rate=1.0, end_rate=16.0)
    assert exponential.rates(5) == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0])
