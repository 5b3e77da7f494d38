"""The trainer as users start it: real processes, real kills."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
import yaml
from conftest import run_command, vggt_prep
from runs import SCRATCH, WORKER, assert_same_run, checkpoint, metrics, run_trainer, start, trainer, wait_for

import shards
from train.config import load_config
from train.data.plan import DataState, TrainingPlan
from train.data.split import Split
from train.engine.checkpoint import CheckpointConfig, mark_best, save, steps_saved
from train.engine.describe import program
from train.engine.folder import find_start, hold_init, keep_former_choices, locked_folder, real_name, with_init_of
from train.engine.lineage import began_from
from train.engine.settings import to_dict
from train.engine.step import StepOutcome
from train.engine.tally import Window
from train.evaluation.history import VALIDATION_FILE, ValidationHistory, compared_plan
from train.evaluation.metrics import METRICS
from train.report.logger import Reporter
from train.runtime.distributed import World
from train.runtime.jsonl import append_line, read_jsonl
from vggt import VGGT, preset


@pytest.fixture(scope="module")
def whole_run(shard_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    command = trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4")
    done = run_command(command[0].name, *command[1:], OMP_NUM_THREADS="1", MY_TOKEN="hf_aSecretOfTheEnvironment")
    assert done.returncode == 0, done.stderr
    assert "aSecretOf" not in done.stdout + done.stderr
    return out, done.stdout


def test_nothing_of_the_environment_is_written_down(whole_run):
    files = [path for path in whole_run[0].rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"aSecretOf" not in path.read_bytes(), path


def test_a_run_leaves_everything_that_is_promised(whole_run):
    out, said = whole_run
    assert sorted(p.name for p in out.iterdir()) == [
        *("checkpoints", "config.yaml", "contact_sheet.png", "lock", "metrics.jsonl", "tensorboard", "validation.jsonl")
    ]
    assert (out / "checkpoints" / "latest").resolve().name == "step-00000008.pt"
    assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == 8
    assert list((out / "tensorboard").glob("events*"))
    sheet = cv2.imread(str(out / "contact_sheet.png"))
    assert sheet is not None
    assert sheet.std() > 20
    losses = metrics(out)
    assert {(0, "test"), (8, "test"), (8, "guard"), *((i, "train") for i in range(1, 9))} == set(losses)
    assert "loss_camera" in losses[8, "train"]
    tested = [line for line in read_jsonl(out / "metrics.jsonl") if line["split"] == "test"]
    assert {name for name, figure in METRICS.items() if "point" not in figure.heads} < set(tested[0])
    for words in (
        "Done: 8 steps",
        "of the test split, never trained on, step 0 -> step 8",
        "depth error",
        "contact_sheet.png",
        "CO3D_DIR",
    ):
        assert words in said


def test_a_profile_says_where_the_time_of_steps_goes_and_changes_nothing(shard_dir, whole_run, tmp_path):
    out = tmp_path / "run"
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4", "profile_steps=3")
    assert done.returncode == 0, done.stderr
    assert metrics(out) == metrics(whole_run[0])
    table = (out / "profile" / "table.txt").read_text()
    assert table in done.stdout
    whole = float(re.search(r"a step takes ([0-9.]+) s, on average over 3", table)[1])
    parts = dict(re.findall(r"^  (.+?) +([0-9.]+) s +[0-9]+%$", table, re.MULTILINE))
    heads = ("aggregator, forward", "camera head, forward", "depth head, forward")
    names = ("waiting for data", "data, on the device", *heads, "losses", "backward", "clipping", "optimizer")
    assert set(parts) == {*names, "everything else"}
    assert sum(map(float, parts.values())) == pytest.approx(whole, abs=2e-3)
    assert float(parts["everything else"]) < 0.3 * whole
    with gzip.open(out / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"] == "backward" for event in events) == 2  # of the step's chunks
    assert sum(event["name"] == "aten::addmm" for event in events) > 100


@pytest.mark.slow
def test_a_run_too_short_for_its_profile_says_so_and_what_there_is(shard_dir, tmp_path):
    out = tmp_path / "run"
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=5", "profile_steps=2")
    assert done.returncode == 0, done.stderr
    assert "profile_steps=2 needs 6 steps, and there are 5" in done.stdout
    assert "on average over 2; of these" in (out / "profile" / "table.txt").read_text()
    assert not (out / "profile" / "trace.json.gz").exists()


@pytest.mark.slow
def test_best_is_the_checkpoint_of_the_best_validation(shard_dir, tmp_path):
    """Whether or not a checkpoint is due at that step, also after others have come and gone, and a kill."""
    out = tmp_path / "run"
    best = ["checkpoint.best=depth_abs_rel", "checkpoint.every=3", "checkpoint.keep=1", "val_every=2"]
    process = start(trainer(shard_dir, out, *SCRATCH, "max_steps=8", *best))
    wait_for(out / "checkpoints" / "step-00000003.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=8", *best)
    assert done.returncode == 0, done.stderr
    validations = read_jsonl(out / "validation.jsonl")
    assert [line["step"] for line in validations] == [0, 2, 4, 6, 8]
    means = {line["step"]: [scene["depth_abs_rel"] for scene in line["scenes"]] for line in validations}
    step = min(means, key=lambda step: sum(means[step]))
    assert step > 0, "the start is the best: this test shows nothing"
    assert (out / "checkpoints" / "best").resolve().name == f"step-{step:08d}.pt"
    assert {path.name for path in (out / "checkpoints").glob("step-*.pt")} == {f"step-{s:08d}.pt" for s in (step, 8)}
    assert f"checkpoints/best  (step {step}, the best by depth_abs_rel;" in done.stdout


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, False),
        ({"data.val_views": 5}, True),
        ({"checkpoint.best": "auc_30"}, True),
        ({"validation.jsonl": ""}, True),
        ({"checkpoint.keep": 9, "data.workers": 3}, False),
        ({"scenes json": ["of another set"]}, True),
        ({"sets json": ["digest", "another's, whose scenes have the same names"]}, True),
    ],
)
def test_the_former_best_stays_if_a_resume_looks_for_another(tmp_path, changes, stays):
    config = load_config(None, ["init=a"])
    save(tmp_path / "checkpoints", 4, {"model": {}}, config.checkpoint)
    mark_best(tmp_path / "checkpoints", 4, config.checkpoint)
    line = {"step": 4, "plan": compared_plan(config.data, []), "scenes": []}
    (tmp_path / "validation.jsonl").write_text(changes.get("validation.jsonl", json.dumps(line)))
    now = load_config(None, ["init=a", *(f"{key}={value}" for key, value in changes.items() if "json" not in key)])
    plan = compared_plan(now.data, changes.get("sets json", []))
    keep_former_choices(tmp_path, to_dict(config), now, plan, changes.get("scenes json", []))
    for step in (5, 6, 7):
        save(tmp_path / "checkpoints", step, {"model": {}}, config.checkpoint)
        mark_best(tmp_path / "checkpoints", 7 if stays else 4, config.checkpoint)
    assert (tmp_path / "checkpoints" / "step-00000004.pt").exists()
    assert (tmp_path / "checkpoints" / "keep-00000004").exists() == stays


def test_a_resume_may_find_what_it_began_from_elsewhere_but_not_begin_from_something_else():
    config = load_config(None, ["init=b"])
    assert with_init_of(config, "a").init == "b"
    assert with_init_of(load_config(None, ["model.freeze=[]"]), "a").init == "a"
    with pytest.raises(ValueError, match="began without init, now it is b"):
        with_init_of(config, None)


def test_the_best_is_found_over_the_scenes_that_all_validations_have(tmp_path):
    """A scene that cannot be read any more would change the mean."""
    easy, hard = {"scene": "a", "depth_abs_rel": 0.2}, {"scene": "b", "depth_abs_rel": 0.9}
    worse = {"scene": "a", "depth_abs_rel": 0.3}
    lines = [
        {"step": 1, "plan": {}, "scenes": [easy, hard]},
        {"step": 2, "plan": {}, "scenes": [worse, {"scene": "b"}]},
    ]
    history = ValidationHistory(tmp_path)
    for line in [*lines, {"step": 3, "plan": {}, "scenes": [{"scene": "a"}, {"scene": "b"}]}]:
        append_line(tmp_path / VALIDATION_FILE, line)
        assert history.best_step("depth_abs_rel") == 1


def test_validations_on_other_sets_with_scenes_of_the_same_names_are_not_compared(tmp_path):
    """Those of runs that did not yet say on which sets are."""
    scenes = [{"scene": "a", "depth_abs_rel": 0.2}]
    history = ValidationHistory(tmp_path)
    for step, plan in enumerate(({"sets": ["one"]}, {}, {"sets": ["other"]})):
        append_line(tmp_path / VALIDATION_FILE, {"step": step, "plan": plan, "scenes": scenes})
    assert [line["step"] for line in history.comparable] == [1, 2]
    assert history.has(0, {"sets": ["one"]}, ["a"])
    assert not history.has(0, {"sets": ["other"]}, ["a"])


@pytest.mark.slow
def test_a_resume_without_init_remembers_what_the_run_began_from_and_takes_nothing_else_for_it(
    shard_dir, published, tmp_path, caplog
):
    """As when that was a run's checkpoint, and the run was made again."""
    init, out = tmp_path / "init.pt", tmp_path / "run"
    shutil.copy(published, init)
    settings = (*SCRATCH, "loss.point=0")
    assert run_trainer(shard_dir, out, *settings, f"init={init}", "max_steps=1").returncode == 0
    done = run_trainer(shard_dir, out, *settings, "max_steps=2")
    assert done.returncode == 0, done.stderr
    assert checkpoint(out, 2)["config"]["init"] == str(init)
    assert yaml.safe_load((out / "config.yaml").read_text())["init"] == str(init)
    saved = str(out / "checkpoints" / "latest")
    assert began_from(saved) == [str(init)]
    state = torch.load(init, weights_only=True)
    init.write_bytes(b"no checkpoint")
    assert began_from(saved) == []
    torch.save(state | {"camera_head.empty_pose_tokens": torch.ones(1, 1, 9)}, init)
    assert began_from(saved) == []
    assert "where something else is now: not compared with it" in caplog.text
    init.rename(tmp_path / "elsewhere.pt")
    done = run_trainer(shard_dir, out, *settings, f"init={tmp_path / 'elsewhere.pt'}", "max_steps=3")
    assert done.returncode == 1
    assert "is another checkpoint than the one that this run began from" in done.stderr


