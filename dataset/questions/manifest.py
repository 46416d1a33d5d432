"""What question files are, provably: `manifest.json` beside them has their digests and all that made them.

Whoever publishes figures publishes the manifest with them: it holds no picture, no annotation and no question.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.questions.rows import GENERATOR_VERSION, QuestionRow, cells_text, question_text, questions_file
from utils import UserError, read_json, sha256

FORMAT = 1
SETTINGS = {  # of `csv_data.generate_questions` -> what a manifest may say
    "seed": int,
    "train_per_frame": int,
    "eval_per_frame": int,
    "unanswered_per_frame": int,
    "official_val": bool,
}


LEAST = {name: 1 for name in SETTINGS if name.endswith("_per_frame")}


def rows_digest(rows: Sequence[QuestionRow]) -> str:
    """Hex SHA-256 of the question file that holds these rows, as `write_questions` writes it."""
    return hashlib.sha256(question_text(rows).encode()).hexdigest()


def cells_digest(rows: Sequence[Mapping[str, str]]) -> str:
    """The same of rows as cells by column name, which may have further columns, such as those of predictions.csv."""
    return hashlib.sha256(cells_text(rows).encode()).hexdigest()


def describe_files(files: Mapping[Path, Sequence[QuestionRow]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of question files.

    Args:
        files: path -> rows.
        settings: see `SETTINGS`.
    """
    return {
        "format": FORMAT,
        "generator_version": GENERATOR_VERSION,
        "settings": dict(settings),
        "files": {
            path.name: {
                "sha256": rows_digest(rows),
                "questions": len(rows),
                "images": len({row.image_path for row in rows}),
            }
            for path, rows in files.items()
        },
    }


def manifest_path(root: Path) -> Path:
    """`csv_data/manifest.json` below the data root."""
    return questions_file(root, "train").with_name("manifest.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UserError: it cannot be read, is no manifest, or is of another version of the format or of the questions.
    """
    manifest = read_json(path)
    if not {"format", "generator_version", "settings", "files"} <= manifest.keys():
        raise UserError(f"{path}: is no manifest of question files")
    for name, own in (("format", FORMAT), ("generator_version", GENERATOR_VERSION)):
        if manifest.get(name) != own:
            raise UserError(
                f"{path}: {name} is {manifest.get(name)!r:.40} and this code's is {own}; use the version of this "
                "repository that wrote it"
            )
    settings, files = manifest.get("settings"), manifest.get("files")
    if not isinstance(settings, dict) or settings.keys() != SETTINGS.keys():
        raise UserError(f"{path}: is no manifest of question files: its settings are not {', '.join(SETTINGS)}")
    if wrong := [
        name
        for name, kind in SETTINGS.items()
        if type(settings[name]) is not kind or settings[name] < LEAST.get(name, 0)
    ]:
        raise UserError(f"{path}: {wrong[0]} is {settings[wrong[0]]!r:.40}, which no question file is made with")
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and _is_digest(f.get("sha256")) for f in files.values()
    ):
        raise UserError(f"{path}: is no manifest of question files: it has no digests")
    return manifest


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def differences(published: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """How the files of two manifests differ, a line for each that does."""
    found = []
    for name in published["files"] | own["files"]:
        theirs, ours = (manifest["files"].get(name) for manifest in (published, own))
        if theirs is None or ours is None:
            found.append(f"{name}: is only {'here' if theirs is None else 'in the manifest'}")
        elif theirs["sha256"] != ours["sha256"]:
            sizes = (f"{m.get('questions')} questions about {m.get('images')} images" for m in (theirs, ours))
            found.append("{}: differs; the manifest has {}, this tree {}".format(name, *sizes))
    return found


def changed_files(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """The names of a manifest's files that are missing in a folder, or are others there."""
    files = {name: folder / name for name in manifest["files"]}
    return [
        name for name, path in files.items() if not path.is_file() or sha256(path) != manifest["files"][name]["sha256"]
    ]


def asked_questions(root: Path, rows: Sequence[QuestionRow]) -> dict[str, str | None]:
    """What results say about their questions: their digest, and that of the manifest that lists it.

    Args:
        root: the data root.
        rows: of one question file.

    Returns:
        `{"sha256", "manifest"}`; the latter, the digest of the file, is None where no manifest lists these questions.

    Raises:
        UserError: the manifest is damaged, or of another version.
    """
    digest, path = rows_digest(rows), manifest_path(root)
    listed = path.is_file() and digest in {file["sha256"] for file in read_manifest(path)["files"].values()}
    return {"sha256": digest, "manifest": sha256(path) if listed else None}
