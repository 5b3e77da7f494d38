from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from train.config import load_config
from train.objective.matching import match_loss, start_matching, true_matches
from vggt import VGGT, preset
from vggt.aggregator import MATCHING_HEADS, MATCHING_PAIR

PATCH = 7
HEIGHT, WIDTH = 28, 42


def plane(shift):
    """Two views of a wall at depth 2; the second camera stands where its image is moved left by `shift` pixels."""
    focal = 40.0
    intrinsics = torch.tensor([[focal, 0, (WIDTH - 1) / 2], [0, focal, (HEIGHT - 1) / 2], [0, 0, 1]]).expand(1, 2, 3, 3)
    extrinsics = torch.eye(4)[:3].repeat(1, 2, 1, 1)
    extrinsics[:, 1, 0, 3] = -shift * 2 / focal
    depth = torch.full((1, 2, HEIGHT, WIDTH), 2.0)
    return {"depth": depth, "mask": depth > 0, "intrinsics": intrinsics, "extrinsics": extrinsics}


def test_a_patch_matches_the_one_that_its_point_is_in():
    weights, seen = true_matches(plane(PATCH), PATCH)
    rows, columns = HEIGHT // PATCH, WIDTH // PATCH
    weights = weights.view(2, rows, columns, 2, rows, columns)
    seen = seen.view(2, rows, columns, 2)
    assert not seen[0, ..., 0].any()
    assert not seen[1, ..., 1].any()
    assert seen[0, :, 1:, 1].all()
    assert not seen[0, :, 0, 1].any()  # out of the image there
    for row in range(rows):
        for column in range(1, columns):
            assert weights[0, row, column, 1, row, column - 1] == pytest.approx(1, abs=1e-5)
            assert weights[1, row, column - 1, 0, row, column] == pytest.approx(1, abs=1e-5)


def test_between_two_patches_a_match_is_shared():
    weights, _ = true_matches(plane(PATCH * 1.25), PATCH)
    weights = weights.view(2, HEIGHT // PATCH, WIDTH // PATCH, 2, HEIGHT // PATCH, WIDTH // PATCH)
    assert weights[0, 1, 3, 1, 1, 2] == pytest.approx(0.75, abs=1e-5)
    assert weights[0, 1, 3, 1, 1, 1] == pytest.approx(0.25, abs=1e-5)


def test_what_is_hidden_or_unknown_is_no_match():
    batch = plane(PATCH)
    batch["depth"] = batch["depth"].clone()
    batch["depth"][:, 1, :, : WIDTH // 2] = 1.0  # something is in front
    batch["mask"] = batch["mask"].clone()
    batch["mask"][:, 0, : HEIGHT // 2] = False
    _, seen = true_matches(batch, PATCH)
    seen = seen.view(2, HEIGHT // PATCH, WIDTH // PATCH, 2)
    assert not seen[0, :, :4, 1].any()
    assert not seen[0, :2, :, 1].any()
    assert seen[0, 2:, 4:, 1].all()


def test_attention_on_the_true_matches_has_the_least_loss_and_chunks_add_up():
    batch = plane(PATCH)
    weights, seen = true_matches(batch, PATCH)
    n = weights.shape[2]
    right = (weights * 30).reshape(1, 1, 2 * n, 2 * n).expand(-1, MATCHING_HEADS, -1, -1)
    assert match_loss(right, batch) < 1e-6
    even = torch.zeros_like(right)
    torch.testing.assert_close(match_loss(even, batch), seen.sum() * PATCH**2 * torch.tensor(float(n)).log())
    both = {name: torch.cat([value, value]) for name, value in batch.items()}
    logits = torch.randn(2, *right.shape[1:])
    parts = [match_loss(logits[i : i + 1], batch) for i in range(2)]
    torch.testing.assert_close(match_loss(logits, both), sum(parts))


def test_the_logits_are_those_that_the_block_attends_by(monkeypatch):
    torch.manual_seed(0)
    model = VGGT(preset("tiny", heads=("camera",))).eval()
    compared = []
    real = F.scaled_dot_product_attention

    def watched(q, k, v):
        compared.append((q, k))
        return real(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    images = torch.rand(2, 3, 3, 28, 42)
    with torch.no_grad():
        logits = model(images, matching=True)["matching_logits"]
        assert "matching_logits" not in model(images)
    q, k = compared[model.config.vit_depth + 2 * MATCHING_PAIR + 1]
    special, n = model.aggregator.num_special, 6
    q, k = (part[:, :MATCHING_HEADS].unflatten(2, (3, special + n))[:, :, :, special:].flatten(2, 3) for part in (q, k))
    torch.testing.assert_close(logits, q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)


def test_new_weights_attend_to_what_looks_the_same():
    """Before any training: patches of a picture moved by one patch are looked for where they went."""
    torch.manual_seed(0)
    model = VGGT(preset("nano", heads=("camera",)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_matching(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.endswith(("attn.qkv.weight", "pos_embed", "gamma")) for name in changed)
    colors = torch.rand(1, 3, 8, 9).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    images = torch.stack([colors[..., :56], colors[..., PATCH:]], dim=1)
    with torch.no_grad():
        logits = model(images, matching=True)["matching_logits"].mean(1)[0].view(2, 8, 8, 2, 8, 8)
    found = [logits[0, row, column, 1].argmax() == row * 8 + column - 1 for row in range(8) for column in range(1, 8)]
    assert torch.stack(found).float().mean() > 0.5  # by chance 1/64


def test_matching_and_muon_are_refused_where_matrices_are_in_parts():
    for option in ("loss.match=1", "optim.muon_lr=1e-3"):
        with pytest.raises(ValueError, match="strategy: fsdp holds parts of matrices"):
            load_config(None, ["init=a", "strategy=fsdp", option])
