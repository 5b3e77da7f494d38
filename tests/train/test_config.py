from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_command

from train.config import load_config
from train.engine.settings import TrainConfig, read_config, to_dict, write_config
from train.runtime.typed import flatten, options
from train.runtime.yaml_files import dump_yaml, parse_yaml

CONFIGS = ROOT / "train" / "configs"


def test_default_yaml_spells_out_every_default():
    values = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    config = load_config(CONFIGS / "default.yaml", ["init=vggt.pt"])
    assert to_dict(config) == to_dict(TrainConfig(init="vggt.pt"))

    assert set(flatten(values)) == set(flatten(to_dict(config)))


def test_comments_of_default_yaml_and_the_help_are_what_each_key_documents():
    lines, section = {}, ""
    for line in (CONFIGS / "default.yaml").read_text().splitlines():
        match = re.match(r"( *)(\w+):.*?(?: +# (.*))?$", line)
        if match and match[3]:
            lines[(section if match[1] else "") + match[2]] = match[3]
        elif match:
            section = f"{match[2]}."
    assert lines == {key: text for key, _, text in options(TrainConfig)}
    shown = run_command("python", "train/main.py", "--help").stdout
    for key, text in lines.items():
        assert re.search(rf"^  {re.escape(key)}=.*  {re.escape(text)}$", shown, re.MULTILINE), key


def test_numbers_are_decimal_wherever_they_are_given(tmp_path):
    """YAML 1.1 reads 010 as 8, 1:30 as 90, and 5e-5 as a word."""
    (tmp_path / "run.yaml").write_text("max_steps: 010\noptim: {lr: 5e-5, clip: .5}\ndata: {views: [02, 010]}\n")
    config = load_config(tmp_path / "run.yaml", ["init=a", "optim.weight_decay=1e-2", "data.val_scenes=0100"])
    assert (config.max_steps, config.optim.lr, config.optim.clip, config.data.views) == (10, 5e-5, 0.5, (2, 10))
    assert (config.optim.weight_decay, config.data.val_scenes) == (0.01, 100)
    assert parse_yaml(dump_yaml({"a": "010", "b": "1e5", "c": 10, "d": 1e-5})) == {
        "a": "010",
        "b": "1e5",
        "c": 10,
        "d": 1e-5,
    }
    (tmp_path / "run.yaml").write_text("max_steps: 1:30\n")
    for file, given in ((tmp_path / "run.yaml", []), (None, ["max_steps=1:30"]), (None, ["optim.lr=1:30"])):
        with pytest.raises(ValueError, match=r"expected (int|float), found '1:30'"):
            load_config(file, ["init=a", *given])


def test_command_line_beats_yaml_beats_defaults():
    config = load_config(CONFIGS / "demo.yaml", ["seed=5", "data.views=[2, 3]", "optim.lr=5e-5"])
    assert (config.seed, config.data.views, config.optim.lr) == (5, (2, 3), 5e-5)
    assert config.data.width == yaml.safe_load((CONFIGS / "demo.yaml").read_text())["data"]["width"]
    assert config.optim.weight_decay == 0.05
    assert load_config(None, ["init=a", "out_dir=b"]) == TrainConfig(init="a", out_dir="b")


def test_numbers_that_begin_with_0_are_decimal(tmp_path):
    assert load_config(None, ["init=none", "data.shards=x", "seed=010", "max_steps=0100"]).max_steps == 100
    with pytest.raises(ValueError, match="val_every: expected int, found '1:30'"):
        load_config(None, ["init=none", "data.shards=x", "val_every=1:30"])


def test_what_is_written_down_reads_back(tmp_path):
    config = load_config(CONFIGS / "demo.yaml", ["data.shards=s", "checkpoint.milestone=7"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "config.yaml", []) == config


def test_several_shard_sets_have_paths_and_weights(tmp_path):
    config = load_config(CONFIGS / "demo.yaml", ["data.shards=[{path: a, weight: 2}, {path: b}]"])
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "config.yaml", []) == config


