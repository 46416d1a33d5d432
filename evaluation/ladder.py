"""Accuracy of systems while their sensor gets worse, rung by rung of a ladder, and what sums it up."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.inputs.degradations import LADDERS, Degradation
from dataset.questions.answers import exact_match, order_types
from dataset.questions.blind import blind_predictions
from dataset.questions.rows import QuestionRow, csv_cells
from evaluation.comparison import DEPTH, OVERALL
from evaluation.described import is_counted
from evaluation.intervals import cluster_bootstrap_ci, crossed_bootstrap, percentile_interval
from evaluation.metrics import accuracy, question_recording
from utils import UserError, read_json

CLEAN = Degradation("clean", 0)  # the lowest rung: pictures as recorded
RECORD = "robustness.json"
Cell = Mapping[str, float | None]


@dataclass(frozen=True)
class Asked:
    """The questions of a ladder, N of them."""

    digest: str  # of ids and answers, in their order
    answers: list[str]
    clusters: list[str]  # the recording of each question
    columns: dict[str, np.ndarray]  # `By depth`, `Overall` and each type -> (N,) bool, its questions
    n_images: int

    @classmethod
    def of(cls, rows: Sequence[QuestionRow], *, miniature: bool) -> "Asked":
        """From the rows of a question file."""
        kinds = np.array([row.type for row in rows])
        by_depth = np.array([bool(row.depth_answerable) for row in rows])
        columns = {DEPTH: by_depth} if by_depth.any() else {}
        columns |= {OVERALL: np.ones(len(rows), bool)} | {kind: kinds == kind for kind in order_types(set(kinds))}
        text = "\n".join(f"{row.id}\t{row.answer}" for row in rows)
        return cls(
            hashlib.sha256(text.encode()).hexdigest()[:16],
            [row.answer for row in rows],
            [question_recording(row, miniature=miniature) for row in rows],
            columns,
            len({row.image_path for row in rows}),
        )

    @property
    def main_column(self) -> str:
        """The column of plots and summaries: questions that depth can answer, where it is known which these are."""
        return next(iter(self.columns))

    def right(self, answers: Sequence[str]) -> np.ndarray:
        """(N,) bool: which of these answers are right."""
        return np.array([exact_match(given, gold) for given, gold in zip(answers, self.answers, strict=True)])

    def accuracy(self, right: np.ndarray, column: str) -> Cell:
        """Share of right answers to a column's questions, with its 95 % interval by recording."""
        chosen = self.columns[column]
        return accuracy(right[chosen].tolist(), self.recordings(column))

    def difference(
        self, values: np.ndarray, others: np.ndarray, column: str
    ) -> tuple[float, float | None, float | None]:
        """How much higher the mean of values (N,) is than that of others, with the 95 % interval, as shares."""
        found = self.mean(values.astype(float) - others, column)
        return found["value"], found["low"], found["high"]

    def mean(self, values: np.ndarray, column: str) -> Cell:
        """Mean of values (N,) over a column's questions, with its 95 % interval by recording where there is one."""
        chosen = values[self.columns[column]].astype(float)
        low, high = cluster_bootstrap_ci(chosen.tolist(), self.recordings(column))
        ends = (None, None) if np.isnan(low) else (low, high)
        return {"value": float(chosen.mean()), "low": ends[0], "high": ends[1]}

    def recordings(self, column: str) -> list[str]:
        """The recordings of a column's questions."""
        return [self.clusters[i] for i in np.flatnonzero(self.columns[column])]


@dataclass(frozen=True)
class Climb:
    """What one system answered right on every rung."""

    name: str
    model: str  # the checkpoint or folder
    modality: str
    right: dict[Degradation, np.ndarray]  # rung -> (N,) bool; CLEAN first

    def kinds(self) -> dict[str, list[Degradation]]:
        """The rungs of each kind, the mildest first."""
        kinds: dict[str, list[Degradation]] = {}
        for rung in self.right:
            if rung != CLEAN:
                kinds.setdefault(rung.kind, []).append(rung)
        return kinds

    def counted(self) -> list[Degradation]:
        """The rungs that the mean is over."""
        return [rung for rung in self.right if is_counted(rung.kind, rung.severity)]


