from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from golden_figures import GOLDEN, golden_weights, load_json, load_tensors

from vggt import VGGT, VGGTConfig, preset
from vggt.memory import hold_in_bf16

DENSE = ("depth", "depth_conf", "world_points", "world_points_conf")


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_json("tiny_manifest.json"))


def tiny(weights, **options):
    model = VGGT(preset("tiny", **options))
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradient_images():
    return load_tensors(GOLDEN / "tiny_gradients.npz")["images"]


@pytest.mark.parametrize("shape", ["portrait", "square", "landscape"])
class TestOutputsEqualPublished:
    def test_heads(self, weights, shape):
        g = load_tensors(GOLDEN / f"tiny_forward_{shape}.npz")
        with torch.no_grad():
            out = tiny(weights).eval()(g["images"], g["query_points"])
        out["pose_enc_list"] = torch.stack(out["pose_enc_list"])
        for name in ("pose_enc_list", *DENSE):
            assert off(out[name], g[name]) <= 1e-5, name
        assert torch.equal(out["pose_enc"], out["pose_enc_list"][-1])
        for name in ("track", "vis", "conf"):
            assert out[name].shape == g[name].shape

    def test_aggregator(self, weights, shape):
        g = load_tensors(GOLDEN / f"tiny_forward_{shape}.npz")
        with torch.no_grad():
            kept = tiny(weights).aggregator(g["images"], keep={0, 3})
        assert set(kept) == {0, 3}
        assert off(kept[0], g["agg_first"]) <= 1e-5
        assert off(kept[3], g["agg_last"]) <= 1e-5

    def test_tracks(self, weights, shape):
        """The tracker amplifies rounding a hundredfold an iteration: what can be compared is the first and second."""
        g = load_tensors(GOLDEN / f"tiny_forward_{shape}.npz")
        model = tiny(weights).eval()
        with torch.no_grad():
            kept = model.aggregator(g["images"], keep={0, 1, 2, 3})
            arguments = ([kept[i] for i in range(4)], *g["images"].shape[-2:], g["query_points"])
            first, visible, confidence = model.track_head(*arguments, iterations=1)
            tracks, _, _ = model.track_head(*arguments)
        assert off(first[-1], g["track_1"]) <= 1e-4
        assert off(visible, g["vis_1"]) <= 1e-4
        assert off(confidence, g["conf_1"]) <= 1e-4
        assert len(tracks) == len(g["track_list"])
        assert off(tracks[0], g["track_list"][0]) <= 1e-4
        assert off(tracks[1], g["track_list"][1]) <= 1e-3


def test_gradients_equal_published(weights):
    model = tiny(weights, head_chunk=2).train()
    out = model(gradient_images())
    scalar = sum((encoding**2).mean() for encoding in out["pose_enc_list"])
    scalar = scalar + (out["depth"].log() ** 2).mean() + out["depth_conf"].log().mean()
    scalar = scalar + out["world_points"].abs().mean() + out["world_points_conf"].log().mean()
    scalar.backward()
    expected = load_json("tiny_gradient_norms.json")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("track_head.")}
    assert not model.aggregator.patch_embed.mask_token.requires_grad
    for name, parameter in trained.items():
        assert parameter.grad.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-9), name


