"""Double trouble, phase 1: the student's vision tower learns to see in depth what the teacher's tower sees in colour.

Loss    patch_weight * smooth-L1 of matching patches (holes and padding left out)
        + contrastive_weight * InfoNCE of pooled features against a bank with a row for every training image
Trains  the vision tower; no answers are needed
Reads   the pretrained 0.5B model; the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation cosine of patches, and last), tensorboard_logs/<run>/
Rates   2e-5 for the tower, ten times fine-tuning's: depth is new to it

    python distillation/knowledge_distillation7b_double_trouble/phase1/train_online_kd.py --teacher_checkpoint --batch_size 2
    python distillation/knowledge_distillation7b_double_trouble/phase1/train_online_kd.py --miniature --teacher_checkpoint
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
from distillation.forward import answer_logits, answers_right, overview_patches
from distillation.losses import answer_cross_entropy, info_nce, patch_cosine, patch_smooth_l1
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, STUDENT_NAME, load_model, set_trainable
from distillation.run.callbacks import undo_averaging
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, parse
from distillation.run.folders import start_run
from distillation.run.training import train
from distillation.teacher import check_bank, open_teacher, same_recording


class VisionAlignment(pl.LightningModule):
    """A depth student whose vision tower is drawn to the teacher's vision features of the same scenes."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(
        self,
        *,
        student_name,
        teacher,
        patch_weight,
        contrastive_weight,
        contrastive_temperature,
        vocab_size,
        vision_lr,
        weight_decay,
        warmup_share,
    ):
        super().__init__()
        self.save_hyperparameters(ignore="teacher")
        self.student = load_model(student_name)
        set_trainable(self.student, vision=True, projector=False, language=False)
        mean, std = teacher.statistics()  # (D,)
        self.register_buffer("patch_mean", mean, persistent=False)
        self.register_buffer("patch_std", std, persistent=False)
        self.register_buffer("bank", teacher.bank(), persistent=False)  # (N, D), a row per training image
        self.register_buffer("recordings", teacher.recordings(), persistent=False)  # (N,)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.hparams.vocab_size)

    def standardise(self, patches):
        """Vision features (B, P, D) of student or teacher, each channel by the teacher's mean and deviation."""
        return (patches - self.patch_mean) / self.patch_std

    def training_step(self, batch, batch_idx):
        patches = self.standardise(overview_patches(self.student, batch["student_images"]))
        teacher_patches = self.standardise(batch["teacher"]["patches"])
        valid_share, rows = batch["teacher"]["valid_share"], batch["teacher"]["bank_rows"]
        n = batch["update"]  # items of the whole optimizer update
        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=valid_share) / n["patches"]
        contrastive, hits, candidates = info_nce(
            queries=patches.mean(1),
            bank=self.bank,
            positives=rows,
            excluded=same_recording(self.recordings, rows),
            temperature=self.hparams.contrastive_temperature,
        )
        contrastive = contrastive / n["images"]
        loss = self.hparams.patch_weight * patch + self.hparams.contrastive_weight * contrastive

        terms = {"loss": loss, "patch": patch, "contrastive": contrastive, "contrastive_accuracy": hits / n["images"]}
        terms["contrastive_chance"] = (1 / candidates).sum() / n["images"]
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        patches = self.standardise(overview_patches(self.student, batch["student_images"]))
        teacher_patches = self.standardise(batch["teacher"]["patches"])
        distance = patch_cosine(student=patches, teacher=teacher_patches, weights=batch["teacher"]["valid_share"])
        n = batch["counts"]["patches"] or 1e-6  # a batch without depth counts for nothing
        self.log("val/patch_cosine", 1 - distance / n, batch_size=n, sync_dist=True)
        logits, targets = self.forward_student(batch)
        right = answers_right(logits, batch["text"])
        ce = answer_cross_entropy(logits=logits, targets=targets) / len(targets)
        self.log("val/ce", ce, batch_size=len(targets), sync_dist=True)
        self.log("val/exact_match", right.float().mean(), batch_size=len(right), sync_dist=True)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.hparams.vision_lr, betas=(0.9, 0.98), weight_decay=self.hparams.weight_decay
        )
        updates = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.hparams.warmup_share * updates), updates)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser, leave_out=["--lr", "--label_fraction", "--questions_per_image"])
    add_depth_args(parser)
    add_teacher_args(parser, asks=False)
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student")
    parser.add_argument("--patch_weight", type=float, default=1.0, help="of the distance between patches")
    parser.add_argument("--contrastive_weight", type=float, default=0.01, help="of InfoNCE")
    parser.add_argument("--contrastive_temperature", type=float, default=0.07, help="of InfoNCE")
    return parse(parser, argv, student_name=MINIATURE_STUDENT, teacher_name=MINIATURE_TEACHER, vision_lr=1e-3)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    data.use_teacher(teacher)
    check_bank(teacher)
    module = VisionAlignment(
        student_name=args.student_name,
        teacher=teacher,
        patch_weight=args.patch_weight,
        contrastive_weight=args.contrastive_weight,
        contrastive_temperature=args.contrastive_temperature,
        vocab_size=len(processor.tokenizer),
        vision_lr=args.vision_lr,
        weight_decay=args.weight_decay,
        warmup_share=args.warmup_share,
    )
    train(module, data, run, args, monitor="val/patch_cosine")


if __name__ == "__main__":
    run_script(main, parse_args)
