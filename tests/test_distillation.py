"""The five distillation scripts and the teacher cache, on a small world with tiny models."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs import pictures
from dataset.inputs.pictures import ImageSettings, valid_share
from dataset.inputs.processor import load_processor
from dataset.inputs.prompts import collate_prompts, pack_questions
from dataset.inputs.sampler import ImageOrder
from dataset.questions.rows import withhold_labels
from distillation import teacher as teacher_module
from distillation import teacher_cache
from distillation.decoding import greedy_answers
from distillation.forward import answer_logits, image_features, overview_patches, tower_features
from distillation.models import load_model, set_trainable
from distillation.run import data as run_data
from distillation.run.checkpoints import read_checkpoint
from distillation.run.folders import start_run
from distillation.teacher import same_recording
from tests.test_training import flags, interrupted, load_script
from tests.test_training import train as train_baseline
from utils import UserError

TROUBLE = "knowledge_distillation7b_double_trouble"
SCRIPTS = {
    "phase1": f"{TROUBLE}/phase1",
    "phase2": f"{TROUBLE}/phase2",
    "phase3": f"{TROUBLE}/phase3",
    "feature": "knowledge_distillation7b_feature_based",
    "logit": "knowledge_distillation7b_logit_based",
}


def train(name, tiny_folder, tiny_teacher, *more):
    script = load_script(f"distillation/{SCRIPTS[name]}/train_online_kd.py")
    argv = flags(tiny_folder, "--teacher_name", str(tiny_teacher), *more)
    if name == "phase1":  # it has no --lr, only the tower trains
        del argv[argv.index("--lr") : argv.index("--lr") + 2]
    script.main(script.parse_args(argv))


def data_module(world, tiny_folder, **options):
    data = SUNRGBDDataModule(
        root=world,
        processor=load_processor(str(tiny_folder)),
        student=ImageSettings("depth", image_tokens="one_tile"),
        batch_size=4,
        **options,
    )
    data.setup()
    return data


def teacher_of(data, tiny_folder, tiny_teacher, *more):
    script = load_script(f"distillation/{SCRIPTS['logit']}/train_online_kd.py")
    args = script.parse_args(flags(tiny_folder, *(more or ("--teacher_name", str(tiny_teacher)))))
    return teacher_module.open_teacher(args, data, start_run(args, script.__file__, data.student))


def live_teacher(data, tiny_teacher, groups):
    model, images = load_model(str(tiny_teacher)).eval(), ImageSettings("rgb", image_tokens="one_tile")
    return teacher_cache.LiveTeacher(model, data.processor, data.root, images, "32-true", groups)


# what trains


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (dict(vision=True, projector=False, language=False), {"vision_tower"}),
        (
            dict(vision=False, projector=True, language=True),
            {"multi_modal_projector", "image_newline", "language_model"},
        ),
    ],
)
def test_trainable_parts(tiny_folder, parts, expected):
    model = load_model(str(tiny_folder))
    set_trainable(model, **parts)
    trains = {name.removeprefix("model.").split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == expected
    assert not any("post_layernorm" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_three_phases_hand_over_and_move_only_their_parts(places, tiny_folder, tiny_teacher, capsys):
    stock = load_model(str(tiny_folder)).state_dict()
    weights = {}
    further = ("--load_checkpoint", "--teacher_questions", "2")
    for name, more in (("phase1", ()), ("phase2", further), ("phase3", further)):
        train(name, tiny_folder, tiny_teacher, *more)
        (best,) = (places / SCRIPTS[name] / "checkpoints/t").glob("best*.ckpt")
        state = read_checkpoint(best)["state_dict"]
        assert all(key.startswith("student.") for key in state)
        weights[name] = {key.removeprefix("student."): value for key, value in state.items()}

    def moved(before, after):
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        return {key.removeprefix("model.").split(".")[0] for key in changed} - {"lm_head"}

    assert moved(stock, weights["phase1"]) == {"vision_tower"}
    assert moved(weights["phase1"], weights["phase2"]) == {"multi_modal_projector", "image_newline", "language_model"}
    assert moved(weights["phase2"], weights["phase3"]) >= {"vision_tower", "multi_modal_projector", "language_model"}
    logged = (places / SCRIPTS["phase3"] / "tensorboard_logs/t/metrics.csv").read_text().splitlines()[0]
    for term in ("ce", "kl", "patch", "contrastive", "contrastive_accuracy", "contrastive_chance", "corrected"):
        assert f"train/{term}" in logged.split(",")
    for term in ("student_entropy", "teacher_entropy", "teacher_ce"):
        assert f"train/{term}" in logged.split(",")
    assert "starting from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["feature", "logit"])
def test_single_stage_strategies(places, tiny_folder, tiny_teacher, name):
    train(name, tiny_folder, tiny_teacher, "--export", str(places / "export"), "--label_fraction", "0.5")
    (best,) = (places / SCRIPTS[name] / "checkpoints/t").glob("best*.ckpt")
    others = {key for key in read_checkpoint(best)["state_dict"] if not key.startswith("student.")}
    assert others == ({"hidden_map.weight", "hidden_map.bias"} if name == "feature" else set())
    exported = load_model(str(places / "export")).state_dict()  # the map is not part of the student
    assert exported.keys() == load_model(str(tiny_folder)).state_dict().keys()


def test_a_phase_needs_the_checkpoint_of_the_phase_before(places, tiny_folder, tiny_teacher, capsys):
    with pytest.raises(SystemExit):
        train("phase2", tiny_folder, tiny_teacher)
    assert f"distillation/{TROUBLE}/phase1/train_online_kd.py" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"make one with: python distillation/{TROUBLE}/phase1/train_online_kd.py"):
        train("phase2", tiny_folder, tiny_teacher, "--load_checkpoint")
    train_baseline("baseline_depth", tiny_folder, "--max_steps", "1")
    with pytest.raises(UserError, match=f"is of baseline_depth; this script builds on {TROUBLE}/phase1"):
        train("phase2", tiny_folder, tiny_teacher, "--load_checkpoint", str(places / "baseline_depth/checkpoints/t"))
    train("phase1", tiny_folder, tiny_teacher, "--depth_encoding", "grey", "--max_steps", "1")
    with pytest.raises(UserError, match="depth_encoding grey, this run has metric_log3"):
        train("phase2", tiny_folder, tiny_teacher, "--load_checkpoint")


def test_phases_of_one_road_see_the_same_labels(places, tiny_folder, tiny_teacher):
    """A phase 3 with few labels may not start from a phase 2 that has read all of them, nor from other few ones."""
    short = ("--max_steps", "1")
    train("phase2", tiny_folder, tiny_teacher, "--from_stock", *short)
    with pytest.raises(UserError, match="label_fraction 1.0, this run has 0.5"):
        train("phase3", tiny_folder, tiny_teacher, "--load_checkpoint", *short, "--label_fraction", "0.5")
    half = ("--label_fraction", "0.5", *short)
    train("phase2", tiny_folder, tiny_teacher, "--from_stock", *half, "--run_name", "half")
    from_half = ("--load_checkpoint", "half", *half, "--run_name", "p3")
    with pytest.raises(UserError, match="seed 0, this run has 1"):
        train("phase3", tiny_folder, tiny_teacher, *from_half, "--seed", "1")
    train("phase3", tiny_folder, tiny_teacher, *from_half)


def test_a_requeued_phase_starts_from_the_phase_before(places, tiny_folder, tiny_teacher, capsys, monkeypatch):
    """--resume auto with nothing to resume: the phase before is loaded all the same; without it there is no start."""
    with pytest.raises(SystemExit):
        train("phase3", tiny_folder, tiny_teacher, "--resume", "auto")
    train("phase2", tiny_folder, tiny_teacher, "--from_stock", "--max_steps", "2")
    capsys.readouterr()
    again = ("--resume", "auto", "--load_checkpoint")
    with interrupted(3):
        train("phase3", tiny_folder, tiny_teacher, *again)
    said = capsys.readouterr().out
    assert "starting a new run" in said and "starting from" in said
    # Newer code is no reason to start over, but one to ask the teacher again.
    outputs = list((places / "teacher_outputs").iterdir())
    monkeypatch.setattr(teacher_module, "source_digest", lambda *args, **options: "newer")
    train("phase3", tiny_folder, tiny_teacher, *again)
    assert len(list((places / "teacher_outputs").iterdir())) == len(outputs) + 1
    said = capsys.readouterr().out
    assert "continuing" in said and "starting from" not in said
    record = json.loads((places / SCRIPTS["phase3"] / "tensorboard_logs/t/run.json").read_text())
    assert record["load_checkpoint"].endswith(".ckpt") and len(record["teacher_outputs"]) == 16


def test_a_phase_can_start_from_the_stock_student(places, tiny_folder, tiny_teacher, capsys):
    """Without its weight a term leaves no trace: with cross-entropy alone phase 3 is the baseline, weight by weight."""
    alone = ("--kl_weight", "0", "--patch_weight", "0", "--contrastive_weight", "0", "--max_steps", "3")
    train("phase3", tiny_folder, tiny_teacher, "--from_stock", *alone)
    assert "starting from" not in capsys.readouterr().out
    train_baseline("baseline_depth", tiny_folder, "--max_steps", "3")
    ours, baseline = (
        read_checkpoint(places / name / "checkpoints/t/last.ckpt")["state_dict"]
        for name in (SCRIPTS["phase3"], "baseline_depth")
    )
    for key, value in baseline.items():
        assert torch.equal(ours[key], value), key
    with pytest.raises(SystemExit):
        train("phase3", tiny_folder, tiny_teacher, "--from_stock", "--load_checkpoint")
    assert "leave out --load_checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["phase3", "feature"])
def test_an_online_teacher_gives_the_same_training(places, tiny_folder, tiny_teacher, name):
    """All of the teacher's outputs are used: hidden states, own answers, patches, statistics and the bank."""
    more = ("--teacher_questions", "2", *(("--from_stock",) if name == "phase3" else ()))
    for teacher in ("cached", "online"):
        train(name, tiny_folder, tiny_teacher, *more, "--teacher", teacher, "--run_name", teacher)
    runs = places / SCRIPTS[name] / "checkpoints"
    cached, online = (read_checkpoint(runs / teacher / "last.ckpt")["state_dict"] for teacher in ("cached", "online"))
    for key, value in cached.items():
        torch.testing.assert_close(online[key], value, atol=2e-4, rtol=1e-3)
    losses = [
        [float(row["train/loss"]) for row in csv.DictReader(open(path, encoding="utf-8")) if row.get("train/loss")]
        for path in (places / SCRIPTS[name] / "tensorboard_logs" / t / "metrics.csv" for t in ("cached", "online"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0]
    with pytest.raises(SystemExit):
        train(name, tiny_folder, tiny_teacher, *more, "--teacher", "online", "--num_workers", "2")


def test_a_vision_cache_changes_no_weight(places, tiny_folder, tiny_teacher, capsys):
    """Phase 2 from pixels, from features made now, and from those found on disk, one of them damaged."""
    more = ("--from_stock", "--teacher_questions", "1")
    train("phase2", tiny_folder, tiny_teacher, *more, "--run_name", "pixels")
    for run in ("made", "found"):
        train("phase2", tiny_folder, tiny_teacher, *more, "--vision_cache", "--run_name", run)
        files = sorted((places / "vision_cache").rglob("*.tensors"))
        files[0].write_bytes(files[0].read_bytes()[:-1])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--vision_cache")]
    assert len(files) == 32 and len(said) == 3  # training images, validation images, the damaged one
    runs = places / SCRIPTS["phase2"] / "checkpoints"
    pixels, *cached = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("pixels", "made", "found"))
    for key, value in pixels.items():
        assert torch.equal(cached[0][key], cached[1][key])
        torch.testing.assert_close(cached[0][key], value, atol=2e-4, rtol=1e-3)
    with pytest.raises(SystemExit):
        train("phase2", tiny_folder, tiny_teacher, *more, "--vision_cache", "--augmentation")
    assert "--vision_cache" in capsys.readouterr().err


def test_a_resumed_run_reads_the_features_of_its_own_tower(places, tiny_folder, tiny_teacher):
    """Phase 2 on an aligned tower, one epoch and then another: with features from disk as from pixels."""
    train("phase1", tiny_folder, tiny_teacher, "--vision_lr", "1e-2")
    for run, more in (("pixels", ()), ("cached", ("--vision_cache",))):
        start = ("--load_checkpoint", "--run_name", run, *more)
        train("phase2", tiny_folder, tiny_teacher, *start, "--max_epochs", "1")
        train("phase2", tiny_folder, tiny_teacher, *start, "--max_epochs", "2", "--resume", "auto")
    runs = places / SCRIPTS["phase2"] / "checkpoints"
    pixels, cached = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("pixels", "cached"))
    for key, value in pixels.items():
        torch.testing.assert_close(cached[key], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("image_tokens", ["one_tile", "anyres"])
def test_features_read_back_give_the_same_loss_and_gradients(world, tiny_folder, image_tokens):
    model = load_model(str(tiny_folder))
    set_trainable(model, vision=False, projector=True, language=True)
    data = data_module(world, tiny_folder)
    data.student = ImageSettings("depth", image_tokens=image_tokens)
    data.train.student = data.student
    batch = data.collate([data.train[0, i] for i in range(3)])
    images = dict(batch["student_images"])
    pixels = images["pixel_values"]
    seen = {**images, "features": tower_features(model, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])}
    del seen["pixel_values"]
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for shown in (images, seen):
        logits, targets = answer_logits(model, batch["text"], shown, vocab_size=len(data.processor.tokenizer))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        results.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    (loss, gradients), (cached_loss, cached_gradients) = results
    torch.testing.assert_close(cached_loss, loss, atol=1e-6, rtol=1e-6)
    assert sum(g is not None for g in gradients) == sum(g is not None for g in cached_gradients) > 10
    for gradient, cached in zip(gradients, cached_gradients, strict=True):
        torch.testing.assert_close(cached, gradient, atol=1e-6, rtol=1e-4)


