"""A model's folder, which may be a stranger's: what is looked at before any of it is loaded.

Weights are read from safetensors files alone, since a pickle can run code, and no Python file of the folder is ever
run. Sizes are compared with the weights that are there: config.json alone could ask for any amount of memory.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import LlavaOnevisionConfig

from utils import UserError, hf_token, model_source, read_json, reason

MODEL_TYPE = "llava_onevision"
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # all that is downloaded of a hub model
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TABLES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # tokens, no settings
MOST_LAYERS = 1000  # the 7B teacher has 28
LARGEST_NUMBER = 2**20  # in config.json; the largest of both models is rope_theta, 10**6


def model_folder(name: str) -> Path:
    """The folder of a model, looked at: its own, or that of the hub's cache, where it is downloaded first.

    Args:
        name: hub id or folder.

    Raises:
        UserError: there is none; a file is broken; it asks to run code of its own, or describes no LLaVA-OneVision
            model that could be loaded.
    """
    folder = Path(model_source(name))
    if not os.path.isdir(folder):  # no error for a name that no file can have
        try:
            folder = Path(snapshot_download(name, allow_patterns=WANTED, token=hf_token()))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name}: no such folder, and not to be had from the hub ({reason(error)}). Where there is internet: "
                f"hf download {name}, into an HF_HOME that this machine reads, too"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no LLaVA-OneVision model can be loaded from there (no config.json)")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{name}: holds an adapter, which would load another model; give a whole model")
    for path in sorted(folder.glob("*.json")):
        if path.name not in TABLES and "auto_map" in _keys(read_json(path)):
            raise UserError(
                f"{name}: {path.name} asks to run Python code that comes with the model (auto_map), which is never "
                "done; use a model that needs none"
            )
    _check_config(read_json(folder / "config.json"), name)
    return folder


def _keys(value: Any) -> Iterator[str]:
    """All keys in a JSON value, at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from found
        if isinstance(found, (dict, list)):
            waiting += found.values() if isinstance(found, dict) else found


def _check_config(config: dict[str, Any], name: str) -> None:
    """Raises UserError for another kind of model, and for numbers that no model of this kind has."""
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{name}: config.json is of a {config.get('model_type')} model; {MODEL_TYPE} is needed")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{name}: config.json has no {part}")
        layers = config[part].get("num_hidden_layers", 1)
        if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
            raise UserError(f"{name}: config.json has {part}.num_hidden_layers {layers!r:.40}, not 1 to {MOST_LAYERS}")
        for key, value in config[part].items():
            if isinstance(value, int) and value > LARGEST_NUMBER:
                raise UserError(f"{name}: config.json has {part}.{key} {value:.3g}; no model is that large")


def check_weight_files(folder: Path, name: str) -> None:
    """Look at the weights of a `model_folder` without reading them.

    Raises:
        UserError: there are none as safetensors; the index names files elsewhere; or there are fewer than config.json
            describes.
    """
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f"only {pickles[0]}, which could run code when it is loaded" if pickles else "none"
        raise UserError(f"{name}: its weights must be safetensors files, there is {found}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        names = {path.name for path in files}
        if not isinstance(listed, dict) or not all(isinstance(n, str) and n in names for n in listed.values()):
            raise UserError(f"{name}: {index.name} names files that are not in this folder; download the model again")
    try:
        needed = _least_weights(LlavaOnevisionConfig.from_pretrained(folder))
    except Exception as error:  # a stranger's settings end in errors of any kind
        raise UserError(f"{name}: config.json does not describe a {MODEL_TYPE} model ({reason(error)})") from error
    stored = sum(path.stat().st_size for path in files)  # a byte holds a weight at most
    if needed > stored:
        raise UserError(
            f"{name}: config.json describes a model of {needed:.3g} weights or more, and its files hold {stored:.3g} "
            "bytes; download the model again"
        )


def stored_weights(folder: Path) -> int:
    """The number of weights in a folder's safetensors files, by their headers alone."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _least_weights(config: LlavaOnevisionConfig) -> int:
    """The number of the large weights: embedding, projector, and the matrices of all layers."""
    text, vision = config.text_config, config.vision_config
    return (
        text.vocab_size * text.hidden_size
        + text.num_hidden_layers * (3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size**2)
        + (vision.hidden_size + text.hidden_size) * text.hidden_size
        + vision.num_hidden_layers * (2 * vision.hidden_size * vision.intermediate_size + 4 * vision.hidden_size**2)
        + ((vision.image_size // vision.patch_size) ** 2 + 3 * vision.patch_size**2) * vision.hidden_size
    )
