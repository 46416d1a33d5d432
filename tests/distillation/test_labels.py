"""Few labels: which are kept, which images are drawn, and that hidden ones stay hidden."""

import numpy as np
import pytest

from dataset.questions.rows import withhold_labels
from tests.helpers.training import data_module, teacher_of
from utils import UserError


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
