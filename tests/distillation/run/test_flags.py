"""Flags: defaults of the miniature, and what is refused before anything starts."""

import pytest

from tests.helpers.training import BASELINES, train
from utils import UserError, load_script


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--subset_percentage", "0"), "--subset_percentage"),
        (("--subset_percentage", "50"), "--subset_percentage"),
        (("--batch_size", "0"), "--batch_size"),
        (("--max_steps", "0"), "--max_steps"),
        (("--num_workers", "-1"), "--num_workers"),
        (("--warmup_share", "1"), "--warmup_share"),
        (("--gradient_clip", "-1"), "--gradient_clip"),
        (("--lr", "nan"), "--lr"),
        (("--strategy", "fsdp"), "use --strategy fsdp2"),
        (("--depth_encoding", "rainbow"), "--depth_encoding"),
        (("--image_tokens", "many"), "--image_tokens"),
        (("--resume", "last.ckpt", "--load_checkpoint"), "--resume"),
        (("--augmentation", "--picture_cache"), "--picture_cache"),
        (("--depth_degradation", "1.5"), "--depth_degradation: 1.5: give a share"),
        (("--depth_degradation", "-0.1"), "--depth_degradation: -0.1: give a share"),
        (("--depth_degradation", "nan"), "--depth_degradation: nan: give a share"),
        (("--depth_degradation", "0.5", "--picture_cache"), "leave out --picture_cache"),
        (("--no_such_flag",), "--no_such_flag"),
    ],
)
def test_bad_flags_are_named(more, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script(BASELINES["baseline_depth"]).parse_args(list(more))
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--vision_lr", "1e-6"), "leaves the vision tower frozen"),
        (("--lora_rank", "0"), "give --lr and --vision_lr"),
        (("--lora_rank", "0", "--vision_lr", "1e-6", "--lora_alpha", "8"), "no --lora_alpha"),
        (("--lora_rank", "-1"), "--lora_rank"),
    ],
)
def test_flags_that_lora_would_ignore_are_refused(more, complaint, capsys):
    with pytest.raises(SystemExit):
        load_script(BASELINES["baseline_rgb7b"]).parse_args(list(more))
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--strategy", "nonsense"), ("--precision", "7-true"), ("--devices", "many")])
def test_what_the_machine_cannot_do_is_said_before_a_model_is_loaded(places, tmp_path, more):
    with pytest.raises(UserError, match=f"{more[0]} {more[1]}.*not possible here"):
        train("baseline_depth", tmp_path / "no model here", *more)
    assert not places.exists()


def test_miniature_changes_defaults_and_explicit_flags_win():
    parse_args = load_script(BASELINES["baseline_depth"]).parse_args
    real, mini, own = parse_args([]), parse_args(["--miniature"]), parse_args(["--lr", "0.5", "--miniature"])
    assert real.image_tokens == "anyres" and mini.image_tokens == "one_tile"
    assert mini.student_name.endswith("dataset/miniature/student") and own.lr == 0.5 != mini.lr
    assert (real.picture_cache, mini.picture_cache) == (False, True)
    assert not parse_args(["--miniature", "--augmentation"]).picture_cache
    assert not parse_args(["--miniature", "--no-picture_cache"]).picture_cache
