"""report.html as a reader gets it: in a browser, from disk, without a network."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Page
from test_evaluate import changed, evaluate_here

from train.charts import Series, cumulative, line_chart
from train.page import cloud_data
from train.pictures import Cameras, SceneResult


@pytest.fixture(scope="module")
def report(shard_dir, exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")

    def with_fields_of_view(state):  # random weights make some zero, which nothing can be drawn of
        state["camera_head.pose_branch.fc2.bias"][7:] += 0.4

    evaluate_here(shard_dir, changed(exported, out / "a.pt", with_fields_of_view), out)
    return out / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_report_opens_from_disk_draws_and_turns_clouds(report, tmp_path):
    with Page(report, tmp_path / "profile") as page:
        assert page.run("document.querySelectorAll('.viewer canvas').length") == 6
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        page.run("document.querySelector('.viewer').scrollIntoView()")
        page.run("document.querySelector('.viewer input:not(:checked)').click()")  # the true points, too
        x, y, width, height = page.run(
            "(r => [r.x, r.y, r.width, r.height])(document.querySelector('canvas').getBoundingClientRect())"
        )
        area = (slice(round(y), round(y + height)), slice(round(x), round(x + width)))
        # Scenes open seen from above, and more so after a drag down: what is nearer is lower on the screen.
        clip = "viewMatrix({turn: 0, tilt: %s, distance: 4, centre: [0, 0, 0], radius: 1}, 1)"
        for tilt in ("FIRST_TILT", "FIRST_TILT + 0.3"):
            near, far = (
                page.run(f"(m => (m[1 + 8] * {z} + m[13]) / (m[3 + 8] * {z} + m[15]))({clip % tilt})") for z in (-1, 1)
            )
            assert near < far
        right = page.run(f"(m => (m[0] + m[12]) / (m[3] + m[15]))({clip % 0})")
        down = page.run(f"(m => (m[5] + m[13]) / (m[7] + m[15]))({clip % 0})")
        assert right > 0 > down
        before = page.screenshot()[area]
        background = np.array([244, 244, 244])
        drawn = (np.abs(before.astype(int) - background).max(-1) > 8).mean()
        assert drawn > 0.05
        centre = (x + width / 2, y + height / 2)
        page.drag(*centre, 150, 40)
        turned = page.screenshot()[area]
        assert (turned != before).any(-1).mean() > 0.05
        page.call("Input.dispatchMouseEvent", type="mouseWheel", x=centre[0], y=centre[1], deltaX=0, deltaY=-600)
        assert (page.screenshot()[area] != turned).any(-1).mean() > 0.01
        # Without its points and cameras the canvas is empty.
        page.run("document.querySelector('.viewer').querySelectorAll('input:checked').forEach(box => box.click())")
        empty = page.screenshot()[area][60:, 200:]  # beside the check boxes
        assert (np.abs(empty.astype(int) - background).max(-1) <= 8).all()
        assert page.complaints() == []


def test_report_is_one_file_that_asks_for_nothing_else(report):
    text = report.read_text()
    assert not re.search(r"<!-- \w+ -->", text), "a place was not filled"
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert not re.search(r"https?://", text)


def test_names_in_the_report_cannot_become_markup(shard_dir, exported, tmp_path):
    evil = tmp_path / "<script>x<"
    evil.mkdir()
    checkpoint = evil / "a.pt"
    checkpoint.write_bytes(exported.read_bytes())
    evaluate_here(shard_dir, checkpoint, tmp_path / "out")
    assert "<script>x" not in (tmp_path / "out" / "report.html").read_text()


def a_result(**changes):
    views, height, width = 3, 8, 10
    extrinsics = torch.eye(3, 4).expand(views, 3, 4).clone()
    extrinsics[:, 0, 3] = torch.arange(views)
    intrinsics = torch.tensor([[10.0, 0, 5], [0, 10, 4], [0, 0, 1]]).expand(views, 3, 3)
    cameras = Cameras(extrinsics, intrinsics)
    truth = 1 + torch.rand(views, height, width)
    fields = {
        "name": "a/b",
        "images": torch.rand(views, 3, height, width),
        "predicted": truth / 2,
        "confidence": 1 + torch.rand(views, height, width),
        "scale": 2.0,
        "truth": truth,
        "mask": truth > 0,
        "true_cameras": cameras,
        "predicted_cameras": Cameras(torch.cat([extrinsics[..., :3], extrinsics[..., 3:] / 2], -1), intrinsics),
    }
    return SceneResult(**fields | changes)


def test_right_predictions_lie_on_the_truth_whatever_their_scale():
    layers = {layer["name"]: layer for layer in cloud_data(a_result())["layers"]}
    assert set(layers) == {"true points", "true cameras", "predicted points", "predicted cameras"}
    assert np.allclose(layers["true cameras"]["lines"], layers["predicted cameras"]["lines"], atol=1e-3)


def test_scenes_are_drawn_with_what_there_is():
    def names(**changes):
        data = cloud_data(a_result(**changes))
        json.dumps(data, allow_nan=False)
        return [layer["name"] for layer in data["layers"]]

    assert names(predicted=None, confidence=None) == ["true points", "true cameras", "predicted cameras"]
    assert names(predicted_cameras=None) == ["true points", "true cameras"]
    nothing = torch.zeros(3, 8, 10)
    without = names(truth=nothing, mask=nothing > 0)
    assert without == ["true cameras", "predicted points", "predicted cameras"]
    one_place = Cameras(torch.eye(3, 4).expand(3, 3, 4), a_result().true_cameras.intrinsics)
    assert names(predicted=None, confidence=None, predicted_cameras=one_place) == ["true points", "true cameras"]
    spoilt = Cameras(a_result().true_cameras.extrinsics, a_result().true_cameras.intrinsics * math.nan)
    assert names(predicted_cameras=spoilt) == ["true points", "true cameras"]
    with_nan = torch.full((3, 8, 10), math.nan)
    assert names(confidence=with_nan) == ["true points", "true cameras", "predicted cameras"]
    nan = Cameras(torch.full((3, 3, 4), math.nan), a_result().true_cameras.intrinsics)
    assert names(predicted_cameras=nan) == ["true points", "true cameras"]
    assert names(predicted=nothing + math.nan) == ["true points", "true cameras", "predicted cameras"]


def test_charts_leave_out_what_is_not_finite_and_are_empty_without_points():
    chart = line_chart("t", "x", [Series("a", [0, 1, 2], [1.0, math.nan, 3.0])])
    assert "nan" not in chart
    assert chart.count("polyline") == 1
    assert line_chart("t", "x", [Series("a", [0.0], [math.inf])]) == ""
    assert line_chart("t", "x", []) == ""
    assert "nan" not in line_chart("t", "x", [Series("flat", [1, 2], [0.0, 0.0])])


def test_cumulative_share_rises_to_one_by_steps():
    series = cumulative("a", [3.0, 1.0])
    assert list(zip(series.x, series.y, strict=True)) == [(1, 0), (1, 0.5), (3, 0.5), (3, 1)]
