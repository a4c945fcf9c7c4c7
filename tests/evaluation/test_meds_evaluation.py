"""Another evaluation package reads our binary predictions and finds the same figures."""

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.data.labels import Labels
from behrt_jax.data.predictions import PredictionWriter, prediction_rows, prediction_schema, read_predictions
from behrt_jax.data.tasks import Task
from behrt_jax.evaluation.performance import assessment_of

polars = pytest.importorskip("polars")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    meds_evaluation = pytest.importorskip("meds_evaluation.evaluate")


@pytest.mark.parametrize("tied", [False, True])
def test_meds_evaluation_reads_binary_predictions_and_agrees(tmp_path, tied):
    rng = np.random.default_rng(0)
    count = 500
    # It casts probabilities to float32: multiples of 1/1024 go through, so that no two tie.
    steps = rng.integers(0, 20, count) * 50 if tied else rng.permutation(1024)[:count]
    probabilities = steps / 1024
    labels = rng.random(count) < probabilities
    schema = prediction_schema("binary")
    columns = {
        "subject_id": rng.integers(0, 100, count),
        "prediction_time": pa.array(np.arange(count) * 86_400_000_000, pa.timestamp("us")),
        "boolean_value": labels,
        "predicted_boolean_value": probabilities >= 0.5,
        "predicted_boolean_probability": probabilities,
    }
    path = tmp_path / "predictions.parquet"
    with PredictionWriter(path, schema, {"kind": "binary", "threshold": 0.5}) as writer:
        writer.write(pa.table(columns, schema=schema))
    theirs = meds_evaluation.evaluate_binary_classification(polars.read_parquet(path))
    theirs = theirs["samples_equally_weighted"]
    ours = assessment_of("binary").scorer(read_predictions(path))(np.ones((1, count)))
    pairs = {
        "auroc": "roc_auc_score",
        "average_precision": "average_precision_score",
        "brier": "brier_score",
        "f1": "f1_score",
    }
    for name, other in pairs.items():
        np.testing.assert_allclose(ours[name][0], theirs[other], rtol=1e-12, err_msg=name)


def test_binary_predictions_without_labels_keep_its_schema(tmp_path):
    schema, labels = prediction_schema("binary"), Labels(np.arange(3), np.arange(3), np.full(3, None), "none")
    path = tmp_path / "predictions.parquet"
    with PredictionWriter(path, schema, {"kind": "binary"}) as writer:
        writer.write(prediction_rows(schema, Task("binary"), labels, np.full((3, 1), 0.5), 0.5, None))
    aligned = meds_evaluation.PredictionSchema.align(pq.read_table(path))
    assert aligned.num_rows == aligned["boolean_value"].null_count == 3
