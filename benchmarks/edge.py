"""CPU time that the edge takes for a token of a streamed answer, from the scheduler's news to the bytes of its chunk.

    python -m benchmarks.edge

The write to the socket is not in it.  A second divided by it is the most tokens per second of an edge process.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

from tokenizers import Tokenizer

from vlmrt.actors.edge.chat_format import ChatFormat
from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.choice import ChoiceRule
from vlmrt.actors.edge.detokenizer import TextRule, Vocabulary
from vlmrt.actors.edge.generation import Answer, Generation
from vlmrt.actors.edge.identify import IdentifiedImage
from vlmrt.actors.edge.open_requests import OpenRequest, Record
from vlmrt.actors.edge.prompt import Prompt
from vlmrt.actors.edge.scheduler_link import SchedulerLink
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.timelines import OpenTimeline
from vlmrt.runtime.messages import ActorName, Epoch, Sampling, StopRule, Submit, TokenLogprobs, TokenOutput, Usage
from vlmrt.runtime.metrics import Metrics
from vlmrt.tools.demo import CHECKPOINT

NUM_STREAMS = 16
NUM_TOKENS = 2000  # of each stream
NUM_RUNS = 5
PROMPT = Prompt(tuple(range(100)), (), 0)
SERVED = ServedModel(("model",), "fp", 4096)
LOGPROBS = TokenLogprobs(-0.5, tuple((token_id, -1.0 - token_id) for token_id in range(5)))


class Case(NamedTuple):
    says: str
    request: ChatRequest
    text: TextRule = TextRule()


CASES = (
    Case("text alone", ChatRequest(messages=[])),
    Case("four stop strings", ChatRequest(messages=[]), TextRule(stops=("zzzz", "yyyy", "\n\n\n\n", "END"))),
    Case("logprobs of 5 tokens", ChatRequest(messages=[], logprobs=True, top_logprobs=5)),
)


class Link:
    """In the scheduler link's place: requests are open and get what the benchmark gives them."""

    def __init__(self) -> None:
        self.opened: list[OpenRequest] = []

    @contextmanager
    def submit(
        self, submit: Submit, images: Iterable[IdentifiedImage], news: asyncio.Event, record: Record, *, begun: bool
    ) -> Iterator[OpenRequest]:
        self.opened.append(OpenRequest(submit.request_id, Epoch(1), images, news, record))
        yield self.opened[-1]


async def cpu_us(case: Case, vocabulary: Vocabulary, token_ids: list[list[int]]) -> float:
    """A run's CPU time by token."""
    link, metrics = Link(), Metrics()
    sampling = Sampling(num_logprobs=case.request.num_logprobs)
    generation = Generation(PROMPT, ChoiceRule(sampling, StopRule(NUM_TOKENS), case.text))
    logprobs = (LOGPROBS,) if case.request.logprobs else ()
    with ExitStack() as requests:
        answers = [
            Answer(
                f"a{stream}",
                (generation,),
                cast(SchedulerLink, link),
                vocabulary,
                requests,
                metrics,
                OpenTimeline(ActorName("edge:0"), metrics, f"r{stream}", "/"),
            )
            for stream in range(NUM_STREAMS)
        ]
        forms = [ChatFormat("a", case.request, PROMPT.token_ids, SERVED, vocabulary) for _ in answers]
        usage = Usage(len(PROMPT.token_ids), 0, 1)
        started_s = time.process_time()
        for step in range(NUM_TOKENS - 1):
            for stream, (answer, form) in enumerate(zip(answers, forms, strict=True)):
                request = link.opened[stream]
                request.push(TokenOutput(request.request_id, (token_ids[stream][step],), usage, logprobs=logprobs))
                form.news(answer, await answer.news())
        return (time.process_time() - started_s) * 1e6 / (NUM_STREAMS * (NUM_TOKENS - 1))


def main() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer)
    rng = random.Random(0)
    token_ids = [[rng.randrange(256, 500) for _ in range(NUM_TOKENS)] for _ in range(NUM_STREAMS)]
    for case in CASES:
        runs = [asyncio.run(cpu_us(case, vocabulary, token_ids)) for _ in range(NUM_RUNS)]
        print(f"{case.says}: {statistics.median(runs):.1f} us a token ({min(runs):.1f}-{max(runs):.1f})")


if __name__ == "__main__":
    main()
