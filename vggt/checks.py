"""What the model says of arguments that it cannot take. No check makes the host wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt.config import VGGTConfig
from vggt.track_head import STRIDE


def check_images(images: Tensor, config: VGGTConfig) -> None:
    """Raises ValueError unless images are [B, S, 3, H, W] in [0, 1], TypeError unless they are floating-point."""
    _check_tensor(images, "images")
    shape, patch = tuple(images.shape), config.patch_size
    if images.ndim != 5 or shape[2] != 3:
        raise ValueError(f"images: expected [B, S, 3, H, W] or [S, 3, H, W], found {list(shape)}")
    if 0 in shape:
        raise ValueError(f"images: expected at least one scene of one view, found {list(shape)}")
    if shape[3] % patch or shape[4] % patch:
        raise ValueError(f"images: expected H and W to be multiples of {patch}, found {list(shape)}: resize or crop")
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating-point values in [0, 1], found {images.dtype}: divide by 255")
    if not _holds((images >= 0) & (images <= 1), "images: expected values in [0, 1]"):
        low, high = images.min().item(), images.max().item()
        advice = "; divide bytes by 255" if high > 2 else ""
        raise ValueError(f"images {list(shape)}: expected values in [0, 1], found {low:.3g} to {high:.3g}{advice}")


def check_query_points(points: Tensor, images: Tensor, config: VGGTConfig) -> None:
    """Raises ValueError unless points are [B, N, 2] inside images [B, S, 3, H, W] that are large enough to track in."""
    _check_tensor(points, "query_points")
    shape, (height, width) = list(points.shape), images.shape[-2:]
    if "track" not in config.heads:
        raise ValueError(f"query_points: this model was built without the track head (heads: {list(config.heads)})")
    if points.ndim != 3 or shape[0] != images.shape[0] or shape[1] == 0 or shape[2] != 2:
        raise ValueError(
            f"query_points: expected [B, N, 2], or [N, 2] for one scene, with B = {images.shape[0]} and N of at "
            f"least 1, found {shape}"
        )
    least = STRIDE * 2 ** (config.track_levels - 1)  # a pixel on the last level of the pyramid
    if min(height, width) < least:
        raise ValueError(f"images: expected H and W of at least {least} for tracking, found {height} x {width}")
    if not points.is_floating_point():
        raise TypeError(f"query_points: expected floating-point pixels, found {points.dtype}")
    x, y = points.unbind(-1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not _holds(inside, "query_points: expected (x, y) inside view 0"):
        limits = f"(0, 0) to ({width - 1}, {height - 1})"
        found = ", ".join(f"{value:g}" for value in points[~inside][0].tolist())
        raise ValueError(f"query_points {shape}: expected (x, y) in pixels inside view 0, {limits}, found ({found})")


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, found {type(value).__name__}")


def _holds(conditions: Tensor, message: str) -> bool:
    """Whether `conditions`, [...], are all true. Only the CPU can tell at once: for a device, returns True.

    If they are not, the device later fails an assertion with `message`, and CUDA does no more work in this process.
    """
    if conditions.device.type == "cpu" and not torch.compiler.is_compiling():
        return bool(conditions.all())
    torch._assert_async(conditions.all(), message)  # pyright: ignore[reportPrivateImportUsage]
    return True
