"""Models and training steps on shapes alone: how much memory and how many operations they take, without weights.

Weights and what is computed from them are PyTorch's fake tensors, which have a shape and no values. Whole numbers and
truth values (tokens, masks, positions) are real: the shapes of a packed batch depend on them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.initialization import no_init_weights

from dataset.inputs.processor import FloatImageProcessor, ImageTextProcessor, load_processor
from distillation.models import MINIATURE_STUDENT, new_model

aten = torch.ops.aten
TOTAL = "Total"  # of a snapshot of `MemTracker`


def true_config(size: str) -> LlavaOnevisionConfig:
    """The published configurations of the 0.5B and the 7B (llava-hf/llava-onevision-qwen2-*-ov-hf)."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    small = size == "0.5b"
    text = Qwen2Config(
        vocab_size=152000 if small else 152128,
        hidden_size=896 if small else 3584,
        intermediate_size=4864 if small else 18944,
        num_hidden_layers=24 if small else 28,
        num_attention_heads=14 if small else 28,
        num_key_value_heads=2 if small else 4,
        tie_word_embeddings=small,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=151646,
        video_token_index=151647,
        tie_word_embeddings=small,
    )


def true_processor() -> ImageTextProcessor:
    """The true image settings: tiles of 384 pixels, 729 tokens each; the words are the miniature's."""
    small = load_processor(MINIATURE_STUDENT)
    images = FloatImageProcessor(size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ImageTextProcessor(
        image_processor=images,
        tokenizer=small.tokenizer,
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=small.chat_template,
    )


def model_of_shapes(config: LlavaOnevisionConfig, dtype: torch.dtype = torch.float32):
    """A model as `load_model` returns it, without values; call it within `shapes_only`."""
    with no_init_weights():
        return new_model(config, dtype)


class WholeNumbersAreReal(TorchDispatchMode):
    """Computes what is made of whole numbers only; everything else goes on to the fake tensors."""

    MAKERS = {
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.zeros.default, aten.ones.default,
        aten.full.default, aten.empty.memory_format, aten.scalar_tensor.default,
    }  # fmt: skip
    MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fake and (tensors or self._makes_whole_numbers(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in self.MASKED:
            args = (args[0], self._places(args[1]), *args[2:])
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        return func(*args, **kwargs)

    def _makes_whole_numbers(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether it makes whole numbers, or a single number: an optimizer's count of steps has a fraction."""
        if func not in self.MAKERS:
            return False
        with unset_fake_temporarily():
            made = func(*args, **(kwargs | {"device": "meta"}))
        return made.numel() == 1 or not made.is_floating_point()

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor, static_shapes=True)

    @staticmethod
    def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
        """Truth values as the places where they are true: how many these are decides a shape."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                with unset_fake_temporarily():
                    found += index.nonzero(as_tuple=True)
            else:
                found.append(index)
        return found


class StepMemory(MemTracker):
    """PyTorch's tracker of live memory, for models in which not everything trains, with sparse gradients.

    Logits, recognised by their width, are counted as `OTH`.
    """

    def __init__(self, vocabularies: set[int]) -> None:
        super().__init__()
        self.vocabularies = vocabularies

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        found = super()._track_module_params_and_buffers(module, install_grad_hooks=False)
        for parameter in module.parameters():
            if install_grad_hooks and parameter.requires_grad and parameter not in self._param_to_grad_hook_handles:
                handle = parameter.register_post_accumulate_grad_hook(self._is_gradient)
                self._param_to_grad_hook_handles[parameter] = handle, handle
        return found

    def _is_gradient(self, parameter: nn.Parameter) -> None:
        self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def _update_and_maybe_create_winfos(self, t: Tensor, reftype: Any, update_existing: bool = False) -> set:
        return set() if t.is_sparse else super()._update_and_maybe_create_winfos(t, reftype, update_existing)

    def _track(self, reftype: Any, t: Tensor) -> None:
        kind = _MemRefType.OTH if t.ndim > 1 and t.shape[-1] in self.vocabularies else reftype
        for part in (t._indices(), t._values()) if t.is_sparse else (t,):
            super()._track(kind, part)

    def _update_peak_stats(self, peak_state: Any) -> None:
        """The peak of all modules together: one for each of hundreds of modules would take minutes."""
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot[TOTAL]:
                self._peak_mem[device], self._peak_mem_snap[device] = snapshot[TOTAL], dict(snapshot)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int
    buffers: int  # what a student needs of its teacher: output layer, memory bank
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def peak(tracker: MemTracker) -> Memory:
    """The peak that a tracker has seen, by part."""
    parts = dict.fromkeys(_MemRefType, 0)
    for snapshot in tracker.get_tracker_snapshot("peak").values():
        for kind in _MemRefType:
            parts[kind] += snapshot.get(kind, 0)
    return Memory(
        weights=parts[_MemRefType.PARAM],
        buffers=parts[_MemRefType.BUFFER],
        gradients=parts[_MemRefType.GRAD],
        optimizer=parts[_MemRefType.OPT],
        activations=parts[_MemRefType.ACT] + parts[_MemRefType.TEMP],
        logits=parts[_MemRefType.OTH],
    )


@contextmanager
def shapes_only() -> Iterator[FakeTensorMode]:
    """Models and tensors that are made in the block have no values, unless they are whole numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, WholeNumbersAreReal(fake), _parameters_replaced():
        yield fake


@contextmanager
def _parameters_replaced() -> Iterator[None]:
    """`module.to` puts new parameters in place of the old ones: it would swap them, which fake tensors do not allow."""

    def apply(self: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(convert)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    new = convert(parameter)
                if new is not parameter:
                    self._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else convert(buffer)
        return self

    before, nn.Module._apply = nn.Module._apply, apply
    try:
        yield
    finally:
        nn.Module._apply = before


@contextmanager
def real_numbers() -> Iterator[None]:
    """Tensors that are made in this block, within `shapes_only`, have values."""
    with unset_fake_temporarily():
        yield
