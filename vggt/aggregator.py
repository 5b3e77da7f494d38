"""The trunk of VGGT (arXiv:2503.11651): attention in turn within each view and across all views of a scene."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt.config import VGGTConfig
from vggt.layers import Block, first_and_rest, rope_table
from vggt.memory import needs_graph, recompute
from vggt.vit import VisionTransformer

Rope = tuple[Tensor, Tensor]  # cosines and sines, see rope_table

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MATCHING_PAIR, MATCHING_HEADS = 1, 2  # the scene-wise block that training can teach to match, and how many of its heads


class Aggregator(nn.Module):
    """Images of a scene to tokens, with blocks that look at one view and blocks that look at all, in turn."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.by_block = False
        self.patch_embed = VisionTransformer(config)
        # One pair of each: index 0 for the reference view, index 1 for all the others.
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim) * 1e-6)
        self.register_token = nn.Parameter(torch.randn(1, 2, config.registers, dim) * 1e-6)
        self.frame_blocks = self._blocks()
        self.global_blocks = self._blocks()

    def _blocks(self) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            Block(c.embed_dim, c.num_heads, eps=1e-5, layer_scale=0.01, qk_norm=True) for _ in range(c.depth)
        )

    def keep_every_block(self) -> None:
        """From now on each block that runs again keeps its input: fewer passes, more memory."""
        self.by_block = self.patch_embed.by_block = True

    @property
    def num_special(self) -> int:
        """Tokens ahead of the patches of each view: the camera token and the registers."""
        return 1 + self.config.registers

    def matching_logits(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Attention before its softmax of the first MATCHING_HEADS of block MATCHING_PAIR, between patches only.

        tokens [B, S, P, 2 * dim]: what forward keeps of that pair, P = special tokens + rows * columns = special + N.
        Returns [B, heads, S * N, S * N].
        """
        b, s, p, _ = tokens.shape
        block, dim = self.global_blocks[MATCHING_PAIR], self.config.embed_dim
        assert isinstance(block, Block)
        x = block.norm1(tokens[..., :dim].reshape(b, s * p, dim))
        head_dim = dim // self.config.num_heads
        cos, sin = rope_table(rows, columns, self.num_special, head_dim, self.config.rope_base, x.device)
        q, k = block.attn.queries_and_keys(x, (cos.repeat(s, 1), sin.repeat(s, 1)), MATCHING_HEADS)
        q, k = (part.unflatten(2, (s, p))[:, :, :, self.num_special :].flatten(2, 3) for part in (q, k))
        return q @ k.transpose(-1, -2) / head_dim**0.5

    def forward(self, images: Tensor, keep: set[int]) -> dict[int, Tensor]:
        """Images [B, S, 3, H, W] in [0, 1] -> {pair: tokens [B, S, P, 2 * dim]} for the pairs in `keep`.

        P = special tokens + H/14 * W/14; the tokens are the frame-wise and the scene-wise output, concatenated.
        """
        b, s, _, height, width = images.shape
        patches = self.patch_embed(
            normalize(images.to(self.camera_token.dtype)).flatten(0, 1)
        )  # [B * S, H/14 * W/14, dim]
        special = torch.cat([self.camera_token, self.register_token], dim=2)  # [1, 2, special, dim]
        special = first_and_rest(special, s).expand(b, -1, -1, -1).flatten(0, 1).to(patches.dtype)
        x = torch.cat([special, patches], dim=1)  # [B * S, P, dim]
        p, dim = x.shape[1:]
        head_dim = dim // self.config.num_heads
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        cos, sin = rope_table(rows, columns, self.num_special, head_dim, self.config.rope_base, x.device)
        rope, scene_rope = (cos, sin), (cos.repeat(s, 1), sin.repeat(s, 1))

        x, kept = x.view(b, s, p, dim), {}
        for i in range(self.config.depth):
            frame, x = self._pair(i, x, rope, scene_rope)
            if i in keep:
                kept[i] = torch.cat([frame, x], dim=-1)
        return kept

    def _pair(self, number: int, x: Tensor, rope: Rope, scene_rope: Rope) -> tuple[Tensor, Tensor]:
        """What a frame-wise block makes of x [B, S, P, dim], and what the scene-wise block after it makes of that.

        If a gradient flows here, only x is kept. In the backward pass both run again; the frame-wise one even twice, so
        that it need not be kept while the scene-wise one is: a tenth more operations, a quarter less memory a view.
        """
        frame_block, global_block = self.frame_blocks[number], self.global_blocks[number]
        again = self.config.recompute and needs_graph(x, frame_block, global_block)
        if again and self.by_block:
            frame = recompute(frame_block, x.flatten(0, 1), rope).view_as(x)
            return frame, recompute(global_block, frame.flatten(1, 2), scene_rope).view_as(x)

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            frames = x.flatten(0, 1)
            frame = (recompute(frame_block, frames, rope) if again else frame_block(frames, rope)).view_as(x)
            return frame, global_block(frame.flatten(1, 2), scene_rope).view_as(x)

        return recompute(both, x) if again else both(x)


def normalize(images: Tensor) -> Tensor:
    """Images [B, S, 3, H, W] in [0, 1] less ImageNet's mean, over its deviation. Numbers, not tensors: none to move."""
    channels = zip(images.unbind(2), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=2)
