"""Co3D's own annotations: PyTorch3D cameras, set lists, quality scores, and fields that are null."""

from __future__ import annotations

import gzip
import json

import cv2
import numpy as np
import pytest
from conftest import vggt_prep
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from prep.importers.co3d import Co3D
from prep.importers.co3d_cameras import ISOTROPIC, NORM_IMAGE_BOUNDS, read_camera
from prep.importers.co3d_official import OfficialCo3D

FLIP = np.diag([-1.0, -1.0, 1.0])
FORMATS = (ISOTROPIC, NORM_IMAGE_BOUNDS, None)


def half_sides(intrinsics_format, height, width):
    """Half of what spans -1 to 1, in pixels, along x and y."""
    shorter = min(height, width) / 2
    return np.array([shorter, shorter] if intrinsics_format == ISOTROPIC else [width / 2, height / 2])


@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMATS), st.sampled_from([(480, 640), (1441, 999)]))
@settings(max_examples=60, deadline=None)
def test_points_project_to_the_same_pixels_by_pytorch3ds_definition_and_by_ours(seed, intrinsics_format, size):
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    viewpoint = {
        "R": rotation.tolist(),
        "T": rng.normal(size=3).tolist(),
        "focal_length": rng.uniform(0.5, 4, 2).tolist(),
        "principal_point": rng.uniform(-0.3, 0.3, 2).tolist(),
        "intrinsics_format": intrinsics_format,
    }
    seen = rng.normal(size=(20, 3)) * [1, 1, 0.1] + [0, 0, 5]  # before PyTorch3D's camera: x left, y up
    world = (seen - viewpoint["T"]) @ rotation.T
    ndc = np.array(viewpoint["focal_length"]) * seen[:, :2] / seen[:, 2:] + viewpoint["principal_point"]
    height, width = size
    # NDC are 0 in the middle of the image; +x is left, +y is up; pixels are counted from the top-left edge.
    edges = np.array([width / 2, height / 2]) - ndc * half_sides(intrinsics_format, height, width)
    extrinsics, intrinsics = read_camera(viewpoint).opencv(height, width)
    ours = (world @ extrinsics[:, :3].T + extrinsics[:, 3]) @ intrinsics.T
    assert np.linalg.det(extrinsics[:, :3]) == pytest.approx(1)
    assert np.abs(ours[:, :2] / ours[:, 2:] - (edges - 0.5)).max() < 1e-8


def viewpoint(entry, intrinsics_format, height, width):
    """The PyTorch3D camera that sees what an OpenCV annotation {extri, intri} does."""
    extrinsics, k = np.array(entry["extri"]), np.array(entry["intri"])
    unit, half = half_sides(intrinsics_format, height, width), np.array([width, height]) / 2
    return {
        "R": (FLIP @ extrinsics[:, :3]).T.tolist(),
        "T": (FLIP @ extrinsics[:, 3]).tolist(),
        "focal_length": (k[[0, 1], [0, 1]] / unit).tolist(),
        "principal_point": ((half - (k[:2, 2] + 0.5)) / unit).tolist(),
        "intrinsics_format": intrinsics_format,
    }


def write_gzipped(path, content):
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


class Official:
    """The rendered captures with official annotations, made from those of VGGT's kind; to be changed by a test."""

    def __init__(self, captures, folder):
        self.folder = folder
        self.frames, self.sequences, self.lists = {}, {}, {}
        for path in sorted((captures / "annotations").glob("*.jgz")):
            category, _, split = path.stem.rpartition("_")
            (folder / category).mkdir(parents=True, exist_ok=True)
            for name, entries in json.loads(gzip.decompress(path.read_bytes())).items():
                (folder / category / name).symlink_to(captures / "co3d" / category / name)
                self.sequences.setdefault(category, []).append(
                    {"sequence_name": name, "category": category, "viewpoint_quality_score": 1.5}
                )
                for i, entry in enumerate(entries):
                    self.add(category, split, name, i, entry)

    def add(self, category, split, name, number, entry):
        file = entry["filepath"].rpartition("/")[2]
        height, width = cv2.imread(str(self.folder / entry["filepath"])).shape[:2]
        depth = {
            "path": f"{category}/{name}/depths/{file}.geometric.png",
            "mask_path": f"{category}/{name}/depth_masks/{file.rpartition('.')[0]}.png",
            "scale_adjustment": None,
        }
        self.frames.setdefault(category, []).append(
            {
                "sequence_name": name,
                "frame_number": number,
                "image": {"path": entry["filepath"], "size": [height, width]},
                "depth": depth,
                "mask": None,
                "viewpoint": viewpoint(entry, FORMATS[number % 3], height, width),
            }
        )
        lists = self.lists.setdefault(category, {"train": [], "val": None, "test": []})
        lists[split].append([name, number, entry["filepath"]])

    def write(self):
        for category in self.frames:
            write_gzipped(self.folder / category / "frame_annotations.jgz", self.frames[category])
            write_gzipped(self.folder / category / "sequence_annotations.jgz", self.sequences[category])
            path = self.folder / category / "set_lists" / "set_lists_fewview_dev.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self.lists[category]))
        return self.folder

    @property
    def first(self):
        """Category and frames of the first sequence for training."""
        category = next(c for c in sorted(self.lists) if self.lists[c]["train"])
        name = self.lists[category]["train"][0][0]
        return category, [frame for frame in self.frames[category] if frame["sequence_name"] == name]