def test_an_interrupted_distillation_resumes_bit_exactly(places, tiny_folder, tiny_teacher):
    """Further questions differ by image and epoch; the feature-based script trains weights beside the student."""
    more = ("--teacher_questions", "1", "--label_fraction", "0.5")
    train("feature", tiny_folder, tiny_teacher, *more)
    with interrupted(8):
        train("feature", tiny_folder, tiny_teacher, *more, "--run_name", "cut")
    train("feature", tiny_folder, tiny_teacher, *more, "--run_name", "cut", "--resume", "auto")
    runs = places / SCRIPTS["feature"] / "checkpoints"
    done, resumed = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("t", "cut"))
    assert done.keys() == resumed.keys() and all(torch.equal(done[key], resumed[key]) for key in done)
    with pytest.raises(UserError, match="label_fraction"):
        train("feature", tiny_folder, tiny_teacher, *more[:2], "--run_name", "cut", "--resume", "auto")


# the teacher cache


def test_cached_outputs_are_the_teachers(places, world, tiny_folder, tiny_teacher):
    """Logits and patches read back equal those of the teacher itself looking at the RGB pictures."""
    data = data_module(world, tiny_folder, teacher_questions=2)
    teacher = teacher_of(data, tiny_folder, tiny_teacher)
    data.use_teacher(teacher)
    items = [data.train[0, index] for index in range(4)]
    batch = data.collate(items)
    model = load_model(str(tiny_teacher)).eval()
    rgb = SUNRGBDDataModule(root=world, processor=data.processor, student=ImageSettings("rgb", image_tokens="one_tile"))
    rgb.setup()
    by_path = {group[0].image_path: i for i, group in enumerate(rgb.train.images)}
    images = rgb.collate([rgb.train[0, by_path[path]] for path in batch["image_paths"]])["student_images"]
    with torch.no_grad():
        logits, targets = answer_logits(model, batch["text"], images, vocab_size=len(data.processor.tokenizer))
        patches = overview_patches(model, images)
    cached = batch["teacher"]["hidden"] @ teacher.head().T
    assert len(targets) == len(batch["teacher"]["gold"]) == len(cached)
    torch.testing.assert_close(cached, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch["teacher"]["patches"], patches, atol=1e-5, rtol=1e-5)
    own = ~batch["teacher"]["gold"]
    assert own.any() and batch["teacher"]["gold"].any()
    forbidden = [data.processor.image_token_id, data.processor.video_token_id]
    logits[:, forbidden] = -torch.inf
    assert (logits.argmax(-1) == targets)[own].all()  # its own answers are what it holds most likely
    bank = teacher.bank()
    mean, std = teacher.statistics()
    for i, row in enumerate(batch["teacher"]["bank_rows"]):
        torch.testing.assert_close(bank[row], ((patches[i] - mean) / std).mean(0), atol=1e-4, rtol=1e-4)


