"""The evaluation script through its own flags."""

import csv
import json

from evaluation.onevisionv3.sunrgbd import evaluate_onevision


def evaluate(output, *more: str):
    """-> prediction rows, and metrics.json."""
    evaluate_onevision.main(evaluate_onevision.parse_args([*more, "--max_new_tokens", "6", "--output", str(output)]))
    with open(output / "predictions.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return rows, json.loads((output / "metrics.json").read_text())
