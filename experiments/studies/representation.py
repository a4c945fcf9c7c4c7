"""Study: what each part of the representation is worth, rung by rung, where the best possible is known.

Records are generated from a model whose best possible predictions are known (`records.synthetic.latent`).
Each rung changes one thing of the rung that it stands on: what the model sees of a patient, how it tells
places and times, its layers, its masks. All are pretrained alike and judged on the very same masked codes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from behrt_jax.cli import Command, run_command
from behrt_jax.config.data import DataConfig
from behrt_jax.config.model import FreezingConfig
from behrt_jax.config.training import OptimizerConfig, PretrainConfig, TaskConfig, TrainConfig
from behrt_jax.data.batches import Batch, ValidationBatches
from behrt_jax.data.labels import Labels
from behrt_jax.data.sequences import SequenceSet
from behrt_jax.errors import InputError
from behrt_jax.evaluation.masked_codes import MaskedSplit, mean_interval, share_of_attainable_gain
from behrt_jax.evaluation.performance import Figures, mean_figures, subject_draws
from behrt_jax.files import read_json, write_json
from behrt_jax.presets import MODERN, PRETRAIN, SMALL
from behrt_jax.records.load import load_sequences
from behrt_jax.run_folder import CONFIG_FILE, SUMMARY_FILE
from behrt_jax.tracking.console import Console, open_console
from behrt_jax.tracking.plots import COLOURS, DPI
from behrt_jax.training.devices import make_mesh, put_rows, replicated_shapes, shapes_of
from behrt_jax.training.masking import MaskedCodes
from behrt_jax.training.pretrained import read_parameters
from behrt_jax.training.state import assemble_pretraining, run_keys, set_up
from behrt_jax.training.step import masked_code_losses
from behrt_jax.training.validation import mask_split
from behrt_jax.workflows.finetune import finetune_on
from behrt_jax.workflows.pretrain import predict_baselines, pretrain, split_batches
from behrt_jax.workflows.run import settings
from experiments.studies.forecast import FORECASTS, figures_of, held_out_outputs

RESULT_FILE, PICTURE = "representation_study.json", "representation_study.png"
DRAWS = 1000

# The ladder.


class Rung(NamedTuple):
    """One change."""

    on: str | None
    """The rung that it stands on, whose changes it has too."""
    changes: Mapping[str, Mapping[str, Any]]
    """Section of the pretraining configuration -> its fields."""
    pooling: str = "mean"
    """Of fine-tuning. A rung that changes this alone is fine-tuned from the run that it stands on."""


FIRST = "codes, ages, visits"
"""What BEHRT reads, with learned positions and a row for each visit."""
RUNGS: dict[str, Rung] = {
    FIRST: Rung(None, {}),
    "+ rope": Rung(FIRST, {"model": {"position_embedding": "rope"}}),
    "+ alternating visits": Rung("+ rope", {"model": {"visit_embedding": "alternating"}}),
    "+ facts": Rung("+ alternating visits", {"model": {"fact_tokens": True}}),
    "+ gaps": Rung("+ facts", {"model": {"time": "gaps"}}),
    "+ calendar": Rung("+ gaps", {"model": {"time": "time2vec"}}),
    "rope by days": Rung("+ alternating visits", {"model": {"position_embedding": "rope_time"}}),
    "SwiGLU, RMSNorm, no biases": Rung(
        "+ alternating visits", {"model": {"ffn": "swiglu", "norm": "rms", "bias": False}}
    ),
    "tied decoder": Rung("+ alternating visits", {"model": {"tied_decoder": True}}),
    "20 % masked": Rung("+ alternating visits", {"masking": {"probability": 0.2}}),
    "visits masked": Rung("+ alternating visits", {"masking": {"unit": "visit"}}),
    "attention pooling": Rung("+ alternating visits", {}, pooling="attention"),
    "rope by visits": Rung("+ rope", {"model": {"position_of": "visit"}}),
    "calendar, a row for each visit": Rung("+ calendar", {"model": {"visit_embedding": "ordinal"}}),
    "calendar, no rows for visits": Rung("+ calendar", {"model": {"visit_embedding": "none"}}),
    "as modern_*": Rung("+ alternating visits", {"model": MODERN, "masking": {"probability": 0.2}}),
}
"""The ladder, those with a plus one on the other; the others stand on one of these, each by itself."""

QUICK_RUNGS = (
    *(rung for rung in RUNGS if rung == FIRST or rung.startswith("+")),
    "SwiGLU, RMSNorm, no biases",
    "20 % masked",
    "as modern_*",
)
"""Of the quick study: what stands one on the other, and what makes the ``modern_*`` configurations."""

BASE = replace(
    PRETRAIN["small_latent"],
    name="representation_study",
    model=replace(SMALL, positions=64, dropout=0.0),
    data=DataConfig(
        source="latent",
        subjects=100_000,
        vocabulary_size=300,
        covariates=("sex", "year", "gaps"),
        events_spread=0.6,
        window="first",
        tuning_fraction=0.05,
        held_out_fraction=0.1,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3),
    train=TrainConfig(epochs=6, batch_size=256, log_every=50),
)
_FULL = FORECASTS[0]


@dataclass(frozen=True)
class RepresentationStudyConfig:
    """Pretrain and fine-tune with one part of the representation added after the other, on generated records
    whose best possible predictions are known, and tell what each is worth and costs.

    Broken off, it goes on where it stopped when started again with the same options.
    """

    pretrain: PretrainConfig = field(default_factory=lambda: BASE)
    """What all runs share, before the changes of their rungs."""
    rungs: tuple[str, ...] = tuple(RUNGS)
    """Which, by name; each with the one that it stands on."""
    seeds: int = 3
    """Runs of each; each has its own first parameters, rows and masks."""
    finetune_epochs: int = 5
    """Passes over the labels of fine-tuning."""
    outcome: str = "RX//"
    """Regular expression of the codes, one of which in the next visit is what fine-tuning forecasts."""
    output: Path = Path("runs/representation_study")
    """Folder of all runs; what is there already is not made again."""


def config_of(shared: PretrainConfig, rung: str) -> PretrainConfig:
    """The shared configuration with the changes of a rung and of all that it stands on."""
    on, changes, _ = RUNGS[rung]
    config = shared if on is None else config_of(shared, on)
    return replace(
        config,
        **{section: replace(getattr(config, section), **fields) for section, fields in changes.items()},
    )


def pretrained_as(rung: str) -> str:
    """The rung whose pretraining run this one is fine-tuned from: itself, or what it stands on."""
    on, changes, _ = RUNGS[rung]
    return rung if on is None or changes else on


# The same masked codes for all, however a rung lays out its rows.


class Exam(NamedTuple):
    """Codes of the held_out split that are masked, the same for every model."""

    split: MaskedSplit
    baselines: Mapping[str, Any]
    """Name -> results; ``oracle`` is the best possible."""


def exam_of(config: PretrainConfig, data: SequenceSet) -> Exam:
    """Mask the held_out split as `config.masking` says, in the rows of `config.model`."""
    split = mask_split(
        held_out_batches(config, data), config.masking, run_keys(0).validation, len(data.vocabulary)
    )
    return Exam(split, predict_baselines(config, data, split))


def data_of(config: PretrainConfig, data: SequenceSet) -> SequenceSet:
    """The data as the model of `config` reads them: with static facts, or without."""
    return data.with_facts() if config.model.fact_tokens else data


def held_out_batches(config: PretrainConfig, data: SequenceSet) -> ValidationBatches:
    """One pass over the held_out split, in rows as the model of `config` reads them."""
    data = data_of(config, data)
    parts = {**data.splits, "tuning": data.splits["held_out"]}
    _, batches = split_batches(config, replace(data, splits=parts), make_mesh().size)
    assert isinstance(batches, ValidationBatches)
    return batches


def masked_rows(
    batches: ValidationBatches, split: MaskedSplit
) -> list[tuple[Batch, MaskedCodes, np.ndarray]]:
    """Rows of `batches` with the codes of `split` masked, and which of its targets each slot asks for.

    Whatever else a row has beside the events (facts) is shown as it is. Targets that no row reads, since a
    longer sequence was cut, are left out.

    Returns:
        For each batch its rows as the model sees them, the slots, and int64 `[slots used]`.
    """
    sequences = batches.sequences
    # The same batches with each code replaced by its place in the split.
    places = replace(
        batches, sequences=replace(sequences, codes=np.arange(len(sequences.codes), dtype=np.int32))
    )
    target_of = np.full(len(sequences.codes), -1)
    target_of[split.targets] = np.arange(len(split.targets))
    found, budget = [], 0
    for batch, of_places in zip(batches, places, strict=True):
        events = (batch.segment_ids > 0) & (batch.visits >= 0)  # [B, L]
        place = np.where(events, of_places.codes, 0)
        codes = np.where(events, split.shown[place], batch.codes).astype(np.int32)
        targets = np.where(events, target_of[place], -1)  # [B, L]
        budget = max(budget, int((targets >= 0).sum(axis=1).max()))
        found.append((batch._replace(codes=codes), targets, batch.codes))
    rows = []
    for batch, targets, codes in found:
        columns = np.argsort(targets < 0, axis=1, kind="stable")[:, :budget].astype(np.int32)  # [B, T]
        asked = np.take_along_axis(targets, columns, axis=1)
        used = asked >= 0
        labels = np.where(used, np.take_along_axis(codes, columns, axis=1), 0).astype(np.int32)
        slots: Any = batch.codes, columns, labels, used, np.zeros(len(codes), np.int32)
        rows.append((batch, MaskedCodes(*slots), asked[used]))
    return rows


def exam_losses(
    run: PretrainConfig, data: SequenceSet, exams: Mapping[str, Exam]
) -> dict[str, list[float | None]]:
    """Loss of each masked code of each exam, by the best checkpoint of a run; None where it was not read."""
    assert run.output is not None
    mesh, data = make_mesh(), data_of(run, data)
    setup = set_up(replace(run, lora=None, freezing=FreezingConfig()), len(data.vocabulary), mesh)
    shapes = replicated_shapes(setup.shapes["params"], mesh)
    variables = {"params": read_parameters(run.output, "output", shapes)[0], "lora": {}}

    @jax.jit
    def score(variables: Any, rows: Batch, masked: MaskedCodes) -> jax.Array:
        return masked_code_losses(setup.predictor, variables, rows, masked).losses

    found = {}
    for name, exam in exams.items():
        losses = np.full(len(exam.split.targets), np.nan)
        for rows, masked, asked in masked_rows(held_out_batches(run, data), exam.split):
            placed = put_rows((rows, masked), mesh)
            losses[asked] = np.asarray(score(variables, *placed))[masked.weights]
        found[name] = [None if np.isnan(loss) else float(loss) for loss in losses]
    return found


# The runs, each with what it was judged by.


class Task(NamedTuple):
    """The forecast that every model is fine-tuned on."""

    labels: Labels
    held_out: np.ndarray
    """int64, those of the held_out split."""


def task_of(outcome: str, data: SequenceSet) -> Task:
    """Whether the last visit of a history has a code that `outcome` matches, asked at the end of the visit
    before; of subjects with two visits or more.
    """
    wanted = np.array([re.match(outcome, code) is not None for code in data.vocabulary.codes])
    ids, times, values = [], [], []
    for part in data.splits.values():
        subjects = np.repeat(np.arange(len(part)), part.lengths)
        last = part.visits[part.offsets[1:] - 1]  # [subjects]
        in_last = part.visits == last[subjects]
        begins = part.offsets[1:] - np.bincount(subjects[in_last], minlength=len(part))
        hits = np.bincount(subjects[in_last & wanted[part.codes]], minlength=len(part))
        asked = np.flatnonzero(last > 0)
        ids.append(part.subject_ids[asked])
        times.append(part.times[begins[asked] - 1])
        values.append(hits[asked] > 0)
    labels = Labels(np.concatenate(ids), np.concatenate(times), np.concatenate(values), "boolean")
    return Task(labels, np.flatnonzero(np.isin(labels.subject_ids, data.splits["held_out"].subject_ids)))


def judged_pretraining(
    config: RepresentationStudyConfig, rung: str, seed: int, data: SequenceSet, exams: Mapping[str, Exam]
) -> dict[str, Any]:
    """Losses of a rung's pretraining run, see :func:`exam_losses`; it is made where it is not there yet."""
    run = run_config(config, rung, seed)
    assert run.output is not None
    file = run.output / "held_out.json"
    if not file.is_file():
        if not (run.output / SUMMARY_FILE).is_file() and (status := pretrain(run).exit_status):
            raise SystemExit(status)
        write_json(file, exam_losses(run, data, exams))
    return read_json(file)


