"""The command line vggt-prep."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import shards
from prep.co3d import Co3D
from prep.pack import PackOptions, PackResult, pack
from prep.synth import SynthOptions, synth
from shards.schema import SPLITS

console = Console(highlight=False)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can mend is said in one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except BrokenProcessPool as error:
        raise click.ClickException("a worker process died, perhaps for lack of memory: try fewer --workers") from error


@contextmanager
def process_pool(workers: int, preload: list[str]) -> Iterator[ProcessPoolExecutor]:
    """Worker processes forked from a server that has imported these modules and has no threads running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def progress_bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


workers_option = click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="all cores", help="Processes."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Packs posed captures into WebDataset shards for training VGGT."""


@main.command("pack")
@click.option("--co3d-dir", type=click.Path(path_type=Path), required=True, help="Co3D: <category>/<sequence>/images.")
@click.option("--annotation-dir", type=click.Path(path_type=Path), required=True, help="Of <category>_<split>.jgz.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the shard set.")
@click.option("--split", "splits", type=click.Choice(SPLITS), multiple=True, help="Only this split (repeatable).")
@click.option("--category", "categories", multiple=True, help="Only this category (repeatable).")
@click.option("--short-side", type=click.IntRange(0), default=648, show_default=True, help="Pixels; 0 keeps the files.")
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of resized JPEGs.")
@click.option("--min-frames", type=click.IntRange(1), default=24, show_default=True, help="Of a sequence, at least.")
@click.option("--shard-frames", type=click.IntRange(1), default=500, show_default=True, help="A shard is full at that.")
@click.option("--max-bad", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Share of bad frames.")
@workers_option
def pack_command(
    co3d_dir: Path,
    annotation_dir: Path,
    out: Path,
    splits: tuple[str, ...],
    categories: tuple[str, ...],
    max_bad: float,
    workers: int,
    short_side: int,
    quality: int,
    min_frames: int,
    shard_frames: int,
) -> None:
    """Pack Co3D frames, depths and cameras into tar shards with an index.

    Interrupted, the same command goes on where it was. Sequences that are annotated but not there are skipped, so
    a part of the download is enough.

    \b
    vggt-prep pack --co3d-dir co3d --annotation-dir co3d_anno --out shards
    vggt-prep pack --co3d-dir co3d --annotation-dir co3d_anno --out apples --category apple
    """
    options = PackOptions(short_side=short_side, quality=quality, min_frames=min_frames, shard_frames=shard_frames)
    with plain_errors(), process_pool(workers, ["prep.pack", "webdataset"]) as pool, progress_bar("frames") as bar:
        source = Co3D(co3d_dir, annotation_dir, splits or None, categories or None)
        task = bar.add_task("packing", total=None)
        result = pack(
            source,
            out,
            options,
            pool,
            max_bad=max_bad,
            workers=workers,
            on_plan=lambda frames: bar.update(task, total=frames),
            on_shard=lambda frames: bar.advance(task, frames),
        )
    print_pack(out, result)


def print_pack(out: Path, result: PackResult) -> None:
    table = Table("split", "sequences", "frames", title=f"{out}: {megabytes(result.bytes)}", title_justify="left")
    for split, counts in result.splits.items():
        table.add_row(split, f"{counts['sequences']:,}", f"{counts['frames']:,}")
    console.print(table)
    if result.skipped:
        console.print(f"{result.skipped:,} annotated sequences skipped: their folders are not there")
    if result.short:
        console.print(f"{len(result.short):,} sequences left out: too few usable frames (see --min-frames)")
    for reason, count in result.reasons.most_common():
        console.print(f"{count:,} frames left out: {reason}")
    if result.bad or result.short:
        console.print(f"each is listed in {out / 'report.json'}")


@main.command("synth")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets co3d/ and annotations/.")
@click.option("--scenes", type=click.IntRange(8), default=40, show_default=True, help="Every eighth is for testing.")
@click.option("--frames", type=click.IntRange(1), default=30, show_default=True, help="A scene.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same files.")
@workers_option
def synth_command(out: Path, scenes: int, frames: int, seed: int, workers: int) -> None:
    """Render turn-table captures of boxes and balls in Co3D's layout, to try everything without a download.

    \b
    vggt-prep synth --out data/synth
    vggt-prep pack --co3d-dir data/synth/co3d --annotation-dir data/synth/annotations --out data/shards
    """
    options = SynthOptions(scenes=scenes, frames=frames, seed=seed)
    with plain_errors(), process_pool(workers, ["prep.synth"]) as pool, progress_bar("scenes") as bar:
        task = bar.add_task("rendering", total=scenes)
        made = synth(out, options, pool, on_scene=lambda: bar.advance(task))
        bar.update(task, completed=scenes)
    done = f"{scenes} scenes of {frames} frames" + ("" if made else ", rendered before")
    console.print(f"{out}: {done}; pack them with --co3d-dir {out}/co3d --annotation-dir {out}/annotations")


@main.command("info")
@click.argument("path", type=click.Path(path_type=Path))
def info_command(path: Path) -> None:
    """What a shard set holds: categories, sequences, frames, bytes, resolutions and the options it was packed with.

    \b
    vggt-prep info data/shards
    """
    with plain_errors():
        shard_set = shards.open(path)
        frames, sequences = shard_set.frames, shard_set.sequences
    size = sum(entry["size"] for entry in shard_set.dataset["files"].values())
    table = Table("split", "category", "sequences", "frames", title=f"{path}: {megabytes(size)}", title_justify="left")
    for split in shard_set.dataset["splits"]:
        rows = sequences[shard_set.split(split)]
        for category in np.unique(rows["category"]):
            part = rows[rows["category"] == category]
            table.add_row(split, category.decode(), f"{len(part):,}", f"{part['count'].sum():,}")
    console.print(table)
    with_depth = int((frames["depth_size"] > 0).sum())
    members = int(frames["jpg_size"].sum(dtype=np.int64) + frames["depth_size"].sum(dtype=np.int64))
    console.print(f"{len(shard_set.tars)} tars, {len(frames):,} frames ({with_depth:,} with depth)")
    console.print(f"{members / len(frames) / 1e3:,.1f} kB a frame (JPEG and depth)")
    pairs, counts = np.unique(np.stack([frames["width"], frames["height"]], axis=1), axis=0, return_counts=True)
    common = sorted(zip(counts, pairs, strict=True), key=lambda item: -item[0])[:5]
    console.print("sizes: " + ", ".join(f"{w} x {h} ({n:,})" for n, (w, h) in common))
    console.print("packed with " + ", ".join(f"{k} {v}" for k, v in sorted(shard_set.dataset["options"].items())))
