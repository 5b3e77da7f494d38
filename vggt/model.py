"""VGGT: images of a scene in, cameras, depth and points out (arXiv:2503.11651)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vggt.aggregator import Aggregator
from vggt.camera_head import CameraHead
from vggt.config import VGGTConfig
from vggt.dense_head import DenseHead
from vggt.weights import load_weights


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

    @classmethod
    def from_pretrained(cls, source: str, config: VGGTConfig | None = None) -> VGGT:
        """A model with the weights of `source`: see vggt.weights.load_weights, also for what it raises."""
        model = cls(config)
        load_weights(model, source)
        return model

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Images [B, S, 3, H, W] or [S, 3, H, W] in [0, 1], H and W multiples of 14; view 0 is the reference.

        Returns, for the heads there are, with poses camera-from-world in the frame of view 0:
            pose_enc [B, S, 9] and pose_enc_list, one a round (see vggt.geometry.encode_pose)
            depth [B, S, H, W, 1] > 0 and depth_conf [B, S, H, W] > 1
            world_points [B, S, H, W, 3] and world_points_conf [B, S, H, W] > 1
        Raises ValueError for images of another shape.
        """
        if images.ndim == 4:
            images = images[None]
        patch = self.config.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or images.shape[3] % patch or images.shape[4] % patch:
            raise ValueError(
                f"images: expected [B, S, 3, H, W] with H and W multiples of {patch}, found {tuple(images.shape)}"
            )
        height, width = images.shape[-2:]
        last, dense = self.config.depth - 1, self.config.dense_layers
        reads_dense = "depth" in self.config.heads or "point" in self.config.heads
        kept = self.aggregator(images, keep={last, *dense} if reads_dense else {last})

        out: dict[str, Tensor | list[Tensor]] = {}
        if "camera" in self.config.heads:
            with torch.autocast(images.device.type, enabled=False):
                encodings = self.camera_head(kept[last][:, :, 0].float())
            out |= {"pose_enc": encodings[-1], "pose_enc_list": encodings}
        if "depth" in self.config.heads:
            raw, conf = self.depth_head([kept[i] for i in dense], height, width)
            out |= {"depth": raw.exp(), "depth_conf": 1 + conf.exp()}
        if "point" in self.config.heads:
            raw, conf = self.point_head([kept[i] for i in dense], height, width)
            out |= {"world_points": raw.sign() * raw.abs().expm1(), "world_points_conf": 1 + conf.exp()}
        return out
