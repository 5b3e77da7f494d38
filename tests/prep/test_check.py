"""vggt-prep check: it says that sound captures fit, and names what is wrong with others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import vggt_prep
from golden_figures import SHARED
from layout_writers import WRITERS, rendered

from prep.check import check_capture
from prep.importers.captures import CaptureOptions, Captures

REAL = SHARED / "captures"
FLIP = np.diag([1.0, -1.0, -1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    WRITERS["frames"](folder / "sound", rendered(frames=40))
    return folder / "sound"


def capture_of(folder, **options):
    (capture,) = Captures([folder], CaptureOptions(**options)).found
    return capture


def changed(capture, pose=None, depth_unit=1.0, shift=0):
    """The capture with its poses changed, its depths in another unit, or its poses that many frames late."""
    frames = []
    for number, frame in enumerate(capture.frames):
        donor = capture.frames[min(max(0, number + shift), len(capture.frames) - 1)].camera
        extrinsics = donor.extrinsics if pose is None else pose(donor.extrinsics)
        depth = frame.depth and replace(frame.depth, unit=frame.depth.unit * depth_unit)
        frames.append(replace(frame, camera=replace(donor, extrinsics=extrinsics), depth=depth))
    return replace(capture, frames=frames)


def inverse(pose):
    return np.column_stack([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3]])


DAMAGES = {
    "camera-to-world": {"pose": inverse},
    "OpenGL": {"pose": lambda pose: FLIP @ pose},
    "transposed": {"pose": lambda pose: np.column_stack([pose[:, :3].T, pose[:, 3]])},
    "1000 times too large": {"depth_unit": 1000},
    "1000 times too small": {"depth_unit": 1e-3},
}


def test_a_sound_capture_fits_and_each_damage_is_named(folder):
    capture = capture_of(folder)
    sound = check_capture(capture)
    assert sound.fits is True, sound
    assert sound.depth_ratio == pytest.approx(1, abs=0.05)
    for words, damage in DAMAGES.items():
        check = check_capture(changed(capture, **damage))
        assert check.fits is False, (words, check)
        assert words in check.words


@pytest.mark.skipif(not REAL.exists(), reason="no real captures beside this checkout")
def test_a_real_capture_fits_and_each_damage_of_it_is_named():
    """One layout of it: the others give the same frames (test_captures)."""
    capture = capture_of(REAL / "sevenscenes")
    assert check_capture(capture).fits is True
    late = {"of the one after": {"shift": -1}, "of the one before": {"shift": 1}}
    for words, damage in (DAMAGES | late).items():
        check = check_capture(changed(capture, **damage))
        assert check.fits is False, (words, check)
        assert words in check.words or damage.get("shift")


def test_the_command_says_a_table_and_ends_with_1_unless_all_fit(folder, tmp_path):
    done = vggt_prep("check", folder)
    assert done.returncode == 0, done.stderr
    assert "sound: cameras and images fit, and so do the depths" in done.stdout
    views = rendered(frames=40)
    for view in views:
        view.cam_from_world = inverse(view.cam_from_world)
    WRITERS["frames"](tmp_path / "wrong", views)
    done = vggt_prep("check", folder, tmp_path / "wrong")
    assert done.returncode == 1
    assert "these do not fit, or it cannot be told: wrong" in done.stderr
    done = vggt_prep("pack", tmp_path / "wrong", "--out", tmp_path / "set")
    assert done.returncode == 1
    assert "would fit if the poses were the other way round" in done.stderr
    assert not (tmp_path / "set").exists()
    done = vggt_prep("pack", tmp_path / "wrong", "--out", tmp_path / "set", "--trust")
    assert done.returncode == 0, done.stderr


def test_a_capture_without_texture_cannot_be_told(tmp_path):
    views = rendered(frames=6)
    for view in views:
        view.image[:] = 128
    WRITERS["frames"](tmp_path / "blank", views)
    check = check_capture(capture_of(tmp_path / "blank"))
    assert check.fits is None
    assert "have enough matches to tell" in check.words
