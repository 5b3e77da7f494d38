"""Validation: the same scenes in the same crops every time, so that two runs of it can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from train.config import TrainConfig
from train.distributed import World
from train.loader import Split, ValidationSteps, stream
from train.losses import denominators, losses
from train.metrics import depth_abs_rel, pair_errors, pose_auc
from train.pictures import Cameras, SceneResult
from train.plan import validation_plan
from train.prepare import Batch, prepare
from train.step import autocast
from vggt import VGGT
from vggt.geometry import decode_pose

PICTURED = 3  # scenes on the contact sheet


@dataclass(frozen=True)
class Validation:
    """figures: means over the scenes of all ranks; scenes: some of the main rank's, to be shown."""

    figures: dict[str, float]
    scenes: list[SceneResult]


@torch.no_grad()
def validate(model: VGGT, split: Split, config: TrainConfig, world: World, workers: int) -> Validation:
    """The losses of training, and rotation, translation and depth errors, on the validation plan."""
    model.eval()
    names: list[str] = figure_names(config)
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # of the figures, and how many scenes had each
    pictured: list[SceneResult] = []
    steps, counted = validation_plan(config.data, split.lengths, world.rank, world.size)
    batches = stream(
        lambda last: ValidationSteps(split, steps[last.step if last else 0 :]),
        workers,
        pin_memory=world.device.type == "cuda",
    )
    for number, raw in enumerate(batches):
        batch = prepare(raw, world.device, with_points=config.loss.point > 0)
        with autocast(config, world.device):
            predictions = model(batch["images"])
        if number >= counted:
            continue
        figures = scene_figures(predictions, batch, config)
        for i, name in enumerate(names):
            if name in figures:
                sums[:, i] += torch.tensor([figures[name], 1], dtype=torch.float64)
        if world.is_main and len(pictured) < PICTURED and "depth" in predictions:
            pictured.append(picture_of(raw["keys"][0][0].rpartition("/")[0], predictions, batch))
    model.train()
    totals, counts = world.sum(sums.to(world.device)).cpu()
    return Validation({name: float(totals[i] / counts[i]) for i, name in enumerate(names) if counts[i] > 0}, pictured)


def picture_of(name: str, predictions: dict[str, Any], batch: Batch) -> SceneResult:
    """The first scene of a batch, to be drawn."""
    height, width = batch["images"].shape[-2:]
    predicted = None
    if "pose_enc" in predictions:
        predicted = Cameras(*(x.cpu() for x in decode_pose(predictions["pose_enc"][0].float(), height, width)))
    return SceneResult(
        name=name,
        images=batch["images"][0].cpu(),
        predicted=predictions["depth"][0, ..., 0].float().cpu(),
        confidence=predictions["depth_conf"][0].float().cpu(),
        truth=batch["depth"][0].cpu(),
        mask=batch["mask"][0].cpu(),
        true_cameras=Cameras(batch["extrinsics"][0].cpu(), batch["intrinsics"][0].cpu()),
        predicted_cameras=predicted,
    )


def figure_names(config: TrainConfig) -> list[str]:
    """Every figure that validation can give, in the same order on all ranks."""
    names = ["loss_objective"]
    if config.loss.camera > 0:
        names += ["loss_camera", "loss_T", "loss_R", "loss_FL", "rotation_deg", "translation_deg", "auc_30"]
    for name in ("depth", "point"):
        if getattr(config.loss, name) > 0:
            names += [f"loss_conf_{name}", f"loss_reg_{name}", f"loss_grad_{name}"]
    return [*names, "depth_abs_rel"] if config.loss.depth > 0 else names


def scene_figures(predictions: dict[str, Any], batch: Batch, config: TrainConfig) -> dict[str, float]:
    """All figures of one scene, a batch of one."""
    terms = losses(predictions, batch, denominators(batch, config.loss), config.loss)
    figures = {name: float(value) for name, value in terms.items()}
    has_scale = bool(batch["has_scale"][0])
    if not has_scale:  # nothing is known of lengths: a zero would pass for perfect
        figures = {name: value for name, value in figures.items() if name != "loss_T" and "_depth" not in name}
        figures = {name: value for name, value in figures.items() if "_point" not in name}
    if config.loss.camera > 0 and batch["images"].shape[1] > 1:
        height, width = batch["images"].shape[-2:]
        poses, _ = decode_pose(predictions["pose_enc"][0].double(), height, width)
        rotation, translation = pair_errors(poses, batch["extrinsics"][0].double())
        figures["rotation_deg"] = float(rotation.mean())
        figures["translation_deg"] = float(translation.mean())
        figures["auc_30"] = pose_auc(torch.maximum(rotation, translation), 30)
    if config.loss.depth > 0 and has_scale:
        figures["depth_abs_rel"] = float(depth_abs_rel(predictions["depth"][..., 0], batch["depth"], batch["mask"]))
    return figures
