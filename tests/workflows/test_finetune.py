"""Fine-tuning as a whole: what each regime leaves behind, resuming, and wrong input."""

import json
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import main
from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.training import PopulationConfig, SearchConfig, TaskConfig, TrackingConfig
from behrt_jax.data.labels import read_labels
from behrt_jax.data.prepared import read_prepared
from behrt_jax.errors import InputError
from behrt_jax.evaluation.task_baselines import count_codes
from behrt_jax.tracking.console import Console
from behrt_jax.training.checkpoints import open_checkpoints
from behrt_jax.training.devices import make_mesh
from behrt_jax.training.loop import Schedule
from behrt_jax.training.validation import make_output_step
from behrt_jax.workflows import population
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.finetune_run import CHOICE, blended, safest
from behrt_jax.workflows.finetuned import open_finetuned
from behrt_jax.workflows.labelled_data import batch_size, examples_of
from behrt_jax.workflows.predict import outputs_of
from behrt_jax.workflows.prediction_data import Histories
from tests.records.meds_folder import DAY
from tests.workflows.evaluated import FIRST_ID, TIME
from tests.workflows.finetune_case import ONE, changed


def read(folder, name):
    return json.loads((folder / name).read_text())


def records(folder, split=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "probe", "scratch"))]
)
def test_each_regime_learns_more_than_the_base_rate_and_leaves_the_whole_folder(case, name):
    folder = case.run("binary", name)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "parameters.json", "metrics.jsonl", "summary.json", "SUMMARY.txt", "checkpoints",
        "vocabulary.parquet", "preparation.json", "plots", "task.json", "files.json", "report.html",
        *(["adapter"] if name == "lora" else []),
    }  # fmt: skip
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "auroc.png"}
    assert "is below that of the base rate" in (folder / "report.html").read_text()
    summary, validation = read(folder, "summary.json"), records(folder, "tuning")
    base_rate = summary["baselines"]["base rate"]["loss"]
    assert 0.5 < base_rate < 0.75  # half of the labels are positive
    assert summary["best"]["loss"] == min(line["loss"] for line in validation)
    # A linear probe of an encoder that has hardly been trained finds less.
    assert summary["best"]["loss"] < base_rate - (0.02 if name == "probe" else 0.05)
    assert summary["best"]["auroc"] > (0.6 if name == "probe" else 0.75)
    assert "is below that of the base rate" in " ".join((folder / "SUMMARY.txt").read_text().split())
    assert {line["compilations"] for line in records(folder, "train")} == {1}
    task, parameters = read(folder, "task.json"), read(folder, "parameters.json")
    assert task["task"]["kind"] == "binary" and 0 < task["calibration"]["threshold"] < 1
    assert task["calibration"] == summary["calibration"]
    encoder = parameters["base"]["trainable"] + parameters["embedding"]["trainable"]
    assert (encoder > 0) == (name in ("full", "scratch"))
    assert (parameters["lora"]["trainable"] > 0) == (name == "lora")
    assert parameters["head"]["trainable"] == 16 + 1
    if name == "lora":
        files = {path.name for path in (folder / "adapter").iterdir()}
        rules = {"vocabulary.parquet", "preparation.json"}
        own = {"adapter_config.json", "adapter_model.safetensors", "behrt_jax.json"}
        assert files == {*own, "task.json", *rules}
        assert read(folder / "adapter", "task.json")["base"] == str(case.base)


@pytest.mark.slow
def test_the_frozen_encoder_is_that_of_the_base_bit_for_bit(case):
    import jax

    from behrt_jax.training.pretrained import open_pretrained, read_encoder

    mesh = make_mesh(ONE)
    base = jax.tree.map(np.asarray, read_encoder(open_pretrained(case.base), mesh).params)
    for name, same in (("lora", True), ("probe", True), ("full", False), ("scratch", False)):
        found = open_finetuned(case.run("binary", name), None, mesh).members[0]["params"]["behrt"]
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs) == same, name


