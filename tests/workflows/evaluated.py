"""Prepared data in which the code RISK raises the chance of every outcome, with labels and predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from behrt_jax.config.data import PrepareConfig
from behrt_jax.data.predictions import PredictionWriter, prediction_schema
from behrt_jax.records.prepare.pipeline import prepare
from tests.records.meds_folder import DAY, Row, born, events_table
from tests.records.memory_source import MemorySource

CODES = tuple(f"CODE//{index}" for index in range(8))
CLASSES = ("high", "low", "middle")
EDGES = [100.0, 200.0, 400.0]
TIME = 20_000 * DAY
FIRST_ID = 987_654_000
"""Subject ids are from here on: numbers that stand out where they must not be."""


def sigmoid(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-odds))


class Evaluated:
    """A folder with ``prepared``, ``labels.parquet`` and, once written, ``predictions.parquet``.

    Half of the subjects have two prediction times; a fifth each are tuning and held_out.
    """

    def __init__(self, folder: Path, kind: str, subjects: int = 200, seed: int = 0):
        self.folder, self.kind = folder, kind
        self.data, self.labels = folder / "prepared", folder / "labels.parquet"
        self.predictions = folder / "predictions.parquet"
        rng = np.random.default_rng(seed)
        ids = FIRST_ID + np.arange(subjects)
        risks = rng.integers(0, 6, subjects)
        last = rng.integers(0, len(CODES), subjects)
        rows = []
        for subject, risk, code in zip(ids.tolist(), risks.tolist(), last.tolist(), strict=True):
            rows.append(born(subject, TIME - int(rng.integers(10, 90)) * 365 * DAY))
            rows += [Row(subject, TIME - (day + 30) * DAY, "RISK") for day in range(risk)]
            often = rng.integers(0, len(CODES), 5).tolist()
            rows += [Row(subject, TIME - (day + 40) * DAY, CODES[other]) for day, other in enumerate(often)]
            rows.append(Row(subject, TIME - DAY, CODES[code]))
        order = rng.permutation(subjects)
        parts = np.split(ids[order], [3 * subjects // 5, 4 * subjects // 5])
        self.splits = dict(zip(("train", "tuning", "held_out"), parts, strict=True))
        self.rows = rows
        self.prepare(rows, self.data)

        chosen = np.sort(np.concatenate([np.arange(subjects), np.arange(0, subjects, 2)]))
        again = np.append(False, chosen[1:] == chosen[:-1])
        self.odds = 1.2 * (risks[chosen] - 2.5)  # [labels]
        self.keys = {
            "subject_id": ids[chosen],
            "prediction_time": pa.array(TIME + again * DAY, pa.timestamp("us")),
        }
        self.last, self.rng = last[chosen], rng
        seen = np.zeros((subjects, len(CODES)), bool)
        for row in rows:
            if row.code in CODES:
                seen[row.subject - FIRST_ID, CODES.index(row.code)] = True
        self.seen = seen[chosen]
        self.columns = self._label_columns()
        pq.write_table(pa.table({**self.keys, **self.columns}), self.labels)

    def prepare(self, rows: list[Row], folder: Path) -> None:
        """Prepare events, the subject's own or others, with the subjects' splits."""
        source = MemorySource([[events_table(rows, visits=False)]], self.splits)
        options: dict[str, Any] = {"codes": (".*",), "min_count": 1, "duplicates": "keep"}
        prepare(source, PrepareConfig(output=folder, **options), lambda *_: None)

    def _label_columns(self) -> dict[str, Any]:
        odds, rng = self.odds, self.rng
        if self.kind == "binary":
            return {"boolean_value": rng.random(len(odds)) < sigmoid(odds)}
        if self.kind == "multiclass":
            level = odds + rng.normal(size=len(odds))
            return {
                "categorical_value": np.where(level > 1.5, "high", np.where(level < -1.5, "low", "middle"))
            }
        if self.kind == "multilabel":
            other = rng.integers(0, len(CODES), len(odds))
            again = rng.random(len(odds)) < 0.7
            sets = [[CODES[a]] if b else [CODES[c]] for a, b, c in zip(self.last, again, other, strict=True)]
            return {"categorical_values": sets}
        if self.kind == "regression":
            return {"float_value": 10 + odds + rng.normal(size=len(odds))}
        days = rng.exponential(300 * np.exp(-odds / 2))
        ends = rng.uniform(50, 700, len(odds))
        return {"boolean_value": days <= ends, "float_value": np.minimum(days, ends)}

    def predict(self, split: str = "held_out", quality: float = 1.0, **metadata: Any) -> Path:
        """Write predictions of a split, or of `all`: `quality` 1 knows the truth, 0 nothing."""
        chosen = self.splits.get(split, self.keys["subject_id"])
        rows = np.flatnonzero(np.isin(self.keys["subject_id"], chosen))
        odds = quality * self.odds[rows]
        columns: dict[str, Any] = {
            name: pa.array(column).take(pa.array(rows))
            for name, column in {**self.keys, **self.columns}.items()
        }
        more: dict[str, Any] = {}
        if self.kind == "binary":
            columns |= {"predicted_boolean_value": odds > 0, "predicted_boolean_probability": sigmoid(odds)}
            more = {"threshold": 0.5}
        elif self.kind == "multiclass":
            logits = np.stack([odds, -odds, np.zeros_like(odds)], axis=1)
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            columns["predicted_categorical_value"] = np.array(CLASSES)[shares.argmax(axis=1)]
            columns["predicted_probabilities"] = shares.tolist()
            more = {"classes": CLASSES}
        elif self.kind == "multilabel":
            shares = np.where(np.arange(len(CODES)) == self.last[rows, None], 0.1 + 0.6 * quality, 0.1)
            columns["predicted_probabilities"] = shares.astype(np.float32).tolist()
            columns["seen_before"] = self.seen[rows].tolist()
            more = {"classes": CODES}
        elif self.kind == "regression":
            columns["predicted_float_value"] = 10 + odds
        else:
            rates = np.exp(odds / 2)[:, None] / 300
            columns["predicted_survival"] = np.exp(-rates * np.array(EDGES)).tolist()
            more = {"edges_days": EDGES}
        schema = prediction_schema(self.kind, "categorical")
        named = {"data": str(self.data), "labels": str(self.labels), "split": split, "max_tokens": 50}
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        with PredictionWriter(
            self.predictions, schema, {"kind": self.kind, **named, **more, **metadata}
        ) as file:
            file.write(table)
        return self.predictions