@pytest.fixture
def official(captures, tmp_path):
    return Official(captures, tmp_path / "official")


def found(source, split=None):
    return {(s.split, s.category, s.name): s for s in source.sequences() if split in (None, s.split)}


def test_both_kinds_of_annotations_pack_to_the_same_frames(captures, official, shard_dir, tmp_path):
    done = vggt_prep(
        *("pack", "--co3d-dir", official.write(), "--out", tmp_path / "out", "--short-side", 150, "--shard-frames", 60)
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = shards.open(shard_dir), shards.open(tmp_path / "out")
    assert len(ours.frames) == len(theirs.frames)
    assert np.array_equal(ours.sequences, theirs.sequences)
    for key in ("extrinsics", "intrinsics"):
        assert np.abs(ours.frames[key] - theirs.frames[key]).max() < 1e-9
    assert all(ours.read(i) == theirs.read(i) for i in range(len(ours.frames)))


def test_annotations_of_vggts_kind_may_have_pytorch3ds_cameras(captures, tmp_path):
    path = sorted((captures / "annotations").glob("*_train.jgz"))[0]
    content = json.loads(gzip.decompress(path.read_bytes()))
    expected = {}
    for entries in content.values():
        for i, entry in enumerate(entries):
            height, width = cv2.imread(str(captures / "co3d" / entry["filepath"])).shape[:2]
            expected[entry["filepath"]] = (entry["extri"], entry["intri"], height, width)
            entries[i] = {"filepath": entry["filepath"], **viewpoint(entry, None, height, width)}
            del entries[i]["intrinsics_format"]
    write_gzipped(tmp_path / path.name, content)
    frames = [f for s in Co3D(captures / "co3d", tmp_path).sequences() for f in s.frames]
    assert len(frames) == len(expected)
    for frame in frames:
        extri, intri, height, width = expected[frame.path]
        extrinsics, intrinsics = frame.camera.opencv(height, width)
        assert np.abs(extrinsics - extri).max() < 1e-9
        assert np.abs(intrinsics - intri).max() < 1e-9


def test_set_lists_say_which_frames_train_and_which_test(official):
    """As in the manyview lists, a sequence may be in both, with other frames."""
    category, frames = official.first
    listed = [[f["sequence_name"], f["frame_number"], f["image"]["path"]] for f in frames]
    official.lists[category] = {"train": listed[:10], "val": listed[10:15], "test": listed[14:18]}
    (source,) = (OfficialCo3D(official.write(), "fewview_dev", categories=(category,)),)
    sequences = {split: s for (split, _, _), s in found(source).items()}
    assert [f.path for f in sequences["train"].frames] == [path for _, _, path in listed[:10]]
    assert [f.path for f in sequences["test"].frames] == [path for _, _, path in listed[10:18]]
    only = OfficialCo3D(official.folder, "fewview_dev", splits=("test",), categories=(category,))
    assert {s.split for s in only.sequences()} == {"test"}


def test_sequences_of_low_or_unknown_quality_are_no_part_of_it(official):
    category = official.first[0]
    for sequence, score in zip(official.sequences[category], (0.4, None, 0.5), strict=False):
        sequence["viewpoint_quality_score"] = score
    left_out = {s["sequence_name"] for s in official.sequences[category][:2]}
    everything = found(OfficialCo3D(official.write(), "fewview_dev"))
    good = found(OfficialCo3D(official.folder, "fewview_dev", min_quality=0.5))
    assert {name for _, c, name in set(everything) - set(good) if c == category} == left_out


def test_sequences_that_are_left_out_are_counted_by_reason(official, tmp_path):
    category = official.first[0]
    official.sequences[category][0]["viewpoint_quality_score"] = 0.4
    official.write()
    command = ("pack", "--co3d-dir", official.folder, "--out", tmp_path / "out", "--category", category)
    done = vggt_prep(*command, "--min-quality", 0.5)
    assert done.returncode == 0, done.stderr
    assert "1 annotated sequence skipped: viewpoint quality below 0.5, or not known (" in done.stdout
    none = vggt_prep(*command[:-4], "--out", tmp_path / "none", "--min-quality", 100)
    assert none.returncode == 1
    assert "no frame to pack; 8 annotated sequences skipped: viewpoint quality below 100" in none.stderr


def test_null_fields_and_scales(official):
    _, frames = official.first
    frames[0]["depth"] = None
    frames[1]["depth"] = {"path": None, "mask_path": None, "scale_adjustment": None}
    frames[2]["depth"]["scale_adjustment"] = 2.5
    frames[3]["depth"]["mask_path"] = None
    frames[4]["image"]["size"] = None
    source = OfficialCo3D(official.write(), "fewview_dev")
    made = found(source, "train")[("train", official.first[0], frames[0]["sequence_name"])].frames
    assert [f.depth is None for f in made[:3]] == [True, True, False]
    assert [f.depth.unit for f in made[2:4]] == [2.5, 1.0]
    assert made[3].mask is None
    assert made[4].size is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.update(viewpoint=None), "annotation without a camera"),
        (lambda f: f["viewpoint"].pop("T"), "annotation without T"),
        (lambda f: f["viewpoint"].update(T=["0", "0", "1"]), "annotation whose T is not of numbers"),
        (lambda f: f["viewpoint"].update(T=[0, None, 1]), "annotation whose T is not of numbers"),
        (lambda f: f["viewpoint"].update(T=[True, False, True]), "annotation whose T is not of numbers"),
        (lambda f: f["viewpoint"].update(R=[[1, 0, 0], [0, 1]]), "annotation without R"),
        (lambda f: f["depth"].update(scale_adjustment=1e25), "annotation whose scale_adjustment is not"),
        (lambda f: f["viewpoint"].update(R=[[1, 0], [0, 1]]), "annotation whose R is not 3x3"),
        (lambda f: f["viewpoint"].update(intrinsics_format="pixels"), "annotation with an intrinsics_format other"),
        (lambda f: f["depth"].update(path="../../secret.png"), "annotated path is not <category>/<sequence>/depths"),
        (lambda f: f["depth"].update(scale_adjustment=-1), "annotation whose scale_adjustment is not"),
        (lambda f: f["depth"].update(scale_adjustment="2"), "annotation whose scale_adjustment is not"),
        (lambda f: f["image"].update(size=480), "annotation whose image size is not"),
        (lambda f: f.update(depth=[1]), "annotation whose image or depth is not an object"),
    ],
)
def test_annotations_that_give_no_frame_are_counted_by_reason(official, change, reason):
    category, frames = official.first
    change(frames[5])
    sequence = found(OfficialCo3D(official.write(), "fewview_dev"))["train", category, frames[5]["sequence_name"]]
    assert len(sequence.frames) == len(frames) - 1
    ((path, found_reason),) = sequence.bad
    assert path == frames[5]["image"]["path"]
    assert found_reason.startswith(reason)


