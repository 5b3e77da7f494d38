"""What a VGGT is made of. The defaults are the published 1.26-billion-parameter model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

HEADS = ("camera", "depth", "point", "track")


@dataclass(frozen=True, kw_only=True)
class VGGTConfig:
    """Sizes of every part. Widths in channels, image_size in pixels, layers counted from 0."""

    patch_size: int = 14
    image_size: int = 518  # side of the square whose patch positions are stored
    embed_dim: int = 1024
    vit_depth: int = 24
    vit_heads: int = 16
    vit_registers: int = 4
    depth: int = 24  # pairs of a frame-wise and a scene-wise block
    num_heads: int = 16
    registers: int = 4
    rope_base: float = 100.0
    camera_depth: int = 4
    camera_heads: int = 16
    dense_layers: tuple[int, int, int, int] = (4, 11, 17, 23)  # pairs whose output the dense heads read
    dense_features: int = 256
    dense_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    track_features: int = 128
    track_hidden: int = 384
    track_depth: int = 6
    track_heads: int = 8
    track_levels: int = 7  # of the correlation pyramid
    track_radius: int = 4  # of the correlation window, in pixels of its level
    heads: tuple[str, ...] = HEADS
    head_chunk: int | None = 1  # frames that go through a dense head at a time; None: all
    recompute: bool = True  # whether blocks that train keep only their input, and run again in the backward pass

    def __post_init__(self) -> None:
        unknown = set(self.heads) - set(HEADS)
        if unknown:
            raise ValueError(f"heads: expected some of {', '.join(HEADS)}, found {', '.join(sorted(unknown))}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.head_chunk is not None and self.head_chunk < 1:
            raise ValueError(f"head_chunk: expected at least 1 frame or null, found {self.head_chunk}")
        for width, heads in (
            ("embed_dim", "vit_heads"),
            ("embed_dim", "num_heads"),
            ("embed_dim", "camera_heads"),
            ("track_hidden", "track_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        if self.embed_dim // self.num_heads % 4 or self.track_features % 4:
            raise ValueError("embed_dim / num_heads and track_features: expected multiples of 4, for codes of places")
        if max(self.dense_layers) >= self.depth:
            raise ValueError(f"dense_layers {list(self.dense_layers)}: expected pairs below depth {self.depth}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VGGTConfig:
        """From a config.json's values; missing keys have their defaults.

        Unknown keys are ignored in the published model's file, which has other names and no `heads`. Raises
        ValueError for an unknown key in ours, a value of a wrong type, or values that do not fit together.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown and "heads" in values:
            raise ValueError(f"not the configuration of a VGGT: unknown {', '.join(unknown)}")
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        try:
            return cls(**chosen)
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"not the configuration of a VGGT ({error})") from error


# How it computes, not what: the defaults of what a checkpoint need not say.
RUNTIME: dict[str, Any] = {"head_chunk": VGGTConfig.head_chunk, "recompute": VGGTConfig.recompute}

# The smallest model of the same architecture: for tests, and the one the reference figures were made with.
_TINY = {
    "image_size": 70,
    "embed_dim": 64,
    "vit_depth": 3,
    "vit_heads": 4,
    "depth": 4,
    "num_heads": 4,
    "camera_depth": 2,
    "camera_heads": 4,
    "dense_layers": (0, 1, 2, 3),
    "dense_features": 32,
    "dense_channels": (16, 32, 64, 64),
    "track_features": 32,
    "track_hidden": 48,
    "track_levels": 3,
    "track_radius": 2,
}
# Learns something from scratch in minutes on two cores.
_DEMO = {
    "image_size": 140,
    "embed_dim": 128,
    "vit_depth": 4,
    "vit_heads": 4,
    "depth": 4,
    "num_heads": 4,
    "camera_depth": 2,
    "camera_heads": 4,
    "dense_layers": (0, 1, 2, 3),
    "dense_features": 32,
    "dense_channels": (32, 64, 96, 128),
    "track_features": 32,
    "track_hidden": 96,
    "track_levels": 4,
    "track_radius": 3,
}
# Small enough for a laptop, large enough to know cameras: the weights come with the project.
_NANO = _DEMO | {
    "patch_size": 7,
    "image_size": 56,
    "embed_dim": 160,
    "vit_heads": 5,
    "depth": 5,
    "num_heads": 5,
    "camera_heads": 5,
    "dense_layers": (0, 1, 2, 4),
}
_PRESETS = {"1b": {}, "nano": _NANO, "demo": _DEMO, "tiny": _TINY}
PRESETS = tuple(_PRESETS)
PUBLISHED = PRESETS[0]


def preset(
    name: str, *, heads: tuple[str, ...] = HEADS, head_chunk: int | None = 1, recompute: bool = True
) -> VGGTConfig:
    """The configuration of a model by name: 1b (published), nano, demo or tiny. Raises ValueError for another name."""
    if name not in _PRESETS:
        raise ValueError(f"model preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return VGGTConfig(**_PRESETS[name], heads=heads, head_chunk=head_chunk, recompute=recompute)


def preset_of(values: Mapping[str, Any]) -> str | None:
    """The name of the preset that a config.json's values are the sizes of; None if it is none. Raises ValueError."""
    sizes = replace(VGGTConfig.from_dict(values), heads=HEADS, **RUNTIME)
    return next((name for name in PRESETS if sizes == preset(name)), None)
