"""Figures of answers to questions about the future, and the predictor that knows how common each code is."""

import numpy as np

from behrt_jax.data.questions import QuestionBatches, Questions, prevalences
from behrt_jax.evaluation.masked_codes import mean_interval
from behrt_jax.files import JsonObject


def question_metrics(questions: Questions, log_odds: np.ndarray) -> JsonObject:
    """Mean loss of questions, each weighed by its share among all, and AUROC by horizon.

    The AUROC is that of pairs of a positive and a negative answer about the same code and horizon: how common
    a code is earns nothing there.

    Args:
        questions: ``[n, questions]``.
        log_odds: float ``[n, questions]``.

    Returns:
        ``loss`` (nats), ``targets`` (questions) and for each horizon ``auroc_<days>_days``, None where there
        is no such pair.
    """
    losses = question_losses(questions, log_odds)
    weights = questions.weights.astype(np.float64)
    found: JsonObject = {
        "loss": float((losses * weights).sum() / max(weights.sum(), 1e-300)),
        "targets": int(np.count_nonzero(weights)),
    }
    for days in np.unique(questions.horizons[weights > 0]):
        own = (questions.horizons == days) & (weights > 0)
        columns = (questions.codes[own], log_odds[own], questions.answers[own] > 0, weights[own])
        found[f"auroc_{days:g}_days"] = auroc_within(*columns)
    return found


def question_losses(questions: Questions, log_odds: np.ndarray) -> np.ndarray:
    """Cross-entropy of each answer in nats, float64 ``[n, questions]``."""
    signed = np.where(questions.answers > 0, -log_odds, log_odds).astype(np.float64)
    return np.logaddexp(0.0, signed)


def auroc_within(
    groups: np.ndarray, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> float | None:
    """Share of pairs of the same group, a positive and a negative, in which the positive scores higher.

    Equal scores count half, and a pair by the product of its weights.

    Args:
        groups: integers ``[n]``.
        scores: float ``[n]``.
        labels: bool ``[n]``.
        weights: float64 ``[n]``.

    Returns:
        None where there is no pair.
    """
    order = np.lexsort([scores, groups])
    group, score, label = groups[order], scores[order], labels[order]
    positive, negative = weights[order] * label, weights[order] * ~label
    new_group = np.append(True, group[1:] != group[:-1])[: len(group)]
    new_tie = new_group | np.append(True, score[1:] != score[:-1])[: len(group)]
    before = np.cumsum(negative) - negative  # of all groups before
    ties, own = np.cumsum(new_tie) - 1, np.cumsum(new_group) - 1
    of_tie = np.bincount(ties, negative)
    below = before[new_tie][ties] - before[new_group][own]
    won = (positive * (below + 0.5 * of_tie[ties])).sum()
    pairs = (positive * np.bincount(own, negative)[own]).sum()
    return float(won / pairs) if pairs > 0 else None


def predict_prevalence(train: QuestionBatches, tuning: QuestionBatches) -> JsonObject:
    """Figures, on the questions of the tuning split, of the share of the train split with such an answer.

    With the 95 % ``interval`` of the loss, over subjects.
    """
    shares = prevalences(train.sampler, train.examples)  # [ids, horizons]
    log_odds = np.log(shares) - np.log1p(-shares)
    questions = tuning.all_questions()
    horizon = np.searchsorted(train.sampler.horizons.astype(np.float32), questions.horizons)
    answers = log_odds[questions.codes, horizon]
    losses = question_losses(questions, answers) * questions.weights  # [n, Q]
    mean = losses.mean(axis=1) / questions.weights.mean()
    interval = mean_interval(mean, tuning.examples.subjects)
    return {**question_metrics(questions, answers), "interval": list(interval)}
