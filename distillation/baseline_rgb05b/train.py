"""Baseline: the 0.5B student learns to answer from RGB with gold answers alone. What depth costs a model of this size.

Loss    cross-entropy of the gold answer tokens (the end of the turn included), mean over those of an optimizer update
Trains  everything: vision tower (own rate), projector, language model
Reads   the pretrained 0.5B model; SUNRGBD/csv_data/{train,val}_dataset.csv
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   LLaVA-OneVision's fine-tuning: 1e-5, vision tower 2e-6, cosine, 3 % warm-up, no weight decay
        (LLaVA-VL/LLaVA-NeXT, scripts/train/finetune_ov.sh); the tower of a depth student 2e-5: depth is new to it.
        AdamW's betas 0.9 and 0.98 are those of Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 5.3
Cost    of the miniature: 0.11 s per update of 8 images on one core, 0.6 GiB (make demo)
Result  miniature, test: 79.8 % of all questions, 75.7 % by depth (make demo, half of the images once)

    python distillation/baseline_rgb05b/train.py --batch_size 2 --max_epochs 15
    On a laptop: --miniature in place of the other flags
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_logits
from distillation.losses import answer_cross_entropy
from distillation.models import STUDENT_NAME, load_model, parameter_groups
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, parse
from distillation.run.sharding import comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train


class SupervisedStudent(pl.LightningModule):
    """A student trained on gold answers alone."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, args, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        self.student = load_model(args.student_name, shapes_alone=comes_later(args))

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.vocab_size)

    def training_step(self, batch, batch_idx):
        logits, targets = self.forward_student(batch)
        loss = answer_cross_entropy(logits=logits, targets=targets) / batch["update"]["gold_tokens"]
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": {"loss": loss}}

    def validation_step(self, batch, batch_idx):
        log_answer_scores(self, batch, *self.forward_student(batch))

    def configure_optimizers(self):
        groups = parameter_groups(self.student, lr=self.args.lr, vision_lr=self.args.vision_lr)
        optimizer = adamw(self.args.optimizer_bits)(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay)
        return cosine_with_warmup(self.trainer, optimizer, self.args.warmup_share)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student (%(default)s)")
    return parse(parser, argv)


def main(args):
    images = ImageSettings("rgb", image_tokens=args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    module = SupervisedStudent(args, vocab_size=len(processor.tokenizer))
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