def test_the_teacher_looks_once(places, world, tiny_folder, tiny_teacher, monkeypatch):
    """Killed half-way, damaged, with other images: only what is missing is computed; then no model is loaded at all."""
    looked, look = [], teacher_cache.LiveTeacher.look

    def counting(self, groups):
        looked.extend(rows[0].image_path for rows in groups)
        if len(looked) > 20 and not (places / "go_on").exists():
            raise KeyboardInterrupt
        return look(self, groups)

    monkeypatch.setattr(teacher_cache.LiveTeacher, "look", counting)
    data = data_module(world, tiny_folder)
    with pytest.raises(KeyboardInterrupt):
        teacher_of(data, tiny_folder, tiny_teacher)
    done = len(looked) - 8  # in batches of 8
    (places / "go_on").touch()
    looked.clear()
    teacher = teacher_of(data, tiny_folder, tiny_teacher)
    images = len(data.train.images) + len(data.val.images)
    assert len(looked) == images - done and done > 0
    folder = teacher.source.store.folder
    outputs = sorted(folder.rglob("*.tensors"))
    assert len(outputs) == 2 * images + 1  # outputs and their means; the output layer
    (head,) = folder.rglob("head.tensors")
    (pooled, *_) = folder.rglob("*.pooled.tensors")
    for path, n in ((next(p for p in outputs if "." not in p.stem and p != head), 1), (pooled, 1), (head, 0)):
        name, data_bytes = path.name.removesuffix(".tensors"), path.read_bytes()
        before = teacher.source.store.get(name)
        path.write_bytes(data_bytes[:100] + bytes([data_bytes[100] ^ 1]) + data_bytes[101:])
        assert teacher.source.store.get(name) is None
        looked.clear()
        teacher_of(data, tiny_folder, tiny_teacher)
        assert len(looked) == n
        after = teacher.source.store.get(name)  # alone, not among seven others: the same but for the last bits
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    looked.clear()
    teacher_of(data_module(world, tiny_folder, subset_percentage=0.5), tiny_folder, tiny_teacher)
    assert not looked  # all of them are known
    monkeypatch.setattr(teacher_module, "load_model", None)
    again = teacher_of(data, tiny_folder, tiny_teacher)
    assert again.source.names == teacher.source.names
    path = folder / again.source.names[0][:2] / f"{again.source.names[0]}.tensors"
    path.unlink()
    with pytest.raises(UserError, match="start again"):
        again.patches(data.train.images[0][0].image_path)


