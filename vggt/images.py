"""Photographs from disk to what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from vggt.config import VGGTConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The images: files in `paths` as given, those of a folder by name; and the other files of the folders.

    Hidden files are in neither. Raises ValueError if there are no images.
    """
    found, others = list[Path](), list[Path]()
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            found += [p for p in files if p.suffix.lower() in SUFFIXES]
            others += [p for p in files if p.suffix.lower() not in SUFFIXES]
        else:
            found.append(path)
    if not found:
        there = f" ({len(others)} other files, such as {others[0].name})" if others else ""
        raise ValueError(
            f"{', '.join(map(str, paths))}: no images{there}; expected files that end in {' '.join(SUFFIXES)}"
        )
    return found, others


def load_images(paths: Sequence[Path], config: VGGTConfig, width: int | None = None) -> Tensor:
    """Photographs as one scene for the model: [S, 3, H, W] in [0, 1].

    width: in pixels; None: the model's own. The height follows the aspect ratio of the first photograph, at most
    square. Each is scaled to cover that and cropped about its center, the model's assumed principal point. Raises
    ValueError for a file that is no image, and a width that is no multiple of the patch size.
    """
    patch, side = config.patch_size, width or config.image_size
    if side % patch:
        raise ValueError(f"width {side}: expected a multiple of {patch}, the model's patch size")
    first = _read(paths[0])
    height, width = first.shape[:2]
    rows = min(max(round(side * height / width / patch), 1), side // patch)
    photographs = chain([first], map(_read, paths[1:]))  # one at a time: they are large
    pixels = np.stack([_cover(photograph, rows * patch, side) for photograph in photographs])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _read(path: Path) -> np.ndarray:
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)  # turned upright by its EXIF
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise ValueError(f"{path}: cannot be read as an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] -> [height, width, 3], scaled to the least size that covers it and cut about the center."""
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    size = (max(round(w * scale), width), max(round(h * scale), height))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
