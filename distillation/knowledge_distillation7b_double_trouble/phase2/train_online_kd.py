r"""Double trouble, phase 2: the language model learns to read aligned depth, from gold answers and the teacher.

Loss    cross-entropy of gold tokens + kl_weight * T^2 * KL(LoCa-calibrated teacher || student) over all answer tokens
        (--divergence takes another divergence)
Trains  projector and language model; the vision tower stays as phase 1 left it
Reads   phase 1's checkpoint (--load_checkpoint); the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth; LoCa (https://arxiv.org/abs/2409.04778) with alpha 0.9: where the teacher is wrong about a
        gold token, that token gets a lead of 0.1 and the other proportions stay
Cost    of the miniature, one epoch on one core: 1:11 minutes, 0.6 GiB
Result  miniature, val: 59.3 % of all questions (make demo, benchmarks/README.md)

    python distillation/knowledge_distillation7b_double_trouble/phase2/train_online_kd.py \
        --teacher_checkpoint --load_checkpoint --batch_size 2
    On a laptop: --miniature in place of --batch_size 2
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import fraction, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_logits
from distillation.losses import DIVERGENCES, answer_cross_entropy, answer_diagnostics, loca_logits
from distillation.models import STUDENT_NAME, load_model, parameter_groups, set_trainable
from distillation.run.data import build_data
from distillation.run.flags import (
    add_common_args,
    add_depth_args,
    add_divergence_args,
    add_teacher_args,
    add_vision_cache_arg,
    need_checkpoint,
    parse,
)
from distillation.run.sharding import comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train
from distillation.teacher import open_teacher

BUILDS_ON = "knowledge_distillation7b_double_trouble/phase1"


class CalibratedDistillation(pl.LightningModule):
    """A depth student with aligned vision whose language model learns from gold answers and a calibrated teacher."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, args, teacher, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        self.student = load_model(args.student_name, shapes_alone=comes_later(args))
        set_trainable(self.student, vision=False, projector=True, language=True)
        self.teacher = teacher.constants(output_layer=True)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.vocab_size)

    def training_step(self, batch, batch_idx):
        logits, targets = self.forward_student(batch)
        teacher_logits = self.teacher.logits(batch)
        gold, n = batch["teacher"]["gold"], batch["update"]  # n: items of the whole optimizer update

        calibrated, corrected = loca_logits(
            teacher_logits=teacher_logits,
            targets=targets,
            alpha=self.args.loca_alpha,
            temperature=self.args.temperature,
        )

        ce = answer_cross_entropy(logits=logits[gold], targets=targets[gold]) / n["gold_tokens"]
        divergence = DIVERGENCES[self.args.divergence]
        kl = divergence(student_logits=logits, teacher_logits=calibrated, temperature=self.args.temperature)
        kl = kl / n["answer_tokens"]
        loss = ce + self.args.kl_weight * kl

        terms = {"loss": loss, "kl": kl}
        if n["has_gold"]:
            terms |= {"ce": ce, "corrected": corrected[gold].sum() / n["gold_tokens"]}
        terms |= answer_diagnostics(
            student_logits=logits, teacher_logits=teacher_logits, targets=targets, gold=gold, update=n
        )
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        log_answer_scores(self, batch, *self.forward_student(batch))

    def configure_optimizers(self):
        groups = parameter_groups(self.student, lr=self.args.lr)
        optimizer = adamw(self.args.optimizer_bits)(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay)
        return cosine_with_warmup(self.trainer, optimizer, self.args.warmup_share)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser, leave_out=["--vision_lr"])
    add_depth_args(parser)
    add_teacher_args(parser)
    add_divergence_args(parser)
    add_vision_cache_arg(parser)
    parser.add_argument("--from_stock", action="store_true", help="start without the phases before")
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student (%(default)s)")
    parser.add_argument(
        "--loca_alpha",
        type=fraction,
        default=0.9,
        help="LoCa: a corrected token leads by 1 - alpha (%(default)s)",
    )
    args = parse(parser, argv, lr=5e-4)
    need_checkpoint(parser, args, BUILDS_ON)
    return args


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images, builds_on=BUILDS_ON)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    module = CalibratedDistillation(args, teacher, vocab_size=len(processor.tokenizer))
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
