"""VGGT: images of a scene in, cameras, depth, points and tracks out (arXiv:2503.11651)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vggt.aggregator import MATCHING_PAIR, Aggregator
from vggt.camera_head import CameraHead
from vggt.checks import check_images, check_query_points
from vggt.config import VGGTConfig
from vggt.dense_head import DenseHead
from vggt.track_head import TrackHead
from vggt.weights import fill, read_checkpoint, write_folder


class VGGT(nn.Module):
    """The model, with the heads named in config.heads. State dict names are those of the published checkpoint."""

    def __init__(self, config: VGGTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VGGTConfig()
        self.aggregator = Aggregator(config)
        if "camera" in config.heads:
            self.camera_head = CameraHead(config)
        if "point" in config.heads:
            self.point_head = DenseHead(config, outputs=4)
        if "depth" in config.heads:
            self.depth_head = DenseHead(config, outputs=2)
        if "track" in config.heads:
            self.track_head = TrackHead(config)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, config: VGGTConfig | None = None, *, heads: tuple[str, ...] | None = None
    ) -> VGGT:
        """A model with the weights of `source`, on the CPU, in eval mode.

        source: a .pt or .safetensors file, a folder with one (as save_pretrained makes it), a checkpoint of the
        trainer, nano (vggt-nano, which comes with the package), or a Hugging Face name such as facebook/VGGT-1B.
        config: what to build; without it, what `source` says of itself, or the published model. heads: to build
        instead of config.heads, such as ("camera", "depth"); those left out may be in `source` or not.
        Raises ValueError listing what is missing, unexpected or of another shape.
        """
        state, found = read_checkpoint(source)
        try:
            config = config or VGGTConfig.from_dict(found)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        config = replace(config, heads=heads) if heads is not None else config
        with torch.device("meta"):  # no time and memory for weights that are replaced at once
            model = cls(config)
        fill(model, state, source)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write folder/model.safetensors and folder/config.json, which from_pretrained reads."""
        write_folder(Path(folder), self.state_dict(), asdict(self.config))

    def forward(
        self, images: Tensor, query_points: Tensor | None = None, *, matching: bool = False
    ) -> dict[str, Tensor | list[Tensor]]:
        """Images [B, S, 3, H, W] or [S, 3, H, W] in [0, 1]; view 0 is the reference. H and W are multiples of
        the patch size, 14 (nano: 7).

        query_points: [B, N, 2] or [N, 2], points of view 0 to track, (x, y) in pixels, (0, 0) the first one's center.

        Returns, for the heads there are, with poses camera-from-world in the frame of view 0:
            pose_enc [B, S, 9] and pose_enc_list, one a round (see vggt.geometry.encode_pose)
            depth [B, S, H, W, 1] > 0 and depth_conf [B, S, H, W] > 1
            world_points [B, S, H, W, 3] and world_points_conf [B, S, H, W] > 1
            with query points track [B, S, N, 2] in pixels, vis and conf [B, S, N] in (0, 1)
            if matching, matching_logits [B, heads, S * N, S * N] of attention between the N patches of each view
        Tracking needs H and W of at least 128 pixels in the published model. Raises ValueError or TypeError for
        arguments of other shapes, types or values; values are checked on the CPU only: on other devices and
        under torch.compile an assertion fails later, so the host need not wait.
        """
        images = images[None] if isinstance(images, Tensor) and images.ndim == 4 else images
        check_images(images, self.config)
        if query_points is not None:
            is_one = isinstance(query_points, Tensor) and query_points.ndim == 2
            query_points = query_points[None] if is_one else query_points
            check_query_points(query_points, images, self.config)
        height, width = images.shape[-2:]
        heads, last, dense = self.config.heads, self.config.depth - 1, self.config.dense_layers
        reads_dense = "depth" in heads or "point" in heads or query_points is not None
        keep = {last, *(dense if reads_dense else ()), *([MATCHING_PAIR] if matching else ())}
        kept = self.aggregator(images, keep=keep)

        out: dict[str, Tensor | list[Tensor]] = {}
        if "camera" in heads:
            with torch.autocast(images.device.type, enabled=False):
                encodings = self.camera_head(kept[last][:, :, 0].float())
            out |= {"pose_enc": encodings[-1], "pose_enc_list": encodings}
        if "depth" in heads:
            raw, conf = self.depth_head([kept[i] for i in dense], height, width)
            out |= {"depth": raw.exp(), "depth_conf": 1 + conf.exp()}
        if "point" in heads:
            raw, conf = self.point_head([kept[i] for i in dense], height, width)
            out |= {"world_points": raw.sign() * raw.abs().expm1(), "world_points_conf": 1 + conf.exp()}
        if matching:
            rows, columns = height // self.config.patch_size, width // self.config.patch_size
            out["matching_logits"] = self.aggregator.matching_logits(kept[MATCHING_PAIR], rows, columns)
        if query_points is not None:
            tracks, visible, conf = self.track_head([kept[i] for i in dense], height, width, query_points)
            out |= {"track": tracks[-1], "vis": visible, "conf": conf}
        return out
