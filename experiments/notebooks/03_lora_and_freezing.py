# %% [markdown]
# # 3. LoRA and freezing
#
# Adapters are a second tree beside the parameters; the model itself knows nothing of them. Which leaves of
# the two trees train is one mask. This notebook looks at both, merges and takes apart again, and then
# makes three mistakes that were really made once, to see how each is caught.

# %%
import math
import textwrap
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import treescope
from flax import linen as nn
from IPython.display import display

from behrt_jax.adapters import lora
from behrt_jax.config.model import FreezingConfig, LoRAConfig, ModelConfig
from behrt_jax.diagnosis.before import check_before
from behrt_jax.diagnosis.finding import RunRecord, from_json, read_run
from behrt_jax.models.attention import SelfAttention
from behrt_jax.models.behrt import BEHRTForMLM, example_batch
from behrt_jax.presets import PRETRAIN
from behrt_jax.run_folder import of_split
from behrt_jax.training.freezing import REGIMES
from behrt_jax.training.state import set_up
from behrt_jax.workflows.pretrain import pretrain
from behrt_jax.workflows.run import parameter_report, settings

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Two trees
#
# Wherever the base has a `kernel` of a layer that is adapted, the second tree has, at the same path, `a`
# of the shape `[in, rank]` and `b` of `[rank, out]`. Below is the attention of the first layer in both.

# %%
model_config, adapters = ModelConfig(), LoRAConfig(rank=8, targets=("query", "value", "out"))
model = BEHRTForMLM(model_config, vocabulary_size=1000)
params = jax.jit(model.init)(jax.random.key(0), example_batch(model_config))["params"]
tree = lora.init(jax.random.key(1), params, adapters)


def attention_of(tree):
    """Shape of each leaf of the first layer's attention."""
    inner = tree["behrt"]["encoder"]["layer_0"]["attention"]
    return {"behrt/encoder/layer_0/attention": jax.tree.map(lambda x: "x".join(map(str, x.shape)), inner)}


beside = {"params": attention_of(params), "lora": attention_of(tree)}
halves = (f"<b>{name}</b>{treescope.render_to_html(part, compressed=False)}" for name, part in beside.items())
html = "".join(f'<div style="flex: 1 1 auto; min-width: 24em">{half}</div>' for half in halves)
display({"text/html": f'<div style="display: flex">{html}</div>', "text/plain": str(beside)}, raw=True)
for layer in lora.adapted_layers(params, adapters):
    ends = layer.inputs, layer.outputs
    print(f"{layer.name:40} kernel {ends}   a {ends[0], layer.rank}   b {layer.rank, ends[1]}")

# %% [markdown]
# ## What each regime trains
#
# Every leaf is in one of four groups: `lora`, `embedding`, `head`, `base`. A regime names the groups that
# train. Here for `large` with rank 16 on `out`: nothing is computed, the shapes are enough.

# %%
large = PRETRAIN["large_lora"]
large = replace(large, lora=replace(large.lora, targets=("out",)))
groups, reports = ("lora", "embedding", "head", "base"), {}
for regime in REGIMES:
    config = replace(large, freezing=FreezingConfig(regime=regime))
    reports[regime] = parameter_report(config.freezing, set_up(config, 1000))
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
left = np.zeros(len(reports))
for colour, group in enumerate(groups):
    widths = np.array([report[group]["trainable"] / 1e6 for report in reports.values()])
    axes.barh(list(reports), widths, left=left, color=f"C{colour}", label=group)
    left += widths
for place, report in enumerate(reports.values()):
    text = f" {report['trainable']:,} ({report['trainable_percent']:.1f} %)"
    axes.text(left[place], place, text, va="center")
axes.set(xlabel="millions of parameters that train", xlim=(0, 29))
axes.invert_yaxis()
axes.legend(frameon=False, loc="center right")
plt.show()

# %% [markdown]
# ## Merge and take apart
#
# `b` starts at zero, so fresh adapters change nothing. After some training (here: random numbers in place
# of it) the adapted model and the merged one, which is a plain model again, say the same.

# %%
rng = np.random.default_rng(0)
batch = example_batch(model_config)._replace(codes=rng.integers(5, 1000, (1, 50)).astype(np.int32))


@jax.jit
def adapted(params, tree):
    with lora.applying(adapters):
        return model.apply({"params": params, "lora": tree}, batch)


plain = jax.jit(lambda params: model.apply({"params": params}, batch))


