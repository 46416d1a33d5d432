"""Feature-based distillation: the depth student learns gold answers and the RGB teacher's vision and hidden features.

Loss    cross-entropy of gold tokens + patch_weight * smooth-L1 of patches
        + hidden_weight * distance of the last hidden states at answer positions, the student's through a linear map
Trains  everything: vision tower (own rate), projector, language model; and the map, which is not part of the student
Reads   the pretrained 0.5B model; the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth; the map starts from random weights and has its own
Cost    of the miniature, half of its images, 5 epochs on one core, beside other work: 4:28 minutes
Result  miniature, test: 67.2 % by depth; labels only: 56.1 % (make reproduce, benchmarks/reproduce)

    python distillation/knowledge_distillation7b_feature_based/train_online_kd.py --teacher_checkpoint --batch_size 2
    On a laptop: --miniature in place of --batch_size 2
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import at_least, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl
import torch

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_states, image_features, output_logits, overview_patches
from distillation.losses import answer_cross_entropy, answer_diagnostics, hidden_state_loss, patch_smooth_l1
from distillation.models import STUDENT_NAME, load_model, parameter_groups
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, parse
from distillation.run.sharding import comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train
from distillation.teacher import open_teacher


class FeatureDistillation(pl.LightningModule):
    """A depth student trained on gold answers and on the teacher's features at both ends of the language model."""

    strict_loading = False  # checkpoints hold the student and the map only

    def __init__(self, args, teacher, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        self.student = load_model(args.student_name, shapes_alone=comes_later(args))
        self.teacher = teacher.constants(output_layer=True, patches=True)
        teacher_width = self.teacher.output_layer.shape[1]
        self.hidden_map = torch.nn.Linear(self.student.config.text_config.hidden_size, teacher_width)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, those tokens (n,), states (n, H), patches (B, P, D)."""
        features = image_features(self.student, batch["student_images"])
        hidden, targets = answer_states(self.student, batch["text"], {"image_features": features})
        logits = output_logits(self.student, hidden, vocab_size=self.vocab_size)
        patches = self.teacher.standardize(overview_patches(self.student, batch["student_images"], features))
        return logits, targets, hidden, patches

    def training_step(self, batch, batch_idx):
        logits, targets, hidden, patches = self.forward_student(batch)
        teacher_logits, teacher_patches = self.teacher.logits(batch), self.teacher.patches(batch)
        gold, n = batch["teacher"]["gold"], batch["update"]  # n: items of the whole optimizer update

        ce = answer_cross_entropy(logits=logits[gold], targets=targets[gold]) / n["gold_tokens"]
        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=batch["teacher"]["valid_share"])
        patch = patch / n["patches"]
        distance = hidden_state_loss(student=self.hidden_map(hidden), teacher=batch["teacher"]["hidden"])
        distance = distance / n["answer_tokens"]
        loss = ce + self.args.patch_weight * patch + self.args.hidden_weight * distance

        terms = {"loss": loss, "patch": patch, "hidden": distance}
        if n["has_gold"]:
            terms |= {"ce": ce}
        terms |= answer_diagnostics(
            student_logits=logits, teacher_logits=teacher_logits, targets=targets, gold=gold, update=n
        )
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        logits, targets, _, _ = self.forward_student(batch)
        log_answer_scores(self, batch, logits, targets)

    def configure_optimizers(self):
        groups = parameter_groups(self.student, lr=self.args.lr, vision_lr=self.args.vision_lr)
        groups += [{"params": self.hidden_map.parameters(), "lr": self.args.map_lr}]
        optimizer = adamw(self.args.optimizer_bits)(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay)
        return cosine_with_warmup(self.trainer, optimizer, self.args.warmup_share)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    add_depth_args(parser)
    add_teacher_args(parser)
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student (%(default)s)")
    parser.add_argument(
        "--patch_weight", type=at_least(0.0), default=0.5, help="weight of patch distances (%(default)s)"
    )
    parser.add_argument(
        "--hidden_weight", type=at_least(0.0), default=0.5, help="weight of hidden state distances (%(default)s)"
    )
    parser.add_argument(
        "--map_lr", type=at_least(0.0), default=1e-3, help="peak learning rate of the map (%(default)s)"
    )
    return parse(parser, argv, lr=2.5e-4, vision_lr=5e-4, map_lr=1e-3)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    module = FeatureDistillation(args, teacher, vocab_size=len(processor.tokenizer))
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