def test_configurations_are_frozen():
    config = load_config(CONFIGS / "demo.yaml", [])
    for part in (config, config.data, config.model, config.loss, config.optim, config.checkpoint):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 1


WRONG = {
    "sed=1": "sed: no such key; did you mean seed",
    "data.veiws=[2, 4]": "data.veiws: no such key; did you mean data.views",
    "parallel.strategy=fsdp": "parallel: no such key; did you mean strategy",
    "loss.views=[2, 4]": "loss.views: no such key; did you mean data.views",
    "optim.learning_rate=1": "optim.learning_rate: no such key",
    "checkpoint.evry=3": "did you mean checkpoint.every",
    "loss.dept=1": "did you mean loss.depth",
    "seed=abc": "seed: expected int, found 'abc' (str)",
    "seed=1.5": "seed: expected int, found 1.5 (float)",
    "seed=null": "seed: expected int, found None",
    "seed=true": "seed: expected int, found True (bool)",
    "optim.lr=fast": "optim.lr: expected float, found 'fast'",
    "optim.lr=-1": "optim.lr, muon_lr and clip: expected more than 0",
    "data.augment=1": "data.augment: expected bool, found 1 (int)",
    "data=3": "data: expected a section of keys, found 3",
    "data.views=4": "data.views: expected a list of 2",
    "data.views=[4]": "data.views: expected a list of 2",
    "data.views=[4, x]": "data.views[1]: expected int, found 'x'",
    "data.views=[4, 2]": "data.views: expected [least, most]",
    "data.views=[2, 49]": "max_img_per_gpu: 48 is less than the 49 views",
    "data.aspect=[0, 1]": "data.aspect: expected [least, most]",
    "data.width=500": "data.width: expected a multiple of 14 pixels, found 500",
    "data.shards=[{path: a, weight: 0}]": "data.shards[0].weight: expected more than 0",
    "data.shards=[{pth: a}]": "data.shards[0].pth: no such key; did you mean data.shards[0].path",
    "data.shards=[{weight: 2}]": "data.shards[0].path: not given",
    "optim.clip=nan": "optim.clip: expected a finite number, found 'nan'",
    "loss.camera=NaN": "loss.camera: expected a finite number, found 'NaN'",
    "data.max_bad=-inf": "data.max_bad: expected a finite number, found '-inf'",
    "out_dir=": "out_dir: expected a folder, found nothing",
    "data.workers=-1": "data.workers: expected 0 or more",
    "data.max_bad=2": "data.max_bad: expected a fraction",
    "data.view_weight={1: 0.1}": "data.view_weight: no such key; did you mean data.view_weights?",
    "data.view_weights=0.1": "data.view_weights: expected {int: float}, found 0.1",
    "data.view_weights={two: 0.1}": "data.view_weights: expected int, found",
    "data.sampling=unifrom": "data.sampling: expected one of uniform, nearby, overlap, found 'unifrom'; did you mean",
    "precision=fp16": "precision: expected one of bf16, fp32, found 'fp16'",
    "seed=-1": "seed: expected at least 0, and less than 2^63, found -1",
    "optim.lr=.nan": "optim.lr: expected a finite number, found nan",
    "data.val_split=train": "data.val_split: 'train' is what train_split trains on",
    "strategy=dpp": "did you mean ddp",
    "optim.lr_factors=[{names: a, factor: 0}]": "optim.lr_factors[0].factor: expected more than 0",
    "compile=maybe": "compile: expected bool, found 'maybe'",
    "tf32=1": "tf32: expected bool, found 1 (int)",
    "optim.lr_factors=[{names: a}]": "optim.lr_factors[0].factor: not given",
    "accum_steps=0": "accum_steps: expected at least 1, found 0",
    "max_steps=0": "max_steps: expected at least 1, or null",
    "epochs=0": "epochs: expected at least 1",
    "model.preset=2b": "model.preset: expected one of 1b, nano, demo, tiny, found '2b'",
    "model.head_chunk=0": "model.head_chunk: expected at least 1 frame",
    "model.freeze=aggregator": "model.freeze: expected a list such as [str, ...], found 'aggregator'",
    "loss.valid_range=1": "loss.valid_range: expected a quantile under 1",
    "loss.depth=-1": "loss.camera, depth, point: expected weights of at least 0",
    "loss.depth_gradient=normal": "loss.depth_gradient: normals are for points",
    "checkpoint.keep=0": "checkpoint.every, keep and milestone: expected at least 1",
    "init=null": "init: not given, but model.freeze=['*aggregator*']",
    "seed": "'seed': expected key=value",
    "=3": "'=3': expected key=value",
    "data.views=[2": "data.views: '[2' is not readable as a YAML value",
    "seed.x=1": "seed.x: seed is a value, not a section",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_configuration_gets_one_clear_line(override):
    overrides = [override] if override.startswith("init") else ["init=vggt.pt", override]
    with pytest.raises(ValueError, match=r".+") as caught:
        load_config(CONFIGS / "default.yaml", overrides)
    assert WRONG[override] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "expected keys and values"), ("a: [", "not readable as YAML"), (None, "No such file")],
)
def test_a_wrong_config_file_is_named(tmp_path, text, message):
    path: Path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path, [])