def test_processes_side_by_side_share_the_looking(places, world, tiny_folder, tiny_teacher, monkeypatch):
    data, looked, look = data_module(world, tiny_folder), [], teacher_cache.LiveTeacher.look
    monkeypatch.setattr(
        teacher_cache.LiveTeacher, "look", lambda self, groups: looked.extend(groups) or look(self, groups)
    )
    rows = [group for group in (*data.train.images, *data.val.images)]
    live = live_teacher(data, tiny_teacher, rows)
    shares = []
    for rank in (1, 0):  # one after the other: the first finds that the other's share is missing and does it as well
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        looked.clear()
        teacher_cache.stored_outputs(places / "t", rows, lambda: live, {}, root=world, batch_size=4)
        shares.append(len(looked))
    assert shares == [len(rows), 0]


def test_two_files_may_number_their_questions_alike(world, tiny_folder, tiny_teacher):
    """The answers of an image are told apart by their words: equal ids in train, unanswered and val mix nothing up."""
    data = data_module(world, tiny_folder)
    first = data.train.images[0]
    rows = [replace(row, id="1") for row in first] + [replace(first[0], id="1", question="What is this?", answer="")]
    live = live_teacher(data, tiny_teacher, [rows])
    together = teacher_module.TeacherCache(live, [rows], 1)
    for row in rows:
        alone = teacher_module.TeacherCache(replace(live, groups=[[row]]), [[row]], 1)
        for gold in {False, bool(row.answer)}:
            (tokens, hidden), (expected, states) = together.answer(row, gold=gold), alone.answer(row, gold=gold)
            assert tokens == expected
            torch.testing.assert_close(hidden, states, atol=1e-4, rtol=1e-4)


