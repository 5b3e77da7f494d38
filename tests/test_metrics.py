from __future__ import annotations

import pytest
import torch
from golden_figures import GOLDEN, load_json, load_tensors

from train.metrics import depth_abs_rel, pair_errors, pose_auc


@pytest.mark.parametrize("case", [0, 1, 2])
def test_pose_errors_and_auc_equal_published(case):
    g, expected = load_tensors(GOLDEN / "pose_auc.npz"), load_json("pose_auc.json")[case]
    rotation, translation = pair_errors(g[f"pred_w2c_{case}"][:, :3].double(), g[f"gt_w2c_{case}"][:, :3].double())
    assert (rotation - g[f"r_deg_{case}"]).abs().max() < 2e-2  # the published acos is that coarse near zero
    assert (translation - g[f"t_deg_{case}"]).abs().max() < 2e-2
    for threshold, auc in expected["auc"].items():
        assert pose_auc(torch.maximum(rotation, translation), int(threshold)) == pytest.approx(auc, abs=1e-6)


def test_depth_error_does_not_see_scale():
    truth = 1 + torch.rand(2, 8, 8)
    mask = torch.rand(2, 8, 8) < 0.7
    assert depth_abs_rel(3 * truth, truth, mask).item() == pytest.approx(0, abs=1e-6)
    assert depth_abs_rel(truth**2, truth, mask) > 0.05
