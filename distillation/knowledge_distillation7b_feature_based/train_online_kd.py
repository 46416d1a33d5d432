"""Feature-based distillation: the depth student learns gold answers and the RGB teacher's features, in vision and in language.

Loss    cross-entropy of gold tokens + patch_weight * smooth-L1 of patches + hidden_weight * distance of the last hidden states
        at answer positions, the student's through a learned linear map
Trains  everything: vision tower (own rate), projector, language model; and the map, which is not part of the student
Reads   the pretrained 0.5B model; the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth; the map starts from random weights and has its own

    python distillation/knowledge_distillation7b_feature_based/train_online_kd.py --teacher_checkpoint --batch_size 2
    python distillation/knowledge_distillation7b_feature_based/train_online_kd.py --miniature --teacher_checkpoint
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl
import torch
from transformers import get_cosine_schedule_with_warmup

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_states, answers_right, image_features, output_logits, overview_patches
from distillation.losses import answer_cross_entropy, answer_diagnostics, hidden_state_loss, patch_smooth_l1
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, STUDENT_NAME, load_model, split_parameters
from distillation.run.callbacks import undo_averaging
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, parse
from distillation.run.folders import start_run
from distillation.run.training import train
from distillation.teacher import open_teacher


class FeatureDistillation(pl.LightningModule):
    """A depth student trained on gold answers and drawn to the teacher's features at both ends of the language model."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(
        self,
        *,
        student_name,
        teacher,
        patch_weight,
        hidden_weight,
        vocab_size,
        lr,
        vision_lr,
        map_lr,
        weight_decay,
        warmup_share,
    ):
        super().__init__()
        self.save_hyperparameters(ignore="teacher")
        self.student = load_model(student_name)
        self.register_buffer("teacher_head", teacher.head(), persistent=False)
        mean, std = teacher.statistics()  # (D,)
        self.register_buffer("patch_mean", mean, persistent=False)
        self.register_buffer("patch_std", std, persistent=False)
        self.hidden_map = torch.nn.Linear(self.student.config.text_config.hidden_size, self.teacher_head.shape[1])

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, those tokens (n,), hidden states (n, H), patches (B, P, D)."""
        features = image_features(self.student, batch["student_images"])
        hidden, targets = answer_states(self.student, batch["text"], {"seen": features})
        logits = output_logits(self.student, hidden, vocab_size=self.hparams.vocab_size)
        return logits, targets, hidden, overview_patches(self.student, batch["student_images"], features)

    def forward_teacher(self, batch):
        """-> logits (n, V) for the same tokens, from the cached hidden states through the teacher's frozen output layer."""
        hidden = batch["teacher"]["hidden"]
        return hidden.to(self.teacher_head.dtype) @ self.teacher_head.T

    def standardise(self, patches):
        """Vision features (B, P, D) of student or teacher, each channel by the teacher's mean and deviation."""
        return (patches - self.patch_mean) / self.patch_std

    def training_step(self, batch, batch_idx):
        logits, targets, hidden, patches = self.forward_student(batch)
        patches, teacher_patches = self.standardise(patches), self.standardise(batch["teacher"]["patches"])
        teacher_logits = self.forward_teacher(batch)
        gold, n = batch["teacher"]["gold"], batch["update"]  # n: items of the whole optimizer update

        ce = answer_cross_entropy(logits=logits[gold], targets=targets[gold]) / n["gold_tokens"]
        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=batch["teacher"]["valid_share"])
        patch = patch / n["patches"]
        distance = hidden_state_loss(student=self.hidden_map(hidden), teacher=batch["teacher"]["hidden"])
        distance = distance / n["answer_tokens"]
        loss = ce + self.hparams.patch_weight * patch + self.hparams.hidden_weight * distance

        terms = {"loss": loss, "patch": patch, "hidden": distance}
        if n["has_gold"]:
            terms |= {"ce": ce}
        terms |= answer_diagnostics(
            student_logits=logits, teacher_logits=teacher_logits, targets=targets, gold=gold, update=n
        )
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        logits, targets, _, _ = self.forward_student(batch)
        right = answers_right(logits, batch["text"])
        ce = answer_cross_entropy(logits=logits, targets=targets) / len(targets)
        self.log("val/ce", ce, batch_size=len(targets), sync_dist=True)
        self.log("val/exact_match", right.float().mean(), batch_size=len(right), sync_dist=True)

    def configure_optimizers(self):
        vision, others = split_parameters(self.student)
        groups = [{"params": vision, "lr": self.hparams.vision_lr}, {"params": others, "lr": self.hparams.lr}]
        groups += [{"params": self.hidden_map.parameters(), "lr": self.hparams.map_lr}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.hparams.weight_decay)
        updates = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.hparams.warmup_share * updates), updates)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    add_depth_args(parser)
    add_teacher_args(parser)
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student")
    parser.add_argument("--patch_weight", type=float, default=0.5, help="of the distance between patches")
    parser.add_argument("--hidden_weight", type=float, default=0.5, help="of the distance between hidden states")
    parser.add_argument(
        "--map_lr", type=float, default=1e-3, help="peak learning rate of the map between hidden states"
    )
    return parse(parser, argv, student_name=MINIATURE_STUDENT, teacher_name=MINIATURE_TEACHER, map_lr=2.5e-4)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    data.use_teacher(teacher)
    module = FeatureDistillation(
        student_name=args.student_name,
        teacher=teacher,
        patch_weight=args.patch_weight,
        hidden_weight=args.hidden_weight,
        vocab_size=len(processor.tokenizer),
        lr=args.lr,
        vision_lr=args.vision_lr,
        map_lr=args.map_lr,
        weight_decay=args.weight_decay,
        warmup_share=args.warmup_share,
    )
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
