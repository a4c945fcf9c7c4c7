"""A model in memory, from whatever holds one: for notebooks, services, and all that is no command.

:func:`load` (``behrt_jax.load``) opens a finished run of pretraining or fine-tuning, an adapter with its
base, or an exported folder. No folders are read or written after that, but for data that are given as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from behrt_jax.adapters import lora
from behrt_jax.adapters.files import CONFIG_FILE as ADAPTER_FILE
from behrt_jax.adapters.files import load_adapter, read_config
from behrt_jax.config.commands import PredictConfig
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.config.training import ObjectiveName, PretrainConfig, QueriesConfig
from behrt_jax.data.batches import Batch, RowShape, task_batches
from behrt_jax.data.event_rules import Preparation
from behrt_jax.data.events import BIRTH_CODE, EventCounts
from behrt_jax.data.labels import Labels, read_labels
from behrt_jax.data.prepared import read_preparation, read_rules
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.data.vocabulary import Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.evaluation.calibration import mean_predictions
from behrt_jax.files import JsonObject, from_stored
from behrt_jax.models.attention import segment_mask
from behrt_jax.models.behrt import (
    BEHRT,
    BEHRTForMLM,
    BEHRTForTask,
    PatientEmbedding,
    Pooling,
    head_rotations,
)
from behrt_jax.models.layers import rotate
from behrt_jax.models.questions import BEHRTForQueries
from behrt_jax.models.stacked_layers import Tree, layer_name, unstack_layers
from behrt_jax.records.patient import Events, encode_events, event_rows
from behrt_jax.training.devices import Devices, make_mesh, replicated, replicated_shapes
from behrt_jax.training.pretrained import (
    Pretrained,
    Weights,
    open_pretrained,
    read_weights_of,
    stored_settings,
)
from behrt_jax.training.runtime import use_compilation_cache
from behrt_jax.training.state import Setup, set_up
from behrt_jax.training.step import Variables, with_new_rows
from behrt_jax.training.validation import OutputStep, make_embedding_step, make_output_step, score
from behrt_jax.weights.portable import is_portable
from behrt_jax.workflows.checks import check_days
from behrt_jax.workflows.finetuned import Finetuned, is_finetuned, open_finetuned
from behrt_jax.workflows.labelled_data import check_codes, examples_of, in_vocabulary, read_data
from behrt_jax.workflows.predict import outputs_of
from behrt_jax.workflows.prediction_data import Histories, last_events, pieces_of

Prepared: TypeAlias = SequenceSet | Path | str
"""A prepared data set, opened (without separators) or its folder."""


class PatientPrediction(NamedTuple):
    """The prediction for one patient."""

    predicted: np.ndarray
    """float64 ``[outputs]``: binary, the probability of a positive label, alone; else as in files of
    predictions, such as the probability of each class."""
    time: int
    """Prediction time, microseconds since 1970."""
    codes: JsonObject
    """What `labelled_data.check_codes` found: the share of events that the model does not know, ..."""
    events: EventCounts
    """Events given, and those that each rule of the preparation dropped or changed."""


class OfSubjects(NamedTuple):
    """What a model says of subjects of prepared data, one row an example."""

    subject_ids: np.ndarray
    """int64 ``[examples]``."""
    times: np.ndarray
    """int64 ``[examples]``, microseconds since 1970: what is known then was read."""
    values: np.ndarray
    """Predictions, float64 ``[examples, outputs]``, or vectors, float32 ``[examples, hidden]``."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory. What first runs is compiled first; then one patient takes the time of a row."""

    folder: Path
    setup: Setup
    variables: Variables
    """As they were trained, adapters apart; on the devices."""
    vocabulary: Vocabulary
    preparation: Preparation | None
    """Rules by which its data were prepared, where they are known."""
    mesh: Mesh
    step: int = 0
    """Of the checkpoint of a pretrained model."""
    finetuned: Finetuned | None = None
    """Of a fine-tuned model: task, calibration, members."""
    objective: ObjectiveName = "mlm"
    """What a pretrained model was trained for."""
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    """What questions a pretrained model was asked."""
    rows: int = 64
    """Rows that are computed at once of prepared data."""
    _steps: dict[str, OutputStep] = field(default_factory=dict, init=False, repr=False)

    @property
    def config(self) -> ModelConfig:
        """Settings of the model."""
        return self.setup.predictor.model.config

    @property
    def max_length(self) -> int:
        """Most tokens that are read of a history, [CLS] and [SEP] included."""
        own = None if self.finetuned is None else self.finetuned.max_length
        return own or self.config.positions

    @property
    def model(self) -> BEHRTForMLM | BEHRTForTask | BEHRTForQueries:
        """The Flax module of `params`, for ``model.apply({"params": params}, batch)``."""
        return self.setup.predictor.model.clone(config=replace(self.config, scan_layers=False))

    @cached_property
    def params(self) -> Tree:
        """Float32 parameters of `model`, layer by layer: adapters merged, rows of new codes in the table.

        Raises:
            InputError: an ensemble, which has several.
        """
        if self.finetuned is not None and len(self.finetuned.members) > 1:
            raise InputError(f"{self.folder} is an ensemble of several models: load one of its members/.")
        variables, adapters = with_new_rows(self.variables), self.setup.predictor.lora
        params = variables["params"]
        if adapters is not None:
            params = lora.merge(params, variables["lora"], adapters)
        return unstack_layers(params)

    def batch(
        self,
        data: Events | Prepared,
        *,
        time: datetime | None = None,
        split: str = "held_out",
        labels: Path | None = None,
        limit: int | None = 64,
    ) -> Batch:
        """Histories as `model` reads them, one a row, the most recent events of each.

        Args:
            data: events of a patient, or prepared data.
            time: of events: what is later is not read; the last of them where not given.
            split: of prepared data.
            labels: table of subjects and times to read, of prepared data; each subject at its last event
                where not given.
            limit: most rows, of prepared data; None for all.

        Returns:
            Arrays ``[rows, max_length]``, see `data.batches.Batch`; a history is segment 1, then padding.

        Raises:
            InputError: as :meth:`predict`, or no history.
        """
        found, _ = self._histories(data, time, split, labels)
        shape = RowShape(self.max_length, packed=False, cls_token=self.config.cls_token)
        ((split, wanted),) = found.labels.items()
        wanted = wanted.take(np.arange(len(wanted))[:limit])
        examples = examples_of(found.data, split, wanted, self.config, self.max_length, found.delays)
        if not len(examples):
            raise InputError(f"{split} has no history to read at the times given: give others.")
        targets = np.zeros((len(examples), 1), np.float32)
        batches = task_batches(examples, targets, shape, batch_size=len(examples), seed=None)
        drawn = batches.of_rows(len(examples)).batch(0)
        order = np.argsort(drawn.examples[:, 0])
        return Batch(*(column[order] for column in drawn.rows))

    @overload
    def predict(
        self, data: Events, time: datetime | None = None, max_unknown: float | None = None
    ) -> PatientPrediction: ...

    @overload
    def predict(
        self,
        data: Prepared,
        time: None = None,
        max_unknown: float | None = None,
        *,
        split: str = "held_out",
        labels: Path | None = None,
    ) -> OfSubjects: ...

    def predict(
        self,
        data: Events | Prepared,
        time: datetime | None = None,
        max_unknown: float | None = None,
        *,
        split: str = "held_out",
        labels: Path | None = None,
    ) -> PatientPrediction | OfSubjects:
        """Predict from the events of one patient, which are prepared as the model's own data were, or from
        prepared data.

        Args:
            data: either.
            time: of the prediction, inclusive; that of the last event that is kept where not given.
            max_unknown: as in `config.commands.PredictConfig`.
            split: of prepared data.
            labels: as in :meth:`batch`.

        Raises:
            InputError: a model without a task; columns that are missing or of other types, no birth, no event
                to predict at, or more unknown codes than allowed.
        """
        model = self.finetuned
        if model is None:
            raise InputError(f"{self.folder} is a pretrained model, which predicts no task: fine-tune it.")
        found, codes = self._histories(data, time, split, labels, max_unknown)
        one = isinstance(data, pa.Table | Sequence) and not isinstance(data, str)
        config = PredictConfig(rows=1 if one else self.rows)
        step = self._step("outputs", make_output_step(self.setup.predictor))
        parts, outputs = [], []
        for part, of_members, _, _ in outputs_of(step, config, model, found, self.mesh):
            parts.append(part)
            outputs.append(mean_predictions(model.task.kind, of_members, model.calibration.temperature))
        if not parts and one:
            raise InputError("time: it lies after the patient's death: give an earlier one.")
        if one:
            return PatientPrediction(outputs[0][0], int(parts[0].times[0]), codes, found.data.counts)
        return _of_subjects(parts, outputs, model.task.outputs, np.float64)

    def embed(
        self,
        data: Events | Prepared,
        time: datetime | None = None,
        *,
        pooling: Pooling | None = None,
        split: str = "held_out",
        labels: Path | None = None,
    ) -> np.ndarray | OfSubjects:
        """Vectors of histories: float32 ``[hidden]`` of a patient's events, or one for each example.

        Arguments and errors but for `pooling` as of :meth:`predict`; that of the task, or mean, where it is
        not given.
        """
        found, _ = self._histories(data, time, split, labels)
        own = self.setup.predictor.model
        how: Pooling = pooling or (own.pooling if isinstance(own, BEHRTForTask) else "mean")
        if how == "cls" and not self.config.cls_token:
            raise InputError("pooling is cls, but the model reads no [CLS] token: give mean, max or last.")
        network = PatientEmbedding(self.model.config, len(self.vocabulary), how)
        params = {name: self.params[name] for name in ("behrt", "pooling_head") if name in self.params}
        one = isinstance(data, pa.Table | Sequence) and not isinstance(data, str)
        config = PredictConfig(rows=1 if one else self.rows)
        step = self._step(how, make_embedding_step(network))
        parts, vectors = [], []
        for _, part, _, batches in pieces_of(config, self.config, self.max_length, found, self.mesh):
            parts.append(part)
            vectors.append(score(step, params, batches, self.mesh))
        if one:
            return vectors[0][0]
        return _of_subjects(parts, vectors, self.config.hidden_size, np.float32)

    def attention(self, data: Events | Batch, time: datetime | None = None) -> np.ndarray:
        """Attention weights of each layer and head, computed in float32.

        Args:
            data: events of one patient; or rows (:meth:`batch`), in which several subjects may stand.
            time: of events, as in :meth:`predict`.

        Returns:
            Of events float32 ``[layers, heads, length, length]``, length being the tokens that are read; of
            rows ``[rows, layers, heads, length, length]``. At ``[..., t, s]`` is how much token `t` takes of
            token `s`: each row sums to 1, and is zero between subjects and at padding.
        """
        if isinstance(data, Batch):
            return np.asarray(self._attention(self.params["behrt"], data))
        rows = self.batch(data, time=time)
        tokens = int((rows.segment_ids[0] > 0).sum())
        return np.asarray(self._attention(self.params["behrt"], rows)[0, :, :, :tokens, :tokens])

    @cached_property
    def _attention(self) -> Any:
        config = replace(self.model.config, attention="dense", compute_dtype="float32", rematerialise=False)
        return jax.jit(partial(attention_weights, BEHRT(config, len(self.vocabulary))))

    @cached_property
    def _rules(self) -> Preparation:
        return self.preparation or read_rules(self.folder, "folder")[1]

    def _step(self, name: str, step: OutputStep) -> OutputStep:
        """`step`, compiled once for each name."""
        return self._steps.setdefault(name, jax.jit(step))

    def _histories(
        self,
        data: Events | Prepared,
        time: datetime | None,
        split: str,
        labels: Path | None,
        max_unknown: float | None = None,
    ) -> tuple[Histories, JsonObject]:
        """Of one split; and what `labelled_data.check_codes` found."""
        if isinstance(data, SequenceSet | Path | str):
            if time is not None:
                raise InputError("time is of one patient's events: give labels with prepared data.")
            delays = data.preparation.delays if isinstance(data, SequenceSet) and data.preparation else ()
            if not isinstance(data, SequenceSet):
                data, delays = read_data(Path(data))
            if split not in data.splits:
                raise InputError(f"There is no split {split!r}: choose one of {', '.join(data.splits)}.")
            codes = check_codes(data, [split], self.vocabulary, self.preparation, max_unknown, self.folder)
            check_days(self.config, {split: data.splits[split]})
            data, _ = in_vocabulary(data, self.vocabulary, self.config)
            wanted = (
                last_events(data, [split]) if labels is None else read_labels(labels, without_values=True)
            )
            wanted = wanted.take(np.isin(wanted.subject_ids, data.subject_ids(split)))
            return Histories(data, {split: wanted}, delays), codes
        own = encode_events(event_rows(data), self.vocabulary, self._rules)
        split = "held_out"
        check_days(self.config, {split: own.splits[split]})
        codes = check_codes(own, [split], self.vocabulary, self._rules, max_unknown, self.folder)
        own = own.with_facts() if self.config.fact_tokens else own
        wanted = last_events(own, [split])
        if time is not None and len(known := own.subject_ids(split)):
            at = pa.scalar(time, pa.timestamp("us")).cast(pa.int64()).as_py()
            wanted = Labels(known, np.array([at], np.int64), np.full(1, None), "none")
        if not len(wanted):
            rules = ", ".join(f"{rule}: {count}" for rule, count in own.counts.dropped.items())
            raise InputError(
                f"events: none of {own.counts.read} is left to predict from ({rules or 'none was given'}): "
                f"give a {BIRTH_CODE} with a time, and an event with a code of the model or a time."
            )
        return Histories(own, {split: wanted}, self._rules.delays), codes