def exposure_name(share: float) -> str:
    """An exposure as a share of the right one, as people write it: 1, 1/2.54, 1/1024."""
    if share >= 1:
        return "1"
    return f"1/{1 / share:.0f}" if share < 0.01 else f"1/{1 / share:.3g}"


def chosen_rungs(modality: str, kinds: Sequence[str] | None) -> list[Degradation]:
    """The rungs of a system with this modality, CLEAN first; `kinds`: only these (None: all)."""
    ladder = LADDERS[modality]
    return [CLEAN, *(Degradation(k, s) for k in ladder if kinds is None or k in kinds for s in ladder[k])]


def summarise(climb: Climb, asked: Asked, column: str) -> dict[str, Any]:
    """Accuracy on clean pictures, the mean over the rungs that count, and the share of the former that this is.

    Returns:
        `clean`, `mean` and `kept`, each a cell with the 95 % interval by recording; the last two only with such rungs.
    """
    found = {"clean": asked.accuracy(climb.right[CLEAN], column)}
    if not (counted := climb.counted()):
        return found
    mean = np.mean([climb.right[rung] for rung in counted], axis=0)
    found["mean"] = asked.mean(mean, column)
    if found["mean"]["low"] is not None and found["clean"]["value"]:
        chosen = asked.columns[column]
        values = np.stack([mean[chosen], climb.right[CLEAN][chosen].astype(float)])[:, None]
        draws = crossed_bootstrap(values, asked.recordings(column))
        low, high = percentile_interval(draws[:, 0] / np.maximum(draws[:, 1], 1e-9))
        found["kept"] = {"value": found["mean"]["value"] / found["clean"]["value"], "low": low, "high": high}
    return found


def mean_difference(climb: Climb, other: Climb, asked: Asked, column: str) -> tuple[float, float | None, float | None]:
    """How much higher the mean over the rungs that count is than another system's, with the 95 % interval."""
    ours, theirs = (np.mean([c.right[rung] for rung in c.counted()], axis=0) for c in (climb, other))
    return asked.difference(ours, theirs, column)


