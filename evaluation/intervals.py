"""Intervals and paired tests for accuracies of questions that share a room.

Questions about one room are not independent: a system that misreads the room fails all of them, and several pictures
of a recording show one room. Every interval and test here therefore resamples or permutes clusters (recordings), never
questions.
"""

import math
import sys
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
    """Percentile interval of the mean over questions when whole clusters are drawn with replacement.

    Clusters with the same sum and size are interchangeable, so a resample is drawn as multinomial counts over those
    distinct pairs: exact, independent of the order of the rows, and fast for thousands of them.

    Args:
        values: (N,) one number per question, for instance 1 = right.
        clusters: (N,) the recording of each question.
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
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    sums, sizes = _cluster_sums(values, clusters)
    n = len(sums)
    if n < 2:
        return math.nan, math.nan
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    weights = np.random.default_rng(seed).multinomial(n, counts / n, size=n_resamples)
    totals = weights @ kinds  # (n_resamples, 2): sum of values, number of questions
    return percentile_interval(totals[:, 0] / totals[:, 1], level=level)


def percentile_interval(draws: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """The ends between which the middle `level` of bootstrap draws lies."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def crossed_bootstrap(
    values: np.ndarray, clusters: Sequence[object], *, n_resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means over answers of several systems in several training seeds, with seeds and clusters drawn with replacement.

    Every draw takes as many seeds and as many clusters as there are, independently of each other, and the same ones for
    all systems: differences and ratios of the means are paired. With one seed only the clusters vary.

    Args:
        values: (K, S, N) numbers of K systems in S seeds on N questions, for instance 1 = right.
        clusters: (N,) the recording of each question.
        n_resamples: bootstrap repetitions, B.
        seed: seed of the resampling.

    Returns:
        (B, K) means over drawn seeds and questions.

    Raises:
        ValueError: `values` is not (K, S, N) for as many questions as `clusters`, or there are fewer than two clusters.

    Source: Owen 2007, Annals of Applied Statistics 1:386 (the pigeonhole bootstrap: rows and columns resampled
    independently; its variance is not below the true one where both are many).
    """
    values = np.asarray(values)
    if values.ndim != 3 or values.shape[2] != len(clusters):
        raise ValueError(f"values of shape {values.shape} do not fit (systems, seeds, {len(clusters)} questions)")
    sums, sizes = zip(*(_cluster_sums(row, clusters) for row in values.reshape(-1, len(clusters))), strict=True)
    if (n := len(sizes[0])) < 2:
        raise ValueError("fewer than two clusters say nothing about their spread")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)  # (B, C)
    means = (weights @ np.array(sums).T) / (weights @ sizes[0])[:, None]  # (B, K * S)
    n_seeds = values.shape[1]
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds  # (B, S)
    return np.einsum("bks,bs->bk", means.reshape(n_resamples, len(values), n_seeds), seeds)


def _cluster_sums(values: Sequence[float], clusters: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each cluster, both (K,), in the order in which clusters first occur."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    numbers: dict[object, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64)), np.bincount(index)


def paired_difference(
    correct_a: Sequence[bool], correct_b: Sequence[bool], clusters: Sequence[object], *, level: float = 0.95
) -> tuple[float, float, float]:
    """Accuracy of A minus accuracy of B on the same questions, with its interval clustered by recording.

    Args:
        correct_a: (N,) whether system A answered each question correctly.
        correct_b: (N,) the same for system B, in the same order.
        clusters: (N,) the recording of each question.
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


def permutation_test(correct_a: Sequence[bool], correct_b: Sequence[bool], clusters: Sequence[object]) -> float:
    """Two-sided p value of a paired permutation test over K clusters. Null hypothesis: both systems are equally good.

    Under it the two systems' answers to a whole cluster can be exchanged: the difference of right answers in it, d, is
    as likely as -d. The p value is the share of all 2**K exchanges whose summed difference is at least as far from 0 as
    the observed one. It is exact for any K: differences are whole numbers, so their distribution is a convolution of K
    two-point ones, and nothing is drawn at random.

    Args:
        correct_a: (N,) whether system A answered each question correctly.
        correct_b: (N,) the same for system B, in the same order.
        clusters: (N,) the recording of each question.

    Returns:
        p in (0, 1]; 1 where both have equally many right.

    Raises:
        ValueError: the lengths differ.

    Source: Good 2005, Permutation, Parametric and Bootstrap Tests of Hypotheses, 3rd edition, chapter 3 (one-sample
    test by changes of sign); the distribution as in Pagano and Tritchler 1983, JASA 78:435 (there with Fourier
    transforms).
    """
    sums, _ = _cluster_sums(_paired(correct_a, correct_b), clusters)
    steps = np.sort(np.abs(sums[sums != 0]).astype(np.int64))  # sorted: the order of the rows changes no bit
    total = int(steps.sum())
    chances = np.zeros(2 * total + 1)  # of the sums -total..total
    chances[total] = 1.0
    reach = 0
    for step in steps.tolist():
        before = chances[total - reach : total + reach + 1].copy() / 2
        reach += step
        chances[total - reach : total + reach + 1] = 0
        chances[total - reach : total - reach + len(before)] += before
        chances[total + reach + 1 - len(before) : total + reach + 1] += before
    observed = abs(int(sums.sum()))
    if observed == 0:
        return 1.0
    return max(2 * float(chances[total + observed :].sum()), sys.float_info.min)  # 2**-1000 and less round to 0


def _paired(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> np.ndarray:
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired systems must answer the same questions, got {len(correct_a)} and {len(correct_b)}")
    return np.asarray(correct_a, dtype=np.int64) - np.asarray(correct_b, dtype=np.int64)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of independent trials; unlike the bootstrap's it has a width also at 0 and at 1.

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
