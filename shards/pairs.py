"""pairs.npy of a shard set: for each frame the others of its sequence that see the same."""

from __future__ import annotations

import numpy as np

from shards.index import DamagedIndexError, how_to_make_pairs, map_rows, sha256
from shards.reader import ShardSet
from shards.schema import DATASET_FILE, PAIRS_FILE, pair_dtype, row_crc


class Pairs:
    """The rows (shards.schema.pair_dtype), mapped from disk; of a remote set they are fetched once.

    whole: whether all of the file must be the set's, or the rows that are read.
    Raises ValueError if the set has none, DamagedIndexError if they are not the set's.
    """

    def __init__(self, shard_set: ShardSet, *, whole: bool = True) -> None:
        self.shard_set = shard_set
        self.repair = how_to_make_pairs(str(shard_set))
        if not shard_set.has_pairs:
            raise ValueError(f"{shard_set}: has no {PAIRS_FILE}; {self.repair}")
        if whole:
            shard_set.refresh_index(PAIRS_FILE)
        path = shard_set.index_path(PAIRS_FILE)
        if not path.is_file() or path.stat().st_size != shard_set.dataset["files"][PAIRS_FILE]["size"]:
            raise DamagedIndexError(f"{path}: not of the size that {DATASET_FILE} says; {self.repair}")
        if whole and sha256(path) != shard_set.pairs_digest:
            raise DamagedIndexError(f"{path}: not the one that {DATASET_FILE} describes; {self.repair}")
        self.rows = map_rows(path, pair_dtype, "overlap", repair=self.repair)
        if len(self.rows) != len(shard_set.frames):
            raise DamagedIndexError(
                f"{path}: is of {len(self.rows)} frames, not {len(shard_set.frames)}; {self.repair}"
            )

    def neighbors(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the frames that overlap with a frame, best first, and their overlaps from 0 to 1.

        Raises DamagedIndexError for a row that is not as it was written.
        """
        row = self.rows[frame]
        sequences = self.shard_set.sequences
        sequence = sequences[np.searchsorted(sequences["first"], frame, side="right") - 1]
        count = np.count_nonzero(row["overlap"])
        others = row["neighbors"][:count].astype(np.int64)
        if row_crc(row) != row["row_crc"] or (others >= sequence["count"]).any():
            raise DamagedIndexError(f"{self.shard_set}/{PAIRS_FILE}: row {frame} is damaged; {self.repair}")
        return others + int(sequence["first"]), row["overlap"][:count] / 255
