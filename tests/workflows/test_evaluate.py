"""An evaluation is whole, names no subject, and says what the figures are worth."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import main
from behrt_jax.config.commands import EvaluateConfig
from behrt_jax.data.predictions import members_path, read_predictions
from behrt_jax.errors import InputError
from behrt_jax.evaluation.performance import main_figure
from behrt_jax.workflows import evaluate as workflow
from behrt_jax.workflows.evaluate import evaluate
from tests.records.prepare.test_pipeline import without_digests
from tests.workflows.evaluated import FIRST_ID, Evaluated

pytest.importorskip("sklearn")
FILES = ["SUMMARY.txt", "metrics.json", "report.html"]
PICTURES = {
    "binary": ["comparison", "decision_curve", "precision_recall", "reliability", "roc"],
    "multiclass": ["comparison"],
    "multilabel": ["comparison"],
    "regression": ["comparison", "reliability"],
    "survival": ["comparison", "survival"],
}
BASELINES = {
    "binary": ["prevalence", "logistic regression", "gradient boosting"],
    "multiclass": ["prevalence", "logistic regression", "gradient boosting"],
    "multilabel": ["prevalence", "codes seen before", "logistic regression"],
    "regression": ["mean", "linear regression", "gradient boosting"],
    "survival": ["Kaplan-Meier"],
}


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Drawn in the one test that is about all files: they take most of the time."""
    if "every_kind" not in request.node.name:
        monkeypatch.setattr(workflow, "plot_evaluation", lambda record, folder: [])


def judge(case, **more):
    output = case.folder / "out"
    config = EvaluateConfig(predictions=case.predictions, output=output, **{"draws": 40, **more})
    return evaluate(config), output


@pytest.mark.parametrize("kind", BASELINES)
def test_every_kind_is_evaluated_beside_its_baselines(tmp_path, kind, capsys):
    case = Evaluated(tmp_path, kind)
    case.predict()
    record, output = judge(case)
    pictures = [f"plots/{name}.png" for name in PICTURES[kind]]
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert found == sorted([*FILES, *pictures])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "labels.parquet", "out", "predictions.parquet", "prepared",
    ]  # fmt: skip
    assert [baseline["name"] for baseline in record["baselines"]] == BASELINES[kind]
    assert all(baseline["figures"] for baseline in record["baselines"])
    assert json.loads((output / "metrics.json").read_text())["model"]["figures"] == record["model"]["figures"]
    main = record["model"]["figures"][main_figure(kind)]
    assert main["low"] < main["value"] < main["high"]
    ages = [group["counts"]["examples"] for group in record["groups"]["age"]]
    assert sum(ages) == record["counts"]["examples"] == len(read_predictions(case.predictions))
    shown = capsys.readouterr().out
    assert (
        shown.rstrip().splitlines()[-1].startswith(f"Written to {output}: SUMMARY.txt, metrics.json, plots/")
    )
    # No subject's id is in any of it.
    for path in output.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not any(str(FIRST_ID + index).encode() in text for index in range(300)), path
    assert str(FIRST_ID)[:6] not in shown


def test_figures_are_those_of_scikit_learn_on_the_file(tmp_path):
    from sklearn.metrics import average_precision_score, roc_auc_score

    case = Evaluated(tmp_path, "binary")
    table = pq.read_table(case.predict())
    labels, scores = table["boolean_value"].to_numpy(), table["predicted_boolean_probability"].to_numpy()
    record, _ = judge(case, baselines=False)
    figures = record["model"]["figures"]
    np.testing.assert_allclose(figures["auroc"]["value"], roc_auc_score(labels, scores))
    np.testing.assert_allclose(figures["average_precision"]["value"], average_precision_score(labels, scores))
    assert record["without_baselines"] == "--no_baselines was given."
    assert record["baselines"] == []


