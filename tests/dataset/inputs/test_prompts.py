"""Prompts, answer mask and packing: K questions behind one image compute what K separate sequences compute."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from dataset.inputs.prompts import (
    IGNORE,
    PADDING_SEGMENT,
    PackedPrompt,
    answer_targets,
    collate_prompts,
    pack_questions,
    packed_attention_mask,
    render_question,
)
from distillation.decoding import greedy_answers
from distillation.forward import answer_logits, exact_matches, packed_attention, use_packed_attention
from distillation.models import load_model
from tests.helpers.prompts import ANSWERS, QUESTIONS, batch, loss_and_gradients, picture
from utils import UserError


@pytest.mark.parametrize("image_tokens", ["one_tile", "two_tile", "anyres"])
def test_packed_equals_separate_sequences(processor, tiny_folder, image_tokens):
    model = load_model(str(tiny_folder))
    images = [picture(1), picture(2)]
    packed = [(images[0], QUESTIONS, ANSWERS), (images[1], QUESTIONS[:1], ["in front"])]
    separate = [(image, [q], [a]) for image, qs, answers in packed for q, a in zip(qs, answers, strict=True)]
    loss, gradients, logits = loss_and_gradients(model, processor, packed, image_tokens=image_tokens)
    expected, expected_gradients, expected_logits = loss_and_gradients(
        model, processor, separate, image_tokens=image_tokens
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = max(expected_gradients[name].norm().item(), 1e-3)
        assert (gradient - expected_gradients[name]).norm().item() <= 1e-5 * scale, name
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blind", [False, True])
def test_equals_the_stock_model_question_by_question(blind, processor, tiny_folder):
    """Loss, logits and gradients: own embedding of words and pictures, own attention, a last layer at answers only."""
    ours, stock = (
        load(str(tiny_folder)).eval().double()
        for load in (load_model, LlavaOnevisionForConditionalGeneration.from_pretrained)
    )
    groups = [(picture(1), QUESTIONS, ANSWERS), (picture(2, width=250), QUESTIONS[1:2], ["behind the bed"])]

    def shown(groups):
        if blind:
            prompts = [pack_questions(processor, q, a, n_image_tokens=0) for _, q, a in groups]
            return collate_prompts(prompts, pad_token_id=processor.tokenizer.pad_token_id), {}
        text, images = batch(processor, groups, image_tokens="anyres")
        return text, {k: v.double() if v.is_floating_point() else v for k, v in images.items()}

    text, images = shown(groups)
    n_prefix = text["input_ids"].shape[1] - text["attention_mask"].shape[2]
    assert blind or (text["segments"][:, :n_prefix] == PADDING_SEGMENT).any()
    vocab_size = len(processor.tokenizer)
    logits, targets = answer_logits(ours, text, images, vocab_size=vocab_size)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    row = 0
    for image, questions, answers in groups:
        for question, answer in zip(questions, answers, strict=True):
            alone, pixels = shown([(image, [question], [answer])])
            labels = alone["labels"][0]
            found = stock(input_ids=alone["input_ids"], **pixels).logits[0, :-1, :vocab_size]
            found, gold = found[labels[1:] != IGNORE], labels[labels != IGNORE]
            torch.testing.assert_close(logits[row : row + len(gold)], found)
            assert targets[row : row + len(gold)].tolist() == gold.tolist()
            F.cross_entropy(found, gold, reduction="sum").backward()
            row += len(gold)
    assert row == len(logits)
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert expected[name].grad is None or not expected[name].grad.any(), name
        else:
            # Stock norms compute in float32 whatever they are given.
            gap = (parameter.grad - expected[name].grad).norm()
            assert gap <= 1e-6 * expected[name].grad.norm() + 1e-12, name


def test_a_question_does_not_see_its_neighbours(processor, tiny_folder):
    model = load_model(str(tiny_folder)).eval()
    one = batch(processor, [(picture(1), QUESTIONS, ANSWERS)])
    other = batch(processor, [(picture(1), [QUESTIONS[0], "Where is it?", QUESTIONS[2]], [ANSWERS[0], "left", "two"])])
    vocab_size = len(processor.tokenizer)
    first, _ = answer_logits(model, *one, vocab_size=vocab_size)
    second, _ = answer_logits(model, *other, vocab_size=vocab_size)
    n = len(processor.tokenizer(ANSWERS[0]).input_ids) + 1
    torch.testing.assert_close(first[:n], second[:n])
    m = len(processor.tokenizer(ANSWERS[2]).input_ids) + 1
    torch.testing.assert_close(first[-m:], second[-m:], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(processor, tiny_folder):
    """Of the prefix and of the blocks: beside a wider picture with more questions, answers given and generated."""
    model, vocab_size = load_model(str(tiny_folder)).eval(), len(processor.tokenizer)
    options = dict(vocab_size=vocab_size, eos_token_id=processor.tokenizer.eos_token_id, max_new_tokens=6)

    def run(groups):
        logits, _ = answer_logits(model, *batch(processor, groups, image_tokens="anyres"), vocab_size=vocab_size)
        asked = [(image, questions, None) for image, questions, _ in groups]
        return logits, greedy_answers(model, *batch(processor, asked, image_tokens="anyres"), **options).tokens

    short, long = (picture(1), QUESTIONS[:1], ANSWERS[:1]), (picture(2, width=250), QUESTIONS, ANSWERS)
    logits, tokens = run([short])
    padded, padded_tokens = run([short, long])
    torch.testing.assert_close(padded[: len(logits)], logits, rtol=1e-4, atol=1e-5)
    assert padded_tokens[0] == tokens[0] and padded_tokens[1] == run([long])[1][0]


def test_what_would_be_misread_is_refused(processor, tiny_folder):
    """A model without our attention, prompts of another picture, a text model that is no Qwen2, masks after a cache."""
    text, images = batch(processor, [(picture(1), QUESTIONS, ANSWERS)])
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(str(tiny_folder))
    with pytest.raises(ValueError, match="call use_packed_attention"):
        answer_logits(stock, text, images, vocab_size=5)
    _, wider = batch(processor, [(picture(1, width=250), QUESTIONS, ANSWERS)], image_tokens="anyres")
    with pytest.raises(ValueError, match=r"65 placeholders in the prompts for \d+ image tokens"):
        answer_logits(load_model(str(tiny_folder)), text, wider, vocab_size=5)
    stock.model.language_model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="its language model is a Linear"):
        use_packed_attention(stock)
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="a mask of 2 rows for 4 queries and 6 keys"):
        packed_attention(stock, states, *[torch.zeros(1, 2, 6, 8)] * 2, torch.ones(1, 1, 2, 6, dtype=torch.bool))


def test_labels_are_the_answer_and_the_end_of_turn_only(processor):
    prompt = pack_questions(processor, QUESTIONS, ANSWERS, n_image_tokens=65)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [i for a in ANSWERS for i in [*processor.tokenizer(a).input_ids, end]]
    assert [label for label in prompt.labels if label != IGNORE] == expected
    for token, label in zip(prompt.input_ids, prompt.labels, strict=True):
        assert label in (IGNORE, token)


def test_one_token_answer_survives_the_causal_shift():
    keep, targets = answer_targets(torch.tensor([[IGNORE, 5, 2]]))
    assert keep.tolist() == [[True, True, False]] and targets.tolist() == [5, 2]


def test_an_answer_without_the_image_when_blind(processor):
    prompt = pack_questions(processor, QUESTIONS[:1], None, n_image_tokens=0)
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text == f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert set(prompt.labels) == {IGNORE}


def test_prompt_is_the_chat_template(processor):
    """Tokenizing prompt and answer apart gives the tokens of the whole rendered conversation."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    whole = processor.apply_chat_template([user, reply]).rstrip("\n")
    packed = pack_questions(processor, QUESTIONS[:1], ["red"], n_image_tokens=1)
    assert processor.tokenizer.decode(packed.input_ids) == whole
    assert packed.input_ids == processor.tokenizer(whole, add_special_tokens=False).input_ids
    head, tail = render_question(processor, QUESTIONS[0], with_image=True)
    assert head + "<image>" + tail == processor.apply_chat_template([user], add_generation_prompt=True)


