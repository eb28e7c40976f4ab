"""Scores of predictions per record, comparisons with bootstrap intervals, and the tables of the report."""

# Letters: N records, Q quantiles, K classes, M resamples

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

# Levels of the predicted quantiles: of tables, whose mean quantile loss is half the CRPS, and of series.
TABLE_LEVELS = np.arange(0.05, 1.0, 0.1)
SERIES_LEVELS = np.arange(0.1, 0.95, 0.1)
RESAMPLES = 1000
MIN_PROBABILITY = 1e-6
OURS = "openm6"
Better = Literal["lower", "higher"]
# Of a metric with a goal, neither more nor less is better.
COVERAGE_GOAL = (0.75, 0.85)
MAX_WORSE = 0.05  # of a column against boosting


@dataclass(frozen=True)
class Measure:
    """One metric of one target: its value for each record and method; `blocks` are resampled together.  # N"""

    target: str
    metric: str
    better: Better
    values: dict[str, np.ndarray]
    blocks: np.ndarray
    percent: bool = True


def quantile_losses(predicted: np.ndarray, truth: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the mean pinball loss over the levels, doubled: an estimate of the CRPS.  # N Q, N, Q -> N"""
    error = truth[:, None] - predicted
    return 2 * np.maximum(levels * error, (levels - 1) * error).mean(1)


def at_level(predicted: np.ndarray, levels: np.ndarray, level: float) -> np.ndarray:
    """Return the quantile of a level, linear between those that are predicted.  # N Q -> N"""
    return np.asarray([np.interp(level, levels, row) for row in predicted])


def marginal_quantiles(train: np.ndarray, levels: np.ndarray, count: int) -> np.ndarray:
    """Return the quantiles of the training values as the prediction of `count` records.  # -> N Q"""
    return np.tile(np.nanquantile(train, levels), (count, 1))


def number_measures(
    predicted: Mapping[str, Mapping[str, np.ndarray]], truth: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray]
) -> list[Measure]:
    """Return relative CRPS and MAE: by target, and their mean over all targets if there are several.

    predicted: method -> target -> N Q at TABLE_LEVELS; truth and train: target -> values, NaN if missing
    Relative CRPS is the CRPS over the mean absolute error of the training median, as in the evaluation of a model.
    """
    measures: list[Measure] = []
    for target, true in truth.items():
        seen = np.flatnonzero(np.isfinite(true))
        unit = max(float(np.abs(true[seen] - np.nanmedian(train[target])).mean()), 1e-12)
        for metric, scale in (("relative CRPS", unit), ("MAE", 1.0)):
            values = {}
            for method, by_target in predicted.items():
                if target not in by_target:
                    continue
                found = by_target[target][seen]
                if metric == "MAE":
                    values[method] = np.abs(at_level(found, TABLE_LEVELS, 0.5) - true[seen])
                else:
                    values[method] = quantile_losses(found, true[seen], TABLE_LEVELS) / scale
            measures.append(Measure(target, metric, "lower", values, seen, percent=metric != "MAE"))
    if len(truth) > 1:
        measures.insert(0, _mean_of([one for one in measures if one.metric == "relative CRPS"]))
    return measures


def _mean_of(measures: Sequence[Measure]) -> Measure:
    """Return the mean over targets for each record, of the methods that predict all of them."""
    methods = [name for name in measures[0].values if all(name in one.values for one in measures)]
    records = np.unique(np.concatenate([one.blocks for one in measures]))
    values = {}
    for method in methods:
        whole = np.full((len(measures), len(records)), np.nan)
        for row, one in enumerate(measures):
            whole[row, np.searchsorted(records, one.blocks)] = one.values[method]
        values[method] = np.nanmean(whole, 0)
    return Measure(f"mean of {len(measures)} columns", measures[0].metric, "lower", values, records)


def label_measures(
    target: str, predicted: Mapping[str, np.ndarray], classes: Sequence[str], truth: Sequence[str]
) -> list[Measure]:
    """Return accuracy and log loss; predicted: method -> probabilities of the classes, N K."""
    index = {name: number for number, name in enumerate(classes)}
    rows, true = np.arange(len(truth)), np.asarray([index[name] for name in truth])
    right = {method: (found.argmax(1) == true).astype(float) for method, found in predicted.items()}
    loss = {
        method: -np.log(np.clip(found[rows, true] / np.maximum(found.sum(1), 1e-12), MIN_PROBABILITY, 1))
        for method, found in predicted.items()
    }
    return [
        Measure(target, "accuracy", "higher", right, rows),
        Measure(target, "log loss", "lower", loss, rows, percent=False),
    ]


def pooled(folds: Sequence[Sequence[Measure]]) -> list[Measure]:
    """Return the measures of several folds, of different records, as those of all, of the methods that all have."""
    found = []
    for same in zip(*folds, strict=True):
        first = same[0]
        methods = [name for name in first.values if all(name in one.values for one in same)]
        values = {name: np.concatenate([one.values[name] for one in same]) for name in methods}
        blocks = np.concatenate([[f"{fold} {block}" for block in one.blocks] for fold, one in enumerate(same)])
        found.append(replace(first, values=values, blocks=blocks))
    return found


