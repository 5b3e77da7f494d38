"""VGGT, the model: images of a scene to cameras, depth and points. Knows no dataset and no trainer."""

from vggt.config import VGGTConfig, preset
from vggt.model import VGGT

__all__ = ["VGGT", "VGGTConfig", "preset"]
