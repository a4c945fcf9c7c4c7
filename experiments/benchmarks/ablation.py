"""The train step with one optimisation undone at a time, or one option of the model added, in turns with the
step as it is.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import Batch
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from experiments.benchmarks.harness import contest
from experiments.benchmarks.train import ALL_LINEARS

# What each optimisation of the train step is worth: the step with one of them undone at a time.

Settings = Callable[[PretrainConfig, str], tuple[PretrainConfig, str]]


@dataclass(frozen=True)
class Ablation:
    """One optimisation undone."""

    what: str
    """What is done instead, for a person."""
    settings: Settings = lambda config, layout: (config, layout)
    """Configuration and layout of rows, changed."""
    patches: Callable[[], dict[str, Any]] = dict
    """Dotted names in this package -> what is put in their place."""
    micro_batches: int | None = None
    donate: bool = True

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The patches in force."""
        patches = [mock.patch(f"behrt_jax.{name}", value) for name, value in self.patches().items()]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _threefry(key: jax.Array, x: jax.Array, rate: float, rows: jax.Array | None = None) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class _FlaxNorm(nn.Module):
    kind: str = "layer"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(1e-5, dtype=jnp.float32, name="flax")(x)


def _erfc_gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


def _head_everywhere() -> dict[str, Any]:
    from behrt_jax.models.behrt import BEHRTForMLM

    class Everywhere(BEHRTForMLM):
        """Logits at every column, of which the targets are taken afterwards."""

        def __call__(self, batch: Batch, targets: Any = None, *others: Any, **options: Any) -> jax.Array:
            logits = super().__call__(batch, None, *others, **options)
            if targets is None:
                return logits
            return jnp.take_along_axis(logits, targets[:, :, None], axis=1)

    return {"training.state.BEHRTForMLM": Everywhere}


def _with_activations(config: PretrainConfig, layout: str) -> tuple[PretrainConfig, str]:
    if config.lora is None:
        return config, layout
    return replace(config, lora=replace(config.lora, product="activations")), layout


def _all_trains(config: PretrainConfig, layout: str) -> tuple[PretrainConfig, str]:
    config, layout = _with_activations(config, layout)
    return replace(config, freezing=replace(config.freezing, regime="full")), layout


def _norms() -> dict[str, Any]:
    return {"models.behrt.Norm": _FlaxNorm}


def _gelus() -> dict[str, Any]:
    return {"models.behrt.gelu": _erfc_gelu}


def _plain_merging() -> dict[str, Any]:
    return {
        "training.step.Predictor.merged": lambda self, variables: {},
        "adapters.lora.merged_kernel": lambda kernel, a, b, scale: kernel + scale * (a @ b),
        "adapters.lora.merged_product": lambda x, merged, a, b, scale: x @ merged,
    }


no_change = Ablation("nothing")

ABLATIONS: dict[str, Ablation] = {
    "packing": Ablation("one subject a row, padded", lambda config, layout: (config, "padded")),
    "masked_head": Ablation("MLM head at every position", patches=_head_everywhere),
    "hashed_dropout": Ablation(
        "dropout bits of threefry", patches=lambda: {"models.layers.dropout": _threefry}
    ),
    "frozen_gradients": Ablation("gradients and updates of the base too", _all_trains),
    "merged_product": Ablation("adapters on activations", _with_activations),
    "low_rank_backward": Ablation("merged weights, differentiated as they are", patches=_plain_merging),
    "micro_batches": Ablation("the whole batch at once", micro_batches=1),
    "donation": Ablation("a new state beside the old one", donate=False),
    "layer_norm": Ablation("flax.linen.LayerNorm", patches=_norms),
    "gelu": Ablation("jax.nn.gelu, by erfc", patches=_gelus),
}
"""By name of the optimisation that is undone."""


def _with_model(**changes: Any) -> Settings:
    return lambda config, layout: (replace(config, model=replace(config.model, **changes)), layout)


OPTIONS: dict[str, Ablation] = {
    "gaps": Ablation("days between visits, by Time2Vec", _with_model(time="gaps")),
    "time2vec": Ablation("the calendar and days between visits, by Time2Vec", _with_model(time="time2vec")),
    "rope": Ablation("rotary positions in place of a table", _with_model(position_embedding="rope")),
    "rope_time": Ablation("rotary days in place of a table", _with_model(position_embedding="rope_time")),
    "geglu": Ablation("a gate through GELU, as many parameters", _with_model(ffn="geglu")),
    "swiglu": Ablation("a gate through SiLU, as many parameters", _with_model(ffn="swiglu")),
    "rms": Ablation("RMSNorm", _with_model(norm="rms")),
    "no_bias": Ablation("no biases but the decoder's", _with_model(bias=False)),
    "tied_decoder": Ablation("the code table as decoder", _with_model(tied_decoder=True)),
}
"""By name of the option that is added to the model of a named configuration."""
LORA_ONLY = ("frozen_gradients", "merged_product", "low_rank_backward")


