"""What a checkpoint was trained on, and what it began from, as far as it says."""

from __future__ import annotations

from pathlib import Path

import shards
from shards.splits import Part
from train.checkpoint import load
from train.config import data_config


def trained_before(source: str | None) -> tuple[list[Part], list[str]]:
    """The splits that a checkpoint was trained on, those of its `init` included, and what of them cannot be opened.

    Empty for None, and for anything but a file that the trainer has written: others do not say.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    seen: set[Path] = set()
    while source is not None and (path := Path(source).expanduser().resolve()).is_file() and path not in seen:
        seen.add(path)
        try:
            config = load(path).get("config")
        except (ValueError, AttributeError):  # a file of another kind
            config = None
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            break
        try:
            data = data_config(config["data"], str(path))
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