def _of_subjects(
    parts: Sequence[Labels], values: Sequence[np.ndarray], width: int, dtype: type
) -> OfSubjects:
    empty = [np.zeros(0, np.int64)]
    return OfSubjects(
        np.concatenate([part.subject_ids for part in parts] or empty),
        np.concatenate([part.times for part in parts] or empty),
        np.concatenate(values or [np.zeros((0, width), dtype)]),
    )


def attention_weights(network: BEHRT, params: Tree, batch: Batch) -> jax.Array:
    """Attention weights of an encoder, worked out from the queries and keys that its layers compute.

    Args:
        network: without `scan_layers`.
        params: of it.
        batch: rows ``[rows, length]``.

    Returns:
        float32 ``[rows, layers, heads, length, length]``, see :meth:`Loaded.attention`.
    """

    def wanted(module: Any, method: str) -> bool:
        return module.name in ("query", "key") and method == "__call__"

    config = network.config
    _, found = network.apply(
        {"params": params}, batch, capture_intermediates=wanted, mutable=["intermediates"]
    )
    segments, rotation = jnp.asarray(batch.segment_ids), head_rotations(config, batch)
    mask = segment_mask(segments) & (segments > 0)[:, None, :, None]  # [B, 1, L, L]
    size = config.hidden_size // config.heads

    def weights(layer: int) -> jax.Array:
        own: Any = found["intermediates"]["encoder"][layer_name(layer)]["attention"]
        queries, keys = (own[name]["__call__"][0] for name in ("query", "key"))  # [B, L, D]
        heads = [x.reshape(*x.shape[:2], config.heads, size) for x in (queries, keys)]  # [B, L, N, K]
        heads = heads if rotation is None else [rotate(x, rotation) for x in heads]
        scores = jnp.einsum("btnk,bsnk->bnts", *heads, precision="highest") * size**-0.5
        return jnp.where(mask, jax.nn.softmax(scores, axis=-1, where=mask), 0.0)

    return jnp.stack([weights(layer) for layer in range(config.layers)], axis=1)  # [B, layers, N, L, L]