def test_lines_that_a_kill_cut_off_and_those_of_another_start_are_forgotten(tmp_path):
    lines = [{"step": step, "plan": {}, "scenes": []} for step in (0, 2, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "sc'
    for resumed, left in ((True, [0, 2]), (False, [])):
        (tmp_path / "validation.jsonl").write_text(text)
        reporter = Reporter(tmp_path, is_main=True, first_step=2 if resumed else 0, total_steps=9, resumed=resumed)
        with reporter:
            history = ValidationHistory(tmp_path)
            assert [line["step"] for line in history.lines] == left
            assert history.has(0, {}, []) == resumed
            assert not history.has(0, {"val_views": 3}, [])


def test_the_curves_of_a_resumed_run_keep_the_step_it_resumes_at(tmp_path):
    for first, last in ((0, 4), (4, 8)):
        resumed = first > 0
        with Reporter(tmp_path, is_main=True, first_step=first, total_steps=last, resumed=resumed) as reporter:
            for step in range(first, last + 1):
                if step > first or not resumed:
                    reporter.scalars(step, "test", {"auc_30": step / 10})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("test/auc_30")] == [*range(9)]


def test_terms_of_lengths_are_averaged_over_the_steps_that_have_them():
    world = World(0, 1, 1, torch.device("cpu"))

    def outcome(has_scale):
        terms = {"loss_R": torch.tensor(0.4), "loss_T": torch.tensor(0.3 * has_scale)}
        terms["loss_reg_depth"] = torch.tensor(0.2 * has_scale)
        return StepOutcome(terms, {}, torch.tensor(float(has_scale)).double(), True, False, False, 0, 8)

    window = Window()
    for has_scale in (True, False, False, True):
        window.add(outcome(has_scale), 8, 0.0, 0.0)
    means = window.take_means(world)
    assert [means[name] for name in ("loss_R", "loss_T", "loss_reg_depth")] == pytest.approx([0.4, 0.3, 0.2])
    window.add(outcome(False), 8, 0.0, 0.0)
    means = window.take_means(world)
    assert "loss_R" in means
    assert not {"loss_T", "loss_reg_depth"} & means.keys()

    other, sent = Window(), []  # another rank, without depth
    other.add(outcome(False), 8, 0.0, 0.0)
    other.take_means(SimpleNamespace(size=2, sum=lambda values: (sent.append(values), values)[1]))
    window.add(outcome(True), 8, 0.0, 0.0)
    means = window.take_means(SimpleNamespace(size=2, sum=lambda values: values + sent[0]))
    assert [means[name] for name in ("loss_R", "loss_T", "loss_reg_depth")] == pytest.approx([0.4, 0.3, 0.2])


def test_another_run_keeps_the_checkpoint_that_a_run_begins_from(tmp_path):
    folder = tmp_path / "checkpoints"
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")  # on another disk
    keep_one = CheckpointConfig(every=1, keep=1, milestone=1000)
    for step in (1, 2, 3):
        save(folder, step, {"model": {"a": torch.zeros(1)}}, keep_one)
        (tmp_path / "config.yaml").write_text("")
        if step == 2:
            begin = real_name(str(folder / "latest"))
            assert hold_init(begin) == f"{begin} is kept, by keep-00000002 beside it: this run begins from it"
            assert hold_init(begin) == ""  # it is
    assert steps_saved(folder) == [2, 3]
    assert hold_init(str(folder / "step-00000007.pt")) == hold_init("nano") == ""
    shutil.copy(begin, tmp_path / "step-00000002.pt")
    assert hold_init(str(tmp_path / "step-00000002.pt")) == ""


def test_suggested_commands_run_where_the_environment_is_not_activated(monkeypatch):
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(here))
    assert program("python") == "python"
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(here.parent)
    assert program("python") == f"{here.name}/python"


