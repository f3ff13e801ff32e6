"""What one run is: the server, the requests, when they are sent, and what is judged."""

from __future__ import annotations

import msgspec

from vlmrt.tools.bench.arrivals import Arrivals
from vlmrt.tools.bench.asks import Target
from vlmrt.tools.bench.datasets import DATASETS, Wanted, Work
from vlmrt.tools.bench.recounted import Tokenizer
from vlmrt.tools.bench.replies import Client, Load

WARM_UP_SEED = 1 << 20  # what a warm-up shows is in no measured run
MAX_USUAL_WARM_UPS = 16


class Settings(msgspec.Struct, frozen=True):
    target: Target
    dataset: str
    wanted: Wanted
    max_concurrency: int | None = None  # None: no bound
    arrivals: Arrivals = Arrivals()
    num_warmups: int | None = None  # None: as many as run at once, at most 16
    limit_s: float = 3600.0
    objectives_ms: dict[str, float] = {}
    percentiles: tuple[float, ...] = (90.0, 95.0, 99.0)
    client_processes: int = 4

    @property
    def warm_ups(self) -> int:
        if self.num_warmups is not None:
            return self.num_warmups
        return min(self.wanted.num_prompts, self.max_concurrency or MAX_USUAL_WARM_UPS, MAX_USUAL_WARM_UPS)

    def load(self, tokenizer: Tokenizer | None) -> Load:
        """Raises: ValueError, OSError of a file of requests."""
        return self._planned(self._work(self.wanted, tokenizer))

    def warm_up(self, tokenizer: Tokenizer | None) -> Load:
        """Fewer requests of the same kind, about other pictures and texts; those of a file are its first ones."""
        seed, count = self.wanted.seed + WARM_UP_SEED, self.warm_ups
        return self._planned(self._work(msgspec.structs.replace(self.wanted, seed=seed, num_prompts=count), tokenizer))

    def _work(self, wanted: Wanted, tokenizer: Tokenizer | None) -> Work:
        return DATASETS[self.dataset].build(wanted, tokenizer)

    def _planned(self, work: Work) -> Load:
        if work.has_times:
            return Load(tuple(work.clients), work.streams, self.limit_s)
        times_s = self.arrivals.times_s(len(work.clients), self.wanted.seed)
        clients = (_sent_at(client, at_s) for client, at_s in zip(work.clients, times_s, strict=True))
        return Load(tuple(clients), work.streams, self.limit_s, self.max_concurrency)


def _sent_at(client: Client, at_s: float) -> Client:
    """The first request at that time, and the others when their turn comes."""
    return (msgspec.structs.replace(client[0], at_s=at_s), *client[1:]) if at_s else client
