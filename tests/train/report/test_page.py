"""report.html as a reader gets it: in a browser, from disk, without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from evaluations import changed, evaluate_here
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from train.evaluation.scene_result import Cameras, SceneResult
from train.report.charts import cumulative, line_chart
from train.report.page import make_page
from train.report.pictures import scene_block
from train.report.viewer import _upright, scene_figure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(shard_dir, exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")

    def with_fields_of_view(state):  # random weights make some zero, which nothing can be drawn of
        state["camera_head.pose_branch.fc2.bias"][7:] += 0.4

    evaluate_here(shard_dir, changed(exported, out / "a.pt", with_fields_of_view), out)
    return out / "report.html"


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; without a GPU, WebGL is drawn by the CPU."""
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


def opened(browser, path, width):
    """The page, and what it complains of or asks for beside itself."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints = []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url != path.as_uri() and complaints.append(request.url[:80]))
    page.goto(path.as_uri())
    return page, complaints


def is_blob(complaint):
    return complaint.startswith(("data:", "blob:"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_report_opens_from_disk_and_its_scenes_turn_and_switch_layers(report, browser):
    page, complaints = opened(browser, report, 1200)
    scenes = page.locator("section .plot")
    assert scenes.count() == 6
    scene = scenes.nth(1)
    scene.scroll_into_view_if_needed()
    canvas = scene.locator("canvas").last
    canvas.wait_for()
    page.wait_for_timeout(1000)
    box = canvas.bounding_box()
    before = canvas.screenshot()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 150, box["y"] + box["height"] / 2 + 40, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    turned = canvas.screenshot()
    assert changed_pixels(before, turned) > 0.01

    def shown():
        return scene.evaluate("plot => plot._fullData.map(layer => [layer.name, layer.visible])")

    assert ["true points", "legendonly"] in shown()
    scene.locator(".legend .traces", has_text="true points").locator(".legendtoggle").click()
    page.wait_for_timeout(1000)  # plotly waits for a second click
    assert ["true points", True] in shown()
    assert changed_pixels(turned, canvas.screenshot()) > 0.01
    assert [complaint for complaint in complaints if not is_blob(complaint)] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_of_the_report_is_cut_off(report, browser, width):
    page, _ = opened(browser, report, width)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    cut = """() => [...document.querySelectorAll('.wide')].map(e => e.scrollWidth - e.clientWidth).filter(d => d > 0)"""
    assert width < 1200 or page.evaluate(cut) == []


def changed_pixels(before, after):
    """The fraction of pixels that differ between two screenshots."""
    one, two = (cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR).astype(int) for png in (before, after))
    return (np.abs(one - two).max(-1) > 8).mean()


def test_every_place_of_the_template_is_filled(report):
    assert not re.search(r"<!-- \w+ -->", report.read_text().replace(get_plotlyjs(), ""))


def test_names_in_the_report_cannot_become_markup(report):
    text = (report.parent / "results.json").read_text()
    (label,) = json.loads(text)["checkpoints"]
    evil = "<script>x</script>"
    logged = [{"step": step, "split": evil, "loss_objective": 1.0} for step in (1, 2)]
    scene = a_result(name=evil)
    page = make_page(json.loads(text.replace(label, evil)), [("best", scene)], evil, logged)
    assert "<script>x" not in page.replace(get_plotlyjs(), "")
    assert "x</script>" not in page.replace(get_plotlyjs(), "")


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


def test_cameras_from_above_look_the_same_in_any_unit_of_the_prediction():
    scene = a_result()
    pictures = []
    for unit in (1.0, 0.25):
        cameras = scene.predicted_cameras
        extrinsics = torch.cat([cameras.extrinsics[..., :3], cameras.extrinsics[..., 3:] * unit], -1)
        changed = replace(
            scene,
            predicted=scene.predicted * unit,
            scale=scene.scale / unit,
            predicted_cameras=Cameras(extrinsics, cameras.intrinsics),
        )
        pictures.append(scene_block(changed))
    assert np.array_equal(*pictures)


def layers(**changes):
    figure = scene_figure(a_result(**changes))
    figure.to_json()
    return {layer.name: layer for layer in figure.data}


def test_right_predictions_lie_on_the_truth_whatever_their_scale():
    found = layers()
    assert set(found) == {"true points", "true cameras", "predicted points", "predicted cameras"}
    for axis in "xyz":
        true, predicted = found["true cameras"][axis], found["predicted cameras"][axis]
        assert np.allclose(true, predicted, atol=1e-3, equal_nan=True)


def test_what_is_up_in_the_images_is_up_in_the_scene():
    """y points down in a camera's coordinates, z up in plotly's."""
    found = _upright(np.array([[1.0, 2, 3]]))
    assert {axis: values.tolist() for axis, values in found.items()} == {"x": [1], "y": [3], "z": [-2]}


def test_scenes_are_drawn_with_what_there_is():
    assert [*layers(predicted=None, confidence=None)] == ["true points", "true cameras", "predicted cameras"]
    assert [*layers(predicted_cameras=None)] == ["true points", "true cameras"]
    nothing = torch.zeros(3, 8, 10)
    without = [*layers(truth=nothing, mask=nothing > 0)]
    assert without == ["true cameras", "predicted points", "predicted cameras"]
    one_place = Cameras(torch.eye(3, 4).expand(3, 3, 4), a_result().true_cameras.intrinsics)
    assert [*layers(predicted=None, confidence=None, predicted_cameras=one_place)] == ["true points", "true cameras"]
    spoilt = Cameras(a_result().true_cameras.extrinsics, a_result().true_cameras.intrinsics * math.nan)
    assert [*layers(predicted_cameras=spoilt)] == ["true points", "true cameras"]
    with_nan = torch.full((3, 8, 10), math.nan)
    assert [*layers(confidence=with_nan)] == ["true points", "true cameras", "predicted cameras"]
    nan = Cameras(torch.full((3, 3, 4), math.nan), a_result().true_cameras.intrinsics)
    assert [*layers(predicted_cameras=nan)] == ["true points", "true cameras"]
    assert [*layers(predicted=nothing + math.nan)] == ["true points", "true cameras", "predicted cameras"]


def test_cameras_of_scenes_without_depth_are_seen_whatever_their_unit():
    nothing, cameras = torch.zeros(3, 8, 10), a_result().true_cameras
    far = torch.cat([cameras.extrinsics[..., :3], cameras.extrinsics[..., 3:] * 1e7], -1)
    found = layers(truth=nothing, mask=nothing > 0, true_cameras=Cameras(far, cameras.intrinsics))["true cameras"]
    pyramid = np.ptp(found["y"][np.isfinite(found["y"])])
    assert 0.01 < pyramid / np.ptp(found["x"][np.isfinite(found["x"])]) < 0.5


def test_a_chart_without_points_is_none():
    assert line_chart("t", "x", []) is None
    assert line_chart("t", "x", [("a", [], [], False)]) is None
    assert len(line_chart("t", "x", [("a", [0, 1], [1.0, 3.0], False), ("b", [], [], True)]).data) == 1


def test_cumulative_fraction_rises_to_one_by_steps():
    x, y = cumulative([3.0, 1.0])
    assert list(zip(x, y, strict=True)) == [(1, 0), (1, 0.5), (3, 0.5), (3, 1)]
