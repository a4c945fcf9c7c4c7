"""Pretraining on questions, and asking: from a run to a file of answers that evaluate reads."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import COMMANDS, main
from behrt_jax.config.commands import AskConfig, EvaluateConfig, ExportConfig, PredictConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, QueriesConfig, TrainConfig
from behrt_jax.data.events import DAY
from behrt_jax.data.predictions import METADATA_KEY
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.questions import prediction_times
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_platt
from behrt_jax.tracking.console import Console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.workflows import ask as asking
from behrt_jax.workflows.ask import (
    Question,
    any_of,
    ask,
    beyond_training,
    find_question,
    known_answers,
    without_facts,
)
from behrt_jax.workflows.checks import check
from behrt_jax.workflows.doctor import examine_folder
from behrt_jax.workflows.evaluate import FIGURES_FILE, evaluate
from behrt_jax.workflows.export import export
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.loaded import load
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.pretrain import pretrain
from behrt_jax.workflows.report import report
from tests.data.test_facts import facts_data
from tests.models.rows import tiny_model
from tests.workflows.finetune_case import ONE

GROUP = "CODE//[0-3]"
QUERIES = PretrainConfig(
    name="asked",
    objective="both",
    model=tiny_model(layers=1, dropout=0.1),
    lora=LoRAConfig(rank=2),
    freezing=FreezingConfig("lora"),
    queries=QueriesConfig(
        times=2,
        questions=8,
        horizon_days=(2.0, 5.0, 20.0),
        groups=(GROUP,),
        codes=("CODE", "RISK"),
        mlm_weight=0.5,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0),
    train=TrainConfig(epochs=6, batch_size=32, validate_every=16, log_every=4),
)


def config_of(case, **changes):
    return replace(QUERIES, data=DataConfig(source="prepared", path=case.data), **changes)


@pytest.fixture(scope="module")
def run(case, tmp_path_factory):
    """Masked codes and questions together, with adapters."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    return pretrain(config_of(case, output=folder), ONE)


def asked(case, run, output, **options):
    given = {"codes": (GROUP,), "horizon_days": 5.0, "labels": case.labelled("binary").labels, **options}
    counts = ask(AskConfig(model=run.folder, data=case.data, output=output, **given), ONE)
    return counts, pq.read_table(output)


def probabilities(table):
    return table["predicted_boolean_probability"].to_numpy()


def test_a_run_on_questions_says_what_it_has_learnt(run):
    summary = run.summary
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    tuning = [line for line in lines if line["split"] == "tuning"]
    best = summary["best"]
    assert best["loss"] == min(line["loss"] for line in tuning) < tuning[0]["loss"]
    for line in tuning:
        assert line["loss"] == pytest.approx(line["question_loss"] + 0.5 * line["mlm_loss"])
        assert {"auroc_2_days", "auroc_5_days", "auroc_20_days", "accuracy"} <= line.keys()
    train = [line for line in lines if line["split"] == "train"]
    of_masked = np.mean([line["loss"] - line["question_loss"] for line in train])
    # The mean of masked codes, by its weight, beside the mean of questions.
    assert of_masked == pytest.approx(0.5 * np.mean([line["mlm_loss"] for line in train]), rel=0.1)
    prevalence = summary["baselines"]["prevalence"]
    assert prevalence["auroc_5_days"] == pytest.approx(0.5)
    assert summary["gain_over_prevalence"] == pytest.approx(prevalence["loss"] - best["loss"])
    text = (run.folder / "SUMMARY.txt").read_text()
    assert "answers questions about the future" in text and "AUROC 5 days" in text
    assert (run.folder / "plots" / "loss.png").is_file()
    parameters = json.loads((run.folder / "parameters.json").read_text())
    assert parameters["base"]["trainable"] == 0 < parameters["head"]["trainable"]
    assert "query_head" not in {one["name"].split("/")[0] for one in parameters["adapters"]}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(case, run, tmp_path, monkeypatch):
    config, original = config_of(case, output=tmp_path / "parts"), Console.step

    def stop_at_step_7(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "step", stop_at_step_7)
    assert pretrain(config, ONE).exit_status == 128 + signal.SIGTERM
    monkeypatch.setattr(Console, "step", original)
    again = pretrain(replace(config, resume=True), ONE)
    trees = []
    for folder in (run.folder, again.folder):
        loaded = load(folder, devices=ONE)
        with open_checkpoints(folder / "checkpoints") as checkpoints:
            step = checkpoints.latest_step()
            shapes = loaded.setup.shapes
            found = checkpoints.restore(step, params=shapes["params"], lora=shapes["lora"])
        trees.append(jax.device_get((step, found.params, found.lora)))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_answers_are_predictions_that_evaluate_reads(case, run, tmp_path):
    counts, table = asked(case, run, tmp_path / "answers.parquet", calibrate=False)
    labels = pq.read_table(case.labelled("binary").labels)
    held_out = case.labelled("binary").splits["held_out"]
    assert counts["examples"] == len(table) == np.isin(labels["subject_id"], held_out).sum()
    found = probabilities(table)
    assert ((found > 0) & (found < 1)).all() and found.std() > 0
    question = json.loads(pq.read_metadata(tmp_path / "answers.parquet").metadata[METADATA_KEY])["question"]
    assert question["asked_as"] == "a group" and question["matched"] == 4
    assert question["horizon_days"] == 5.0 and question["calibration"] is None
    output = tmp_path / "evaluation"
    evaluate(
        EvaluateConfig(predictions=tmp_path / "answers.parquet", output=output, baselines=False, draws=20)
    )
    figures = json.loads((output / FIGURES_FILE).read_text())
    assert figures["counts"]["examples"] == len(table)