# From a folder to a model.


def load(path: Path | str, base: Path | str | None = None, devices: Devices | None = None) -> Loaded:
    """Open a model.

    Args:
        path: folder of a finished run of pretraining or fine-tuning, of an adapter, or of an exported model.
        base: of an adapter, the run (or export) that it was trained on; the one that a fine-tuned adapter
            names where not given.
        devices: to compute on; all where not given.

    Raises:
        InputError: nothing of that kind, or unfinished or damaged; an adapter of another base.
    """
    folder, mesh = Path(path).expanduser(), make_mesh(devices)
    base = None if base is None else Path(base).expanduser()
    use_compilation_cache(None)
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if is_finetuned(folder):
        found = open_finetuned(folder, base, mesh)
        variables = found.members[0]
        return Loaded(
            folder, found.setup, variables, found.vocabulary, found.preparation, mesh, finetuned=found
        )
    if base is not None and not is_adapter:
        raise InputError(f"base: {folder} is no adapter: leave the base out.")
    return _of_adapter(folder, base, mesh) if is_adapter else _of_pretraining(folder, mesh)


def _of_pretraining(folder: Path, mesh: Mesh) -> Loaded:
    pretrained = open_pretrained(folder)
    adapters, freezing = None, FreezingConfig()
    if not is_portable(folder):
        stored = stored_settings(folder)
        adapters = None if stored["lora"] is None else from_stored(LoRAConfig, stored["lora"])
        freezing = from_stored(FreezingConfig, stored["freezing"])
    setup = _setup(pretrained, adapters, freezing, mesh)
    found = read_weights_of(folder, "path", replicated_shapes(setup.shapes["params"], mesh))
    if found.adapters != adapters:  # of an export
        setup = _setup(pretrained, found.adapters, freezing, mesh)
    return _loaded(folder, pretrained, setup, found, mesh)


