from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from golden_figures import GOLDEN, load_tensors

from train.data.color_jitter import draw_color_jitter, no_color_jitter
from train.objective.color_jitter import apply_color_jitter
from train.objective.targets import normalize_scenes, prepare


def test_scene_normalization_equals_published():
    g = load_tensors(GOLDEN / "normalization.npz")
    extrinsics, depth, points, _ = normalize_scenes(g["extrinsics"], g["intrinsics"], g["depths"], g["point_masks"])
    for found, name in ((extrinsics, "extrinsics"), (depth, "depths"), (points, "world_points")):
        expected = g[f"out_{name}"]
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max(), name


def raw_batch(depth):
    b, s, h, w = depth.shape
    k = torch.tensor([[20.0, 0, (w - 1) / 2], [0, 20, (h - 1) / 2], [0, 0, 1]]).double()
    pose = torch.eye(4).double()[:3].repeat(b, s, 1, 1)
    pose[:, 1:, 0, 3] = 0.5
    return {
        "images": torch.randint(0, 256, (b, s, 3, h, w), dtype=torch.uint8),
        "depth": depth.half(),
        "depth_scale": torch.full((b, s), 2.0),
        "extrinsics": pose,
        "intrinsics": k.expand(b, s, 3, 3),
        "color_jitter": torch.from_numpy(np.stack([no_color_jitter(s)] * b)),
        "keys": [["a"] * s] * b,
    }


def test_a_scene_with_few_points_has_no_scale_and_an_empty_mask():
    depth = torch.zeros(2, 2, 14, 28)
    depth[0] = 3
    depth[1].view(-1)[:100] = 3
    batch = prepare(raw_batch(depth), torch.device("cpu"), with_points=True)
    assert batch["has_scale"].tolist() == [True, False]
    assert batch["mask"][0].all()
    assert not batch["mask"][1].any()
    assert batch["depth"][0, 0, 0, 0].item() == pytest.approx(6 / batch["scale"][0].item())
    assert all(value.isfinite().all() for value in batch.values() if value.is_floating_point())
    assert "points" not in prepare(raw_batch(depth), torch.device("cpu"), with_points=False)


def test_coordinates_far_from_the_origin_lose_nothing():
    depth = torch.full((1, 2, 14, 28), 3.0)
    near, far = raw_batch(depth), raw_batch(depth)
    far["extrinsics"] = far["extrinsics"].clone()
    far["extrinsics"][..., 3] -= 5e6
    a, b = (prepare(raw, torch.device("cpu"), with_points=False) for raw in (near, far))
    assert (a["extrinsics"] - b["extrinsics"]).abs().max() < 1e-6


def reference_jitter(image, values):
    """torchvision's definition, on one pixel after the other: image [H, W, 3] in [0, 1]."""
    image = image.copy()
    luma = np.array([0.2989, 0.587, 0.114])
    brightness, contrast, saturation, hue, *order, gray = values
    for turn in range(4):
        for name, place in zip("bcsh", order, strict=True):
            if place != turn:
                continue
            if name == "b":
                image = np.clip(image * brightness, 0, 1)
            elif name == "c":
                image = np.clip(contrast * image + (1 - contrast) * (image @ luma).mean(), 0, 1)
            elif name == "s":
                image = np.clip(saturation * image + (1 - saturation) * (image @ luma)[..., None], 0, 1)
            else:
                for row in image:
                    for pixel in row:
                        h, s, v = colorsys.rgb_to_hsv(*pixel)
                        pixel[:] = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
    return np.repeat((image @ luma)[..., None], 3, axis=-1) if gray else image


def test_color_jitter_equals_an_independent_implementation():
    rng = np.random.default_rng(0)
    color = np.concatenate([draw_color_jitter(rng, 3) for _ in range(8)])
    color[5, 8] = 1  # one of them gray
    images = rng.random((24, 3, 6, 7), dtype=np.float32)
    images[:, :, 0] = images[:, :1, 0]  # gray pixels, whose hue is undefined
    found = apply_color_jitter(torch.from_numpy(images), color).numpy().transpose(0, 2, 3, 1)
    for i in range(24):
        expected = reference_jitter(images[i].transpose(1, 2, 0).astype(float), color[i])
        assert np.abs(found[i] - expected).max() < 2 / 255


def test_no_jitter_leaves_images_alone():
    images = torch.rand(3, 3, 4, 5)
    assert torch.equal(apply_color_jitter(images, no_color_jitter(3)), images)


def test_jitter_serves_whole_scenes_in_seven_of_ten():
    draws = [draw_color_jitter(np.random.default_rng(i), 4) for i in range(400)]
    whole = np.mean([(draw == draw[0]).all() for draw in draws])
    assert 0.63 < whole < 0.77
    assert 0.85 < np.mean([draw[0, 4] >= 0 for draw in draws]) < 0.95