def run_config(config: RepresentationStudyConfig, rung: str, seed: int) -> PretrainConfig:
    """The configuration of a pretraining run.

    Raises:
        InputError: its folder holds a run with other settings.
    """
    name = pretrained_as(rung)
    made = config_of(config.pretrain, name)
    folder = config.output / "pretrained" / f"{list(RUNGS).index(name):02d}-{seed}"
    run = replace(
        made,
        name=name,
        train=replace(made.train, seed=made.train.seed + seed),
        output=folder,
        resume=(folder / CONFIG_FILE).is_file(),
    )
    if run.resume:
        stored, given = read_json(folder / CONFIG_FILE)["settings"], settings(run)
        for section in ("model", "data", "masking", "optimizer", "train"):
            if stored.get(section) != given[section]:
                raise InputError(
                    f"{folder} was made with other options ({section}): give the same, or another --output."
                )
    return run


def finetuned(
    config: RepresentationStudyConfig, rung: str, seed: int, data: SequenceSet, task: Task
) -> np.ndarray:
    """Probabilities of the held_out labels after fine-tuning; the run is made where it is not there yet."""
    run = config.output / "finetuned" / f"{list(RUNGS).index(rung):02d}-{seed}"
    file = run / "held_out.json"
    if not file.is_file():
        if not (run / SUMMARY_FILE).is_file():
            pretrained = run_config(config, rung, seed).output
            made = replace(
                _FULL,
                task=TaskConfig(pooling=RUNGS[rung].pooling),  # pyright: ignore[reportArgumentType]
                train=replace(_FULL.train, epochs=config.finetune_epochs, seed=seed),
                init=pretrained,
                output=run,
                resume=(run / CONFIG_FILE).is_file(),
            )
            if status := finetune_on(made, data, task.labels).exit_status:
                raise SystemExit(status)
        read = data_of(run_config(config, rung, seed), data)
        outputs, _ = held_out_outputs(run, read, task.labels.take(task.held_out))
        write_json(file, outputs.tolist())
    return np.array(read_json(file))


