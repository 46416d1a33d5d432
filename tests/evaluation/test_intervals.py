"""Intervals and paired tests: coverage, agreement with textbook formulas and scipy, and invariances."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from evaluation.intervals import (
    cluster_bootstrap_ci,
    crossed_bootstrap,
    paired_difference,
    percentile_interval,
    permutation_test,
    wilson_interval,
)


def naive_cluster_bootstrap(values, clusters, n_resamples: int, seed: int) -> tuple[float, float]:
    """Draw clusters one by one and average their questions."""
    rng = np.random.default_rng(seed)
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))]
    means = []
    for _ in range(n_resamples):
        drawn = [value for pick in rng.integers(0, len(groups), len(groups)) for value in groups[pick]]
        means.append(sum(drawn) / len(drawn))
    return tuple(np.quantile(means, [0.025, 0.975]))


def clustered_answers(rng: np.random.Generator, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers whose difficulty depends on the image; images have 1 to 6 questions; the true accuracy is 0.5."""
    sizes = rng.integers(1, 7, n_clusters)
    clusters = np.repeat(np.arange(n_clusters), sizes)
    difficulty = rng.beta(1, 1, n_clusters)[clusters]
    return rng.random(len(clusters)) < difficulty, clusters


def test_agrees_with_a_naive_bootstrap_over_unequal_clusters():
    values, clusters = clustered_answers(np.random.default_rng(0), 40)
    fast = cluster_bootstrap_ci(values, clusters, n_resamples=20000)
    naive = naive_cluster_bootstrap(values, clusters.tolist(), 5000, seed=1)
    assert fast == pytest.approx(naive, abs=0.015)


def test_one_question_per_image_is_the_normal_approximation():
    values = np.arange(2000) % 10 < 3
    low, high = cluster_bootstrap_ci(values, range(2000), n_resamples=5000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 2000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)


def test_coverage_is_near_the_nominal_level():
    rng = np.random.default_rng(3)
    hits = iid_hits = 0
    for trial in range(300):
        values, clusters = clustered_answers(rng, 80)
        low, high = cluster_bootstrap_ci(values, clusters, n_resamples=500, seed=trial)
        hits += low <= 0.5 <= high
        low, high = cluster_bootstrap_ci(values, range(len(values)), n_resamples=500, seed=trial)
        iid_hits += low <= 0.5 <= high
    assert 0.90 <= hits / 300 <= 0.99
    assert iid_hits < hits - 15  # ignoring the images claims too much


def test_copies_of_each_question_do_not_narrow_the_interval():
    values = np.random.default_rng(1).random(200) < 0.6
    once = cluster_bootstrap_ci(values, range(200))
    copied = cluster_bootstrap_ci(np.repeat(values, 5), np.repeat(np.arange(200), 5))
    independent = cluster_bootstrap_ci(np.repeat(values, 5), range(1000))
    assert copied == pytest.approx(once, abs=1e-12)
    assert independent[1] - independent[0] < 0.6 * (once[1] - once[0])


def test_row_order_cluster_names_and_repetition_change_nothing():
    values, clusters = clustered_answers(np.random.default_rng(5), 60)
    expected = cluster_bootstrap_ci(values, clusters)
    order = np.random.default_rng(6).permutation(len(values))
    assert cluster_bootstrap_ci(values[order], clusters[order]) == expected
    assert cluster_bootstrap_ci(values, [f"image {c}.jpg" for c in clusters]) == expected
    assert cluster_bootstrap_ci(values, clusters, seed=1) != expected


