"""Baseline: the 0.5B student learns to answer from depth with gold answers alone. What every distillation has to beat.

Loss    cross-entropy of the gold answer tokens (the end of the turn included), mean over those of an optimizer update
Trains  everything: vision tower (own rate), projector, language model
Reads   the pretrained 0.5B model; SUNRGBD/csv_data/{train,val}_dataset.csv
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   LLaVA-OneVision's fine-tuning: 1e-5, cosine, 3 % warm-up, no weight decay (LLaVA-VL/LLaVA-NeXT,
        scripts/train/finetune_ov.sh); vision tower 2e-5, ten times as much as there: depth is new to it, as in phase 1

    python distillation/baseline_depth/train.py --batch_size 2 --max_epochs 15
    python distillation/baseline_depth/train.py --miniature
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
from distillation.losses import answer_cross_entropy
from distillation.models import MINIATURE_STUDENT, STUDENT_NAME, load_model, split_parameters
from distillation.run.callbacks import undo_averaging
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, parse
from distillation.run.folders import start_run
from distillation.run.training import train


class DepthCE(pl.LightningModule):
    """A depth student trained on gold answers."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, *, student_name, vocab_size, lr, vision_lr, weight_decay, warmup_share):
        super().__init__()
        self.save_hyperparameters()
        self.student = load_model(student_name)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.hparams.vocab_size)

    def training_step(self, batch, batch_idx):
        logits, targets = self.forward_student(batch)
        loss = answer_cross_entropy(logits=logits, targets=targets) / batch["update"]["gold_tokens"]
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": {"loss": loss}}

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
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student")
    return parse(parser, argv, student_name=MINIATURE_STUDENT)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    module = DepthCE(
        student_name=args.student_name,
        vocab_size=len(processor.tokenizer),
        lr=args.lr,
        vision_lr=args.vision_lr,
        weight_decay=args.weight_decay,
        warmup_share=args.warmup_share,
    )
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
