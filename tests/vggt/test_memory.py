"""What a training step of the full-size model keeps, counted with tensors that have no content."""

from __future__ import annotations

import pytest
import torch

from bench.live_bytes import LiveBytes, no_content
from vggt import VGGT, VGGTConfig
from vggt.lora import add_lora

ATTENTION = ("*aggregator*attn.qkv", "*aggregator*attn.proj")
HEIGHT, WIDTH = 266, 518


def peak_gb(views, monkeypatch):
    """Of a step that trains adapters of rank 16 on all attention of the aggregator, camera and depth head, in fp32."""
    monkeypatch.setattr("vggt.model.check_images", lambda *_: None)  # which reads values
    with torch.device("meta"):
        model = VGGT(VGGTConfig(heads=("camera", "depth")))
    with no_content(model):
        model.aggregator.requires_grad_(False)
        add_lora(model, ATTENTION, rank=16, alpha=16)
        images = torch.rand(1, views, 3, HEIGHT, WIDTH)
        with LiveBytes() as live:
            out = model.train()(images)
            (sum(encoding.mean() for encoding in out["pose_enc_list"]) + out["depth"].mean()).backward()
    return live.peak / 1e9


@pytest.mark.slow
def test_adapters_of_the_aggregator_need_little_memory_a_view(monkeypatch):
    few, many = peak_gb(4, monkeypatch), peak_gb(16, monkeypatch)
    assert (many - few) / 12 <= 0.15
    assert many <= 8.5  # of which weights are 4.6
    monkeypatch.setattr("vggt.aggregator.needs_graph", lambda *_: False)  # everything that is computed is kept
    assert peak_gb(4, monkeypatch) - few > 3
