"""The teacher: what it says about every image, stored once, and whether it is fit for its student."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import utils
from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs import digests, pictures
from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation import teacher as teacher_module
from distillation import teacher_cache
from distillation.forward import answer_logits, overview_patches
from distillation.models import load_model
from distillation.teacher import TeacherConstants
from tests.helpers.training import STRATEGIES, data_module, distill, flags, teacher_of, train
from utils import UserError, load_script


def live_teacher(data, tiny_teacher, groups):
    model, images = load_model(str(tiny_teacher)).eval(), ImageSettings("rgb", image_tokens="one_tile")
    return teacher_cache.LiveTeacher(model, data.processor, data.root, images, "32-true", groups)


def test_cached_outputs_are_the_teachers(places, world, tiny_folder, tiny_teacher):
    """Logits and patches read back equal those that the teacher computes itself from the RGB pictures."""
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
    bank = teacher.memory_bank()
    mean, std = teacher.statistics()
    for i, row in enumerate(batch["teacher"]["memory_bank_rows"]):
        torch.testing.assert_close(bank[row], ((patches[i] - mean) / std).mean(0), atol=1e-4, rtol=1e-4)


def read_all(teacher):
    for path in teacher.number:
        teacher.source.image(teacher.number[path])
    teacher.source.pooled(range(len(teacher.number)))


def test_a_start_opens_no_file_of_an_image(places, world, tiny_folder, tiny_teacher, monkeypatch):
    """Neither pictures nor outputs, once they are known; a picture that changed is read, and is another one."""
    data, opened = data_module(world, tiny_folder), []
    teacher_of(data, tiny_folder, tiny_teacher).memory_bank()
    read_bytes, digest = Path.read_bytes, digests.sha256
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read_bytes(path))
    monkeypatch.setattr(digests, "sha256", lambda path: opened.append(path.name) or digest(path))
    monkeypatch.setattr(teacher_module.TeacherCache, "accuracy", lambda *args: {"all": 1.0})
    teacher = teacher_of(data, tiny_folder, tiny_teacher)
    teacher.memory_bank()
    assert sorted(name.split("-")[0] for name in opened) == ["bank", "head.tensors"]
    changed = world / data.train.images[0][0].image_path
    before, own = read_bytes(changed), teacher.source.names[0]
    try:
        os.utime(changed)  # the same bytes at another time
        assert teacher_of(data, tiny_folder, tiny_teacher).source.names == teacher.source.names
        changed.write_bytes(before + b"more")
        assert teacher_of(data, tiny_folder, tiny_teacher).source.names[0] != own
    finally:
        changed.write_bytes(before)
    assert opened.count(changed.name) >= 2


def test_the_teacher_computes_once(places, world, tiny_folder, tiny_teacher, monkeypatch):
    """Killed half-way, damaged, with other images: only what is missing is computed; then no model is loaded at all."""
    computed, compute = [], teacher_cache.LiveTeacher.compute

    def counting(self, groups):
        computed.extend(rows[0].image_path for rows in groups)
        if len(computed) > 20 and not (places / "go_on").exists():
            raise KeyboardInterrupt
        return compute(self, groups)

    monkeypatch.setattr(teacher_cache.LiveTeacher, "compute", counting)
    data = data_module(world, tiny_folder)
    with pytest.raises(KeyboardInterrupt):
        teacher_of(data, tiny_folder, tiny_teacher)
    done = len(computed) - 8  # in batches of 8
    (places / "go_on").touch()
    computed.clear()
    teacher = teacher_of(data, tiny_folder, tiny_teacher)
    images = len(data.train.images) + len(data.val.images)
    assert len(computed) == images - done and done > 0
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
        if n:  # a start opens no file of an image: it is found damaged where it is read
            with pytest.raises(UserError, match=f"{name} is missing or damaged; start again"):
                read_all(teacher)
        computed.clear()
        teacher_of(data, tiny_folder, tiny_teacher)
        assert len(computed) == n
        after = teacher.source.store.get(name)  # alone, not among seven others: the same but for the last bits
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    computed.clear()
    teacher_of(data_module(world, tiny_folder, subset_percentage=0.5), tiny_folder, tiny_teacher)
    assert not computed  # all of them are known
    monkeypatch.setattr(teacher_module, "load_model", None)
    again = teacher_of(data, tiny_folder, tiny_teacher)
    assert again.source.names == teacher.source.names
    path = folder / again.source.names[0][:2] / f"{again.source.names[0]}.tensors"
    path.unlink()
    with pytest.raises(UserError, match="start again"):
        again.patches(data.train.images[0][0].image_path)


def test_processes_side_by_side_share_the_images(places, world, tiny_folder, tiny_teacher, monkeypatch):
    data, shares, compute = data_module(world, tiny_folder), [], teacher_cache.compute_and_store

    def counting(store, missing, *args, **options):
        shares.append(len(missing))
        compute(store, missing, *args, **options)

    monkeypatch.setattr(teacher_cache, "compute_and_store", counting)
    rows = [group for group in (*data.train.images, *data.val.images)]
    live = live_teacher(data, tiny_teacher, rows)
    for rank in (1, 0):  # one after the other: the first does its half, finds that the other is missing, and does it
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        teacher_cache.stored_outputs(places / "t", rows, lambda: live, {}, root=world, batch_size=4)
    assert shares == [len(rows) // 2, len(rows) - len(rows) // 2]


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

    def name(root, *rows):
        return teacher_cache.image_name(digests.PictureDigests(tmp_path / "none").of(root / rows[0].image_path), rows)

    before = name(world, *rows)
    assert name(world, replace(rows[0], question="What?"), *rows[1:]) != before
    assert name(world, replace(rows[0], answer=""), *rows[1:]) != before
    picture = tmp_path / rows[0].image_path
    picture.parent.mkdir(parents=True)
    shutil.copy(world / rows[0].image_path, picture)
    assert name(tmp_path, *rows) == before
    picture.write_bytes(picture.read_bytes() + b"0")
    assert name(tmp_path, *rows) != before


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


def test_no_room_for_the_teachers_outputs(places, tiny_folder, tiny_teacher, monkeypatch):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the teacher's outputs: no room in"):
        distill("logit", tiny_folder, tiny_teacher)


def test_outputs_that_are_not_finite_are_blamed_on_the_teacher(places, world, tiny_folder, tiny_teacher, tmp_path):
    data = data_module(world, tiny_folder)
    teacher = teacher_of(data, tiny_folder, tiny_teacher)
    store, name = teacher.source.store, teacher.source.names[0]
    outputs = store.get(name)
    store.put(name, outputs | {"patches": outputs["patches"] * float("nan")})  # whole, and its checksum fits
    with pytest.raises(UserError, match=f"{name}.tensors: the teacher's outputs hold NaN .*patches.* remove the file"):
        teacher_of(data, tiny_folder, tiny_teacher).patches(data.train.images[0][0].image_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_teacher, broken)
    weights = load_file(broken / "model.safetensors")
    (last_norm,) = [name for name in weights if name.endswith("model.norm.weight")]
    weights[last_norm] *= float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="image/.*: the teacher's outputs hold NaN .*use another teacher"):
        teacher_of(data, tiny_folder, broken)


def test_unfit_teachers_are_refused(places, world, tiny_folder, tiny_teacher, tmp_path):
    data = data_module(world, tiny_folder)
    with pytest.raises(UserError, match="no LLaVA-OneVision model"):
        teacher_of(data, tiny_folder, tmp_path)
    train("baseline_depth", tiny_folder, "--max_steps", "1")
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
    train("baseline_rgb7b", tiny_teacher, "--lr", "1e-2", "--label_fraction", "0.5")
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


def test_a_teacher_that_knows_nothing_is_said_to_be_useless(places, tiny_folder, tiny_teacher, capsys):
    distill("logit", tiny_folder, tiny_teacher, "--max_steps", "1")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "the teacher is right on 0.000 of the validation questions" in line


def test_phases_of_one_road_have_one_teacher(places, tiny_folder, tiny_teacher):
    distill("phase2", tiny_folder, tiny_teacher, "--from_stock", "--max_steps", "1")
    start = ("--load_checkpoint", "t", "--max_steps", "1", "--run_name", "p3")
    with pytest.raises(UserError, match="another teacher .*teacher.*--any_teacher"):
        distill("phase3", tiny_folder, tiny_folder, *start)
    distill("phase3", tiny_folder, tiny_folder, *start, "--any_teacher")


def test_a_teacher_may_not_have_read_more_labels_than_its_student(places, tiny_folder):
    script = load_script("distillation/baseline_rgb7b/train2.py")
    for run, more in (("all", ()), ("half", ("--label_fraction", "0.5"))):
        script.main(script.parse_args(flags(tiny_folder, *more, "--max_steps", "1", "--run_name", run)))
    script = load_script(f"distillation/{STRATEGIES['logit']}/train_online_kd.py")

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


class FourImages:
    """A stored teacher of four training images, the third of another recording."""

    def memory_bank(self):
        return torch.eye(4)

    def recordings(self):
        return torch.tensor([0, 0, 1, 0])


def test_images_of_one_recording_are_no_negatives():
    constants = TeacherConstants(FourImages(), output_layer=False, patches=False, memory_bank=True)
    found = constants.memory_bank({"teacher": {"memory_bank_rows": torch.tensor([0, 2])}})
    assert found["excluded"].tolist() == [[False, True, False, True], [False] * 4]
    assert found["positives"].tolist() == [0, 2] and found["memory_bank"].shape == (4, 4)
    assert not constants.state_dict() and not list(constants.parameters())  # neither saved nor trained


def test_a_memory_bank_of_one_recording_is_refused(places, tiny_folder, tiny_teacher):
    with pytest.raises(UserError, match="at least 2 recordings"):
        distill("phase1", tiny_folder, tiny_teacher, "--subset_percentage", "0.01")