def test_no_subject_id_is_written_or_said(case):
    folder = case.run()
    assert "Labels (binary)" in case.consoles["binary-lora"]
    start = str(FIRST_ID)[:6]
    assert start not in case.consoles["binary-lora"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert start.encode() not in path.read_bytes(), path


def final_trees(folder):
    """Step and latest checkpoint of a run, as flat numpy arrays."""
    import jax

    variables = open_finetuned(folder, None, make_mesh(ONE)).members[0]
    with open_checkpoints(folder / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        found = checkpoints.restore(step, params=variables["params"], lora=variables["lora"])
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves((found.params, found.lora))]


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(case, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, after a validation, then resumed."""
    whole, config = case.run(), replace(case.config(), output=tmp_path / "parts")
    original = Console.step
    at = read(whole, "summary.json")["steps"] // 2

    def stop(self, step, tokens, loss):
        original(self, step, tokens, loss)
        if step == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Console, "step", stop)
    first = finetune(config, ONE)
    assert first.exit_status == 128 + signal.SIGTERM
    assert first.summary["stop_reason"] == "interrupted by SIGTERM"
    assert first.summary["best_step"] is not None and (config.output / "adapter" / "task.json").is_file()
    monkeypatch.setattr(Console, "step", original)
    second = finetune(replace(config, resume=True), ONE)
    assert second.exit_status == 0

    (step, trees), (other_step, other_trees) = final_trees(whole), final_trees(config.output)
    assert step == other_step
    for ours, theirs in zip(trees, other_trees, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rates = {"steps_per_second", "tokens_per_second", "data_share", "device_share"}
    lines = [
        [{k: v for k, v in line.items() if k not in rates} for line in records(folder)]
        for folder in (whole, config.output)
    ]
    assert lines[0] == lines[1]
    # The adapter is that of the whole run, not of the half.
    for name in ("adapter_model.safetensors", "task.json"):
        assert (config.output / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), (
            name
        )

    with pytest.raises(InputError, match=r"lora\.rank is 3, but the run in .* was made with 2"):
        finetune(replace(changed(config, "lora", rank=3), resume=True), ONE)
    other = tmp_path / "labels.parquet"
    table = pq.read_table(config.labels)
    flipped = pa.array([not value for value in table["boolean_value"].to_pylist()])
    pq.write_table(table.set_column(2, "boolean_value", flipped), other)
    with pytest.raises(InputError, match="the data, or its labels, differ"):
        finetune(replace(config, labels=other, resume=True), ONE)


def labels_with(case, path, change):
    """A label table: that of the case, changed."""
    pq.write_table(change(pq.read_table(case.labelled("binary").labels)), path)
    return path


def of_splits(case, *names):
    ids = pa.array(np.concatenate([case.labelled("binary").splits[name] for name in names]))

    def change(table):
        import pyarrow.compute as pc

        return table.filter(pc.call_function("is_in", [table["subject_id"]], pc.SetLookupOptions(ids)))

    return change


def replaced(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def wrong_labels(case):
    """Change of the label table -> what is said."""

    def unknown(table):
        return replaced(table, "subject_id", pa.array(np.arange(len(table))))

    def early(table):
        train = of_splits(case, "train")(table)
        # Three rows, two of which are of one subject: a label that comes twice.
        times = pa.array([TIME - 200 * 365 * DAY] * 3, pa.timestamp("us"))
        return pa.concat_tables([table, replaced(train.slice(0, 3), "prediction_time", times)])

    def conflicting(table):
        first = table.slice(0, 2)
        other = pa.array([not value for value in first["boolean_value"].to_pylist()])
        return pa.concat_tables([table, replaced(first, "boolean_value", other)])

    def mixed(table):
        numbers = pa.array([1.0] + [None] * (len(table) - 1), pa.float64())
        flags = pa.array([None, *table["boolean_value"].to_pylist()[1:]])
        return replaced(table, "boolean_value", flags).append_column("float_value", numbers)

    return {
        "unknown": (unknown, r"none of the train split \(300 of 300 labels are of subjects that the data"),
        "no tuning": (of_splits(case, "train"), r"none of the tuning split .* choose the best epoch"),
        "before birth": (early, "2 of 186 labels of train have a prediction time before the subject's birth"),
        "conflicting": (conflicting, "2 pairs of subject and prediction time with labels that differ"),
        "mixed": (mixed, "mixes types of labels, 299 in boolean_value and 1 in float_value"),
    }


@pytest.mark.parametrize("which", ["unknown", "no tuning", "before birth", "conflicting", "mixed"])
def test_wrong_labels_are_one_clear_error_before_anything_is_written(case, tmp_path, which):
    change, message = wrong_labels(case)[which]
    labels, output = labels_with(case, tmp_path / "labels.parquet", change), tmp_path / "run"
    with pytest.raises(InputError, match=message):
        finetune(replace(case.config(), labels=labels, output=output), ONE)
    assert not output.exists()


def test_some_unknown_subjects_repeated_labels_and_those_before_birth_are_counted(case, tmp_path):
    def change(table):
        strangers = replaced(table.slice(0, 7), "subject_id", pa.array(np.arange(7)))
        times = pa.array([TIME - 200 * 365 * DAY] * 2, pa.timestamp("us"))
        train = of_splits(case, "train")(table).slice(0, 1)
        tuning = of_splits(case, "tuning")(table).slice(0, 1)
        early = replaced(pa.concat_tables([train, tuning]), "prediction_time", times)
        return pa.concat_tables([table, strangers, table.slice(0, 4), early])

    labels = labels_with(case, tmp_path / "labels.parquet", change)
    config = changed(replace(case.config(), labels=labels, output=tmp_path / "run"), "train", max_steps=1)
    config = changed(config, "task", outside_life="leave_out")
    counts = finetune(config, ONE).summary["data"]
    assert (counts["labels"], counts["duplicate_labels"], counts["labels_of_unknown_subjects"]) == (309, 4, 7)
    assert (counts["labels_before_birth"], counts["labels_after_death"]) == (2, 0)


@pytest.mark.slow
def test_one_class_alone_is_no_crash(case, tmp_path):
    def change(table):
        return replaced(table, "boolean_value", pa.array([True] * len(table)))

    labels = labels_with(case, tmp_path / "labels.parquet", change)
    config = changed(replace(case.config(), labels=labels, output=tmp_path / "run"), "train", max_steps=1)
    summary = finetune(config, ONE).summary
    assert summary["best"]["auroc"] is None and summary["calibration"]["threshold"] == 0.5


def test_wrong_settings_are_one_clear_error_before_anything_is_written(case, tmp_path):
    config = replace(case.config(), output=tmp_path / "run")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert config.init is not None
    empty = tmp_path / "empty"
    shutil.copytree(config.init, empty, ignore=shutil.ignore_patterns("checkpoints"))
    cases = {
        # Before labels are read: they are not there either.
        r"--init: .*empty has no checkpoint": replace(config, init=empty, labels=nothing),
        r"--init is missing": replace(config, init=None),
        r"--init: .*nothing holds no finished run": replace(config, init=nothing),
        r"--init: .* is no run of pretraining": replace(config, init=case.run()),
        r"--data is missing": replace(config, data=None),
        r"--labels is missing": replace(config, labels=None),
        r"task\.pooling is cls, but the pretrained model reads no \[CLS\]": changed(
            config, "task", pooling="cls"
        ),
        r"task\.label_fraction is 0:": changed(config, "task", label_fraction=0.0),
        r"task\.label_fraction is 1\.5:": changed(config, "task", label_fraction=1.5),
        r"task\.max_length is 25, but the model has 24 positions": changed(config, "task", max_length=25),
        r"task\.threshold is 2\.0:": changed(config, "task", threshold=2.0),
        r"train\.batch_size is 0:": changed(config, "train", batch_size=0),
        r"optimizer\.learning_rate is 0": changed(config, "optimizer", learning_rate=0.0),
        r"dropout is 1\.0:": replace(config, dropout=1.0),
        r"--from_scratch leaves encoder": replace(config, from_scratch=True),
    }
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            finetune(wrong, ONE)
    assert not (tmp_path / "run").exists()
    before = {path: path.read_bytes() for path in case.run().iterdir() if path.is_file()}
    with pytest.raises(InputError, match="holds a run already"):
        finetune(replace(config, output=case.run()), ONE)
    assert before == {path: path.read_bytes() for path in case.run().iterdir() if path.is_file()}


# What the run chooses by itself, and the count model beside it.


def test_a_search_chooses_on_tuning_and_a_resumed_run_keeps_to_it(case, tmp_path, monkeypatch):
    config = replace(
        changed(case.config(), "train", epochs=1, max_steps=2),
        task=TaskConfig(),
        search=SearchConfig(size=5, labels=40),
        output=tmp_path / "run",
    )
    finetune(config, ONE)
    chosen = read(tmp_path / "run", "config.json")["facts"]["chosen"]
    tried = chosen["tried"]
    assert [one["pooling"] for one in tried] == ["mean", "max", "last", "attention", "mean"]
    assert [one["rank"] for one in tried] == [2, 2, 2, 2, 2]
    assert [one["embeddings"] for one in tried] == [True] * 4 + [False]
    best = min(tried, key=lambda one: one["loss"])
    assert {name: best[name] for name in CHOICE} == {name: chosen[name] for name in CHOICE}
    trained = read(tmp_path / "run", "parameters.json")["embedding"]["trainable"]
    assert (trained > 0) == chosen["embeddings"]
    task = read(tmp_path / "run", "task.json")
    assert (task["pooling"], task["lora"]["rank"]) == (chosen["pooling"], chosen["rank"])
    assert read(tmp_path / "run", "config.json")["settings"]["task"]["pooling"] == "auto"
    monkeypatch.setattr(population, "search", None)  # it is not made again
    finetune(changed(replace(config, resume=True), "train", epochs=1, max_steps=3), ONE)
    assert read(tmp_path / "run", "config.json")["facts"]["chosen"] == chosen
    assert read(tmp_path / "run", "task.json")["pooling"] == chosen["pooling"]


def test_predictions_are_blended_with_a_count_model(case, tmp_path):
    config = changed(changed(case.config(), "task", blend="counts", pooling="attention"), "train", epochs=1)
    finetune(replace(config, output=tmp_path / "run"), ONE)
    summary, task = read(tmp_path / "run", "summary.json"), read(tmp_path / "run", "task.json")
    counts, blend = summary["baselines"]["count model"], summary["blend"]
    assert 0 < task["blend"]["share"] == blend["share"] <= 1  # an encoder that has hardly been trained
    assert blend["loss"] < max(counts["loss"], summary["best"]["loss"])
    assert summary["gaps"]["count model"]["nats"] == pytest.approx(summary["best"]["loss"] - counts["loss"])
    whole = case.predicted(tmp_path / "a.parquet", model=tmp_path / "run", split="tuning")
    from_adapter = case.predicted(tmp_path / "b.parquet", model=tmp_path / "run" / "adapter", split="tuning")
    name = "predicted_boolean_probability"
    np.testing.assert_allclose(whole[name], from_adapter[name], rtol=1e-5)
    # They are what the two say alone, weighed by the share.
    mesh = make_mesh(ONE)
    found, data = open_finetuned(tmp_path / "run", None, mesh), read_prepared(case.data)
    labels = read_labels(config.labels)
    labels = labels.take(np.isin(labels.subject_ids, data.splits["tuning"].subject_ids))
    step, options = jax.jit(make_output_step(found.setup.predictor)), PredictConfig()
    histories = Histories(data, {"tuning": labels}, ())
    alone = next(outputs_of(step, options, found._replace(blend=None), histories, mesh))[1]
    examples = examples_of(data, "tuning", labels, found.model, found.max_length, ())
    assert found.blend is not None
    count_model, share = found.blend
    odds = blended(alone, count_model.outputs(count_codes(examples, len(found.vocabulary))), share)
    known = 1 / (1 + np.exp(-odds[0, :, 0] / task["calibration"]["temperature"]))
    np.testing.assert_allclose(whole[name].to_numpy(), known, rtol=1e-5)


def test_where_few_labels_cannot_tell_the_simpler_model_is_taken():
    rng = np.random.default_rng(0)
    best = rng.normal(size=400)
    noise = [best + 0.01, best, best + 0.02 + rng.normal(size=400), best + 0.5 + 0.1 * rng.normal(size=400)]
    subjects = np.arange(400)
    assert safest(noise, subjects) == 2  # 0.02 is within 1 / 20, and 0.5 beyond 0.1 / 20
    assert safest([one[:3] for one in noise[:2]], subjects[:3]) == 1


def test_a_blend_is_for_tasks_of_yes_or_no(case, tmp_path):
    config = changed(case.config("regression"), "task", blend="counts")
    with pytest.raises(InputError, match="blend is counts, which is for one task of yes or no"):
        finetune(replace(config, output=tmp_path / "run"), ONE)
    assert not (tmp_path / "run").exists()


def test_steps_and_batch_follow_the_number_of_labels(case):
    config = changed(case.config(), "train", epochs=None, batch_size=None)
    assert [batch_size(config, n) for n in (50, 1000, 10_000)] == [16, 62, 128]
    schedules = [Schedule.of(config.train, steps) for steps in (13, 79)]
    assert [(one.total_steps, one.validate_every) for one in schedules] == [(806, 40), (1580, 79)]


def test_the_doctor_examines_a_finetuning_run(case, capsys):
    folder = case.run()
    stored = read(folder, "summary.json")["findings"]
    ids = [finding["id"] for finding in stored]
    assert {"few-labels", "mean-pooling"} <= set(ids)
    assert all(finding["id"] in (folder / "SUMMARY.txt").read_text() for finding in stored)
    capsys.readouterr()
    assert main(["doctor", "--run", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ids)
    assert "--data." not in shown and "--model." not in shown and "--init.run" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_trackers_get_the_lines_of_metrics(case, size, tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(
        changed(case.config(), "train", epochs=2),
        output=tmp_path / "run",
        tracking=TrackingConfig(tensorboard=True),
        population=PopulationConfig(size=size),
    )
    folder = finetune(config, ONE).folder
    read_back = accumulator.EventAccumulator(str(folder / "tensorboard"))
    read_back.Reload()
    lines = records(folder, "tuning")
    assert len(lines) == 2
    found = read_back.Scalars("tuning/loss")
    assert [(event.step, event.value) for event in found] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines
    ]
    if size > 1:
        last = [read_back.Scalars(f"tuning/members/{k}/loss")[-1].value for k in range(size)]
        assert last == pytest.approx([member["loss"] for member in lines[-1]["members"]], rel=1e-6)
    assert "Curves" in (folder / "report.html").read_text()