@pytest.mark.slow
def test_the_loss_falls_clearly(shard_dir, tmp_path):
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=40", "checkpoint.every=40", "log_every=10")
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "run")
    assert losses[40, "train"]["loss_objective"] < 0.7 * losses[10, "train"]["loss_objective"]
    assert losses[40, "test"]["loss_objective"] < 0.7 * losses[0, "test"]["loss_objective"]


def test_a_killed_run_equals_an_uninterrupted_one(shard_dir, whole_run, tmp_path):
    out = tmp_path / "killed"
    command = trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4")
    for step in (2, 5):
        process = start(command)
        wait_for(out / "checkpoints" / f"step-{step:08d}.pt", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4", "data.workers=2")
    assert done.returncode == 0, done.stderr
    assert f"resuming {out} at step" in done.stdout
    assert_same_run(out, whole_run[0], 8)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(0, 1), (4, 4), (3, 4, 7)])
def test_killed_at_the_start_at_the_end_of_an_epoch_or_twice_in_a_row_it_is_the_same_run(
    shard_dir, whole_run, tmp_path, kills
):
    """An epoch has four steps. Step 0: before there is any checkpoint."""
    out = tmp_path / "killed"
    for number, step in enumerate(kills):
        command = trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4", f"data.workers={number % 3}")
        process = start(command)
        if step in kills[:number]:  # twice: killed as soon as it is back at work
            while "resuming" not in process.stdout.readline():
                assert process.poll() is None
        else:
            wait_for(out / "checkpoints" / f"step-{step:08d}.pt" if step else out / "metrics.jsonl", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole_run[0], 8)


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=[pytest.mark.slow, pytest.mark.dist]),
    ],
)
def test_a_signal_to_the_whole_group_finishes_the_step_saves_and_marks(shard_dir, tmp_path, number, processes):
    """As a terminal's Ctrl-C or a scheduler sends it: to loader workers and to torchrun, which passes it on."""
    out = tmp_path / "stopped"
    command = trainer(shard_dir, out, *SCRATCH, "max_steps=500", "checkpoint.every=1000", WORKER, processes=processes)
    process = start(command)
    wait_for(out / "metrics.jsonl", process)
    end = time.monotonic() + 120
    while '"step": 2' not in (out / "metrics.jsonl").read_text():
        assert time.monotonic() < end, "no step was made"
        time.sleep(0.02)
    for pause in (0.001, 0.05, 0.2):  # the last two as torchrun does
        os.killpg(process.pid, number)
        time.sleep(pause)
    said, _ = process.communicate(timeout=90)
    assert "stopped, and saved" in said, said
    assert "DataLoader worker" not in said
    assert (out / "requeue").exists()
    stopped_at = torch.load(out / "checkpoints" / "latest", weights_only=True)["data"]["step"]
    assert stopped_at >= 2
    done = run_trainer(
        shard_dir, out, *SCRATCH, f"max_steps={stopped_at + 1}", "checkpoint.every=1000", processes=processes
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming {out} at step {stopped_at}" in done.stdout
    assert not (out / "requeue").exists()


def test_a_finished_run_says_so_and_stays(shard_dir, whole_run):
    out, _ = whole_run
    before = (out / "metrics.jsonl").read_bytes()
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=8", "steps_per_epoch=4")
    assert done.returncode == 0, done.stderr
    assert "it is finished" in done.stdout
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "Done: 8 steps" in run_trainer(shard_dir, out, *SCRATCH, "max_steps=4", "steps_per_epoch=4").stdout


@pytest.mark.slow
def test_compiled_blocks_train_the_same(shard_dir, whole_run, tmp_path):
    """Through steps of several shapes."""
    out, _ = whole_run
    done = run_trainer(shard_dir, tmp_path, *SCRATCH, "max_steps=8", "steps_per_epoch=4", "compile=true")
    assert done.returncode == 0, done.stderr
    expected = metrics(out)
    for line, terms in metrics(tmp_path).items():
        for name, value in terms.items():
            assert value == pytest.approx(expected[line][name], rel=1e-3, abs=1e-3), (line, name)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_are_killed_and_resume_to_the_same_run(shard_dir, tmp_path):
    runs = [tmp_path / "whole", tmp_path / "killed"]
    whole = run_trainer(shard_dir, runs[0], *SCRATCH, "max_steps=4", processes=2)
    assert whole.returncode == 0, whole.stderr
    assert "2 processes on cpu" in whole.stdout
    assert whole.stdout.count("Done: 4 steps") == 1
    process = start(trainer(shard_dir, runs[1], *SCRATCH, "max_steps=4", processes=2))
    wait_for(runs[1] / "checkpoints" / "step-00000002.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # torchrun starts its workers in sessions of their own
    subprocess.run(["pkill", "-KILL", "-f", str(runs[1])], check=False)
    resumed = run_trainer(shard_dir, runs[1], *SCRATCH, "max_steps=4", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    assert_same_run(runs[0], runs[1], 4)


@pytest.mark.slow
@pytest.mark.dist
def test_with_other_ranks_the_stream_goes_on_without_loss_or_repeat(shard_dir, tmp_path):
    """What the checkpoints say of the data is what the plan says, whose streams tests/test_plan.py looks at."""
    split = Split([shards.open(shard_dir)], "train")
    state = DataState(0, (0,))
    for last, processes in ((2, 2), (5, 1), (6, 2)):
        done = run_trainer(shard_dir, tmp_path, *SCRATCH, f"max_steps={last}", processes=processes)
        assert done.returncode == 0, done.stderr
        config = load_config(tmp_path / "config.yaml", [])
        plan = TrainingPlan(
            config=config.data,
            lengths=split.lengths,
            seed=config.seed,
            max_img_per_gpu=config.max_img_per_gpu,
            world_size=processes,
        )
        for step in range(state.step + 1, last + 1):
            state = plan.after(state)
            data = checkpoint(tmp_path, step)["data"]
            assert data["step"] == step
            assert data["streams"] == {split.shard_sets[0].digest: [0, *state.positions]}


@pytest.mark.dist
def test_default_yaml_fine_tunes_a_published_checkpoint_under_torchrun(shard_dir, published, tmp_path):
    out = tmp_path / "run"
    options = (f"init={published}", "max_steps=3")
    done = run_trainer(shard_dir, out, *options, "precision=bf16", processes=2, config="train/configs/default.yaml")
    assert done.returncode == 0, done.stderr
    assert "in a step each sends up to 2.9 MB to others" in done.stdout
    trained, init = checkpoint(out, 3)["model"], torch.load(published, weights_only=True)
    for name, value in trained.items():
        frozen = name.startswith("aggregator.")
        assert torch.equal(value, init[name]) == frozen or not value.is_floating_point(), name
    assert not any(name.startswith("point_head") for name in trained)


def lacks_a_name(published, path):
    state = torch.load(published, weights_only=True)
    state.pop("camera_head.embed_pose.bias")
    torch.save(state, path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shards=/nowhere"], "Error: /nowhere: no such directory; make one with: vggt-prep pack"),
        (["data.shards=null"], "Error: data.shards: not given"),
        (["out_dir=/proc/nowhere"], "/proc/nowhere"),
        (["init=MISFIT"], "1 missing: camera_head.embed_pose.bias"),
        (["init=/nowhere.pt"], "Error: /nowhere.pt: no such file"),
        (["model.preset=demo", "init=INIT"], "of another shape"),
        (["init=null", "model.freeze=['aggregator*']"], "Error: init: not given, but model.freeze="),
        (["model.freeze=['agregator*']", "init=INIT"], "'agregator*' matches no parameter"),
        (["model.freeze=['*']", "init=INIT"], "leaves nothing to train"),
    ],
)
def test_bad_input_gets_one_clear_line_and_leaves_nothing(shard_dir, published, tmp_path, overrides, message):
    lacks_a_name(published, tmp_path / "misfit.pt")
    names = {"MISFIT": str(tmp_path / "misfit.pt"), "INIT": str(published)}
    overrides = [o.replace("MISFIT", names["MISFIT"]).replace("INIT", names["INIT"]) for o in overrides]
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, *overrides)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_captures_without_depth_pack_and_train_cameras(captures, tmp_path):
    """A loss of rotation and field of view only: without depth nothing says how large the scenes are."""
    shutil.copytree(captures, tmp_path / "captures")
    for folder in (tmp_path / "captures" / "co3d").glob("*/*/depths"):
        shutil.rmtree(folder)
    source = ("--co3d-dir", tmp_path / "captures/co3d", "--annotation-dir", tmp_path / "captures/annotations")
    packed = vggt_prep("pack", *source, "--out", tmp_path / "set", "--short-side", 60)
    assert packed.returncode == 0, packed.stderr
    done = run_trainer(tmp_path / "set", tmp_path / "run", *SCRATCH, "max_steps=2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    assert len(steps) == 2
    assert all(line["loss_camera"] > 0 and line["loss_objective"] > 0 for line in steps)
    assert all(not line.get("loss_depth") for line in steps)


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "stops"), [(0.2, True), (0.01, False)])
def test_too_many_damaged_frames_stop_the_run_and_few_are_reported(shard_dir, tmp_path, fraction, stops):
    shutil.copytree(shard_dir, tmp_path / "set")
    opened = shards.open(tmp_path / "set")
    frames = range(0, 7 * 24, round(1 / fraction))
    for frame in frames:
        tar = tmp_path / "set" / opened.tars[opened.frames[frame]["tar"]]
        data = bytearray(tar.read_bytes())
        data[int(opened.frames[frame]["jpg_offset"]) + 30] ^= 1
        tar.write_bytes(data)
    settings = ("max_steps=60", "data.max_bad=0.05", "checkpoint.every=100", "data.width=28")
    done = run_trainer(tmp_path / "set", tmp_path / "run", *SCRATCH, *settings)
    if stops:
        assert done.returncode == 1
        assert "frames read are damaged, more than data.max_bad=0.05" in done.stderr
        assert f"{tmp_path}/set/train-00000" in done.stderr
        step = int(re.search(r"what was trained is saved at step (\d+)", done.stderr)[1])
        assert checkpoint(tmp_path / "run", step)["data"]["step"] == step > 10
    else:
        assert done.returncode == 0, done.stderr
        assert "frames were damaged and replaced: " in done.stdout