@pytest.mark.slow
def test_codes_asked_one_by_one_are_combined_as_independent(case, run, tmp_path):
    table = asked(case, run, tmp_path / "any.parquet", codes=("CODE//0", "CODE//5"), calibrate=False)[1]
    alone = [
        probabilities(
            asked(case, run, tmp_path / f"{code}.parquet", codes=(f"CODE//{code}",), calibrate=False)[1]
        )
        for code in (0, 5)
    ]
    programs = asking._log_odds._cache_size()
    other = {"codes": ("CODE//4",), "horizon_days": 9.5, "calibrate": False}
    asked(case, run, tmp_path / "4.parquet", **other)
    assert asking._log_odds._cache_size() == programs  # whatever is asked
    expected = 1 - (1 - alone[0]) * (1 - alone[1])
    np.testing.assert_allclose(probabilities(table), expected, rtol=1e-5)
    single = load(run.folder, devices=ONE)
    assert find_question(single, (GROUP,), 5.0).ids.tolist() == [len(single.vocabulary)]
    assert find_question(single, ("CODE//[0-3]", "CODE//5"), 5.0).ids.tolist() == sorted(
        single.vocabulary.codes.index(f"CODE//{code}") for code in (0, 1, 2, 3, 5)
    )


def test_facts_are_not_asked_about():
    data = facts_data()
    names = data.vocabulary.codes

    def of(*asked, group=False):
        codes = np.isin(names, asked)
        ids = [len(names)] if group else np.flatnonzero(codes)
        return Question(np.array(ids, np.int32), codes, 5.0, group)

    question, facts = without_facts(of("A//1", "B//2", "SEX//F"), data)  # B//2 comes as well
    assert facts == 1 and [names[row] for row in question.ids] == ["A//1", "B//2"]
    assert np.flatnonzero(question.codes).tolist() == question.ids.tolist()
    group, facts = without_facts(of("A//1", "SEX//F", group=True), data)
    assert group.ids.tolist() == [len(names)] and group.codes.sum() == facts == 1
    plain = of("A//1", "B//1")
    assert without_facts(plain, data) == (plain, 0)
    with pytest.raises(InputError, match="--codes: all 1 codes that match are static facts"):
        without_facts(of("SEX//F"), data)
    # A code of facts that is an event of somebody is asked about.
    part = data.splits["train"]
    codes = part.codes.copy()
    codes[0] = names.index("SEX//F")
    both = replace(data, splits={**data.splits, "train": replace(part, codes=codes)})
    assert without_facts(of("SEX//F"), both)[1] == 0


