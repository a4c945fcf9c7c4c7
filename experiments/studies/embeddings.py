"""Study: what vectors of codes are worth as the start of the code embedding, with few subjects and with many.

Records are generated from a model whose best possible predictions are known (`records.synthetic.latent`).
Skip-gram vectors are trained on the train split, then the same model is pretrained on a share of its subjects
in three ways: from random embeddings, from the vectors, and from the vectors with all embeddings frozen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from behrt_jax.cli import Command, run_command
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import InitConfig, OptimizerConfig, PretrainConfig, TrainConfig
from behrt_jax.data.batches import RowShape, ValidationBatches, validation_batches
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedSplit, mean_interval, share_of_attainable_gain
from behrt_jax.files import write_bytes, write_json
from behrt_jax.presets import PRETRAIN, SMALL
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import SUMMARY_FILE
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.training.devices import make_mesh, replicated_shapes
from behrt_jax.training.pretrained import read_parameters
from behrt_jax.training.state import run_keys, set_up
from behrt_jax.training.validation import make_scoring_step, mask_split, score_masked_codes
from behrt_jax.weights.code_vectors import VECTORS_FILE, first_rows, read_vectors, vector_files
from behrt_jax.workflows.pretrain import predict_baselines, pretrain
from experiments.studies.skipgram import SkipGramConfig, skipgram_vectors

RESULT_FILE = "embedding_study.json"
START = "random"
"""The strategy that the others are compared with."""
STRATEGIES = (START, "vectors", "vectors, frozen")
VALIDATIONS = 12
"""Of a run, at most."""

BASE = replace(
    PRETRAIN["small_latent"],
    name="embedding_study",
    model=replace(SMALL, hidden_size=64),
    data=DataConfig(
        source="latent",
        subjects=10_000,
        vocabulary_size=300,
        window="first",
        tuning_fraction=0.1,
        held_out_fraction=0.1,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    train=TrainConfig(epochs=10, batch_size=64, patience=4, log_every=50),
)


@dataclass(frozen=True)
class EmbeddingStudyConfig:
    """Pretrain from random embeddings, from vectors, and from vectors that are frozen, on shares of generated
    subjects, and compare them on the held_out split.
    """

    pretrain: PretrainConfig = field(default_factory=lambda: BASE)
    """What all runs share. Its epochs are those of all subjects; a share of them has as many more as make
    the steps one in `1 / sqrt(share)` of theirs."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the train split's subjects."""
    seeds: int = 2
    """Runs of each kind; each has its own first parameters, masks and order."""
    skipgram: SkipGramConfig = field(default_factory=SkipGramConfig)
    """How vectors are trained (not data and output)."""
    vectors_of: Literal["all", "same"] = "all"
    """Subjects that vectors are trained on: all of the train split, as where vectors come from elsewhere, or
    the same as the model's."""
    output: Path = Path("runs/embedding_study")
    """Folder of all runs; what is there already is not made again."""


def embedding_study(config: EmbeddingStudyConfig) -> dict[str, Any]:
    """Make all runs, and compare them on the same masked codes of the held_out split.

    Returns:
        What is written to embedding_study.json: for each share the loss of each strategy, mean over seeds,
        its share of the attainable gain, and by how much it is below that of random embeddings, with a 95 %
        interval over subjects, paired code by code.

    Raises:
        InputError: the source is not latent, or another wrong option.
    """
    shared = config.pretrain
    if shared.data.source != "latent":
        raise InputError("pretrain.data.source must be latent: of other records the optimum is unknown.")
    rows = []
    with open_console() as console:
        for fraction in config.fractions:
            of_share = replace(shared, data=replace(shared.data, train_fraction=fraction))
            data = load_sequences(of_share.data, shared.model.sep_token, shared.model.fact_tokens)
            start = Start(len(data.splits["train"]), train_vectors(config, data, fraction))
            judge = Judge.of(of_share, data)
            losses = {}
            for strategy in STRATEGIES:
                runs = [run_config(config, of_share, strategy, seed, start) for seed in range(config.seeds)]
                for run in runs:
                    assert run.output is not None
                    if not (run.output / SUMMARY_FILE).is_file() and (status := pretrain(run).exit_status):
                        raise SystemExit(status)
                losses[strategy] = [judge.losses(run) for run in runs]
            given = first_rows(read_vectors(start.vectors), data.vocabulary, of_share).coverage
            known = {"fraction": fraction, "subjects": start.subjects, "coverage": given}
            rows.append({**known, **judge.compare(losses)})
            show(console, rows)
        result = {"vectors_of": config.vectors_of, "seeds": config.seeds, "rows": rows}
        write_json(config.output / RESULT_FILE, result)
        console.log(f"Written: {config.output / RESULT_FILE}")
    return result


class Start(NamedTuple):
    """What runs on a share of the subjects start with."""

    subjects: int
    """Subjects to train on."""
    vectors: Path
    """File of vectors."""


