"""Ask a trained student about a depth picture of your own, or an RGB model about a photograph.

Reads   an exported folder (--export of a training script), a checkpoint or a run's name; a picture
Writes  the answers, with their probabilities and the next best ones, on stdout; --show a PNG

    python evaluation/answer.py --model my_student --depth room.png --depth_format mm --question "Is there a chair?"
    python evaluation/answer.py --model my_student --depth room.npy --depth_format m --interactive --show seen.png
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, at_least, atomic_path, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse
import itertools
import time
from collections.abc import Iterator

import numpy as np

from dataset.inputs.own_pictures import DEPTH_UNITS, read_own_depth, read_own_rgb
from dataset.inputs.processor import IMAGE_TOKENS
from distillation.run.machine import peak_memory_gib, quieten
from evaluation.student import Seen, Student, check_question
from evaluation.what_is_seen import draw_seen

MOST_OTHERS = 100


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="exported folder, checkpoint, run's folder or name, or a stock model (sees RGB)")
    add("--depth", type=Path, help="depth picture: a PNG or TIFF of 16 bits or more, or a NumPy array (.npy)")
    add("--depth_format", choices=tuple(DEPTH_UNITS), help="unit of the depth picture: words of SUN RGB-D, mm, or m")
    add("--rgb", type=Path, help="photograph, for a model that sees RGB; for a depth student only beside --show")
    add("--image_tokens", choices=IMAGE_TOKENS, help="how a picture is cut (as trained; for a stock model anyres)")
    add("--intrinsics", help="fx,fy,cx,cy in pixels, or a file with the matrix (as usual in training, centered)")
    add("--tilt", help="degrees by which the camera looks down, or a file with the rotation (as usual in training)")
    add("--question", action="append", default=[], help="what to ask; may be given several times")
    add(
        "--interactive",
        action="store_true",
        help="read questions line by line from stdin; in a terminal an empty one ends them",
    )
    add(
        "--others",
        type=at_least(0, below=MOST_OTHERS + 1),
        default=3,
        help="number of next best answers to show (%(default)s)",
    )
    add("--max_new_tokens", type=at_least(1), default=32, help="length limit of an answer in tokens (%(default)s)")
    add("--show", type=Path, metavar="PNG", help="write the picture as the student sees it")
    add(
        "--precision",
        choices=("auto", "32-true", "bf16-mixed"),
        default="auto",
        help="number format of the computation; auto = bf16 on a GPU that has it",
    )
    args = parser.parse_args(argv)
    if args.show and args.show.resolve() in [path.resolve() for path in (args.depth, args.rgb) if path]:
        parser.error(f"--show {args.show}: is the picture itself, which would be lost; give another path")
    if not (args.question or args.interactive):
        parser.error("nothing to ask; give --question or --interactive")
    if args.depth and not args.depth_format:
        units = "; ".join(f"{name} = {what}" for name, what in DEPTH_UNITS.items())
        parser.error(f"--depth needs --depth_format, since a picture does not say its unit: {units}")
    if not args.depth and (args.depth_format or args.intrinsics or args.tilt):
        parser.error("--depth_format, --intrinsics and --tilt go with --depth")
    return args


def main(args: argparse.Namespace) -> None:
    """Look at the picture, answer."""
    quieten()
    for question in args.question:
        check_question(question)
    depth_m = read_own_depth(args.depth, args.depth_format) if args.depth else None
    rgb = read_own_rgb(args.rgb) if args.rgb else None
    start = time.monotonic()
    student = Student.load(args.model, precision=args.precision, image_tokens=args.image_tokens)
    seconds = time.monotonic() - start
    print(f"{student.name}: sees {student.images.modality}; loaded in {seconds:.1f} s", file=sys.stderr)
    if student.record.get("miniature"):
        print("it was trained on the built-in world: about real rooms it can only guess", file=sys.stderr)
    start = time.monotonic()
    seen = look(student, depth_m, rgb, args)
    print(f"looked at the picture in {time.monotonic() - start:.2f} s", file=sys.stderr)
    if args.show:
        with atomic_path(args.show) as part:
            draw_seen(student, seen, rgb if depth_m is not None else None).save(part, format="PNG")
        print(f"wrote {args.show}", file=sys.stderr)
    for question in itertools.chain(args.question, lines() if args.interactive else ()):
        say(student, seen, question, args)
    print(f"peak memory {peak_memory_gib():.2f} GiB", file=sys.stderr)


def look(student: Student, depth_m: np.ndarray | None, rgb: np.ndarray | None, args: argparse.Namespace) -> Seen:
    """The picture that this student can see, looked at.

    Raises:
        UserError: it is not given, or another one is that has no effect.
    """
    check_pictures(student.images.modality, depth_m, rgb, args)
    if student.images.modality != "depth":
        return student.look(rgb)
    height, width = depth_m.shape
    camera = student.usual_camera(width, height, intrinsics=args.intrinsics, tilt=args.tilt)
    if camera.assumed:
        print(f"assumed: {' '.join(camera.assumed)}", file=sys.stderr)
    return student.look(depth_m, camera)


def check_pictures(modality: str, depth_m: np.ndarray | None, rgb: np.ndarray | None, args: argparse.Namespace) -> None:
    """Raise UserError unless the given pictures are those that the student sees, or that --show draws."""
    given = {"depth": depth_m, "rgb": rgb}
    model = f"--model {args.model}: sees {'no picture' if modality == 'blind' else modality}"
    if given.get(modality, rgb) is None and modality != "blind":
        raise UserError(f"{model}; give its picture with --{modality}")
    shown = modality == "depth" and args.show
    for name in given.keys() - {modality} - ({"rgb"} if shown else set()):
        if given[name] is not None:
            drawn = " (beside --show it would be drawn)" if modality == "depth" else ""
            raise UserError(f"{model}; leave out --{name}{drawn}")
    if shown and rgb is not None and rgb.shape[:2] != depth_m.shape:
        sizes = ["{1} x {0}".format(*picture.shape) for picture in (rgb, depth_m)]
        raise UserError(f"--rgb {args.rgb}: has {sizes[0]} pixels, the depth picture {sizes[1]}; they must match")


def lines() -> Iterator[str]:
    """Questions from stdin. The end of the file ends them, in a terminal also an empty line."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("question: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if line.strip():
            yield line.strip()
        elif terminal or not line:
            return


def say(student: Student, seen: Seen, question: str, args: argparse.Namespace) -> None:
    """Answer one question on stdout. In a conversation, one that cannot be asked is said, and the next one read."""
    start = time.monotonic()
    try:
        reply = student.ask(seen, question, n_others=args.others, max_new_tokens=args.max_new_tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    others = ", ".join(f"{other.text or '(nothing)'} {other.probability:.3f}" for other in reply.others)
    print(f"{question}\n  {reply.text or '(nothing)'}  {reply.answer.probability:.3f}")
    print(f"  next best: {others}" if others else "", end="\n" if others else "")
    print(f"  answered in {time.monotonic() - start:.2f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main, parse_args)
