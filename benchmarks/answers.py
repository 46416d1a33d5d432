"""Which test questions every run of the study answered right, and the differences and intervals that follow from it.

A question takes one bit per run, so the answers of all runs are a file of some 100 KB beside runs.json. From it every
interval can be computed again without a model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.comparison import Results
from evaluation.intervals import crossed_bootstrap, percentile_interval
from evaluation.metrics import recordings
from utils import UserError, atomic_path

Interval = tuple[float, float, float]  # value, low, high; points


@dataclass(frozen=True)
class Answers:
    """Which of the same questions each of several runs answered right.

    Attributes:
        questions: digest of the questions' ids in their order.
        clusters: (N,) number of each question's recording.
        kinds: (N,) type of each question.
        by_depth: (N,) whether depth can answer the question.
        right: name of a run -> (N,) whether its answer was right.
    """

    questions: str
    clusters: np.ndarray
    kinds: np.ndarray
    by_depth: np.ndarray
    right: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, results: Results) -> "Answers":
        """The questions of an evaluated system, without any answers."""
        _, clusters = np.unique(recordings(results.rows), return_inverse=True)
        kinds = np.array([row["Question_Type"] for row in results.rows])
        by_depth = np.array([row["depth_answerable"] == "1" for row in results.rows])
        return cls(digest(results), clusters, kinds, by_depth, {})

    @classmethod
    def load(cls, path: Path) -> "Answers":
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: is missing; the records beside it are of a study before answers were kept (commit 74fd584 or "
                "older) and give no intervals: run the study again"
            )
        with np.load(path) as stored:
            right = np.unpackbits(stored["bits"], axis=1, count=len(stored["kinds"])).astype(bool)
            return cls(
                str(stored["questions"]),
                *(stored[name] for name in ("clusters", "kinds", "by_depth")),
                dict(zip(stored["names"].tolist(), right, strict=True)),
            )

    def save(self, path: Path) -> None:
        """Write a compressed NumPy archive without pickled objects; the same answers give the same bytes."""
        with atomic_path(path) as part, open(part, "wb") as handle:
            np.savez_compressed(
                handle,
                questions=np.array(self.questions),
                clusters=self.clusters.astype(np.uint16),
                kinds=self.kinds,
                by_depth=self.by_depth,
                names=np.array(list(self.right)),
                bits=np.packbits(list(self.right.values()), axis=1),
            )

    def means(self, systems: Sequence[Sequence[str]], column: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean accuracies of K systems, (K,), and their bootstrap draws, (B, K), over seeds and recordings.

        Args:
            systems: names of each system's runs, one per seed; the same seeds in the same order for all systems.
            column: `By depth`, `Overall` or a question type.
        """
        chosen = self.by_depth if column == "By depth" else np.ones_like(self.by_depth)
        if column not in ("By depth", "Overall"):
            chosen = self.kinds == column
        values = np.array([[self.right[run][chosen] for run in runs] for runs in systems])
        return values.mean((1, 2)), crossed_bootstrap(values, self.clusters[chosen].tolist())

    def difference(self, ours: Sequence[str], theirs: Sequence[str], column: str) -> Interval:
        """Points by which our runs are above theirs, which have the same seeds, with the 95 % interval."""
        means, draws = self.means([ours, theirs], column)
        low, high = percentile_interval(draws[:, 0] - draws[:, 1])
        return 100 * float(means[0] - means[1]), 100 * low, 100 * high

    def share_of_way(self, ours: Sequence[str], bottom: str, top: str, column: str) -> Interval:
        """How far runs are on the way from one system to another, in %, with the 95 % interval."""
        means, draws = self.means([ours, [bottom] * len(ours), [top] * len(ours)], column)
        shares = [100 * (x[..., 0] - x[..., 1]) / (x[..., 2] - x[..., 1]) for x in (means, draws)]
        return float(shares[0]), *percentile_interval(shares[1])


def digest(results: Results) -> str:
    """Digest of the ids of the answered questions, in their order."""
    return hashlib.sha256("\n".join(row["Question_Id"] for row in results.rows).encode()).hexdigest()[:16]
