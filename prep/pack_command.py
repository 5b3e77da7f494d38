"""vggt-prep pack: its options, what they mean, and how it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress, TaskID

import shards
from prep.check import check_capture
from prep.importers.captures import CaptureOptions, Captures, Split
from prep.importers.co3d import Co3D
from prep.importers.co3d_official import OfficialCo3D
from prep.importers.layouts import FORMATS
from prep.importers.source import Intrinsics, Source
from prep.info import print_pack
from prep.packing.executors import dask_cluster, process_pool
from prep.packing.pack import pack
from prep.packing.pairs import NEIGHBORS, add_pairs
from prep.packing.plan import PackOptions
from prep.packing.shard import ShardDone
from prep.packing.work import shortened
from prep.terminal import (
    Fraction,
    LocalPath,
    PinholeNumbers,
    plain_errors,
    progress_bar,
    size_text,
    start,
    workers_option,
)
from shards.schema import PAIRS_FILE, SPLITS

CAPTURE_MIN_FRAMES = 5
CHECKED = 5  # captures, before they are packed


@click.command("pack")
@click.argument("captures", nargs=-1, type=LocalPath())
@click.option("--format", "layout", type=click.Choice([*FORMATS]), help="Of the captures.  [default: as recognized]")
@click.option("--test-fraction", type=Fraction(min_open=True), help="Of the captures, to test on.")
@click.option("--test", "test_names", multiple=True, help="A capture to test on; can be repeated.")
@click.option("--test-tail", type=Fraction(min_open=True), help="Test on the last part of each capture.")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Take one of so many frames.")
@click.option(
    "--min-motion",
    type=(click.FloatRange(0), click.FloatRange(0, 1)),
    metavar="DEGREES FRACTION",
    help="Leave out frames that turned less, and moved less of the capture's extent.",
)
@click.option("--depth-range", type=(float, float), metavar="NEAR FAR", help="Depths beyond are unknown.")
@click.option("--trust", is_flag=True, help="Do not measure first whether captures fit; see vggt-prep check.")
@click.option("--metric/--no-metric", default=None, help="Lengths are meters.  [default: as the layout says]")
@click.option(
    "--intrinsics", type=PinholeNumbers(), help="fx,fy,cx,cy, where the layout says none; (0, 0) is a pixel's center."
)
@click.option("--co3d-dir", type=LocalPath(), help="Co3D, in place of captures.")
@click.option("--annotation-dir", type=LocalPath(), help="VGGT's cameras: {cat}_{split}.jgz.")
@click.option("--set-list", help="Of Co3D's own, what is for training and testing.  [default: fewview_dev]")
@click.option("--min-quality", type=float, help="Least viewpoint_quality_score of Co3D's sequences.")
@click.option("--out", type=LocalPath(), required=True, help="The shard set.")
@click.option("--split", "splits", type=click.Choice(SPLITS), multiple=True, help="Of Co3D, only this; repeatable.")
@click.option("--category", "categories", multiple=True, help="Of Co3D, only this; repeatable.")
@click.option("--short-side", type=click.IntRange(0), default=648, show_default=True, help="Pixels; 0 keeps files.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG's, of resized images."
)
@click.option("--min-frames", type=click.IntRange(1), help="Fewest of a sequence.  [default: 24; of captures 5]")
@click.option("--shard-frames", type=click.IntRange(1), default=500, show_default=True, help="Fill a shard up to this.")
@click.option("--max-bad", type=Fraction(), default=0.02, show_default=True, help="Most bad frames, as a fraction.")
@click.option("--pairs/--no-pairs", default=True, help="Measure which frames see the same.  [default: pairs]")
@workers_option
@click.option("--allow-shared-frames", is_flag=True, help="Let frames be in both splits.")
@click.option("--scheduler", help="Of a Dask cluster, tcp://host:port; its workers must see both directories.")
def pack_command(
    out: Path,
    max_bad: float,
    pairs: bool,
    workers: int,
    scheduler: str | None,
    short_side: int,
    quality: int,
    min_frames: int | None,
    shard_frames: int,
    allow_shared_frames: bool,
    **of_source: Any,
) -> None:
    """Pack captures, or Co3D, into tar shards with an index.

    CAPTURES are folders, each one capture or a folder of them: COLMAP projects, nerfstudio's transforms.json, Polycam,
    Record3D, TUM RGB-D, 7-Scenes, ScanNet exports, ARKitScenes, VGGT-Omega's scenes, MapAnything's WAI, or our own
    frames.csv (see docs/CAPTURES.md). With four
    captures or more a tenth of them is for testing, with fewer the last fifth of each.

    Of Co3D with --annotation-dir the cameras are those of VGGT's annotation files, without it those that come with
    Co3D; then --set-list says what is for training and what for testing. Sequences that are annotated but not there
    are skipped, so a part of the download is enough. A camera's rotation may be off by 0.001, as rounded text is; the
    nearest one is stored, and the middle of a sequence's cameras becomes its origin.

    After an interruption, the same command continues. If tars of a finished set are missing, it makes just these
    again: to repair one that vggt-prep verify finds damaged, or to add frames that were bad, remove the tar first.

    \b
    vggt-prep pack captures/ --out shards
    vggt-prep pack kitchen office hall --out shards --test hall
    vggt-prep pack --co3d-dir co3d --annotation-dir co3d_anno --out shards
    vggt-prep pack --co3d-dir co3d --set-list manyview_dev_0 --min-quality 0.5 --out shards
    vggt-prep pack --co3d-dir /nfs/co3d --out /nfs/shards --scheduler tcp://node0:8786
    """
    least = min_frames or (CAPTURE_MIN_FRAMES if of_source["captures"] else PackOptions.min_frames)
    options = PackOptions(short_side=short_side, quality=quality, min_frames=least, shard_frames=shard_frames)
    stopped = "stopped; finished shards are kept, and the same command continues from there"
    with plain_errors(stopped), pack_executor(scheduler, workers) as (executor, parallel):
        if scheduler is not None:  # its workers are in other directories
            of_source["captures"] = [path.absolute() for path in of_source["captures"]]
            of_source["co3d_dir"] = of_source["co3d_dir"] and of_source["co3d_dir"].absolute()
            out = out.absolute()
        source = pack_source(**of_source, min_frames=least)
        with progress_bar("frames", "{task.fields[made]}") as bar:
            result = pack(
                source,
                out,
                options,
                executor,
                max_bad=max_bad,
                parallel=parallel,
                allow_shared_frames=allow_shared_frames,
                **shown(bar),
            )
        print_pack(out, result, shared_frames=allow_shared_frames)
        if pairs:
            try:
                opened = shards.open(out)
                if not opened.has_pairs or PAIRS_FILE in opened.size_problems():
                    make_pairs(out, executor)
            except (ValueError, OSError) as error:
                click.echo(
                    f"which frames see the same is not known, for data.sampling=overlap alone: {error}", err=True
                )


def make_pairs(out: Path, executor: Executor, neighbors: int = NEIGHBORS) -> None:
    """Add pairs.npy to a set, and show how it goes."""
    with progress_bar("frames") as bar:
        tasks: list[TaskID] = []
        alone = add_pairs(
            out,
            executor,
            neighbors,
            on_plan=lambda frames: tasks.append(start(bar, "comparing", frames)),
            on_tar=lambda frames: bar.advance(tasks[0], frames),
        )
    without = f"; {alone:,} with no other that is known to" if alone else ""
    click.echo(f"{out / PAIRS_FILE}: which frames see the same as others{without}")


def pack_source(
    *,
    captures: tuple[Path, ...],
    min_frames: int,
    layout: str | None,
    test_fraction: float | None,
    test_names: tuple[str, ...],
    test_tail: float | None,
    every: int,
    min_motion: tuple[float, float] | None,
    depth_range: tuple[float, float] | None,
    trust: bool,
    metric: bool | None,
    intrinsics: Intrinsics | None,
    co3d_dir: Path | None,
    annotation_dir: Path | None,
    set_list: str | None,
    min_quality: float | None,
    splits: tuple[str, ...],
    categories: tuple[str, ...],
) -> Source:
    """What is packed. Raises ValueError for options that do not go together."""
    if bool(captures) == (co3d_dir is not None):
        raise ValueError("give either folders of captures, or --co3d-dir")
    if captures:
        if annotation_dir or set_list or min_quality is not None or splits or categories:
            raise ValueError("--annotation-dir, --set-list, --min-quality, --split and --category are for --co3d-dir")
        if sum((test_fraction is not None, bool(test_names), test_tail is not None)) > 1:
            raise ValueError("give one of --test-fraction, --test and --test-tail")
        if depth_range is not None and not 0 <= depth_range[0] < depth_range[1] < math.inf:
            raise ValueError(f"--depth-range {depth_range[0]:g} {depth_range[1]:g}: expected 0 <= NEAR < FAR")
        if min_motion is not None and not all(0 <= least < math.inf for least in min_motion):
            raise ValueError(f"--min-motion {min_motion[0]:g} {min_motion[1]:g}: expected numbers of at least 0")
        split = Split(fraction=test_fraction, names=test_names, tail=test_tail)
        found = Captures(
            list(captures),
            CaptureOptions(
                format=layout,
                every=every,
                min_motion=min_motion,
                depth_range=depth_range,
                metric=metric,
                intrinsics=intrinsics,
                min_frames=min_frames,
                split=split,
            ),
        )
        for title in found.titles:
            click.echo(title)
        if found.passed_over:
            click.echo(f"PASSED OVER, as no captures of a known layout: {shortened(found.passed_over)}")
        if not trust:
            check_some(found)
        if found.split:
            click.echo(f"testing on {shortened(sorted(found.split))}")
        if found.torn:
            click.echo(f"tested on, though others of the same place are trained on: {shortened(found.torn)}")
        if found.same_places:
            click.echo("testing on the last frames of each capture: places that are trained on")
        return found
    assert co3d_dir is not None
    of_captures = (layout, test_fraction, test_tail, min_motion, depth_range, metric, intrinsics)
    if any(value is not None for value in of_captures) or test_names or every != 1 or trust:
        raise ValueError(
            "--format, --test, --test-fraction, --test-tail, --every, --min-motion, --depth-range, --metric, "
            "--intrinsics and --trust are for captures: not with --co3d-dir"
        )
    if annotation_dir is None:
        return OfficialCo3D(co3d_dir, set_list or "fewview_dev", min_quality, splits or None, categories or None)
    if set_list is not None or min_quality is not None:
        raise ValueError("--set-list and --min-quality are of Co3D's own annotations: not with --annotation-dir")
    return Co3D(co3d_dir, annotation_dir, splits or None, categories or None)


def check_some(found: Captures) -> None:
    """Measure a few of the captures before hours of work. Raises ValueError if one does not fit."""
    places = np.unique(np.linspace(0, len(found.found) - 1, min(CHECKED, len(found.found))).round().astype(int))
    for place in places:
        check = check_capture(found.found[place])
        click.echo(f"{check.name}: {check.words}")
        if check.fits is False:
            raise ValueError(
                f"{check.name}: {check.words}; see vggt-prep check. Repair it, or give --trust to pack it as it is"
            )


def shown(bar: Progress) -> dict[str, Callable[..., None]]:
    """The callbacks of a pack that show on the bar how it goes."""
    made = ShardDone(frames=0, bytes=0, bad=0)
    began = time.monotonic()
    tasks: list[TaskID] = []

    def on_plan(frames: int, kept: int) -> None:
        if kept == frames:
            click.echo("packed before: nothing to do")
        else:
            tasks.append(start(bar, "packing", frames, completed=kept, made=""))

    def on_shard(done: ShardDone) -> None:
        nonlocal made
        made += done
        rate = made.frames / (time.monotonic() - began)
        text = f"{rate:,.1f}/s, {size_text(made.bytes)}, {made.bad} bad"
        bar.update(tasks[0], advance=done.frames, made=text)

    return {"on_plan": on_plan, "on_shard": on_shard}


@contextmanager
def pack_executor(scheduler: str | None, workers: int) -> Iterator[tuple[Executor, int]]:
    if scheduler is None:
        with process_pool(workers, ["prep.packing.pack", "prep.packing.pairs", "webdataset"]) as pool:
            yield pool, workers
    else:
        with dask_cluster(scheduler) as cluster:
            yield cluster