def series_measures(
    predicted: Mapping[str, np.ndarray], truth: np.ndarray, columns: np.ndarray, blocks: np.ndarray
) -> list[Measure]:
    """Return MAE, weighted quantile loss and coverage of the 80 % interval, per forecast window.

    predicted: method -> W H Q at SERIES_LEVELS; truth: W H, NaN if missing; columns, blocks: of each window
    Errors are relative to the mean absolute value of the window's column, so that columns of any unit are averaged.
    """
    size = {column: np.nanmean(np.abs(truth[columns == column])) for column in np.unique(columns)}
    unit = np.asarray([max(size[column], 1e-12) for column in columns])
    seen = np.isfinite(truth)
    count = np.maximum(seen.sum(1), 1)
    found: dict[str, dict[str, np.ndarray]] = {"MAE": {}, "weighted quantile loss": {}, "80 % coverage": {}}
    middle = len(SERIES_LEVELS) // 2
    for method, quantiles in predicted.items():
        error = np.where(seen, truth - quantiles[..., middle], 0.0)
        flat, true = quantiles.reshape(-1, len(SERIES_LEVELS)), np.where(seen, truth, 0.0).reshape(-1)
        losses = np.where(seen, quantile_losses(flat, true, SERIES_LEVELS).reshape(truth.shape), 0.0)
        inside = seen & (truth >= quantiles[..., 0]) & (truth <= quantiles[..., -1])
        found["MAE"][method] = np.abs(error).sum(1) / count / unit
        found["weighted quantile loss"][method] = losses.sum(1) / count / unit
        found["80 % coverage"][method] = inside.sum(1) / count
    better: dict[str, Better] = {"80 % coverage": "higher"}
    return [Measure("", metric, better.get(metric, "lower"), values, blocks) for metric, values in found.items()]


def compare(measure: Measure, seed: int = 0) -> dict[str, Any]:
    """Return each method's value with its 95 % interval, the best baseline, and OpenM6 against it.

    `advantage` is the fraction by which the error is smaller than that of the best baseline (of accuracy: the
    difference), with an interval by the paired bootstrap over blocks; `result` is win, loss or tie.
    """
    resampled = _resampled_means(measure, seed)
    values = {name: float(found.mean()) for name, found in measure.values.items()}
    intervals = {name: np.quantile(means, (0.025, 0.975)).tolist() for name, means in resampled.items()}
    report: dict[str, Any] = {
        "target": measure.target,
        "metric": measure.metric,
        "percent": measure.percent,
        "records": len(measure.blocks),
        "values": values,
        "intervals": intervals,
    }
    others = [name for name in values if name != OURS]
    if measure.metric == "80 % coverage" or OURS not in values or not others:
        return report
    sign = 1 if measure.better == "lower" else -1
    best = min(others, key=lambda name: (math.isnan(values[name]), sign * values[name]))
    report["best"] = best
    report["against"] = {name: _advantage(measure, resampled, name) for name in others}
    report |= report["against"][best]
    return report


def _advantage(measure: Measure, resampled: Mapping[str, np.ndarray], other: str) -> dict[str, Any]:
    ours, theirs = resampled[OURS], resampled[other]
    if measure.better == "higher":
        whole, drawn = measure.values[OURS].mean() - measure.values[other].mean(), ours - theirs
    else:
        whole = 1 - measure.values[OURS].mean() / max(float(measure.values[other].mean()), 1e-12)
        drawn = 1 - ours / np.maximum(theirs, 1e-12)
    low, high = np.quantile(drawn, (0.025, 0.975))
    result = "win" if low > 0 else "loss" if high < 0 else "tie"
    if math.isnan(whole):  # a method without answers to all records
        result = "loss" if np.isnan(measure.values[OURS]).any() else "win"
    return {"advantage": float(whole), "advantage_interval": [float(low), float(high)], "result": result}


