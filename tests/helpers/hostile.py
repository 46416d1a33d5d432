"""What a stranger could send: model folders, checkpoints, and a payload that says so when it has run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Change = Callable[[Path], object]

# What no output may hold: advice to let a stranger's code run, and characters that steer a terminal.
ADVICE = ("weights_only", "trust_remote_code", "add_safe_globals", "TORCH_FORCE", "upgrade", "Traceback")
STEERING = ("\x1b", "\x07", "\x9b", "\u202e", "\r")
EVIL_NAME = "a\x1b[31mred\x07\u202e\x9b2J|<script>alert(1)</script>\nnext"


class Payload:
    """Pickled, it makes a file where it is loaded without protection."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def setting(name: str, path: str, value: Any) -> Change:
    """Set one entry of a JSON file in a model folder; `path` leads to it: `text_config.hidden_size`."""

    def change(folder: Path) -> None:
        file = folder / name
        settings = json.loads(file.read_text())
        *parents, last = path.split(".")
        inner = settings
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        file.write_text(json.dumps(settings))

    return change


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")


def malicious(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "RAN")))


def remote_code(name: str, path: str) -> Change:
    """Code of the folder for everything that transformers would load by it."""

    def change(folder: Path) -> None:
        classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
        setting(name, path, {kind: "evil.Evil" for kind in classes})(folder)
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'RAN')!r})\n")

    return change


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    listed = {"metadata": {}, "weight_map": {"lm_head.weight": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))


# Each is applied to a copy of a good model folder.
MODEL_FOLDERS: dict[str, Change] = {
    "pickled weights": pickled,
    "pickled payload": malicious,
    "code in config": remote_code("config.json", "auto_map"),
    "code in tokenizer": remote_code("tokenizer_config.json", "auto_map"),
    "code in processor": remote_code("processor_config.json", "auto_map"),
    "code in image processor": remote_code("processor_config.json", "image_processor.auto_map"),
    "adapter of another model": content("adapter_config.json", b'{"base_model_name_or_path": "evil/model"}'),
    "broken config": content("config.json", b"{"),
    "nested config": content("config.json", b"[" * 100_000),
    "config is a list": content("config.json", b"[]"),
    "config in UTF-16": content("config.json", "{}".encode("utf-16")),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another model type": setting("config.json", "model_type", "llama"),
    "no text_config": setting("config.json", "text_config", None),
    "hidden_size 10**9": setting("config.json", "text_config.hidden_size", 10**9),
    "hidden_size 60000": setting("config.json", "text_config.hidden_size", 60_000),
    "hidden_size a text": setting("config.json", "text_config.hidden_size", "wide"),
    "hidden_size negative": setting("config.json", "text_config.hidden_size", -5),
    "layers 10**9": setting("config.json", "text_config.num_hidden_layers", 10**9),
    "vocabulary 10**6": setting("config.json", "text_config.vocab_size", 10**6),
    "no attention heads": setting("config.json", "text_config.num_attention_heads", 0),
    "image_size 10**6": setting("config.json", "vision_config.image_size", 10**6),
    "patch_size 0": setting("config.json", "vision_config.patch_size", 0),
    "dtype of code": setting("config.json", "dtype", "os.system"),
    "image tokens 10**9": setting("processor_config.json", "num_image_tokens", 10**9),
    "tiles of 10**6": setting("processor_config.json", "image_processor.size", {"height": 10**6, "width": 10**6}),
    "grids of 10**6": setting("processor_config.json", "image_processor.image_grid_pinpoints", [[10**6, 10**6]]),
    "std of 0": setting("processor_config.json", "image_processor.image_std", [0, 0, 0]),
    "broken processor": content("processor_config.json", b"nope"),
    "broken tokenizer": content("tokenizer.json", b"{"),
    "broken template": content("chat_template.jinja", b"{% for i in range(9) %}"),
    "template that reaches for code": content("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "cut weights": cut("model.safetensors", 5000),
    "junk weights": content("model.safetensors", b"\xff" * 5_000_000),
    "index of files elsewhere": index_elsewhere,
}
