"""The image encoder: DINOv2's ViT with registers (arXiv:2304.07193, arXiv:2309.16588)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt.config import VGGTConfig
from vggt.layers import Block
from vggt.memory import FRAMES, map_frames, needs_graph, recompute


class PatchProjection(nn.Module):
    """Cuts images into patches and projects each: [N, 3, H, W] -> [N, H/p * W/p, dim]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size, self.recompute = config.patch_size, config.recompute
        self.by_block = False
        self.stored_grid = config.image_size // config.patch_size
        self.num_registers = config.vit_registers
        self.patch_embed = PatchProjection(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.stored_grid**2, dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(1, config.vit_registers, dim) * 1e-6)
        # In the published checkpoint, used by its pre-training only.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(dim, config.vit_heads, eps=1e-6, layer_scale=1.0) for _ in range(config.vit_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, 3, H, W] -> normalized patch tokens [N, H/14 * W/14, dim].

        If it trains, it runs again in the backward pass: a few images at a time, with nothing kept but these, or all
        images at once, block by block.
        """
        again = self.recompute and needs_graph(images, self)
        if again and not self.by_block:
            return map_frames(lambda part: self._encode(part[0], False), [images], FRAMES)
        return self._encode(images, again)

    def _encode(self, images: Tensor, by_block: bool) -> Tensor:
        """As forward: [N, 3, H, W] -> [N, H/14 * W/14, dim]. by_block: whether each block runs again by itself."""
        n, _, height, width = images.shape
        patches = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(n, -1, -1), patches], dim=1)
        x = x + self.position_embedding(height // self.patch_size, width // self.patch_size)
        x = torch.cat([x[:, :1], self.register_tokens.expand(n, -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = recompute(block, x) if by_block else block(x)
        return self.norm(x)[:, 1 + self.num_registers :]

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """The stored square of positions, resized in float32 to the grid: [1, 1 + rows * columns, dim]."""
        if rows == columns == self.stored_grid:
            return self.pos_embed
        embed = self.pos_embed.float()
        side = self.stored_grid
        square = embed[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(square, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
