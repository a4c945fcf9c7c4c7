"""Static facts from preparation to predictions, where an outcome depends on them."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax import export as jax_export

from behrt_jax.config.commands import EvaluateConfig, ExportConfig, PredictConfig
from behrt_jax.config.data import DataConfig, PrepareConfig
from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import (
    FinetuneConfig,
    OptimizerConfig,
    PretrainConfig,
    SearchConfig,
    TaskConfig,
    TaskTrainConfig,
    TrainConfig,
)
from behrt_jax.data.prepared import read_prepared
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.scores import auroc
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.run_folder import METRICS_FILE, read_metrics
from behrt_jax.workflows.evaluate import evaluate
from behrt_jax.workflows.export import PROGRAM_FILE, export
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.loaded import load
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.pretrain import pretrain
from tests.models.rows import tiny_model
from tests.records.meds_folder import DAY, Row, born, events_table
from tests.records.memory_source import MemorySource
from tests.workflows.evaluated import CODES, TIME, sigmoid
from tests.workflows.finetune_case import ONE
from tests.workflows.small_run import SMALL_RUN, changed

SUBJECTS = 1500


class SexMatters:
    """Subjects whose outcome depends on their sex and on how often RISK came; of a tenth no sex is known."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(0)
        self.data, self.labels = folder / "prepared", folder / "labels.parquet"
        ids = np.arange(SUBJECTS)
        self.female, risks = rng.random(SUBJECTS) < 0.5, rng.integers(0, 5, SUBJECTS)
        known = rng.random(SUBJECTS) < 0.9
        self.rows = []
        for subject in ids.tolist():
            if known[subject]:
                self.rows.append(Row(subject, None, f"GENDER//{'MF'[int(self.female[subject])]}"))
            self.rows.append(Row(subject, None, f"RACE//{subject % 3}"))
            self.rows.append(born(subject, TIME - int(rng.integers(20, 90)) * 365 * DAY))
            self.rows += [Row(subject, TIME - (day + 30) * DAY, "RISK") for day in range(int(risks[subject]))]
            often = rng.integers(0, len(CODES), 8).tolist()
            self.rows += [Row(subject, TIME - (day + 40) * DAY, CODES[i]) for day, i in enumerate(often)]
            self.rows.append(Row(subject, TIME - DAY, CODES[0]))
        self.splits = dict(zip(("train", "tuning", "held_out"), np.split(ids, [900, 1100]), strict=True))
        source = MemorySource([[events_table(self.rows, visits=False)]], self.splits)
        options: dict[str, Any] = {"codes": ("CODE", "RISK"), "min_count": 1, "duplicates": "keep"}
        prepare(source, PrepareConfig(output=self.data, **options), lambda *_: None)
        by_sex = 0.7 * (risks[:, None] - 2) + np.array([-1.5, 1.5])  # log odds of men and of women
        odds = by_sex[ids, self.female.astype(int)]
        self.outcome = rng.random(SUBJECTS) < sigmoid(odds)
        columns = {
            "subject_id": ids,
            "prediction_time": pa.array(np.full(SUBJECTS, TIME), pa.timestamp("us")),
        }
        pq.write_table(pa.table({**columns, "boolean_value": self.outcome}), self.labels)
        without = sigmoid(by_sex).mean(axis=1)
        held_out = self.splits["held_out"]
        best = np.where(known, sigmoid(odds), without)
        self.optimum = auroc(best[held_out], self.outcome[held_out])
        self.optimum_without = auroc(without[held_out], self.outcome[held_out])

    def finetuned(self, facts):
        base = pretrain(
            PretrainConfig(
                model=tiny_model(fact_tokens=facts, cls_token=True, dropout=0.0),
                data=DataConfig(source="prepared", path=self.data),
                optimizer=OptimizerConfig(learning_rate=1e-2),
                train=TrainConfig(max_steps=20, batch_size=128),
                output=self.folder / f"base-{facts}",
            ),
            ONE,
        ).folder
        config = FinetuneConfig(
            data=self.data,
            labels=self.labels,
            init=base,
            freezing=FreezingConfig("full"),
            optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup_fraction=0.0),
            train=TaskTrainConfig(epochs=10, batch_size=64),
            task=TaskConfig(pooling="mean", blend="off"),
            search=SearchConfig(size=0),
            output=self.folder / f"run-{facts}",
        )
        return finetune(config, ONE).folder

    def predicted(self, run, output="predictions.parquet"):
        predict(
            PredictConfig(model=run, data=self.data, labels=self.labels, output=self.folder / output), ONE
        )
        return pq.read_table(self.folder / output)

    def auroc(self, table):
        rows = table["subject_id"].to_numpy()
        return auroc(table["predicted_boolean_probability"].to_numpy(), self.outcome[rows])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return SexMatters(tmp_path_factory.mktemp("facts"))


