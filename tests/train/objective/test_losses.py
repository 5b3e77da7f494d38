from __future__ import annotations

import pytest
import torch
from golden_figures import GOLDEN, load_json, load_tensors

from train.objective.losses import LossConfig, filtered_mean, gradient_term, losses, normalizer_of
from vggt.geometry import encode_pose

SETTINGS = {
    "default": LossConfig(),
    "with_points": LossConfig(point=1.0),
    "no_quantile": LossConfig(point=1.0, valid_range=0.0),
    "grad_conf": LossConfig(depth_gradient="grad_conf"),
    "camera_l1": LossConfig(),
    "camera_l2": LossConfig(camera_norm="l2"),
}
PREDICTED = {"depth": "depth", "depth_conf": "depth_conf", "world_points": "pred_world_points"}


@pytest.fixture
def figures():
    return load_tensors(GOLDEN / "losses_inputs.npz")


def make_batch(figures):
    mask = figures["point_masks"]
    return {
        "images": torch.zeros(*mask.shape[:2], 3, *mask.shape[2:]),
        "extrinsics": figures["extrinsics"],
        "intrinsics": figures["intrinsics"],
        "depth": figures["depths"],
        "points": figures["world_points"],
        "mask": mask,
        "has_scale": mask.sum((1, 2, 3)) > 100,
    }


def make_predictions(figures):
    leaves = {name: figures[name].clone().requires_grad_() for name in (*PREDICTED.values(), "world_points_conf")}
    leaves["pose_enc_list"] = figures["pose_enc_list"].clone().requires_grad_()
    predictions = {name: leaves[source] for name, source in PREDICTED.items()}
    predictions |= {"world_points_conf": leaves["world_points_conf"], "pose_enc_list": list(leaves["pose_enc_list"])}
    return leaves, predictions


def part_of(values, scenes):
    return {
        name: [v[scenes] for v in value] if isinstance(value, list) else value[scenes] for name, value in values.items()
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_terms_and_gradients_equal_published(figures, setting):
    batch, config = make_batch(figures), SETTINGS[setting]
    leaves, predictions = make_predictions(figures)
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    terms["loss_objective"].backward()
    for name, expected in load_json("losses.json")[setting].items():
        if name.startswith("|"):
            variable = name.removeprefix("|d objective/d ").removesuffix("|")
            is_pose = variable.startswith("pose_enc_list")
            gradient = leaves["pose_enc_list"].grad[3] if is_pose else leaves[PREDICTED[variable]].grad
            found = gradient.norm().item()
        else:
            found = terms["loss_objective" if name == "objective" else name].item()
        assert found == pytest.approx(expected, rel=1e-5), name


def test_chunks_add_up_to_the_whole(figures):
    batch, config = make_batch(figures), SETTINGS["no_quantile"]
    whole = normalizer_of(batch, config)
    gradients, totals = [], []
    for chunks in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        leaves, predictions = make_predictions(figures)
        total = 0
        for scenes in chunks:
            terms = losses(part_of(predictions, scenes), part_of(batch, scenes), whole, config)
            terms["loss_objective"].backward()
            total += terms["loss_objective"].item()
        totals.append(total)
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_a_scene_without_depth_supervises_rotation_and_field_of_view_only(figures):
    batch, config = make_batch(figures), LossConfig()
    batch["mask"] = batch["mask"].clone()
    batch["mask"][0] = False
    batch["has_scale"] = torch.tensor([False, True])
    leaves, predictions = make_predictions(figures)
    losses(predictions, batch, normalizer_of(batch, config), config)["loss_objective"].backward()
    gradient = leaves["pose_enc_list"].grad
    assert (gradient[:, 0, :, :3] == 0).all()
    assert (gradient[:, 0, :, 3:] != 0).any()
    assert (gradient[:, 1, :, :3] != 0).any()
    assert (leaves["depth"].grad[0] == 0).all()


def test_a_batch_without_any_depth_gives_finite_losses(figures):
    batch, config = make_batch(figures), LossConfig(point=1.0)
    batch["mask"] = torch.zeros_like(batch["mask"])
    batch["has_scale"] = torch.tensor([False, False])
    leaves, predictions = make_predictions(figures)
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    terms["loss_objective"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert terms["loss_reg_depth"] == 0
    assert terms["loss_T"] == 0
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_a_scene_with_few_points_weighs_as_its_points_do(figures):
    """As where all pixels of a batch are averaged (DUSt3R, VGGT): 500 points do not outweigh a full depth map."""
    batch, config = make_batch(figures), SETTINGS["no_quantile"]
    batch["mask"] = torch.ones_like(batch["mask"])
    few = torch.zeros_like(batch["mask"][0]).flatten()
    few[torch.randperm(len(few), generator=torch.Generator().manual_seed(0))[:500]] = True
    batch["mask"][0] = few.view_as(batch["mask"][0])
    leaves, predictions = make_predictions(figures)
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    torch.autograd.backward(terms["loss_reg_depth"] + terms["loss_reg_point"])
    for name in ("depth", "pred_world_points"):
        pulls = leaves[name].grad.norm(dim=-1).flatten(1)
        assert (pulls > 0).sum(1).tolist() == batch["mask"].flatten(1).sum(1).tolist()
        assert pulls.max() == pytest.approx(pulls[pulls > 0].min().item(), rel=1e-4)  # each known pixel as much


def test_terms_of_neighbors_count_pairs_that_exist_only(figures):
    """Points of which no two are neighbors have no such term, however wrong they are."""
    batch, config = make_batch(figures), LossConfig(point=1.0)
    apart = torch.zeros_like(batch["mask"])
    apart[..., ::3, ::3] = True  # at no scale of the terms are two of them neighbors but at the third
    batch["mask"] = batch["mask"] & apart
    _leaves, predictions = make_predictions(figures)
    counted = gradient_term(predictions["depth"] - batch["depth"][..., None], batch["mask"], [torch.tensor(1.0)], None)
    assert counted == 0
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    assert all(value.isfinite() for value in terms.values())


def test_true_cameras_have_no_camera_loss(figures):
    batch, config = make_batch(figures), LossConfig(depth=0.0)
    truth = encode_pose(batch["extrinsics"], batch["intrinsics"], *batch["images"].shape[-2:])
    terms = losses({"pose_enc_list": [truth] * 4}, batch, normalizer_of(batch, config), config)
    assert terms["loss_objective"].item() == 0


@pytest.mark.parametrize("count", [1001, 1500, 5000, 20000])
def test_the_quantile_is_the_one_by_sorting(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.rand(1, 2, 100, 101, generator=generator)
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[torch.randperm(values.numel(), generator=generator)[:count]] = True
    mask = mask.view_as(values)
    chosen = values[mask].sort().values
    below = chosen[chosen < chosen[round(0.98 * (count - 1))]]
    expected = (below if len(below) > 1000 else chosen).mean()
    assert filtered_mean(values, mask, 0.98).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_never_wait_for_the_device(figures, setting):
    """On the meta device there are no values: whatever asks for one fails."""
    batch = {name: value.to("meta") for name, value in make_batch(figures).items()}
    _, predictions = make_predictions(figures)
    predictions = {
        name: [v.detach().to("meta").requires_grad_() for v in value]
        if isinstance(value, list)
        else value.detach().to("meta").requires_grad_()
        for name, value in predictions.items()
    }
    config = SETTINGS[setting]
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    terms["loss_objective"].backward()
    assert all(value.is_meta for value in terms.values())
    with pytest.raises(RuntimeError, match="meta"):
        float(terms["loss_objective"])
