"""A trained model into a folder that can be passed on, with a model card and, if asked, as a program."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from behrt_jax.adapters.files import import_safetensors
from behrt_jax.config.commands import ExportConfig
from behrt_jax.config.data import DataConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.facts import FACT_VISIT
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.tasks import Predicts, Task
from behrt_jax.data.vocabulary import CLS, PAD, SPECIAL_TOKENS, Vocabulary
from behrt_jax.diagnosis.finding import RunRecord, read_run
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, check_new_folder, from_stored, read_json
from behrt_jax.models.attention import CHUNKED_FROM
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import CONFIG_FILE, read_config, shown_files
from behrt_jax.tracking.console import open_console
from behrt_jax.tracking.model_card import Card, model_card
from behrt_jax.training.devices import Devices
from behrt_jax.training.pretrained import stored_settings
from behrt_jax.weights.code_vectors import learnt_vectors, vector_files
from behrt_jax.weights.portable import (
    NEW_CODES,
    Beside,
    PortableConfig,
    is_portable,
    open_portable,
    write_model,
)
from behrt_jax.weights.torch_behrt import to_state_dict
from behrt_jax.workflows.evaluate import FIGURES_FILE
from behrt_jax.workflows.finetuned import read_task
from behrt_jax.workflows.loaded import Loaded, load

PROGRAM_FILE = "predict.stablehlo"
TORCH_FILE = "model_torch.safetensors"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
OF_TASK = ("task", "pooling", "max_length", "calibration", "blend", "freezing", "parameters")
"""What an export keeps of task.json: all but paths, and what its config.json has by itself."""


def export(config: ExportConfig, devices: Devices | None = None) -> PortableConfig:
    """Write ``config.output``, whole or not at all.

    Returns:
        Content of its config.json.

    Raises:
        InputError: a missing option, an output with other files, a model that cannot be read or cannot be
            exported as one: a population of several members.
    """
    run, output = _checked(config)
    evaluation = None if config.evaluation is None else _evaluation(config.evaluation, run)
    with open_console() as console:
        loaded = load(run, config.base, devices)
        params = loaded.params  # or this is no single model
        task = read_task(run) if loaded.finetuned else None
        beside = _beside(run, loaded) if config.adapters == "beside" else None
        told = _told(run)
        vocabulary, rare = without_rare_counts(run, task, loaded.vocabulary, config.min_subjects)
        files = {PROGRAM_FILE: program(loaded)} if config.stablehlo else {}
        if config.format == "torch":
            own = params if beside is None else loaded.variables["params"]
            if loaded.objective == "queries":
                raise InputError("--format torch: the model has no masked-code head: leave it out.")
            theirs = {name: part for name, part in own.items() if name not in (NEW_CODES, "query_head")}
            named = to_state_dict(loaded.config, theirs)
            files[TORCH_FILE] = import_safetensors().save(named, {"format": "pt"})
        files |= vector_files(learnt_vectors(params, loaded.vocabulary)) if config.vectors else {}
        exported = open_portable(run).config if is_portable(run) else None
        fingerprint = exported.data_fingerprint if exported else told.record.data.get("fingerprint")
        step = exported.step if exported else told.record.summary.get("best_step") or loaded.step
        card = Card(
            name=output.name,
            licence=config.licence,
            model=loaded.config.resolved(),
            task=loaded.finetuned and loaded.finetuned.task,
            vocabulary=vocabulary,
            least=config.min_subjects,
            rare_codes=rare.codes,
            counts_subjects=rare.by_subjects,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            beside=beside is not None,
            source=loaded.preparation and loaded.preparation.source,
            fingerprint=fingerprint,
            settings=told.record.settings,
            chosen=told.chosen,
            data=told.record.data,
            summary=dict(told.record.summary),
            evaluation=evaluation,
            program=use_of_program(loaded) if config.stablehlo else "",
            objective=loaded.objective,
        )
        written = write_model(
            output,
            loaded.config,
            vocabulary,
            loaded.preparation,
            params if beside is None else loaded.variables["params"],
            task=task and {name: task[name] for name in OF_TASK},
            objective=loaded.objective,
            queries=None if loaded.objective == "mlm" else loaded.queries,
            beside=beside,
            step=step,
            data_fingerprint=fingerprint,
            card=model_card(card),
            files=files,
        )
        if rare.codes:
            basis = "train subjects" if rare.by_subjects else "train events (subjects are not known)"
            console.log(f"{rare.codes:,} codes of fewer than {config.min_subjects} {basis}: counts left out.")
        console.log(f"Written to {output}: {', '.join(shown_files(output))}")
    return written


def _checked(config: ExportConfig) -> tuple[Path, Path]:
    """Run and output."""
    if config.run is None:
        raise InputError("--run is missing: give the folder of a run, as behrt-jax export RUN --output DIR.")
    if config.output is None:
        raise InputError("--output is missing: give a folder to write.")
    if config.min_subjects < 1:
        raise InputError(f"--min_subjects is {config.min_subjects}: give 1 or more.")
    if not config.licence.strip() or "\n" in config.licence:
        raise InputError("--licence is empty: give a name such as apache-2.0, or leave it out.")
    if config.stablehlo and find_spec("flatbuffers") is None:
        raise InputError(
            "--stablehlo needs the package flatbuffers, in whose form jax.export writes: pip install "
            "flatbuffers."
        )
    check_new_folder(config.output, "--output")
    return config.run, config.output


def _beside(run: Path, loaded: Loaded) -> Beside:
    """The adapters of a model, and what was trained with them."""
    adapters = loaded.setup.predictor.lora
    if adapters is None:
        raise InputError(f"--adapters beside: {run} has no adapters: leave it out.")
    if is_portable(run) or (loaded.finetuned is None and not (run / CONFIG_FILE).is_file()):
        raise InputError(f"--adapters beside: {run} does not tell what was trained: give the run itself.")
    return Beside(adapters, loaded.variables["lora"], loaded.setup.mask["params"])


# What a run tells beside its model.


class _Told(NamedTuple):
    record: RunRecord
    """Empty where there is no run."""
    chosen: JsonObject
    """Settings that a search chose."""


def _told(run: Path) -> _Told:
    if is_portable(run) or not (run / CONFIG_FILE).is_file():
        return _Told(RunRecord(), {})
    chosen = dict(read_config(run).get("facts", {}).get("chosen") or {})
    return _Told(read_run(run), chosen if chosen.pop("tried", None) else {})


def _evaluation(folder: Path, run: Path) -> JsonObject:
    """What evaluate found of predictions of this model."""
    record = read_json(folder / FIGURES_FILE)
    if not isinstance(record, dict) or not {"task", "model", "counts"} <= record.keys():
        raise InputError(f"--evaluation: {folder / FIGURES_FILE} is not what evaluate writes.")
    if Path(record["task"].get("model") or "").resolve() != run.resolve():
        raise InputError(
            f"--evaluation: {folder} is about predictions of {record['task'].get('model')}, not of {run}: "
            "evaluate those of this model."
        )
    return record


class Rare(NamedTuple):
    """Codes whose counts are left out."""

    codes: int
    by_subjects: bool
    """Train subjects were counted; otherwise events, which are as many or more."""


def without_rare_counts(
    run: Path, task: JsonObject | None, vocabulary: Vocabulary, least: int
) -> tuple[Vocabulary, Rare]:
    """The vocabulary with a count of 0 for each code that fewer than `least` train subjects have.

    Subjects are counted where the data of the pretraining run are at hand, and still those that its
    vocabulary was made of. Names stay: the model reads these codes as it has learned them.
    """
    events = vocabulary.counts
    subjects = _carriers(run if task is None else Path(task.get("base") or run), vocabulary)
    known = events.copy() if subjects is None else np.append(subjects, events[len(subjects) :])
    rare = (known < least) & (events > 0)
    rare[: len(SPECIAL_TOKENS)] = False
    found = replace(vocabulary, counts=np.where(rare, 0, events))
    return found, Rare(int(rare.sum()), subjects is not None)


def _carriers(run: Path, vocabulary: Vocabulary) -> np.ndarray | None:
    """Train subjects that have each code, int64 ``[V of the run]``; None where the data are not at hand."""
    if is_portable(run) or not (run / CONFIG_FILE).is_file():
        return None
    stored = stored_settings(run)
    data, facts = stored["data"], stored["model"].get("fact_tokens", False)
    if not isinstance(data, dict) or data["source"] == "meds":  # the latter would be prepared anew
        return None
    try:
        path = data["path"] and Path(data["path"])
        found = load_sequences(replace(from_stored(DataConfig, data), path=path), False, facts)
    except InputError:
        return None
    size = len(found.vocabulary)
    same = found.vocabulary.codes == vocabulary.codes[:size]
    if not same or not np.array_equal(found.vocabulary.counts, vocabulary.counts[:size]):
        return None
    return subjects_by_code(found.splits["train"], size)


def subjects_by_code(part: Sequences, size: int) -> np.ndarray:
    """Subjects that have each of `size` codes, int64 ``[size]``, as events or static facts."""
    found = np.zeros(size, np.int64)
    if part.facts is not None:
        found += np.bincount(part.facts.codes, minlength=size)
    for start in range(0, len(part), 1 << 16):
        offsets = part.offsets[start : start + (1 << 16) + 1]
        subjects = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        pairs = np.unique(subjects * size + part.codes[offsets[0] : offsets[-1]])
        found += np.bincount(pairs % size, minlength=size)
    return found


# A program that runs where only jax and flatbuffers (the form in which jax.export writes) are installed.


def predicted(predicts: Predicts, task: Task, outputs: jax.Array, temperature: float) -> jax.Array:
    """What a task's outputs say, as `data.tasks.Kind.predictions` has it, in a jitted program: float32
    `[examples, outputs]`, numbers in the unit of the labels.
    """
    outputs = outputs / temperature
    if predicts == "class":
        return jax.nn.softmax(outputs, axis=-1)
    if predicts == "number":
        return outputs * task.deviation + task.mean
    if predicts == "survival curve":
        return jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(-outputs), axis=-1))
    return jax.nn.sigmoid(outputs)


def program(loaded: Loaded) -> bytes:
    """The model as StableHLO (`jax.export`), its parameters in it, for any number of histories at once.

    From ``codes`` int32, ``ages`` float32, ``visits`` int32 and, where the model reads it, ``days`` int32,
    `[batch, length]` each, to predictions (calibrated) of a fine-tuned model or mean vectors of a pretrained
    one, float32. A history is a row, its static facts, which are in visit -1, then its events oldest first,
    then padding of code 0; a model that reads [CLS] puts it in front by itself.

    Raises:
        InputError: predictions that are blended with those of a count model.
    """
    finetuned, params = loaded.finetuned, loaded.params
    if finetuned is not None and finetuned.blend is not None:
        raise InputError(
            "--stablehlo: this model's predictions are blended with those of a count model, which is not in "
            "the program: leave it out, or fine-tune with --task.blend off."
        )
    # What a machine is best at is not asked for: the program runs on any.
    form = "dense" if loaded.max_length < CHUNKED_FROM else "chunked"
    config = replace(loaded.model.config, attention=form, rematerialise=False)
    pooled = PatientEmbedding(config, len(loaded.vocabulary), "mean")
    network = pooled if finetuned is None else loaded.model.clone(config=config)
    used = {"behrt": params["behrt"]} if finetuned is None else params

    def predict(
        codes: jax.Array, ages: jax.Array, visits: jax.Array, days: jax.Array | None = None
    ) -> jax.Array:
        days = jnp.zeros_like(visits) if days is None else days
        if config.cls_token:
            first = jnp.full_like(codes[:, :1], CLS)
            codes = jnp.concatenate([first, codes], axis=1)
            event = jnp.argmax(visits > FACT_VISIT, axis=1, keepdims=True)  # the first
            ages, visits, days = (
                jnp.concatenate([jnp.take_along_axis(x, event, axis=1), x], axis=1)
                for x in (ages, visits, days)
            )
        segments = (codes != PAD).astype(jnp.int32)
        positions = jnp.arange(codes.shape[1], dtype=jnp.int32)[None, :] * segments
        rows: list[Any] = [codes, ages, visits, days, positions, segments, jnp.zeros_like(codes[:, 0])]
        batch = Batch(*rows)
        found = jnp.asarray(network.apply({"params": used}, batch, 1))[:, 0]
        if finetuned is None:
            return found  # [B, D]
        task = finetuned.task
        return predicted(task.of.predicts, task, found, finetuned.calibration.temperature)  # [B, O]

    from jax import export as jax_export

    (batch,) = jax_export.symbolic_shape("batch")
    shape = batch, loaded.max_length - config.cls_token
    dtypes = (jnp.int32, jnp.float32, jnp.int32, *[jnp.int32] * config.reads_days)
    given = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
    return bytes(jax_export.export(jax.jit(predict), platforms=PLATFORMS)(*given).serialize())


def use_of_program(loaded: Loaded) -> str:
    """How a program of :func:`program` is called, in Markdown."""
    length = loaded.max_length - loaded.config.cls_token
    kinds = ("int32", "float32", *["int32"] * (1 + loaded.config.reads_days))
    result = f"vectors, float32 [batch, {loaded.config.hidden_size}]: the mean over each history"
    if loaded.finetuned is not None:
        task = loaded.finetuned.task
        names = {
            "probability": "the calibrated probability of yes",
            "class": "the calibrated probability of each class",
            "codes": "the calibrated probability of each code",
            "number": "the number, in the unit of the labels",
            "survival curve": "the probability of no event up to the end of each interval",
        }
        result = f"float32 [batch, {task.outputs}]: {names[task.of.predicts]}"
    third, days = "visits", ""
    if loaded.config.reads_days:
        third, days = "visits, days", " `days` are whole days from 1970-01-01 to the event."
    facts = ""
    if loaded.config.fact_tokens:
        facts = (
            " Facts that do not change (sex, ...) stand before the events of each row, with visit -1 and the "
            f"age and day of the first event; facts and events are {length} at most."
        )
    separators = " Each visit ends with the code 4 ([SEP])." if loaded.config.sep_token else ""
    return f"""`{PROGRAM_FILE}` is the model as a program for which `pip install jax flatbuffers` is enough:

```python
import jax.export, numpy as np

program = jax.export.deserialize(open("{PROGRAM_FILE}", "rb").read())
codes, ages, {third} = (np.zeros((2, {length}), kind) for kind in {kinds})
codes[0, :2], ages[0, :2], visits[0, :2] = [5, 6], [61.2, 61.9], [0, 1]  # a history, oldest event first
codes[1, :1], ages[1, :1] = [7], [35.0]  # another; the rest of each row stays 0
print(program.call(codes, ages, {third}))
```

`codes` are ids of vocabulary.parquet (2 for a code that is not in it), `ages` years at the event, `visits`
the number of the visit in the whole history, from 0; of a longer history the {length} most recent events are
given.{days}{facts}{separators} A history without an event is one event of code 2 at the present age. The
result is {result}.
"""
