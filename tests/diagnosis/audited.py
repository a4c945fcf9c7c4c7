"""Prepared folders and labels to audit: clean ones, and ways to spoil them."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.cli import main
from behrt_jax.data.events import DAY
from behrt_jax.data.prepared import read_manifest, read_prepared
from behrt_jax.data.sequences import Sequences, SequenceSet, set_fingerprint
from behrt_jax.data.vocabulary import UNK
from behrt_jax.files import digests_of, sealed, write_json
from behrt_jax.records.meds_export import write_meds
from behrt_jax.records.synthetic.clinical import generate_clinical

YEAR = 365 * DAY
OUTCOME = "DX//J10"
"""Influenza: the most frequent diagnosis of the generator."""


class Task(NamedTuple):
    """Labels, one row a subject at most."""

    subjects: np.ndarray
    times: np.ndarray
    values: np.ndarray

    def write(self, file: Path) -> Path:
        columns = {
            "subject_id": pa.array(self.subjects),
            "prediction_time": pa.array(self.times, pa.timestamp("us")),
            "boolean_value": pa.array(self.values),
        }
        pq.write_table(pa.table(columns), file)
        return file


def prepare_clinical(folder: Path, subjects: int, seed: int = 0) -> Path:
    """Generated records as MEDS, prepared by the command; the prepared folder."""
    made = generate_clinical(subjects, 495, 15.0, 0.9, seed)
    write_meds(
        [made.events], folder / "meds", splits={}, descriptions=made.descriptions, dataset_name="made up"
    )
    return prepare(folder / "meds", folder / "prepared", "--codes", ".")


def prepare(meds: Path, output: Path, *options: str) -> Path:
    assert main(["prepare", "--input", str(meds), "--output", str(output), *options]) == 0
    return output


def first_occurrence(data: SequenceSet, outcome: str, horizon: int, place: float = 0.5) -> Task:
    """Whether a subject without the code up to some visit gets it within ``horizon`` microseconds.

    Predicted at the end of the visit that is ``place`` of the way through the history; negatives are
    followed for the whole horizon.
    """
    code = data.vocabulary.codes.index(outcome)
    rows = []
    for part in data.splits.values():
        for row in range(len(part)):
            own = slice(part.offsets[row], part.offsets[row + 1])
            times, visits, codes = part.times[own], part.visits[own], part.codes[own]
            time = times[visits == int(visits.max() * place)].max()
            when = times[codes == code]
            if len(when) and when.min() <= time:
                continue
            positive = bool(len(when) and when.min() <= time + horizon)
            if positive or times[-1] >= time + horizon:
                rows.append((int(part.subject_ids[row]), int(time), positive))
    columns = zip(*rows, strict=True)
    return Task(*(np.array(list(column)) for column in columns))


def findings(data: Path, tmp: Path, labels: Task | None = None, *options: str) -> dict[str, dict[str, str]]:
    """Id -> finding, of the real command; its exit status must go with them."""
    output = tmp / "findings.json"
    arguments = ["--data", str(data), "--output", str(output), *options]
    if labels is not None:
        arguments += ["--labels", str(labels.write(tmp / "labels.parquet"))]
    status = main(["doctor", *arguments])
    listed = json.loads(output.read_text())["findings"]
    assert status == int(any(finding["severity"] == "error" for finding in listed))
    return {finding["id"]: finding for finding in listed}


def alarms(found: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Id -> what was seen, of errors and warnings."""
    return {name: finding["seen"] for name, finding in found.items() if finding["severity"] != "info"}


Spoil = Callable[[SequenceSet], SequenceSet]


def rewrite(source: Path, target: Path, spoil: Spoil, **manifest: Any) -> Path:
    """A prepared folder with other contents, and a manifest that agrees with them."""
    data = spoil(writable(read_prepared(source)))
    target.mkdir()
    for name, part in data.splits.items():
        (target / name).mkdir()
        columns = {"subject_id": part.subject_ids, "start": part.offsets[:-1]}
        _write_like(source / name / "subjects.arrow", target / name / "subjects.arrow", columns)
        columns = {"code": part.codes, "age": part.ages, "visit": part.visits, "time": part.times}
        _write_like(source / name / "events.arrow", target / name / "events.arrow", columns)
    data.vocabulary.write(target / "vocabulary.parquet")
    old = read_manifest(source)
    del old["subject_facts"]  # which stay behind
    counts = {
        name: old["splits"][name] | {"subjects": len(part), "events": len(part.codes)}
        for name, part in data.splits.items()
    }
    vocabulary = {"rows": len(data.vocabulary), "fingerprint": data.vocabulary.fingerprint()}
    new = {
        "fingerprint": set_fingerprint(data.vocabulary, data.splits),
        "splits": counts,
        "vocabulary": vocabulary,
    }
    write_json(target / "manifest.json", sealed(old | new | {"files": digests_of(target)} | manifest))
    return target


def _write_like(model: Path, file: Path, columns: Mapping[str, np.ndarray]) -> None:
    """One record batch with the schema of another file."""
    with pa.memory_map(str(model)) as opened:
        schema = pa.ipc.open_file(opened).schema
    batch = pa.RecordBatch.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def writable(data: SequenceSet) -> SequenceSet:
    splits = {
        name: Sequences(
            **{key: array if array is None else array.copy() for key, array in vars(part).items()}
        )
        for name, part in data.splits.items()
    }
    vocabulary = replace(data.vocabulary, counts=np.array(data.vocabulary.counts))
    return replace(data, vocabulary=vocabulary, splits=splits)


def recounted(data: SequenceSet) -> SequenceSet:
    """With the vocabulary's counts those of the train split."""
    counts = np.bincount(data.splits["train"].codes, minlength=len(data.vocabulary))
    return replace(data, vocabulary=replace(data.vocabulary, counts=counts.astype(np.int64)))


def joined(*parts: Sequences) -> Sequences:
    lengths = np.concatenate([part.lengths for part in parts])
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("subject_ids", "codes", "ages", "visits", "times")
    }
    return Sequences(offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)


def taken(part: Sequences, rows: np.ndarray) -> Sequences:
    """Some subjects of a split."""
    tokens = np.concatenate([np.arange(part.offsets[row], part.offsets[row + 1]) for row in rows])
    columns = {name: getattr(part, name)[tokens] for name in ("codes", "ages", "visits", "times")}
    offsets = np.concatenate([[0], np.cumsum(part.lengths[rows])])
    return Sequences(subject_ids=part.subject_ids[rows], offsets=offsets, **columns)


def planted(data: SequenceSet, code: str, times: Mapping[int, int]) -> SequenceSet:
    """Each of some subjects gets a code, in place of its last event up to a time; no other has it."""
    row = data.vocabulary.codes.index(code)
    for part in data.splits.values():
        part.codes[part.codes == row] = UNK
        for subject in np.flatnonzero(np.isin(part.subject_ids, list(times))):
            own = part.times[part.offsets[subject] : part.offsets[subject + 1]]
            place = np.searchsorted(own, times[int(part.subject_ids[subject])], side="right") - 1
            part.codes[part.offsets[subject] + place] = row
    return recounted(data)


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target
