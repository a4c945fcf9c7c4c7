# %% [markdown]
# # 1. Records to sequences
#
# A model of patient histories reads rows of numbers. This notebook follows a few hundred generated
# patients from events (who, when, what) to the rows of a training batch: histories, visits, ages, and
# several patients packed into one row. Everything here is numpy and Arrow; no model is trained.

# %%
import matplotlib.pyplot as plt
import numpy as np

from behrt_jax.config.data import DataConfig
from behrt_jax.data.batches import RowShape, training_batches
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.records.load import load_events, load_sequences

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
config = DataConfig(source="clinical", subjects=600, vocabulary_size=200, seed=3)

# %% [markdown]
# ## Events
#
# All sources (MEDS, OMOP, Synthea, a table, generators) become one table of events: subject, time, code,
# and where there are any a value and a visit. Facts without a time, such as sex, have none.

# %%
event_set = load_events(config)
events = event_set.events
print(f"{events.num_rows:,} events with the columns {', '.join(events.column_names)}")
subjects = events["subject_id"].to_numpy()
ids, counts = np.unique(subjects, return_counts=True)
patient = ids[np.argmin(np.abs(counts - 40))]  # one with about forty events
own = events.filter(subjects == patient).sort_by("time")
for row in own.slice(0, 8).to_pylist() + own.slice(own.num_rows - 3).to_pylist():
    code, when = row["code"], "no time" if row["time"] is None else f"{row['time']:%Y-%m-%d %H:%M}"
    print(f"{when:16}  {code:22}  {event_set.descriptions.get(code, '')}")

# %% [markdown]
# ## One history
#
# Each dot is an event of that patient. Events on one day are a visit, unless the source has visits of its
# own.

# %%
dated = [row for row in own.to_pylist() if row["time"] and not row["code"].startswith("MEDS_")]
kinds = sorted({row["code"].partition("//")[0] for row in dated})
figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
for day in sorted({row["time"].date() for row in dated}):
    axes.axvline(day, color="#dddddd", linewidth=4, zorder=0)
for place, kind in enumerate(kinds):
    times = [row["time"] for row in dated if row["code"].startswith(f"{kind}//")]
    axes.scatter(times, np.full(len(times), place), s=28, color=f"C{place}")
axes.set_yticks(range(len(kinds)), kinds)
axes.set_ylim(-0.6, len(kinds) - 0.4)
axes.set_title("one patient's events by kind; grey: a visit")
plt.show()

# %% [markdown]
# ## Tokens
#
# `load_sequences` selects events, drops and counts what the rules say, fits the vocabulary on the train
# split alone, and encodes. A token has a code, an age, the ordinal of its visit, and its time; a subject
# is a stretch of the flat arrays.

# %%
data = load_sequences(config, sep_token=False)
train, vocabulary = data.splits["train"], data.vocabulary
print({split: f"{len(part)} subjects, {len(part.codes):,} tokens" for split, part in data.splits.items()})
print(f"vocabulary: {len(vocabulary)} rows, of which {', '.join(SPECIAL_TOKENS)}")
print("read:", data.counts.read, " dropped:", data.counts.dropped)
(chosen,) = [name for name, part in data.splits.items() if patient in part.subject_ids]
part = data.splits[chosen]
number = int(np.flatnonzero(part.subject_ids == patient)[0])
for token in range(part.offsets[number], part.offsets[number] + 8):
    name = vocabulary.codes[part.codes[token]]
    print(f"visit {part.visits[token]:2}   age {part.ages[token]:5.2f}   id {part.codes[token]:3}   {name}")

# %% [markdown]
# Histories are long-tailed, and so are codes: a few are everywhere, most are rare. Both shape what
# follows.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.hist(train.lengths, bins=np.arange(0, train.lengths.max() + 5, 5), color="#0072B2")
left.axvline(50, color="#D55E00", linestyle="--", label="50 positions")
left.set(xlabel="tokens of a history", ylabel="subjects", title="lengths")
left.legend(frameon=False)
frequent = np.sort(vocabulary.counts[len(SPECIAL_TOKENS) :])[::-1]
right.loglog(np.arange(1, len(frequent) + 1), np.maximum(frequent, 0.5), color="#0072B2")
right.set(xlabel="rank of the code", ylabel="events in train", title="codes by frequency")
plt.show()

# %% [markdown]
# ## Rows
#
# The model has 50 positions. One patient a row would leave most of each row empty; packing lets several
# share it. They never see each other: attention stays within a segment. Colours are patients, white is
# padding.

# %%
shapes = {"one subject a row": RowShape(50, packed=False), "packed": RowShape(50)}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for axes, (name, shape) in zip(panels, shapes.items(), strict=True):
    batches = training_batches(train, shape, batch_size=64, seed=0)
    segments = batches.batch(0).segment_ids[:24]
    filled = batches.tokens_per_epoch / (batches.rows * shape.row_length)
    axes.imshow(np.ma.masked_equal(segments, 0), cmap="tab20", interpolation="nearest", aspect="auto")
    axes.set(title=f"{name}: {batches.rows} rows an epoch, {filled:.0%} filled", xlabel="position")
    axes.set_yticks(range(0, len(segments), 4))
panels[0].set_ylabel("row of the batch")
plt.show()

# %% [markdown]
# One packed row: its patients side by side, each with ages, visits and positions of its own, the positions
# from 0; and the mask of who may attend to whom.

# %%
batch = training_batches(train, RowShape(50), batch_size=64, seed=0).batch(0)
row = int(np.argmax(batch.segment_ids.max(axis=1) * (batch.segment_ids.max(axis=1) <= 5)))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(2, 1), layout="constrained")
for name, values, style in (
    ("age in years", batch.ages[row], "-"),
    ("visit", batch.visits[row], "--"),
    ("position", batch.positions[row], ":"),
):
    left.plot(values, style, drawstyle="steps-mid", label=name)
for border in np.flatnonzero(np.diff(batch.segment_ids[row])):
    left.axvline(border + 0.5, color="#bbbbbb", linewidth=0.8)
left.set(xlabel="place in the row", title=f"row {row}: {batch.segment_ids[row].max()} patients")
left.set_ylim(top=1.25 * batch.ages[row].max())
left.legend(frameon=False, ncols=3, loc="upper center")
same = batch.segment_ids[row][:, None] == batch.segment_ids[row][None]
right.imshow(same & (batch.segment_ids[row] > 0), cmap="Blues")
right.set(title="who attends to whom", xlabel="key", ylabel="query")
plt.show()

# %% [markdown]
# A batch is a pure function of the seed and the step: a run that was interrupted goes on with the very
# batches it would have read.

# %%
first, second = (training_batches(train, RowShape(50), batch_size=64, seed=0).batch(7) for _ in range(2))
equal = all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
other = training_batches(train, RowShape(50), batch_size=64, seed=1).batch(7)
print("same seed and step, same batch:", equal)
print("another seed, same batch:", np.array_equal(first.codes, other.codes))