def step_flops(config: PretrainConfig, data: SequenceSet) -> float:
    """FLOPs of a compiled training step by the tokens of its rows, padding included."""
    mesh, data = make_mesh(jax.devices()[:1]), data_of(config, data)
    batches, _ = split_batches(config, data, 1)
    assembly = assemble_pretraining(config, len(data.vocabulary), mesh)
    batch = put_rows(batches.batch(0), mesh)
    step = assembly.jit(assembly.step()).lower(assembly.state_shapes, shapes_of(batch)).compile()
    return (step.cost_analysis() or {})["flops"] / batch.codes.size


# What is made of them.


def representation_study(config: RepresentationStudyConfig) -> tuple[dict[str, Any], int]:
    """Make all runs, compare them, and write representation_study.json and a picture.

    Returns:
        The content of the JSON file, and 0. For each rung: the loss of masked codes and its share of the
        attainable gain under each way of masking, AUROC of the forecast, FLOPs of a step by token, and how
        far all of these are from the rung that it stands on, with 95 % intervals over subjects, paired code
        by code (label by label) and averaged over seeds.

    Raises:
        InputError: a wrong option, or a folder with runs of other options.
    """
    _check(config)
    shared = config.pretrain
    with open_console() as console:
        data = load_sequences(shared.data, shared.model.sep_token)
        exams = {"codes": exam_of(shared, data)}
        of_visits = replace(shared, masking=replace(shared.masking, unit="visit"))
        exams["visits"] = exam_of(of_visits, data)
        task = task_of(config.outcome, data)
        losses: dict[str, list[Any]] = {}
        forecasts: dict[str, list[np.ndarray]] = {}
        for rung in config.rungs:
            console.log(f"{rung}: {config.seeds} runs.")
            seeds = range(config.seeds)
            losses[rung] = [judged_pretraining(config, rung, seed, data, exams) for seed in seeds]
            forecasts[rung] = [finetuned(config, rung, seed, data, task) for seed in seeds]
        flops = {
            rung: step_flops(config_of(shared, rung), data)
            for rung in dict.fromkeys(map(pretrained_as, config.rungs))
        }
        found = compare(config, exams, losses, task, forecasts, flops)
        show(console, found)
        write_json(config.output / RESULT_FILE, found)
        plot_ladder(found, config.output / PICTURE)
        console.log(f"Written to {config.output}: {RESULT_FILE}, {PICTURE}.")
    return found, 0