def test_a_higher_level_is_wider_and_contains_the_mean():
    values, clusters = clustered_answers(np.random.default_rng(8), 60)
    narrow, wide = (cluster_bootstrap_ci(values, clusters, level=level) for level in (0.8, 0.99))
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_one_image_gives_no_interval():
    assert all(math.isnan(end) for end in cluster_bootstrap_ci([1, 0, 1], ["a", "a", "a"]))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        cluster_bootstrap_ci([1, 0], ["a"])
    with pytest.raises(ValueError, match="level"):
        cluster_bootstrap_ci([1, 0], ["a", "b"], level=95)
    with pytest.raises(ValueError, match="same questions"):
        permutation_test([True], [True, False], ["a", "b"])
    with pytest.raises(ValueError, match="1 values but 2 clusters"):
        permutation_test([True], [True], ["a", "b"])
    with pytest.raises(ValueError, match=r"values of shape \(1, 2\) do not fit"):
        crossed_bootstrap(np.ones((1, 2)), ["a", "b"])
    with pytest.raises(ValueError, match="fewer than two clusters"):
        crossed_bootstrap(np.ones((1, 1, 2)), ["a", "a"])
    with pytest.raises(ValueError, match="no questions"):
        paired_difference([], [], [])
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)


def test_paired_difference_is_antisymmetric_and_sharper_than_unpaired():
    rng = np.random.default_rng(2)
    a = rng.random(500) < 0.5
    b = np.where(rng.random(500) < 0.1, ~a, a)
    images = np.arange(500) // 2
    difference, low, high = paired_difference(a, b, images)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert low <= difference <= high
    mirrored = paired_difference(b, a, images)
    assert mirrored[0] == -difference
    assert (-mirrored[2], -mirrored[1]) == pytest.approx((low, high), abs=0.01)
    alone = cluster_bootstrap_ci(a, images)
    assert high - low < 0.7 * (alone[1] - alone[0])
    assert paired_difference(a, a, images) == (0, 0, 0)


def test_seeds_and_rooms_drawn_together_cover_the_truth():
    """Five seeds and 60 rooms, both with effects on the gain: rooms alone claim too much, both together do not."""
    rng, hits, hits_of_rooms = np.random.default_rng(7), 0, 0
    clusters = np.repeat(np.arange(60), 4)
    for trial in range(200):
        gain = 0.1 + 0.05 * rng.standard_normal((5, 1)) + 0.15 * rng.standard_normal(60)[clusters]
        difference = gain + 0.4 * rng.standard_normal((5, len(clusters)))
        draws = crossed_bootstrap(difference[None], clusters, n_resamples=500, seed=trial)
        low, high = percentile_interval(draws[:, 0])
        hits += low <= 0.1 <= high
        low, high = cluster_bootstrap_ci(difference.mean(0), clusters, n_resamples=500, seed=trial)
        hits_of_rooms += low <= 0.1 <= high
    assert 0.88 <= hits / 200 <= 0.99 and hits_of_rooms < hits - 20, (hits, hits_of_rooms)


def test_with_one_seed_the_crossed_bootstrap_is_that_over_clusters():
    values, clusters = clustered_answers(np.random.default_rng(9), 60)
    draws = crossed_bootstrap(values[None, None], clusters, n_resamples=20000)
    assert draws.shape == (20000, 1)
    expected = cluster_bootstrap_ci(values, clusters, n_resamples=20000)
    assert percentile_interval(draws[:, 0]) == pytest.approx(expected, abs=0.005)
    again = crossed_bootstrap(np.stack([values, values, ~values])[:, None], clusters)
    assert np.allclose(again[:, 0], again[:, 1]) and np.allclose(again[:, 0] + again[:, 2], 1)  # the same draw for all


def test_the_crossed_bootstrap_draws_seeds():
    """Against drawing seeds and rooms one by one and averaging their questions."""
    rng = np.random.default_rng(10)
    sizes = rng.integers(1, 5, 20)
    clusters = np.repeat(np.arange(20), sizes)
    values = rng.random((3, len(clusters))) < np.array([[0.2], [0.5], [0.7]])
    means = []
    for _ in range(4000):
        rooms = [np.flatnonzero(clusters == room) for room in rng.integers(0, 20, 20)]
        means.append(values[rng.integers(0, 3, 3)][:, np.concatenate(rooms)].mean())
    draws = crossed_bootstrap(values[None], clusters, n_resamples=4000)[:, 0]
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(draws, share) == pytest.approx(np.quantile(means, share), abs=0.03)
    assert np.std(draws) == pytest.approx(np.std(means), rel=0.06)


