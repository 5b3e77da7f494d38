"""vggt-prep check: it says that sound captures fit, and names what is wrong with others."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import vggt_prep
from golden_figures import SHARED
from layout_writers import ALL, WRITERS, on_its_side, rendered, write_arkitscenes_as_stored

from prep.check import ComparedDepths, _wrong_depth, check_capture
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


def narrowed(view):
    """Three quarters as wide: fx is not fy."""
    size = round(0.75 * view.image.shape[1]), view.image.shape[0]
    factor = size[0] / view.image.shape[1]
    k = view.intrinsics.copy()
    k[0] = [k[0, 0] * factor, 0, (k[0, 2] + 0.5) * factor - 0.5]
    columns = ((np.arange(size[0]) + 0.5) / factor - 0.5).round().astype(int)
    image = cv2.resize(view.image, size, interpolation=cv2.INTER_AREA)
    return replace(view, image=image, depth=np.ascontiguousarray(view.depth[:, columns]), intrinsics=k)


def test_photographs_in_no_order_are_matched_where_their_cameras_overlap(tmp_path):
    """Names of a photo collection follow no walk: with the frames that come next, only 9 of 15 can be matched."""
    WRITERS["frames"](tmp_path / "walk", rendered(frames=90))
    capture = capture_of(tmp_path / "walk")
    shuffled = [capture.frames[i] for i in np.random.default_rng(0).permutation(90)]
    check = check_capture(replace(capture, frames=shuffled))
    assert check.fits, check.words
    assert check.pairs >= 13
    assert check.depth_ratio == pytest.approx(1, abs=0.02)


def posed(change):
    return lambda views: [replace(view, cam_from_world=change(view.cam_from_world)) for view in views]


def intrinsic(change):
    return lambda views: [replace(view, intrinsics=change(view.intrinsics)) for view in views]


def inverse(pose):
    return np.column_stack([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3]])


def late(frames):
    """Each image with the pose of that many frames later."""

    def change(views):
        last = len(views) - 1
        places = [min(max(0, i + frames), last) for i in range(len(views))]
        return [replace(view, cam_from_world=views[j].cam_from_world) for view, j in zip(views, places, strict=True)]

    return change


def along_rays(views):
    changed = []
    for view in views:
        y, x = np.mgrid[: view.depth.shape[0], : view.depth.shape[1]]
        k = view.intrinsics
        length = np.sqrt(1 + ((x - k[0, 2]) / k[0, 0]) ** 2 + ((y - k[1, 2]) / k[1, 1]) ** 2)
        changed.append(replace(view, depth=view.depth * length))
    return changed


def far(factor):
    """Depths of any layout in another unit: most files could not hold them."""

    def change(capture):
        frames = [replace(f, depth=f.depth and replace(f.depth, unit=f.depth.unit * factor)) for f in capture.frames]
        return replace(capture, frames=frames)

    return change


SWAP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
IN_VIEWS = {  # what must be said, and the damage
    "camera-to-world": posed(inverse),
    "OpenGL": posed(lambda pose: FLIP @ pose),
    "transposed": posed(lambda pose: np.column_stack([pose[:, :3].T, pose[:, 3]])),
    "each image had the pose of the one": late(1),
    "fx and fy": intrinsic(lambda k: np.array([[k[1, 1], 0, k[0, 2]], [0, k[0, 0], k[1, 2]], [0, 0, 1]])),
    "width and height": intrinsic(lambda k: SWAP @ k @ SWAP),
    "along the pixels' rays": along_rays,
}
IN_UNITS = {"1000 times too large": far(1000), "1000 times too small": far(1e-3)}
UNTOLD = {"half a pixel": intrinsic(lambda k: k + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]))}


def test_a_sound_capture_fits_and_each_damage_of_its_depths_is_named(folder):
    capture = capture_of(folder)
    sound = check_capture(capture)
    assert sound.fits is True, sound
    assert sound.depth_ratio == pytest.approx(1, abs=0.05)
    for words, damage in IN_UNITS.items():
        check = check_capture(damage(capture))
        assert check.fits is False, (words, check)
        assert words in check.words


def test_depths_of_anything_else_and_cameras_that_look_the_other_way_do_not_fit(folder, tmp_path):
    capture = capture_of(folder)
    depths = [np.load(frame.depth.path) for frame in capture.frames]
    rng = np.random.default_rng(0)
    others = {
        "noise": [rng.permutation(depth.reshape(-1)).reshape(depth.shape) for depth in depths],
        "flat": [np.full_like(depth, 2) for depth in depths],
        "upside_down": [depth[::-1] for depth in depths],
        "in_reverse": depths[::-1],
    }
    for name, changed in others.items():
        (tmp_path / name).mkdir()
        frames = []
        for number, (frame, depth) in enumerate(zip(capture.frames, changed, strict=True)):
            np.save(tmp_path / name / f"{number}.npy", depth)
            frames.append(replace(frame, depth=replace(frame.depth, path=tmp_path / name / f"{number}.npy")))
        check = check_capture(replace(capture, frames=frames))
        assert check.fits is False, (name, check)
        assert "not those of what the images show" in check.words
    frames = [
        replace(frame, camera=replace(frame.camera, extrinsics=frame.camera.extrinsics * [1, 1, 1, -1]))
        for frame in capture.frames
    ]
    assert "if the translations had the other sign" in check_capture(replace(capture, frames=frames)).words


def test_noisy_depths_of_a_flat_scene_are_not_taken_for_those_of_another():
    rng = np.random.default_rng(0)
    z = 2 * (1 + rng.uniform(-0.05, 0.05, 500))
    stored = z * np.exp(rng.normal(0, 0.1, 500))
    lengths, noise = rng.uniform(1, 1.2, 500), np.full(500, 0.02)
    parts = np.array_split(np.stack([stored, stored / z, lengths, noise], axis=1), 10)
    compared = [ComparedDepths(*part.T) for part in parts]
    assert _wrong_depth(1.0, compared) is None


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the real captures beside the checkout")
@pytest.mark.parametrize(("first", "last"), [(0, 15), (0, 20), (0, 24), (10, 30), (15, 30), (5, 25), (0, 30)])
def test_a_part_of_a_sound_capture_is_sound(first, last):
    """Neighbors in a short capture see nearly the same: what little their matches tell of depth is not believed."""
    capture = capture_of(REAL / "nerfstudio")
    check = check_capture(replace(capture, frames=capture.frames[first:last]))
    assert check.fits is not False, check


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_ten_damages_are_named_in_every_layout(tmp_path, layout):
    """Of cameras whose fx is not fy. Half a pixel cannot be told, which --help says: it must not be made something."""
    views, write = [narrowed(view) for view in rendered(frames=40, seed=5)], ALL[layout]
    if layout == "arkitscenes":  # the damage is to the files' cameras, which lie on their side
        views, write = [on_its_side(view) for view in views], write_arkitscenes_as_stored
    cases = {"": lambda views: views} | IN_VIEWS | UNTOLD
    if layout == "colmap":  # whose points come from its cameras
        del cases["along the pixels' rays"]
    said = {}
    for number, (words, damage) in enumerate(cases.items()):
        write(tmp_path / str(number), damage(views))
        k = damage(views)[0].intrinsics
        camera = (k[0, 0], k[1, 1], k[0, 2], k[1, 2]) if layout == "tum" else None
        capture = capture_of(tmp_path / str(number), intrinsics=camera)
        said[words] = check_capture(capture)
        if not number and layout != "colmap":
            said |= {words: check_capture(damage(capture)) for words, damage in IN_UNITS.items()}
    for words, check in said.items():
        print(f"{layout} | {words} | {check.fits} | {check.near} | {check.depth_ratio} | {check.words}")
        assert check.fits is (words in ("", *UNTOLD)), (words, check)
        assert words in UNTOLD or words in check.words, (words, check)


@pytest.mark.skipif(not REAL.exists(), reason="no real captures beside this checkout")
def test_a_real_capture_fits_and_damages_of_it_are_named():
    """One layout of it: the others give the same frames (test_captures)."""
    capture = capture_of(REAL / "sevenscenes")
    sound = check_capture(capture)
    assert sound.fits is True
    assert "better with a focal length 0.9 times as long" in sound.words  # 525: the layout gives the depth camera's 585
    pose_damages = {
        "camera-to-world": lambda poses: [inverse(pose) for pose in poses],
        "each image had the pose of the one": lambda poses: [*poses[1:], poses[-1]],
    }
    for words, damage in pose_damages.items():
        poses = damage([frame.camera.extrinsics for frame in capture.frames])
        frames = [
            replace(frame, camera=replace(frame.camera, extrinsics=pose))
            for frame, pose in zip(capture.frames, poses, strict=True)
        ]
        check = check_capture(replace(capture, frames=frames))
        assert check.fits is False, (words, check)
        assert words in check.words
    assert "1000 times too large" in check_capture(IN_UNITS["1000 times too large"](capture)).words


def test_what_cannot_be_read_is_not_checked_and_the_others_are(folder, tmp_path):
    WRITERS["tum"](tmp_path / "office", rendered(frames=2))
    done = vggt_prep("check", folder, tmp_path / "office")
    assert done.returncode == 1
    assert "sound: cameras and images fit" in done.stdout
    assert "office: not checked: " in done.stdout
    assert "give --intrinsics" in done.stdout
    assert "of these it cannot be told: office" in done.stderr


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
    assert "these do not fit: wrong" in done.stderr
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