def _of_adapter(folder: Path, base: Path | None, mesh: Mesh) -> Loaded:
    """A pretrained model: what was trained there, on its base."""
    config = read_config(folder)
    if base is None:
        raise InputError(f"base is missing: give the run that the adapter {folder} was trained on.")
    pretrained = open_pretrained(base)
    adapters = None if config.lora is None else from_stored(LoRAConfig, config.lora)
    setup = _setup(pretrained, adapters, FreezingConfig(), mesh)
    of_base = read_weights_of(base, "base", replicated_shapes(setup.shapes["params"], mesh))
    # The run's own adapter stands on parameters without it; any other on those that its run started from.
    own = folder.resolve().parent == base.resolve()
    params, tree, _ = load_adapter(
        folder, of_base.params if own else of_base.merged(), pretrained.vocabulary.fingerprint()
    )
    preparation = read_preparation(folder) or pretrained.preparation
    found = Weights(params, jax.device_put(tree, replicated(mesh)), adapters, of_base.step)
    return _loaded(folder, pretrained._replace(preparation=preparation), setup, found, mesh)


def _setup(
    pretrained: Pretrained, adapters: LoRAConfig | None, freezing: FreezingConfig, mesh: Mesh
) -> Setup:
    config = PretrainConfig(
        model=pretrained.model,
        lora=adapters,
        freezing=freezing,
        objective=pretrained.objective,
        queries=pretrained.queries,
    )
    return set_up(config, len(pretrained.vocabulary), mesh)


def _loaded(folder: Path, pretrained: Pretrained, setup: Setup, found: Weights, mesh: Mesh) -> Loaded:
    variables = {"params": found.params, "lora": found.lora}
    return Loaded(
        folder,
        setup,
        variables,
        pretrained.vocabulary,
        pretrained.preparation,
        mesh,
        step=found.step,
        objective=pretrained.objective,
        queries=pretrained.queries,
    )
