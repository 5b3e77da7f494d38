"""Color jitter on the device, for whole batches, as train.data.color_jitter has drawn it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # numbers, as all constants here: a tensor would have to be moved, and waited for


def apply_color_jitter(images: Tensor, color: np.ndarray) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] with the jitter of each [N, 9].

    The host knows which images each operation is for; what the device needs of that goes there at once.
    """
    groups: list[tuple[Operation, np.ndarray, np.ndarray]] = []  # with the images it is for, and how much
    for turn in range(4):
        for i, operation in enumerate((brightness, contrast, saturation, hue)):
            chosen = np.flatnonzero(color[:, 4 + i] == turn)
            groups.append((operation, chosen, color[chosen, i]))
    chosen = np.flatnonzero(color[:, 8])
    groups.append((saturation, chosen, np.zeros(len(chosen), color.dtype)))  # gray
    groups = [group for group in groups if len(group[1])]
    if not groups:
        return images
    sizes = [len(chosen) for _, chosen, _ in groups]
    places, amounts = (
        torch.from_numpy(np.concatenate(parts)).to(images.device, non_blocking=True)
        for parts in ([chosen for _, chosen, _ in groups], [amount for _, _, amount in groups])
    )
    images = images.clone()
    for (operation, _, _), place, amount in zip(groups, places.split(sizes), amounts.split(sizes), strict=True):
        changed = operation(images.index_select(0, place), amount.view(-1, 1, 1, 1))
        images.index_copy_(0, place, changed)
    return images


def gray(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    r, g, b = images.split(1, dim=1)
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


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
    k = torch.stack([n + sector for n in (5, 3, 1)], dim=1) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


Operation = Callable[[Tensor, Tensor], Tensor]