def test_mask_equals_the_rule_written_out():
    segments = torch.tensor([[0, 0, -1, 1, 1, 2], [0, 0, 0, 1, 2, -1]])
    mask = packed_attention_mask(segments, n_prefix=3)
    assert mask.shape == (2, 1, 3, 6)
    for b, row in enumerate(segments.tolist()):
        for i in range(3, 6):
            for j in range(6):
                same = row[i] == row[j]
                prefix = row[j] == 0 and row[i] > 0
                assert mask[b, 0, i - 3, j].item() == (j <= i and (same or prefix))


def test_exact_matches_is_greedy_exact_match(processor, tiny_folder):
    """Feeding what the model itself generates is all right; changing one token is not."""
    text, _ = batch(processor, [(picture(1), QUESTIONS, ANSWERS)])
    _, targets = answer_targets(text["labels"])
    logits = F.one_hot(targets, len(processor.tokenizer)).float()
    assert exact_matches(logits, text).tolist() == [True, True, True]
    logits[0] = -logits[0]
    assert exact_matches(logits, text).tolist() == [False, True, True]
    logits[0], logits[-1] = -logits[0], -logits[-1]
    assert exact_matches(logits, text).tolist() == [True, True, False]


def test_positions_restart_after_the_prefix(processor):
    prompt = pack_questions(processor, QUESTIONS, ANSWERS, n_image_tokens=3)
    assert isinstance(prompt, PackedPrompt)
    prefix = prompt.segments.count(0)
    for k in (1, 2, 3):
        positions = [p for p, s in zip(prompt.positions, prompt.segments, strict=True) if s == k]
        assert positions == list(range(prefix, prefix + len(positions)))
