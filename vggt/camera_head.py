"""Camera head: refines a pose encoding in four rounds from the camera token of each view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt.config import VGGTConfig
from vggt.layers import Block, Mlp

ROUNDS = 4
POSE_DIM = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view 2


class CameraHead(nn.Module):
    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.token_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_DIM))
        self.embed_pose = nn.Linear(POSE_DIM, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.trunk = nn.Sequential(
            *(Block(dim, config.camera_heads, eps=1e-5, layer_scale=0.01) for _ in range(config.camera_depth))
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(dim, dim // 2, POSE_DIM)

    def forward(self, camera_tokens: Tensor) -> list[Tensor]:
        """Camera tokens [B, S, 2 * dim] -> a pose encoding [B, S, 9] for each round, the last one the best.

        Each round starts from the detached encoding of the previous one: no gradient flows between rounds.
        """
        tokens = self.token_norm(camera_tokens)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        raw = None  # the running sum, before its activation
        encodings = []
        for _ in range(ROUNDS):
            previous = self.empty_pose_tokens.expand(*tokens.shape[:2], -1) if raw is None else raw.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, dim=-1)
            x = self.trunk(tokens + gate * (normed * (1 + scale) + shift))
            increment = self.pose_branch(self.trunk_norm(x))
            raw = increment if raw is None else raw.detach() + increment
            encodings.append(torch.cat([raw[..., :7], F.relu(raw[..., 7:])], dim=-1))
        return encodings
