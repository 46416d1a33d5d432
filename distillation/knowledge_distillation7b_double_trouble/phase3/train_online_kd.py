"""Double trouble, phase 3: all of the student learns, from gold answers, the calibrated teacher and the teacher's vision.

Loss    cross-entropy of gold tokens + kl_weight * T^2 * KL(LoCa-calibrated teacher || student) over all answer tokens
        + patch_weight * smooth-L1 of patches + contrastive_weight * InfoNCE of pooled features, as in phase 1
Trains  everything: vision tower (own rate), projector, language model
Reads   phase 2's checkpoint (--load_checkpoint); the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth

    python distillation/knowledge_distillation7b_double_trouble/phase3/train_online_kd.py --teacher_checkpoint --batch_size 2 --load_checkpoint
    python distillation/knowledge_distillation7b_double_trouble/phase3/train_online_kd.py --miniature --teacher_checkpoint --load_checkpoint
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl
import torch
from transformers import get_cosine_schedule_with_warmup

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_logits, answers_right, image_features, overview_patches
from distillation.losses import (
    answer_cross_entropy,
    answer_diagnostics,
    forward_kl,
    info_nce,
    loca_logits,
    patch_smooth_l1,
)
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, STUDENT_NAME, load_model, split_parameters
from distillation.run.callbacks import undo_averaging
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, need_checkpoint, parse
from distillation.run.folders import start_run
from distillation.run.training import train
from distillation.teacher import check_bank, open_teacher, same_recording

PHASE_2 = "knowledge_distillation7b_double_trouble/phase2"


class JointDistillation(pl.LightningModule):
    """A depth student that goes on with both of the teacher's lessons at once, what it sees and what it says."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(
        self,
        *,
        student_name,
        teacher,
        kl_weight,
        temperature,
        loca_alpha,
        patch_weight,
        contrastive_weight,
        contrastive_temperature,
        vocab_size,
        lr,
        vision_lr,
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
        self.register_buffer("bank", teacher.bank(), persistent=False)  # (N, D), a row per training image
        self.register_buffer("recordings", teacher.recordings(), persistent=False)  # (N,)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, those tokens (n,), vision features (B, P, D)."""
        features = image_features(self.student, batch["student_images"])
        logits, targets = answer_logits(
            self.student, batch["text"], {"seen": features}, vocab_size=self.hparams.vocab_size
        )
        return logits, targets, overview_patches(self.student, batch["student_images"], features)

    def forward_teacher(self, batch):
        """-> logits (n, V) for the same tokens, from the cached hidden states through the teacher's frozen output layer."""
        hidden = batch["teacher"]["hidden"]
        return hidden.to(self.teacher_head.dtype) @ self.teacher_head.T

    def standardise(self, patches):
        """Vision features (B, P, D) of student or teacher, each channel by the teacher's mean and deviation."""
        return (patches - self.patch_mean) / self.patch_std

    def training_step(self, batch, batch_idx):
        logits, targets, patches = self.forward_student(batch)
        patches, teacher_patches = self.standardise(patches), self.standardise(batch["teacher"]["patches"])
        teacher_logits = self.forward_teacher(batch)
        gold, n = batch["teacher"]["gold"], batch["update"]  # n: items of the whole optimizer update

        calibrated, corrected = loca_logits(
            teacher_logits=teacher_logits,
            targets=targets,
            alpha=self.hparams.loca_alpha,
            temperature=self.hparams.temperature,
        )

        ce = answer_cross_entropy(logits=logits[gold], targets=targets[gold]) / n["gold_tokens"]
        kl = forward_kl(student_logits=logits, teacher_logits=calibrated, temperature=self.hparams.temperature)
        kl = kl / n["answer_tokens"]
        valid_share, rows = batch["teacher"]["valid_share"], batch["teacher"]["bank_rows"]
        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=valid_share) / n["patches"]
        contrastive, hits, candidates = info_nce(
            queries=patches.mean(1),
            bank=self.bank,
            positives=rows,
            excluded=same_recording(self.recordings, rows),
            temperature=self.hparams.contrastive_temperature,
        )
        contrastive = contrastive / n["images"]
        loss = ce + self.hparams.kl_weight * kl
        loss = loss + self.hparams.patch_weight * patch + self.hparams.contrastive_weight * contrastive

        terms = {"loss": loss, "kl": kl, "patch": patch, "contrastive": contrastive}
        terms["contrastive_accuracy"] = hits / n["images"]
        terms["contrastive_chance"] = (1 / candidates).sum() / n["images"]
        if n["has_gold"]:
            terms |= {"ce": ce, "corrected": corrected[gold].sum() / n["gold_tokens"]}
        terms |= answer_diagnostics(
            student_logits=logits, teacher_logits=teacher_logits, targets=targets, gold=gold, update=n
        )
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        logits, targets, _ = self.forward_student(batch)
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
    parser.add_argument("--from_stock", action="store_true", help="leave out the phases before: from the stock student")
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student")
    parser.add_argument("--kl_weight", type=float, default=1.0, help="of the divergence from the teacher")
    parser.add_argument("--temperature", type=float, default=1.0, help="T, softens both distributions")
    parser.add_argument("--loca_alpha", type=float, default=0.9, help="a corrected token leads by 1 - alpha")
    parser.add_argument("--patch_weight", type=float, default=0.5, help="of the distance between patches")
    parser.add_argument("--contrastive_weight", type=float, default=0.1, help="of InfoNCE")
    parser.add_argument("--contrastive_temperature", type=float, default=0.07, help="of InfoNCE")
    args = parse(parser, argv, student_name=MINIATURE_STUDENT, teacher_name=MINIATURE_TEACHER, vision_lr=5e-4)
    need_checkpoint(parser, args, PHASE_2)
    return args


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    data.use_teacher(teacher)
    check_bank(teacher)
    module = JointDistillation(
        student_name=args.student_name,
        teacher=teacher,
        kl_weight=args.kl_weight,
        temperature=args.temperature,
        loca_alpha=args.loca_alpha,
        patch_weight=args.patch_weight,
        contrastive_weight=args.contrastive_weight,
        contrastive_temperature=args.contrastive_temperature,
        vocab_size=len(processor.tokenizer),
        lr=args.lr,
        vision_lr=args.vision_lr,
        weight_decay=args.weight_decay,
        warmup_share=args.warmup_share,
    )
    train(module, data, run, args, builds_on=PHASE_2)


if __name__ == "__main__":
    run_script(main, parse_args)
