# %% [markdown]
# # 2. Pretrain, and look at what was learned
#
# Masked codes are predicted from the rest of the history. The records here are drawn from a small model of
# illness (four hidden conditions in three stages), so the best possible loss is known, and it is known as
# well which code belongs to which condition: the model is told neither.

# %%
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from behrt_jax import load
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.diagnosis.finding import read_run
from behrt_jax.presets import PRETRAIN
from behrt_jax.records.load import load_events
from behrt_jax.records.synthetic.latent import latent_model
from behrt_jax.run_folder import of_split
from behrt_jax.workflows.pretrain import pretrain

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Train
#
# `small_latent`, made shorter: fewer subjects and codes, a narrower model. The same on the command line
# would be `behrt-jax pretrain --config small_latent --data.subjects 12000 ...`.

# %%
config = PRETRAIN["small_latent"]
config = replace(
    config,
    model=replace(config.model, hidden_size=64, embedding_size=64),
    data=replace(config.data, subjects=12_000, vocabulary_size=125, difficulty=0.2, tuning_fraction=0.05),
    train=replace(config.train, epochs=8, batch_size=128, log_every=20),
    output=Path("run"),
)
with redirect_stdout(StringIO()) as said:
    pretrain(config)
print("\n".join(line for line in said.getvalue().splitlines() if line.startswith("epoch")))

# %% [markdown]
# ## Curves
#
# A loss means little by itself. Beside it stand predicting each code by its frequency, a table of codes
# that occur together, and the best predictor there is, which knows the model that drew the records: all
# three on the very codes that the validation masks.

# %%
run = read_run(Path("run"))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for split, colour in (("train", "#0072B2"), ("tuning", "#D55E00")):
    lines = of_split(run.metrics, split)
    for axes, name in ((left, "loss"), (right, "accuracy")):
        axes.plot(
            [line["epoch"] for line in lines], [line[name] for line in lines], color=colour, label=split
        )
for name, style in (("unigram", ":"), ("co-occurrence", "-."), ("oracle", "--")):
    for axes, figure_name in ((left, "loss"), (right, "accuracy")):
        axes.axhline(run.baseline(name, figure_name), color="#555555", linestyle=style, label=name)
left.set(xlabel="epoch", ylabel="loss, nats")
right.set(xlabel="epoch", ylabel="accuracy")
right.legend(frameon=False, ncols=2, fontsize=8, loc=(0.1, 0.66))
plt.show()
loss, unigram, best = (
    run.summary["best"]["loss"],
    *(run.baseline(name, "loss") for name in ("unigram", "oracle")),
)
print(f"best validation loss {loss:.3f}: {(unigram - loss) / (unigram - best):.1%} of the attainable gain")

# %% [markdown]
# ## Neighbours of a code
#
# Two lines open the run. `params` is the plain tree of parameters; the code embedding has a row a code.

# %%
model = load("run")
embedding = np.asarray(model.params["behrt"]["embeddings"]["code"]["embedding"])
codes, texts, counts = model.vocabulary.codes, model.vocabulary.descriptions, model.vocabulary.counts
drawn_from = latent_model(len(codes) - len(SPECIAL_TOKENS), config.data.seed, config.data.difficulty)
by_row = drawn_from.emissions.mean(axis=0)  # [rows, codes]: how often each topic notes each code
own = np.stack([by_row[4 * k : 4 * k + 4].sum(axis=0) for k in range(4)])  # [conditions, codes]
truth = {
    code: "care" if code.startswith("CARE") else f"condition {own[:, n].argmax() + 1}"
    for n, code in enumerate(drawn_from.codes)
}
unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
for row in np.argsort(-counts)[:3]:
    near = [other for other in np.argsort(-unit @ unit[row]) if other >= len(SPECIAL_TOKENS)][1:6]
    print(f"{codes[row]} ({truth[codes[row]]}, {counts[row]:,} events)")
    for other in near:
        print(f"    {unit[other] @ unit[row]:5.2f}  {codes[other]:12} {truth[codes[other]]}")

# %% [markdown]
# ## A map of codes
#
# The two directions in which the embeddings differ most (principal components). Colours are the truth.

# %%
first = len(SPECIAL_TOKENS)
centred = unit[first:] - unit[first:].mean(axis=0)
_, _, directions = np.linalg.svd(centred, full_matrices=False)
flat = centred @ directions[:2].T
figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
groups = np.array([truth[code] for code in codes[first:]])
for colour, group in enumerate(sorted(set(groups))):
    inside = groups == group
    axes.scatter(
        *flat[inside].T, s=12 + 60 * counts[first:][inside] / counts.max(), color=f"C{colour}", label=group
    )
axes.legend(frameon=False, fontsize=8)
axes.set(title="code embeddings; size: frequency", xticks=[], yticks=[])
plt.show()
same = groups[:, None] == groups[None]
cosines = unit[first:] @ unit[first:].T
others = ~np.eye(len(groups), dtype=bool)
within, between = cosines[same & others].mean(), cosines[~same].mean()
print(f"mean cosine within a group {within:.3f}, between groups {between:.3f}")

# %% [markdown]
# ## Attention
#
# Of one generated patient: how much each token (down) takes of each other token (across), by layer and
# head. Each row of a picture sums to 1. Grey lines part the visits.

# %%
events = load_events(replace(config.data, subjects=200, seed=9)).events
subjects = events["subject_id"].to_numpy()
ids, lengths = np.unique(subjects, return_counts=True)
patient = events.filter(subjects == ids[np.argmin(np.abs(lengths - 24))])
weights = model.attention(patient)
rows = model.batch(patient)
layers, heads, length, _ = weights.shape
print("weights", weights.shape, "each row sums to 1:", np.allclose(weights.sum(axis=-1), 1, atol=1e-5))
borders = np.flatnonzero(np.diff(rows.visits[0, :length])) + 0.5
figure, panels = plt.subplots(layers, heads, figsize=(9, 4.8), layout="constrained")
for layer, head in np.ndindex(layers, heads):
    axes = panels[layer, head]
    axes.imshow(weights[layer, head], cmap="Blues", vmin=0)
    for border in borders:
        axes.axvline(border, color="#bbbbbb", linewidth=0.5)
        axes.axhline(border, color="#bbbbbb", linewidth=0.5)
    axes.set(title=f"layer {layer}, head {head}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# What the last token takes, over all heads of the last layer:

# %%
taken = weights[-1].mean(axis=0)[-1]
named = [codes[code] for code in rows.codes[0, :length]]
print(f"the last token: {named[-1]}, {truth.get(named[-1], '')}")
for place in np.argsort(-taken)[:6]:
    told = f"visit {rows.visits[0, place]:2}  {named[place]:12} {truth.get(named[place], '')}"
    print(f"takes {taken[place]:.2f} of ", told)
