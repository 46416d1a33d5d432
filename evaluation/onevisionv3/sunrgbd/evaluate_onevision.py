"""Score any system on SUN RGB-D questions: a checkpoint by path, a stock model, on RGB, on depth or without any image.

Reads   SUNRGBD/csv_data/{train,val,test}_dataset.csv; a checkpoint of our training scripts, or a model id or folder;
        with --dataset daquar instead DAQUAR/qa.894.raw.{train,test}.txt, people's questions about the NYUv2 frames
Writes  <output>/answers.jsonl, every answer as it comes: the same command goes on where a killed evaluation was
        <output>/predictions.csv, a row per question
        <output>/metrics.json: accuracy per type and overall with 95 % intervals that resample recordings, the same for
        baselines that see no image, caption scores; for DAQUAR also WUPS
        with --export, the student as a folder with a model card; with --push_to_hub it is uploaded, too

A checkpoint records its model, modality, depth encoding and image tokens, and these are used; a flag that contradicts
them is an error. `--pixel_data_type blind` withholds the picture from any system. Answers are decoded greedily, without
repetition rules.

    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --ckpt_path path/to/checkpoint.ckpt
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --kd_model_type baseline_depth --load_checkpoint
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --model_id llava-hf/llava-onevision-qwen2-0.5b-ov-hf
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --ckpt_path path/to/checkpoint.ckpt --devices 4
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --ckpt_path path/to/checkpoint.ckpt --dataset daquar
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --predictions path/to/predictions.csv
    python evaluation/onevisionv3/sunrgbd/evaluate_onevision.py --ckpt_path NAME --export DIR --push_to_hub USER/NAME
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env before transformers reads it
    UserError,
    announced,
    at_least,
    atomic_path,
    check_writable,
    data_root,
    duration,
    git_commit,
    outputs_root,
    printable,
    read_json,
    run_script,
    write_json,
)

# isort: split
import argparse
import csv
import re
import time
from collections.abc import Mapping
from datetime import date
from typing import Any

from dataset.inputs.depth_encodings import ENCODINGS
from dataset.inputs.pictures import DEPTH_SOURCES, MODALITIES
from dataset.inputs.processor import IMAGE_TOKENS
from dataset.questions.answers import exact_match
from dataset.questions.blind import blind_predictions
from dataset.questions.rows import CAPTION_TYPE, QuestionRow, csv_cells
from distillation.export import DTYPES
from distillation.plan import say_scoring_plan
from distillation.run.claim import claim
from distillation.run.folders import EXPERIMENTS
from distillation.run.machine import peak_memory_gib, quieten
from evaluation.answer_log import Answer, AnswerLog, asked_of, check_results_room
from evaluation.caption_scores import caption_scores
from evaluation.hand_over import check_apart, hand_over
from evaluation.inputs import Inputs, check_places, load_train_questions, read_inputs
from evaluation.metrics import evaluate_rows, question_recording
from evaluation.predictions import read_predictions
from evaluation.ranks import Ranks, joined_ranks, start_processes
from evaluation.system import answer_questions, load_system, planned_system
from evaluation.training_log import exported_training, training_of
from evaluation.wups import WordSimilarity, wups_scores

SHOWN_SCORES = {"bleu_1": "BLEU-1", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": "CIDEr", "meteor": "METEOR"}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_system_flags(parser)
    add_question_flags(parser)
    add_running_flags(parser)
    add_export_flags(parser)
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.max_new_tokens is None:
        args.max_new_tokens = 96 if args.captions else 32
    if args.batch_size is None:
        args.batch_size = 8 if args.miniature else 1
    return args


def add_system_flags(parser: argparse.ArgumentParser) -> None:
    """Which system is scored."""
    add = parser.add_argument
    add(
        "--ckpt_path",
        "--student_ckpt_path",
        dest="ckpt_path",
        help="checkpoint to score: its path, a run's folder (the best one in it), or the bare name of either",
    )
    add("--load_checkpoint", action="store_true", help="score the best checkpoint of --kd_model_type (and --phase_no)")
    add("--kd_model_type", choices=tuple(EXPERIMENTS), help="experiment that the checkpoint is from")
    add("--phase_no", type=int, choices=(1, 2, 3), help="phase of double_trouble that the checkpoint is from")
    add("--model_id", help="hub id or folder of a stock model to score, or of one that was exported")
    add(
        "--predictions",
        type=Path,
        help="CSV file with answers of any other code to score: Questions, Question_Type, Answers (gold), Model_Answer",
    )
    add("--name", help="name of the system in tables (experiment, or model and modality)")


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """What the system is asked, and what it sees."""
    add = parser.add_argument
    add("--dataset", choices=("sunrgbd", "daquar"), default="sunrgbd", help="data set with the questions (sunrgbd)")
    add("--gts_type", choices=("val", "test"), default="test", help="split to score (test)")
    add(
        "--pixel_data_type",
        choices=MODALITIES,
        help="what the system sees; blind = no image (as trained; rgb for a stock model)",
    )
    add(
        "--depth_encoding",
        choices=tuple(ENCODINGS),
        help="encoding of depth as three channels (as trained; for a stock model metric_log3)",
    )
    add(
        "--depth_source",
        choices=DEPTH_SOURCES,
        help="depth picture to read: raw, or bfx = with filled holes (as trained; for a stock model raw)",
    )
    add(
        "--image_tokens",
        choices=IMAGE_TOKENS,
        help="how a picture is cut into tiles (as trained; for a stock model anyres, miniature one_tile)",
    )
    add("--miniature", action="store_true", help="use the built-in world and its tiny student")


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """How the evaluation runs, and what it writes."""
    add = parser.add_argument
    add("--batch_size", type=at_least(1), help="images at a time, with all of their questions (1; miniature 8)")
    add("--captions", action="store_true", help="also ask for a description of every room and score it as a caption")
    add("--max_new_tokens", type=at_least(1), help="length limit of an answer in tokens (32; 96 with --captions)")
    add("--num_workers", type=at_least(0), default=0, help="number of processes that load data (0 = none besides this)")
    add("--devices", type=at_least(1), help="number of GPUs (without any: CPU cores) that share the images (1)")
    add(
        "--precision",
        choices=("auto", "32-true", "bf16-mixed"),
        default="auto",
        help="number format of the computation; auto = bf16 on a GPU that has it",
    )
    add("--dry_run", action="store_true", help="say what scoring would take, without weights or data; write nothing")
    add("--meteor", action="store_true", help="also compute METEOR, which needs Java")
    add("--output", type=Path, help="folder for the results (evaluation/results/<name>_<run>_<split>)")


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """How what was scored is handed on."""
    add = parser.add_argument
    add(
        "--export",
        type=Path,
        metavar="DIR",
        help="write the scored student as a folder that stock transformers loads, with a card that has these scores",
    )
    add(
        "--export_dtype",
        choices=tuple(DTYPES),
        help="number format of the weights that --export writes (float32)",
    )
    add(
        "--robustness",
        type=Path,
        metavar="DIR",
        help="--output of robustness.py with this system: metrics.json and the card say what worse pictures cost",
    )
    add("--push_to_hub", metavar="REPO", help="upload what --export writes to this Hugging Face repository, user/name")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.predictions:
        free = {"predictions", "name", "meteor", "output", "miniature"}
        given = [name for name in sorted(vars(args).keys() - free) if getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"--{given[0]}: --predictions asks no system anything; leave it out")
    if args.dry_run and (args.captions or args.dataset == "daquar"):
        parser.error("--dry_run plans the questions of SUN RGB-D; leave --captions and --dataset out")
    for name in ("export", "push_to_hub", "robustness"):  # an unset variable of a shell
        if str(getattr(args, name)) in ("", "."):
            parser.error(f"--{name} is empty; give it a value, or leave it out")
    if args.push_to_hub and not args.export:
        parser.error("--push_to_hub uploads what --export writes; add --export DIR")
    if args.export_dtype and (args.model_id or not args.export):
        parser.error("--export_dtype is for the --export of a checkpoint; leave it out")
    if args.phase_no and args.kd_model_type != "double_trouble":
        parser.error("--phase_no goes with --kd_model_type double_trouble")
    if args.ckpt_path == "":  # an unset variable of a shell
        parser.error("--ckpt_path is empty; give a path or a run's name, or leave it out")
    if args.ckpt_path == "best" and not args.kd_model_type:
        parser.error("--ckpt_path best needs --kd_model_type (and --phase_no), which say of what")
    if args.load_checkpoint and not (args.ckpt_path or args.kd_model_type):
        parser.error("--load_checkpoint needs --kd_model_type (and --phase_no), or --ckpt_path")
    if args.kd_model_type and not (args.ckpt_path or args.load_checkpoint):
        parser.error("--kd_model_type says whose checkpoint is meant; add --load_checkpoint or --ckpt_path")
    if args.dataset == "daquar" and args.gts_type == "val":
        parser.error("--gts_type val: DAQUAR is only a test, nothing is trained or chosen on it; leave it out")
    if args.dataset == "daquar" and args.miniature:
        parser.error(
            "--miniature: DAQUAR asks about photographs, not about the built-in world; leave one of the two out"
        )
    if args.dataset == "daquar" and args.captions:
        parser.error("--captions: DAQUAR has none; leave it out")


def main(args: argparse.Namespace) -> None:
    """Answer all questions of the split, score, write."""
    if args.predictions:
        return score_file(args)
    if args.dry_run:
        return say_scoring_plan(*planned_system(args), args)
    if start_processes(args.devices):  # they have done it all
        return
    with joined_ranks() as ranks:
        evaluate(args, ranks)


def evaluate(args: argparse.Namespace, ranks: Ranks) -> None:
    """What each process does: it answers for its share of the images; the first one scores and writes."""
    started = time.monotonic()
    quieten()
    with ranks.first_before_others():
        inputs = read_inputs(args)
        if ranks.is_first:
            check_places(args, inputs.path)
    with ranks.one_error():
        system, images, model, processor = load_system(args, inputs.path, inputs.checkpoint)
    split = args.gts_type if args.dataset == "sunrgbd" else f"{args.dataset} {args.gts_type}"
    system |= {"miniature": args.miniature, "split": split}
    asked = asked_of(model.to(ranks.device).eval(), processor, inputs.rows, images, args, root=inputs.root, split=split)
    output = args.output or default_output(args, system, inputs.path)
    with ranks.first_before_others():
        if ranks.is_first:
            say(inputs.notes)
            check_apart(args.export, output)
            check_results_room(output, inputs.rows, args.max_new_tokens)
            claim(output, flag="--output")
        log = AnswerLog(output, asked, inputs.rows, ranks)
    ranks.wait_for_all()  # until the others have read what is answered, nothing may be added
    answers = answer_questions(model, processor, inputs.root, inputs.rows, images, args, log)
    ranks.wait_for_all()
    if ranks.is_first:
        answers |= log.take_over_others()
        write_results(args, inputs, system, answers, output, started=started)


def write_results(
    args: argparse.Namespace,
    inputs: Inputs,
    system: dict[str, Any],
    answers: dict[str, Answer],
    output: Path,
    *,
    started: float,
) -> None:
    """Score the answers of a system, write what came out, and hand the system over where that is asked for."""
    predictions = prediction_rows(inputs.rows, answers, miniature=args.miniature)
    write_predictions(output, predictions)
    warn_if_empty(answers, system["name"])
    scores = score(predictions, inputs.train_rows, inputs.similarity, meteor=args.meteor)
    trained = inputs.path and training_of(inputs.path, inputs.checkpoint["hyper_parameters"])
    scores |= {"questions": inputs.questions, "training": trained or exported_training(args.model_id)}
    scores |= {"robustness": inputs.robustness}
    metrics = metrics_of(args, system, scores, inputs.notes, seconds=time.monotonic() - started)
    write_json(output / "metrics.json", metrics)
    print(summary(metrics))
    if args.export:
        hand_over(args, inputs.path, inputs.checkpoint, metrics, output)
    seconds, memory_gib = duration(metrics["seconds"]), metrics["peak_memory_gib"]
    print(printable(f"{len(inputs.rows)} questions in {seconds}, peak memory {memory_gib} GiB; wrote {output}"))


def score_file(args: argparse.Namespace) -> None:
    """Score the answers in a file. Blind baselines need the training questions, and are left out without them."""
    started, predictions = time.monotonic(), read_predictions(args.predictions)
    check_writable(args.output or outputs_root(ROOT / "evaluation") / "results", "--output")
    system = {"name": args.name or args.predictions.stem, "predictions": str(args.predictions), "split": "file"}
    output = args.output or default_output(args, system, None)
    refuse_other_results(output, args.predictions)
    for row in predictions:
        row["Correct"] = int(exact_match(row["Model_Answer"], row["Answers"]))
    try:
        train_rows = load_train_questions(data_root(args.miniature), args)
    except UserError as error:
        print(f"no baselines without an image: {error}", file=sys.stderr)
        train_rows = []
    scores = score(predictions, train_rows, None, meteor=args.meteor)
    write_predictions(output, predictions)
    metrics = metrics_of(args, system, scores, {}, seconds=time.monotonic() - started)
    write_json(output / "metrics.json", metrics)
    print(summary(metrics))
    lemmas = 100 * metrics["overall"]["lemma_set_match"]["value"]
    print(f"set-of-lemmas accuracy, as the original code reports it: {lemmas:.2f} %")
    print(printable(f"{len(predictions)} answers scored; wrote {output}"))


def refuse_other_results(output: Path, scored: Path) -> None:
    """Raise UserError where a results folder has those of something else than of this predictions file."""
    if (output / "answers.jsonl").exists():
        raise UserError(f"--output {output}: has the answers of an evaluated system; give another folder")
    path = output / "metrics.json"
    if path.is_file() and read_json(path).get("system", {}).get("predictions") != str(scored):
        raise UserError(f"--output {output}: has the results of something else; give another folder, or delete it")


def metrics_of(
    args: argparse.Namespace, system: dict[str, Any], scores: dict[str, Any], notes: dict[str, str], *, seconds: float
) -> dict[str, Any]:
    """The content of metrics.json; `seconds` are those of this call."""
    metrics: dict[str, Any] = {
        "system": system | {"git_commit": git_commit()},
        "date": str(date.today()),
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        **scores,
    }
    if args.dataset == "daquar":
        metrics |= {"wups": scores.get("wups"), "notes": notes}
    return metrics


def default_output(args: argparse.Namespace, system: dict[str, Any], path: Path | None) -> Path:
    """The results folder of a system where --output names none."""
    run = [path.parent.name] if path else []
    name = "_".join(["miniature"] * args.miniature + [system["name"], *run, system["split"]])
    return outputs_root(ROOT / "evaluation") / "results" / re.sub(r"[^A-Za-z0-9.]+", "_", name)


def prediction_rows(rows: list[QuestionRow], answers: dict[str, Answer], *, miniature: bool) -> list[dict[str, Any]]:
    """What predictions.csv says about every question: its own cells, the answer, whether it is right, its recording."""
    return [
        csv_cells(row)
        | {"Model_Answer": answers[row.id].text, "Correct": int(exact_match(answers[row.id].text, row.answer))}
        | {"Probability": f"{answers[row.id].probability:.4f}"}
        | {"Recording": question_recording(row, miniature=miniature)}
        for row in rows
    ]


def say(notes: Mapping[str, str]) -> None:
    """Print notes about the data, a line each."""
    for name, note in notes.items():
        print(printable(f"{name}: {note}"), file=sys.stderr)


def write_predictions(output: Path, predictions: list[dict[str, Any]]) -> None:
    """Write predictions.csv, atomically, with no older scores beside the new answers."""
    (output / "metrics.json").unlink(missing_ok=True)
    first = "Question_Id Questions Question_Type Answers Model_Answer Correct Image_Path Depth_Path".split()
    columns = first + [name for name in predictions[0] if name not in first]
    with atomic_path(output / "predictions.csv") as part, open(part, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(predictions)


def warn_if_empty(answers: dict[str, Answer], name: str) -> None:
    """Say so where a system answers nothing at all."""
    if not any(answer.text for answer in answers.values()):
        print(
            f"warning: all {len(answers)} answers of {printable(name)} are empty; check that the checkpoint learned to "
            "answer (its val/exact_match) and that --max_new_tokens leaves room",
            file=sys.stderr,
        )


def score(
    predictions: list[dict[str, Any]],
    train_rows: list[dict[str, str]],
    similarity: WordSimilarity | None,
    *,
    meteor: bool,
) -> dict[str, Any]:
    """What metrics.json says about the answers.

    Args:
        predictions: rows of predictions.csv.
        train_rows: training questions with gold answers, to fit the blind baselines on; without any there are none.
        similarity: of two words, for WUPS, which is left out without it.
        meteor: whether to compute METEOR.
    """
    blind = None
    if train_rows:
        with announced("fitting the blind baselines"):
            blind = blind_predictions(train_rows, predictions)
    captions = [cells for cells in predictions if cells["Question_Type"] == CAPTION_TYPE]
    answers = [cells for cells in predictions if cells["Question_Type"] != CAPTION_TYPE]
    with announced("computing intervals"):
        scores = evaluate_rows(predictions, blind=blind)
    scores["captions"] = {
        "answers": score_texts(answers, meteor=meteor),
        "captions": score_texts(captions, meteor=meteor),
    }
    if similarity:
        scores["wups"] = wups_scores(predictions, similarity, blind=blind)
    return scores


def score_texts(predictions: list[dict[str, Any]], *, meteor: bool) -> dict[str, Any] | None:
    """Caption scores of prediction rows; None without any."""
    if not predictions:
        return None
    columns = ([cells[name] for cells in predictions] for name in ("Model_Answer", "Answers", "Image_Path"))
    return caption_scores(*columns, meteor=meteor)


def summary(metrics: dict[str, Any]) -> str:
    """A few lines for the terminal: accuracy per type with its interval, and the best blind baseline."""
    baselines = metrics.get("blind", {})
    blind = {name: result["per_type"] | {"Overall": result["overall"]} for name, result in baselines.items()}
    system = metrics["system"]
    seen = {None: "", "blind": ", without any image"}.get(system.get("modality"), f", seeing {system.get('modality')}")
    lines = [f"{system['name']}{seen}, on {system['split']}: exact match with 95 % interval"]
    for kind, cell in (metrics["per_type"] | {"Overall": metrics["overall"]}).items():
        best = max((result[kind]["exact_match"]["value"] for result in blind.values()), default=None)
        beside = "" if best is None else f"  blind {best:.3f}"
        lines.append(f"  {kind:<24}{_interval(cell['exact_match'])}{beside}  n {cell['n_questions']}")
    wups = metrics.get("wups") or {"overall": {}}
    for name, cell in wups["overall"].items():
        best = max(result["overall"][name]["value"] for result in wups["blind"].values())
        lines.append(f"  {name:<24}{_interval(cell)}  blind {best:.3f}")
    for kind, scores in (metrics.get("captions") or {}).items():
        found = {label: (scores or {}).get(name) for name, label in SHOWN_SCORES.items()}
        shown = ", ".join(f"{label} {value:.3f}" for label, value in found.items() if value is not None)
        lines += [f"  {kind} as texts: {shown}"] if shown else []
    return "\n".join(map(printable, lines))


def _interval(cell: dict[str, float | None]) -> str:
    ends = "" if cell["low"] is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{cell['value']:.3f}{ends}"


if __name__ == "__main__":
    run_script(main, parse_args)
