"""The shard format: posed frames with depth in WebDataset tars, with an index of fixed-size rows. No torch here."""

from shards.index import DamagedIndexError
from shards.reader import DamagedMemberError, ShardSet, open  # noqa: A004
from shards.storage import StorageError

__all__ = ["DamagedIndexError", "DamagedMemberError", "ShardSet", "StorageError", "open"]
