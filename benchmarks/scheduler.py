"""How long the scheduler decides: `python -m benchmarks.scheduler`.

One State with N decoding requests, two steps in flight, fed with results as rank 0 sends them.  Printed: what `advance`
(one plan) and the taking of a result cost, median and 99th percentile.  Without prefill, and with a new request for
every one that ends.  Exit code 1 if the median plan of 64 requests takes 0.5 ms or more.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

from vlmrt.actors.scheduler.state import State
from vlmrt.runtime.config import Config, ModelOptions, SchedulingOptions
from vlmrt.runtime.control_messages import EdgeReady, LlmReady, PeerUp
from vlmrt.runtime.messages import ActorName, Epoch, RequestId, Sampling, StepResult, StopRule, Submit

EDGE, RANK = ActorName("edge:0"), ActorName("llm:0")
PROMPT_TOKENS = 512
NUM_STEPS = 400
MAX_MS_AT_64 = 0.5


class Load:
    """A State kept at num_seqs running requests."""

    def __init__(self, num_seqs: int, output_tokens: int) -> None:
        scheduling = SchedulingOptions(max_num_seqs=num_seqs, max_num_batched_tokens=2048, itl_target_ms=40.0)
        self.state = State(Config(model=ModelOptions("", ("bench",), max_model_len=8192), scheduling=scheduling))
        for name, capabilities in ((EDGE, EdgeReady()), (RANK, LlmReady(num_seqs * 400))):
            self.state.on_peer_up(PeerUp(name, Epoch(1), "ipc:///nowhere", capabilities), 0.0)
        self.num_seqs, self.output_tokens = num_seqs, output_tokens
        self.num_submitted = 0

    def submit(self) -> None:
        """One more request, its prompt unlike the others'."""
        self.num_submitted += 1
        number = self.num_submitted
        tokens = tuple((number * 7919 + position) % 50_000 for position in range(PROMPT_TOKENS))
        length = self.output_tokens - number % 32 if self.output_tokens > 32 else self.output_tokens
        stop = StopRule(length, 0, (151_645,))
        self.state.on_event(EDGE, Submit(RequestId(f"r{number}"), tokens, (), 0, Sampling(), stop), 0.0)

    def turn(self) -> tuple[float, float]:
        """A result, then the next plan.  Returns the seconds of each."""
        while len(self.state.requests) < self.num_seqs:
            self.submit()
        step = self.state.llm.in_flight[0]
        result = StepResult(step.plan.step, (7,) * sum(row.sample for row in step.rows), 5.0)
        begun_s = time.perf_counter()
        self.state.on_event(RANK, result, 0.0)
        taken_s = time.perf_counter()
        self.state.advance(0.0)
        return taken_s - begun_s, time.perf_counter() - taken_s


def measure(num_seqs: int, output_tokens: int) -> tuple[list[float], list[float]]:
    """Milliseconds of results and of plans, sorted."""
    load = Load(num_seqs, output_tokens)
    for _ in range(num_seqs):
        load.submit()
    load.state.advance(0.0)
    for _ in range(num_seqs // 2 + 50):  # until every prompt has been prefilled
        load.turn()
    gc.collect()
    turns = [load.turn() for _ in range(NUM_STEPS)]
    return sorted(result * 1e3 for result, _ in turns), sorted(plan * 1e3 for _, plan in turns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256])
    arguments = parser.parse_args()
    too_slow = False
    for num_seqs in arguments.num_seqs:
        for what, output_tokens in (("decode only", 4000), ("requests end and begin", 128)):
            results, plans = measure(num_seqs, output_tokens)
            figures = " ".join(
                f"{name} {statistics.median(times):.3f} ms (p99 {times[len(times) * 99 // 100]:.3f})"
                for name, times in (("plan", plans), ("result", results))
            )
            print(f"{num_seqs:4d} running, {what}: {figures}")
            too_slow |= num_seqs == 64 and statistics.median(plans) >= MAX_MS_AT_64
    return int(too_slow)


if __name__ == "__main__":
    sys.exit(main())
