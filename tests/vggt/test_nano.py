"""vggt-nano, which comes with the package."""

from __future__ import annotations

import pytest
import torch

from train.config import load_config
from train.main import make_model
from train.runtime.distributed import World
from vggt import VGGT, preset, weights


def test_nano_comes_with_the_package_and_is_small():
    assert sum(path.stat().st_size for path in weights.NANO.iterdir()) < 20e6
    model = VGGT.from_pretrained("nano")
    assert sum(p.numel() for p in model.parameters()) <= 10e6
    assert model.config.heads == ("camera", "depth", "point")
    assert VGGT.from_pretrained("nano", heads=("camera",)).config.heads == ("camera",)
    with torch.no_grad():
        out = model(torch.rand(3, 3, 42, 56))
    assert out["world_points"].shape == (1, 3, 42, 56, 3)


def test_nano_without_its_files_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "NANO", tmp_path / "nano")
    with pytest.raises(ValueError, match=r"nano: expected its weights in .*or make them with make nano"):
        VGGT.from_pretrained("nano")


def test_nano_has_no_head_for_tracks_and_says_so():
    with pytest.raises(ValueError, match="It has no track_head at all"):
        VGGT.from_pretrained("nano", heads=("track",))
    with pytest.raises(ValueError, match="nano does not fit this model"):
        VGGT.from_pretrained("nano", config=preset("demo"))


def test_a_run_of_another_size_that_starts_from_nano_is_told_its_preset():
    config = load_config(None, ["init=nano"])
    with pytest.raises(ValueError, match=r"model\.preset: 1b, but nano has the sizes of nano; set model\.preset=nano"):
        make_model(config, None, World(0, 1, 1, torch.device("cpu")))