@dataclass(frozen=True)
class AblationBenchmark:
    """Time the train step with one optimisation undone at a time, or with one option of the model added, in
    turns with the step as it is.
    """

    size: str = "large"
    """Named configuration, without _lora."""
    regime: Literal["full", "lora"] = "lora"
    """full, or adapters on all six linear layers with embeddings and head."""
    without: tuple[str, ...] = ()
    """Optimisations to undo, by name; all that apply where not given."""
    options: tuple[str, ...] = ()
    """Options of the model to add in place of that, by name, or `all`: time of a step beside its FLOPs, the
    batch in one part."""
    clock: Literal["wall", "processor"] = "wall"
    """processor: of all cores together, which others on the machine change less."""
    patients: int = 128
    """Patients a step."""
    rank: int = 16
    """Of the adapters."""
    vocabulary_size: int = 1000
    """Codes and special tokens."""
    at_once: int = 4
    """Contenders that take turns with the step as it is, before the next ones do; each holds a model."""
    rounds: int = 7
    """Turns of each."""
    output: Path | None = None
    """JSON file for the figures."""


def benchmark_ablation(
    config: AblationBenchmark, configurations: Mapping[str, PretrainConfig] = PRETRAIN
) -> dict[str, Any]:
    """Run it, print a table and return ``settings`` and ``results``: name -> ``what``, ``slower``
    (``[low, median, high]`` over the rounds, quartiles), ``step_seconds``, ``peak_bytes``, and of an option
    ``flops``, its compiled step's as a multiple.

    Raises:
        InputError: an unknown configuration or optimisation, or a contender that failed.
    """
    if config.size not in configurations:
        raise InputError(f"--size: {config.size!r} is unknown, choose from {', '.join(configurations)}.")
    names, among, option = config.without, ABLATIONS, "without"
    if config.options:
        names, among, option = config.options, OPTIONS, "options"
        names = tuple(OPTIONS) if names == ("all",) else names
    names = names or tuple(name for name in among if config.regime == "lora" or name not in LORA_ONLY)
    unknown = sorted(set(names) - set(among))
    if unknown:
        raise InputError(f"--{option}: {unknown[0]!r} is unknown, choose from {', '.join(among)}.")
    pretrain = configurations[config.size]
    common = {
        "kind": "jax",
        "layout": "packed",
        "model": asdict(replace(pretrain.model, compute_dtype="float32")),
        "lora": asdict(LoRAConfig(rank=config.rank, targets=ALL_LINEARS)),
        "learning_rate": pretrain.optimizer.learning_rate,
        "regime": config.regime,
        "patients": config.patients,
        "vocabulary_size": config.vocabulary_size,
        # The compiler counts the FLOPs of one part alone.
        "micro_batches": 1 if config.options else None,
        "steps_per_turn": None,
        "clock": config.clock,
    }
    results: dict[str, Any] = {}
    change = "with" if config.options else "without"
    print(f"{config.size} {config.regime}, {config.patients} patients: time of a step {change}")
    for start in range(0, len(names), config.at_once):
        group = names[start : start + config.at_once]
        tasks = {name: {**common, "without": name} for name in group}
        with contest({"as it is": {**common, "without": None}, **tasks}, config.rounds) as contenders:
            whole, *others = contenders
            for other in others:
                patients = whole.facts["patients_per_step"] / other.facts["patients_per_step"]
                ratio = patients * np.array(other.seconds) / np.array(whole.seconds)  # [rounds]
                low, middle, high = (float(value) for value in np.percentile(ratio, [25, 50, 75]))
                results[other.name] = {
                    "what": among[other.name].what,
                    "slower": [low, middle, high],
                    "step_seconds": float(np.median(other.seconds)),
                    "step_seconds_as_it_is": float(np.median(whole.seconds)),
                    "peak_bytes": other.peak_bytes,
                    "peak_bytes_as_it_is": whole.peak_bytes,
                }
                what = among[other.name].what
                if config.options:
                    flops = other.facts["compiled_flops"] / whole.facts["compiled_flops"] / patients
                    results[other.name]["flops"] = flops
                    what = f"{flops:5.3f} x the FLOPs  {what}"
                print(f"  {other.name:<18} {middle:5.2f} x ({low:.2f} to {high:.2f})  {what}")
    report = {"settings": {**asdict(config), "output": None}, "results": results}
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"Wrote {config.output}.")
    return report