def compare(
    config: RepresentationStudyConfig,
    exams: Mapping[str, Exam],
    losses: Mapping[str, Sequence[Mapping[str, Sequence[float | None]]]],
    task: Task,
    forecasts: Mapping[str, Sequence[np.ndarray]],
    flops: Mapping[str, float],
) -> dict[str, Any]:
    """What :func:`representation_study` returns first."""
    truth = task.labels.values[task.held_out]
    draws = subject_draws(task.labels.subject_ids[task.held_out], DRAWS, seed=0)
    figures: dict[str, Figures] = {
        rung: mean_figures([figures_of(truth, one, draws) for one in of_seeds])
        for rung, of_seeds in forecasts.items()
    }
    rows: dict[str, dict[str, Any]] = {
        rung: {
            "on": RUNGS[rung].on,
            "auroc": figures[rung].entry("auroc"),
            "flops_per_token": flops[pretrained_as(rung)],
        }
        for rung in config.rungs
    }
    known: dict[str, Any] = {}
    for name, exam in exams.items():
        # [rungs, seeds, targets]
        all_losses = {
            rung: np.array([one[name] for one in of_seeds], np.float64) for rung, of_seeds in losses.items()
        }
        read = ~np.any([np.isnan(one).any(axis=0) for one in all_losses.values()], axis=0)
        subjects = exam.split.subjects[read]
        baselines = {key: float(result.losses[read].mean()) for key, result in exam.baselines.items()}
        known[name] = {"targets": int(read.sum()), "not_read": int((~read).sum()), "losses": baselines}
        for rung, row in rows.items():
            own = all_losses[rung][:, read]
            loss = float(own.mean())
            share = share_of_attainable_gain(loss, baselines["unigram"], baselines["oracle"])
            row[name] = {
                "loss": loss,
                "of_seeds": own.mean(axis=1).tolist(),
                "share_of_attainable_gain": share,
            }
            if row["on"] in all_losses:
                gain = all_losses[row["on"]][:, read] - own  # [seeds, targets]
                low, high = mean_interval(gain.mean(axis=0), subjects)
                of_seeds = gain.mean(axis=1).tolist()
                row[name]["gain"] = {
                    "value": float(gain.mean()),
                    "low": low,
                    "high": high,
                    "of_seeds": of_seeds,
                }
    for rung, row in rows.items():
        if row["on"] in rows:
            row["auroc_gain"] = figures[rung].less(figures[row["on"]], "auroc")
            row["flops_ratio"] = row["flops_per_token"] / rows[row["on"]]["flops_per_token"]
    return {
        "settings": settings(config.pretrain),
        "seeds": config.seeds,
        "finetune_epochs": config.finetune_epochs,
        "exams": known,
        "forecast": {"labels": len(truth), "positive": int(truth.sum())},
        "rungs": rows,
    }


