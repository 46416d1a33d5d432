"""The model card of an exported student: what it sees, how well it answers, how it was trained, its limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataset.page import render
from dataset.questions.answers import order_types

# Whose licence a student has: that of the model that it starts from.
APACHE_BASES = ("llava-hf/llava-onevision-qwen2-",)
SEEN_AS = {
    "depth": "a depth picture",
    "rgb": "an RGB picture",
    "blind": "no picture at all",
}


def model_card(description: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> str:
    """The README.md of an export.

    Args:
        description: content of student.json.
        scores: content of metrics.json; None = the card says that the student was not scored.
    """
    base = short_path(str(description.get("student_name", "")))
    modality = description.get("sees", {}).get("modality", "depth")
    return render(
        "distillation/card.md.j2",
        student=description,
        sees=SEEN_AS[modality],
        modality=modality,
        base=base,
        on_hub=base.startswith(APACHE_BASES),
        license=_license(base, miniature=bool(description.get("miniature"))),
        scores=scores,
        rows=score_rows(scores) if scores else [],
        blind_name=_best_blind(scores)[0] if scores else None,
    )


def short_path(text: str) -> str:
    """A path on somebody's machine without the folders that are nobody else's business; a name as it is."""
    return "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text


def _license(base: str, *, miniature: bool) -> str | None:
    if miniature:
        return "mit"
    return "apache-2.0" if base.startswith(APACHE_BASES) else None


def _best_blind(scores: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The best baseline that sees no image: its name and its scores."""
    blind = scores.get("blind") or {}
    if not blind:
        return None, {}
    name = max(blind, key=lambda name: blind[name]["overall"]["exact_match"]["value"])
    return name, blind[name]


def score_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table of scores: name, number of questions, accuracy with its interval, the best baseline's."""
    _, blind = _best_blind(scores)
    cells = {"Overall": scores["overall"]}
    others = {"Overall": blind.get("overall")}
    if "depth_answerable" in scores:
        cells["Questions that depth can answer"] = scores["depth_answerable"]
        others["Questions that depth can answer"] = blind.get("depth_answerable")
    for kind in order_types(scores["per_type"]):
        cells[kind], others[kind] = scores["per_type"][kind], blind.get("per_type", {}).get(kind)
    return [
        {"name": name, "n": cell["n_questions"], "own": cell["exact_match"]}
        | {"blind": others[name]["exact_match"] if others[name] else None}
        for name, cell in cells.items()
    ]
