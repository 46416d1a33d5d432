"""Accuracy of systems while their sensor gets worse, rung by rung of a ladder, and what sums it up."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.inputs.degradations import LADDERS, TRAINED, Degradation
from dataset.questions.answers import exact_match, order_types
from dataset.questions.blind import blind_predictions
from dataset.questions.rows import QuestionRow, csv_cells
from evaluation.comparison import DEPTH, OVERALL
from evaluation.intervals import cluster_bootstrap_ci, crossed_bootstrap, paired_difference, percentile_interval
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
        by_depth = np.array([csv_cells(row)["depth_answerable"] == "1" for row in rows])
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

    def difference(self, right: np.ndarray, other: np.ndarray, column: str) -> tuple[float, float, float]:
        """How much more of a column's questions the first system answers right, with the 95 % interval, as shares."""
        chosen = self.columns[column]
        return paired_difference(right[chosen].tolist(), other[chosen].tolist(), self.recordings(column))

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
        """The rungs that the mean is over: of depth those of kinds that students may train for, of light all."""
        return [rung for rung in self.right if rung != CLEAN and (self.modality == "rgb" or rung.kind in TRAINED)]


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
    chosen = asked.columns[column]
    mean = np.mean([climb.right[rung][chosen] for rung in counted], axis=0)
    values = np.stack([mean, climb.right[CLEAN][chosen].astype(float)])[:, None]
    draws = crossed_bootstrap(values, asked.recordings(column))
    with np.errstate(invalid="ignore", divide="ignore"):
        kept, drawn = values[0].mean() / values[1].mean(), draws[:, 0] / draws[:, 1]
    low, high = percentile_interval(draws[:, 0])
    found["mean"] = {"value": float(mean.mean()), "low": low, "high": high}
    if np.isfinite(drawn).all():
        low, high = percentile_interval(drawn)
        found["kept"] = {"value": float(kept), "low": low, "high": high}
    return found


def mean_difference(climb: Climb, other: Climb, asked: Asked, column: str) -> tuple[float, float, float]:
    """How much higher the mean over the rungs that count is than another system's, with the 95 % interval."""
    chosen = asked.columns[column]
    ours, theirs = (np.mean([c.right[rung][chosen] for rung in c.counted()], axis=0) for c in (climb, other))
    return float((ours - theirs).mean()), *cluster_bootstrap_ci((ours - theirs).tolist(), asked.recordings(column))


def best_blind(asked: Asked, rows: Sequence[QuestionRow], train_rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The best baseline that sees no image on the main column: its name and its accuracies by column."""
    cells = [csv_cells(row) for row in rows]
    right = {name: asked.right(answers) for name, answers in blind_predictions(train_rows, cells).items()}
    name = max(right, key=lambda name: right[name][asked.columns[asked.main_column]].mean())
    return {"name": name, "accuracy": {column: asked.accuracy(right[name], column) for column in asked.columns}}


def crossings(light: Climb, depth: Climb, asked: Asked, column: str) -> dict[str, float | None]:
    """For each kind of light: the exposure below which an RGB system answers less than a depth system in any light.

    Between rungs accuracy is taken to change evenly with the logarithm of the exposure. None where the lines do not
    cross.
    """
    level = depth.right[CLEAN][asked.columns[column]].mean()
    found = {}
    for kind, rungs in light.kinds().items():
        points = [(rung.severity, light.right[rung][asked.columns[column]].mean() - level) for rung in rungs]
        found[kind] = None
        for (bright, above), (dark, below) in zip(points, points[1:], strict=False):
            if above >= 0 > below:
                part = above / (above - below)
                found[kind] = float(np.exp2(np.log2(bright) + part * (np.log2(dark) - np.log2(bright))))
                break
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


def read_climbs(folder: Path, asked: Asked) -> list[Climb]:
    """The systems of an earlier call, from its robustness.json.

    Raises:
        UserError: there is none, it is damaged, or it is about other questions.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"--with {folder}: has no {RECORD}; give the --output of an earlier call")
    record = read_json(path)
    try:
        if record["questions"]["digest"] != asked.digest:
            raise UserError(f"--with {folder}: its systems answered other questions; score them on the same ones")
        n = len(asked.answers)
        return [
            Climb(
                system["name"],
                system["model"],
                system["modality"],
                {Degradation(rung["kind"], rung["severity"]): unpack(rung["right"], n) for rung in system["rungs"]},
            )
            for system in record["systems"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not what this command writes; score its systems again") from error


def check_same_ladder(climbs: Sequence[Climb]) -> None:
    """Raise UserError when two systems have one name, or two of one modality stand on different rungs."""
    names = [climb.name for climb in climbs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two systems are called {twice}; give each a name with --names")
    for climb in climbs:
        first = next(other for other in climbs if other.modality == climb.modality)
        if list(climb.right) != list(first.right):
            only = next(iter(set(climb.right) ^ set(first.right)))
            raise UserError(
                f"{climb.name} and {first.name} are not on the same ladder: only one of them has {only}; score both "
                "with the same --kinds and the same version of this code"
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
