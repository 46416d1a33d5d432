"""Intervals and paired tests for accuracies of questions that share images.

Questions about one image are not independent: a system that misreads the room fails all of them. Every interval here
therefore resamples images, never questions.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri


def cluster_bootstrap_ci(
    values: Sequence[float],
    clusters: Sequence[object],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over questions when whole clusters (images) are drawn with replacement.

    Clusters with the same sum and size are interchangeable, so a resample is drawn as multinomial counts over those
    distinct pairs: exact, independent of the order of the rows, and fast for thousands of them.

    Args:
        values: (N,) one number per question, for instance 1 = right.
        clusters: (N,) the image of each question.
        level: nominal coverage, in (0, 1).
        n_resamples: bootstrap repetitions.
        seed: seed of the resampling.

    Returns:
        Low and high end; NaN twice when there are fewer than two clusters, which say nothing about their spread.

    Raises:
        ValueError: `values` and `clusters` differ in length, or `level` is outside (0, 1).

    Source: Davison and Hinkley 1997, Bootstrap Methods and their Application, sections 2.4 and 3.8 (a ratio estimator
    under resampling of groups).
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    numbers: dict[object, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)
    if len(numbers) < 2:
        return math.nan, math.nan
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    kinds, counts = np.unique(np.stack([sums, np.bincount(index)], axis=1), axis=0, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(len(numbers), counts / len(numbers), size=n_resamples)
    totals = weights @ kinds  # (n_resamples, 2): sum of values, number of questions
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    correct_a: Sequence[bool], correct_b: Sequence[bool], clusters: Sequence[object], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Accuracy of A minus accuracy of B on the same questions, with its interval clustered by image.

    Args:
        correct_a: (N,) whether system A answered each question correctly.
        correct_b: (N,) the same for system B, in the same order.
        clusters: (N,) the image of each question.
        level: nominal coverage, in (0, 1).

    Returns:
        Difference, low and high end, as shares (0.01 = one point).

    Raises:
        ValueError: the lengths differ, or there is no question.
    """
    difference = _paired(correct_a, correct_b)
    if not len(difference):
        raise ValueError("no questions to compare")
    return float(difference.mean()), *cluster_bootstrap_ci(difference, clusters, level=level)


def mcnemar_exact(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Two-sided exact McNemar p value: are the questions that only one system got right split evenly?

    It treats questions as independent, so read it beside the clustered interval of `paired_difference`.

    Raises:
        ValueError: the lengths differ.

    Source: McNemar 1947, Psychometrika 12:153; exact form: a binomial test with probability one half.
    """
    difference = _paired(correct_a, correct_b)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def _paired(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> np.ndarray:
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired systems must answer the same questions, got {len(correct_a)} and {len(correct_b)}")
    return np.asarray(correct_a, dtype=np.int64) - np.asarray(correct_b, dtype=np.int64)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of independent trials; unlike the bootstrap it keeps a width at 0 and at 1.

    Raises:
        ValueError: `n` is not positive or `successes` is outside 0..n.

    Source: Wilson 1927, JASA 22:209.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = float(ndtri((1 + level) / 2))
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