def train_vectors(config: EmbeddingStudyConfig, data: SequenceSet, fraction: float) -> Path:
    """File of skip-gram vectors; `data` has the train subjects of this share."""
    name = "all" if config.vectors_of == "all" else f"{fraction:g}"
    path = config.output / f"vectors_of_{name}" / VECTORS_FILE
    if not path.is_file():
        if config.vectors_of == "all" and fraction != 1:
            data = load_sequences(config.pretrain.data, config.pretrain.model.sep_token)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, vector_files(skipgram_vectors(data, config.skipgram))[VECTORS_FILE])
    return path


def run_config(
    config: EmbeddingStudyConfig, shared: PretrainConfig, strategy: str, seed: int, start: Start
) -> PretrainConfig:
    """The configuration of one run, as :func:`behrt_jax.workflows.pretrain.pretrain` takes it.

    Args:
        config: of the study.
        shared: its `pretrain`, with a share of the subjects.
        strategy: one of `STRATEGIES`.
        seed: from 0.
        start: of runs on this share.
    """
    # Fewer subjects make fewer steps an epoch.
    epochs = round(shared.train.epochs / shared.data.train_fraction**0.5)
    steps = epochs * math.ceil(start.subjects / shared.train.batch_size)
    name = f"{strategy.replace(', ', '_')}_{shared.data.train_fraction:g}_{seed}"
    frozen = FreezingConfig(groups=("head", "base"))
    return replace(
        shared,
        name=name,
        train=replace(
            shared.train,
            epochs=epochs,
            validate_every=math.ceil(steps / VALIDATIONS),
            seed=shared.train.seed + seed,
        ),
        init=InitConfig() if strategy == START else InitConfig(vectors=start.vectors),
        freezing=frozen if strategy == STRATEGIES[-1] else FreezingConfig("full"),
        output=config.output / config.vectors_of / name,
    )


@dataclass(frozen=True, eq=False)
class Judge:
    """Masked codes of the held_out split, the same for every model."""

    batches: ValidationBatches
    masked: MaskedSplit
    scoring_step: Any
    shapes: Any
    baselines: Mapping[str, Any]
    """Name -> results of those masked codes."""

    @classmethod
    def of(cls, config: PretrainConfig, data: SequenceSet) -> "Judge":
        """That of models of this configuration, whatever they started from."""
        mesh, key = make_mesh(), run_keys(0).validation
        setup = set_up(replace(config, lora=None, freezing=FreezingConfig()), len(data.vocabulary), mesh)
        shape = RowShape(config.model.positions, cls_token=config.model.cls_token, multiple_of=mesh.size)
        window = config.data.window
        batches = validation_batches(data.splits["held_out"], shape, rows_per_batch=32, window=window)
        masked = mask_split(batches, config.masking, key, len(data.vocabulary))
        step = jax.jit(make_scoring_step(setup.predictor, config.masking, key))
        shapes = replicated_shapes(setup.shapes["params"], mesh)
        return cls(batches, masked, step, shapes, predict_baselines(config, data, masked))

    def losses(self, run: PretrainConfig) -> np.ndarray:
        """Loss of each masked code, float ``[targets]``, by the best checkpoint of a run."""
        assert run.output is not None
        params, _ = read_parameters(run.output, "output", self.shapes)
        variables = {"params": params, "lora": {}}
        losses, _, _ = score_masked_codes(self.scoring_step, variables, self.batches, make_mesh())
        return losses.astype(np.float64)

    def compare(self, losses: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
        """Figures of baselines and strategies; of these one array of losses for each seed."""
        subjects = self.baselines["unigram"].subjects
        known = {name: float(found.losses.mean()) for name, found in self.baselines.items()}
        found: dict[str, Any] = {"targets": len(subjects), "baselines": known, "strategies": {}}
        start = np.mean(losses[START], axis=0)
        for name, of_seeds in losses.items():
            mean = np.mean(of_seeds, axis=0)  # [targets]
            gain = start - mean
            low, high = mean_interval(gain, subjects)
            found["strategies"][name] = {
                "loss": float(mean.mean()),
                "of_seeds": [float(one.mean()) for one in of_seeds],
                "share_of_attainable_gain": share_of_attainable_gain(
                    float(mean.mean()), known["unigram"], known["oracle"]
                ),
                "below_random": {"value": float(gain.mean()), "low": low, "high": high},
            }
        return found


def show(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of what is known so far."""

    def cells(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
        found, known = row["strategies"][name], row["baselines"]
        gain = found["below_random"]
        less = "" if name == START else "{value:.3f} ({low:.3f} to {high:.3f})".format_map(gain)
        return (
            f"{row['fraction']:.0%} ({row['subjects']:,})",
            *(f"{known[baseline]:.3f}" for baseline in ("unigram", "co-occurrence", "oracle")),
            name,
            f"{found['loss']:.3f}",
            f"{found['share_of_attainable_gain']:.1%}",
            less,
        )

    baselines = ("unigram", "co-occurrence", "best possible")
    columns = ("subjects", *baselines, "embeddings from", "loss", "of attainable gain", "below random")
    console.table(
        "Loss on held_out (nats)", columns, [cells(row, name) for row in rows for name in row["strategies"]]
    )


def embedding_study_command(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status of :func:`behrt_jax.cli.run_command`."""
    study = Command(EmbeddingStudyConfig, f"{__name__}:embedding_study")
    return run_command(study, arguments, prog="embedding_study.py")
