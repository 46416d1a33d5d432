"""The part of the study's tables about worse depth: what systems answer on the ladder, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.answers import Answers
from dataset.inputs.degradations import DEPTH_LADDER, TRAINED, Degradation
from evaluation.intervals import percentile_interval

CLEAN, MEAN = "clean", "mean"
COLUMN = "By depth"
NO_DEPTH = str(Degradation("no_depth", 1))
RUNGS = {kind: [str(Degradation(kind, severity)) for severity in DEPTH_LADDER[kind]] for kind in DEPTH_LADDER}
COUNTED = [rung for kind in TRAINED for rung in RUNGS[kind]]
Systems = Mapping[str, Sequence[str]]  # name of a variant -> names of its runs, by seed


def rung_name(run: str, rung: object) -> str:
    """What the answers of a run on a rung of its ladder are called in `Answers`."""
    return f"{run} on {rung}"


def with_means(answers: Answers, systems: Systems, kinds: Sequence[str]) -> Answers:
    """The answers with the mean over some rungs added, as shares: over `COUNTED`, and over the severities of a kind."""
    groups = {MEAN: COUNTED} | {kind: RUNGS[kind] for kind in kinds}
    means = {
        rung_name(run, name): np.mean([answers.right[rung_name(run, rung)] for rung in rungs], axis=0)
        for runs in systems.values()
        for run in runs
        for name, rungs in groups.items()
    }
    return replace(answers, right=answers.right | means)


def ladder_tables(
    answers: Answers, systems: Systems, pairs: Sequence[tuple[str, str]], *, others: Sequence[str] = ()
) -> list[str]:
    """Markdown lines: accuracies by depth on every trained rung, means of other kinds, and differences of pairs.

    Args:
        answers: with those on every rung, see `rung_name`.
        systems: at least one run each.
        pairs: names of two systems each, which have the same seeds.
        others: kinds that nothing was trained for.
    """
    answers = with_means(answers, systems, others)
    lines = _table(["clean", "mean", "share kept", *COUNTED])
    for name, runs in systems.items():
        cells = [_mean(answers, runs, rung) for rung in (CLEAN, MEAN)]
        cells += [_kept(answers, runs), *(_mean(answers, runs, rung) for rung in COUNTED)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if others:
        lines += ["", "Kinds that nothing was trained for, mean of three severities, and no depth at all:", ""]
        lines += _table([*others, "no depth"])
    for name, runs in systems.items() if others else ():
        lines.append(f"| {name} | {' | '.join(_mean(answers, runs, rung) for rung in (*others, NO_DEPTH))} |")
    lines += ["", "Differences in points, by depth, with 95 % intervals that resample seeds and recordings:", ""]
    lines += _table([f"{ours} - {theirs}" for ours, theirs in pairs])
    for rung in (CLEAN, MEAN, *(rung for kind in (*TRAINED, *others) for rung in RUNGS[kind]), NO_DEPTH):
        cells = [_difference(answers, systems[ours], systems[theirs], rung) for ours, theirs in pairs]
        lines.append(f"| {rung} | {' | '.join(cells)} |")
    return lines


def _table(columns: Sequence[str]) -> list[str]:
    return [f"| By depth | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]


def _on(runs: Sequence[str], rung: str) -> list[str]:
    return [rung_name(run, rung) for run in runs]


def _mean(answers: Answers, runs: Sequence[str], rung: str) -> str:
    (mean,), _ = answers.means([_on(runs, rung)], COLUMN)
    return f"{100 * mean:.1f}"


def _kept(answers: Answers, runs: Sequence[str]) -> str:
    means, draws = answers.means([_on(runs, MEAN), _on(runs, CLEAN)], COLUMN)
    ends = [100 * end for end in percentile_interval(draws[:, 0] / draws[:, 1])]
    return "{:.1f} [{:.1f}, {:.1f}]".format(100 * means[0] / means[1], *ends)


def _difference(answers: Answers, ours: Sequence[str], theirs: Sequence[str], rung: str) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*answers.difference(_on(ours, rung), _on(theirs, rung), COLUMN))