def test_another_run_in_the_same_place_is_refused_and_asks_not_to_be_started_again(shard_dir, whole_run, tmp_path):
    """A script that requeues a job while it finds that file would do so for ever."""
    out = tmp_path / "run"
    shutil.copytree(whole_run[0], out, symlinks=True)
    (out / "requeue").touch()
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=9", "steps_per_epoch=4", "optim.lr=0.5", "seed=3")
    assert done.returncode == 1
    words = "was trained with seed=0, optim.lr=0.001, now it is seed=3, optim.lr=0.5; give another out_dir"
    assert words in done.stderr
    assert not (out / "requeue").exists()


@pytest.mark.dist
def test_under_torchrun_an_error_is_said_once_and_ends_its_report(tmp_path):
    done = run_trainer("/nowhere", tmp_path / "run", *SCRATCH, processes=2)
    assert done.returncode == 1
    assert done.stderr.count("\nError: /nowhere: no such directory") + done.stderr.startswith("Error: /nowhere") == 1
    assert any(line.strip().startswith("ValueError: /nowhere: no such") for line in done.stderr.splitlines()[-4:])


def test_steps_that_are_not_finite_are_skipped_listed_and_limited(shard_dir, published, tmp_path):
    state = torch.load(published, weights_only=True)
    state["depth_head.norm.weight"][0] = 3e38  # overflows at once
    torch.save(state, tmp_path / "huge.pt")
    options = (f"init={tmp_path / 'huge.pt'}", "max_steps=8", "max_skipped=2")
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, *options)
    assert done.returncode == 1
    assert "3 steps in a row were not finite" in done.stderr
    assert done.stdout.count("skipped on all ranks") == 3
    assert "scene_" in done.stdout
    first = checkpoint(tmp_path / "run", 1)["model"]
    assert torch.equal(first["camera_head.embed_pose.weight"], state["camera_head.embed_pose.weight"])


