"""When requests are sent that do not wait for each other: an open loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

Ramp = Literal["linear", "exponential"]


class Arrivals(msgspec.Struct, frozen=True):
    """The intervals are drawn from a gamma distribution: 1 is a Poisson process, less comes in bursts, more evenly.

    With a ramp the rate goes from `start_rate` at the first request to `end_rate` at the last.
    """

    rate: float = math.inf  # requests/s; inf: all at once
    burstiness: float = 1.0  # the shape of the distribution; inf: even intervals
    ramp: Ramp | None = None
    start_rate: float = 1.0
    end_rate: float = 1.0

    def rates(self, num_requests: int) -> list[float]:
        """The rate at which each request follows the one before it."""
        if self.ramp is None:
            return [self.rate] * num_requests
        parts = [index / max(1, num_requests - 1) for index in range(num_requests)]
        if self.ramp == "linear":
            return [self.start_rate + (self.end_rate - self.start_rate) * part for part in parts]
        return [self.start_rate * (self.end_rate / self.start_rate) ** part for part in parts]

    def times_s(self, num_requests: int, seed: int) -> Sequence[float]:
        """When each request is sent, from the start on; the first at once.

        The whole is stretched so that the rate is what was asked for, not only on average over many seeds.
        """
        rates = np.asarray(self.rates(num_requests))
        if not np.isfinite(rates).all():
            return [0.0] * num_requests
        if math.isinf(self.burstiness):
            intervals = 1 / rates
        else:
            rng = np.random.default_rng((seed, 0xA221))
            intervals = rng.gamma(self.burstiness, 1 / (rates * self.burstiness))
        intervals[0] = 0.0
        times = np.cumsum(intervals)
        expected_s = float(np.sum(1 / rates[1:]))
        if times[-1] > 0:
            times *= expected_s / times[-1]
        return [float(time) for time in times]
