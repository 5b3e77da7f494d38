"""python -m train.check_data: what anyone with a new dataset looks at first."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest
import torch
from conftest import run_command

import shards
from train.check_data import check_batch, draw_batch
from train.data.plan import DataConfig, validation_plan
from train.data.scenes import load_step
from train.data.split import Split


@pytest.fixture(scope="module")
def batch(shard_dir):
    split = Split([shards.open(shard_dir)], "train")
    return load_step(split, validation_plan(DataConfig(width=140, val_views=6), split.lengths, 0, 1)[0][0])


def test_the_command_shows_plan_rates_check_and_a_picture(shard_dir, tmp_path):
    settings = (f"data.shards={shard_dir}", "data.width=84", "data.views=[2, 4]", "max_img_per_gpu=12")
    done = run_command("python", "-m", "train.check_data", *settings, "--steps", 4, "--out", tmp_path / "look")
    assert done.returncode == 0, done.stderr
    for text in ("7 sequences of 24 to 24 frames", "height x width", "images/s", "cross-view check of"):
        assert text in done.stdout
    for name in ("data.png", "views.png"):
        picture = cv2.imread(str(tmp_path / "look" / name))
        assert picture is not None
        assert picture.std() > 20
    medians = re.findall(r"(\w+) sampling: two views overlap by (\d+)% \(median", done.stdout)
    assert [name for name, _ in medians] == ["uniform", "nearby", "overlap"]
    assert int(medians[0][1]) < int(medians[1][1])  # of a turntable


def test_right_cameras_agree_and_wrong_ones_do_not(batch):
    (right,) = check_batch(batch).values()
    assert right > 0.55
    turned = dict(batch, extrinsics=batch["extrinsics"].clone())
    turn = torch.tensor(cv2.Rodrigues(np.array([0, np.radians(8), 0]))[0])
    turned["extrinsics"][:, 1:] = turn @ turned["extrinsics"][:, 1:]
    scaled = dict(batch, depth_scale=batch["depth_scale"] * torch.linspace(1, 1.6, 6))
    inverted = dict(batch, extrinsics=batch["extrinsics"].clone())
    rotation, translation = inverted["extrinsics"][..., :3].mT, inverted["extrinsics"][..., 3:]
    inverted["extrinsics"] = torch.cat([rotation, -rotation @ translation], dim=-1)
    for wrong in (turned, scaled, inverted):
        assert all(share < 0.4 for share in check_batch(wrong).values())


def test_scenes_without_depth_are_not_checked_but_drawn(batch):
    without = dict(batch, depth=torch.zeros_like(batch["depth"]))
    assert check_batch(without) == {}
    assert draw_batch(without).ndim == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected data.shards"),
        (("data.shards=/nowhere",), "/nowhere: no such directory"),
        (("data.shard=x",), "data.shards"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    done = run_command("python", "-m", "train.check_data", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