def test_every_parameter_of_the_track_head_gets_a_gradient(weights):
    model = tiny(weights, heads=("track",), head_chunk=1).train()
    out = model(gradient_images(), torch.tensor([[20.0, 30], [5, 8]]).expand(len(gradient_images()), -1, -1))
    (out["track"].square().mean() + out["vis"].log().mean() + out["conf"].log().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not without


def test_full_size_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = VGGT(VGGTConfig()).state_dict()
    expected = load_json("vggt_1b_manifest.json")
    assert {name: list(value.shape) for name, value in state.items()} == expected
    assert sum(value.numel() for value in state.values()) == pytest.approx(1.2565e9, rel=1e-4)


@pytest.mark.parametrize("heads", [("camera",), ("depth", "track"), ("point", "camera")])
def test_heads_that_are_left_out_have_no_weights_and_no_outputs(weights, heads):
    model = tiny(weights, heads=heads)
    modules = {name.split(".")[0] for name in model.state_dict()}
    assert modules == {"aggregator", *(f"{head}_head" for head in heads)}
    with torch.no_grad():
        out = model(torch.rand(2, 3, 28, 42), torch.tensor([[4.0, 5.0]]) if "track" in heads else None)
    keys = {"camera": {"pose_enc", "pose_enc_list"}, "depth": set(DENSE[:2]), "point": set(DENSE[2:])}
    keys["track"] = {"track", "vis", "conf"}
    assert set(out) == set().union(*(keys[head] for head in heads))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_values_and_gradients_do_not_depend_on_the_head_chunk(weights, chunk):
    images = gradient_images()
    results = []
    for size in (None, chunk):
        model = tiny(weights, head_chunk=size).train()
        out = model(images)
        kept = model.aggregator(images, keep={0, 1, 2, 3})
        maps = model.track_head.feature_extractor([kept[i] for i in range(4)], *images.shape[-2:])
        terms = (out["depth"].log(), out["depth_conf"].log(), out["world_points"], out["world_points_conf"].log(), maps)
        sum(term.square().mean() for term in terms).backward()
        gradients = [p.grad for name, p in model.named_parameters() if not name.startswith("camera_head.")]
        results.append([*(out[name] for name in DENSE), maps, *(g for g in gradients if g is not None)])
    assert len(results[0]) > 250
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def saved_bytes(model, images):
    """The bytes that autograd keeps for the backward pass, weights aside, and the gradients it comes to."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    total = sum(size for size, _ in kept.values())
    (out["depth"].log().square().mean() + out["pose_enc"].square().mean()).backward()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", ["aggregator", "aggregator.patch_embed", "depth_head"])
def test_what_trains_is_checkpointed_with_the_same_gradients(weights, part, monkeypatch):
    images = gradient_images()

    def measure():
        model = tiny(weights, heads=("camera", "depth")).requires_grad_(False)
        model.get_submodule(part).requires_grad_(True)
        return saved_bytes(model, images)

    kept, gradients = measure()
    monkeypatch.setattr("vggt.memory.checkpoint", lambda function, *args, **_: function(*args))
    plain, expected = measure()
    assert kept < 0.25 * plain
    assert gradients.keys() == expected.keys()
    assert len(gradients) > 20
    assert all(off(gradients[name], expected[name]) <= 1e-4 for name in expected if expected[name].abs().max() > 1e-9)


def test_a_frozen_aggregator_builds_no_graph(weights):
    model = tiny(weights).train()
    model.aggregator.requires_grad_(False)
    kept = model.aggregator(torch.rand(1, 2, 3, 28, 42), keep={0, 3})
    assert set(kept) == {0, 3}
    assert not any(tokens.requires_grad for tokens in kept.values())


def test_a_frozen_aggregator_in_bf16_gives_the_same_bits_under_autocast(weights):
    model = tiny(weights).eval()
    held = copy.deepcopy(model)
    held.aggregator.requires_grad_(False)
    hold_in_bf16(held.aggregator)
    linear = [m for m in held.aggregator.modules() if isinstance(m, torch.nn.Linear)]
    assert {m.weight.dtype for m in linear} == {torch.bfloat16}
    g = load_tensors(GOLDEN / "tiny_forward_portrait.npz")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        a, b = (m(g["images"], g["query_points"]) for m in (model, held))
    assert all(torch.equal(a[name], b[name]) for name in ("pose_enc", *DENSE, "track", "vis", "conf"))


def test_weights_that_train_are_not_held_in_bf16(weights):
    with pytest.raises(ValueError, match="trains: only frozen layers can be held in bf16"):
        hold_in_bf16(tiny(weights).aggregator)


def test_under_autocast_camera_and_dense_heads_stay_in_float32_and_the_track_head_does_not(weights):
    model, seen = tiny(weights), {}
    for name in ("aggregator.frame_blocks.0", "camera_head.trunk.0", "depth_head.scratch", "track_head.tracker"):
        layers = [m for m in model.get_submodule(name).modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        for layer in layers:
            layer.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = model(torch.rand(1, 2, 3, 28, 42), torch.tensor([[[3.0, 4.0]]]))
    assert {out[name].dtype for name in ("pose_enc", *DENSE)} == {torch.float32}
    assert seen["aggregator.frame_blocks.0"] == {torch.bfloat16}
    assert seen["camera_head.trunk.0"] == {torch.float32}
    assert seen["depth_head.scratch"] == {torch.float32}
    assert seen["track_head.tracker"] == {torch.bfloat16}


@pytest.mark.slow
def test_forward_compiles_as_one_graph(weights):
    """For any shape of the images: the trainer changes it at every step."""
    model = tiny(weights).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shape in ((1, 2, 3, 56, 70), (1, 3, 3, 42, 70)):
        arguments = torch.rand(shape), torch.tensor([[[20.0, 30.0]]])
        with torch.no_grad():
            expected, out = model(*arguments), compiled(*arguments)
        assert set(out) == set(expected)
        assert all(off(out[name], expected[name]) <= 1e-5 for name in ("pose_enc", *DENSE))
        assert out["track"].isfinite().all()


def test_blocks_that_keep_their_activations_give_the_same_gradients(weights):
    gradients = []
    for recompute in (True, False):
        model = tiny(weights, heads=("camera",), recompute=recompute).train()
        torch.stack(model(gradient_images())["pose_enc_list"]).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():  # the others go through a few frames at a time, which rounds otherwise
        assert (value - gradients[1][name]).abs().max() <= 1e-5 * max(gradients[1][name].abs().max(), 1e-6), name


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients(weights):
    gradients = []
    torch.compiler.reset()
    for compiled in (False, True):
        model = tiny(weights, heads=("camera", "depth"), head_chunk=1).train()
        model.aggregator.requires_grad_(False)
        out = (torch.compile(model, fullgraph=True) if compiled else model)(gradient_images())
        poses = torch.stack(out["pose_enc_list"])
        (out["depth"].log().square().mean() + out["depth_conf"].log().mean() + poses.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, fused = gradients
    assert plain.keys() == fused.keys()
    assert len(plain) > 100
    assert all(off(fused[name], plain[name]) <= 1e-4 for name in plain if plain[name].abs().max() > 1e-7)


GOOD = torch.full((2, 3, 28, 42), 0.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(28, 42), r"images: expected \[B, S, 3, H, W\] or \[S, 3, H, W\], found \[28, 42\]"),
        (torch.rand(1, 1, 2, 3, 28, 28), r"images: expected \[B, S, 3, H, W\].*found \[1, 1, 2, 3, 28, 28\]"),
        (torch.rand(2, 28, 42, 3), r"images: expected \[B, S, 3, H, W\].*found \[1, 2, 28, 42, 3\]"),
        (torch.rand(2, 3, 30, 28), r"images: expected H and W to be multiples of 14, found \[1, 2, 3, 30, 28\]"),
        (torch.rand(0, 3, 28, 28), r"images: expected at least one scene of one view, found \[1, 0, 3, 28, 28\]"),
        (torch.rand(2, 3, 0, 28), "images: expected at least one"),
        ((GOOD * 255).byte(), r"images: expected floating-point values in \[0, 1\], found torch.uint8: divide by 255"),
        (GOOD * 255, r"images \[1, 2, 3, 28, 42\]: expected values in \[0, 1\], found 128 to 128; divide bytes by 255"),
        (GOOD - 1, "expected values in"),
        (GOOD * torch.nan, "expected values in"),
    ],
)
def test_images_that_cannot_be_are_refused_by_name(weights, images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(weights)(images)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.rand(5), r"query_points: expected \[B, N, 2\], or \[N, 2\] for one scene, .* found \[5\]"),
        (torch.rand(2, 5, 2), r"with B = 1 .* found \[2, 5, 2\]"),
        (torch.rand(5, 3), r"found \[1, 5, 3\]"),
        (torch.rand(0, 2), r"N of at least 1, found \[1, 0, 2\]"),
        (torch.zeros(5, 2).long(), "query_points: expected floating-point pixels, found torch.int64"),
        (
            torch.tensor([[41.5, 3]]),
            r"query_points \[1, 1, 2\]: expected \(x, y\) in pixels inside view 0, .* to \(41, 27\), found \(41.5, 3\)",
        ),
        (torch.tensor([[3, -1.0]]), "inside view 0"),
        (torch.tensor([[3, torch.nan]]), "inside view 0"),
    ],
)
def test_query_points_that_cannot_be_are_refused_by_name(weights, points, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(weights)(GOOD, points)


def test_query_points_need_a_track_head_and_images_that_its_pyramid_fits_into(weights):
    with pytest.raises(ValueError, match="built without the track head"):
        tiny(weights, heads=("camera",))(GOOD, torch.tensor([[3.0, 4.0]]))
    model = VGGT(replace(preset("tiny"), track_levels=5))
    with pytest.raises(ValueError, match="images: expected H and W of at least 32 for tracking, found 28 x 42"):
        model(GOOD, torch.tensor([[3.0, 4.0]]))
    with torch.no_grad():
        assert model(torch.rand(2, 3, 42, 42), torch.tensor([[3.0, 4.0]]))["track"].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depth": 2}, r"dense_layers \[0, 1, 2, 3\]: expected pairs below depth 2"),
        ({"num_heads": 3}, "embed_dim 64 is not a multiple of num_heads 3"),
        ({"heads": ("camera", "normals")}, "heads: expected some of camera, depth, point, track, found normals"),
        ({"image_size": 71}, "image_size 71 is not a multiple of patch_size 14"),
        ({"head_chunk": 0}, "head_chunk: expected at least 1 frame"),
        ({"track_features": 30}, "expected multiples of 4"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(preset("tiny"), **changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_may_be_of_any_floating_point_type(weights, dtype):
    model = tiny(weights, heads=("camera",)).eval()
    with torch.no_grad():
        assert off(model(GOOD.to(dtype))["pose_enc"], model(GOOD)["pose_enc"]) <= 1e-5