def test_other_pictures_or_questions_are_other_files(world, tiny_folder, tmp_path):
    rows = data_module(world, tiny_folder).train.images[0]
    before = teacher_cache.image_name(world, rows)
    assert teacher_cache.image_name(world, [replace(rows[0], question="What?"), *rows[1:]]) != before
    assert teacher_cache.image_name(world, [replace(rows[0], answer=""), *rows[1:]]) != before
    picture = tmp_path / rows[0].image_path
    picture.parent.mkdir(parents=True)
    shutil.copy(world / rows[0].image_path, picture)
    assert teacher_cache.image_name(tmp_path, rows) == before
    picture.write_bytes(picture.read_bytes() + b"0")
    assert teacher_cache.image_name(tmp_path, rows) != before


def test_other_code_or_libraries_ask_the_teacher_again(tiny_teacher, tmp_path, monkeypatch):
    """A folder of outputs for each; a loss or a script is no reason to ask again."""
    for name in ("dataset", "distillation"):
        shutil.copytree(
            teacher_module.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("miniature", "__pycache__")
        )
    processor, images = load_processor(str(tiny_teacher)), ImageSettings("rgb")
    for module in (teacher_module, pictures):
        monkeypatch.setattr(module, "ROOT", tmp_path)

    def key() -> str:
        return json.dumps(teacher_module.teacher_key("digest", processor, images, torch.float32), sort_keys=True)

    seen = [key()]
    for name in ("distillation/losses.py", "distillation/baseline_depth/train.py"):
        (tmp_path / name).write_text("")
        assert key() == seen[0]
    for name in (
        "distillation/forward.py",
        "distillation/decoding.py",
        "dataset/inputs/prompts.py",
        "dataset/inputs/processor.py",
    ):
        (tmp_path / name).write_text("")
        seen.append(key())
    for module in (torch, pictures.transformers, pictures.np):
        monkeypatch.setattr(module, "__version__", "99.0")
        seen.append(key())
    assert len(set(seen)) == 8