def best_blind(asked: Asked, rows: Sequence[QuestionRow], train_rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The best baseline that sees no image on the main column: its name and its accuracies by column."""
    cells = [csv_cells(row) for row in rows]
    right = {name: asked.right(answers) for name, answers in blind_predictions(train_rows, cells).items()}
    name = max(right, key=lambda name: right[name][asked.columns[asked.main_column]].mean())
    return {"name": name, "accuracy": {column: asked.accuracy(right[name], column) for column in asked.columns}}


def crossings(light: Climb, depth: Climb, asked: Asked, column: str) -> dict[str, float | None]:
    """For each kind of light: the exposure below which an RGB system answers less than a depth system in any light.

    Between rungs accuracy is taken to change evenly with the logarithm of the exposure. The brightest exposure of the
    ladder where the RGB system answers less already there; None where it never does. Where the lines cross more than
    once, the brightest crossing.
    """
    level = depth.right[CLEAN][asked.columns[column]].mean()
    found = {}
    for kind, rungs in light.kinds().items():
        points = [(rung.severity, light.right[rung][asked.columns[column]].mean() - level) for rung in rungs]
        found[kind] = points[0][0] if points[0][1] < 0 else None
        for (bright, above), (dark, below) in zip(points, points[1:], strict=False):
            if found[kind] is None and above >= 0 > below:
                part = above / (above - below)
                found[kind] = float(np.exp2(np.log2(bright) + part * (np.log2(dark) - np.log2(bright))))
    return found


def record_of(climb: Climb, asked: Asked, baseline: Climb | None) -> dict[str, Any]:
    """What robustness.json says about a system: accuracies by rung and column, summary, differences from `baseline`.

    `baseline`: None = no differences; a system that sees the same.
    """
    compared = None if climb is baseline else baseline
    rungs = []
    for rung, right in climb.right.items():
        cells = {column: dict(asked.accuracy(right, column)) for column in asked.columns}
        for column, cell in cells.items() if compared else ():
            cell["difference"] = asked.difference(right, compared.right[rung], column)
        rungs.append({"kind": rung.kind, "severity": rung.severity, "right": pack(right), "accuracy": cells})
    summary = {column: summarise(climb, asked, column) for column in dict.fromkeys((asked.main_column, OVERALL))}
    for column, found in summary.items() if compared else ():
        found["clean"] = rungs[0]["accuracy"][column]
        if "mean" in found:
            found["mean"]["difference"] = mean_difference(climb, compared, asked, column)
    seen = {"name": climb.name, "model": climb.model, "modality": climb.modality}
    return seen | {"rungs": rungs, "summary": summary}


def read_climbs(folder: Path, asked: Asked, settings: Mapping[str, Any]) -> list[Climb]:
    """The systems of an earlier call, from its robustness.json.

    Args:
        folder: its --output.
        asked: the questions of this call.
        settings: of this call, which that one must have had, too.

    Raises:
        UserError: there is none, it is damaged, or its systems answered other questions or saw other pictures.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"--with {folder}: has no {RECORD}; give the --output of an earlier call")
    record = read_json(path)
    try:
        theirs = record["settings"]
        if differs := next((name for name in settings if theirs.get(name) != settings[name]), None):
            raise UserError(
                f"--with {folder}: its ladder differs, {differs} was {theirs.get(differs)} and is {settings[differs]} "
                "here; score its systems with the same"
            )
        if record["questions"]["digest"] != asked.digest:
            raise UserError(f"--with {folder}: its systems answered other questions; score them on the same ones")
        return [_climb(system, len(asked.answers)) for system in record["systems"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is not what this command writes; score its systems again") from error


def _climb(system: Mapping[str, Any], n: int) -> Climb:
    right = {Degradation(rung["kind"], rung["severity"]): unpack(rung["right"], n) for rung in system["rungs"]}
    order = [rung for rung in chosen_rungs(system["modality"], None) if rung in right]
    if CLEAN not in right or len(order) != len(right):
        raise ValueError("other rungs than those of the ladder")
    return Climb(system["name"], system["model"], system["modality"], {rung: right[rung] for rung in order})


def check_names(names: Sequence[str]) -> None:
    """Raise UserError when two systems have one name, or names that give one folder, or one cannot name a folder."""
    folders: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if not folder.strip("._"):
            raise UserError(f"a system cannot be called {name!r}: give it a name with letters, by --names")
        if folder in folders:
            raise UserError(
                f"two systems are called {name} (or {folders[folder]}); give each a name of its own, by --names"
            )
        folders[folder] = name


def folder_name(name: str) -> str:
    """The folder of a system's answers, by its name."""
    return re.sub(r"[^\w.+-]+", "_", name)


def check_same_ladder(climbs: Sequence[Climb]) -> None:
    """Raise UserError when two systems that see the same stand on different rungs."""
    for climb in climbs:
        first = next(other for other in climbs if other.modality == climb.modality)
        if only := set(climb.right) ^ set(first.right):
            raise UserError(
                f"{climb.name} and {first.name} are not on the same ladder: only one of them has "
                f"{min(map(str, only))}; score both with the same --kinds"
            )


def pack(right: np.ndarray) -> str:
    """Which answers are right, (N,) bool, as hexadecimal text."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """What `pack` packed: (n,) bool. Raises ValueError when it is not so long."""
    bits = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(bits) != -(-n // 8):
        raise ValueError(f"{len(bits)} bytes for {n} bits")
    return np.unpackbits(bits, count=n).astype(bool)