def test_a_baseline_that_wins_is_said_to_win_and_a_seed_gives_the_same_again(tmp_path):
    case = Evaluated(tmp_path, "binary", subjects=300)
    case.predict(quality=0.0)
    record, output = judge(case)
    logistic = record["baselines"][1]
    assert logistic["figures"]["auroc"]["value"] > 0.8
    assert logistic["model_less_baseline"]["auroc"]["ahead"] == "baseline"
    text = (output / "SUMMARY.txt").read_text()
    assert "THE BASELINE WINS: logistic regression is better than the model by AUROC (model 0.500" in text
    assert "THE BASELINE WINS: logistic regression is better" in (output / "report.html").read_text()
    assert judge_in(case, "again") == record
    other = judge_in(case, "other", seed=1, baselines=False)
    assert other["model"]["figures"]["prevalence"] != record["model"]["figures"]["prevalence"]


def judge_in(case, name, **more):
    return evaluate(
        EvaluateConfig(predictions=case.predictions, output=case.folder / name, **{"draws": 40, **more})
    )


def test_labels_of_held_out_and_of_later_times_do_not_reach_the_baselines(tmp_path):
    case = Evaluated(tmp_path, "binary")
    case.predict()
    first = judge_in(case, "first")
    table = pq.read_table(case.labels)
    held_out = np.isin(table["subject_id"].to_numpy(), case.splits["held_out"])
    flipped = np.where(held_out, ~table["boolean_value"].to_numpy(), table["boolean_value"].to_numpy())
    pq.write_table(table.set_column(2, "boolean_value", pa.array(flipped)), case.labels)
    again = judge_in(case, "second")
    assert again["baselines"] == first["baselines"]


def test_histories_of_several_splits_are_in_the_order_of_the_predictions(tmp_path):
    case = Evaluated(tmp_path, "binary")
    case.predict("all")
    record, output = judge(case)
    assert record["counts"]["examples"] == 300
    assert record["baselines"][1]["figures"]["auroc"]["value"] > 0.8
    assert "predictions of the split all, which model and baselines" in (output / "SUMMARY.txt").read_text()


def test_train_examples_are_capped_and_counted(tmp_path, capsys):
    case = Evaluated(tmp_path, "binary")
    case.predict()
    record, _ = judge(case, max_train_examples=40)
    counts = record["baseline_examples"]
    assert (counts["train"], counts["tuning"]) == (40, 40)
    labels = pq.read_table(case.labels)["subject_id"].to_numpy()
    assert counts["train_left_out"] == np.isin(labels, case.splits["train"]).sum() - 40
    assert f"({counts['train_left_out']:,} of train left out)" in capsys.readouterr().out


def test_sex_comes_from_static_facts(tmp_path):
    case = Evaluated(tmp_path, "binary")
    case.predict()
    ids = np.sort(case.splits["held_out"])
    codes = ["GENDER//F" if subject % 3 else "GENDER//M" for subject in ids]
    pq.write_table(pa.table({"subject_id": ids, "code": codes}), case.data / "held_out" / "static.parquet")
    without_digests(case.data)
    record, output = judge(case, baselines=False)
    groups = {group["group"]: group for group in record["groups"]["sex"]}
    assert list(groups) == ["F", "M"]
    of_file = read_predictions(case.predictions).subject_ids
    assert groups["M"]["counts"]["examples"] == np.count_nonzero(of_file % 3 == 0)
    assert "By sex" in (output / "SUMMARY.txt").read_text()


def test_one_class_and_few_labels_are_said_without_a_warning(tmp_path):
    case = Evaluated(tmp_path, "binary", subjects=40)
    table = pq.read_table(case.predict())
    none = table.set_column(2, "boolean_value", pa.array(np.zeros(len(table), bool)))
    pq.write_table(none, case.predictions)
    record, output = judge(case)
    auroc = record["model"]["figures"]["auroc"]
    assert auroc["value"] is None
    assert auroc["reason"] == f"one class only: all {len(table)} labels are negative"
    assert record["model"]["figures"]["brier"]["value"] > 0
    text = (output / "SUMMARY.txt").read_text()
    assert f"There is no AUROC: one class only: all {len(table)} labels are negative." in text
    assert "With 0 positive labels of 0 subjects the intervals are wide" in text
    assert "NaN" not in (output / "metrics.json").read_text()


