"""pairs.npy of a shard set: for each frame the others of its sequence that see the same."""

from __future__ import annotations

import numpy as np

from shards.index import DamagedIndexError, how_to_make_pairs, map_rows
from shards.reader import ShardSet
from shards.schema import PAIRS_FILE, pair_dtype, row_crc


class Pairs:
    """The rows (shards.schema.pair_dtype), mapped from disk; of a remote set they are fetched once.

    Raises ValueError if the set has none, DamagedIndexError if they are not the set's.
    """

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set
        self.repair = how_to_make_pairs(str(shard_set))
        if not shard_set.has_pairs:
            raise ValueError(f"{shard_set}: has no {PAIRS_FILE}; {self.repair}")
        path = shard_set.index_path(PAIRS_FILE)
        if not path.is_file() or path.stat().st_size != shard_set.dataset["files"][PAIRS_FILE]["size"]:
            raise DamagedIndexError(f"{path}: missing or cut off; {self.repair}")
        self.rows = map_rows(path, pair_dtype, "overlap", repair=self.repair)
        if len(self.rows) != len(shard_set.frames):
            raise DamagedIndexError(
                f"{path}: is of {len(self.rows)} frames, not {len(shard_set.frames)}; {self.repair}"
            )

    def neighbors(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the frames that overlap with a frame, best first, and their overlaps from 0 to 1.

        Raises DamagedIndexError for a row that is not as it was written, DamagedMemberError for such a frame's row.
        """
        row = self.rows[frame]
        sequence = self.shard_set.sequences[self.shard_set.row(frame)["sequence"]]
        count = np.count_nonzero(row["overlap"])
        others = row["neighbors"][:count].astype(np.int64)
        if row_crc(row) != row["row_crc"] or (others >= sequence["count"]).any():
            raise DamagedIndexError(f"{self.shard_set}/{PAIRS_FILE}: row {frame} is damaged; {self.repair}")
        return others + int(sequence["first"]), row["overlap"][:count] / 255
