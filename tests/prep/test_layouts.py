"""Captures in another layout than Co3D's are recognized by name."""

from __future__ import annotations

import shutil

import pytest
from conftest import vggt_prep
from golden_figures import SHARED

from prep.importers.layouts import LAYOUTS, recognized


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("inside", [False, True])
def test_each_layout_is_known_by_its_files_alone_or_one_of_many(tmp_path, name, inside):
    pattern = LAYOUTS[name][0]
    file = tmp_path / ("capture 1" if inside else "") / pattern.replace("*.json", "0.json").replace("*", "0")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert recognized(tmp_path) == f"{name} ({file.relative_to(tmp_path)})"


def test_nothing_is_made_up(captures, tmp_path):
    for folder in (tmp_path, captures / "co3d", captures / "annotations"):
        assert recognized(folder) is None


def test_files_of_other_layouts_beside_a_dataset_do_not_matter(captures, tmp_path):
    shutil.copytree(captures, tmp_path / "captures")
    for folder in ("co3d", "annotations"):
        (tmp_path / "captures" / folder / "transforms.json").write_text("{}")
    source = ("--co3d-dir", tmp_path / "captures" / "co3d", "--annotation-dir", tmp_path / "captures" / "annotations")
    done = vggt_prep("pack", *source, "--out", tmp_path / "out", "--category", "balls", "--split", "train")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("colmap", "a COLMAP project"),
        ("nerfstudio", "a nerfstudio capture"),
        ("tum", "a TUM RGB-D sequence"),
        ("sevenscenes", "a 7-Scenes sequence"),
    ],
)
def test_whoever_packs_real_captures_of_another_layout_is_told_what_they_are(tmp_path, folder, name):
    captures = SHARED / "captures" / folder
    if not captures.is_dir():
        pytest.skip("no real captures beside this checkout")
    for options in ((), ("--annotation-dir", captures)):
        done = vggt_prep("pack", "--co3d-dir", captures, *options, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert f"It looks like {name}" in done.stderr
        assert "packs Co3D's layout only" in done.stderr