def _check(config: RepresentationStudyConfig) -> None:
    shared = config.pretrain
    if shared.data.source != "latent":
        raise InputError("pretrain.data.source must be latent: of other records the optimum is unknown.")
    if config.seeds < 1:
        raise InputError(f"seeds is {config.seeds}: give 1 or more.")
    if unknown := set(config.rungs) - set(RUNGS):
        raise InputError(f"rungs: {min(unknown)!r} is unknown, choose from {', '.join(RUNGS)}.")
    missing = [RUNGS[rung].on for rung in config.rungs if RUNGS[rung].on not in (None, *config.rungs)]
    if missing or not config.rungs:
        raise InputError(f"rungs: {missing[0] if missing else FIRST!r} is missing, on which others stand.")


def show(console: Console, found: Mapping[str, Any]) -> None:
    """The table of a study."""

    def change(entry: Mapping[str, Any] | None) -> str:
        return "" if entry is None else "{value:+.3f} ({low:+.3f} to {high:+.3f})".format_map(entry)

    def cells(rung: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            rung,
            *(
                cell
                for exam in found["exams"]
                for cell in (
                    f"{row[exam]['share_of_attainable_gain']:.1%}",
                    change(row[exam].get("gain")),
                )
            ),
            f"{row['auroc']['value']:.4f}",
            change(row.get("auroc_gain")),
            f"{row['flops_per_token'] / 1e6:.2f}",
        )

    of_exams = [
        column for exam in found["exams"] for column in (f"{exam}: of attainable gain", "nats gained")
    ]
    columns = ("rung", *of_exams, "AUROC", "gained", "MFLOP a token")
    for exam, known in found["exams"].items():
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in known["losses"].items())
        console.log(f"Masked {exam}: {known['targets']:,} targets; {losses}.")
    console.log("Forecast: {labels:,} held_out labels, {positive:,} positive.".format_map(found["forecast"]))
    console.table(
        f"What each rung is worth, mean of {found['seeds']} seeds",
        columns,
        [cells(rung, row) for rung, row in found["rungs"].items()],
    )


