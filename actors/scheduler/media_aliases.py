"""Media by the names that clients give them, and what edges have looked up by name and not used yet."""

from __future__ import annotations

from collections import OrderedDict

from vlmrt.runtime.messages import ActorName, KnownMedia, MediaItem, MmHash

MAX_ALIASES = 65_536
MAX_LOOKUPS = 1024  # open at once, of one edge


class MediaAliases:
    """(cache_salt, uuid) -> what was sent under that name last; the least recently used are forgotten.

    A name says what an image is, not that its rows can still be had.
    """

    def __init__(self, max_aliases: int = MAX_ALIASES) -> None:
        self._max_aliases = max_aliases
        self._known: OrderedDict[tuple[str, str], KnownMedia] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def register(self, cache_salt: str, item: MediaItem) -> None:
        """From now on its uuid names this item."""
        name = (cache_salt, item.uuid)
        self._known[name] = KnownMedia(item.mm_hash, item.num_tokens, item.grid_thw)
        self._known.move_to_end(name)
        if len(self._known) > self._max_aliases:
            self._known.popitem(last=False)

    def find(self, cache_salt: str, uuid: str) -> KnownMedia | None:
        name = (cache_salt, uuid)
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
        return known

    def clear(self) -> None:
        self._known.clear()


class LookUps:
    """What each edge's open lookups have found, which is to stay until they end."""

    def __init__(self, max_lookups: int = MAX_LOOKUPS) -> None:
        self._max_lookups = max_lookups
        self._found: dict[ActorName, dict[int, tuple[MmHash, ...]]] = {}

    def begin(self, edge: ActorName, lookup_id: int, found: tuple[MmHash, ...]) -> bool:
        """False if that edge has too many open, or this one already."""
        of_edge = self._found.setdefault(edge, {})
        if lookup_id in of_edge or len(of_edge) >= self._max_lookups:
            return False
        of_edge[lookup_id] = found
        return True

    def end(self, edge: ActorName, lookup_id: int) -> tuple[MmHash, ...]:
        """What need not stay for its sake any more; nothing if there is no such lookup."""
        return self._found.get(edge, {}).pop(lookup_id, ())

    def drop_edge(self, edge: ActorName) -> list[MmHash]:
        """As `end`, for all lookups of an edge that is gone."""
        return [mm_hash for found in self._found.pop(edge, {}).values() for mm_hash in found]
