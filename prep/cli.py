"""The command line vggt-prep."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

import click
from rich.progress import (
    Progress,
    TaskID,
)

import shards
from prep.importers.co3d import Co3D
from prep.importers.co3d_official import OfficialCo3D
from prep.info import print_info, print_pack
from prep.packing.executors import dask_cluster, process_pool
from prep.packing.pack import pack
from prep.packing.plan import PackOptions
from prep.packing.shard import ShardDone
from prep.synth.scenes import SynthOptions, synth
from prep.terminal import Fraction, LocalPath, counted, plain_errors, progress_bar, size_text, start
from shards.schema import SPLITS

workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    default=len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Packs posed captures into WebDataset shards for training VGGT.

    \b
    vggt-prep synth --out captures                     render something to try
    vggt-prep pack --co3d-dir co3d --out shards        make a shard set
    vggt-prep preview shards                           look at it
    vggt-prep verify shards                            check each of its bytes
    """


@main.command("pack")
@click.option("--co3d-dir", type=LocalPath(), required=True, help="Co3D: <category>/<sequence>/images.")
@click.option("--annotation-dir", type=LocalPath(), help="VGGT's <category>_{train,test}.jgz.")
@click.option("--set-list", show_default="fewview_dev", help="Without --annotation-dir: which of set_lists/.")
@click.option("--min-quality", type=float, help="Without --annotation-dir: least viewpoint_quality_score.")
@click.option("--out", type=LocalPath(), required=True, help="Directory of the shard set.")
@click.option("--split", "splits", type=click.Choice(SPLITS), multiple=True, help="Only this split (repeatable).")
@click.option("--category", "categories", multiple=True, help="Only this category (repeatable).")
@click.option("--short-side", type=click.IntRange(0), default=648, show_default=True, help="Pixels; 0 keeps files.")
@click.option(
    "--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="JPEG's, of resized images."
)
@click.option("--min-frames", type=click.IntRange(1), default=24, show_default=True, help="Fewest of a sequence.")
@click.option("--shard-frames", type=click.IntRange(1), default=500, show_default=True, help="Fill a shard up to this.")
@click.option("--max-bad", type=Fraction(), default=0.02, show_default=True, help="Most bad frames, as a fraction.")
@workers_option
@click.option("--allow-shared-frames", is_flag=True, help="Let frames be in both splits.")
@click.option("--scheduler", help="Of a Dask cluster, tcp://host:port; its workers must see both directories.")
def pack_command(
    co3d_dir: Path,
    annotation_dir: Path | None,
    set_list: str | None,
    min_quality: float | None,
    out: Path,
    splits: tuple[str, ...],
    categories: tuple[str, ...],
    max_bad: float,
    workers: int,
    scheduler: str | None,
    short_side: int,
    quality: int,
    min_frames: int,
    shard_frames: int,
    allow_shared_frames: bool,
) -> None:
    """Pack Co3D frames, depths and cameras into tar shards with an index.

    With --annotation-dir the cameras are those of VGGT's annotation files, without it those that come with Co3D; then
    --set-list says what is for training and what for testing. Sequences that are annotated but not there are skipped,
    so a part of the download is enough. A camera's rotation may be off by 0.001, as rounded text is; the nearest one is
    stored, and the middle of a sequence's cameras becomes its origin.

    After an interruption, the same command continues. If tars of a finished set are missing, it makes just these
    again: to repair one that vggt-prep verify finds damaged, or to add frames that were bad, remove the tar first.

    \b
    vggt-prep pack --co3d-dir co3d --annotation-dir co3d_anno --out shards
    vggt-prep pack --co3d-dir co3d --annotation-dir co3d_anno --out apples --category apple
    vggt-prep pack --co3d-dir co3d --set-list manyview_dev_0 --min-quality 0.5 --out shards
    vggt-prep pack --co3d-dir /nfs/co3d --out /nfs/shards --scheduler tcp://node0:8786
    """
    options = PackOptions(short_side=short_side, quality=quality, min_frames=min_frames, shard_frames=shard_frames)
    stopped = "stopped; finished shards are kept, and the same command continues from there"
    with plain_errors(stopped), pack_executor(scheduler, workers) as (executor, parallel):
        if annotation_dir is not None and (set_list is not None or min_quality is not None):
            raise ValueError("--set-list and --min-quality are of Co3D's own annotations: not with --annotation-dir")
        chosen = (splits or None, categories or None)
        if scheduler is not None:  # its workers are in other directories
            co3d_dir, out = co3d_dir.absolute(), out.absolute()
        if annotation_dir is None:
            source = OfficialCo3D(co3d_dir, set_list or "fewview_dev", min_quality, *chosen)
        else:
            source = Co3D(co3d_dir, annotation_dir, *chosen)
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
        with process_pool(workers, ["prep.packing.pack", "webdataset"]) as pool:
            yield pool, workers
    else:
        with dask_cluster(scheduler) as cluster:
            yield cluster


