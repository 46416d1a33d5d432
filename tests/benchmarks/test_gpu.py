"""The measurement of a GPU, on the miniature's models and this machine's device."""

import json

import pytest
import torch

from distillation.cost import build
from utils import UserError, load_script


def test_every_script_is_measured_beside_its_plan(tmp_path, capsys, monkeypatch):
    gpu = load_script("benchmarks/gpu.py")
    monkeypatch.setattr(gpu, "STEPS", 1)
    gpu.main(gpu.parse_args(["--tiny", "--output", str(tmp_path)]))
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    names = [row["what"] for row in record["rows"]]
    assert set(gpu.SCRIPTS) < set(names) and {"the teacher's pass", "scoring"} < set(names)
    assert all(row["seconds"] > 0 and row["tflop"] > 0 and row["gib"] > 0 for row in record["rows"])
    assert record["losses"].keys() == gpu.SCRIPTS.keys() and max(record["losses"].values()) < 1e-4
    table = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == len(names) + 2 and table == capsys.readouterr().out[: len(table)]


def test_a_card_that_is_too_small_for_a_row_has_the_others(tmp_path, monkeypatch):
    """What is measured is written at once, so that nothing that comes later can lose it."""
    gpu = load_script("benchmarks/gpu.py")

    def build_or_fail(flags, path, load):
        if path.parent.name == "baseline_rgb7b":
            raise torch.OutOfMemoryError
        if path.parent.name == "phase1":
            raise KeyboardInterrupt
        return build(flags, path, load)

    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "build", build_or_fail)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(gpu.parse_args(["--tiny", "--output", str(tmp_path)]))
    rows = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in rows] == ["baseline_depth", "baseline_rgb05b", "baseline_rgb7b"]
    assert [row["seconds"] is None for row in rows] == [False, False, True] and rows[2]["planned_gib"] > 0
    assert "| baseline_rgb7b | out of memory |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_true_sizes_need_a_gpu(tmp_path):
    gpu = load_script("benchmarks/gpu.py")
    with pytest.raises(UserError, match="no CUDA GPU is here; --tiny"):
        gpu.main(gpu.parse_args(["--output", str(tmp_path)]))
