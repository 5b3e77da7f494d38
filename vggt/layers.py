"""Building blocks shared by the ViT, the aggregator and the heads.

Parameter names follow the published checkpoint (`norm1`, `attn.qkv`, `ls1.gamma`, `mlp.fc1`, ...).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_COMPILED = 64  # versions of a block


class Mlp(nn.Module):
    """Linear, exact GELU, linear: [..., dim] -> [..., out]."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor a channel: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention over [B, N, dim], with optional normed queries and keys and rotary positions."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, N, dim]; rope: cosines and sines, each [N, head_dim] -> [B, N, dim]."""
        b, n, dim = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, dim))

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """What forward compares, of the first heads: x [B, N, dim] -> queries and keys [B, heads, N, head_dim]."""
        b, n, dim = x.shape
        width = dim // self.num_heads * heads
        q, k = (
            F.linear(x, self.qkv.weight[start : start + width], self.qkv.bias[start : start + width])
            for start in (0, dim)
        )
        q, k = (part.view(b, n, heads, -1).transpose(1, 2) for part in (q, k))
        return rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, num_heads: int, *, eps: float, layer_scale: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


def compile_blocks(model: nn.Module) -> None:
    """Compile a model's transformer blocks in place: they do most of its work and are all alike.

    Each kind of block is compiled for a batch of one and for larger ones, with and without gradients and autocast:
    more often than torch's limit, beyond which it goes on without a word, uncompiled.
    """
    torch._dynamo.config.recompile_limit = MAX_COMPILED
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def rope_table(
    rows: int, columns: int, special: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2D rotary positions (RoFormer, arXiv:2104.09864, once an axis).

    The first half of a head's features turns with the row, the second with the column. Special tokens
    come first and sit at (0, 0), patches start at (1, 1). Returns two [special + rows * columns, head_dim].
    """
    half = head_dim // 2
    y = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)  # [rows * columns]
    x = torch.arange(1, columns + 1, device=device).repeat(rows)
    position = F.pad(torch.stack([y, x]), (special, 0)).float()  # [2, N]
    frequency = base ** (-torch.arange(0, half, 2, device=device).float() / half)  # [half / 2]
    angle = position[..., None] * frequency  # [2, N, half / 2]
    angle = torch.cat([angle[0], angle[0], angle[1], angle[1]], dim=-1)  # [N, head_dim]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each half of the features by its own axis: x [B, heads, N, head_dim], cos and sin [N, head_dim]."""
    a, b, c, d = x.chunk(4, dim=-1)
    return x * cos + torch.cat([-b, a, -d, c], dim=-1) * sin


def first_and_rest(pair: Tensor, views: int) -> Tensor:
    """Learned tokens [1, 2, ...], for the reference view and for all the others -> one a view, [1, views, ...]."""
    return torch.cat([pair[:, :1], pair[:, 1:].expand(-1, views - 1, *pair.shape[2:])], dim=1)
