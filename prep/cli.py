"""The command line vggt-prep."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.progress import (
    TaskID,
)

import shards
from prep.check import CaptureCheck, check_capture
from prep.importers.captures import CaptureOptions, read_captures
from prep.importers.layouts import FORMATS, capture_folders
from prep.importers.source import Intrinsics
from prep.info import print_checks, print_info
from prep.pack_command import make_pairs, pack_command
from prep.packing.executors import process_pool
from prep.packing.pairs import NEIGHBORS
from prep.synth.synth import FAMILIES, SynthOptions, synth
from prep.terminal import (
    Fraction,
    LocalPath,
    PinholeNumbers,
    counted,
    plain_errors,
    progress_bar,
    size_text,
    start,
    workers_option,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Packs posed captures into WebDataset shards for training VGGT.

    \b
    vggt-prep synth --out captures                     render something to try
    vggt-prep check captures                           do cameras, images and depths fit?
    vggt-prep pack captures --out shards               make a shard set; of Co3D: --co3d-dir co3d
    vggt-prep preview shards                           look at it
    vggt-prep verify shards                            check each of its bytes
    vggt-prep pairs shards                             of an older set: which frames see the same
    """


main.add_command(pack_command)


@main.command("check")
@click.argument("captures", nargs=-1, required=True, type=LocalPath())
@click.option("--format", "layout", type=click.Choice([*FORMATS]), help="Of the captures.  [default: as recognized]")
@click.option(
    "--intrinsics", type=PinholeNumbers(), help="fx,fy,cx,cy, where the layout says none; (0, 0) is a pixel's center."
)
def check_command(captures: tuple[Path, ...], layout: str | None, intrinsics: Intrinsics | None) -> None:
    """Measure whether the cameras of captures fit their images, and their depths the cameras.

    Features of the images are matched; they must lie on each other's epipolar lines, and what is triangulated from them
    at the depths. The same is tried with poses inverted, OpenGL axes, transposed rotations, poses one frame off, fx and
    fy or width and height exchanged, depths 1000 times too large or small, and depths along the pixels' rays. It cannot
    tell half a pixel, fx from fy where they are nearly equal, or one frame where a camera moves slowly; nor anything
    without texture. Ends with exit code 1 unless all captures fit.

    \b
    vggt-prep check captures/
    """
    with plain_errors():
        options = CaptureOptions(format=layout, intrinsics=intrinsics)
        found = [found for folder in captures for found in capture_folders(folder, layout)]
        checks = []
        with progress_bar("captures") as bar:
            task = start(bar, "checking", len(found))
            for name, folder in found:
                try:
                    checks += [check_capture(capture) for capture in read_captures(name, folder, options)]
                except (ValueError, OSError) as error:  # the others can be checked
                    checks.append(CaptureCheck(folder.resolve().name, 0, None, None, None, f"not checked: {error}"))
                bar.advance(task)
    print_checks(checks)
    found = {False: "these do not fit: ", None: "of these it cannot be told: "}
    wrong = [
        words + ", ".join(names)
        for fits, words in found.items()
        if (names := [check.name for check in checks if check.fits is fits])
    ]
    if wrong:
        raise click.ClickException("; ".join(wrong))


@main.command("synth")
@click.option("--out", type=LocalPath(), required=True, help="Gets co3d/ and annotations/.")
@click.option("--scenes", type=click.IntRange(8), default=40, show_default=True, help="An eighth is for testing.")
@click.option("--frames", type=click.IntRange(1), default=30, show_default=True, help="Frames of a scene.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The same, the same files.")
@click.option(
    "--family", type=click.Choice([*FAMILIES]), default="turntable", show_default=True, help="Kind of scenes."
)
@click.option("--short-side", type=click.IntRange(14), default=240, show_default=True, help="Of the images, in pixels.")
@workers_option
def synth_command(out: Path, scenes: int, frames: int, seed: int, family: str, short_side: int, workers: int) -> None:
    """Render captures in Co3D's layout, to try everything without a download.

    \b
    vggt-prep synth --out data/synth
    vggt-prep pack --co3d-dir data/synth/co3d --annotation-dir data/synth/annotations --out data/shards
    """
    options = SynthOptions(scenes=scenes, frames=frames, seed=seed, family=family, short_side=short_side)
    with plain_errors(), process_pool(workers, ["prep.synth.synth"]) as pool, progress_bar("scenes") as bar:
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
        of_tars = any(".tar" in problem for problem in result.problems)
        raise click.ClickException(f"{shard_set}: {found}, said above" + (f". {advice}" if of_tars else ""))
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


@main.command("pairs")
@click.argument("shard_set", type=LocalPath())
@click.option(
    "--neighbors", type=click.IntRange(1), default=NEIGHBORS, show_default=True, help="Of each frame, at most."
)
@workers_option
def pairs_command(shard_set: Path, neighbors: int, workers: int) -> None:
    """Measure which frames of a shard set see the same, for data.sampling=overlap.

    For sets packed before November 2026 or with --no-pairs, and for another number of neighbors. Half of a frame's
    neighbors are the best, the others are spread over the rest. The tars stay as they are. A run that uses the set is
    not disturbed, unless it draws by overlap already and other numbers are made under it.

    \b
    vggt-prep pairs data/shards
    """
    with plain_errors(), process_pool(workers, ["prep.packing.pairs"]) as pool:
        make_pairs(shard_set, pool, neighbors)


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
