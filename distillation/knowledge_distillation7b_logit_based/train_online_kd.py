"""Logit-based distillation: the depth student learns gold answers and the RGB teacher's distribution over answer tokens.

Loss    cross-entropy of gold tokens + kl_weight * T^2 * KL(teacher || student) over all answer tokens
Trains  everything: vision tower (own rate), projector, language model
Reads   the pretrained 0.5B model; the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth; T = 1 and equal weights: answers are one to four tokens and nearly certain

    python distillation/knowledge_distillation7b_logit_based/train_online_kd.py --teacher_checkpoint --batch_size 2
    python distillation/knowledge_distillation7b_logit_based/train_online_kd.py --miniature --teacher_checkpoint
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
from distillation.forward import answer_logits, answers_right
from distillation.losses import answer_cross_entropy, answer_diagnostics, forward_kl
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, STUDENT_NAME, load_model, split_parameters
from distillation.run.callbacks import undo_averaging
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, parse
from distillation.run.folders import start_run
from distillation.run.training import train
from distillation.teacher import open_teacher


class LogitDistillation(pl.LightningModule):
    """A depth student trained on gold answers and on what the teacher holds likely."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(
        self, *, student_name, teacher, kl_weight, temperature, vocab_size, lr, vision_lr, weight_decay, warmup_share
    ):
        super().__init__()
        self.save_hyperparameters(ignore="teacher")
        self.student = load_model(student_name)
        self.register_buffer("teacher_head", teacher.head(), persistent=False)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.hparams.vocab_size)

    def forward_teacher(self, batch):
        """-> logits (n, V) for the same tokens, from the cached hidden states through the teacher's frozen output layer."""
        hidden = batch["teacher"]["hidden"]
        return hidden.to(self.teacher_head.dtype) @ self.teacher_head.T

    def training_step(self, batch, batch_idx):
        logits, targets = self.forward_student(batch)
        teacher_logits = self.forward_teacher(batch)
        gold, n = batch["teacher"]["gold"], batch["update"]  # n: items of the whole optimizer update

        ce = answer_cross_entropy(logits=logits[gold], targets=targets[gold]) / n["gold_tokens"]
        kl = forward_kl(student_logits=logits, teacher_logits=teacher_logits, temperature=self.hparams.temperature)
        kl = kl / n["answer_tokens"]
        loss = ce + self.hparams.kl_weight * kl

        terms = {"loss": loss, "kl": kl}
        if n["has_gold"]:
            terms |= {"ce": ce}
        terms |= answer_diagnostics(
            student_logits=logits, teacher_logits=teacher_logits, targets=targets, gold=gold, update=n
        )
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        logits, targets = self.forward_student(batch)
        right = answers_right(logits, batch["text"])
        ce = answer_cross_entropy(logits=logits, targets=targets) / len(targets)
        self.log("val/ce", ce, batch_size=len(targets), sync_dist=True)
        self.log("val/exact_match", right.float().mean(), batch_size=len(right), sync_dist=True)

    def configure_optimizers(self):
        vision, others = split_parameters(self.student)
        groups = [{"params": vision, "lr": self.hparams.vision_lr}, {"params": others, "lr": self.hparams.lr}]
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
    parser.add_argument("--kl_weight", type=float, default=1.0, help="of the divergence from the teacher")
    parser.add_argument("--temperature", type=float, default=1.0, help="T, softens both distributions")
    return parse(parser, argv, student_name=MINIATURE_STUDENT, teacher_name=MINIATURE_TEACHER)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    data.use_teacher(teacher)
    module = LogitDistillation(
        student_name=args.student_name,
        teacher=teacher,
        kl_weight=args.kl_weight,
        temperature=args.temperature,
        vocab_size=len(processor.tokenizer),
        lr=args.lr,
        vision_lr=args.vision_lr,
        weight_decay=args.weight_decay,
        warmup_share=args.warmup_share,
    )
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
