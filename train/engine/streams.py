"""The shard sets that a run draws from, and where it is in each: a resumed run may add, remove and reweight them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shards import ShardSet
from shards.schema import PAIRS_FILE
from train.data.plan import DataConfig, DataState, ShardSource

Streams = dict[str, list[int]]  # by a set's digest: the number of its stream in the random draws, and the position


def new_streams(shard_sets: Sequence[ShardSet], before: Streams) -> Streams:
    """The stream that each set had, or a new one from its beginning. Raises ValueError if a set is given twice."""
    first_free = 1 + max((number for number, _ in before.values()), default=-1)
    streams: Streams = {}
    for shard_set in shard_sets:
        if shard_set.digest in streams:
            raise ValueError(
                f"data.shards: {shard_set} is given twice; give it once, with the sum of the weights (a run "
                "that had it twice continues from the later position)"
            )
        joined = len(streams.keys() - before.keys())
        streams[shard_set.digest] = before.get(shard_set.digest, [first_free + joined, 0])
    return streams


def saved_streams(saved: dict[str, Any]) -> Streams:
    """The streams of a checkpoint, those of sets that left the run before included."""
    if "streams" in saved["data"]:
        return saved["data"]["streams"]
    numbered = enumerate(zip(saved["shards"], saved["data"]["positions"], strict=True))  # of an earlier version
    return {digest: [number, position] for number, (digest, position) in numbered}


def streams_at(state: DataState, shard_sets: Sequence[ShardSet], streams: Streams) -> Streams:
    """`streams`, with the positions of those that are in use moved to a state."""
    positions = zip(shard_sets, state.positions, strict=True)
    return streams | {s.digest: [streams[s.digest][0], position] for s, position in positions}


def state_of(step: int, streams: Streams) -> DataState:
    """The state at a step, of the sets in use."""
    return DataState(step, tuple(position for _, position in streams.values()))


def mixture_changes(shard_sets: Sequence[ShardSet], data: DataConfig, saved: dict[str, Any]) -> list[str]:
    """What a resumed run does differently, for people."""
    before, now = set(saved["shards"]), {shard_set.digest for shard_set in shard_sets}
    joined = [str(shard_set) for shard_set in shard_sets if shard_set.digest not in before]
    changes = [f"data.shards: {place} joins the run" for place in joined]
    if before - now:
        changes.append(f"data.shards: {len(before - now)} of {len(before)} sets left the run")
    former = dict(zip(saved["shards"], _sources(saved["config"]["data"]["shards"]), strict=True))
    for shard_set, source in zip(shard_sets, data.sources, strict=True):
        was = former.get(shard_set.digest, source)
        if was.weight != source.weight:
            changes.append(f"data.shards: {shard_set} now has weight {source.weight:g}, not {was.weight:g}")
        now, before = (one.sampling or data.sampling for one in (source, was))  # the latter may not change
        if now != before:
            changes.append(f"data.shards: views of {shard_set} are now drawn as {now}, not as {before}")
        pairs = saved.get("pairs", {}).get(shard_set.digest)
        if pairs is not None and pairs != shard_set.pairs_digest:
            changes.append(
                f"data.shards: {shard_set} has another {PAIRS_FILE} now, so other views are drawn from here on"
            )
    return changes


def _sources(shards: Any) -> list[ShardSource]:
    return [ShardSource(**source) for source in shards] if isinstance(shards, list) else [ShardSource(path=shards)]
