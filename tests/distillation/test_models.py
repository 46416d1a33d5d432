"""Models: trainable parts, true sizes, LoRA checkpoints."""

import json
import shutil
import warnings

import pytest
import torch

from distillation.forward import input_embeddings, output_logits
from distillation.models import (
    add_lora,
    load_model,
    load_trained_state,
    parameter_groups,
    trained_state,
)
from tests.helpers.prompts import ANSWERS, QUESTIONS, loss_and_gradients, picture
from utils import UserError


def test_loaded_student_trains_in_float32(tiny_folder):
    model = load_model(str(tiny_folder))
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 2 and all("vision_tower.post_layernorm" in name for name in frozen)
    groups = parameter_groups(model, lr=1e-5, vision_lr=2e-6)
    assert [group["lr"] for group in groups] == [2e-6, 1e-5]
    with pytest.raises(ValueError, match="vision_lr: .* no learning rate"):
        parameter_groups(model, lr=1e-5)
    vision, others = (group["params"] for group in groups)
    assert {id(p) for p in vision}.isdisjoint(id(p) for p in others)
    assert len(vision) + len(others) == len(list(model.parameters())) - 2


def test_every_trainable_parameter_gets_a_gradient(tiny_folder, processor):
    """DDP stops at one that does not."""
    model = load_model(str(tiny_folder))
    for image_tokens in ("one_tile", "anyres"):
        _, gradients, _ = loss_and_gradients(
            model, processor, [(picture(1), QUESTIONS, ANSWERS)], image_tokens=image_tokens
        )
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable - {"model.image_newline"} <= gradients.keys()
        assert "model.image_newline" in gradients


def test_lora_state_is_small_and_restores(tiny_folder):
    torch.manual_seed(1)
    model = add_lora(load_model(str(tiny_folder)), rank=2, alpha=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    state = trained_state(model)
    assert len(state) < len(model.state_dict()) / 2
    other = add_lora(load_model(str(tiny_folder)), rank=2, alpha=4)
    load_trained_state(other, state, origin="x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match="x.ckpt"):
        load_trained_state(load_model(str(tiny_folder)), state, origin="x.ckpt")
    del state[next(iter(state))]
    with pytest.raises(UserError, match="1 missing"):
        load_trained_state(other, state, origin="x.ckpt")


@pytest.mark.parametrize("of_parts", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_alone_are_those_of_the_weights(dtype, of_parts, tiny_folder, tmp_path):
    """Also where the parts' configurations name another type, as those of exports do; and misfits are found in them."""
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = of_parts
    (folder / "config.json").write_text(json.dumps(config))
    whole, shapes = (load_model(str(folder), dtype=dtype, shapes_alone=alone) for alone in (False, True))
    for kind in ("named_parameters", "named_buffers"):
        own, others = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (shapes, whole))
        assert own.keys() == others.keys() and all(tensor.is_meta for tensor in own.values())
        for name, tensor in own.items():
            other = others[name]
            assert (tensor.shape, tensor.dtype, tensor.requires_grad) == (other.shape, other.dtype, other.requires_grad)
    state = trained_state(whole)
    with warnings.catch_warnings(action="error"):
        load_trained_state(shapes, state, origin="x.ckpt")
    with pytest.raises(UserError, match="x.ckpt: the weights are of another model .0 missing, 1 unknown"):
        load_trained_state(shapes, state | {"strange": torch.ones(1)}, origin="x.ckpt")


def test_missing_model_names_the_place(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path / "nothing")):
        load_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_words_gradient_is_the_stock_embeddings(tied, tiny_folder):
    """Dense for the optimizer, whether the output layer is the same weight or another."""
    model = load_model(str(tiny_folder))
    embedding = model.get_input_embeddings()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[5, 7, 5, embedding.padding_idx]])
    gradients = []
    for embed in (lambda ids: input_embeddings(model, ids, {}), embedding):
        model.zero_grad()
        output_logits(model, embed(ids).flatten(0, 1), vocab_size=9).logsumexp(-1).sum().backward()
        gradients.append(embedding.weight.grad)
    assert gradients[0].layout == torch.strided and gradients[0][5].any()
    torch.testing.assert_close(*gradients)
