"""Exported students: stock transformers loads them, and they say how they see."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, LlavaOnevisionForConditionalGeneration

from distillation.export import DEPTH_CONSTANTS, DESCRIPTION, export_model, read_description
from distillation.models import add_lora, load_model
from evaluation.student import Student
from tests.helpers.evaluation import evaluate
from tests.helpers.training import BASELINES, distill, flags, train
from utils import UserError, load_script


@pytest.mark.parametrize("lora", [False, True])
def test_export_loads_with_stock_transformers(tiny_folder, processor, tmp_path, lora):
    torch.manual_seed(2)
    model = load_model(str(tiny_folder))
    if lora:
        model = add_lora(model, rank=2, alpha=4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    model.eval()
    ids = torch.tensor([[3, 5, 7, 11]])
    expected = model(input_ids=ids).logits
    export_model(model, processor, tmp_path / "export", SAID)
    stock, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(stock.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").get_vocab() == processor.tokenizer.get_vocab()
    assert AutoImageProcessor.from_pretrained(tmp_path / "export").size == processor.image_processor.size
    # AutoProcessor wants all three parts, and torchvision for the last one: only its files can be looked at here.
    video = json.loads((tmp_path / "export/video_preprocessor_config.json").read_text())
    assert video["video_processor_type"] == "LlavaOnevisionVideoProcessor"
    assert video["size"] == dict(processor.image_processor.size)


def test_an_export_says_how_it_sees_and_where_it_comes_from(places, tiny_folder, tiny_teacher):
    export = places / "export"
    distill("logit", tiny_folder, tiny_teacher, "--depth_encoding", "normals", "--export", str(export))
    said = json.loads((export / DESCRIPTION).read_text())
    assert said == read_description(str(export))
    assert said["sees"] == {
        "modality": "depth", "depth_encoding": "normals", "depth_source": "raw", "image_tokens": "one_tile",
    }  # fmt: skip
    assert said["depth"]["largest_m"] == 8 and said["depth"]["unit"] == "metres" and said["dtype"] == "float32"
    assert 0.5 < said["camera"]["focal_share"] < 2 and -90 < said["camera"]["tilt_degrees"] < 90
    assert said["prompt"]["after_the_image"].count("{question}") == 1
    names = ["/".join(folder.parts[-2:]) for folder in (tiny_teacher, tiny_folder)]  # nobody's folders are published
    assert [said["teacher"], said["student_name"]] == names
    assert 0 <= said["validation"]["val/exact_match"] <= 1 and said["checkpoint"].startswith("t/best-epoch")


def test_training_reads_how_an_export_sees(places, tiny_folder, tiny_teacher, capsys):
    export = str(places / "export")
    train("baseline_depth", tiny_folder, "--max_epochs", "1", "--depth_encoding", "turbo", "--export", export)
    script = load_script(BASELINES["baseline_depth"])
    assert script.parse_args(["--student_name", export]).depth_encoding == "turbo"
    assert script.parse_args(["--student_name", export]).image_tokens == "one_tile"
    for argv, complaint in (
        (("--depth_encoding", "grey"), f"--depth_encoding grey: {export} was trained with turbo"),
        (("--image_tokens", "anyres"), f"--image_tokens anyres: {export} was trained with one_tile"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.parse_args(["--student_name", export, *argv])
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        distill("logit", tiny_folder, export)
    assert "sees depth, a teacher sees RGB" in capsys.readouterr().err
    script = load_script(BASELINES["baseline_rgb05b"])  # goes on from what a depth student knows
    assert script.parse_args(flags(export)).student_name == export


def test_an_export_in_another_number_format(places, tiny_folder, capsys):
    export = ("--export", str(places / "x"))
    train("baseline_depth", tiny_folder, "--max_epochs", "1", *export, "--export_dtype", "bfloat16")
    assert load_model(str(places / "x"), dtype="auto").dtype == torch.bfloat16
    assert read_description(str(places / "x"))["dtype"] == "bfloat16"
    with pytest.raises(SystemExit, match="2"):
        train("baseline_depth", tiny_folder, "--export_dtype", "bfloat16")
    assert "--export_dtype goes with --export" in capsys.readouterr().err


SAID = {
    "format": 1,
    "sees": {"modality": "depth", "depth_encoding": "grey", "depth_source": "raw", "image_tokens": "one_tile"},
    "depth": dict(DEPTH_CONSTANTS),
    "camera": {"focal_share": 0.7, "tilt_degrees": None},
    "miniature": True,
    "trained_by": "distillation/baseline_depth/train.py",
}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "does not say how the student sees"),
        ({"sees": {"x": "y"}}, "does not say how the student sees"),
        ({"sees": 3}, "does not say how the student sees"),
        (
            {"sees": SAID["sees"] | {"depth_encoding": "rainbow"}},
            "says depth_encoding rainbow, and this code knows metric",
        ),
        ({"sees": SAID["sees"] | {"image_tokens": ["x"]}}, "says image_tokens"),
        ({"depth": {"largest_m": 10.0}}, "another depth encoding"),
        ({"camera": None}, "what camera"),
        ({"camera": {"focal_share": "abc"}}, "what camera"),
        ({"camera": {"focal_share": -1.0}}, "what camera"),
        ({"camera": {"focal_share": 1.0, "tilt_degrees": [3]}}, "what camera"),
        ({"miniature": "no"}, "how the student was trained"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path, text, complaint):
    (tmp_path / DESCRIPTION).write_text(text if isinstance(text, str) else json.dumps(SAID | text))
    with pytest.raises(UserError, match=f"{tmp_path / DESCRIPTION}: .*{complaint}"):
        read_description(str(tmp_path))
    (tmp_path / DESCRIPTION).write_text(json.dumps(SAID))
    assert read_description(str(tmp_path)) == SAID


def test_an_export_that_lost_its_description_is_no_stock_model(places, tiny_folder):
    export = places / "export"
    train("baseline_depth", tiny_folder, "--max_epochs", "1", "--export", str(export))
    modes = {path.name: path.stat().st_mode for path in export.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    (export / DESCRIPTION).unlink()
    with pytest.raises(UserError, match="student.json: is missing, so nobody knows what this student sees"):
        Student.load(str(export))
    with pytest.raises(UserError, match="student.json: is missing"):
        evaluate(places / "results", "--model_id", str(export))


def test_a_description_of_another_version_is_refused(tmp_path):
    (tmp_path / DESCRIPTION).write_text(json.dumps(SAID | {"format": 0}))
    with pytest.raises(UserError, match="is of format 0, this code reads 1; export it again"):
        read_description(str(tmp_path))
    assert read_description("llava-hf/some-hub-id") is None
