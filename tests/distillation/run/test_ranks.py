"""Every script gives on two ranks, with DDP and with FSDP2, what it gives in one process; and runs change ranks."""

import csv
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from distillation.models import load_model
from tests.helpers.ranks import Command, images_seen, models_read, on_ranks
from tests.helpers.updates import (
    SCRIPTS,
    argv_of,
    checkpoint_of,
    cut,
    distance,
    drop,
    gradients,
    images_of,
    run,
    script_of,
    seen_by,
)
from utils import UserError

STRATEGIES = ("ddp", "fsdp2")
CLIPPED = ("--gradient_clip", "0.1")
LORA = ("--lora_rank", "4", "--lora_alpha", "8")
FEW = ("--label_fraction", "0.05")
MOVING = ["--max_epochs", "3"]  # of five updates of 8 images each, or seven of 6


@pytest.fixture(scope="module")
def ended(forty_rooms, tiny_folder, tiny_teacher, tmp_path_factory):
    """What the runs of this file leave: of each script some in one process, some on two ranks with each strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOT_DATA_DIR", str(forty_rooms))
        patch.setenv("MAIN_ROOT_DATA_DIR", str(folder / "out"))
        argv = {name: argv_of(name, tiny_folder, tiny_teacher) for name in SCRIPTS}
        moving = [*trained(argv["baseline_depth"]), *MOVING]
        whole = images_of(seen_by("baseline_depth", [*moving, *cut(8, 1, "whole")]))
        run("baseline_depth", [*moving, *CLIPPED, *cut(2, 4, "one-through")])
        for name in SCRIPTS:
            for given in calls(name, argv[name], 8, 4, "one"):
                run(name, given)
        odd = trained(argv_of("baseline_depth", odd_student(tiny_folder, folder / "odd"), tiny_teacher))
        run("baseline_depth", [*odd, *FEW, *cut(8, 4, "one-before")])
        odd = [*argv_of("baseline_depth", folder / "odd", tiny_teacher), *FEW, "--load_checkpoint", "one-before"]
        run("baseline_depth", [*odd, *cut(8, 4, "one-odd")])
        for strategy in STRATEGIES:
            commands = [
                Command(script_of(name), [*given, "--strategy", strategy])
                for name in SCRIPTS
                for given in calls(name, argv[name], 8, 2, strategy)
            ]
            commands.append(
                Command(script_of("baseline_depth"), [*odd, *cut(8, 2, f"{strategy}-odd"), "--strategy", strategy])
            )
            commands += same_again("baseline_depth", moving, strategy, 2, 2)
            # Its map is no part of the student. The second rank's last micro-batch of an epoch is spare.
            workers = ["--num_workers", "1"]
            commands += same_again("feature", [*trained(argv["feature"]), *MOVING, *workers], strategy, 3, 1)
            if strategy == "ddp":  # two ranks, then one, then two again
                first = [*moving, *cut(4, 1, "moved"), "--strategy", "ddp"]
                commands.append(Command(script_of("baseline_depth"), first, 2, str(folder / "first")))
                on_ranks(folder / strategy, commands)
                second = [*moving, *cut(2, 4, "moved"), "--resume", "moved"]
                alone = Command(script_of("baseline_depth"), second, 16, str(folder / "second"))
                on_ranks(folder / "alone", [alone], n_ranks=1)
            else:
                last = [*moving, *cut(4, 1, "moved"), "--strategy", "fsdp2", "--resume", "moved"]
                commands.append(Command(script_of("baseline_depth"), last, None, str(folder / "third")))
                on_ranks(folder / strategy, commands)
        yield SimpleNamespace(out=folder / "out", whole=whole, folder=folder, start=load_model(str(tiny_folder)))


def odd_student(tiny_folder, folder):
    """One whose configuration says otherwise than its files: types of its parts, and that the output layer is tied."""
    student = load_model(str(tiny_folder))
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().flip(0))
    shutil.copytree(tiny_folder, folder)
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def trained(argv):
    """With rates above 0, at which weights move."""
    return [
        "1e-3" if before in ("--lr", "--vision_lr", "--map_lr") else text
        for before, text in zip(["", *argv], argv, strict=False)
    ]


def calls(name, argv, batch_size, accumulate, run_name):
    """The command lines of a script: its gradients with few labels, its weights after four updates; and with LoRA."""
    yield [*argv, *([] if name == "phase1" else FEW), *cut(batch_size, accumulate, run_name)]
    yield [*drop(trained(argv), "--max_epochs"), "--max_epochs", "2", *cut(batch_size, accumulate, f"{run_name}-moved")]
    if name == "phase1":
        yield [*argv, *cut(2, 4 * accumulate, f"{run_name}-small")]
    if name == "baseline_rgb7b":
        for flag in ("--vision_lr", "--vision_lr", "--lora_rank"):
            argv = drop(argv, flag)
        yield [*argv, *LORA, *cut(batch_size, accumulate, f"{run_name}-lora")]
        yield [*argv, *LORA, *cut(batch_size, accumulate, f"{run_name}-half"), "--precision", "bf16-mixed"]


def same_again(name, moving, strategy, batch_size, accumulate):
    """A run that goes through, and one that is stopped in its second epoch and goes on, both on two ranks."""
    argv = [*moving, *CLIPPED, "--strategy", strategy]
    whole, parts = ([*argv, *cut(batch_size, accumulate, f"{strategy}-{kind}")] for kind in ("through", "parts"))
    script = script_of(name)
    return [Command(script, whole), Command(script, parts, 13), Command(script, [*parts, "--resume", "auto"])]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_update_does_not_depend_on_the_number_of_ranks(name, strategy, ended):
    """Half of the images each; of the last 7 one process gets all and the other one none, and no image comes twice."""
    assert distance(gradients(ended.out, name, strategy), gradients(ended.out, name, "one")) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_count_not_what_the_configuration_says_of_them(strategy, ended):
    """And they come from another run's checkpoint."""
    before = checkpoint_of(ended.out, "baseline_depth", "one-before")["state_dict"]
    assert not torch.equal(before["student.lm_head.weight"], before["student.model.language_model.embed_tokens.weight"])
    own, alone = (gradients(ended.out, "baseline_depth", f"{run}-odd") for run in (strategy, "one"))
    assert len(alone) > len(gradients(ended.out, "baseline_depth", "one")) and distance(own, alone) < 1e-5