def test_unfit_teachers_are_refused(places, world, tiny_folder, tiny_teacher, tmp_path):
    data = data_module(world, tiny_folder)
    with pytest.raises(UserError, match="no LLaVA-OneVision processor"):
        teacher_of(data, tiny_folder, tmp_path)
    train_baseline("baseline_depth", tiny_folder, "--max_steps", "1")
    run = places / "baseline_depth/checkpoints/t"
    with pytest.raises(UserError, match="has modality depth, a teacher here needs rgb"):
        teacher_of(data, tiny_folder, tiny_teacher, "--teacher_checkpoint", str(run))
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    config = json.loads((other / "tokenizer.json").read_text())
    vocab = config["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the tokenizer of teacher"):
        teacher_of(data, tiny_folder, other)


def test_a_fine_tuned_teacher_is_taken(places, world, tiny_folder, tiny_teacher, capsys):
    train_baseline("baseline_rgb7b", tiny_teacher, "--lr", "1e-2", "--label_fraction", "0.5")
    data = data_module(world, tiny_folder)
    stock = teacher_of(data, tiny_folder, tiny_teacher)
    assert f"teacher: {tiny_teacher}; on val: all" in capsys.readouterr().out
    tuned = teacher_of(data, tiny_folder, tiny_teacher, "--teacher_checkpoint")
    assert "tuned on 50 % of the labels; on val: all" in capsys.readouterr().out
    row = data.train.images[0][0]
    assert stock.source.store.folder != tuned.source.store.folder
    assert not torch.equal(stock.answer(row, gold=True)[1], tuned.answer(row, gold=True)[1])
    decode = partial(data.processor.tokenizer.decode, skip_special_tokens=True)
    scores = tuned.accuracy([row for rows in data.val.images for row in rows], decode)
    assert 0 <= scores["all"] <= 1 and set(scores) > {"all"}


def test_greedy_answers_of_packed_blocks_equal_one_by_one(places, world, tiny_folder):
    """Some blocks have their answer already, rows have different numbers of blocks, answers different lengths."""
    processor, model = load_processor(str(tiny_folder)), load_model(str(tiny_folder)).eval()
    data = data_module(world, tiny_folder)
    groups = [rows for rows in data.val.images if len(rows) > 2][:3]
    groups = [rows[: 3 + i] for i, rows in enumerate(groups)]
    images = data.collate([data.val[0, data.val.images.index(_whole(data, g))] for g in groups])["student_images"]
    n = processor.num_image_tokens + 1
    options = dict(vocab_size=len(processor.tokenizer), end_of_turn=processor.tokenizer.eos_token_id, max_new_tokens=7)

    def ask(questions, answers, pictures):
        prompts = [pack_questions(processor, q, a, n_image_tokens=n) for q, a in zip(questions, answers, strict=True)]
        text = collate_prompts(prompts, pad_token_id=processor.tokenizer.pad_token_id)
        return greedy_answers(model, text, pictures, **options)

    questions = [[row.question for row in rows] for rows in groups]
    gold = [[row.answer if i == 1 else None for i, row in enumerate(rows)] for rows in groups]
    packed = ask(questions, gold, images)
    for i, rows in enumerate(groups):
        picture = {k: v[i : i + 1] if k != "batch_num_images" else v for k, v in images.items()}
        for k in range(len(rows)):
            alone = ask([[questions[i][k]]], [[gold[i][k]]], picture)
            assert packed.tokens[i][k] == alone.tokens[0][0]
            torch.testing.assert_close(packed.hidden[i][k], alone.hidden[0][0], atol=1e-4, rtol=1e-4)
    lengths = {len(tokens) for row in packed.tokens for tokens in row}
    assert len(lengths) > 1 and len({tuple(t) for row in packed.tokens for t in row}) > 3


