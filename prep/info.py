"""What a shard set holds, and what a pack did, for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

import shards
from prep.check import CaptureCheck
from prep.packing.pack import PackResult
from prep.packing.work import read_report
from prep.terminal import console, counted, size_text
from shards.index import REPAIR, sha256
from shards.pairs import Pairs
from shards.schema import DATASET_FILE, FRAMES_FILE, REPORT_FILE

SHOWN_DOUBTS = 5  # sequences


def print_pack(out: Path, result: PackResult, *, shared_frames: bool) -> None:
    click.echo(f"{out}: {size_text(result.bytes)}")
    table = Table("split", "sequences", "frames")
    for split, counts in result.splits.items():
        table.add_row(split, f"{counts['sequences']:,}", f"{counts['frames']:,}")
    console.print(table)
    for reason, count in result.skipped.items():
        click.echo(f"{counted(count, 'annotated sequence')} skipped: {reason}")
    if result.without_depth:
        click.echo(f"{counted(result.without_depth, 'frame')} without depth: for cameras only")
    if result.short:
        click.echo(f"{counted(len(result.short), 'sequence')} left out: too few usable frames (see --min-frames)")
    for reason, count in result.reasons.most_common():
        click.echo(f"{counted(count, 'frame')} left out: {reason}")
    for place, doubt in result.doubtful[:SHOWN_DOUBTS]:
        click.echo(f"DOUBTFUL: {place}: {doubt}")
    if len(result.doubtful) > SHOWN_DOUBTS:
        click.echo(f"DOUBTFUL: {len(result.doubtful) - SHOWN_DOUBTS:,} more sequences")
    if result.in_both:
        click.echo(
            f"{counted(result.in_both, 'sequence')} of the test split "
            + ("is also trained on" if result.in_both == 1 else "are also trained on")
            + ("" if shared_frames else " (other frames of them)")
            + ": what is measured there holds for places that were seen"
        )
    if result.bad or result.short or result.doubtful:
        click.echo(f"each is listed in {out / REPORT_FILE}")
    if read_report(out) is None:
        click.echo(f"{out / REPORT_FILE} is gone or damaged: what was left out is not known")


def print_info(shard_set: str) -> None:
    """Raises ValueError for a damaged index."""
    opened = shards.open(shard_set)
    frames, sequences = opened.frames, opened.sequences
    if sha256(opened.index_path(FRAMES_FILE)) != opened.dataset["files"][FRAMES_FILE]["sha256"]:
        raise ValueError(f"{shard_set}/{FRAMES_FILE}: not the one that {DATASET_FILE} describes; {REPAIR}")
    size = sum(entry["size"] for entry in opened.dataset["files"].values())
    click.echo(f"{shard_set}: {size_text(size)}")
    table = Table("split", "category", "sequences", "frames")
    for split in opened.dataset["splits"]:
        rows = sequences[opened.split(split)]
        for category in np.unique(rows["category"]):
            part = rows[rows["category"] == category]
            table.add_row(split, category.decode(), f"{len(part):,}", f"{part['count'].sum():,}")
    console.print(table)
    with_depth = int((frames["depth_size"] > 0).sum())
    members = int(frames["jpg_size"].sum(dtype=np.int64) + frames["depth_size"].sum(dtype=np.int64))
    click.echo(f"{counted(len(opened.tars), 'tar')}, {counted(len(frames), 'frame')} ({with_depth:,} with depth)")
    click.echo(f"{members / len(frames) / 1e3:,.1f} kB a frame (JPEG and depth)")
    try:
        rows = Pairs(opened).rows
        guessed = f"; guessed for {counted(int(rows['guessed'].sum()), 'frame')} without depth" * bool(
            rows["guessed"].any()
        )
        neighbors = np.count_nonzero(rows["overlap"], axis=1).mean()
        click.echo(f"{neighbors:.1f} other frames are known to see some of the same, on average{guessed}")
    except ValueError as error:
        click.echo(f"which frames see the same is not known: {error}")
    pairs, counts = np.unique(np.stack([frames["width"], frames["height"]], axis=1), axis=0, return_counts=True)
    common = sorted(zip(counts, pairs, strict=True), key=lambda item: -item[0])[:5]
    click.echo("width x height: " + ", ".join(f"{w} x {h} ({n:,})" for n, (w, h) in common))
    for name in opened.dataset["source"].get("captures", {}):
        click.echo(f"{name}: {kind_of_depth(opened.dataset, name)}")
    options = ", ".join(f"{key} {value}" for key, value in sorted(opened.dataset["options"].items()))
    click.echo(f"packed with {options}" if options else "packed with unknown options: its index was rebuilt")


def kind_of_depth(dataset: dict[str, Any], name: str) -> str:
    """What a set says of the depth and the unit of a capture; empty for others."""
    said = dataset["source"].get("captures", {}).get(name)
    if said is None:
        return ""
    unit = {True: "meters", False: "no known unit", None: "a unit that pack was not told (--metric)"}[said["metric"]]
    return f"{said['depth']} depth, lengths in {unit}"


def print_checks(checks: list[CaptureCheck]) -> None:
    """What was measured of each capture, and what is wrong with those that do not fit."""
    table = Table("capture", "pairs of views", "matches near epipolar lines", "depth over triangulated", "verdict")
    verdicts = {True: "fits", False: "DOES NOT FIT", None: "cannot tell"}
    for check in checks:
        near = "" if check.near is None else f"{check.near:.0%}"
        ratio = "" if check.depth_ratio is None else f"{check.depth_ratio:.3g}"
        table.add_row(check.name, str(check.pairs), near, ratio, verdicts[check.fits])
    console.print(table)
    for check in checks:
        click.echo(f"{check.name}: {check.words}")
