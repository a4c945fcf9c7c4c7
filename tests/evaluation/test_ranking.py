"""AUROC of one set of examples against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from sklearn.metrics import roc_auc_score

from behrt_jax.evaluation.ranking import auroc
from tests.evaluation.test_decisions import SCORED, arrays


@given(SCORED)
def test_auroc_equals_that_of_scikit_learn_with_equal_scores_too(scored):
    scores, labels = arrays(scored)
    if labels.all() or not labels.any():
        assert auroc(scores, labels) is None
    else:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("place", range(4))
def test_a_score_that_is_no_number_leaves_auroc_undefined(place):
    scores, labels = np.array([0.1, 0.7, 0.4, 0.2], np.float32), np.array([True, True, False, False])
    assert auroc(scores, labels) == 0.5
    scores[place] = np.nan
    assert auroc(scores, labels) is None