def test_the_trainer_says_it_without_a_traceback():
    done = run_command("python", "train/main.py", "--config", "train/configs/demo.yaml", "data.veiws=3")
    assert done.returncode == 1
    assert done.stderr.strip() == "Error: data.veiws: no such key; did you mean data.views?"


@pytest.mark.parametrize("name", ["runs/exp #1", "2024-01-01", "1e5", "yes", "a: b", "[x", "-", "'quoted'", " x "])
def test_text_for_a_path_is_taken_as_it_is(name):
    config = load_config(None, [f"out_dir={name}", f"init={name}", f"data.shards=./{name}"])
    assert (config.out_dir, config.init, config.data.shards) == (name, name, f"./{name}")


def test_a_home_folder_is_expanded_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "out_dir: ~/out\ninit: ~/vggt.pt\ndata: {shards: [{path: ~/a}, {path: 's3://b'}]}"
    )
    config = load_config("~/run.yaml", [])
    assert (config.out_dir, config.init) == (f"{tmp_path}/out", f"{tmp_path}/vggt.pt")
    assert [source.path for source in config.data.sources] == [f"{tmp_path}/a", "s3://b"]
    assert load_config(None, ["init=~/x", "data.shards=~/y"]).data.shards == f"{tmp_path}/y"


@pytest.mark.parametrize("content", ["", "init: null\nda", "data: 3", "[1]", "a: [", None])
def test_a_cut_off_configuration_of_a_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml: \w"):
        read_config(tmp_path)


def test_two_sections_of_one_name_are_an_error(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {width: 56}\nseed: 1\ndata: {views: [2, 3]}\n")
    with pytest.raises(ValueError, match=r"run.yaml: not readable as YAML \(data is given 2 times"):
        load_config(tmp_path / "run.yaml", [])


def test_a_configuration_of_a_run_that_is_cut_off_anywhere_before_its_last_section_is_an_error(tmp_path):
    write_config(tmp_path, load_config(CONFIGS / "demo.yaml", ["data.shards=s"]), keep_other=False)
    whole = (tmp_path / "config.yaml").read_text()
    assert read_config(tmp_path)["data"]["shards"] == "s"
    lines = whole[: whole.index("checkpoint:")].splitlines(keepends=True)
    for number in range(len(lines)):
        (tmp_path / "config.yaml").write_text("".join(lines[:number]))
        with pytest.raises(ValueError, match=r"config.yaml: "):
            read_config(tmp_path)


def test_a_configuration_that_somebody_left_in_the_folder_of_a_run_is_kept(tmp_path):
    config = load_config(CONFIGS / "demo.yaml", ["data.shards=s"])
    (tmp_path / "config.yaml").write_text("seed: 3  # mine\n")
    assert write_config(tmp_path, config, keep_other=True)
    assert not write_config(tmp_path, config, keep_other=True)
    assert (tmp_path / "config.yaml.1").read_text() == "seed: 3  # mine\n"
    assert load_config(tmp_path / "config.yaml", []) == config
