"""Captures are recognized by their files, and those that cannot be packed as they are by name."""

from __future__ import annotations

import re
import shutil

import pytest
from conftest import vggt_prep
from layout_writers import ALL, WRITERS, rendered

from prep.importers.captures import CaptureOptions, Captures
from prep.importers.layouts import FORMATS, UNREAD, capture_folders, layout_hint


@pytest.mark.parametrize("inside", [False, True])
def test_each_layout_is_known_by_its_files_alone_or_one_of_many(tmp_path, inside):
    views = rendered(frames=1)
    for name, write in ALL.items():
        folder = tmp_path / name
        write(folder / "capture 1" if inside else folder, views)
        assert [found for found, _ in capture_folders(folder, None)] == [name]
        assert f"It looks like {FORMATS[name].TITLE}: pack it with vggt-prep pack {folder}" in layout_hint(folder)


@pytest.mark.parametrize("patterns", UNREAD)
@pytest.mark.parametrize("inside", [False, True])
def test_what_cannot_be_read_is_known_by_its_files_and_what_to_do_is_said(tmp_path, patterns, inside):
    file = tmp_path / ("capture 1" if inside else "") / patterns[0].replace("*", "0")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert UNREAD[patterns] in layout_hint(tmp_path)
    for given in (tmp_path, file):
        with pytest.raises(ValueError, match=re.escape(UNREAD[patterns])):
            capture_folders(given, None)


def test_captures_are_found_three_folders_deep_and_told_apart_by_the_folder_above(tmp_path):
    views = rendered(frames=2)
    for room in ("chess", "office"):
        WRITERS["sevenscenes"](tmp_path / "rooms" / room / "seq-01", views)
    WRITERS["frames"](tmp_path / "rooms" / "alone", views)
    (tmp_path / "rooms" / ".cache").mkdir()
    found = Captures([tmp_path / "rooms"], CaptureOptions()).found
    assert [capture.name for capture in found] == ["alone", "chess-seq-01", "office-seq-01"]
    WRITERS["frames"](tmp_path / "other" / "alone", views)
    WRITERS["frames"](tmp_path / "again" / "other" / "alone", views)
    found = Captures([tmp_path / "other", tmp_path / "again"], CaptureOptions()).found
    names = [f"{tmp_path.name}-other-alone", "again-other-alone"]
    assert [capture.name for capture in found] == names, "as many folders as tell them apart"
    with pytest.raises(ValueError, match=f"would both be called .*{names[0]}"):
        Captures([tmp_path / "other", tmp_path / "other"], CaptureOptions())


def test_what_macos_leaves_beside_a_capture_is_none(tmp_path):
    views = rendered(frames=3)
    for name in ("polycam", "arkitscenes", "scannet"):
        WRITERS[name](tmp_path / name, views)
        for path in [path for path in (tmp_path / name).rglob("*") if path.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"of another system")
            copy = tmp_path / "__MACOSX" / path.relative_to(tmp_path).with_name(f"._{path.name}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"of another system")
    found = Captures([tmp_path], CaptureOptions()).found
    assert {capture.name: (len(capture.frames), capture.unusable) for capture in found} == {
        name: (3, []) for name in ("polycam", "arkitscenes", "scannet")
    }
    assert all(not frame.image.name.startswith(".") for capture in found for frame in capture.frames)


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
