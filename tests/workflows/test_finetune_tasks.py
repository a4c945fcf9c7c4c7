"""Several tasks trained at once: each member learns from its own table, as if it were alone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import COMMANDS, parse
from behrt_jax.config.commands import EvaluateConfig
from behrt_jax.config.training import FinetuneConfig, PopulationConfig
from behrt_jax.data.labels import read_label_tables
from behrt_jax.data.predictions import read_predictions
from behrt_jax.data.prepared import read_prepared
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import fit_temperature, fit_threshold
from behrt_jax.training.devices import make_mesh
from behrt_jax.workflows.evaluate import evaluate
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.labelled_data import label_tasks, split_batches
from behrt_jax.workflows.population import own_fields, vary
from tests.models.rows import tiny_model
from tests.workflows.finetune_case import ONE, changed


class Tables:
    """Label tables of the case's subjects and prediction times: the outcome that RISK raises, and whether the
    risk is high, which is rarer.
    """

    def __init__(self, case, folder):
        self.case, self.folder = case, folder
        folder.mkdir(exist_ok=True)
        labelled = case.labelled("binary")
        self.keys = pq.read_table(labelled.labels).select(["subject_id", "prediction_time"])
        self.values = {"outcome": labelled.columns["boolean_value"], "high": labelled.odds > 1.5}
        self.split_of = {subject: name for name, ids in labelled.splits.items() for subject in ids.tolist()}

    def write(self, name, kept=slice(None), values=None):
        """The rows `kept` of a table, bool ``[300]``."""
        rows = np.arange(len(self.keys))[kept]
        values = pa.array(np.asarray(self.values[name] if values is None else values)[rows])
        pq.write_table(self.keys.take(rows).append_column("boolean_value", values), self.path(name))
        return self.path(name)

    def path(self, name):
        return self.folder / f"{name}.parquet"

    def of_split(self, name):
        """Which rows are of subjects of a split, bool ``[300]``."""
        return np.array([self.split_of[subject] == name for subject in self.keys["subject_id"].to_pylist()])

    def config(self, paths, output=None, name="lora", **options) -> FinetuneConfig:
        population = PopulationConfig(vary="task", labels=tuple(paths), **options)
        return replace(self.case.config("binary", name), labels=None, output=output, population=population)


@pytest.fixture
def tables(case, tmp_path):
    return Tables(case, tmp_path / "tables")


@pytest.fixture(scope="module")
def run(case, tmp_path_factory):
    """Tables with the same subjects and prediction times, and a run of both tasks."""
    tables = Tables(case, tmp_path_factory.mktemp("tasks"))
    config = tables.config([tables.write("outcome"), tables.write("high")], tables.folder / "run")
    return tables, finetune(config, ONE)


def read(folder, name):
    return json.loads((folder / name).read_text())


def probabilities(case, output, **options):
    return case.predicted(output, **options)["predicted_boolean_probability"].to_numpy()


@pytest.mark.slow
def test_each_member_is_the_single_run_of_its_table(case, run, tmp_path):
    tables, result = run
    folder, summary = result.folder, result.summary
    alone = {"outcome": case.run("binary", "lora"), "high": tmp_path / "alone"}
    finetune(replace(case.config(), labels=tables.path("high"), output=alone["high"]), ONE)
    assert [row["member"] for row in summary["members"]] == ["outcome", "high"]
    for k, (name, single) in enumerate(alone.items()):
        theirs, row = read(single, "summary.json"), summary["members"][k]
        assert row["loss"] == pytest.approx(theirs["best"]["loss"], abs=2e-4)
        assert row["auroc"] == pytest.approx(theirs["best"]["auroc"], abs=5e-3)
        assert row["base_rate_loss"] == pytest.approx(theirs["baselines"]["base rate"]["loss"], abs=1e-7)
        assert row["best_step"] == theirs["best_step"]
        assert summary["data"]["tasks"][name]["train"] == theirs["data"]["train"]
        task = read(folder / "members" / str(k), "task.json")
        assert task["name"] == name and task["calibration"] == row["calibration"]
        # The threshold lies at one of the examples; those with equal histories change places by rounding.
        temperature = theirs["calibration"]["temperature"]
        assert row["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
        given = {"labels": tables.path(name), "split": "tuning"}
        ours = probabilities(case, tmp_path / f"{k}.parquet", model=folder / "members" / str(k), **given)
        single = probabilities(case, tmp_path / f"{k}-alone.parquet", model=single, **given)
        np.testing.assert_allclose(ours, single, atol=5e-3)
    losses = [row["loss"] for row in summary["members"]]
    assert abs(losses[0] - losses[1]) > 0.05


@pytest.mark.slow
def test_the_run_names_its_tasks_and_predicts_by_its_members_alone(case, run, tmp_path):
    tables, result = run
    assert result.summary == read(result.folder, "summary.json")
    assert result.summary["population"]["size"] == 2
    text = (result.folder / "SUMMARY.txt").read_text()
    assert "2 of 2 members have learnt more than the base rate" in text or "1 of 2 members have" in text
    assert re.search(r"^outcome +\d+ +0\.\d{4}", text, re.MULTILINE)
    assert re.search(r"^high +\d+ +0\.\d{4}", text, re.MULTILINE)
    assert "Each member predicts its own task" in text
    for options in ({}, {"embeddings": True}):
        with pytest.raises(
            InputError, match=r"give .*run/members/K, where K is one of 0 \(outcome\), 1 \(high\)"
        ):
            case.predicted(tmp_path / "p.parquet", model=result.folder, labels=tables.path("high"), **options)
    member, output = result.folder / "members" / "1", tmp_path / "p.parquet"
    case.predicted(output, model=member, labels=tables.path("high"))
    config = EvaluateConfig(predictions=output, output=tmp_path / "evaluation", baselines=False, draws=20)
    record = evaluate(config)
    assert record["task"]["kind"] == "binary"
    assert (
        read_predictions(output).metadata["threshold"]
        == result.summary["members"][1]["calibration"]["threshold"]
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_epoch_shows_each_member_its_own_labels_once(case, tables, fraction):
    some = np.random.default_rng(0).random((2, 300)) < 0.6
    paths = [tables.write("outcome", some[0]), tables.write("high", some[1])]
    config = changed(tables.config(paths, size=2), "task", label_fraction=fraction)
    data, model = read_prepared(case.data), tiny_model()
    labelled = label_tasks(config, model, data.vocabulary, data, read_label_tables(paths), ())
    batches, *_ = split_batches(config, model, labelled, make_mesh(ONE))
    variation = vary(config, labelled)
    seen = [[], []]
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        own = own_fields(batch, variation)
        assert set(np.unique(own["weights"])) <= {0.0, 1.0} and own["targets"].shape[0] == 2
        for k, row, segment in zip(*np.nonzero(own["weights"]), strict=True):
            example = batch.examples[row, segment]
            key = labelled.train.subject_ids[example], labelled.train.times[example]
            seen[k].append((*map(int, key), bool(own["targets"][k, row, segment, 0])))
    subjects = set(labelled.train.subject_ids.tolist())
    of_split = tables.of_split("train")
    of_any = np.asarray(tables.keys["subject_id"])[some.any(axis=0) & of_split]
    assert subjects < set(of_any.tolist()) if fraction < 1 else subjects == set(of_any.tolist())
    assert len(subjects) == round(fraction * len(set(of_any.tolist())))
    for k, name in enumerate(("outcome", "high")):
        times = tables.keys["prediction_time"].cast(pa.int64()).to_numpy()
        rows = zip(
            tables.keys["subject_id"].to_pylist(), times.tolist(), tables.values[name].tolist(), strict=True
        )
        kept = some[k] & of_split
        expected = [row for row, keep in zip(rows, kept, strict=True) if keep and row[0] in subjects]
        assert sorted(seen[k]) == sorted(expected)
        assert labelled.tasks[name].counts["train"]["examples"] == len(expected)
        assert labelled.tasks[name].counts["train"]["positive"] == sum(row[2] for row in expected)


@pytest.mark.slow
def test_labels_of_the_other_task_change_nothing(case, tables):
    """With the same pairs: all flipped, or more of them."""
    some = np.random.default_rng(1).random(300) < 0.6
    outcome = tables.write("outcome", some)
    found, summaries = [], []
    others = {"others": ~some, "more": slice(None), "flipped": ~some}
    for name, kept in others.items():
        flipped = ~tables.values["high"] if name == "flipped" else tables.values["high"]
        other = tables.write(name, kept, flipped)
        summaries.append(
            finetune(tables.config([outcome, other], tables.folder / f"run {name}"), ONE).summary
        )
        members = tables.folder / f"run {name}" / "members"
        found.append([(members / k / "adapter_model.safetensors").read_bytes() for k in "01"])
    for summary in summaries[1:]:
        assert summary["members"][0] == summaries[0]["members"][0]
        assert summary["members"][1]["loss"] != summaries[0]["members"][1]["loss"]
    assert found[0][0] == found[1][0] == found[2][0]
    assert len({adapters[1] for adapters in found}) == 3

    # Figures of a member are of its own tuning examples, and predict.py gives the same ones.
    given = {"model": tables.folder / "run others" / "members" / "0", "labels": outcome, "split": "tuning"}
    case.predicted(tables.folder / "p.parquet", **given)
    row, values = summaries[0]["members"][0], tables.values["outcome"][some & tables.of_split("tuning")]
    chances = read_predictions(tables.folder / "p.parquet").predictions
    assert row["targets"] == len(values) == len(chances)
    odds = np.log(chances / (1 - chances)) * row["calibration"]["temperature"]
    assert row["loss"] == pytest.approx(np.logaddexp(0, np.where(values, -odds, odds)).mean(), abs=1e-5)
    temperature = fit_temperature("binary", odds[None, :, None], values[:, None])
    assert row["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert row["calibration"]["threshold"] == pytest.approx(fit_threshold(chances, values, "f1"), abs=1e-5)
    rate = (tables.values["outcome"][some & tables.of_split("train")].sum() + 0.5) / (
        np.count_nonzero(some & tables.of_split("train")) + 1
    )
    assert row["base_rate_loss"] == pytest.approx(-np.log(np.where(values, rate, 1 - rate)).mean(), abs=1e-6)


@pytest.mark.slow
def test_eight_devices_train_what_one_trains(run):
    tables, result = run
    config = tables.config([tables.path("outcome"), tables.path("high")], tables.folder / "eight")
    for ours, theirs in zip(
        finetune(config, jax.devices()).summary["members"], result.summary["members"], strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


@pytest.mark.slow
def test_the_head_alone_of_several_tasks_and_the_console(case, tables, capsys):
    strangers = tables.keys.slice(0, 7).set_column(0, "subject_id", pa.array(np.arange(7)))
    path = tables.write("high")
    table = pq.read_table(path)
    more = strangers.append_column("boolean_value", pa.array([True] * 7))
    pq.write_table(pa.concat_tables([table, more, table.slice(0, 4)]), path)
    config = tables.config([tables.write("outcome"), path], tables.folder / "probe", "probe")
    summary = finetune(config, ONE).summary
    counts = summary["data"]["tasks"]["high"]
    assert (counts["labels"], counts["duplicate_labels"], counts["labels_of_unknown_subjects"]) == (307, 4, 7)
    said = capsys.readouterr().out
    assert "7 of 307 labels of high are of subjects that the data lacks." in said
    assert "4 labels of high came twice and were taken once." in said
    assert all(row["loss"] < row["base_rate_loss"] for row in summary["members"])


def test_a_table_without_labels_of_a_split_is_named_before_anything_is_written(case, tables):
    whole, output = tables.write("outcome"), tables.folder / "run"
    splits = {name: tables.of_split(name) for name in ("train", "tuning")}
    of_one = np.asarray(tables.keys["subject_id"]) == case.labelled("binary").splits["train"][0]
    cases = {
        r"the labels of high have none of the train split \(0 of 116 labels": tables.config(
            [whole, tables.write("high", ~splits["train"])], output
        ),
        r"the labels of few have none of the tuning split .* choose the best epoch": tables.config(
            [whole, tables.write("few", ~splits["tuning"], tables.values["high"])], output
        ),
        r"the labels of one \(task\.label_fraction is 0\.05\) have none of the train": changed(
            tables.config(
                [whole, tables.write("one", of_one | splits["tuning"], tables.values["high"])], output
            ),
            "task",
            label_fraction=0.05,
        ),
        r"population\.labels: .*binary-no\.parquet has float labels": tables.config(
            [whole, tables.write("binary-no", values=np.ones(300))], output
        ),
    }
    pq.write_table(
        pq.read_table(tables.path("binary-no")).rename_columns(
            ["subject_id", "prediction_time", "float_value"]
        ),
        tables.path("binary-no"),
    )
    for message, config in cases.items():
        with pytest.raises(InputError, match=message):
            finetune(config, ONE)
    assert not output.exists()


TWO = (Path("a.parquet").absolute(), Path("b.parquet").absolute())


@pytest.mark.parametrize(
    ("name", "labels", "options", "message"),
    [
        ("lora", None, {"vary": "task"}, r"population\.labels has 0 tables: give one for each member"),
        ("lora", None, {"vary": "task", "labels": TWO[:1]}, r"population\.labels has 1 tables"),
        ("lora", TWO[0], {"vary": "task", "labels": TWO}, "--labels is given beside population.vary task"),
        ("lora", None, {"vary": "task", "labels": TWO, "size": 3}, "size is 3, but .* has 2 tables"),
        ("lora", None, {"vary": "task", "labels": (TWO[0], Path("x/a.parquet"))}, "two tables called a"),
        ("lora", None, {"vary": "task", "labels": TWO, "values": (1, 2)}, "vary in task"),
        ("lora", TWO[0], {"labels": TWO}, r"population\.vary is seed: add --population\.vary task"),
        ("lora", TWO[0], {"vary": "fold", "size": 2, "labels": TWO}, r"population\.vary is fold"),
        ("full", None, {"vary": "task", "labels": TWO}, "share a frozen base"),
        ("adapters", None, {"vary": "task", "labels": TWO}, "leaves the head as it is"),
    ],
)
def test_wrong_options_are_told_before_any_data_is_read(case, tmp_path, name, labels, options, message):
    config = case.config("binary", name if name != "adapters" else "lora")
    if name == "adapters":
        config = changed(config, "freezing", regime="lora_only")
    nothing, output = tmp_path / "nothing", tmp_path / "run"
    config = replace(config, data=nothing, init=nothing, labels=labels, output=output)
    with pytest.raises(InputError, match=message):
        finetune(replace(config, population=PopulationConfig(**options)), ONE)
    assert not output.exists()


def test_tables_are_given_one_after_the_other():
    arguments = ["--population.vary", "task", "--population.labels", "a.parquet", "b.parquet"]
    config = parse(COMMANDS["finetune"], arguments, prog="finetune.py")
    assert (config.population.vary, config.population.labels, config.labels) == ("task", TWO, None)