@pytest.fixture(scope="module")
def real_set(co3d_mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "set"
    options = ("--co3d-dir", co3d_mini / "co3d", "--annotation-dir", co3d_mini / "annotations", "--short-side", 150)
    assert run_command("vggt-prep", "pack", *options, "--out", out).returncode == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_real_captures_train(real_set, tmp_path, processes):
    steps = ("max_steps=20", "log_every=5", "checkpoint.every=20")
    done = run_trainer(real_set, tmp_path, *SCRATCH, *steps, processes=processes)
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path)
    assert losses[20, "train"]["loss_objective"] < 0.7 * losses[5, "train"]["loss_objective"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_real_captures_train_are_killed_resume_export_and_load(real_set, published, tmp_path, strategy):
    """Two processes fine-tune a published checkpoint; what comes out loads wherever that does."""
    out = tmp_path / "run"
    options = (f"init={published}", f"strategy={strategy}", "max_steps=6")
    process = start(trainer(real_set, out, *options, processes=2))
    wait_for(out / "checkpoints" / "step-00000003.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    subprocess.run(["pkill", "-KILL", "-f", str(out)], check=False)  # torchrun starts ranks in sessions of their own
    done = run_trainer(real_set, out, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    exported = run_command(
        "python", "-m", "train.export", out / "checkpoints" / "latest", "--out", tmp_path / "mine.pt"
    )
    assert exported.returncode == 0, exported.stderr
    before, after = VGGT.from_pretrained(published, preset("tiny")), VGGT.from_pretrained(tmp_path / "mine.pt")
    assert before.state_dict().keys() == after.state_dict().keys()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}
    assert {name.partition(".")[0] for name in moved} == {"camera_head", "depth_head"}


def test_a_place_where_no_checkpoint_could_be_saved_is_refused_at_the_start(tmp_path):
    config = load_config(None, ["init=a"])
    checkpoints = tmp_path / "checkpoints"
    checkpoints.symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match=r"checkpoints: a link to .*not mounted, which is not there; mount it"):
        find_start(config, tmp_path, repair=True)
    checkpoints.unlink()
    checkpoints.write_text("")
    with pytest.raises(ValueError, match="checkpoints: a file, where checkpoints go"):
        find_start(config, tmp_path, repair=True)
    checkpoints.unlink()
    (checkpoints / "latest").mkdir(parents=True)
    with pytest.raises(ValueError, match="latest: a folder, where a link to a checkpoint goes"):
        find_start(config, tmp_path, repair=True)


def test_checkpoints_that_two_runs_share_through_a_link_are_locked(tmp_path):
    (tmp_path / "scratch").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "scratch")
    with (
        locked_folder(tmp_path / "a"),
        pytest.raises(ValueError, match="b/checkpoints: another trainer is at work there"),
        locked_folder(tmp_path / "b"),
    ):
        pass
    with locked_folder(tmp_path / "b"):
        pass


