# %% [markdown]
# # 4. Labels to evaluated predictions
#
# From records to a probability and how far to trust it: prepare, pretrain, make labels, fine-tune an
# adapter a task, predict, evaluate beside simple baselines; then both adapters on one base, asked in one
# pass. Each step is a command (`behrt-jax prepare`, ...) and a function of the same name, used here.

# %%
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from behrt_jax import load
from behrt_jax.adapters import bank
from behrt_jax.config.commands import EvaluateConfig, PredictConfig
from behrt_jax.config.data import DataConfig, MakeLabelsConfig, PrepareConfig
from behrt_jax.config.training import SearchConfig, TaskConfig, TaskTrainConfig, TrainConfig
from behrt_jax.models.behrt import PatientEmbedding
from behrt_jax.presets import FINETUNE, PRETRAIN
from behrt_jax.records.load import load_events
from behrt_jax.records.meds_export import write_meds
from behrt_jax.workflows.evaluate import evaluate
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.make_labels import make_labels
from behrt_jax.workflows.predict import predict
from behrt_jax.workflows.prepare import prepare_records
from behrt_jax.workflows.pretrain import pretrain

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})


def quietly(function, config):
    """Run a command and show the last line of what it says."""
    with redirect_stdout(StringIO()) as said:
        result = function(config)
    print(said.getvalue().rstrip().splitlines()[-1])
    return result


# %% [markdown]
# ## Records
#
# Generated ones, written as a MEDS data set and prepared once. Use your own in their place.

# %%
made = load_events(DataConfig(source="clinical", subjects=4000, vocabulary_size=300))
meds, data = Path("meds"), Path("prepared")
write_meds([made.events], meds, splits={}, descriptions=made.descriptions, dataset_name="generated")
options = PrepareConfig(input=meds, output=data, codes=(".",), exclude_codes=("MEDS_", "SEX"))
_ = quietly(prepare_records, replace(options, tuning_fraction=0.15, held_out_fraction=0.25))

# %% [markdown]
# ## Pretrain

# %%
base = Path("runs/base")
training = TrainConfig(epochs=6, batch_size=64)
source = DataConfig(source="prepared", path=data)
_ = quietly(pretrain, replace(PRETRAIN["small"], data=source, train=training, output=base))

# %% [markdown]
# ## Labels
#
# Two tasks: does a diagnosis of a group occur for the first time within two years, of those who have had
# none. Labels are at the end of one visit of each subject; nothing after it is read. Who leaves before the
# two years are over gets no label, unless the diagnosis came first: hence the large shares of positives.

# %%
tasks = {"circulation": "DX//I", "mind": "DX//F"}
for task, code in tasks.items():
    file = Path(f"{task}.parquet")
    config = MakeLabelsConfig("first_occurrence", data, file, codes=(code,), horizon_days=730, times="random")
    with redirect_stdout(StringIO()):
        make_labels(config)
    values = pq.read_table(file)["boolean_value"].to_numpy()
    print(f"{task} ({code}...): {len(values):,} labels, {values.sum()} positive ({values.mean():.1%})")

# %% [markdown]
# ## Fine-tune
#
# One adapter a task: the base stays frozen, six layers of each block are adapted, and the head is new.

# %%
lora = replace(
    FINETUNE["lora"],
    data=data,
    init=base,
    task=TaskConfig(pooling="mean"),
    search=SearchConfig(size=0),
    train=TaskTrainConfig(epochs=6, batch_size=64),
)
for task in tasks:
    quietly(finetune, replace(lora, labels=Path(f"{task}.parquet"), output=Path("runs", task)))

# %% [markdown]
# ## Predict and evaluate
#
# On the held_out split, which no step so far has read. Figures have 95 % intervals over subjects, and
# stand beside prevalence, logistic regression and gradient boosting on counts of codes in the same
# histories.

# %%
records = {}
for task in tasks:
    predictions = Path(f"{task}_held_out.parquet")
    quietly(predict, PredictConfig(model=Path("runs", task), output=predictions))
    config = EvaluateConfig(predictions=predictions, output=Path("evaluation", task), draws=200)
    records[task] = quietly(evaluate, config)

# %% [markdown]
# An interval that crosses another's says that this much data cannot tell the two apart. With as few labels
# as here, a count of codes often does as well or better than an adapter: look before you choose.
# (`--task.blend counts` joins the two.)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharex=True)
for axes, (task, record) in zip(panels, records.items(), strict=True):
    compared = {"fine-tuned": record["model"]["figures"]}
    compared |= {found["name"]: found["figures"] for found in record["baselines"] if found["figures"]}
    for place, figures in enumerate(compared.values()):
        found = figures["auroc"]
        axes.plot([found["low"], found["high"]], [place, place], color=f"C{place}")
        axes.plot(found["value"], place, "o", color=f"C{place}")
        axes.annotate(f"{found['value']:.3f}", (found["value"], place), (0, 6), textcoords="offset points")
    axes.set_yticks(range(len(compared)), compared)
    axes.set(title=f"{task}: {record['counts']['positives']:.0f} positive", xlabel="AUROC, 95 % interval")
    axes.set_ylim(len(compared) - 0.5, -0.8)
plt.show()

# %% [markdown]
# Discrimination is not all: is a probability of 10 % right one time in ten?

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for axes, (task, record) in zip(panels, records.items(), strict=True):
    bins = record["model"]["reliability"]
    predicted, observed = ([found[name] for found in bins] for name in ("predicted", "observed"))
    axes.plot([0, max(predicted)], [0, max(predicted)], color="#999999", linestyle="--")
    axes.plot(predicted, observed, "o-")
    axes.set(title=task, xlabel="predicted probability", ylabel="observed share")
plt.show()

# %% [markdown]
# ## Both adapters on one base
#
# A service that answers many tasks holds the base once. A bank joins the adapters; each patient of a batch
# is asked by the adapter that it needs, all in one pass. The answers are those of each model alone.

# %%
models = {task: load(Path("runs", task)) for task in tasks}
pretrained = load(base)
adapters = bank.load([Path("runs", task, "adapter") for task in tasks], {"behrt": pretrained.params["behrt"]})
network = PatientEmbedding(pretrained.config, len(pretrained.vocabulary), "mean")
ask = jax.jit(partial(bank.predict, model=network, segments=1))
patients = pretrained.batch(data, split="held_out", limit=64)
answers = [
    np.asarray(ask(adapters, batch=patients, numbers=np.full(64, number, np.int32)))[:, 0, 0]
    for number in range(len(tasks))
]
mixed = np.arange(64, dtype=np.int32) % 2
together = np.asarray(ask(adapters, batch=patients, numbers=mixed))[:, 0, 0]
apart = np.where(mixed, answers[1], answers[0])
print(f"both tasks in one pass, and one by one: logits differ by {np.abs(together - apart).max():.1e}")
for (task, model), logits in zip(models.items(), answers, strict=True):
    alone = np.asarray(model.predict(data, split="held_out").values)[:64, 0]
    probability = 1 / (1 + np.exp(-logits / model.finetuned.calibration.temperature))
    print(f"{task}: bank and model alone differ by {np.abs(probability - alone).max():.1e} in probability")

# %% [markdown]
# The two risks of the same patients, each from its own adapter:

# %%
risks = [1 / (1 + np.exp(-logits)) for logits in answers]
ages = patients.ages.max(axis=1)
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
dots = axes.scatter(*risks, c=ages, cmap="viridis")
figure.colorbar(dots, label="age at the last event")
first, second = tasks
axes.set(xlabel=f"risk, {first}", ylabel=f"risk, {second}", title="64 held_out patients")
plt.show()
