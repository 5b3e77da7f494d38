from __future__ import annotations

import pytest
import torch
from conftest import run_command

from train.checkpoint import CheckpointConfig, find_newest, load, save, step_file, steps_saved


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
    with pytest.raises(ValueError, match="none of the 1 checkpoints is whole"):
        find_newest(tmp_path)


FILL_THE_DISK = """
import resource, sys, torch
from pathlib import Path
from train.checkpoint import CheckpointConfig, save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save(Path(sys.argv[1]), 2, {"model": torch.rand(10**6)}, CheckpointConfig())
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