def _whole(data, rows):
    (found,) = (group for group in data.val.images if group[0].image_path == rows[0].image_path)
    return found


def test_the_tensor_that_the_projector_reads(places, world, tiny_folder, processor):
    """In both ways of cutting a picture: the projected patches are the image tokens that the language model gets."""
    model = load_model(str(tiny_folder)).eval()
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 255, (100, 180, 3), dtype=np.uint8),
        rng.integers(0, 255, (128, 128, 3), dtype=np.uint8),
    ]
    for mode in ("anyres", "one_tile"):
        images = processor.pixels(pictures, image_tokens=mode)
        features = image_features(model, images)
        patches = overview_patches(model, images, features)
        torch.testing.assert_close(patches, overview_patches(model, images))
        projected = model.model.multi_modal_projector(patches)
        for i in range(2):
            torch.testing.assert_close(projected[i], features.pooler_output[i][:64])


# labels and masks


def test_label_fractions_are_nested_and_only_take_answers_away(world, tiny_folder):
    rows = data_module(world, tiny_folder).rows("train")
    kept = {f: {r.id for r in withhold_labels(rows, f, seed=3) if r.answer} for f in (0.05, 0.1, 0.5, 1.0)}
    assert kept[0.05] <= kept[0.1] <= kept[0.5] <= kept[1.0] == {r.id for r in rows}
    assert len(kept[0.5]) == round(len(rows) / 2)
    assert [r.id for r in withhold_labels(rows, 0.1, seed=3)] == [r.id for r in rows]
    with pytest.raises(UserError, match="--label_fraction"):
        withhold_labels(rows, 0, seed=0)


def test_label_only_training_sees_labelled_images_and_as_many_of_them(world, tiny_folder):
    full, few = data_module(world, tiny_folder), data_module(world, tiny_folder, label_fraction=0.1)
    assert len(few.train) < len(full.train) and all(row.answer for rows in few.train.images for row in rows)
    drawn = [key for batch in few.train_dataloader().batch_sampler for key in batch]
    assert len(drawn) == len(full.train)
    counts = np.bincount([index for _, index in drawn])
    assert counts.max() - counts.min() <= 1  # repeated evenly


def test_hidden_labels_never_reach_a_batch(places, world, tiny_folder, tiny_teacher):
    data = data_module(world, tiny_folder, label_fraction=0.3, teacher_questions=3)
    data.use_teacher(teacher_of(data, tiny_folder, tiny_teacher))
    answered = {row.id for rows in data.train.images for row in rows if row.answer}
    everything = {row.id: row for row in data.rows("train")}
    assert 0 < len(answered) < len(everything)
    end = data.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    gold_seen = differs = 0
    for index in range(len(data.train)):
        item = data.train[0, index]
        batch = data.collate([item])
        assert len(item["rows"]) <= len(data.train.images[index]) + 3
        tokens = batch["text"]["labels"][batch["text"]["labels"] != -100]
        gold_seen += int((tokens[batch["teacher"]["gold"]] == end).sum())
        for row in item["rows"]:
            said = data._answer(row)[0]
            if row.answer:
                assert processor_text(data, said[:-1]) == row.answer == everything[row.id].answer
            else:
                assert said == data.teacher.answer(row, gold=False)[0]
                differs += row.id in everything and processor_text(data, said[:-1]) != everything[row.id].answer
    assert gold_seen == len(answered) and differs > 0


def processor_text(data, tokens):
    return data.processor.tokenizer.decode(tokens)


