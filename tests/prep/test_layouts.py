"""Captures are recognized by their files, and those that cannot be packed as they are by name."""

from __future__ import annotations

import shutil

import pytest
from conftest import vggt_prep
from layout_writers import WRITERS, rendered

from prep.importers.layouts import FORMATS, UNREAD, capture_folders, layout_hint


@pytest.mark.parametrize("inside", [False, True])
def test_each_layout_is_known_by_its_files_alone_or_one_of_many(tmp_path, inside):
    views = rendered(frames=1)
    for name, write in WRITERS.items():
        folder = tmp_path / name
        write(folder / "capture 1" if inside else folder, views)
        assert [found for found, _ in capture_folders(folder, None)] == [name]
        assert f"It looks like {FORMATS[name].TITLE}: pack it with vggt-prep pack {folder}" in layout_hint(folder)


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("inside", [False, True])
def test_layouts_that_cannot_be_read_are_known_by_name(tmp_path, name, inside):
    pattern = UNREAD[name][0]
    file = tmp_path / ("capture 1" if inside else "") / pattern.replace("*", "0")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert f"It looks like {name}, which cannot be read yet" in layout_hint(tmp_path)
    with pytest.raises(ValueError, match=f"It looks like {name}"):
        capture_folders(tmp_path, None)


def test_nothing_is_made_up(captures, tmp_path):
    for folder in (tmp_path, captures / "co3d", captures / "annotations"):
        assert layout_hint(folder) == ""


def test_files_of_other_layouts_beside_a_dataset_do_not_matter(captures, tmp_path):
    shutil.copytree(captures, tmp_path / "captures")
    for folder in ("co3d", "annotations"):
        (tmp_path / "captures" / folder / "transforms.json").write_text("{}")
    source = ("--co3d-dir", tmp_path / "captures" / "co3d", "--annotation-dir", tmp_path / "captures" / "annotations")
    done = vggt_prep("pack", *source, "--out", tmp_path / "out", "--category", "balls", "--split", "train")
    assert done.returncode == 0, done.stderr


def test_whoever_packs_a_capture_as_co3d_is_told_how(tmp_path):
    WRITERS["tum"](tmp_path / "capture", rendered(frames=1))
    for options in ((), ("--annotation-dir", tmp_path / "capture")):
        done = vggt_prep("pack", "--co3d-dir", tmp_path / "capture", *options, "--out", tmp_path / "out")
        assert done.returncode == 1
        assert f"pack it with vggt-prep pack {tmp_path / 'capture'}" in " ".join(done.stderr.split())