def test_what_pretraining_never_asked_is_said():
    vocabulary = facts_data().vocabulary
    codes = np.isin(vocabulary.codes, ["A//1", "B//1"])
    question = Question(np.flatnonzero(codes).astype(np.int32), codes, 5.0, False)
    model = SimpleNamespace(vocabulary=vocabulary, queries=QueriesConfig(horizon_days=(5.0, 20.0)))
    assert beyond_training(model, question) == []
    assert beyond_training(model, replace(question, horizon_days=20.0)) == []
    for days in (4.0, 21.0):
        (line,) = beyond_training(model, replace(question, horizon_days=days))
        assert line.startswith(f"The model was asked within 5 to 20 days: of {days:g} days")
    model.queries = replace(model.queries, codes=("A//",))
    assert beyond_training(model, question) == [
        "The model was never asked about 1 of the codes (queries.codes)."
    ]
    assert beyond_training(model, replace(question, group=True)) == []


@pytest.mark.slow
def test_prediction_times_long_after_the_last_event_are_counted(case, run, tmp_path):
    part, path = read_prepared(case.data).splits["held_out"], tmp_path / "late.parquet"
    last = part.times[part.offsets[1:] - 1]
    times = np.stack([last + DAY, last + DAY + 1], axis=1).ravel()  # the latter are late
    ids = np.repeat(part.subject_ids, 2)
    pq.write_table(
        pa.table({"subject_id": ids, "prediction_time": pa.array(times, pa.timestamp("us"))}), path
    )
    counts, table = asked(case, run, tmp_path / "answers.parquet", labels=path, calibrate=False)
    assert counts["after_last_event"] == len(part) == counts["examples"] / 2
    found = probabilities(table).reshape(-1, 2)
    np.testing.assert_allclose(found[:, 0], found[:, 1], rtol=1e-5)  # as if it were the last event's time


@pytest.mark.slow
def test_many_codes_are_asked_in_several_passes_with_equal_answers(case, run, tmp_path, monkeypatch):
    options = {"codes": ("CODE//",), "calibrate": False}
    whole = asked(case, run, tmp_path / "whole.parquet", **options)[1]
    monkeypatch.setattr(asking, "_AT_ONCE", 3)
    parts = asked(case, run, tmp_path / "parts.parquet", **options)[1]
    np.testing.assert_allclose(probabilities(parts), probabilities(whole), rtol=1e-5)


def test_any_of_several_in_logarithms():
    log_odds = np.array([[-2.0, 0.5, 3.0], [-30.0, -31.0, -40.0], [40.0, 1.0, 0.0]])
    chances = 1 / (1 + np.exp(-log_odds))
    expected = 1 - np.prod(1 - chances[0])
    found = any_of(log_odds)
    assert 1 / (1 + np.exp(-found[0])) == pytest.approx(expected)
    assert found[1] == pytest.approx(np.log(np.exp(-30.0) + np.exp(-31.0)), abs=1e-3)
    assert found[2] > 30 and np.isfinite(found).all()
    np.testing.assert_array_equal(any_of(log_odds[:, :1]), log_odds[:, 0])


@pytest.mark.slow
def test_calibration_makes_the_mean_answer_that_of_the_tuning_split(case, run, tmp_path):
    data, model = read_prepared(case.data, False), load(run.folder, devices=ONE)
    times = prediction_times(data, "tuning", 5.0)
    path, fitted = tmp_path / "tuning.parquet", 0
    ids, at = data.splits["tuning"].subject_ids[times.subjects], pa.array(times.times, pa.timestamp("us"))
    pq.write_table(pa.table({"subject_id": ids, "prediction_time": at}), path)
    for number, pattern in enumerate(("RISK", "CODE//[4-7]", "CODE//0", "CODE//3")):
        truth = known_answers(data, "tuning", times, find_question(model, (pattern,), 5.0)).values
        options = {"codes": (pattern,), "labels": path, "split": "tuning"}
        raw = probabilities(asked(case, run, tmp_path / f"{number}.parquet", calibrate=False, **options)[1])
        odds = np.log(raw) - np.log1p(-raw)
        slope, _ = fit_platt(odds, truth)
        found = probabilities(asked(case, run, tmp_path / f"{number}_fitted.parquet", **options)[1])
        if min(truth.sum(), (~truth).sum()) < 20 or slope <= 0:  # what rises the wrong way is left as it is
            np.testing.assert_allclose(found, raw, rtol=1e-6)
            continue
        fitted += 1
        assert found.mean() == pytest.approx(truth.mean(), abs=1e-6)
        assert abs(raw.mean() - truth.mean()) > 0.01
    assert fitted


