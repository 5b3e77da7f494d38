"""Track head: where points of the reference view are in every view (after CoTracker, arXiv:2307.07635).

Tokens of four trunk layers give a feature map per view; then coordinates and features of each track are refined
a few times, from the correlations of the track's feature with the maps around its estimated position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt.config import VGGTConfig
from vggt.dense_head import DPT
from vggt.layers import Mlp, first_and_rest
from vggt.memory import map_frames, recompute

ITERATIONS = 4
STRIDE = 2  # image pixels a pixel of the feature maps
VIRTUAL_TRACKS = 64
FLOW_UNIT = 518.0
FLOW_BASE = 1000.0
POSITION_BASE = 10000.0


class TrackHead(nn.Module):
    """Feature maps of all views, and the tracker on them."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor(config)
        self.tracker = Tracker(config)

    def forward(
        self, tokens: list[Tensor], height: int, width: int, query_points: Tensor, iterations: int = ITERATIONS
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Tokens of four pairs, each [B, S, P, 2 * dim], and points [B, N, 2] of view 0, (x, y) in pixels.

        Returns the tracks [B, S, N, 2] after each iteration, in pixels, then the probability that a point is visible
        and the confidence in its track, both [B, S, N]. Runs in whatever autocast there is outside.
        """
        maps = self.feature_extractor(tokens, height, width)
        return self.tracker(maps, query_points, iterations)


class FeatureExtractor(DPT):
    """The dense head's fusion, at 1 / STRIDE of the resolution."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__(config, config.track_features, config.track_features)

    def forward(self, tokens: list[Tensor], height: int, width: int) -> Tensor:
        """Tokens of four pairs, each [B, S, P, 2 * dim] -> feature maps [B, S, C, H / STRIDE, W / STRIDE]."""
        grid, size = self.grid(height, width), (height // STRIDE, width // STRIDE)
        maps = map_frames(lambda part: self.fuse(part, grid, size), [t.flatten(0, 1) for t in tokens], self.chunk)
        return maps.unflatten(0, tokens[0].shape[:2])


class Tracker(nn.Module):
    """Refines where tracks are, and what they look like, a few times."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        features, hidden = config.track_features, config.track_hidden
        self.levels, self.radius = config.track_levels, config.track_radius
        dim = 3 * features + 4  # flow as a code and, twice, as a number; correlations; the track's feature
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, dim))
        self.corr_mlp = Mlp(self.levels * (2 * self.radius + 1) ** 2, hidden, features)
        self.updateformer = UpdateTransformer(dim, features + 2, hidden, config.track_depth, config.track_heads)
        self.fmap_norm = nn.LayerNorm(features)
        self.ffeat_norm = nn.GroupNorm(1, features)
        self.ffeat_updater = nn.Sequential(nn.Linear(features, features), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(features, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(features, 1))

    def forward(self, maps: Tensor, query_points: Tensor, iterations: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Feature maps [B, S, C, h, w] and points [B, N, 2]; returns what TrackHead.forward does."""
        s, _, height, width = maps.shape[1:]
        # Float32 even under autocast: bf16 coordinates on a map of 259 pixels would be wrong by a pixel.
        maps = self.fmap_norm(maps.permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3).float()
        query = query_points.float() / STRIDE
        coords = query[:, None].expand(-1, s, -1, -1)  # [B, S, N, 2]
        tracks = sample(maps[:, 0], query[:, :, None], padding="border")[..., 0].transpose(1, 2)  # [B, N, C]
        tracks = tracks[:, None].expand(-1, s, -1, -1)  # [B, S, N, C]
        place = position_code(query, height, width, self.query_ref_token.shape[-1])[:, None]  # [B, 1, N, dim]
        place = place + first_and_rest(self.query_ref_token, s)[:, :, None]  # [B, S, N, dim]
        pyramid = [maps.flatten(0, 1)]
        for _ in range(self.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        predictions = []
        for _ in range(iterations):
            coords = coords.detach()
            tokens = self.tokens(pyramid, tracks, coords) + place
            delta = recompute(self.updateformer, tokens.transpose(1, 2)).transpose(1, 2)  # [B, S, N, 2 + C]
            coords = torch.cat([query[:, None], (coords + delta[..., :2])[:, 1:]], dim=1)
            normed = self.ffeat_norm(delta[..., 2:].flatten(0, 2)).view_as(tracks)
            tracks = tracks + self.ffeat_updater(normed)
            predictions.append(coords * STRIDE)
        visible = self.vis_predictor(tracks)[..., 0].sigmoid()
        return predictions, visible, self.conf_predictor(tracks)[..., 0].sigmoid()

    def tokens(self, pyramid: list[Tensor], tracks: Tensor, coords: Tensor) -> Tensor:
        """What is known of each track in each view: its way from view 0, what it sees around it, its feature.

        pyramid: see correlations; tracks [B, S, N, C]; coords [B, S, N, 2], in pixels of the maps -> [B, S, N, dim].
        """
        seen = recompute(self.correlations, pyramid, tracks.flatten(0, 1), coords.flatten(0, 1))
        seen = self.corr_mlp(seen).view(*coords.shape[:3], -1)  # [B, S, N, C]
        flow = coords - coords[:, :1]
        code = flow_code(flow, tracks.shape[-1] // 2)
        return torch.cat([code, flow / FLOW_UNIT, flow / FLOW_UNIT, seen, tracks], dim=-1)

    def correlations(self, pyramid: list[Tensor], tracks: Tensor, coords: Tensor) -> Tensor:
        """Dot products of each track with the features in a window around it, at every level of the pyramid.

        pyramid: [V, C, h, w], halved from level to level; tracks [V, N, C]; coords [V, N, 2] at the first level.
        Returns [V, N, levels * (2 * radius + 1)^2], level by level. Features are sampled before the product: the
        other order, as published, would make the product with every pixel of the maps.
        """
        steps = torch.arange(-self.radius, self.radius + 1, device=coords.device, dtype=coords.dtype)
        # As published: the window is walked with its first offset along x, the second along y.
        window = torch.cartesian_prod(steps, steps)  # [K, 2]
        rows = []
        for level, maps in enumerate(pyramid):
            around = sample(maps, coords[:, :, None] / 2**level + window, padding="zeros")  # [V, C, N, K]
            rows.append(torch.einsum("vcnk,vnc->vnk", around, tracks.to(around.dtype)))
        return torch.cat(rows, dim=-1) / tracks.shape[-1] ** 0.5


class UpdateTransformer(nn.Module):
    """Attention of each track over the views, and of the tracks of a view over each other.

    The latter goes through a fixed number of virtual tracks, so that its cost grows with N and not with its square.
    """

    def __init__(self, dim: int, out: int, hidden: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(dim)
        self.input_transform = nn.Linear(dim, hidden)
        self.virual_tracks = nn.Parameter(torch.randn(1, VIRTUAL_TRACKS, 1, hidden))  # sic, in the checkpoint
        self.time_blocks = nn.ModuleList(SelfBlock(hidden, num_heads) for _ in range(depth))
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(hidden, num_heads) for _ in range(depth))
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(hidden, num_heads) for _ in range(depth))
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(hidden, num_heads) for _ in range(depth))
        self.output_norm = nn.LayerNorm(hidden)
        self.flow_head = nn.Linear(hidden, out)
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, S, dim] -> [B, N, S, out]."""
        b, n, s, _ = tokens.shape
        entered = self.input_transform(self.input_norm(tokens))
        x = torch.cat([entered, self.virual_tracks.expand(b, -1, s, -1).to(entered.dtype)], dim=1)
        stages = (
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
        )
        for over_time, from_points, among_virtual, to_points in zip(*stages, strict=True):
            x = over_time(x.flatten(0, 1)).unflatten(0, (b, n + VIRTUAL_TRACKS))
            x = x.transpose(1, 2).flatten(0, 1)  # [B * S, N + virtual, hidden]
            points, virtual = x[:, :n], x[:, n:]
            virtual = among_virtual(from_points(virtual, points))
            points = to_points(points, virtual)
            x = torch.cat([points, virtual], dim=1).unflatten(0, (b, s)).transpose(1, 2)
        return self.flow_head(self.output_norm(x[:, :n] + entered))


class PackedAttention(nn.Module):
    """Attention from x [M, L, dim] to a context [M, K, dim], under the parameter names of nn.MultiheadAttention.

    In inference, that class bypasses scaled_dot_product_attention and its flash kernels.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        dim = x.shape[-1]
        q = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        k, v = F.linear(context, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfBlock(nn.Module):
    """Attention and MLP over [M, L, dim]. The attention's skip carries the normed input, as published."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PackedAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x + self.attn(x, x)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """The same from x [M, L, dim] to a context [M, K, dim]; the result is [M, L, dim]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.cross_attn = PackedAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, context = self.norm1(x), self.norm_context(context)
        x = x + self.cross_attn(x, context)
        return x + self.mlp(self.norm2(x))


def sample(maps: Tensor, at: Tensor, padding: str) -> Tensor:
    """Bilinear values of [V, C, h, w] at pixel coordinates (x, y) [V, N, K, 2] -> [V, C, N, K].

    padding: beyond the border, "zeros" or the "border" itself.
    """
    scale_y, scale_x = (2 / max(size - 1, 1) for size in maps.shape[-2:])
    grid = torch.stack([at[..., 0] * scale_x, at[..., 1] * scale_y], dim=-1) - 1
    return F.grid_sample(maps, grid, align_corners=True, padding_mode=padding)


def flow_code(flow: Tensor, channels: int) -> Tensor:
    """Sines and cosines, in turn, of each of the two parts of a flow: [..., 2] -> [..., 2 * channels]."""
    frequency = torch.arange(0, channels, 2, device=flow.device, dtype=flow.dtype) * (FLOW_BASE / channels)
    angle = flow[..., None] * frequency  # [..., 2, channels / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def position_code(at: Tensor, height: int, width: int, channels: int) -> Tensor:
    """Sine-cosine codes of points (x, y) [B, N, 2] on a map of height x width pixels -> [B, N, channels].

    Published as a map of codes that is sampled bilinearly; each half of it depends on one axis only, so two short
    tables, interpolated linearly, give the same.
    """
    parts = []
    for place, length in ((at[..., 0], width), (at[..., 1], height)):
        quarter = channels // 4
        exponent = torch.arange(quarter, device=at.device, dtype=torch.float64) / quarter
        angle = torch.arange(length, device=at.device, dtype=torch.float64)[:, None] * POSITION_BASE**-exponent
        table = torch.cat([angle.sin(), angle.cos()], dim=-1).to(at.dtype)  # [length, channels / 2]
        place = place.clamp(0, length - 1)
        left = place.floor().clamp(max=length - 2)
        fraction = (place - left)[..., None]
        index = left.long()
        parts.append(table[index] * (1 - fraction) + table[index + 1] * fraction)
    return torch.cat(parts, dim=-1)
