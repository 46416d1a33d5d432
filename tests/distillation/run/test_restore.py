"""A run that goes on from a checkpoint whose training state was changed: refused before it is taken over."""

import pytest
import torch

from tests.helpers.hostile import TAMPERED_STATE
from tests.helpers.training import train
from utils import UserError, checksummed_path

SHORT = (
    "batch negative",
    "loop's batch a text",
    "moment of another shape",
    "schedule's method replaced",
    "callbacks a list",
)


def test_tampered_training_state_is_not_resumed(places, tiny_folder):
    train("baseline_depth", tiny_folder, "--max_steps", "2")
    path = places / "baseline_depth/checkpoints/t/last.ckpt"
    good = torch.load(path, weights_only=True)
    for name in SHORT:
        with checksummed_path(path) as part:
            torch.save(good, part)
        checkpoint = torch.load(path, weights_only=True)
        TAMPERED_STATE[name](checkpoint)
        with checksummed_path(path) as part:
            torch.save(checkpoint, part)
        with pytest.raises(UserError, match="--resume .*last.ckpt: .*(it was changed|--load_checkpoint)"):
            train("baseline_depth", tiny_folder, "--max_steps", "4", "--resume", str(path))