def plot_ladder(found: Mapping[str, Any], file: Path) -> None:
    """Draw the share of the attainable gain and the AUROC of each rung, the seeds as points.

    Args:
        found: of :func:`compare`.
        file: PNG to write. Nothing is drawn where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError:
        return
    rungs = found["rungs"]
    places = np.arange(len(rungs))[::-1]
    picture = Picture(figsize=(9.0, 1.2 + 0.36 * len(rungs)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(picture)
    shares, aurocs = picture.subplots(1, 2, sharey=True)
    for number, (exam, known) in enumerate(found["exams"].items()):
        unigram, best = known["losses"]["unigram"], known["losses"]["oracle"]
        for place, row in zip(places, rungs.values(), strict=True):
            of_seeds = [share_of_attainable_gain(loss, unigram, best) for loss in row[exam]["of_seeds"]]
            colour, label = COLOURS[number], f"masked {exam}" if place == 0 else None
            shares.plot(of_seeds, [place] * len(of_seeds), ".", color=colour, markersize=4, alpha=0.6)
            shares.plot(row[exam]["share_of_attainable_gain"], place, "o", color=colour, label=label)
    for place, row in zip(places, rungs.values(), strict=True):
        aurocs.plot([row["auroc"]["low"], row["auroc"]["high"]], [place, place], "-", color=COLOURS[2])
        aurocs.plot(row["auroc"]["value"], place, "o", color=COLOURS[2])
    shares.set_yticks(places, list(rungs))
    shares.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    shares.set_xlabel("share of the attainable gain")
    aurocs.set_xlabel("AUROC of the forecast,\n95 % interval over subjects")
    for axes in (shares, aurocs):
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    picture.savefig(file)


REPRESENTATION_STUDIES = {
    "full": RepresentationStudyConfig(),
    "quick": RepresentationStudyConfig(
        replace(
            BASE,
            model=replace(BASE.model, hidden_size=64),
            data=replace(BASE.data, subjects=6000, held_out_fraction=0.2),
            train=replace(BASE.train, batch_size=64, epochs=6),
        ),
        rungs=QUICK_RUNGS,
        seeds=1,
        finetune_epochs=2,
        output=Path("runs/representation_study_quick"),
    ),
}


def representation_study_command(arguments: Sequence[str]) -> int:
    """Run the study; ``--quick`` is short for ``--config quick``. As :func:`run_command`."""
    study = Command(
        RepresentationStudyConfig,
        f"{__name__}:representation_study",
        named=REPRESENTATION_STUDIES,
        default="full",
        status=itemgetter(1),
    )
    spelt_out = [part for a in arguments for part in (("--config", "quick") if a == "--quick" else (a,))]
    return run_command(study, spelt_out, prog="representation_study.py")
