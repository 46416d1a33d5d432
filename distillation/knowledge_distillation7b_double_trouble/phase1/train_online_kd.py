r"""Double trouble, phase 1: the vision tower learns to see in depth what the teacher's tower sees in color.

Loss    patch_weight * smooth-L1 of matching patches (holes and padding left out)
        + contrastive_weight * InfoNCE of pooled features against a memory bank with a row for every training image
Trains  the vision tower; no answers are needed
Reads   the pretrained 0.5B model; the teacher's outputs (computed once); SUNRGBD/csv_data
Writes  checkpoints/<run>/ (best by validation cosine of patches, and last), tensorboard_logs/<run>/
Rates   2e-5 for the tower, ten times fine-tuning's: depth is new to it; schedule and the rest as in baseline_depth
Cost    of the miniature, one epoch on one core: 0:51 minutes, 0.6 GiB
Result  miniature, val: cosine of patches .767 (make demo, benchmarks/README.md)

    python distillation/knowledge_distillation7b_double_trouble/phase1/train_online_kd.py \
        --teacher_checkpoint --batch_size 2
    On a laptop: --miniature in place of --batch_size 2
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import at_least, positive, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse

import pytorch_lightning as pl

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.forward import answer_logits, overview_patches
from distillation.losses import info_nce, patch_cosine, patch_smooth_l1
from distillation.models import STUDENT_NAME, load_model, parameter_groups, set_trainable
from distillation.run.data import build_data
from distillation.run.flags import add_common_args, add_depth_args, add_teacher_args, parse
from distillation.run.sharding import comes_later
from distillation.run.start import start_run
from distillation.run.steps import adamw, cosine_with_warmup, log_answer_scores, undo_averaging
from distillation.run.training import train
from distillation.teacher import open_teacher


class VisionAlignment(pl.LightningModule):
    """A depth student whose vision tower learns the teacher's vision features of the same scenes."""

    strict_loading = False  # checkpoints hold the student only

    def __init__(self, args, teacher, *, vocab_size):
        super().__init__()
        self.args, self.vocab_size = args, vocab_size
        self.student = load_model(args.student_name, shapes_alone=comes_later(args))
        set_trainable(self.student, vision=True, projector=False, language=False)
        self.teacher = teacher.constants(patches=True, memory_bank=True)

    def forward_student(self, batch):
        """-> logits (n, V) that predict the n answer tokens, and those tokens (n,)."""
        return answer_logits(self.student, batch["text"], batch["student_images"], vocab_size=self.vocab_size)

    def training_step(self, batch, batch_idx):
        patches = self.teacher.standardize(overview_patches(self.student, batch["student_images"]))
        teacher_patches, n = self.teacher.patches(batch), batch["update"]  # n: items of the whole optimizer update

        patch = patch_smooth_l1(student=patches, teacher=teacher_patches, weights=batch["teacher"]["valid_share"])
        patch = patch / n["patches"]
        contrastive, hits, candidates = info_nce(
            queries=patches.mean(1), **self.teacher.memory_bank(batch), temperature=self.args.contrastive_temperature
        )
        contrastive = contrastive / n["images"]
        loss = self.args.patch_weight * patch + self.args.contrastive_weight * contrastive

        terms = {"loss": loss, "patch": patch, "contrastive": contrastive, "contrastive_accuracy": hits / n["images"]}
        terms["contrastive_chance"] = (1 / candidates).sum() / n["images"]
        return {"loss": undo_averaging(self.trainer, batch) * loss, "terms": terms}

    def validation_step(self, batch, batch_idx):
        patches = self.teacher.standardize(overview_patches(self.student, batch["student_images"]))
        weights = batch["teacher"]["valid_share"]
        distance = patch_cosine(student=patches, teacher=self.teacher.patches(batch), weights=weights)
        n = batch["counts"]["patches"] or 1e-6  # a batch without depth counts for nothing in the mean, a spare one too
        self.log("val/patch_cosine", 1 - distance / n, batch_size=0.0 if batch["spare"] else n, sync_dist=True)
        log_answer_scores(self, batch, *self.forward_student(batch))

    def configure_optimizers(self):
        groups = parameter_groups(self.student, vision_lr=self.args.vision_lr)
        optimizer = adamw(self.args.optimizer_bits)(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay)
        return cosine_with_warmup(self.trainer, optimizer, self.args.warmup_share)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser, leave_out=["--lr", "--label_fraction", "--questions_per_image"])
    add_depth_args(parser)
    add_teacher_args(parser, asks=False)
    parser.add_argument("--student_name", default=STUDENT_NAME, help="hub id or folder of the student (%(default)s)")
    parser.add_argument(
        "--patch_weight", type=at_least(0.0), default=1.0, help="weight of patch distances (%(default)s)"
    )
    parser.add_argument(
        "--contrastive_weight", type=at_least(0.0), default=0.01, help="weight of InfoNCE (%(default)s)"
    )
    parser.add_argument(
        "--contrastive_temperature", type=positive, default=0.07, help="InfoNCE temperature (%(default)s)"
    )
    return parse(parser, argv, vision_lr=4e-3)


def main(args):
    images = ImageSettings("depth", args.depth_encoding, args.depth_source, args.image_tokens)
    run = start_run(args, __file__, images)
    processor = load_processor(args.student_name)
    data = build_data(args, processor, student=images)
    teacher = open_teacher(args, data, run)
    module = VisionAlignment(args, teacher, vocab_size=len(processor.tokenizer))
    train(module, data, run, args, monitor="val/patch_cosine")


if __name__ == "__main__":
    run_script(main, parse_args)
