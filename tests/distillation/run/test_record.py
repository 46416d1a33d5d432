"""What a checkpoint records: a tampered one is refused where it is read."""

import pytest
import torch

from distillation.models import add_lora, load_model
from distillation.run.checkpoints import read_checkpoint
from tests.helpers.hostile import ADVICE, TAMPERED, Payload
from tests.helpers.training import RECORD
from utils import UserError

# The others are of the right type; the model that is made by the record tells them.
WITH_THE_MODEL = (
    "student_name of a missing folder",
    "a weight too large",
    "a weight of 10**12 values",
    "a weight missing",
)


@pytest.mark.parametrize("name", [name for name in TAMPERED if name not in WITH_THE_MODEL])
def test_tampered_checkpoints_are_refused(tmp_path, name):
    checkpoint = {"hyper_parameters": RECORD | {"lora_rank": 2, "lora_alpha": 4}}
    checkpoint["state_dict"] = {"student.a": torch.ones(2), "student.b": torch.ones(3)}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["seed"] == 0
    TAMPERED[name](checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="a.ckpt: "):
        read_checkpoint(tmp_path / "a.ckpt")


def test_older_records_lack_what_was_added_later(tmp_path):
    torch.save({"hyper_parameters": RECORD, "state_dict": {"student.a": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert "divergence" not in read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]


def test_code_never_runs_and_no_advice_to_run_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"hyper_parameters": RECORD, "state_dict": Payload(tmp_path / "RAN")}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds objects that could run code") as refused:
        read_checkpoint(tmp_path / "a.ckpt")
    assert not any(words in str(refused.value) for words in ADVICE) and not (tmp_path / "RAN").exists()


def test_a_rank_beyond_the_width_is_refused(tiny_folder):
    with pytest.raises(UserError, match="lora_rank 1000000: the language model is 16 wide"):
        add_lora(load_model(str(tiny_folder)), rank=10**6, alpha=1)