def test_a_scene_of_which_a_view_was_replaced_is_not_compared_with_itself(shard_dir, tmp_path):
    """Seven scenes to validate on; one loses a frame between two validations."""
    shutil.copytree(shard_dir, tmp_path / "set")
    swapped = [
        "data.train_split=test",
        "data.val_split=train",
        "data.val_scenes=7",
        "data.val_views=24",
        "data.max_bad=1",
    ]
    options = [*SCRATCH, *swapped, "val_every=1"]
    done = run_trainer(tmp_path / "set", tmp_path / "run", *options, "max_steps=1")
    assert done.returncode == 0, done.stderr
    tar = next(iter(sorted((tmp_path / "set").glob("train-*.tar"))))
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    done = run_trainer(tmp_path / "set", tmp_path / "run", *options, "max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "1 of 7 scenes cannot be read" in done.stdout
    lines = read_jsonl(tmp_path / "run" / "validation.jsonl")
    assert [sum(len(scene) == 1 for scene in line["scenes"]) for line in lines] == [0, 0, 1]


def test_the_guard_says_harm_at_once_and_stops_a_run_that_does_it(shard_dir, tmp_path):
    """Seven scenes to validate on, one to train on, much too fast."""
    out = tmp_path / "run"
    swapped = ["data.train_split=test", "data.val_split=train", "data.val_scenes=7"]
    harmful = [*swapped, "model.preset=nano", "init=nano", "optim.lr=0.02", "optim.warmup=0", "val_every=1"]
    options = [*SCRATCH, *harmful, "checkpoint.best=[auc_30, depth_abs_rel]", "max_steps=5"]
    done = run_trainer(shard_dir, out, *options, "guard=stop")
    assert done.returncode == 0, done.stderr
    assert "WARNING: step 1: worse than at step 0 beyond the noise: " in done.stdout
    assert re.search("ended by guard=stop: .*camera rotation error.*: worse than at first", done.stdout)
    assert "Ended after 2 of 5 steps." in done.stdout
    assert "Use:      what you started from, nano: by auc_30 and depth_abs_rel together" in done.stdout
    validations = [line["step"] for line in read_jsonl(out / "validation.jsonl")]
    assert validations == [0, 1, 2]
    gains = [line for line in read_jsonl(out / "metrics.jsonl") if line["split"] == "guard"]
    assert [line["step"] for line in gains] == [1, 2]
    assert gains[-1]["gain_rotation_deg"] == -1
    assert not (out / "requeue").exists()
    assert not (out / "checkpoints" / "best").exists()
    again = run_trainer(shard_dir, out, *options, "guard=stop")
    assert again.returncode == 0, again.stderr
    assert "ended by guard=stop" in again.stdout
    on = run_trainer(shard_dir, out, *options, "guard=off", "max_steps=3")
    assert "step 3/3 objective" in on.stdout
    assert "WARNING" not in on.stdout


def test_the_guard_cannot_stop_what_it_cannot_tell(shard_dir, tmp_path):
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=1", "guard=stop")
    assert done.returncode == 1
    assert (
        "guard: stop needs at least 5 sequences to validate on, to tell harm from noise, and there are 1" in done.stderr
    )
    warned = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=1")
    assert "guard: 1 sequence to validate on cannot tell harm from noise, 5 are the least" in warned.stdout
