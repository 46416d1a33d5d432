"""Moments in 8 bits (bitsandbytes' CPU code): a training like that in 32, in checkpoints that are continued."""

import importlib.util

import pytest
import torch

from distillation import models
from distillation.models import MINIATURE_STUDENT, load_model
from distillation.run.checkpoints import read_checkpoint
from tests.helpers.training import interrupted, train
from utils import UserError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (requirements-optional.txt)"
)


@needs_bitsandbytes
def test_moments_in_8_bits_train_alike_and_go_on_bit_by_bit(places):
    """A quarter of the memory for the moments of large weights, and nearly the weights of 32 bits in the end."""
    train("baseline_depth", MINIATURE_STUDENT, "--run_name", "whole")
    eight = ("--optimizer_bits", "8")
    train("baseline_depth", MINIATURE_STUDENT, *eight, "--run_name", "through")
    with interrupted(8):
        train("baseline_depth", MINIATURE_STUDENT, *eight, "--run_name", "cut")
    train("baseline_depth", MINIATURE_STUDENT, *eight, "--run_name", "cut", "--resume", "auto")
    folder = places / "baseline_depth/checkpoints"
    stock = load_model(MINIATURE_STUDENT).state_dict()
    whole, through, cut = (read_checkpoint(folder / run / "last.ckpt") for run in ("whole", "through", "cut"))
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in through["state_dict"].items())
    states = through["optimizer_states"][0]["state"].values()
    packed = [part for state in states for part in state.values() if isinstance(part, dict)]
    moments = [part[name] for part in packed for name in ("state1", "state2")]
    in_8_bits = sum(moment.numel() for moment in moments if moment.dtype == torch.uint8)
    assert in_8_bits > 1.8 * load_model(MINIATURE_STUDENT).num_parameters()
    moved = sum((start - whole["state_dict"][f"student.{name}"]).norm() ** 2 for name, start in stock.items()) ** 0.5
    apart = sum((value - through["state_dict"][name]).norm() ** 2 for name, value in whole["state_dict"].items()) ** 0.5
    assert 0 < apart < 0.3 * moved
    with pytest.raises(UserError, match="was started with optimizer_bits 8, now it is 32"):
        train("baseline_depth", MINIATURE_STUDENT, "--run_name", "cut", "--resume", "auto", "--max_epochs", "3")


def test_8_bits_need_bitsandbytes_and_whole_moments(places, tiny_folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train("baseline_depth", tiny_folder, "--optimizer_bits", "8", "--strategy", "fsdp2")
    assert "--optimizer_bits 8: such moments cannot be shared out" in capsys.readouterr().err
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--optimizer_bits 8: needs bitsandbytes, .* requirements-optional.txt"):
        train("baseline_depth", tiny_folder, "--optimizer_bits", "8")
