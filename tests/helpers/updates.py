"""All eight scripts on a small world whose epoch is an optimizer update of 32 images and a short one of 7."""

import hashlib
from contextlib import contextmanager

import torch

from distillation.run.checkpoints import read_checkpoint
from tests.helpers.training import TROUBLE
from utils import load_script

FROM_STOCK, QUESTIONS = ("--from_stock",), ("--teacher_questions", "2")
SCRIPTS = {  # folder, file, further flags
    "baseline_depth": ("baseline_depth", "train.py", ()),
    "baseline_rgb05b": ("baseline_rgb05b", "train.py", ()),
    "baseline_rgb7b": ("baseline_rgb7b", "train2.py", ("--lora_rank", "0", "--vision_lr", "0")),
    "phase1": (f"{TROUBLE}/phase1", "train_online_kd.py", ()),
    "phase2": (f"{TROUBLE}/phase2", "train_online_kd.py", (*FROM_STOCK, *QUESTIONS)),
    "phase3": (f"{TROUBLE}/phase3", "train_online_kd.py", (*FROM_STOCK, *QUESTIONS)),
    "feature": ("knowledge_distillation7b_feature_based", "train_online_kd.py", ("--map_lr", "0", *QUESTIONS)),
    "logit": ("knowledge_distillation7b_logit_based", "train_online_kd.py", QUESTIONS),
}


def argv_of(name, tiny_folder, tiny_teacher, *more):
    """Rates of 0: the weights stay, and Adam's first moment is a weighted sum of the updates' gradients."""
    folder, _, own = SCRIPTS[name]
    leaves_out = {"phase1": ["--lr"], "phase2": ["--vision_lr"]}.get(name, [])
    argv = ["--student_name", str(tiny_folder), "--image_tokens", "one_tile", "--num_workers", "0", "--max_epochs", "1"]
    argv += ["--gradient_clip", "0", "--precision", "32-true", "--accelerator", "cpu"]
    argv += [text for rate in ("--lr", "--vision_lr") if rate not in leaves_out for text in (rate, "0")]
    argv += [] if folder.startswith("baseline") else ["--teacher_name", str(tiny_teacher)]
    return [*argv, *own, *more]


def drop(argv, flag):
    at = argv.index(flag)
    return argv[:at] + argv[at + 2 :]


def cut(batch_size, accumulate, run_name):
    return ("--batch_size", str(batch_size), "--accumulate_grad_batches", str(accumulate), "--run_name", run_name)


def script_of(name):
    folder, file, _ = SCRIPTS[name]
    return f"distillation/{folder}/{file}"


def run(name, argv):
    script = load_script(script_of(name))
    script.main(script.parse_args(argv))


def checkpoint_of(places, name, run_name):
    return read_checkpoint(places / SCRIPTS[name][0] / "checkpoints" / run_name / "last.ckpt")


def gradients(places, name, run_name):
    """0.09 times the first update's gradient plus 0.1 times the second one's, all parameters in one vector."""
    checkpoint = checkpoint_of(places, name, run_name)
    assert checkpoint["global_step"] == 2
    state = checkpoint["optimizer_states"][0]["state"]
    return torch.cat([state[i]["exp_avg"].flatten().double() for i in sorted(state)])


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def recorded_batches(script, seen):
    """What the real `training_step` of a script is given, epoch by epoch: questions and pictures of every image."""
    (module,) = [cls for cls in vars(script).values() if isinstance(cls, type) and hasattr(cls, "training_step")]
    step = module.training_step

    def recording(self, batch, batch_idx):
        if batch["spare"]:
            return step(self, batch, batch_idx)
        epoch = seen.setdefault(self.trainer.current_epoch, [])
        tiles = batch["student_images"]["pixel_values"]
        for path, ids, picture in zip(batch["image_paths"], batch["question_ids"], tiles, strict=True):
            epoch.append((path, tuple(ids), hashlib.sha256(picture.numpy().tobytes()).hexdigest()))
        return step(self, batch, batch_idx)

    module.training_step = recording
    try:
        yield
    finally:
        module.training_step = step


def seen_by(name, argv):
    script, seen = load_script(script_of(name)), {}
    with recorded_batches(script, seen):
        script.main(script.parse_args(argv))
    return seen


def images_of(epochs):
    return [path for epoch in epochs.values() for path, _, _ in epoch]