def difference(one, other):
    """Largest difference of two trees of arrays."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), one, other)))


print(f"fresh adapters change the logits by  {difference(adapted(params, tree), plain(params)):.1e}")
moved = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), tree)
print(f"moved adapters change the logits by  {difference(adapted(params, moved), plain(params)):.1e}")
merged = lora.merge(params, moved, adapters)
print(f"adapted and merged differ by         {difference(adapted(params, moved), plain(merged)):.1e}")
apart = lora.unmerge(merged, moved, adapters)
print(f"taken apart, and the base, differ by {difference(apart, params):.1e}")

# %% [markdown]
# ## Mistake 1: hardly anything is frozen
#
# Adapters on `out`, and only those `out` layers frozen: all else still trains. This was once reported as
# LoRA, with 92.3 % of the parameters trainable. The table of parameters that each run prints shows it, and
# the doctor says so before the first step.

# %%
config = replace(large, freezing=FreezingConfig(regime="all_but_adapted"))
report = reports["all_but_adapted"]
print(f"{report['trainable']:,} of {report['total']:,} train: {report['trainable_percent']:.1f} %\n")


def show(finding):
    """Print what was seen, why it matters and what to do."""
    text = f"{finding.severity} [{finding.id}] {finding.seen} {finding.why} {finding.mend}"
    print(textwrap.fill(text, 100, subsequent_indent="    "))


for finding in check_before(RunRecord(settings(config), report)):
    show(finding)

# %% [markdown]
# ## Mistake 2: embeddings and head frozen at random
#
# Only the adapters train, from scratch. Random embeddings say nothing of the codes, and through a random
# head hardly anything can be said: the loss stays near ln(vocabulary). With embeddings and head trained
# (`lora`) it falls.

# %%
short = PRETRAIN["small_lora"]
short = replace(
    short,
    data=replace(short.data, subjects=800),
    train=replace(short.train, epochs=12, max_steps=120, patience=None, log_every=5),
)


def train(name, config):
    """Run folder of a short training; what it says is left out."""
    with redirect_stdout(StringIO()):
        return pretrain(replace(config, output=Path("runs", name))).folder


runs = {
    name: read_run(train(name, replace(short, freezing=FreezingConfig(name))))
    for name in ("lora", "lora_only")
}
codes = runs["lora"].facts.codes
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for name, run in runs.items():
    lines = of_split(run.metrics, "tuning")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], marker="o", label=name)
by_chance = math.log(codes)
axes.axhline(by_chance, color="#555555", linestyle="--", label=f"ln({codes} codes) = {by_chance:.3f}")
unigram = runs["lora"].baseline("unigram", "loss")
axes.axhline(unigram, color="#999999", linestyle=":", label=f"code frequencies: {unigram:.3f}")
axes.set(xlabel="step", ylabel="validation loss, nats")
axes.legend(frameon=False)
plt.show()
for finding in check_before(runs["lora_only"]):
    if finding.severity == "error":
        show(finding)

# %% [markdown]
# ## Mistake 3: adapters around a layer that is never called
#
# PyTorch's `nn.MultiheadAttention` takes the weight of its `out_proj` and multiplies by it itself. An
# adapter that is wrapped around `out_proj` is then never called: it gets no gradient and stays what it is,
# while every table says that LoRA is on. The same here: an attention that reads the kernel of `out`
# without calling the layer.


# %%
class BypassingAttention(SelfAttention):
    """Attention that multiplies by the kernel of `out` itself."""

    @nn.compact
    def __call__(self, x, segment_ids, deterministic=True, rows=None, packed=True, rotation=None):
        """As `SelfAttention`, without dropout."""
        heads = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            nn.Dense(x.shape[-1], name=name)(x).reshape(heads) for name in ("query", "key", "value")
        )
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mixed = jax.nn.dot_product_attention(query, key, value, mask=same).reshape(x.shape)
        out = nn.Dense(x.shape[-1], name="out")
        if self.is_initializing():
            return out(mixed)
        return mixed @ out.get_variable("params", "kernel") + out.get_variable("params", "bias")


on_out = replace(short, lora=replace(short.lora, targets=("out",)), train=replace(short.train, max_steps=40))
with patch("behrt_jax.models.behrt.SelfAttention", BypassingAttention):
    bypassed = read_run(train("bypassed", on_out))
called = read_run(train("called", on_out))
for name, run in {"never called": bypassed, "called": called}.items():
    norms = of_split(run.metrics, "train")[-1]["gradient_norms"]
    print(f"{name:13} gradient of a: {norms['lora_a']:.1e}, of b: {norms['lora_b']:.1e}")

# %% [markdown]
# The doctor traces the prediction before the first step and finds the adapters on which it does not
# depend. While the run goes on, gradients that are exactly zero and adapters that do not move are found as
# well.

# %%
for finding in from_json(bypassed.summary["findings"]):
    if "adapter" in finding.id or "gradient" in finding.id:
        show(finding)
print("\nOf the run whose layer is called:", end=" ")
print([found["id"] for found in called.summary["findings"] if "adapter" in found["id"]] or "nothing")
