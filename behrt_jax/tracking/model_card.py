"""The model card of an exported model: what it is, was trained on and is worth, and what it is not for.

In the form of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards): YAML between two lines of
``---``, whose values are written as JSON, which YAML contains, and Markdown after it. No path, subject id or
small number is in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import ObjectiveName
from behrt_jax.data.tasks import Task
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.files import JsonObject, json_text
from behrt_jax.run_folder import is_number
from behrt_jax.tracking.console import format_cell
from behrt_jax.tracking.summary import BASELINES, FIGURES, flat

TOP_CODES = 20
"""Most frequent codes that are listed."""
TRAINING = ("freezing", "lora", "masking", "task", "search", "optimizer", "train")
"""Sections of a run's settings that are listed: how it was trained, and no paths."""
TASKS = {
    "binary": "yes or no",
    "multiclass": "one of several classes",
    "multilabel": "a set of codes",
    "regression": "a number",
    "survival": "the time to an event",
}
OBJECTIVES = {
    "mlm": "predicts masked codes",
    "queries": "answers questions about the time after a visit",
    "both": "predicts masked codes, answers questions about the time after a visit",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is made of."""

    name: str
    licence: str
    model: ModelConfig
    """Resolved."""
    task: Task | None
    vocabulary: Vocabulary
    """Without the counts of rare codes."""
    least: int
    """Fewer subjects, labels or code carriers than this are not told."""
    rare_codes: int
    """Codes whose count is left out."""
    counts_subjects: bool
    """By train subjects; otherwise by train events, which are as many or more."""
    parameters: int
    """Of the model with its adapters merged."""
    beside: bool
    """Adapters are written beside the parameters."""
    source: str | None
    """Kind of the records."""
    fingerprint: str | None
    """Of the data."""
    settings: JsonObject
    """Of the run; empty where it is not known, like the next four."""
    chosen: JsonObject
    data: JsonObject
    summary: JsonObject
    evaluation: JsonObject | None
    """What evaluate wrote."""
    program: str
    """How the program in the folder is used; empty where there is none."""
    objective: ObjectiveName
    """What it was pretrained for."""


class Figure(NamedTuple):
    """A figure, with its 95 % interval over subjects where it is known."""

    of: str
    name: str
    """As summaries and evaluations call it."""
    value: float
    low: float | None = None
    high: float | None = None
    where: str = "tuning split"


def model_card(card: Card) -> str:
    """Text of README.md."""
    parts = [
        _front_matter(card),
        f"# {card.name}",
        _what_it_is(card),
        _use(card),
        _data(card),
        _figures(card),
        _training(card),
        _codes(card),
        _limits(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures_of(card: Card) -> Iterator[Figure]:
    """Every figure that is known: of an evaluation, of the best validation, of baselines beside it."""
    if card.evaluation is not None:
        split = f"{card.evaluation['task'].get('split', 'held_out')} split"
        tables = [("this model", card.evaluation["model"]["figures"])]
        tables += [(one["name"], one["figures"] or {}) for one in card.evaluation["baselines"]]
        for of, figures in tables:
            for name, entry in figures.items():
                if is_number(entry["value"]):
                    yield Figure(of, name, entry["value"], entry["low"], entry["high"], split)
    best = card.summary.get("best") or {}
    interval = card.summary.get("interval") or (None, None)
    for name, _ in FIGURES:
        if is_number(best.get(name)):
            low, high = interval if name == "loss" else (None, None)
            yield Figure("this model", name, best[name], low, high)
    for baseline, figures in (card.summary.get("baselines") or {}).items():
        of = str(BASELINES.get(baseline, baseline))
        if is_number(figures.get("loss")):
            yield Figure(of, "loss", figures["loss"])
    for baseline, gap in (card.summary.get("gaps") or {}).items():
        of = f"this model less {BASELINES.get(baseline, baseline)}"
        yield Figure(of, "loss", gap["nats"], gap["low"], gap["high"])


def _front_matter(card: Card) -> str:
    tags = ["ehr", "behrt", "bert", "jax", "flax"]
    tags += ["masked-code-prediction"] if card.task is None else [card.task.kind]
    tags += ["lora"] if card.settings.get("lora") else []
    entries: JsonObject = {"license": card.licence, "library_name": "behrt_jax", "tags": tags}
    own = [figure for figure in figures_of(card) if figure.of == "this model"]
    if own:
        what = {"type": "fill-mask", "name": "masked-code prediction"}
        if card.task is not None:
            what = {"type": "tabular-classification", "name": f"{card.task.kind} task"}
        data = {
            "type": card.source or "ehr",
            "name": f"{card.source or 'ehr'} {(card.fingerprint or '')[:12]}",
        }
        metrics = [
            {"type": figure.name, "value": figure.value, "name": f"{figure.name}, {figure.where}"}
            for figure in own
        ]
        results = [{"task": what, "dataset": data, "metrics": metrics}]
        entries["model-index"] = [{"name": card.name, "results": results}]
    lines = (f"{name}: {json_text(value).strip()}" for name, value in entries.items())
    return "\n".join(["---", *lines, "---"])


def _what_it_is(card: Card) -> str:
    model = card.model
    does = f"{OBJECTIVES[card.objective]} and gives a vector for each event"
    if card.task is not None:
        does = f"predicts {TASKS[card.task.kind]} ({card.task.kind} task) from a history"
        if card.task.classes:
            does += f", of {len(card.task.classes):,} classes (`task.task.classes` of config.json)"
    return (
        "A BEHRT encoder ([Li et al. 2020](https://doi.org/10.1038/s41598-020-62922-y)) of electronic health "
        f"records that {does}. {card.parameters:,} parameters: {model.layers} layers of {model.hidden_size}, "
        f"{model.heads} heads, up to {model.positions} tokens, embeddings of {model.embedding_size}, "
        f"{len(card.vocabulary):,} rows of vocabulary. {tokens_read(model)}"
        + (" Its adapters lie in adapter/, not merged into model.safetensors." if card.beside else "")
    )


def tokens_read(model: ModelConfig) -> str:
    """What the model reads of each event, in a sentence or two."""
    read = ["the patient's age", *(["the visit"] if model.visit_embedding != "none" else [])]
    if not model.position_embedding.startswith("rope"):
        read.append("the position")
    if model.time != "none":
        read.append("the days since the visit before")
    if model.time == "time2vec":
        read.append("the date")
    text = f"Each token is a code with {', '.join(read[:-1])}{' and ' if read[1:] else ''}{read[-1]}."
    if model.position_embedding.startswith("rope"):
        counted = "days" if model.position_embedding == "rope_time" else f"{model.position_of}s"
        text += f" Attention reads how many {counted} lie between two tokens."
    return text


def _use(card: Card) -> str:
    call = "vectors = model.embed(events)" if card.task is None else "found = model.predict(events)"
    given = "finetune --init" if card.task is None else "predict --model"
    text = f"""## Use

```python
import behrt_jax

model = behrt_jax.load("{card.name}")
{call}  # of one patient: dicts of code, time, numeric_value, visit_id; or the folder of prepared data
```

`behrt-jax {given}` takes the folder too. Events are made into tokens by preparation.json, as those that the
model was trained on."""
    return f"{text}\n\n{card.program.strip()}" if card.program else text


def _data(card: Card) -> str:
    rows = [
        ("source", card.source or "not known"),
        ("fingerprint (SHA-256)", card.fingerprint or "not known"),
    ]
    data = card.data
    for split, counts in (data.get("splits") or {}).items():
        told = ", ".join(
            f"{_told(counts[name], card.least)} {name}" for name in ("subjects", "events", "visits")
        )
        rows.append((f"{split} split", told))
    for split in ("train", "tuning"):
        if isinstance(counts := data.get(split), Mapping):  # of labels
            told = (f"{name.replace('_', ' ')} {_told(value, card.least)}" for name, value in counts.items())
            rows.append((f"labels, {split} split", ", ".join(told)))
    rows += [
        (f"events {name}", data[f"events_{name}"]) for name in ("read", "kept") if f"events_{name}" in data
    ]
    rows += [(f"dropped: {rule}", count) for rule, count in (data.get("events_dropped") or {}).items()]
    rows += [(f"changed: {rule}", count) for rule, count in (data.get("events_changed") or {}).items()]
    told = [(name, _told(value, card.least)) for name, value in rows]
    return f"## Trained on\n\n{_table(('', ''), told)}"


def _figures(card: Card) -> str:
    found = list(figures_of(card))
    if not found:
        return ""
    names = dict(FIGURES)
    rows = [
        (one.where, one.of, names.get(one.name, one.name), format_cell(one.value),
         "" if one.low is None else f"{format_cell(one.low)} to {format_cell(one.high)}")
        for one in found
    ]  # fmt: skip
    text = f"## Figures\n\n{_table(('on', 'of', 'figure', 'value', '95 % interval over subjects'), rows)}"
    if any(one.where == "tuning split" for one in found):
        text += (
            "\n\nThe best validation was chosen on the tuning split, so that figures there flatter a little."
        )
    return text


def _training(card: Card) -> str:
    sections = {
        name: card.settings[name] for name in TRAINING if isinstance(card.settings.get(name), Mapping)
    }
    rows = [(name, format_cell(value)) for name, value in flat(sections) if value is not None]
    rows += [(f"chosen by a search: {name}", format_cell(value)) for name, value in card.chosen.items()]
    rows += [
        (name, format_cell(card.summary[name]))
        for name in ("best_step", "steps", "epochs")
        if name in card.summary
    ]
    return f"## Training\n\n{_table(('setting', 'value'), rows)}" if rows else ""


def _codes(card: Card) -> str:
    counts, first = card.vocabulary.counts, len(SPECIAL_TOKENS)
    order = first + np.argsort(-counts[first:], kind="stable")[:TOP_CODES]
    rows = [
        (card.vocabulary.codes[row], card.vocabulary.descriptions[row] or "", f"{counts[row]:,}")
        for row in order
        if counts[row]
    ]
    basis = "train subjects have" if card.counts_subjects else "train events are of"
    left_out = (
        f"The counts of {card.rare_codes:,} codes that fewer than {card.least} {basis} are left out, here "
        "and in vocabulary.parquet (0 there)."
    )
    if not card.counts_subjects:
        left_out += (
            " The subjects of each code are not known: a code of as many events or more may still be that of "
            "fewer subjects."
        )
    names = (
        "The names of all codes are in vocabulary.parquet, and the edges of bins of values, if there are "
        "any, in preparation.json: the model cannot be used without them. See that they may be passed on."
    )
    table = _table(("code", "description", "train events"), rows) if rows else ""
    return "\n\n".join(part for part in ("## Codes", table, f"{left_out} {names}") if part)


def _limits(card: Card) -> str:
    first = (
        "Research on health records: a start for fine-tuning, and vectors of histories."
        if card.task is None
        else "Research on the outcome that it was fine-tuned for, in patients like those it was trained on."
    )
    rest = """It is no medical device, and nothing about single patients should be decided by it. It repeats
how care was given and coded where its records come from, with their gaps and biases; in other places, times
or groups of patients it must be evaluated anew, groups apart, before its predictions are used for anything.
Weights can hold traces of the records that they were trained on; they were not examined for that."""
    return f"## Intended use and limits\n\n{first} {' '.join(rest.split())}"


def _told(value: object, least: int) -> str:
    """A count, but for a small one; other values as they are."""
    if isinstance(value, int) and 0 < value < least:
        return f"fewer than {least}"
    return format_cell(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
