"""Baseline: the 7B model adapted to RGB rooms with gold answers. The teacher of every distillation, and its ceiling.

Loss    cross-entropy of the gold answer tokens (the end of the turn included), mean over those of an optimizer update
Trains  LoRA on all linear layers of the language model, and the projector; everything with --lora_rank 0
Reads   the pretrained 7B model; SUNRGBD/csv_data/{train,val}_dataset.csv
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   1e-4, ten times the full fine-tuning's, as is usual for LoRA; schedule and the rest as in its siblings
Cost    of the miniature, 2 epochs on two cores: 1:15 minutes, 0.7 GiB
Result  miniature, test: 85.3 % of all questions, 82.1 % by depth (make demo, benchmarks/README.md)

    python distillation/baseline_rgb7b/train2.py --batch_size 2 --max_epochs 10
    On a laptop: --miniature in place of the other flags
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
from distillation.forward import answer_logits
from distillation.losses import answer_cross_entropy
from distillation.models import MINIATURE_TEACHER, TEACHER_NAME, add_lora, load_model, parameter_groups
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_vision_cache_arg, parse
from distillation.run.machine import frozen_dtype
from distillation.run.sharding import FSDP2, comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train


class SupervisedLoRA(pl.LightningModule):
    """The RGB model that becomes the teacher; called student here as in every script, since it is what trains."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, args, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        frozen = frozen_dtype(args.precision, args.accelerator) if args.lora_rank else torch.float32
        self.student = load_model(args.student_name, dtype=frozen, bits=args.base_bits, shapes_alone=comes_later(args))
        if args.lora_rank:
            self.student = add_lora(self.student, rank=args.lora_rank, alpha=args.lora_alpha)

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
    parser.set_defaults(lr=1e-4, vision_lr=None)
    add_vision_cache_arg(parser)
    parser.add_argument("--student_name", default=TEACHER_NAME, help="hub id or folder of the model (%(default)s)")
    parser.add_argument(
        "--lora_rank", type=at_least(0), default=16, help="rank of adapters; 0 = all weights (%(default)s)"
    )
    parser.add_argument(
        "--lora_alpha", type=at_least(1), help="adapters are scaled by lora_alpha / lora_rank (twice the rank)"
    )
    parser.add_argument(
        "--base_bits",
        type=int,
        choices=(16, 4),
        default=16,
        help="bits of the frozen language model under the adapters; 4 fits a 7B on 16 GB (%(default)s)",
    )
    args = parse(parser, argv, student_name=MINIATURE_TEACHER, batch_size=32, max_epochs=2, lr=1e-3)
    if args.lora_rank and args.vision_lr is not None:
        parser.error("--vision_lr: LoRA leaves the vision tower frozen; leave it out, or train all with --lora_rank 0")
    if not args.lora_rank and (args.vision_lr is None or args.lora_alpha is not None):
        parser.error(
            "--lora_rank 0 trains all weights: give --lr and --vision_lr (its siblings': 1e-5, 2e-6), no --lora_alpha"
        )
    if args.base_bits == 4 and not (args.lora_rank and args.strategy != FSDP2):
        parser.error(f"--base_bits 4: such weights train under LoRA only, and not with --strategy {FSDP2}")
    args.lora_alpha = args.lora_alpha or 2 * args.lora_rank
    return args


def main(args):
    images = ImageSettings("rgb", image_tokens=args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    module = SupervisedLoRA(args, vocab_size=len(processor.tokenizer))
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
