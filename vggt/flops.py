"""How many floating-point operations a step asks for, by formula: the same on any device, and before anything runs.

Multiplications and additions of matrix products, convolutions and attention; the rest is a few percent. A backward
pass multiplies by each weight once more for the gradient of what comes in, if one flows there, and once for that of the
weight, if it trains. What recomputation repeats is not counted, as is usual (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vggt.camera_head import ROUNDS, CameraHead
from vggt.dense_head import DenseHead, Fusion, ResidualUnit
from vggt.layers import Block
from vggt.lora import LoraLinear
from vggt.model import VGGT


@dataclass
class Flops:
    """Operations of a part of the model. flows: whether a gradient will flow to what it has counted so far."""

    forward: int = 0
    backward: int = 0
    flows: bool = False

    def add_weight(self, layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, places: int) -> None:
        """A layer whose weight is multiplied at so many places: tokens, or pixels of the smaller map."""
        self._add_matrix(places * layer.weight.numel(), layer.weight.requires_grad)
        if isinstance(layer, LoraLinear):
            self._add_matrix(places * layer.lora_down.numel(), True)
            self._add_matrix(places * layer.lora_up.numel(), True)
        self.pass_through(layer)

    def _add_matrix(self, products: int, trains: bool) -> None:
        self.forward += 2 * products
        self.backward += 2 * products * (self.flows + trains)

    def pass_through(self, module: nn.Module, *, recurse: bool = False) -> None:
        """A module that costs next to nothing, but may begin what gradients flow through."""
        self.flows |= any(parameter.requires_grad for parameter in module.parameters(recurse))

    def add_block(self, block: Block, sequences: int, tokens: int) -> None:
        attention, places = block.attn, sequences * tokens
        self.pass_through(block.norm1)
        self.add_weight(attention.qkv, places)
        for norm in (attention.q_norm, attention.k_norm):
            self.pass_through(norm)
        products = 2 * sequences * tokens**2 * attention.proj.in_features  # queries by keys, weights by values
        self.forward += 2 * products
        self.backward += 4 * products * self.flows
        self.add_weight(attention.proj, places)
        for module in (block.ls1, block.norm2):
            self.pass_through(module)
        self.add_weight(block.mlp.fc1, places)
        self.add_weight(block.mlp.fc2, places)
        self.pass_through(block.ls2)


def step_flops(model: VGGT, scenes: int, views: int, height: int, width: int) -> dict[str, Flops]:
    """Of a step on images [scenes, views, 3, height, width], by part: encoder, frame, global, camera, depth, point.

    Forward and backward of what trains as the model is now. Without the track head, and attention taught to match.
    """
    config, images = model.config, scenes * views
    rows, columns = height // config.patch_size, width // config.patch_size
    aggregator, encoder = model.aggregator, model.aggregator.patch_embed
    found = {"encoder": Flops(), "frame": Flops(), "global": Flops()}
    part = found["encoder"]
    part.add_weight(encoder.patch_embed.proj, images * rows * columns)
    part.pass_through(encoder)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        part.add_block(block, images, 1 + config.vit_registers + rows * columns)
    part.pass_through(encoder.norm)
    flows, tokens = part.flows, aggregator.num_special + rows * columns
    flows |= any(parameter.requires_grad for parameter in aggregator.parameters(recurse=False))
    for frame_block, global_block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
        for name, block, size in (
            ("frame", frame_block, (images, tokens)),
            ("global", global_block, (scenes, views * tokens)),
        ):
            assert isinstance(block, Block)
            found[name].flows = flows
            found[name].add_block(block, *size)
            flows = found[name].flows
    if "camera" in config.heads:
        found["camera"] = _camera(model.camera_head, scenes, views, flows)
    for name in ("depth", "point"):
        if name in config.heads:
            found[name] = _dense(model.get_submodule(f"{name}_head"), images, rows, columns, height * width, flows)
    return found


def _camera(head: CameraHead, scenes: int, views: int, flows: bool) -> Flops:
    part, places = Flops(), scenes * views
    for number in range(ROUNDS):
        part.flows = number == 0 and head.empty_pose_tokens.requires_grad  # later ones start from what is detached
        part.add_weight(head.embed_pose, places)
        linear = head.poseLN_modulation[1]
        assert isinstance(linear, nn.Linear)
        part.add_weight(linear, places)
        part.flows |= flows
        part.pass_through(head.token_norm)
        for block in head.trunk:
            assert isinstance(block, Block)
            part.add_block(block, scenes, views)
        part.pass_through(head.trunk_norm)
        part.add_weight(head.pose_branch.fc1, places)
        part.add_weight(head.pose_branch.fc2, places)
    return part


def _dense(head: nn.Module, images: int, rows: int, columns: int, pixels: int, flows: bool) -> Flops:
    """Of maps of the grid's size, times 4, 2 and 1, and over 2, fused from the smallest to the largest."""
    assert isinstance(head, DenseHead)
    part, scratch, patches = Flops(flows=flows), head.scratch, rows * columns
    half = -(-rows // 2) * -(-columns // 2)
    sizes = (16 * patches, 4 * patches, patches, half)
    part.pass_through(head.norm)
    reduce_layers = (scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn)
    for i, (project, resize_layer) in enumerate(zip(head.projects, head.resize_layers, strict=True)):
        assert isinstance(project, nn.Conv2d)
        part.add_weight(project, images * patches)
        if isinstance(resize_layer, nn.Conv2d | nn.ConvTranspose2d):
            part.add_weight(resize_layer, images * min(patches, sizes[i]))
        part.add_weight(reduce_layers[i], images * sizes[i])
    fusions = (scratch.refinenet1, scratch.refinenet2, scratch.refinenet3, scratch.refinenet4)
    for fusion, size in zip(fusions, sizes, strict=True):
        _fuse(part, fusion, images * size)
    part.add_weight(scratch.output_conv1, images * 64 * patches)
    for layer in scratch.output_conv2:
        if isinstance(layer, nn.Conv2d):
            part.add_weight(layer, images * pixels)
    return part


def _fuse(part: Flops, fusion: Fusion, places: int) -> None:
    for unit in fusion.children():
        if isinstance(unit, ResidualUnit):
            part.add_weight(unit.conv1, places)
            part.add_weight(unit.conv2, places)
    part.add_weight(fusion.out_conv, places)
