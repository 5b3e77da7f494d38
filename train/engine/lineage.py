"""What a checkpoint was trained on, and what it began from, as far as it says."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import shards
from shards.splits import Part, SharedPlaces, shared_places
from train.data.plan import validation_plan
from train.data.split import Split
from train.engine.checkpoint import load
from train.engine.settings import TrainConfig, data_config
from vggt.weights import NANO, fingerprint, read_checkpoint

log = logging.getLogger(__name__)


def saved_run(source: str) -> dict[str, Any] | None:
    """What a checkpoint says of the run that wrote it; None for anything but a file of the trainer."""
    path = Path(source).expanduser()
    try:
        saved = load(path) if path.is_file() else {}
        config = saved.get("config")
    except (ValueError, AttributeError):  # a file of another kind
        return None
    return saved if isinstance(config, dict) and isinstance(config.get("data"), dict) else None


def former_places(saved: dict[str, Any] | None) -> dict[str, str]:
    """Digest -> place of the shard sets that a run was ever trained on, as far as its checkpoint says."""
    if saved is None:
        return {}
    given = saved["config"]["data"].get("shards")
    paths = [given] if isinstance(given, str) else [source["path"] for source in given or ()]
    return {**saved.get("places", {}), **dict(zip(saved.get("shards", ()), paths, strict=False))}


def trained_width(source: str) -> int | None:
    """The width of the images that a checkpoint of the trainer was trained on; None: it is none."""
    saved = saved_run(source)
    return None if saved is None else data_config(saved["config"]["data"], source).width


def began_from(source: str) -> list[str]:
    """The `init` of the run that a checkpoint is of, if it says one and that is still there, and the same."""
    saved = saved_run(source)
    init = None if saved is None else saved["config"].get("init")
    if saved is None or init is None or not (init == NANO.name or Path(init).expanduser().exists()):
        return []
    expected = saved.get("init_fingerprint")  # older runs have none
    try:
        same = expected in (None, fingerprint(read_checkpoint(init)[0]))
    except ValueError:
        same = False
    if not same:
        log.warning("%s began from %s, where something else is now: not compared with it", source, init)
    return [init] * same


def trained_before(source: str | None, expected: str | None = None) -> tuple[list[Part], list[str]]:
    """The splits that a checkpoint and the `init`s before it were trained on, and messages on what is unknown.

    Both are empty for None (random weights). expected: the fingerprint that its weights must have, if known.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    seen: set[str] = set()
    while source is not None and source not in seen:
        seen.add(source)
        if source == NANO.name and not Path(source).exists():
            break  # on rendered rooms alone
        try:
            saved = saved_run(source)
            if saved is None:
                raise ValueError("it does not say")
            if expected is not None and fingerprint(saved["model"]) != expected:
                raise ValueError("another checkpoint is there now")
            data = data_config(saved["config"]["data"], source)
        except ValueError as error:
            unknown.append(f"what {source} was trained on is not known: {error}")
            break
        places = former_places(saved) or {
            place.path: place.path for place in data.sources
        }  # an old one, without digests
        for digest, path in places.items():
            opened, problems = _open_part(path, digest, data.train_split, source)
            parts, unknown = parts + opened, unknown + problems
        source, expected = saved["config"].get("init"), saved.get("init_fingerprint")
    return parts, unknown


def what_is_validated(
    config: TrainConfig, train: Split, val: Split | None, saved: dict[str, Any] | None = None
) -> SharedPlaces | None:
    """How the sequences that are validated on relate to what is trained on; None: there are none.

    saved: the checkpoint of a resumed run, which may have been trained on other sets before.

    Raises ValueError if they have frames in common, unless that is allowed.
    """
    if val is None:
        return None
    steps, _ = validation_plan(config.data, val.lengths, rank=0, world_size=1)
    trained = [(shard_set, config.data.train_split) for shard_set in train.shard_sets]
    before, unknown = trained_before(config.init, None if saved is None else saved.get("init_fingerprint"))
    now = {shard_set.digest for shard_set in train.shard_sets}
    for digest, path in former_places(saved).items():
        if digest not in now:
            parts, problems = _open_part(path, digest, config.data.train_split, "this run")
            before, unknown = before + parts, unknown + problems
    tested = [(shard_set, config.data.val_split) for shard_set in val.shard_sets]
    only = {(scene.source, scene.sequence) for step in steps for scene in step.scenes}
    shared = shared_places(trained + before, tested, only)
    if not config.data.allow_shared_frames:
        shared.check("data.allow_shared_frames=true")
    return replace(shared, unknown=tuple(unknown))


def _open_part(path: str, digest: str, split: str, who: str) -> tuple[list[Part], list[str]]:
    """A set that was trained on, if it is still there, else a message. digest: `path` if it is not known."""
    try:
        opened = shards.open(path)
        if digest not in (path, opened.digest):
            raise ValueError("another shard set is there now")
    except (ValueError, OSError) as error:
        return [], [f"{who} was trained on {path}, which cannot be compared with: {error}"]
    return [(opened, split)], []
