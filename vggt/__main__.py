"""Look at a checkpoint: photographs in, cameras and a colored point cloud out."""

from __future__ import annotations

import math
import time
from importlib.util import find_spec
from pathlib import Path

import click
import torch

from vggt.images import find_images, load_images
from vggt.model import VGGT
from vggt.scene import write_scene


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--checkpoint", required=True, help=".pt or .safetensors file, folder, or a name such as facebook/VGGT-1B."
)
@click.option(
    "--width", type=click.IntRange(1), help="Pixels of the images: best what it was trained on.  [default: the model's]"
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="A .glb or .ply file.")
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Fraction of the pixels to draw, the most confident ones.",
)
def main(images: tuple[Path, ...], checkpoint: str, width: int | None, out: Path, keep: float) -> None:
    """Show what a checkpoint makes of IMAGES: files, or folders of them, all of one scene.

    Writes one file with a colored point cloud and the cameras, drawn as pyramids from red (the first) to blue (the
    last). Any viewer of glTF opens a .glb, MeshLab or CloudCompare a .ply.

    \b
    Examples:
      python -m vggt photos/ --checkpoint facebook/VGGT-1B --out scene.glb
      python -m vggt photos/*.jpg --checkpoint runs/lora/checkpoints/best --width 518 --out scene.ply --keep 0.2
    """
    out = out.expanduser()
    if math.isnan(keep):  # neither below nor above a limit
        raise click.BadParameter("expected a number", param_hint="--keep")
    if out.suffix.lower() not in (".glb", ".ply"):
        raise click.BadParameter(f"{out}: expected a name that ends in .glb or .ply", param_hint="--out")
    if find_spec("trimesh") is None:
        raise click.ClickException(
            "writing scenes needs trimesh: .venv/bin/pip install -c constraints.txt -e '.[scene]'"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        paths, others = find_images(images)
        if others:
            names = ", ".join(path.name for path in others[:5]) + (", ..." if len(others) > 5 else "")
            click.echo(f"{len(others)} files are no images that can be read, and skipped: {names}", err=True)
        model = VGGT.from_pretrained(checkpoint, heads=("camera", "depth"))
        inputs = load_images(paths, model.config, width)
        count = _show(model, inputs, out, keep)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {count:,} points, {len(paths)} cameras")


def _show(model: VGGT, images: torch.Tensor, out: Path, keep: float) -> int:
    """Run the model on images [S, 3, H, W], say what cameras it sees, write `out`; returns the number of points."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count, _, height, width = images.shape
    click.echo(f"{count} images, cut to {width}x{height} about their centers, on {device.type}")
    began = time.perf_counter()
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        predictions = model.to(device)(images.to(device))
    fields = predictions["pose_enc"][0, :, 7:].mean(0).rad2deg().tolist()
    click.echo(f"{time.perf_counter() - began:.1f} s; mean field of view {fields[1]:.0f} x {fields[0]:.0f} degrees")
    return write_scene(out, predictions, images, keep)


if __name__ == "__main__":
    main()
