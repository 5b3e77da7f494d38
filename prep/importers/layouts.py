"""Which layout of captures is in a folder, by the files that only that layout has."""

from __future__ import annotations

from pathlib import Path

# What each is called, and patterns of files of which one must be there.
LAYOUTS = {
    "a COLMAP project": ("sparse/cameras.*", "sparse/*/cameras.*"),
    "a nerfstudio capture": ("transforms.json", "transforms_train.json"),
    "a Polycam export": ("keyframes/cameras/*.json", "keyframes/corrected_cameras/*.json"),
    "a Record3D capture": ("rgbd/*.depth",),
    "a TUM RGB-D sequence": ("groundtruth.txt",),
    "a 7-Scenes sequence": ("frame-*.pose.txt",),
    "a ScanNet export": ("intrinsic/intrinsic_color.txt",),
    "an ARKitScenes capture": ("lowres_wide.traj", "*/lowres_wide.traj"),
    "a VGGT-Omega scene": ("cam_from_worlds.npy",),
    "a WAI scene": ("scene_meta.json",),
}


def recognized(folder: Path) -> str | None:
    """What a folder, or one in it, looks like, naming the file that tells it; None for nothing that is known."""
    for prefix in ("", "*/"):
        for name, patterns in LAYOUTS.items():
            for pattern in patterns:
                found = min(folder.glob(prefix + pattern), default=None)
                if found is not None:
                    return f"{name} ({found.relative_to(folder)})"
    return None
