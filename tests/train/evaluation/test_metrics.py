"""Every metric against an independent implementation (numpy, scipy), and by what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_figures import GOLDEN, load_json, load_tensors
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from train.evaluation.depths import depth_errors
from train.evaluation.metrics import METRICS, scene_metrics
from train.evaluation.points import apply_similarity, nearest_distances, point_errors, umeyama
from train.evaluation.poses import (
    ACCURACY_LIMITS,
    accuracy,
    fov_error,
    pair_errors,
    pose_auc,
    pose_metrics,
    relative_errors,
)
from train.evaluation.sizes import size_ratio, summarize_sizes
from vggt.geometry import encode_pose, invert_se3, transform_points, unproject

RNG = np.random.default_rng(0)


def random_poses(*shape):
    rotations = Rotation.random(int(np.prod(shape)), random_state=1).as_matrix().reshape(*shape, 3, 3)
    return torch.from_numpy(np.concatenate([rotations, RNG.standard_normal((*shape, 3, 1))], axis=-1))


def disturbed(poses, angle=0.2):
    turns = torch.from_numpy(Rotation.from_rotvec(RNG.normal(0, angle, (poses[..., 0, 0].numel(), 3))).as_matrix())
    turned = turns.view(*poses.shape[:-1], 3) @ poses
    turned[..., 3] += torch.from_numpy(RNG.normal(0, angle, turned[..., 3].shape))
    return turned


def depths(views=3, scenes=2):
    truth = torch.from_numpy(RNG.uniform(0.5, 4, (scenes, views, 9, 11))).float()
    predicted = truth * torch.from_numpy(RNG.lognormal(0.3, 0.4, truth.shape)).float()
    mask = torch.from_numpy(RNG.random(truth.shape) < 0.7)
    return predicted, truth, mask


@pytest.mark.parametrize("case", [0, 1, 2])
def test_pose_errors_accuracy_and_auc_equal_published(case):
    g, expected = load_tensors(GOLDEN / "pose_auc.npz"), load_json("pose_auc.json")[case]
    rotation, translation = pair_errors(g[f"pred_w2c_{case}"][:, :3].double(), g[f"gt_w2c_{case}"][:, :3].double())
    assert (rotation - g[f"r_deg_{case}"]).abs().max() < 2e-2  # the published acos is that coarse near zero
    assert (translation - g[f"t_deg_{case}"]).abs().max() < 2e-2
    figures = pose_metrics(rotation, translation)
    for threshold, auc in expected["auc"].items():
        assert figures[f"auc_{threshold}"].item() == pytest.approx(auc, abs=1e-6)
    for threshold in (5, 15):
        assert figures[f"rotation_acc_{threshold}"].item() == pytest.approx(expected[f"racc{threshold}"], abs=1e-6)
        assert figures[f"translation_acc_{threshold}"].item() == pytest.approx(expected[f"tacc{threshold}"], abs=1e-6)
    assert figures["rotation_deg"].item() == pytest.approx(expected["mean_r_deg"], abs=2e-2)
    assert figures["translation_deg"].item() == pytest.approx(expected["mean_t_deg"], abs=2e-2)


def test_pair_errors_equal_those_of_scipy_rotations():
    truth = random_poses(2, 5)
    predicted = disturbed(truth)
    rotation, translation = pair_errors(predicted, truth)
    for scene in range(2):
        place = 0
        for i in range(5):
            for j in range(i + 1, 5):
                ways, turns = [], []
                for poses in (predicted[scene].numpy(), truth[scene].numpy()):
                    square = [np.vstack([pose, [0, 0, 0, 1]]) for pose in poses]
                    relative = square[i] @ np.linalg.inv(square[j])
                    turns.append(Rotation.from_matrix(relative[:3, :3]))
                    ways.append(relative[:3, 3] / np.linalg.norm(relative[:3, 3]))
                angle = np.degrees((turns[0].inv() * turns[1]).magnitude())
                assert rotation[scene, place].item() == pytest.approx(angle, abs=1e-6)
                way = np.degrees(np.arccos(np.clip(abs(ways[0] @ ways[1]), 0, 1)))
                assert translation[scene, place].item() == pytest.approx(way, abs=1e-5)
                place += 1
        assert place == rotation.shape[1]


def test_global_similarity_changes_no_pose_error():
    truth = random_poses(3, 6)
    predicted = disturbed(truth)
    world = random_poses(3, 1)
    moved = torch.cat(  # the predicted world turned, shifted and 2.5 times as large
        [
            predicted[..., :3] @ world[..., :3],
            2.5 * predicted[..., 3:] + predicted[..., :3] @ world[..., 3:],
        ],
        dim=-1,
    )
    for one, other in zip(pair_errors(predicted, truth), pair_errors(moved, truth), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_small_and_half_turn_angles_are_exact():
    for angle in (1e-6, 1e-3, 90.0, 179.999, 180.0):
        turn = torch.from_numpy(Rotation.from_rotvec([0, np.radians(angle), 0]).as_matrix())
        pose = torch.cat([turn, torch.ones(3, 1)], dim=-1)[None]
        still = torch.cat([torch.eye(3), torch.ones(3, 1)], dim=-1)[None].double()
        assert relative_errors(pose, still)[0].item() == pytest.approx(angle, rel=1e-6)


def test_no_translation_counts_as_ninety_degrees():
    """The zero vector is parallel to everything: guessing one place for all cameras must not be perfect."""
    truth = random_poses(4)
    still = truth.clone()
    still[:, :, 3] = 0
    still[:, :, :3] = torch.eye(3, dtype=truth.dtype)
    assert (pair_errors(still, truth)[1] == 90).all()


@pytest.mark.parametrize("limit", [3, 5, 15, 30])
def test_auc_equals_cumulative_histogram_of_numpy(limit):
    errors = RNG.uniform(0, 40, (4, 45))
    errors[0, :3] = 0, limit, limit - 1  # on the edges of bins
    for row, auc in zip(errors, pose_auc(torch.from_numpy(errors), limit), strict=True):
        histogram, _ = np.histogram(row, bins=np.arange(limit + 1))
        assert auc.item() == pytest.approx(np.mean(np.cumsum(histogram / len(row))), abs=1e-12)


def test_accuracy_is_share_below_limit_and_not_hidden_by_nan():
    errors = torch.tensor([[1.0, 4.9, 5.0, 80.0], [1.0, torch.nan, 2.0, 3.0]])
    assert accuracy(errors, 5)[0] == 0.5
    assert accuracy(errors, 5)[1].isnan()
    assert pose_auc(errors, 5)[1].isnan()


def test_fov_error_equals_angles_by_hand():
    def intrinsics(fov_y, fov_x, height=56, width=84):
        fy, fx = height / 2 / np.tan(np.radians(fov_y) / 2), width / 2 / np.tan(np.radians(fov_x) / 2)
        return torch.tensor([[fx, 0, 41.5], [0, fy, 27.5], [0, 0, 1]])

    predicted = torch.stack([intrinsics(40, 60), intrinsics(50, 70)])[None]
    truth = torch.stack([intrinsics(44, 58), intrinsics(50, 71)])[None]
    assert fov_error(predicted, truth, 56, 84).tolist() == [pytest.approx((4 + 2 + 0 + 1) / 4, abs=1e-9)]


def numpy_depth_errors(predicted, truth, mask):
    p, t = predicted[mask].astype(np.float64), truth[mask].astype(np.float64)
    ratio = np.maximum(p / t, t / p)
    found = {"abs_rel": np.mean(np.abs(p - t) / t), "rmse": np.sqrt(np.mean((p - t) ** 2))}
    return found | {f"delta_{i}": np.mean(ratio < 1.25**i) for i in (1, 2, 3)}


@pytest.mark.parametrize("align", ["none", "scene", "image"])
def test_depth_errors_equal_numpy(align):
    predicted, truth, mask = depths()
    found = depth_errors(predicted, truth, mask, align)
    for scene in range(len(truth)):
        p, t, m = (x[scene].numpy().copy() for x in (predicted, truth, mask))
        for part in range(len(p)) if align == "image" else [slice(None)] if align == "scene" else []:
            lower = [np.percentile(x[part][m[part]], 50, method="lower") for x in (t, p)]
            p[part] *= lower[0] / lower[1]
        for name, value in numpy_depth_errors(p, t, m).items():
            assert found[name][scene].item() == pytest.approx(value, rel=1e-5), name


def test_depth_errors_do_not_see_the_scale_they_align():
    predicted, truth, mask = depths()
    by_scene = torch.tensor([2.0, 0.1])[:, None, None, None]
    by_image = torch.tensor([[2.0, 3.0, 0.5], [1.0, 7.0, 0.2]])[:, :, None, None]
    for align, factor in (("scene", by_scene), ("image", by_image)):
        one, other = (depth_errors(p, truth, mask, align) for p in (predicted, predicted * factor))
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-5), (align, name)
    assert (depth_errors(predicted * 2, truth, mask, "none")["abs_rel"] > 0.5).all()
    assert (depth_errors(predicted * by_image, truth, mask, "scene")["abs_rel"] > 0.5).all()


def test_depth_outside_the_mask_does_not_count_and_no_mask_gives_no_figure():
    predicted, truth, mask = depths()
    mask[1] = False
    spoilt = torch.where(mask, predicted, torch.nan)
    for align in ("none", "scene", "image"):
        one, other = (depth_errors(p, truth, mask, align) for p in (predicted, spoilt))
        for name in one:
            assert one[name][0] == other[name][0]
            assert one[name][1].isnan()
    predicted[0][mask[0]] = torch.nan
    assert depth_errors(predicted, truth, mask, "none")["delta_1"].isnan().all()


def test_depth_that_is_not_positive_is_within_no_factor():
    truth = torch.ones(1, 1, 2, 2)
    predicted = torch.tensor([[1.0, -1.0], [0.0, 1.1]])[None, None]
    assert depth_errors(predicted, truth, truth > 0, "none")["delta_1"].item() == 0.5


def test_umeyama_recovers_similarity_and_equals_scipy():
    source = torch.from_numpy(RNG.standard_normal((2, 50, 3)))
    turns = torch.from_numpy(Rotation.random(2, random_state=3).as_matrix())
    scale, shift = torch.tensor([0.4, 3.0]).double(), torch.from_numpy(RNG.standard_normal((2, 3)))
    target = apply_similarity(scale, turns, shift, source)
    mask = torch.from_numpy(RNG.random((2, 50)) < 0.6)
    target[~mask] = 1e3  # what is not known must not count
    for found, expected in zip(umeyama(source, target, mask), (scale, turns, shift), strict=True):
        assert torch.allclose(found, expected, atol=1e-9)
    noisy = target + torch.from_numpy(RNG.normal(0, 0.05, target.shape))
    scale, rotation, _ = umeyama(source, noisy, mask)
    for i in range(2):
        x, y = source[i][mask[i]].numpy(), noisy[i][mask[i]].numpy()
        x, y = x - x.mean(0), y - y.mean(0)
        turn, _ = Rotation.align_vectors(y, x)
        assert np.allclose(rotation[i].numpy(), turn.as_matrix(), atol=1e-9)
        best = np.sum(y * turn.apply(x)) / np.sum(x * x)
        assert scale[i].item() == pytest.approx(best, rel=1e-9)


def test_umeyama_gives_rotation_where_a_mirror_fits_better():
    source = torch.from_numpy(RNG.standard_normal((1, 30, 3)))
    mirrored = source * torch.tensor([1, 1, -1])
    _, rotation, _ = umeyama(source, mirrored, torch.ones(1, 30, dtype=torch.bool))
    assert torch.linalg.det(rotation).item() == pytest.approx(1)


def test_nearest_distances_equal_kd_tree():
    points, cloud = RNG.standard_normal((2, 700, 3)), RNG.standard_normal((2, 900, 3))
    found = nearest_distances(torch.from_numpy(points).float(), torch.from_numpy(cloud).float())
    for i in range(2):
        assert np.allclose(found[i].numpy(), cKDTree(cloud[i]).query(points[i])[0], atol=1e-5)


def test_chamfer_equals_kd_tree_and_does_not_see_similarity():
    truth = torch.from_numpy(RNG.uniform(-1, 1, (1, 3000, 3)))
    predicted = truth + torch.from_numpy(RNG.normal(0, 0.05, truth.shape))
    mask = torch.from_numpy(RNG.random((1, 3000)) < 0.8)
    found = point_errors(predicted, truth, mask)
    aligned = apply_similarity(*umeyama(predicted, truth, mask), predicted)[0][mask[0]].numpy()
    true = truth[0][mask[0]].numpy()
    assert found["accuracy"].item() == pytest.approx(cKDTree(true).query(aligned)[0].mean(), rel=2e-2)
    assert found["completeness"].item() == pytest.approx(cKDTree(aligned).query(true)[0].mean(), rel=2e-2)
    assert found["chamfer"] == (found["accuracy"] + found["completeness"]) / 2
    turn = torch.from_numpy(Rotation.random(1, random_state=9).as_matrix())
    moved = apply_similarity(torch.tensor([7.0]).double(), turn, torch.tensor([[1.0, 2, 3]]).double(), predicted)
    assert point_errors(moved, truth, mask)["chamfer"].item() == pytest.approx(found["chamfer"].item(), rel=1e-6)


def a_scene(views=4, height=28, width=42):
    """A batch of one scene as prepare gives it, and predictions that are perfect."""
    extrinsics = random_poses(1, views).float()
    extrinsics[:, 0] = torch.eye(3, 4)
    middle = (width - 1) / 2, (height - 1) / 2
    intrinsics = torch.tensor([[50.0, 0, middle[0]], [0, 55.0, middle[1]], [0, 0, 1]]).expand(1, views, 3, 3)
    depth = torch.from_numpy(RNG.uniform(0.5, 2, (1, views, height, width))).float()
    batch = {
        "images": torch.zeros(1, views, 3, height, width),
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "depth": depth,
        "mask": torch.from_numpy(RNG.random(depth.shape) < 0.8),
        "has_scale": torch.tensor([True]),
    }
    points = transform_points(invert_se3(extrinsics), unproject(depth, intrinsics))
    predictions = {
        "pose_enc": encode_pose(extrinsics, intrinsics, height, width),
        "depth": depth[..., None],
        "world_points": points,
    }
    return batch, predictions


def test_perfect_predictions_have_perfect_figures():
    batch, predictions = a_scene()
    found = scene_metrics(predictions, batch)
    assert set(found) == set(METRICS)
    for name, value in found.items():
        if "acc_" in name or "auc" in name or "delta" in name:
            assert value == 1, name
        else:
            assert value == pytest.approx(0, abs=2e-2 if name.endswith("deg") else 1e-6), name
    for limit in ACCURACY_LIMITS:
        assert METRICS[f"rotation_acc_{limit}"].higher_is_better


def test_figures_are_those_of_the_heads_and_truth_there_are():
    batch, predictions = a_scene()
    pose = {name for name in METRICS if not name.startswith(("depth", "point"))}
    assert set(scene_metrics({"pose_enc": predictions["pose_enc"]}, batch)) == pose
    no_truth = batch | {"has_scale": torch.tensor([False]), "mask": batch["mask"] & False}
    assert set(scene_metrics(predictions, no_truth)) == pose
    assert {name.split("_")[0] for name in scene_metrics({"depth": predictions["depth"]}, batch)} == {"depth"}
    assert scene_metrics({}, batch) == {}


def test_predictions_that_are_not_finite_give_nan_not_a_figure():
    batch, predictions = a_scene()
    predictions["depth"] = predictions["depth"].clone()
    predictions["depth"][:] = torch.nan
    found = scene_metrics(predictions, batch)
    assert all(np.isnan(value) == name.startswith(("depth", "points_")) for name, value in found.items()), found
    predictions["pose_enc"] = predictions["pose_enc"] * torch.nan
    found = scene_metrics(predictions, batch)
    assert all(np.isnan(value) != name.startswith("point_map") for name, value in found.items()), found


def test_the_size_of_a_scene_is_measured_before_any_alignment_in_the_units_of_the_set():
    depth = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0)) + 1
    mask = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    batch = {"depth": depth, "mask": mask, "scale": torch.tensor([4.0]), "has_scale": torch.tensor([True])}
    noise = torch.where(mask, 1, torch.tensor(100.0))  # where nothing is known, anything may be predicted
    found = size_ratio({"depth": (depth * 6 * noise)[..., None]}, batch)
    assert found["size_ratio"] == pytest.approx(1.5)  # a normalized unit is 4 meters, which it takes for 6
    assert size_ratio({"depth": depth[..., None]}, batch | {"has_scale": torch.tensor([False])}) == {}
    assert size_ratio({}, batch) == {}


def test_the_spread_of_sizes_is_what_a_single_factor_would_leave():
    for factor in (1.0, 0.5):
        found = summarize_sizes([{"size_ratio": factor * ratio} for ratio in (0.5, 0.5, 1.0, 2.0, 2.0)] + [{}])
        assert found == {"scenes": 5, "median": pytest.approx(factor), "spread": pytest.approx(2.0)}
    assert summarize_sizes([{"size_ratio": 1.0}] * 4) is None
