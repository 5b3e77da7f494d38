"""What a checkpoint was trained on, and what it began from, as far as it says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import shards
from shards.splits import Part, SharedPlaces, shared_places
from train.data.plan import validation_plan
from train.data.split import Split
from train.engine.checkpoint import load
from train.engine.settings import TrainConfig, data_config

log = logging.getLogger(__name__)


def saved_config(source: str) -> dict[str, Any] | None:
    """The configuration of the run that wrote a checkpoint; None for anything but a file of the trainer."""
    path = Path(source).expanduser()
    try:
        config = load(path).get("config") if path.is_file() else None
    except (ValueError, AttributeError):  # a file of another kind
        return None
    return config if isinstance(config, dict) and isinstance(config.get("data"), dict) else None


def trained_before(source: str | None) -> tuple[list[Part], list[str]]:
    """The splits that a checkpoint was trained on, those of its `init` included, and what of them cannot be opened.

    Empty for None, and for what says nothing of that.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    seen: set[str] = set()
    while source is not None and source not in seen and (config := saved_config(source)) is not None:
        seen.add(source)
        try:
            data = data_config(config["data"], source)
        except ValueError as error:  # of another version
            unknown.append(f"what {source} was trained on is not known: {error}")
            break
        for place in data.sources:
            try:
                parts.append((shards.open(place.path), data.train_split))
            except (ValueError, OSError) as error:
                unknown.append(f"{source} was trained on {place.path}, which cannot be compared with: {error}")
        source = config.get("init")
    return parts, unknown


def what_is_validated(config: TrainConfig, train: Split, val: Split | None) -> SharedPlaces | None:
    """How the sequences that are validated on relate to what is trained on; None: there are none.

    Raises ValueError if they have frames in common, unless that is allowed.
    """
    if val is None:
        return None
    steps, _ = validation_plan(config.data, val.lengths, rank=0, world_size=1)
    trained = [(shard_set, config.data.train_split) for shard_set in train.shard_sets]
    before, unknown = trained_before(config.init)
    for problem in unknown:
        log.warning("%s", problem)
    tested = [(shard_set, config.data.val_split) for shard_set in val.shard_sets]
    only = {(scene.source, scene.sequence) for step in steps for scene in step.scenes}
    found = shared_places(trained + before, tested, only)
    if not config.data.allow_shared_frames:
        found.check("data.allow_shared_frames=true")
    return found
