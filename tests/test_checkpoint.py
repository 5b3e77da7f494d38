from __future__ import annotations

import pytest
import torch

from train.checkpoint import CheckpointConfig, load_newest, save, step_file, steps_saved


def content(value):
    return {"model": {"w": torch.full((3,), float(value))}, "step": value}


def test_latest_is_the_newest_and_old_ones_go(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, content(step), CheckpointConfig(every=1, keep=2, milestone=3))
    assert steps_saved(tmp_path) == [3, 6, 7]
    assert (tmp_path / "latest").resolve() == step_file(tmp_path, 7)
    path, loaded = load_newest(tmp_path)
    assert path == step_file(tmp_path, 7)
    assert torch.equal(loaded["model"]["w"], torch.full((3,), 7.0))
    assert torch.load(tmp_path / "latest", weights_only=True)["step"] == 7


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog, size):
    for step in (1, 2):
        save(tmp_path, step, content(step), CheckpointConfig(keep=2))
    newest = step_file(tmp_path, 2)
    newest.write_bytes(newest.read_bytes()[:size])
    _, loaded = load_newest(tmp_path)
    assert loaded["step"] == 1
    assert "is damaged" in caplog.text


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert load_newest(tmp_path) is None
    save(tmp_path, 1, content(1), CheckpointConfig())
    step_file(tmp_path, 1).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints can be read"):
        load_newest(tmp_path)


def test_an_interrupted_save_leaves_the_last_one_whole(tmp_path, monkeypatch):
    save(tmp_path, 1, content(1), CheckpointConfig())

    def fails(what, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, content(2), CheckpointConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001.pt"]
    (tmp_path / "step-00000002.tmp").write_bytes(b"a kill leaves this")
    _, loaded = load_newest(tmp_path)
    assert loaded["step"] == 1
    assert not (tmp_path / "step-00000002.tmp").exists()
