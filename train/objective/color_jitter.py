"""Color jitter on the device, for whole batches, as train.data.color_jitter has drawn it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


def apply_color_jitter(images: Tensor, color: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] with the jitter of each [N, 9]; `color` stays on the CPU, so nothing syncs."""
    operations: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)
    if not ((color[:, 4:8] >= 0).any() or color[:, 8].any()):
        return images
    images = images.clone()
    for turn in range(4):
        for i, operation in enumerate(operations):
            chosen = torch.nonzero(color[:, 4 + i] == turn)[:, 0]
            if len(chosen):
                amount = color[chosen, i].to(images.device, non_blocking=True)[:, None, None, None]
                chosen = chosen.to(images.device, non_blocking=True)
                images[chosen] = operation(images[chosen], amount)
    chosen = torch.nonzero(color[:, 8])[:, 0].to(images.device, non_blocking=True)
    if len(chosen):
        images[chosen] = gray(images[chosen]).expand(-1, 3, -1, -1)
    return images


def gray(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    return (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blend(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    return (amount * images + (1 - amount) * other).clamp(0, 1)


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    return (amount * images).clamp(0, 1)


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    return blend(images, gray(images).mean((2, 3), keepdim=True), amount)


def saturation(images: Tensor, amount: Tensor) -> Tensor:
    return blend(images, gray(images), amount)


def hue(images: Tensor, amount: Tensor) -> Tensor:
    """Turn the hue by `amount` of a circle, through HSV (Smith 1978, SIGGRAPH)."""
    r, g, b = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == r, ((g - b) / safe) % 6, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    sector = sector + 6 * amount[:, 0]
    # Channel n of RGB from hue, chroma and value: value - chroma * max(0, min(k, 4 - k, 1)), k = (n + sector) mod 6.
    offsets = images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (offsets + sector[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
