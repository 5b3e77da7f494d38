"""Dense prediction head (DPT, arXiv:2103.13413): tokens of four depths of the trunk -> one map a view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt.config import VGGTConfig
from vggt.memory import map_frames

POSITION_SCALE = 0.1
POSITION_BASE = 100.0

Code = tuple[Tensor, Tensor]  # of the columns of a map and of its rows, see position_code


class ResidualUnit(nn.Module):
    """conv(relu(conv(relu(x)))) + relu(x) on [N, C, h, w]: the published skip carries relu(x), not x."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.conv2(F.relu(self.conv1(x))) + x


class Fusion(nn.Module):
    """Adds a skip to the deeper map, refines and resizes it. The deepest fusion has no skip."""

    def __init__(self, features: int, has_skip: bool) -> None:
        super().__init__()
        if has_skip:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """x [N, C, h, w], skip the same or None -> [N, C, *size]."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # Published the other way round; a 1x1 convolution and a resize whose weights add up to 1 commute, and this
        # one has a quarter of the pixels. (torch 2.13 also miscompiles the gradients of the other order.)
        return resize(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """The convolutions behind the projections, under the names of the published checkpoint."""

    output_conv2: nn.Sequential  # only in heads that make maps

    def __init__(self, channels: tuple[int, ...], features: int, out_channels: int) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels
        )
        self.refinenet1 = Fusion(features, has_skip=True)
        self.refinenet2 = Fusion(features, has_skip=True)
        self.refinenet3 = Fusion(features, has_skip=True)
        self.refinenet4 = Fusion(features, has_skip=False)
        self.output_conv1 = nn.Conv2d(features, out_channels, 3, padding=1)


class DPT(nn.Module):
    """Fuses the tokens of four depths of the trunk into one feature map a view.

    features: channels of the fusion; out_channels: of the map.
    """

    def __init__(self, config: VGGTConfig, features: int, out_channels: int) -> None:
        super().__init__()
        dim, channels = 2 * config.embed_dim, config.dense_channels
        self.patch_size = config.patch_size
        self.chunk = config.head_chunk
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(channels, features, out_channels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return height // self.patch_size, width // self.patch_size

    def fuse(
        self, tokens: list[Tensor], grid: tuple[int, int], size: tuple[int, int], codes: list[Code] | None = None
    ) -> Tensor:
        """Four [N, P, 2 * dim], the patches last, of images of `grid` patches -> a map [N, out_channels, *size].

        codes: of position, to add to what each of the four is projected to.
        """
        levels = []
        for i, (x, project, resize_layer) in enumerate(zip(tokens, self.projects, self.resize_layers, strict=True)):
            x = self.norm(x[:, -grid[0] * grid[1] :]).transpose(1, 2).unflatten(2, grid)
            x = project(x)  # [N, channels, *grid]
            levels.append(resize_layer(x if codes is None else add_position(x, codes[i])))
        s = self.scratch
        rn = (s.layer1_rn, s.layer2_rn, s.layer3_rn, s.layer4_rn)
        skips = [layer(x) for layer, x in zip(rn, levels, strict=True)]
        x = s.refinenet4(skips[3], None, skips[2].shape[-2:])
        x = s.refinenet3(x, skips[2], skips[1].shape[-2:])
        x = s.refinenet2(x, skips[1], skips[0].shape[-2:])
        x = s.refinenet1(x, skips[0], (2 * skips[0].shape[-2], 2 * skips[0].shape[-1]))
        return resize(s.output_conv1(x), size)


class DenseHead(DPT):
    """A map a view at full resolution. outputs: its channels, the last one its confidence (2: depth, 4: points)."""

    def __init__(self, config: VGGTConfig, outputs: int) -> None:
        features = config.dense_features
        super().__init__(config, features, features // 2)
        self.code_channels = (*config.dense_channels, features // 2)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, outputs, 1)
        )

    def forward(self, tokens: list[Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of four pairs, each [B, S, P, 2 * dim], the patches last -> raw maps and raw confidence.

        Returns [B, S, H, W, outputs - 1] and [B, S, H, W], before their activations. Frames do not see each
        other here, so they pass in chunks: the full-resolution maps are the largest tensors of the model.
        """
        grid, size = self.grid(height, width), (height, width)
        # Once for all chunks: of what a chunk launches they would be most.
        *codes, last = (
            position_code(*(size if i == 4 else grid), channels, width / height, tokens[0].device)
            for i, channels in enumerate(self.code_channels)
        )

        def maps_of(part: list[Tensor]) -> Tensor:  # four [N, P, 2 * dim] -> [N, H, W, outputs]
            x = self.fuse([t.float() for t in part], grid, size, codes)
            return self.scratch.output_conv2(add_position(x, last)).permute(0, 2, 3, 1)

        b, s = tokens[0].shape[:2]
        # In float32 whatever the autocast outside: exp() of the outputs leaves no room for bf16.
        with torch.autocast(tokens[0].device.type, enabled=False):
            maps = map_frames(maps_of, [t.flatten(0, 1) for t in tokens], self.chunk).unflatten(0, (b, s))
        return maps[..., :-1], maps[..., -1]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned: [N, C, h, w] -> [N, C, *size]."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def add_position(x: Tensor, code: Code) -> Tensor:
    """Adds the code of each pixel's place to [N, C, h, w]: of half the channels its column, of half its row."""
    h, w = x.shape[-2:]
    return x + torch.cat([code[0][:, None, :].expand(-1, h, -1), code[1][:, :, None].expand(-1, -1, w)])


def position_code(h: int, w: int, channels: int, aspect: float, device: torch.device) -> Code:
    """Sines and cosines of columns [C/2, w] and rows [C/2, h]; aspect = image width / height.

    Two short tables in place of a map [C, h, w], which is as large as what it is added to.
    """
    norm = (aspect**2 + 1) ** 0.5
    return axis_code(w, aspect / norm, channels // 2, device), axis_code(h, 1 / norm, channels // 2, device)


def axis_code(n: int, span: float, channels: int, device: torch.device) -> Tensor:
    """Sines, then cosines, of n pixel centers spread over (-span, span): [channels, n], in float32."""
    edge = span * (n - 1) / n
    place = torch.linspace(-edge, edge, n, device=device, dtype=torch.float32).double()
    exponent = torch.arange(channels // 2, device=device, dtype=torch.float64) / (channels // 2)
    angle = POSITION_BASE ** -exponent[:, None] * place
    return POSITION_SCALE * torch.cat([angle.sin(), angle.cos()]).float()
