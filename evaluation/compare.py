"""Put evaluated systems side by side: accuracies with intervals, paired differences, and a page that shows it all.

Reads   results folders of the evaluation script (predictions.csv, metrics.json), all on the same questions; with
        --robustness what robustness.py wrote
Writes  report.html             one file with all of it, pictures and answers: open it in a browser, or send it
        table.txt, table.md, accuracy.png, contact_sheet.png

    python evaluation/compare.py RESULTS_DIR [RESULTS_DIR ...] --output DIR [--baseline NAME] [--robustness DIR]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env before transformers reads it
    UserError,
    atomic_path,
    check_writable,
    data_root,
    printable,
    read_json,
    run_script,
)

# isort: split
import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from dataset.page import escaped_markdown
from distillation.card import short_path
from evaluation.comparison import (
    Results,
    align,
    comparison_table,
    explanation,
    load_results,
    markdown_table,
    text_table,
)
from evaluation.described import check_ladder
from evaluation.figures import PictureMissing, draw_accuracies, draw_contact_sheet
from evaluation.ladder import RECORD
from evaluation.report import compared, write_page

PAGE, SHEET = "report.html", "contact_sheet.png"


def write_report(
    results: Sequence[Results],
    output: Path,
    root: Path,
    *,
    baseline: str | None = None,
    robustness: Mapping[str, Any] | None = None,
) -> str:
    """Write report.html, table.txt, table.md, accuracy.png and contact_sheet.png into `output`.

    Where a picture is missing there is no contact sheet, and the page says what is missing.

    Args:
        results: systems that answered the same questions.
        output: folder to write into; made when missing.
        root: folder that the image paths are relative to.
        baseline: as in `comparison_table`.
        robustness: content of a robustness.json.

    Returns:
        The content of table.txt.

    Raises:
        UserError: as `comparison_table`; or an image path leaves `root`.
    """
    results = align(results)
    table = comparison_table(results, baseline)
    notes = explanation(results, baseline)
    text = f"{text_table(table)}\n{notes}"
    for name, content in (("table.txt", text), ("table.md", f"{markdown_table(table)}\n{escaped_markdown(notes)}")):
        with atomic_path(output / name) as part:
            part.write_text(content, encoding="utf-8")
    n_images = len({row["Image_Path"] for row in results[0].rows})
    title = f"Accuracy on {len(results[0].rows)} questions about {n_images} images, with 95 % intervals"
    draw_accuracies(table, output / "accuracy.png", title=title)
    write_page(output / PAGE, compared(results, table, baseline, notes), root, robustness=robustness)
    try:
        draw_contact_sheet(results, output / SHEET, root)
    except PictureMissing as missing:
        (output / SHEET).unlink(missing_ok=True)  # of an earlier call
        print(printable(f"no {SHEET}, and {PAGE} lacks pictures: {missing}"), file=sys.stderr)
    return text


def read_robustness(folder: Path | None, results: Sequence[Results]) -> Mapping[str, Any] | None:
    """The content of a folder's robustness.json; None without a folder.

    Raises:
        UserError: there is none, it is not what robustness.py writes, or a name is another system's there.
    """
    if folder is None:
        return None
    record = read_json(folder / RECORD)
    check_ladder(record, folder / RECORD)
    models = {system["name"]: short_path(system["model"]) for system in record["systems"]}
    for result in results:
        system = result.metrics.get("system") or {}
        own, theirs = system.get("checkpoint") or system.get("model_id"), models.get(result.name)
        if own and theirs and short_path(own) != theirs:
            raise UserError(
                f"--robustness {folder}: {result.name} is {theirs} there, and {short_path(own)} in its results"
            )
    return record


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS_DIR", help="results folders that the evaluation script wrote")
    add("--output", type=Path, required=True, help="folder for tables and pictures")
    add("--baseline", help="name of the system that the others are compared with (the first one)")
    add("--robustness", type=Path, metavar="DIR", help="--output of robustness.py, whose curves the page shows")
    add("--data_root", type=Path, help="folder that image paths are relative to (ROOT_DATA_DIR)")
    add("--miniature", action="store_true", help="the images are those of the built-in world")
    args = parser.parse_args(argv)
    if args.data_root and args.miniature:
        parser.error("--data_root and --miniature name two data sets; give one")
    return args


def main(args: argparse.Namespace) -> None:
    """Compare the folders, print the table and say where the files are."""
    check_writable(args.output, "--output")
    results = [load_results(folder) for folder in args.results]
    robustness = read_robustness(args.robustness, results)
    root = args.data_root or data_root(args.miniature)
    print(write_report(results, args.output, root, baseline=args.baseline, robustness=robustness))
    sheet = f", {SHEET}" * (args.output / SHEET).is_file()
    print(printable(f"written: {args.output}/ {PAGE}, table.txt, table.md, accuracy.png{sheet}"))


if __name__ == "__main__":
    run_script(main, parse_args)
