"""What the server's caches did for a workload, tier by tier: its counters before and after it."""

from __future__ import annotations

from typing import NamedTuple

from vlmrt.tools.bench.figures import Figures
from vlmrt.tools.bench.trace import Scrape


class Caches(NamedTuple):
    """Differences of counters, summed over actors; 0 where the server has no such counter."""

    prefix_queries: float  # prompt tokens
    prefix_hits: float  # tokens of all tiers
    prefix_host_hits: float
    prefix_evictions: float  # blocks
    prefix_host_evictions: float
    embedding_queries: float  # images
    embedding_hits: float  # of all tiers
    embedding_host_hits: float
    embedding_evictions: float
    embedding_host_evictions: float
    images_decoded: float
    images_encoded: float
    num_pictures: int  # distinct ones of the workload

    @property
    def figures(self) -> Figures:
        """How often each picture was worked on; nothing of a server that does not count as ours does."""
        if not self.embedding_queries or not self.num_pictures:
            return {}
        return {
            "decodes_per_picture": self.images_decoded / self.num_pictures,
            "encodes_per_picture": self.images_encoded / self.num_pictures,
        }

    @property
    def lines(self) -> list[str]:
        prefix, images = self.prefix_queries, self.embedding_queries
        return [
            f"  KV prefix: {share(self.prefix_hits, prefix)} of {prefix:.0f} tokens hit, "
            f"{share(self.prefix_host_hits, prefix)} from host memory; blocks evicted: "
            f"{self.prefix_evictions:.0f}, from host memory {self.prefix_host_evictions:.0f}",
            f"  embeddings: {share(self.embedding_hits, images)} of {images:.0f} images hit, "
            f"{share(self.embedding_host_hits, images)} from host memory; images evicted: "
            f"{self.embedding_evictions:.0f}, from host memory {self.embedding_host_evictions:.0f}",
            f"  pictures: {self.num_pictures}, decoded {self.images_decoded:.0f} times, "
            f"encoded {self.images_encoded:.0f} times",
        ]


def caches_between(before: Scrape, after: Scrape, num_pictures: int) -> Caches:
    def moved(name: str) -> float:
        return total(after, name) - total(before, name)

    return Caches(
        prefix_queries=moved("prefix_cache_queries"),
        prefix_hits=moved("prefix_cache_hits"),
        prefix_host_hits=moved("prefix_cache_host_hits"),
        prefix_evictions=moved("prefix_cache_evictions"),
        prefix_host_evictions=moved("prefix_cache_host_evictions"),
        embedding_queries=moved("embedding_cache_queries"),
        embedding_hits=moved("embedding_cache_hits") + moved("embedding_cache_host_hits"),
        embedding_host_hits=moved("embedding_cache_host_hits"),
        embedding_evictions=moved("embedding_cache_evictions"),
        embedding_host_evictions=moved("embedding_cache_host_evictions"),
        images_decoded=moved("images_decoded"),
        images_encoded=moved("images_encoded"),
        num_pictures=num_pictures,
    )


def total(scrape: Scrape, counter: str) -> float:
    return sum(value for (_, name), value in scrape.counters.items() if name == counter)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "none"
