"""Files with a flipped byte, a part cut off, gone or exchanged: whether that is noticed when they are read.

``python -m tests.mutations --count 1000`` mutates every subject that often and prints a table:

- named: an `InputError`, which is one line and status 2 of a command.
- unchanged: all that was read is as before: it was a mutation of blanks, say, or of what nobody reads.
- other: what was read differs, in a file of other people's, which has no digest. Of inputs alone.
- silent: what was read differs in a folder of our own.
- traceback: any other exception, or one that Python prints to the terminal by itself.

All is read in this process by the functions that the commands use; nothing is trained but the models read.
"""

import argparse
import hashlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from behrt_jax.config.data import PrepareConfig, TableColumns
from behrt_jax.data.events import SPLITS
from behrt_jax.data.labels import read_labels
from behrt_jax.data.predictions import read_predictions
from behrt_jax.data.prepared import read_deaths, read_manifest, read_preparation, read_prepared, read_static
from behrt_jax.errors import InputError
from behrt_jax.records.prepare.pipeline import prepare
from behrt_jax.workflows.prepare import open_source

Outcome = Literal["named", "unchanged", "other", "silent", "traceback"]
OUTCOMES: tuple[Outcome, ...] = ("named", "unchanged", "other", "silent", "traceback")
Files = dict[str, bytes]
"""Name below the folder -> content."""


# Mutations.


