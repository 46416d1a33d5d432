"""Model folders of strangers: no code runs, no memory is wasted, one line says why."""

import shutil

import pytest

from dataset.inputs.processor import load_processor
from distillation.models import load_model
from tests.helpers.hostile import ADVICE, MODEL_FOLDERS
from utils import UserError

SHORT = {
    "pickled payload": "only pytorch_model.bin, which could run code",
    "code in config": "config.json asks to run Python code",
    "code in image processor": "processor_config.json asks to run Python code",
    "adapter of another model": "would load another model",
    "nested config": "config.json: not valid JSON",
    "another model type": "is of a llama model",
    "hidden_size 10.*9": "text_config.hidden_size 1e.09; no model is that large",
    "vocabulary 10.*6": "describes a model of .* weights or more",
    "grids of 10.*6": "image processor does not fit",
    "template that reaches for code": "chat template do not fit",
    "index of files elsewhere": "names files that are not in this folder",
}


@pytest.mark.parametrize(("name", "complaint"), SHORT.items())
def test_hostile_folders_are_refused(tiny_folder, tmp_path, name, complaint):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    MODEL_FOLDERS[name.replace(".*", "**")](folder)
    with pytest.raises(UserError, match=complaint) as refused:
        load_processor(str(folder))
        load_model(str(folder))
    assert not any(words in str(refused.value) for words in ADVICE)
    assert not (folder / "RAN").exists()


def test_a_name_that_no_file_can_have_is_refused():
    with pytest.raises(UserError, match="no such folder, and not to be had from the hub"):
        load_model("x" * 5000)
