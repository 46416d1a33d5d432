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


# Questions, answers and names that would be markup, or run, on a page that does not escape them.
MARKUP = (
    "<script>ran=1</script>", "<img src=x onerror=ran=1>", "</title><script>ran=1</script>",
    "</script><script>ran=1</script>", "</style><script>ran=1</script>", "--><script>ran=1</script>",
    "<svg onload=ran=1>", "<svg><animate onbegin=ran=1 attributeName=x>", "<iframe src=javascript:ran=1>",
    "<a href=javascript:ran=1>x</a>", "javascript:ran=1", "data:text/html,<script>ran=1</script>",
    "<body onload=ran=1>", "<details open ontoggle=ran=1>", "<input autofocus onfocus=ran=1>",
    "<meta http-equiv=refresh content=0;url=http://example.org>",
    "<link rel=stylesheet href=http://example.org/x.css>", "<base href=http://example.org/>",
    "<object data=http://example.org/x>", "<form action=http://example.org><button>x",
    "<style>*{display:none}</style>", "<style>@import 'http://example.org/x.css'</style>",
    "<math><mtext></p><style><!--</style>", "\" onmouseover=ran=1 x=\"", "' onmouseover=ran=1 x='", "`${ran=1}`",
    "{{ 7 * 7 }}{% raw %}", "&lt;script&gt;ran=1&lt;/script&gt;", "<template><script>ran=1</script></template>",
    "<!--", "<![CDATA[", "\u202e<b>turned\u001b[31m", "<noscript><p title='</noscript><img src=x onerror=ran=1>'>",
)  # fmt: skip


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


def record(**values: Any) -> Callable[[dict], object]:
    """Change what a checkpoint records."""
    return lambda checkpoint: checkpoint["hyper_parameters"].update(values)


def lacking(name: str) -> Callable[[dict], object]:
    return lambda checkpoint: checkpoint["hyper_parameters"].pop(name)


def part(name: str, value: Any) -> Callable[[dict], object]:
    """Replace one part of a checkpoint."""
    return lambda checkpoint: checkpoint.update({name: value})


def weight(change: Callable[[torch.Tensor], Any]) -> Callable[[dict], object]:
    """Change one of its weights."""

    def tamper(checkpoint: dict) -> None:
        name = max(checkpoint["state_dict"], key=lambda name: checkpoint["state_dict"][name].numel())
        checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])

    return tamper


def inner(path: str, value: Any) -> Callable[[dict], object]:
    """Replace a value deep inside a checkpoint; numbers in the path are positions."""

    def tamper(checkpoint: dict) -> None:
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        found = checkpoint
        for key in parents:
            found = found[key]
        found[last] = value

    return tamper


# Whatever reads a checkpoint has to refuse these.
TAMPERED: dict[str, Callable[[dict], object]] = {
    "record is no dict": part("hyper_parameters", "script"),
    "no student_name": lacking("student_name"),
    "student_name a number": record(student_name=7),
    "student_name of a missing folder": record(student_name="/nowhere/at all"),
    "student_name with escapes": record(student_name=EVIL_NAME),
    "no modality": lacking("modality"),
    "unknown modality": record(modality="sonar"),
    "unknown depth_encoding": record(depth_encoding="evil"),
    "unknown image_tokens": record(image_tokens=["one_tile"]),
    "unknown depth_source": record(depth_source="../raw"),
    "miniature a text": record(miniature="yes"),
    "script with ..": record(script="distillation/../../../etc/train.py"),
    "script absolute": record(script="/etc/passwd"),
    "script a number": record(script=3),
    "lora_rank 10**6": record(lora_rank=10**6, lora_alpha=2),
    "lora_rank a text": record(lora_rank="16"),
    "lora_rank negative": record(lora_rank=-1),
    "lora_rank without lora_alpha": record(lora_rank=2, lora_alpha=None),
    "seed a text": record(seed="0"),
    "label_fraction 10**9": record(label_fraction=10**9),
    "a list among the settings": record(extra=[1, 2]),
    "no weights": part("state_dict", {}),
    "weights are a list": part("state_dict", [1]),
    "a weight too large": weight(lambda value: torch.zeros(value.numel() + 1)),
    "a weight of 10**12 values": weight(lambda value: torch.zeros(1).expand(10**12)),
    "a weight of whole numbers": weight(lambda value: value.long()),
    "a weight that is a text": weight(lambda value: "weight"),
    "a weight missing": lambda checkpoint: checkpoint["state_dict"].pop(next(iter(checkpoint["state_dict"]))),
}
LOOP = "loops/fit_loop/epoch_loop.batch_progress/current"
# What only a run that goes on reads.
TAMPERED_STATE: dict[str, Callable[[dict], object]] = {
    "no position": lambda checkpoint: checkpoint.pop("position"),
    "position a text": part("position", "start"),
    "batch negative": inner("position/batch", -4),
    "world_size a text": inner("position/world_size", "1"),
    "no loops": part("loops", None),
    "loop's batch a text": inner(f"{LOOP}/ready", "3"),
    "loop's batch negative": inner(f"{LOOP}/completed", -3),
    "an unknown loop": inner("loops/fit_loop/evil", {"a": 1}),
    "no optimizer": part("optimizer_states", []),
    "optimizer a text": part("optimizer_states", ["adam"]),
    "rate a text": inner("optimizer_states/0/param_groups/0/lr", "fast"),
    "rate not finite": inner("optimizer_states/0/param_groups/0/lr", float("nan")),
    "moment of another shape": inner("optimizer_states/0/state/0/exp_avg", torch.zeros(3, 5)),
    "moment a text": inner("optimizer_states/0/state/0/exp_avg", "large"),
    "schedule's method replaced": inner("lr_schedulers/0/step", 5),
    "schedule's count a text": inner("lr_schedulers/0/last_epoch", "3"),
    "callbacks a list": part("callbacks", []),
    "best path a number": lambda checkpoint: [
        state.update(best_model_path=7) for state in checkpoint["callbacks"].values()
    ],
    "version of Lightning no version": part("pytorch-lightning_version", "newest"),
}