def mcnemar(a, b) -> float:
    """The exact test that treats questions as independent."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def two_systems(rng, n_clusters: int, *, gain: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of two systems; in each room one of them sees better, which of them is chance but for `gain`."""
    clusters = np.repeat(np.arange(n_clusters), rng.integers(4, 12, n_clusters))
    lead = (0.3 * rng.choice([-1, 1], n_clusters) + gain)[clusters]
    return *(rng.random(len(clusters)) < 0.5 + sign * lead / 2 for sign in (1, -1)), clusters


def test_null_systems_are_told_apart_as_often_as_the_level_says():
    """At 5 %, on rooms that one system or the other sees better: McNemar's questions are not independent there."""
    rng, n_trials, found = np.random.default_rng(0), 2000, {"permutation": 0, "McNemar": 0}
    for _ in range(n_trials):
        a, b, clusters = two_systems(rng, 60)
        found["permutation"] += permutation_test(a, b, clusters) <= 0.05
        found["McNemar"] += mcnemar(a, b) <= 0.05
    assert 0.035 <= found["permutation"] / n_trials <= 0.062  # 5 % with two and a half standard errors
    assert found["McNemar"] / n_trials > 0.08


def test_a_true_gain_is_found():
    rng = np.random.default_rng(1)
    p_values = [permutation_test(*two_systems(rng, 200, gain=0.1)) for _ in range(200)]
    assert np.mean(np.array(p_values) <= 0.05) > 0.85


@pytest.mark.parametrize("n_clusters", [1, 2, 5, 9, 12])
def test_p_is_the_share_of_all_exchanges(n_clusters):
    """Brute force over all 2**K exchanges of the systems' answers, cluster by cluster."""
    rng = np.random.default_rng(n_clusters)
    for _ in range(20):
        a, b, clusters = two_systems(rng, n_clusters, gain=rng.uniform(0, 0.6))
        differences = [int(a[clusters == c].sum()) - int(b[clusters == c].sum()) for c in range(n_clusters)]
        sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=n_clusters)]
        expected = np.mean([found >= abs(sum(differences)) for found in sums])
        assert permutation_test(a, b, clusters) == pytest.approx(expected, rel=1e-12)


def test_p_is_scipys_monte_carlo_at_the_size_of_a_test_split():
    """650 rooms and 5,000 questions, 9,999 random exchanges: the same p but for their number."""
    a, b, clusters = two_systems(np.random.default_rng(2), 650, gain=0.02)
    sums = np.bincount(clusters, weights=a.astype(int) - b.astype(int))
    drawn = scipy.stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda x, y, axis: (x - y).sum(axis),
        permutation_type="samples",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(3),
    )
    exact = permutation_test(a, b, clusters)
    assert 0.001 < exact < 0.5 and exact == pytest.approx(drawn.pvalue, abs=4 * math.sqrt(exact / 9999))


def test_one_question_per_cluster_is_mcnemars_test():
    rng = np.random.default_rng(4)
    for n in (3, 40, 1500):
        a, b = rng.random(n) < 0.6, rng.random(n) < 0.5
        assert permutation_test(a, b, range(n)) == pytest.approx(mcnemar(a, b), rel=1e-9)


def test_order_names_and_clusters_without_a_difference_change_nothing():
    a, b, clusters = two_systems(np.random.default_rng(5), 80, gain=0.05)
    expected = permutation_test(a, b, clusters)
    order = np.random.default_rng(6).permutation(len(a))
    assert permutation_test(a[order], b[order], [f"room {c}" for c in clusters[order]]) == expected
    assert permutation_test(b, a, clusters) == expected
    # Rooms where both have as many right say nothing, with whichever questions.
    more = [True, False, True, True], [False, True, True, True], ["x", "x", "y", "z"]
    assert permutation_test(*(np.concatenate([p, q]) for p, q in zip((a, b, clusters), more, strict=True))) == expected
    assert permutation_test(*more) == permutation_test([], [], []) == 1.0


def test_p_is_never_zero():
    assert 0 < permutation_test([True] * 3000, [False] * 3000, range(3000)) < 1e-300


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (400, 1000)])
def test_wilson_is_scipys(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
    assert wilson_interval(successes, n, level=0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)