@pytest.mark.slow
def test_an_outcome_that_depends_on_sex(records, capsys):
    run = records.finetuned(True)
    table, plain = records.predicted(run), records.predicted(records.finetuned(False), "plain.parquet")
    found, without = records.auroc(table), records.auroc(plain)
    with capsys.disabled():
        print(
            f"\nAUROC with facts {found:.3f} (optimum {records.optimum:.3f}), without {without:.3f} "
            f"(optimum {records.optimum_without:.3f})"
        )
    assert records.optimum > records.optimum_without + 0.1
    assert found > records.optimum - 0.02
    assert without < records.optimum_without + 0.03

    # The rows of facts come after those of codes, and whatever reads the run knows them.
    names = Vocabulary.read(run / "vocabulary.parquet").codes
    whole = read_prepared(records.data)
    assert names == (*whole.vocabulary.codes, *names[-5:])
    assert sorted(names[-5:]) == ["GENDER//F", "GENDER//M", "RACE//0", "RACE//1", "RACE//2"]

    # Baselines on counts see the facts, too, and there are groups of them.
    paths = {"predictions": records.folder / "predictions.parquet", "output": records.folder / "evaluation"}
    record = evaluate(EvaluateConfig(**paths, draws=20))
    scores = {row["name"]: row["figures"]["auroc"]["value"] for row in record["baselines"]}
    assert scores["logistic regression"] > records.optimum - 0.05
    assert {"sex", "race", "age"} == record["groups"].keys()
    assert {group["group"] for group in record["groups"]["sex"]} == {"F", "M", "unknown"}

    # A patient's events, of whom the facts are rows without a time, give what prepared data give.
    loaded = load(run, devices=ONE)
    probability = dict(
        zip(table["subject_id"].to_pylist(), table["predicted_boolean_probability"].to_pylist(), strict=True)
    )
    for subject in records.splits["held_out"][:3].tolist():
        events = patient(records.rows, subject)
        one = loaded.predict(events, time=moment(TIME))
        assert one.predicted[0] == pytest.approx(probability[subject], abs=1e-5)
        without_sex = [event for event in events if not event["code"].startswith("GENDER")]
        other = loaded.predict(without_sex, time=moment(TIME)).predicted[0]
        sexed = len(without_sex) < len(events)
        assert (abs(other - probability[subject]) > 1e-3) == sexed

    # The exported program reads facts as tokens in visit -1.
    rows = loaded.batch(records.data, labels=records.labels, limit=5)
    assert (rows.visits == -1).sum(axis=1).tolist() == [
        sum(event["time"] is None for event in patient(records.rows, subject))
        for subject in records.splits["held_out"][:5].tolist()
    ]
    exported = records.folder / "exported"
    export(ExportConfig(run=run, output=exported, stablehlo=True))
    program = jax_export.deserialize(bytearray((exported / PROGRAM_FILE).read_bytes()))
    inputs = [np.asarray(column)[:, 1:] for column in (rows.codes, rows.ages, rows.visits)]
    np.testing.assert_allclose(
        np.asarray(program.call(*inputs))[:, 0],
        [probability[subject] for subject in records.splits["held_out"][:5].tolist()],
        atol=1e-5,
    )


def moment(micros):
    return datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None) + timedelta(microseconds=micros)


def patient(rows, subject):
    return [
        {"time": None if row.time is None else moment(row.time), "code": row.code}
        for row in rows
        if row.subject == subject
    ]


@pytest.mark.slow
def test_eight_devices_that_gather_facts_train_as_one_that_is_fed(tmp_path):
    losses = {}
    for name, devices in (("no", ONE), ("yes", jax.devices())):
        config = changed(
            replace(SMALL_RUN, output=tmp_path / name), "train", max_steps=6, data_on_device=name
        )
        config = changed(config, "model", fact_tokens=True, cls_token=True)
        folder = pretrain(config, devices).folder
        losses[name] = [line["loss"] for line in read_metrics(folder / METRICS_FILE)]
    assert len(losses["no"]) >= 3
    np.testing.assert_allclose(losses["no"], losses["yes"], rtol=1e-4)


def test_facts_are_asked_for_where_there_are_none(records, tmp_path):
    rows = [row for row in records.rows if row.time is not None]
    source = MemorySource([[events_table(rows, visits=False)]], records.splits)
    prepare(source, PrepareConfig(output=tmp_path / "plain", codes=("CODE",)), lambda *_: None)
    config = PretrainConfig(
        model=tiny_model(fact_tokens=True),
        data=DataConfig(source="prepared", path=tmp_path / "plain"),
        output=tmp_path / "run",
    )
    with pytest.raises(InputError, match="no subject of the train split has a static fact"):
        pretrain(config, ONE)
    with pytest.raises(InputError, match="leaves a sequence 2 codes, but a subject has 2 static facts"):
        pretrain(replace(config, data=replace(config.data, path=records.data, max_length=2)), ONE)