@main.command("synth")
@click.option("--out", type=LocalPath(), required=True, help="Gets co3d/ and annotations/.")
@click.option("--scenes", type=click.IntRange(8), default=40, show_default=True, help="An eighth is for testing.")
@click.option("--frames", type=click.IntRange(1), default=30, show_default=True, help="Frames of a scene.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same, the same files.")
@workers_option
def synth_command(out: Path, scenes: int, frames: int, seed: int, workers: int) -> None:
    """Render captures in Co3D's layout, to try everything without a download.

    \b
    vggt-prep synth --out data/synth
    vggt-prep pack --co3d-dir data/synth/co3d --annotation-dir data/synth/annotations --out data/shards
    """
    options = SynthOptions(scenes=scenes, frames=frames, seed=seed)
    with plain_errors(), process_pool(workers, ["prep.synth.scenes"]) as pool, progress_bar("scenes") as bar:
        task = start(bar, "rendering", scenes)
        made = synth(out, options, pool, on_scene=lambda: bar.advance(task))
        bar.update(task, completed=scenes)
    done = f"{scenes} scenes of {frames} frames" + ("" if made else ", rendered before")
    source = shlex.join(["--co3d-dir", f"{out}/co3d", "--annotation-dir", f"{out}/annotations"])
    click.echo(f"{out}: {done}; pack them with {source}")


@main.command("info")
@click.argument("shard_set")
def info_command(shard_set: str) -> None:
    """Say what a shard set holds.

    Categories, sequences, frames, bytes, resolutions, and the options it was packed with. SHARD_SET is a directory or
    a URL.

    \b
    vggt-prep info data/shards
    vggt-prep info s3://bucket/co3d
    """
    with plain_errors():
        print_info(shard_set)


@main.command("verify")
@click.argument("shard_set")
@click.option(
    "--sample", type=Fraction(min_open=True), default=1.0, show_default=True, help="Fraction of the tars to read."
)
@workers_option
def verify_command(shard_set: str, sample: float, workers: int) -> None:
    """Check every byte of a shard set.

    The hashes, the structure of the tars, the index and the cameras.
    Ends with exit code 1 if anything is wrong. SHARD_SET is a directory or a URL.

    \b
    vggt-prep verify data/shards
    vggt-prep verify https://host/co3d --sample 0.02
    """
    from prep.verify import verify

    with plain_errors(), process_pool(workers, ["prep.verify"]) as pool, progress_bar("tars") as bar:
        tasks: list[TaskID] = []
        result = verify(
            shard_set,
            pool,
            sample=sample,
            on_plan=lambda tars: tasks.append(start(bar, "verifying", tars)),
            on_tar=lambda: bar.advance(tasks[0]),
        )
    for problem in result.problems:
        click.echo(problem, err=True)
    if result.problems:
        advice = "Copy these tars again; or remove them, and the command that packed the set makes just these again"
        found = counted(len(result.problems), "problem")
        raise click.ClickException(f"{shard_set}: {found}, said above" + (f". {advice}" if result.all_tars else ""))
    frames = counted(result.frames, "frame")
    click.echo(f"{shard_set}: {result.tars:,} of {counted(result.all_tars, 'tar')} checked: {frames} as packed")


@main.command("index")
@click.argument("shard_set", type=LocalPath())
@workers_option
def index_command(shard_set: Path, workers: int) -> None:
    """Rebuild the index of a shard set from its tars.

    For a set whose index is lost or damaged, or whose tars were gathered by hand (train-000000.tar, test-000000.tar,
    ...). Every member is checked: a damaged tar is not taken.

    \b
    vggt-prep index data/shards
    """
    from shards.build_index import rebuild_index

    with plain_errors(), process_pool(workers, ["shards.build_index"]) as pool, progress_bar("tars") as bar:
        tasks: list[TaskID] = []
        frames = rebuild_index(
            shard_set,
            pool,
            on_plan=lambda tars: tasks.append(start(bar, "indexing", tars)),
            on_tar=lambda: bar.advance(tasks[0]),
        )
    click.echo(f"{shard_set}: index of {counted(frames, 'frame')} written")


@main.command("preview")
@click.argument("shard_set")
@click.option("--out", type=LocalPath(), default="preview.html", show_default=True, help="The page.")
@click.option("--sequences", type=click.IntRange(1), default=20, show_default=True, help="How many, over the set.")
def preview_command(shard_set: str, out: Path, sequences: int) -> None:
    """Draw a page that shows whether images, depths and cameras fit.

    For some sequences: images, depths in color, the cameras from above, and one view warped into another through
    depth and cameras. The page is one HTML file that needs nothing else. SHARD_SET is a directory or a URL.

    \b
    vggt-prep preview data/shards
    vggt-prep preview data/shards --sequences 100 --out look.html
    """
    from prep.preview import write_preview

    if out.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{out}: expected a name that ends in .html", param_hint="--out")
    with plain_errors(), progress_bar("sequences") as bar:
        opened = shards.open(shard_set)
        task = start(bar, "drawing", min(sequences, len(opened.sequences)))
        problems = []
        for problem in write_preview(opened, out, sequences):
            bar.advance(task)
            problems += [problem] if problem else []
    click.echo(f"{out}: {size_text(out.stat().st_size)}; open it in a browser")
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise click.ClickException(f"{counted(len(problems), 'sequence')} could not be drawn; see vggt-prep verify")
