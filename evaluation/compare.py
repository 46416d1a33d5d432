"""Put evaluated systems side by side: accuracies with intervals, paired differences, a plot and a contact sheet.

Reads   results folders of the evaluation script (predictions.csv, metrics.json), all on the same questions
Writes  table.txt, table.md, accuracy.png, contact_sheet.png

    python evaluation/compare.py RESULTS_DIR [RESULTS_DIR ...] --output DIR [--baseline NAME]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import atomic_path, check_writable, data_root, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse
from collections.abc import Sequence

from evaluation.comparison import (
    Results,
    align,
    comparison_table,
    escaped_markdown,
    explanation,
    load_results,
    markdown_table,
    text_table,
)
from evaluation.figures import draw_accuracies, draw_contact_sheet


def write_report(results: Sequence[Results], output: Path, root: Path, *, baseline: str | None = None) -> str:
    """Write table.txt, table.md, accuracy.png and contact_sheet.png into `output`.

    Args:
        results: systems that answered the same questions.
        output: folder to write into; made when missing.
        root: folder that the image paths are relative to.
        baseline: as in `comparison_table`.

    Returns:
        The content of table.txt.

    Raises:
        UserError: as `comparison_table` and `draw_contact_sheet`.
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
    draw_contact_sheet(results, output / "contact_sheet.png", root)
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS_DIR", help="results folders that the evaluation script wrote")
    add("--output", type=Path, required=True, help="folder for tables and pictures")
    add("--baseline", help="name of the system that the others are compared with (the first one)")
    add("--data_root", type=Path, help="folder that image paths are relative to (ROOT_DATA_DIR)")
    add("--miniature", action="store_true", help="the images are those of the built-in world")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Compare the folders, print the table and say where the files are."""
    check_writable(args.output, "--output")
    results = [load_results(folder) for folder in args.results]
    root = args.data_root or data_root(args.miniature)
    print(write_report(results, args.output, root, baseline=args.baseline))
    print(f"written: {args.output}/ table.txt, table.md, accuracy.png, contact_sheet.png")


if __name__ == "__main__":
    run_script(main, parse_args)
