from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run_command

from train.engine.checkpoint import (
    CheckpointConfig,
    find_newest,
    keep,
    load,
    mark_best,
    save,
    step_file,
    steps_saved,
)


def content(value):
    return {"model": {"w": torch.full((3,), float(value))}, "step": value}


def test_latest_is_the_newest_and_old_ones_go(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, content(step), CheckpointConfig(every=1, keep=2, milestone=3))
    assert steps_saved(tmp_path) == [3, 6, 7]
    assert (tmp_path / "latest").resolve() == step_file(tmp_path, 7)
    assert find_newest(tmp_path) == step_file(tmp_path, 7)
    assert torch.equal(load(step_file(tmp_path, 7))["model"]["w"], torch.full((3,), 7.0))
    assert torch.load(tmp_path / "latest", weights_only=True)["step"] == 7


@pytest.mark.parametrize("damage", [0, 10, 500, "bit", "header"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog, damage):
    for step in (1, 2):
        save(tmp_path, step, content(step), CheckpointConfig(keep=2))
    newest = step_file(tmp_path, 2)
    data = bytearray(newest.read_bytes())
    if damage == "bit":  # in a weight: torch.load would not notice
        data[data.index(torch.full((3,), 2.0).numpy().tobytes()) + 2] ^= 1
    elif damage == "header":
        data[1] ^= 1
        data[-10] ^= 1
    else:
        del data[damage:]
    newest.write_bytes(data)
    assert find_newest(tmp_path) == step_file(tmp_path, 1)
    assert "is damaged" in caplog.text
    # The next one is kept, and pointed at, whatever its step.
    save(tmp_path, 2, content(2), CheckpointConfig(keep=1))
    assert (tmp_path / "latest").resolve() == find_newest(tmp_path) == step_file(tmp_path, 2)


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert find_newest(tmp_path) is None
    save(tmp_path, 1, content(1), CheckpointConfig())
    step_file(tmp_path, 1).write_bytes(b"")
    for _ in range(2):  # what the first start has set aside is still there for the second to see
        with pytest.raises(ValueError, match=r"none of the checkpoints is whole \(there is latest, step-00000001\.pt"):
            find_newest(tmp_path)
    step_file(tmp_path, 1).with_suffix(".pt.damaged").unlink()
    with pytest.raises(ValueError, match=r"there is latest"):
        find_newest(tmp_path)


def test_a_damaged_checkpoint_goes_once_a_whole_one_of_as_many_steps_is_there(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, content(step), CheckpointConfig(keep=5))
    step_file(tmp_path, 2).write_bytes(b"x")
    assert find_newest(tmp_path) == step_file(tmp_path, 1)
    save(tmp_path, 1, content(1), CheckpointConfig(keep=5))
    assert step_file(tmp_path, 2).with_suffix(".pt.damaged").exists()
    save(tmp_path, 2, content(2), CheckpointConfig(keep=5))
    assert not list(tmp_path.glob("*.damaged"))


def test_copies_that_somebody_made_are_no_checkpoints(tmp_path):
    save(tmp_path, 7, content(7), CheckpointConfig())
    for name in ("step-00000012 (copy).pt", "step-.pt", "step-12.pt", "step-00000012.pt.bak"):
        (tmp_path / name).write_bytes(b"x")
    assert steps_saved(tmp_path) == [7]
    assert find_newest(tmp_path) == step_file(tmp_path, 7)
    step_file(tmp_path, 7).unlink()
    with pytest.raises(ValueError, match="none of the checkpoints is whole"):
        find_newest(tmp_path)


def test_killed_before_latest_was_linked_it_is_linked_by_the_next_start(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, content(step), CheckpointConfig())
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000001.pt")
    assert find_newest(tmp_path, repair=False) == step_file(tmp_path, 2)
    assert (tmp_path / "latest").resolve() == step_file(tmp_path, 1)
    assert find_newest(tmp_path) == step_file(tmp_path, 2)
    assert (tmp_path / "latest").resolve() == step_file(tmp_path, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    save(tmp_path, 1, content(1), CheckpointConfig())
    with pytest.raises(ValueError, match=r"step 2: 1 weights are not finite any more \(w\)"):
        save(tmp_path, 2, content(value), CheckpointConfig())
    assert find_newest(tmp_path) == step_file(tmp_path, 1)
    assert steps_saved(tmp_path) == [1]


def test_among_ten_thousand_checkpoints_the_newest_is_found_at_once(tmp_path):
    save(tmp_path, 1, content(1), CheckpointConfig())
    for step in range(2, 10_001):
        step_file(tmp_path, step).hardlink_to(step_file(tmp_path, 1))
    assert find_newest(tmp_path) == step_file(tmp_path, 10_000)
    save(tmp_path, 10_001, content(2), CheckpointConfig(keep=2))
    assert steps_saved(tmp_path) == [10_000, 10_001]


KILLED_IN_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from train.engine.checkpoint import CheckpointConfig, save
stages, stop = 0, int(sys.argv[2])
def killed_before(function):
    def call(*arguments, **options):
        global stages
        stages += 1
        if stages == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
torch.save = killed_before(torch.save)
os.fsync = killed_before(os.fsync)
for name in ("open", "replace", "symlink_to", "unlink", "mkdir"):
    setattr(Path, name, killed_before(getattr(Path, name)))
save(Path(sys.argv[1]), 3, {"model": {"w": torch.full((3,), 3.0)}, "step": 3}, CheckpointConfig(keep=1))
print("saved in", stages)
"""


def test_a_save_that_is_killed_at_any_stage_leaves_a_loadable_latest(tmp_path):
    saved = []
    for stop in range(1, 12):
        folder = tmp_path / str(stop)
        for step in (1, 2):
            save(folder, step, content(step), CheckpointConfig(keep=2))
        done = run_command("python", "-c", KILLED_IN_SAVE, folder, stop)
        assert done.returncode in (0, -9), done.stderr
        saved.append(done.returncode == 0)
        step = torch.load(folder / "latest", weights_only=True)["step"]
        assert step in (2, 3)
        assert load(find_newest(folder))["step"] >= step
        assert not list(folder.glob("*.tmp"))  # find_newest cleans up
    assert saved == sorted(saved)  # each stage was one of those before the end
    assert saved.index(True) >= 6


class Payload:
    def __reduce__(self):
        return (print, ("owned",))


def test_a_malicious_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"model": Payload()}, step_file(tmp_path, 1))
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        load(find_newest(tmp_path))
    assert "owned" not in capsys.readouterr().out


FILL_THE_DISK = """
import resource, sys, torch
from pathlib import Path
from train.engine.checkpoint import CheckpointConfig, save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save(Path(sys.argv[1]), 2, {"model": {"w": torch.rand(10**6)}}, CheckpointConfig())
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_one_whole(tmp_path):
    save(tmp_path, 1, content(1), CheckpointConfig())
    done = run_command("python", "-c", FILL_THE_DISK, tmp_path)
    assert "step-00000002.pt: cannot be written, is the disk full?" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001.pt"]
    (tmp_path / "step-00000002.tmp").write_bytes(b"a kill leaves this")
    assert find_newest(tmp_path) == step_file(tmp_path, 1)
    assert not (tmp_path / "step-00000002.tmp").exists()


def test_best_stays_until_another_is_better(tmp_path):
    config = CheckpointConfig(keep=1)
    for step in (1, 2):
        save(tmp_path, step, content(step), config)
    mark_best(tmp_path, 2, config)
    for step in (3, 4):
        save(tmp_path, step, content(step), config)
    assert steps_saved(tmp_path) == [2, 4]
    assert load(tmp_path / "best")["step"] == 2
    mark_best(tmp_path, 4, config)
    assert steps_saved(tmp_path) == [4]
    mark_best(tmp_path, None, config)
    assert not (tmp_path / "best").is_symlink()
    mark_best(tmp_path, 9, config)  # a step without a checkpoint
    assert not (tmp_path / "best").is_symlink()
    assert steps_saved(tmp_path) == [4]
    mark_best(tmp_path / "nothing", None, config)


def filled(folder, steps, config):
    for step in steps:
        save(folder, step, {"model": {"w": torch.tensor([float(step)])}}, config)


@pytest.mark.parametrize("name", ["best", "latest"])
def test_links_that_copying_made_files_are_links_again(tmp_path, name):
    """Else the best would go as soon as another is saved."""
    config = CheckpointConfig(keep=1)
    filled(tmp_path, (1, 2), CheckpointConfig(keep=2))
    mark_best(tmp_path, 1, config)
    content = (tmp_path / name).read_bytes()
    target = (tmp_path / name).readlink()
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content)
    assert find_newest(tmp_path, repair=False) == tmp_path / "step-00000002.pt"
    assert not (tmp_path / name).is_symlink()
    assert find_newest(tmp_path) == tmp_path / "step-00000002.pt"
    assert (tmp_path / name).readlink() == target
    filled(tmp_path, (3, 4), config)
    assert (tmp_path / "step-00000001.pt").exists()


def test_a_file_in_the_place_of_a_link_is_not_overwritten(tmp_path):
    (tmp_path / "latest").write_bytes(b"of another run")
    with pytest.raises(ValueError, match="latest: a file, where the trainer keeps a link to one; name it step-"):
        find_newest(tmp_path)
    assert (tmp_path / "latest").read_bytes() == b"of another run"


def test_what_is_kept_stays_under_other_settings(tmp_path):
    filled(tmp_path, range(1, 6), CheckpointConfig(keep=1, milestone=2))
    for step in (2, 4):
        keep(tmp_path, step)
    filled(tmp_path, range(6, 9), CheckpointConfig(keep=1))
    assert steps_saved(tmp_path) == [2, 4, 8]


def test_a_copy_that_has_lost_its_links_loses_nothing_of_what_they_kept(tmp_path, caplog):
    filled(tmp_path, range(1, 5), CheckpointConfig(keep=4))
    for link in (path for path in tmp_path.iterdir() if path.is_symlink()):
        link.unlink()
    assert find_newest(tmp_path, repair=False) == step_file(tmp_path, 4)
    assert find_newest(tmp_path) == step_file(tmp_path, 4)
    assert "its links are gone" in caplog.text
    filled(tmp_path, (5, 6), CheckpointConfig(keep=1))
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 6]


def test_what_a_link_of_the_users_names_in_full_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    filled(folder, (1, 2), CheckpointConfig(keep=2))
    (folder / "favorite").symlink_to(tmp_path / "run" / "step-00000001.pt")
    (tmp_path / "disk").mkdir()
    step_file(folder, 2).rename(tmp_path / "disk" / "moved.pt")
    step_file(folder, 2).symlink_to(tmp_path / "disk" / "moved.pt")
    keep(folder, 2)
    filled(folder, (3, 4), CheckpointConfig(keep=1))
    assert steps_saved(folder) == [1, 2, 4]
