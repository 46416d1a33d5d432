r"""Double trouble, phase 3: the whole student learns, from gold answers, the calibrated teacher and its vision.

Loss    cross-entropy of gold tokens + kl_weight * T^2 * KL(LoCa-calibrated teacher || student) over all answer tokens
        + patch_weight * smooth-L1 of patches + contrastive_weight * InfoNCE of pooled features, as in phase 1
        (--divergence takes another divergence)
Trains  everything: vision tower (own rate), projector, language model
Reads   phase 2's checkpoint (--load_checkpoint); the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation exact match, and last), tensorboard_logs/<run>/
Rates   as in baseline_depth; LoCa (https://arxiv.org/abs/2409.04778) with alpha 0.9: where the teacher is wrong about a
        gold token, that token gets a lead of 0.1 and the other proportions stay
Cost    of the miniature, one epoch on one core: 1:37 minutes, 0.7 GiB
Result  miniature, test: 62.4 % of all questions, 69.1 % by depth (make demo, benchmarks/README.md)

    python distillation/knowledge_distillation7b_double_trouble/phase3/train_online_kd.py \
        --teacher_checkpoint --load_checkpoint --batch_size 2
    On a laptop: --miniature in place of --batch_size 2
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import at_least, fraction, positive, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_logits, image_features, overview_patches
from distillation.losses import (
    DIVERGENCES,
    answer_cross_entropy,
    answer_diagnostics,
    info_nce,
    loca_logits,
    patch_smooth_l1,
)
from distillation.models import STUDENT_NAME, load_model, parameter_groups
from distillation.run.data import build_data
from distillation.run.flags import (
    add_common_args,
    add_depth_args,
    add_divergence_args,
    add_teacher_args,
    need_checkpoint,
    parse,
)
from distillation.run.sharding import comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train
from distillation.teacher import open_teacher

BUILDS_ON = "knowledge_distillation7b_double_trouble/phase2"


class JointDistillation(pl.LightningModule):
    """A depth student that goes on with both at once: the teacher's vision and the teacher's answers."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, args, teacher, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        self.student = load_model(args.student_name, shapes_alone=comes_later(args))
        self.teacher = teacher.constants(output_layer=True, patches=True, memory_bank=True)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, those tokens (n,), standardized patches (B, P, D)."""
        features = image_features(self.student, batch["student_images"])
        images = {"image_features": features}
        logits, targets = answer_logits(self.student, batch["text"], images, vocab_size=self.vocab_size)
        patches = self.teacher.standardize(overview_patches(self.student, batch["student_images"], features))
        return logits, targets, patches

    def training_step(self, batch, batch_idx):
        logits, targets, patches = self.forward_student(batch)
        teacher_logits, teacher_patches = self.teacher.logits(batch), self.teacher.patches(batch)
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
        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=batch["teacher"]["valid_share"])
        patch = patch / n["patches"]
        contrastive, hits, candidates = info_nce(
            queries=patches.mean(1), **self.teacher.memory_bank(batch), temperature=self.args.contrastive_temperature
        )
        contrastive = contrastive / n["images"]
        loss = ce + self.args.kl_weight * kl
        loss = loss + self.args.patch_weight * patch + self.args.contrastive_weight * contrastive

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
        log_answer_scores(self, batch, logits, targets)

    def configure_optimizers(self):
        groups = parameter_groups(self.student, lr=self.args.lr, vision_lr=self.args.vision_lr)
        optimizer = adamw(self.args.optimizer_bits)(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay)
        return cosine_with_warmup(self.trainer, optimizer, self.args.warmup_share)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    add_depth_args(parser)
    add_teacher_args(parser)
    add_divergence_args(parser)
    parser.add_argument("--from_stock", action="store_true", help="start without the phases before")
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student (%(default)s)")
    parser.add_argument(
        "--loca_alpha",
        type=fraction,
        default=0.9,
        help="LoCa: a corrected token leads by 1 - alpha (%(default)s)",
    )
    parser.add_argument(
        "--patch_weight", type=at_least(0.0), default=0.5, help="weight of patch distances (%(default)s)"
    )
    parser.add_argument("--contrastive_weight", type=at_least(0.0), default=0.1, help="weight of InfoNCE (%(default)s)")
    parser.add_argument(
        "--contrastive_temperature", type=positive, default=0.07, help="InfoNCE temperature (%(default)s)"
    )
    args = parse(parser, argv, lr=5e-4, vision_lr=5e-4)
    need_checkpoint(parser, args, BUILDS_ON)
    return args


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images, builds_on=BUILDS_ON)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    module = JointDistillation(args, teacher, vocab_size=len(processor.tokenizer))
    train(module, data, run, args)


if __name__ == "__main__":
    run_script(main, parse_args)