def _resampled_means(measure: Measure, seed: int) -> dict[str, np.ndarray]:
    """Return the mean of each method in M resamples of blocks, the same for all methods.  # M"""
    names, block = np.unique(measure.blocks, return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    size = counts @ np.bincount(block, minlength=len(names))
    return {
        method: (counts @ np.bincount(block, weights=values, minlength=len(names))) / size
        for method, values in measure.values.items()
    }


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of the report by kind, and the wins and losses."""
    lines: list[str] = []
    for kind in dict.fromkeys(one["kind"] for one in reports):
        lines += [f"### {kind}", "", "| set | target, metric | OpenM6 | best baseline | others | advantage | result |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for one in reports:
            if one["kind"] == kind:
                lines += _rows(one)
        lines.append("")
    lines += [
        "### Wins and losses",
        "",
        "| kind | sets | wins | ties | losses | goals reached |",
        "|---|---|---|---|---|---|",
    ]
    for kind, unseen in sorted({(one["kind"], one["unseen"]) for one in reports}):
        own = [one for one in reports if (one["kind"], one["unseen"]) == (kind, unseen)]
        results = [result for one in own for result in headlines(one)]
        counts = " | ".join(str(results.count(result)) for result in ("win", "tie", "loss"))
        lines.append(f"| {kind} | {len(own)} {'unseen' if unseen else 'development'} | {counts} | {goals(kind, own)} |")
    return "\n".join(lines) + "\n"


def goals(kind: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Return how far sets of one kind reach the goals: a failed set reaches none."""
    scores = [score for one in reports for score in one["scores"]]
    if kind == "series":
        errors = [score.get("against", {}) for score in scores if score["metric"] == "MAE"]
        naive = sum(one.get("seasonal naive", {}).get("advantage", -1) > 0 for one in errors)
        best = sum(bool(one) and min(other["advantage"] for other in one.values()) > 0 for one in errors)
        coverage = [score["values"].get(OURS, 0.0) for score in scores if score["metric"] == "80 % coverage"]
        inside = sum(COVERAGE_GOAL[0] <= value <= COVERAGE_GOAL[1] for value in coverage)
        return f"below seasonal naive {naive}, below all {best}, coverage of 75–85 % {inside}, of {len(reports)}"
    if kind == "table":
        columns = [score for score in scores if score["metric"] == "relative CRPS"]
        single = [score for score in columns if not score["target"].startswith("mean of")]
        found = [score.get("against", {}).get("boosting", {}).get("advantage", -1.0) for score in single]
        mean = 100 * float(np.mean(found)) if found else math.nan
        worse = sum(advantage < -MAX_WORSE for advantage in found)
        return f"{mean:+.1f} % against boosting, {worse} of {len(found)} columns more than 5 % worse"
    rows = [
        score for score in scores if score["metric"] in ("accuracy", "relative CRPS") and "mean" not in score["target"]
    ]
    against = [score.get("against", {}) for score in rows]
    if kind == "image":
        reached = sum(one.get("CNN", {}).get("advantage", -1) >= 0 for one in against)
        return f"at least the CNN {reached} of {len(reports)}"
    reached = sum(bool(one) and min(other["advantage"] for other in one.values()) > 0 for one in against)
    return f"ahead of every single input {reached} of {len(reports)}"


def headlines(one: Mapping[str, Any]) -> list[str]:
    """Return the results that count: of MAE for series, else of accuracy and of relative CRPS (the mean of columns).

    A method that failed has lost.
    """
    metrics = ("MAE",) if one["kind"] == "series" else ("accuracy", "relative CRPS")
    first = {row["metric"]: row for row in reversed(one["scores"]) if row["metric"] in metrics}
    return [row.get("result", "loss") for row in first.values()]


def shown(scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the table: of several number columns their mean, the first and the worst; all others."""
    mean = next((row["target"] for row in scores if row["target"].startswith("mean of")), None)
    if mean is None:
        return list(scores)
    columns = [row for row in scores if row["metric"] == "relative CRPS" and row["target"] != mean]
    kept = (mean, columns[0]["target"])
    rows = [row for row in scores if row["target"] in kept or row["metric"] in ("accuracy", "log loss")]
    compared = [row for row in columns if "advantage" in row]
    if compared:
        worst = min(compared, key=lambda row: row["advantage"])
        rows.append({**worst, "target": f"worst of all: {worst['target']}"})
    return rows


def _rows(one: Mapping[str, Any]) -> list[str]:
    name = f"`{one['name']}`{' (unseen)' if one['unseen'] else ''}"
    if not one["scores"]:
        return [f"| {name} | – | {one['failure']} | – | – | – | loss |"]
    rows, failure = [], one["failure"]
    for score in shown(one["scores"]):
        ours, best = score["values"].get(OURS), score.get("best")
        cells = [name, ", ".join(filter(None, (score["target"], score["metric"])))]
        if ours is None and failure:
            # Once is enough.
            cells.append(failure)
            failure = ""
        else:
            cells.append(_value(score, OURS))
        cells.append(f"{best} {_value(score, best)}" if best else "–")
        others = [other for other in score["values"] if other not in (OURS, best)]
        cells.append("; ".join(f"{other} {_short(score, other)}" for other in others) or "–")
        if "advantage" in score:
            low, high = score["advantage_interval"]
            cells += [f"{100 * score['advantage']:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})", score["result"]]
        else:
            cells += ["–", _coverage_result(score)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _coverage_result(score: Mapping[str, Any]) -> str:
    value = score["values"].get(OURS)
    if value is None:
        return "loss"
    return "as wanted" if COVERAGE_GOAL[0] <= value <= COVERAGE_GOAL[1] else "outside 75–85 %"


def _value(score: Mapping[str, Any], method: str) -> str:
    if method not in score["values"]:
        return "–"
    low, high = score["intervals"][method]
    scale = 100 if score["percent"] else 1
    return f"{_short(score, method)} ({scale * low:.3g} to {scale * high:.3g})"


def _short(score: Mapping[str, Any], method: str) -> str:
    value = score["values"][method]
    return f"{100 * value:.3g} %" if score["percent"] else f"{value:.4g}"