def mutate(files: Files, rng: random.Random) -> tuple[Files, str]:
    """The files after one mutation of one of them, drawn with equal chances, and what it was."""
    name = rng.choice(sorted(files))
    content, kinds = files[name], [_flip, _overwrite, _cut, _insert, _empty]
    kinds += [_edit] * 3 if name.endswith((".json", ".jsonl")) else []
    of_folder: list[Callable[[Files, str, random.Random], Files]] = [_delete, _swap, _copy_over, _duplicate]
    kind = rng.choice([*kinds, *of_folder] if len(files) > 1 else kinds)
    if kind in of_folder:
        return kind(files, name, rng), f"{kind.__name__[1:]} {name}"
    return {**files, name: kind(content, rng)}, f"{kind.__name__[1:]} {name}"


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content) + 1), rng.choice((2, 8, 64, 512))
    filling = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return content[:start] + filling + content[start + length :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + (content[start + rng.randrange(1, 64) :] if rng.random() < 0.5 else b"")


def _insert(content: bytes, rng: random.Random) -> bytes:
    start = rng.choice((rng.randrange(len(content) + 1), len(content)))
    return content[:start] + rng.randbytes(rng.choice((1, 8, 100))) + content[start:]


def _empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def _edit(content: bytes, rng: random.Random) -> bytes:
    """An entry of a JSON object, at any depth, is removed or gets another value; of lines of JSON, in one."""
    if not content.strip():
        return content
    lines = content.splitlines() if content.count(b"}\n{") else [content]
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    places = [*_places(value)]
    if places:
        inside, key = rng.choice(places)
        others = (None, {}, [], 0, -1, 1.5, "", "x", True, 10**30)
        if rng.random() < 0.25:
            del inside[key]
        else:
            inside[key] = rng.choice([other for other in others if other != inside[key]])
    lines[at] = json.dumps(value, indent=2 if len(lines) == 1 else None).encode()
    return b"\n".join(lines) + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _delete(files: Files, name: str, rng: random.Random) -> Files:
    return {other: content for other, content in files.items() if other != name}


def _swap(files: Files, name: str, rng: random.Random) -> Files:
    other = rng.choice(sorted(files.keys() - {name}))
    return {**files, name: files[other], other: files[name]}


def _copy_over(files: Files, name: str, rng: random.Random) -> Files:
    return {**files, name: files[rng.choice(sorted(files.keys() - {name}))]}


def _duplicate(files: Files, name: str, rng: random.Random) -> Files:
    path = Path(name)
    copy = rng.choice((f"copy of {path.name}", f"{path.stem}2{path.suffix}"))
    return {**files, (path.parent / copy).as_posix(): files[name]}


# Subjects: folders that are mutated, and what is read of them.


@dataclass(frozen=True)
class Subject:
    """A folder, and how it is read."""

    name: str
    folder: Path
    read: Callable[[Path], object]
    """All that commands take from a folder at this path, by value."""
    ours: bool = True
    """Its files have digests, so that any difference is noticed."""


def digest(*values: object) -> str:
    """SHA-256 of arrays, tables and anything else whose ``repr`` tells its value."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype != object:
            found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value.tolist() if isinstance(value, np.ndarray) else value).encode())
    return found.hexdigest()


COLUMNS = ("subject_ids", "offsets", "codes", "ages", "visits", "times")


def read_data(folder: Path) -> object:
    """Of prepared data: vocabulary, sequences, facts, manifest."""
    data, manifest = read_prepared(folder).with_facts(), read_manifest(folder)
    vocabulary, facts = data.vocabulary, []
    for name in SPLITS:
        part, deaths = data.splits[name], read_deaths(folder, name)
        births = data.births[name]
        facts += [
            *(getattr(part, column) for column in COLUMNS),
            part.facts and part.facts.codes,
            data.facts_without_events[name].codes,
            births.subject_ids,
            births.times,
            read_static(folder, name).to_pydict(),
        ]
        facts.append(None if deaths is None else deaths.to_pydict())
    return digest(vocabulary.codes, vocabulary.counts, vocabulary.descriptions, manifest, *facts)


def inputs(folder: Path) -> list[Subject]:
    """Records, labels and predictions in every form, prepared or read; some dozen rows each."""
    from tests.records.meds_folder import by_remainder, history_rows, write_meds
    from tests.records.omop_folder import HISTORY, write_omop
    from tests.records.sources.test_synthea import PATIENTS, VISITS, condition
    from tests.records.synthea_folder import write_synthea
    from tests.workflows.evaluated import Evaluated

    rows = history_rows(12, 3)
    write_meds(folder / "meds", rows, by_remainder(rows), descriptions={"DIAGNOSIS//1": "one"}, extra=True)
    write_meds(folder / "checksums", rows, by_remainder(rows))
    for file in (folder / "checksums").rglob("*.parquet"):
        pq.write_table(pq.read_table(file), file, write_page_checksum=True, compression="none")
    for form in ("csv", "parquet"):
        write_omop(
            folder / f"omop {form}", {name: _many(lines) for name, lines in HISTORY.items()}, form=form
        )
    people = [PATIENTS[0] | {"ID": f"p{number}"} for number in range(8)]
    diagnoses = [
        condition(patient=line["ID"], encounter="", code=str(n % 3)) for n, line in enumerate(people)
    ]
    tables = {"patients": people, "encounters": VISITS, "conditions": diagnoses}
    write_synthea(folder / "synthea", tables, "2023")
    text = "".join(
        f"{row.subject},{np.datetime64(row.time, 'us')},{row.code},1960-01-02\n"
        for row in rows
        if row.visit is not None
    )
    (folder / "table").mkdir()
    (folder / "table" / "events.csv").write_text(f"subject_id,time,code,born\n{text}")
    subjects = []
    for name in ("meds", "checksums", "omop csv", "omop parquet", "synthea", "table"):
        kind: Any = "meds" if name == "checksums" else name.split()[0]
        columns = TableColumns(birth="born" if kind == "table" else None)
        options = PrepareConfig(source=kind, codes=(".",), min_count=1, table=columns, tuning_fraction=0.4)
        subjects.append(Subject(name, folder / name, _preparing(options), ours=False))
    for kind in ("binary", "multiclass", "multilabel", "survival"):
        evaluated = Evaluated(folder / "evaluated" / kind, kind, subjects=30)
        for name, file in (("labels", evaluated.labels), ("predictions", evaluated.predict())):
            own = folder / name / kind
            own.mkdir(parents=True)
            shutil.copy(file, own / "file.parquet")
            read = _read_labels if name == "labels" else _read_predictions
            subjects.append(Subject(f"{name} {kind}", own, read, ours=False))
    return subjects


def _many(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a table for more persons."""
    ids = ("person_id", "visit_occurrence_id")
    return [
        {
            name: value + 100 * n if name in ids and value is not None else value
            for name, value in line.items()
        }
        for n in range(6 if any("person_id" in line for line in lines) else 1)
        for line in lines
    ]


def _preparing(options: PrepareConfig) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        source = folder / "events.csv" if options.source == "table" else folder
        with tempfile.TemporaryDirectory() as output:
            config = replace(options, input=source, output=Path(output) / "prepared")
            prepare(open_source(config), config)
            manifest = read_manifest(Path(output) / "prepared")
            return read_data_of(Path(output) / "prepared"), manifest["events"]

    return read


def read_data_of(folder: Path) -> str:
    """As :func:`read_data`, without the manifest, which names the input's own digest."""
    data = read_prepared(folder)
    arrays = [getattr(data.splits[name], column) for name in SPLITS for column in COLUMNS]
    return digest(data.vocabulary.codes, data.vocabulary.descriptions, *arrays)


def _read_labels(folder: Path) -> object:
    labels = read_labels(folder / "file.parquet")
    return digest(labels.subject_ids, labels.times, labels.values, labels.kind, labels.account)


def _read_predictions(folder: Path) -> object:
    file = read_predictions(folder / "file.parquet")
    return digest(*vars(file).values())


def runs(folder: Path) -> list[Subject]:
    """A run of pretraining, one of fine-tuning, and the adapter of another, each of a tiny model."""
    import jax

    from behrt_jax.adapters.files import load_adapter
    from behrt_jax.data.vocabulary import Vocabulary
    from behrt_jax.diagnosis.finding import read_run
    from behrt_jax.run_folder import METRICS_FILE, VOCABULARY_FILE, checked, read_metrics
    from behrt_jax.training.devices import make_mesh
    from behrt_jax.training.pretrained import open_pretrained, read_encoder
    from behrt_jax.workflows import finetuned
    from tests.workflows.finetune_case import ONE, FinetuneCase

    case, mesh = FinetuneCase(folder), make_mesh(ONE)
    base, whole, adapted = case.base, case.run("binary", "full"), case.run("binary", "lora")
    encoder = read_encoder(open_pretrained(base), mesh).params
    setups: dict[str, Any] = {}

    def leaves(*trees: Any) -> Sequence[object]:
        found = jax.tree.leaves_with_path(trees)
        return [value for path, leaf in found for value in (jax.tree_util.keystr(path), np.asarray(leaf))]

    def set_up(record: Any, size: int) -> Any:
        key = f"{json.dumps(record, sort_keys=True)} {size}"
        if key not in setups:
            setups[key] = finetuned._set_up(record, size, mesh)
        return setups[key]

    def read_pretraining(run: Path) -> object:
        told, found = read_run(run), open_pretrained(run)
        params, step = read_encoder(found, mesh)
        figures = (told.settings, told.parameters, told.facts, told.metrics, told.summary, found.preparation)
        return digest(*figures, found.vocabulary.codes, step, *leaves(params))

    def read_finetuning(run: Path) -> object:
        record = finetuned.read_task(run)
        vocabulary = Vocabulary.read(checked(run, VOCABULARY_FILE))
        restored = finetuned._restored(run, set_up(record, len(vocabulary) - record["new_codes"]), mesh)
        metrics, preparation = read_metrics(run / METRICS_FILE), read_preparation(run)
        return digest(record, vocabulary.codes, metrics, preparation, *leaves(restored))

    def read_adapter(run: Path) -> object:
        record = finetuned.read_task(run)
        setup = set_up(record, len(open_pretrained(base).vocabulary))
        head = setups.setdefault("head", setup.init(jax.random.key(0))["params"]["task_head"])
        params, lora, config = load_adapter(run, {"behrt": encoder, "task_head": head})
        return digest(record, config, read_preparation(run), *leaves(params, lora))

    return [
        Subject("run of pretraining", base, read_pretraining),
        Subject("run of fine-tuning", whole, read_finetuning),
        Subject("adapter", adapted / "adapter", read_adapter),
    ]


def prepared(folder: Path) -> list[Subject]:
    """Prepared data with facts, deaths and births in each split."""
    from tests.records.meds_folder import DAY, Row, born, by_remainder, history_rows, write_meds

    rows = history_rows(20, 3)
    rows += [Row(subject, 9000 * DAY, "MEDS_DEATH") for subject in range(1, 21, 3)]
    rows += [Row(subject, None, f"SEX//{subject % 2}") for subject in range(1, 21)]
    rows += [born(subject, 0) for subject in range(21, 41)]
    write_meds(folder / "meds", rows, by_remainder(rows))
    config = PrepareConfig(input=folder / "meds", output=folder / "prepared", codes=("DIAG",), min_count=1)
    prepare(open_source(config), config)

    def merge(place: Path) -> object:
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "out"
            shutil.copytree(place, output.with_name("out.shards"))
            prepare(open_source(config), replace(config, output=output, merge=True))
            return read_data(output)

    for shard in ("0/2", "1/2"):
        prepare(open_source(config), replace(config, output=folder / "parts", shard=shard))
    return [
        Subject("prepared data", folder / "prepared", read_data),
        Subject("shards to merge", folder / "parts.shards", merge),
    ]


SUBJECTS: dict[str, Callable[[Path], list[Subject]]] = {"prepared": prepared, "runs": runs, "inputs": inputs}
"""Kind -> its subjects, made in a folder."""


# Reading what was mutated.


def outcomes(subject: Subject, count: int, seed: int) -> Iterator[tuple[Outcome, str]]:
    """Each mutation's outcome, and what was mutated, with the traceback or the message that it gave."""
    rng = random.Random(f"{subject.name} {seed}")
    files = {
        file.relative_to(subject.folder).as_posix(): file.read_bytes()
        for file in sorted(subject.folder.rglob("*"))
        if file.is_file() and file.parent.name != "plots" and file.name not in ("report.html", "SUMMARY.txt")
    }
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "folder"
        whole = _reading(subject, place, files)
        assert whole[0] == "unchanged", whole
        for _ in range(count):
            mutated, what = mutate(files, rng)
            outcome, found = _reading(subject, place, mutated)
            if outcome == "unchanged" and found != whole[1]:
                outcome = "silent" if subject.ours else "other"
            yield outcome, f"{what}: {found}"


def _reading(subject: Subject, place: Path, files: Files) -> tuple[Outcome, str]:
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    unraisable: list[str] = []  # what Python would print to the terminal by itself
    sys.unraisablehook = lambda found: unraisable.append(f"{found.exc_value!r} in {found.object!r}")
    try:
        read = str(subject.read(place))
        return ("traceback", unraisable[0]) if unraisable else ("unchanged", read)
    except InputError as error:
        return ("traceback" if unraisable else "named"), "\n".join([str(error), *unraisable])
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        sys.unraisablehook = sys.__unraisablehook__


def main() -> None:
    """Print the table, and each mutation that was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="mutations of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    options = parser.parse_args()
    logging.disable()
    print(f"{'':22}" + "".join(f"{name:>11}" for name in OUTCOMES), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.kinds:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                subjects = SUBJECTS[kind](Path(scratch) / kind)
            for subject in subjects:
                found = Counter[str]()
                for outcome, what in outcomes(subject, options.count, options.seed):
                    found[outcome] += 1
                    if outcome in ("silent", "traceback"):
                        print(f"{outcome}: {subject.name}: {what}", flush=True)
                print(f"{subject.name:22}" + "".join(f"{found[name]:11,}" for name in OUTCOMES), flush=True)


if __name__ == "__main__":
    main()