def test_frames_of_the_set_list_that_are_not_annotated_are_counted(official):
    category, frames = official.first
    path, name = frames[5]["image"]["path"], frames[5]["sequence_name"]
    frames[5]["image"] = None
    frames[6]["sequence_name"] = [1, 2]
    sequence = found(OfficialCo3D(official.write(), "fewview_dev"))["train", category, name]
    assert len(sequence.frames) == len(frames) - 2
    assert [entry[0] for entry in sequence.bad] == [path, frames[6]["image"]["path"]]
    assert {entry[1] for entry in sequence.bad} == {"in the set list, but not annotated"}


def test_images_of_another_size_than_annotated_are_bad(official, tmp_path):
    official.first[1][3]["image"]["size"] = [11, 12]
    done = vggt_prep("pack", "--co3d-dir", official.write(), "--out", tmp_path / "out", "--short-side", 100)
    assert done.returncode == 0, done.stderr
    assert "1 frame left out: image is not of the annotated size" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set-list", "manyview_dev_0"), "--set-list manyview_dev_0: no "),
        (("--set-list", "manyview_dev_0"), "there are fewview_dev"),
        (("--category", "apple"), "--category apple: not annotated in"),
    ],
)
def test_what_the_download_has_not_is_said(official, tmp_path, arguments, message):
    done = vggt_prep("pack", "--co3d-dir", official.write(), "--out", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_download_without_annotations_is_told_what_is_missing(captures, tmp_path):
    done = vggt_prep("pack", "--co3d-dir", captures / "co3d", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "expected <category>/frame_annotations.jgz in it, found none" in done.stderr
