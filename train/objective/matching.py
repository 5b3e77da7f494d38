"""Attention that is taught to match: what a VGGT needs to learn cameras from scratch.

The published model starts from features that match already (DINOv2); from noise, neither camera nor depth losses lead
there. So two heads of an early scene-wise block are shown, for each patch, the patches of the other views in which the
same point is seen; and new weights start close to comparing places by what is there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train.objective.targets import Batch
from vggt import VGGT
from vggt.aggregator import MATCHING_HEADS, MATCHING_PAIR
from vggt.geometry import invert_se3, transform_points, unproject
from vggt.layers import Attention, LayerScale

OCCLUDED = 0.05  # a point farther than what is seen there by that fraction of its depth is hidden
LAYER_SCALE = 0.1


@torch.no_grad()
def start_matching(model: VGGT) -> None:
    """Make new weights compare: keys as queries are made, positions as waves, blocks that count from the first step."""
    aggregator, vit = model.aggregator, model.aggregator.patch_embed
    dim = model.config.embed_dim
    for module in aggregator.global_blocks.modules():
        if isinstance(module, Attention):
            module.qkv.weight[dim : 2 * dim] = module.qkv.weight[:dim]
    for blocks in (aggregator.frame_blocks, aggregator.global_blocks):
        for module in blocks.modules():
            if isinstance(module, LayerScale):
                module.gamma.fill_(LAYER_SCALE)
    vit.pos_embed[:, 1:] = waves(vit.stored_grid, dim)


def matching_block(model: VGGT) -> nn.Module:
    """The block whose attention the loss is on."""
    return model.aggregator.global_blocks[MATCHING_PAIR]


def waves(side: int, dim: int) -> Tensor:
    """Codes of the places of a square of patches, sines and cosines of row and column: [1, side * side, dim]."""
    place = (torch.arange(side) + 0.5) / side * math.pi
    angle = place[:, None] * torch.arange(1, dim // 4 + 1) / 2
    code = (
        torch.cat([angle.sin(), angle.cos()], dim=-1) / torch.arange(1, dim // 4 + 1).repeat(2).sqrt()
    )  # [side, dim / 2]
    rows, columns = code[:, None].expand(-1, side, -1), code[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[None]


def match_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the attention from each patch of a view to another view's patches with its true place there.

    logits [B, heads, S * N, S * N] of N patches a view. Summed over the pixels of patches whose center is seen in that
    other view: about as many as there are valid pixels, times the other views.
    """
    b, s, height, width = batch["mask"].shape
    n = logits.shape[-1] // s
    patch_size = math.isqrt(height * width // n)
    truth, seen = true_matches(batch, patch_size)  # [B, S, N, S, N], [B, S, N, S]
    log_attention = logits.view(b, MATCHING_HEADS, s, n, s, n).float().log_softmax(-1)
    entropy = -(truth[:, None] * log_attention).sum(-1).mean(1)  # [B, S, N, S]
    return (entropy * seen).sum() * patch_size**2


@torch.no_grad()
def true_matches(batch: Batch, patch_size: int) -> tuple[Tensor, Tensor]:
    """Where the point at each patch's center is in each other view, as weights of the patches there.

    Returns weights [B, S, N, S, N], bilinear between the four nearest patch centers, and whether each match is seen,
    [B, S, N, S].
    """
    depth, intrinsics, extrinsics = batch["depth"], batch["intrinsics"], batch["extrinsics"]
    b, s, height, width = depth.shape
    centers = (..., slice(patch_size // 2, None, patch_size), slice(patch_size // 2, None, patch_size))
    rays = unproject(depth, intrinsics)[:, :, centers[1], centers[2]]  # [B, S, h, w, 3]
    rows, columns = rays.shape[2:4]
    world = transform_points(invert_se3(extrinsics), rays).view(b, 1, s, rows * columns, 3)
    seen = transform_points(extrinsics, world.expand(-1, s, -1, -1, -1))  # [B, S into, S from, N, 3]
    z = seen[..., 2]
    safe = z.clamp(min=1e-6)
    k = intrinsics[:, :, None, None]
    x = seen[..., 0] / safe * k[..., 0, 0] + k[..., 0, 2]
    y = seen[..., 1] / safe * k[..., 1, 1] + k[..., 1, 2]
    inside = (z > 1e-6) & (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    column, row = x.round().clamp(0, width - 1).long(), y.round().clamp(0, height - 1).long()
    there = depth.view(b, s, 1, -1).expand(-1, -1, s, -1).gather(3, row * width + column)
    known = batch["mask"][:, :, centers[1], centers[2]].reshape(b, 1, s, -1)
    visible = inside & known & (there > 0) & ((z - there).abs() < OCCLUDED * z)
    visible = visible & ~torch.eye(s, dtype=torch.bool, device=depth.device)[None, :, :, None]
    weights = tent(y, rows, patch_size)[..., :, None] * tent(x, columns, patch_size)[..., None, :]
    weights = weights.flatten(-2) / weights.flatten(-2).sum(-1, keepdim=True).clamp(min=1e-6)
    return weights.permute(0, 2, 3, 1, 4), visible.permute(0, 2, 3, 1).float()


def tent(place: Tensor, cells: int, patch_size: int) -> Tensor:
    """Weights of the cells of an axis for places in pixels, linear between neighbors: [...] -> [..., cells]."""
    cell = ((place + 0.5) / patch_size - 0.5).clamp(0, cells - 1)
    return (1 - (cell[..., None] - torch.arange(cells, device=place.device)).abs()).clamp(min=0)
