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
    unknown = {"student_name": "unknown", "teacher": None, "checkpoint": "unknown", "git_commit": {}, "flags": {}}
    unknown |= {"validation": {}, "depth_degradation": 0.0, "trained_by": "unknown"}  # what older exports do not say
    student = unknown | dict(description)
    base, modality = short_path(student["student_name"]), student["sees"]["modality"]
    return render(
        "distillation/card.md.j2",
        student=student,
        flags=flag_text(student["flags"]),
        sees=SEEN_AS[modality],
        **_data(description, scores),
        modality=modality,
        base=base,
        on_hub=base.startswith(APACHE_BASES),
        license=_license(base, miniature=student["miniature"]),
        scores=scores,
        rows=score_rows(scores) if scores else [],
    )


def _data(description: Mapping[str, Any], scores: Mapping[str, Any] | None) -> dict[str, str]:
    """What the questions are about."""
    if description["miniature"]:
        return {"data_name": "the built-in miniature world", "data_type": "miniature"}
    if scores and scores["system"]["split"].startswith("daquar"):
        return {"data_name": "DAQUAR", "data_type": "daquar"}
    return {"data_name": "SUN RGB-D questions", "data_type": "sunrgbd"}


def flag_text(flags: Mapping[str, Any]) -> str:
    """Flags as they stand in a command line."""
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


def short_path(text: str) -> str:
    """A path on somebody's machine without the folders that are nobody else's business; a name as it is."""
    return "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text


def _license(base: str, *, miniature: bool) -> str | None:
    if miniature:
        return "mit"
    return "apache-2.0" if base.startswith(APACHE_BASES) else None


def score_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table of scores: name, number of questions, accuracy with its interval, the best baseline's."""
    found = [scores, *(scores.get("blind") or {}).values()]
    columns = [{"Overall": one["overall"]} for one in found]
    for column, one in zip(columns, found, strict=True):
        if "depth_answerable" in one:
            column["Questions that depth can answer"] = one["depth_answerable"]
        column |= {kind: one["per_type"][kind] for kind in order_types(one["per_type"])}
    own, *blind = columns
    return [
        {"name": name, "n": cell["n_questions"], "own": cell["exact_match"]}
        | {"blind": max((b[name]["exact_match"] for b in blind if name in b), key=lambda c: c["value"], default=None)}
        for name, cell in own.items()
    ]
