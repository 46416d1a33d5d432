"""Checkpoint files: whole or not there, checked when read, nothing foreign."""

from pathlib import Path

import pytest
import torch

from distillation.run.checkpoints import SafeCheckpointIO, read_checkpoint
from tests.helpers.training import RECORD
from utils import UserError


def test_finished_files_survive_a_failing_write(tmp_path):
    """A write that fails half-way leaves the old checkpoint, its checksum and no litter."""
    path, good = tmp_path / "last.ckpt", {"state_dict": {"student.w": torch.ones(3)}, "hyper_parameters": RECORD}
    io = SafeCheckpointIO()
    io.save_checkpoint(good, path)
    with pytest.raises(AttributeError):
        io.save_checkpoint(good | {"cannot be stored": lambda: None}, path)
    with pytest.raises(UserError, match="not finite"):
        io.save_checkpoint({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["student.w"], torch.ones(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(
        {"state_dict": {"student.w": torch.arange(1000.0)}, "hyper_parameters": RECORD}, path
    )
    data = path.read_bytes()
    for offset in range(50, len(data), len(data) // 20):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)
        path.write_bytes(data[:offset])
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)


def test_foreign_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "other.ckpt")
    torch.save({"x": Path("a")}, tmp_path / "pickle.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for name in ("other", "pickle", "text", "absent"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
