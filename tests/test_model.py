from __future__ import annotations

import pytest
import torch
from golden_figures import GOLDEN, SHARED, golden_weights, load_json, load_tensors

from vggt import VGGT, VGGTConfig, preset

DENSE = ("depth", "depth_conf", "world_points", "world_points_conf")


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_json("tiny_manifest.json"))


def tiny(weights, **options):
    model = VGGT(preset("tiny", **options))
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


@pytest.mark.parametrize("shape", ["portrait", "square", "landscape"])
def test_forward_equals_published(weights, shape):
    path = GOLDEN / f"tiny_forward_{shape}.npz"
    if not path.exists():
        path = SHARED / "golden" / path.name
    if not path.exists():
        pytest.skip("only portrait is in the repository")
    g = load_tensors(path)
    with torch.no_grad():
        out = tiny(weights).eval()(g["images"])
    out["pose_enc_list"] = torch.stack(out["pose_enc_list"])
    for name in ("pose_enc_list", *DENSE):
        assert (out[name] - g[name]).abs().max() <= 1e-5 * g[name].abs().max(), name


def test_gradients_equal_published(weights):
    model = tiny(weights, head_chunk=2).train()
    out = model(load_tensors(GOLDEN / "tiny_gradients.npz")["images"])
    scalar = sum((encoding**2).mean() for encoding in out["pose_enc_list"])
    scalar = scalar + (out["depth"].log() ** 2).mean() + out["depth_conf"].log().mean()
    scalar = scalar + out["world_points"].abs().mean() + out["world_points_conf"].log().mean()
    scalar.backward()
    expected = load_json("tiny_gradient_norms.json")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.state_dict()) - set(trained) == {"aggregator.patch_embed.mask_token"}
    for name, parameter in trained.items():
        assert parameter.grad.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name


def test_full_size_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = VGGT(VGGTConfig()).state_dict()
    expected = {
        name: tuple(shape)
        for name, shape in load_json("vggt_1b_manifest.json").items()
        if not name.startswith("track_head.")
    }
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_values_and_gradients_do_not_depend_on_the_head_chunk(weights, chunk):
    images = load_tensors(GOLDEN / "tiny_gradients.npz")["images"]
    results = []
    for size in (None, chunk):
        model = tiny(weights, heads=("camera", "depth"), head_chunk=size).train()
        out = model(images)
        (out["depth"].log().square().mean() + out["depth_conf"].log().mean()).backward()
        results.append((out["depth"], model.depth_head.norm.weight.grad, model.aggregator.camera_token.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_a_frozen_aggregator_builds_no_graph(weights):
    model = tiny(weights).train()
    model.aggregator.requires_grad_(False)
    kept = model.aggregator(torch.rand(1, 2, 3, 28, 42), keep={0, 3})
    assert set(kept) == {0, 3}
    assert not any(tokens.requires_grad for tokens in kept.values())


def test_under_autocast_the_heads_stay_in_float32(weights):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = tiny(weights)(torch.rand(1, 2, 3, 28, 42))
    assert {out[name].dtype for name in ("pose_enc", *DENSE)} == {torch.float32}


@pytest.mark.parametrize("shape", [(2, 3, 30, 28), (2, 4, 28, 28), (28, 28), (1, 1, 2, 3, 28, 28)])
def test_images_of_a_wrong_shape_are_refused_by_name(weights, shape):
    with pytest.raises(ValueError, match="images: expected"):
        tiny(weights)(torch.rand(shape))


def test_checkpoints_load_by_name_with_heads_left_out(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "published.pt")
    model = VGGT.from_pretrained(str(tmp_path / "published.pt"), preset("tiny", heads=("camera",)))
    assert torch.equal(model.state_dict()["camera_head.embed_pose.weight"], weights["camera_head.embed_pose.weight"])


def test_checkpoints_that_do_not_fit_are_refused_with_the_names(weights, tmp_path):
    broken = dict(weights)
    del broken["camera_head.embed_pose.bias"]
    broken["aggregator.surplus"] = torch.zeros(1)
    broken["camera_head.embed_pose.weight"] = torch.zeros(2, 2)
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="does not fit") as caught:
        VGGT.from_pretrained(str(tmp_path / "broken.pt"), preset("tiny"))
    message = str(caught.value)
    assert "1 missing: camera_head.embed_pose.bias" in message
    assert "1 unexpected: aggregator.surplus" in message
    assert "camera_head.embed_pose.weight (file [2, 2], model [128, 9])" in message


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="tensors only"):
        VGGT.from_pretrained(str(tmp_path / "evil.pt"), preset("tiny"))