def test_hidden_labels_do_not_crowd_out_gold_ones(world, tiny_folder):
    data = data_module(world, tiny_folder, label_fraction=0.5, questions_per_image=1)
    rows = withhold_labels(data.rows("train"), 0.5, seed=0)
    data.train = data._train_set(rows)
    for index, group in enumerate(data.train.images):
        (drawn,) = data.train[0, index]["rows"]
        assert bool(drawn.answer) == any(row.answer for row in group)


def test_an_image_that_comes_again_in_an_epoch_is_drawn_anew():
    order = ImageOrder(3, seed=0, shuffle=True, size=7)
    keys = []
    for epoch in range(2):
        order.set_epoch(epoch)
        keys += list(order)
    assert len(keys) == len(set(keys)) == 14 and {index for _, index in keys} == {0, 1, 2}


def test_valid_share_of_patches():
    depth = np.full((64, 128, 3), 0.5, np.float32)
    depth[:, :32] = np.nan
    share = valid_share(depth, grid=4, image_tokens="anyres").reshape(4, 4)
    assert np.allclose(share, [[0, 1, 1, 1]] * 4)
    padded = valid_share(depth, grid=4, image_tokens="one_tile").reshape(4, 4)
    assert np.allclose(padded, [[0] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [0] * 4])
    depth[:, 32:48] = np.nan
    assert valid_share(depth, grid=4, image_tokens="anyres").reshape(4, 4)[0, 1] == pytest.approx(0.5)


def test_images_of_one_recording_are_no_negatives():
    mask = same_recording(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 2]))
    assert mask.tolist() == [[False, True, False, True], [False] * 4]


def test_a_bank_of_one_recording_is_refused(places, tiny_folder, tiny_teacher):
    with pytest.raises(UserError, match="at least 2 recordings"):
        train("phase1", tiny_folder, tiny_teacher, "--subset_percentage", "0.01")


def test_dry_run_of_a_distillation_writes_nothing(places, tiny_folder, tiny_teacher, capsys):
    train("logit", tiny_folder, tiny_teacher, "--dry_run", "--teacher_questions", "2")
    assert "peak memory" in capsys.readouterr().out
    assert not places.exists()


# a fit teacher


def test_a_teacher_that_knows_nothing_is_said_to_be_useless(places, tiny_folder, tiny_teacher, capsys):
    train("logit", tiny_folder, tiny_teacher, "--max_steps", "1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "the teacher is right on 0.000 of the validation questions" in line


def test_phases_of_one_road_have_one_teacher(places, tiny_folder, tiny_teacher):
    train("phase2", tiny_folder, tiny_teacher, "--from_stock", "--max_steps", "1")
    start = ("--load_checkpoint", "t", "--max_steps", "1", "--run_name", "p3")
    with pytest.raises(UserError, match="another teacher .*teacher.*--any_teacher"):
        train("phase3", tiny_folder, tiny_folder, *start)
    train("phase3", tiny_folder, tiny_folder, *start, "--any_teacher")


def test_a_teacher_may_not_have_read_more_labels_than_its_student(places, tiny_folder):
    script = load_script("distillation/baseline_rgb7b/train2.py")
    for run, more in (("all", ()), ("half", ("--label_fraction", "0.5"))):
        script.main(script.parse_args(flags(tiny_folder, *more, "--max_steps", "1", "--run_name", run)))
    script = load_script(f"distillation/{SCRIPTS['logit']}/train_online_kd.py")

    def student(run, *more):
        script.main(script.parse_args([*flags(tiny_folder), "--max_steps", "1", "--run_name", run, *more]))

    half = ("--label_fraction", "0.5")
    with pytest.raises(UserError, match=r"tuned on 100 % of the labels .* may see 50 %"):
        student("a", "--teacher_checkpoint", "all", *half)
    with pytest.raises(UserError, match=r"tuned on 50 % of the labels \(seed 0\).* \(seed 1\)"):
        student("a", "--teacher_checkpoint", "half", *half, "--seed", "1")
    with pytest.raises(UserError, match=r"tuned on 50 % of the labels"):
        student("a", "--teacher_checkpoint", "half", "--label_fraction", "0.6", "--seed", "1")
    student("a", "--teacher_checkpoint", "half", *half)
    student("b", "--teacher_checkpoint", "half")
    student("c", "--teacher_checkpoint", "all", *half, "--any_teacher")


def test_no_room_for_what_the_teacher_says(places, tiny_folder, tiny_teacher, monkeypatch):
    monkeypatch.setattr(run_data.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the teacher's outputs: no room in"):
        train("logit", tiny_folder, tiny_teacher)
