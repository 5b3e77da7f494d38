"""Cameras as Co3D's annotations write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prep.importers.cameras import OpenCVCamera

NORM_IMAGE_BOUNDS, ISOTROPIC = "ndc_norm_image_bounds", "ndc_isotropic"
TO_OPENCV = np.diag([-1.0, -1.0, 1.0])  # PyTorch3D's x is left and y is up


@dataclass(frozen=True, kw_only=True)
class PyTorch3DCamera:
    """A camera of PyTorch3D: X_camera = X_world @ rotation + translation, with x to the left and y up.

    rotation [3, 3], translation [3]; focal_length and principal_point [2] in normalized device coordinates. In the
    ndc_isotropic format the shorter side of the image spans -1 to 1, in ndc_norm_image_bounds each side does.
    """

    rotation: np.ndarray
    translation: np.ndarray
    focal_length: np.ndarray
    principal_point: np.ndarray
    intrinsics_format: str
    distortion: None = None

    def opencv(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Extrinsics [3, 4] and intrinsics [3, 3] for an image of this size."""
        extrinsics = TO_OPENCV @ np.concatenate([self.rotation.T, self.translation[:, None]], axis=1)
        half = np.array([width, height]) / 2
        unit = np.full(2, half.min()) if self.intrinsics_format == ISOTROPIC else half  # pixels an NDC unit
        focal = self.focal_length * unit
        # NDC are measured from edges, our pixels from the center of the first one.
        center = half - self.principal_point * unit - 0.5
        return extrinsics, np.array([[focal[0], 0, center[0]], [0, focal[1], center[1]], [0, 0, 1]])


def read_camera(entry: Any) -> OpenCVCamera | PyTorch3DCamera:
    """The camera of an annotation: {extri, intri}, or {R, T, focal_length, principal_point[, intrinsics_format]}.

    Raises ValueError, whose message is a reason to count frames by.
    """
    if not isinstance(entry, dict):
        raise ValueError("annotation without a camera")
    if "extri" in entry or "intri" in entry:
        return OpenCVCamera(extrinsics=_array(entry, "extri", 3, 4), intrinsics=_array(entry, "intri", 3, 3))
    intrinsics_format = entry.get("intrinsics_format") or NORM_IMAGE_BOUNDS
    if intrinsics_format not in (NORM_IMAGE_BOUNDS, ISOTROPIC):
        raise ValueError(f"annotation with an intrinsics_format other than {NORM_IMAGE_BOUNDS} and {ISOTROPIC}")
    return PyTorch3DCamera(
        rotation=_array(entry, "R", 3, 3),
        translation=_array(entry, "T", 3),
        focal_length=_array(entry, "focal_length", 2),
        principal_point=_array(entry, "principal_point", 2),
        intrinsics_format=intrinsics_format,
    )


def _array(entry: dict[str, Any], key: str, *shape: int) -> np.ndarray:
    try:
        array = np.array(entry[key])
    except (KeyError, ValueError) as error:  # lists of different lengths
        raise ValueError(f"annotation without {key}") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"annotation whose {key} is not of numbers")
    array = array.astype(np.float64)
    if array.shape != shape:
        raise ValueError(f"annotation whose {key} is not {'x'.join(map(str, shape))}")
    return array