def test_weights_that_are_shared_out_are_read_by_the_first_rank_alone(ended):
    (first, second), both = (models_read(ended.folder / strategy) for strategy in ("fsdp2", "ddp"))
    assert first > len(SCRIPTS) and second == 0 and both[0] == both[1] > len(SCRIPTS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapters_train_alike_also_on_half_precision_weights(strategy, ended):
    for kind, most in (("lora", 1e-5), ("half", 1e-2)):
        own, alone = (gradients(ended.out, "baseline_rgb7b", f"{run}-{kind}") for run in (strategy, "one"))
        assert alone.norm() > 1e-3 and distance(own, alone) < most


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_after_four_updates_are_those_of_one_process(name, strategy, ended):
    one, ranks = (checkpoint_of(ended.out, name, f"{kind}-moved") for kind in ("one", strategy))
    assert one["global_step"] == ranks["global_step"] == 4
    assert moved_apart(one, ranks, ended.start) < 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name, updates", [("baseline_depth", 15), ("feature", 21)])
def test_a_stopped_run_goes_on_bit_by_bit(name, updates, strategy, ended):
    """On as many ranks, in its second epoch: all that trains, moments, schedule and counters at the end."""
    through, parts = (checkpoint_of(ended.out, name, f"{strategy}-{kind}") for kind in ("through", "parts"))
    assert parts["global_step"] == updates and moved_apart(through, parts, ended.start) == 0
    assert all(torch.equal(value, parts["state_dict"][key]) for key, value in through["state_dict"].items())
    assert any(key.startswith("hidden_map") for key in through["state_dict"]) == (name == "feature")
    for i, moments in through["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, parts["optimizer_states"][0]["state"][i][key]) for key, value in moments.items())
    for key in ("epoch", "lr_schedulers", "position", "loops"):
        assert parts[key] == through[key], key


def test_a_run_goes_on_with_other_numbers_of_ranks(ended):
    """Two ranks, then one, then two: inside of epochs, each image is read as often as by one process alone."""
    parts = [images_seen(ended.folder / part, n) for part, n in (("first", 2), ("second", 1), ("third", 2))]
    assert Counter(sum(parts, [])) == Counter(ended.whole) and len(ended.whole) == 3 * 39
    assert [len(part) for part in parts] == [16, 23 + 8, 31 + 39]
    whole, moved = (checkpoint_of(ended.out, "baseline_depth", kind) for kind in ("whole", "moved"))
    assert moved_apart(whole, moved, ended.start) < 1e-3
    for key in ("epoch", "global_step", "loops", "lr_schedulers"):
        assert moved[key] == whole[key], key


def moved_apart(one, other, start):
    """How far apart the weights of two checkpoints are, in units of what those of the first have moved."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    stock = {f"student.{name}": value for name, value in start.state_dict().items()}
    before, first, second = (
        torch.cat([state[name].flatten().double() for name in one["state_dict"] if name in stock])
        for state in (stock, one["state_dict"], other["state_dict"])
    )
    assert (first - before).norm() > 1e-2
    return ((second - first).norm() / (first - before).norm()).item()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_updates_and_shared_validations_are_those_of_one_process(strategy, ended):
    """Three validation batches, of which one rank has two, or two."""
    one, ranks = (checkpoint_of(ended.out, "baseline_depth", f"{kind}-through") for kind in ("one", strategy))
    assert moved_apart(one, ranks, ended.start) < 1e-3
    for kind in ("through", "moved"):
        alone, shared = (validations(ended.out, "baseline_depth", f"{run}-{kind}") for run in ("one", strategy))
        assert shared == pytest.approx(alone, rel=1e-5) and len(alone) in (2, 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_score_that_phase_1_is_chosen_by_is_that_of_one_process(strategy, ended):
    """Of three validation batches the second rank has one, and one that is spare."""
    alone, shared = (validations(ended.out, "phase1", f"{run}-small", "val/patch_cosine") for run in ("one", strategy))
    assert shared == pytest.approx(alone, rel=1e-5) and len(alone) == 1


def validations(out, name, run_name, score="val/ce"):
    logs = out / SCRIPTS[name][0] / "tensorboard_logs" / run_name / "metrics.csv"
    with open(logs, encoding="utf-8", newline="") as file:
        return [float(row[score]) for row in csv.DictReader(file) if row[score]]


def test_updates_of_another_size_are_refused(places_of_forty, tiny_folder, tiny_teacher):
    argv = argv_of("baseline_depth", tiny_folder, tiny_teacher)
    run("baseline_depth", [*argv, "--max_steps", "2", *cut(4, 1, "t")])
    two, three = (("--strategy", "ddp", "--devices", n) for n in "23")
    for more, advice in (
        (cut(4, 2, "t"), "8 on 1 .*give --batch_size 4 --accumulate_grad_batches 1"),
        (cut(3, 1, "t"), "3 on 1 .*give --batch_size 1 --accumulate_grad_batches 4"),
        ((*cut(4, 1, "t"), *two), "8 on 2 .*give --batch_size 2 --accumulate_grad_batches 1"),
        ((*cut(4, 1, "t"), *three), "12 on 3 .*use a number of devices that divides 4"),
    ):
        with pytest.raises(UserError, match=f"an update of it reads 4 images, here it would read {advice}"):
            run("baseline_depth", [*argv, *more, "--resume", "auto"])