def test_without_data_or_labels_it_says_how_to_have_baselines(tmp_path):
    case = Evaluated(tmp_path, "binary")
    case.predict(data=None)
    record = judge_in(case, "no data")
    assert record["without_baselines"].startswith("the predictions do not name their data: give --data")
    assert record["groups"] == {}
    assert (
        "No figures by group: the predictions do not name" in (tmp_path / "no data/SUMMARY.txt").read_text()
    )
    assert judge_in(case, "with data", data=case.data)["without_baselines"] is None
    case.predictions.unlink()
    case.predict(labels=str(tmp_path / "gone"))
    record = judge_in(case, "no labels")
    assert "labels that the predictions name are not there" in record["without_baselines"]
    assert record["groups"]["age"]
    assert judge_in(case, "with labels", labels=case.labels)["without_baselines"] is None


def test_labels_of_another_kind_and_data_of_others_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    case, other = Evaluated(tmp_path / "a", "binary"), Evaluated(tmp_path / "b", "regression", subjects=40)
    case.predict()
    with pytest.raises(InputError, match="of the kind float, but the predictions are binary"):
        judge(case, labels=other.labels)
    with pytest.raises(InputError, match=r"examples are not in .* give the data that was predicted"):
        judge(case, data=other.data)
    assert not (case.folder / "out").exists()


def test_an_ensemble_is_told_beside_its_members(tmp_path):
    case = Evaluated(tmp_path, "binary")
    table = pq.read_table(case.predict())
    rng = np.random.default_rng(0)
    probabilities = table["predicted_boolean_probability"].to_numpy()
    odds = np.log(probabilities / (1 - probabilities))
    members = {f"member_{k}": 1 / (1 + np.exp(-odds - 2 * rng.normal(size=len(odds)))) for k in range(4)}
    keys = {name: table[name] for name in ("subject_id", "prediction_time")}
    pq.write_table(pa.table({**keys, **members}), members_path(case.predictions))
    record, output = judge(case, baselines=False)
    ensemble = record["ensemble"]
    assert ensemble["members"] == 4
    found = ensemble["figures"]["auroc"]
    assert found["least"] < found["mean_member"] < found["most"] < found["ensemble"]
    assert found["ensemble_less_mean_member"]["ahead"] == "model"
    assert {"ece", "calibration_slope", "brier"} <= set(ensemble["figures"])
    assert "Ensemble of 4 members" in (output / "SUMMARY.txt").read_text()


def test_other_files_are_never_written_into_and_nothing_is_left_half_written(tmp_path, monkeypatch):
    case = Evaluated(tmp_path, "binary", subjects=40)
    case.predict()
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        judge(case)
    (output / "mine").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*_):
        raise RuntimeError("no space")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no space"):
        patched.setattr(workflow.evaluation_report, "write_evaluation_report", fail)
        judge(case, baselines=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert list(output.iterdir()) == []
    judge(case, baselines=False)  # an empty folder is taken


def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys):
    pytest.importorskip("tyro")
    assert main(["evaluate", "--output", str(tmp_path / "out")]) == 2
    assert "--predictions is missing" in capsys.readouterr().err
    assert main(["evaluate", "--predictions", str(tmp_path / "none")]) == 2
    assert "--output is missing" in capsys.readouterr().err
    assert main(["evaluate", "--predictions", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "does not exist: give the file that predict wrote" in capsys.readouterr().err
    assert main(["evaluate", "--predictions", "x", "--output", "y", "--draws", "1"]) == 2
    assert "--draws is 1: give 2 or more" in capsys.readouterr().err
    case = Evaluated(tmp_path, "regression", subjects=40)
    case.predict()
    arguments = ["--predictions", str(case.predictions), "--output", str(tmp_path / "out"), "--draws", "20"]
    assert main(["evaluate", *arguments, "--no_baselines"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_without_scikit_learn_the_error_names_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "find_spec", lambda name: None)
    config = EvaluateConfig(predictions=tmp_path / "none.parquet", output=tmp_path / "out")
    with pytest.raises(InputError, match="pip install scikit-learn"):
        evaluate(config)