@pytest.mark.slow
def test_what_takes_a_pretrained_run_takes_one_on_questions(case, run, tmp_path, capsys):
    finetuned = finetune(replace(case.config(), init=run.folder, output=tmp_path / "task"), ONE)
    assert finetuned.summary["best"]["loss"] > 0
    vectors = tmp_path / "vectors.parquet"
    predict(PredictConfig(model=run.folder, data=case.data, output=vectors, embeddings=True), ONE)
    assert len(pq.read_table(vectors)) == len(case.labelled("binary").splits["held_out"])
    assert not any(found.severity == "error" for found in examine_folder_of(run.folder))
    report(COMMANDS["report"].options(runs=(run.folder,)))
    exported = tmp_path / "export"
    export(ExportConfig(run=run.folder, output=exported, min_subjects=1), ONE)
    assert "answers questions about the time after a visit" in (exported / "README.md").read_text()
    _, before = asked(case, run, tmp_path / "run.parquet", calibrate=False)
    _, after = asked(case, replace(run, folder=exported), tmp_path / "export.parquet", calibrate=False)
    np.testing.assert_allclose(probabilities(after), probabilities(before), rtol=1e-4)
    further = pretrain(config_of(case, output=tmp_path / "more", lora=None, freezing=FreezingConfig(),
                                 init=replace(QUERIES.init, run=run.folder),
                                 train=replace(QUERIES.train, max_steps=1)), ONE)  # fmt: skip
    assert further.exit_status == 0


def examine_folder_of(folder):
    return examine_folder(COMMANDS["doctor"].options(run=folder))


def test_wrong_options_are_refused_before_anything_is_read(tmp_path, capsys):
    options = {"model": tmp_path / "nowhere", "codes": ("X",), "horizon_days": 5.0}

    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            ask(AskConfig(**{"output": tmp_path / "no.parquet", **options, **changes}))

    refused("--horizon_days is 0: give a number of days above 0", horizon_days=0.0)
    refused("--horizon_days is -3", horizon_days=-3.0)
    refused("--horizon_days is nan", horizon_days=float("nan"))
    refused("--horizon_days is missing", horizon_days=None)
    refused("--codes is missing", codes=())
    refused("--output is missing", output=None)
    refused("nowhere")
    assert main(["ask", "--model", "nowhere", "--horizon_days", "0", "--codes", "X"]) == 2
    assert capsys.readouterr().err.startswith("error: --horizon_days is 0")
    for section in (
        {"horizon_days": (0.0,)},
        {"horizon_days": ()},
        {"questions": 0},
        {"times": 0},
        {"groups": ("A", "A")},
        {"positive_share": 1.0},
    ):
        config = replace(QUERIES, queries=replace(QUERIES.queries, **section))
        with pytest.raises(InputError, match=rf"^queries.{next(iter(section))}"):
            check(config)
    for section, values in (("static_masks", True), ("data_on_device", "yes")):
        with pytest.raises(InputError, match=section):
            check(replace(QUERIES, train=replace(QUERIES.train, **{section: values})))


@pytest.mark.slow
def test_models_and_codes_that_do_not_fit_are_refused(case, run, tmp_path):
    output = tmp_path / "no.parquet"
    for pattern, match in (
        ("NOTHING", "--codes: 'NOTHING' matches no code of the vocabulary"),
        ("(", "--codes"),
    ):
        with pytest.raises(InputError, match=match):
            asked(case, run, output, codes=(pattern,))
    with pytest.raises(InputError, match="pretrained on masked codes alone, and answers no questions"):
        asked(case, replace(run, folder=case.base), output)
    with pytest.raises(InputError, match="fine-tuned, and answers no questions"):
        asked(case, replace(run, folder=case.run()), output)
    other = tmp_path / "other"
    case.labelled("binary").prepare(
        [row._replace(code=f"OTHER//{row.code}") if "MEDS" not in row.code else row
         for row in case.labelled("binary").rows], other)  # fmt: skip
    with pytest.raises(InputError, match="unknown"):
        ask(AskConfig(model=run.folder, data=other, output=output, codes=("RISK",), horizon_days=5.0), ONE)
    assert not output.exists()
    with pytest.raises(InputError, match="'Z' matches no code"):
        pretrain(
            config_of(case, output=tmp_path / "never", queries=replace(QUERIES.queries, groups=("Z",))), ONE
        )
