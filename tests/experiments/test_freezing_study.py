"""The freezing study: its runs, what it leaves behind, and (slow) what it must show."""

import json
from dataclasses import replace

import jax
import pytest

from behrt_jax.config.model import LoRAConfig
from behrt_jax.config.training import InitConfig
from behrt_jax.errors import InputError
from behrt_jax.presets import PRETRAIN
from behrt_jax.training.freezing import count_parameters
from behrt_jax.training.state import set_up
from behrt_jax.workflows.run import RunResult
from experiments.studies import freezing as workflow
from experiments.studies.freezing import (
    FREEZING_STUDIES,
    Cell,
    FreezingStudyConfig,
    cells_of,
    config_of,
    freezing_study,
    freezing_study_command,
    regime_config,
)
from tests.workflows.small_run import SMALL_RUN, changed

ONE = jax.devices()[:1]
SHARED = changed(
    changed(changed(SMALL_RUN, "model", layers=1), "data", subjects=60, vocabulary_size=40, window="first"),
    "train",
    epochs=2,
    validate_every=None,
)
MINIATURE = FreezingStudyConfig(
    SHARED,
    sources=("uniform",),
    masks=("once",),
    regimes=("lora_pretrained", "full"),
    seeds=1,
    timed_steps=0,
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """A study of two runs."""
    config = replace(MINIATURE, output=tmp_path_factory.mktemp("study"))
    study, status = freezing_study(config, ONE)
    assert status == 0
    return config, study


@pytest.mark.slow
def test_a_study_leaves_tables_plots_and_ordinary_runs(miniature):
    config, study = miniature
    assert {path.name for path in config.output.iterdir()} == {"study.json", "study.md", "plots", "runs"}
    assert {path.name for path in (config.output / "plots").iterdir()} == {"loss-uniform-once.png"}
    runs = {path.name: path for path in (config.output / "runs").iterdir()}
    assert runs.keys() == {"uniform-once-full-0", "uniform-once-lora_pretrained-0"}
    assert all((path / "report.html").is_file() for path in runs.values())
    assert json.loads((config.output / "study.json").read_text()) == json.loads(json.dumps(study))
    text = (config.output / "study.md").read_text()
    assert "## uniform data, masks drawn once" in text and "no-leak" not in text
    for cell in study["cells"]:
        assert all(len(curve["mean"]) == 2 for curve in cell["curves"].values())
        assert cell["share_of_attainable_gain"]["mean"] is None
        assert f"| {cell['regime']} | {cell['train_loss_first']['mean']:.3f} |" in text


@pytest.mark.slow
def test_embeddings_come_from_the_full_run_of_the_same_seed(miniature):
    config, _ = miniature
    record = json.loads((config.output / "runs/uniform-once-lora_pretrained-0/config.json").read_text())
    assert record["settings"]["init"]["run"].endswith("uniform-once-full-0")
    assert record["settings"]["init"]["groups"] == ["embedding"]
    assert record["settings"]["freezing"]["groups"] == ["lora", "head"]
    assert record["settings"]["train"]["static_masks"]


@pytest.mark.slow
def test_costs_are_relative_to_full(miniature):
    costs = miniature[1]["costs"]
    assert costs["full"]["flops_of_full"] == 1 and costs["full"]["trainable_percent"] == 100
    assert 0 < costs["lora_pretrained"]["flops_of_full"] < 0.9
    assert costs["full"]["step_seconds"] is None and costs["full"]["time_of_full"] is None


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_others_are_refused(miniature, monkeypatch):
    config, study = miniature

    def no_training(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(workflow, "pretrain", no_training)
    monkeypatch.setattr(workflow, "measure_costs", lambda *_: study["costs"])
    again, status = freezing_study(config, ONE)
    assert (again["cells"], status) == (study["cells"], 0)
    longer = replace(config, pretrain=changed(config.pretrain, "train", epochs=3))
    with pytest.raises(InputError, match=r"was made with train\.epochs 2, and not 3"):
        freezing_study(longer, ONE)
    adapters = replace(config, pretrain=changed(config.pretrain, "lora", targets=("out",)))
    with pytest.raises(InputError, match=r"was made with lora\.targets .*query.*, and not \['out'\]"):
        freezing_study(adapters, ONE)


def test_a_stopped_study_goes_on_with_the_run_that_was_stopped(tmp_path, monkeypatch):
    config = replace(MINIATURE, regimes=("full", "lora_only"), output=tmp_path)
    asked = []

    def stop_second(run, _):
        asked.append((run.name, run.resume))
        run.output.mkdir(parents=True, exist_ok=True)
        values = json.loads(json.dumps(workflow.settings(run)))
        (run.output / "config.json").write_text(json.dumps({"settings": values}))
        stopped = len(asked) == 2
        reason = "interrupted by SIGTERM" if stopped else "finished"
        (run.output / "summary.json").write_text(json.dumps({"stop_reason": reason}))
        return RunResult(run.output, {}, 143 if stopped else 0)

    monkeypatch.setattr(workflow, "pretrain", stop_second)
    monkeypatch.setattr(workflow, "measure_costs", lambda *_: {})
    monkeypatch.setattr(workflow, "read_run", lambda folder: {"folder": folder})
    for name in ("summarise_cells", "judge", "study_text", "plot_study"):
        monkeypatch.setattr(workflow, name, lambda *_: "")
    assert freezing_study(config) == ({}, 143)
    assert not (tmp_path / "study.json").exists()
    freezing_study(config)
    assert asked == [
        ("uniform-once-full-0", False),
        ("uniform-once-lora_only-0", False),
        ("uniform-once-lora_only-0", True),
    ]


def test_what_was_written_before_a_run_started_is_no_obstacle(tmp_path):
    output = tmp_path / "runs" / "uniform-once-full-0"
    output.mkdir(parents=True)
    (output / "vocabulary.parquet").touch()
    config_of(MINIATURE, Cell("uniform", "once", "full", 0), tmp_path)
    assert not output.exists()
    output.mkdir()
    (output / "notes.txt").touch()
    assert not config_of(MINIATURE, Cell("uniform", "once", "full", 0), tmp_path).resume
    assert (output / "notes.txt").exists()


def test_every_seed_has_data_and_initialisation_of_its_own():
    config = replace(MINIATURE, sources=("uniform", "latent"), masks=("fresh", "once"), seeds=2)
    cells = cells_of(config)
    assert [cell.name for cell in cells[:4]] == [
        "uniform-fresh-full-0",
        "uniform-fresh-lora_pretrained-0",
        "uniform-fresh-full-1",
        "uniform-fresh-lora_pretrained-1",
    ]
    assert {(cell.source, cell.masks) for cell in cells} == {
        ("uniform", "fresh"),
        ("uniform", "once"),
        ("latent", "fresh"),
    }
    seeds = {(run.data.seed, run.train.seed) for run in (config_of(config, c, config.output) for c in cells)}
    assert seeds == {(0, 0), (1, 1)}


@pytest.mark.parametrize(
    ("regime", "trainable", "percent"),
    [
        ("full", 20_268_008, 100.0),
        ("lora", 1_745_896, 8.5),
        ("lora_head", 1_169_896, 5.7),
        ("lora_pretrained", 1_169_896, 5.7),
        ("lora_only", 393_216, 1.9),
        ("all_but_adapted", 18_790_376, 92.3),
    ],
)
def test_what_trains_in_the_large_study(regime, trainable, percent):
    setup = set_up(regime_config(FREEZING_STUDIES["large"].pretrain, regime), vocabulary_size=1000)
    counted = count_parameters(setup.shapes, setup.mask)
    assert (counted["trainable"], round(counted["trainable_percent"], 1)) == (trainable, percent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": PRETRAIN["small"]}, r"pretrain\.lora is missing"),
        ({"pretrain": replace(SHARED, resume=True)}, r"pretrain\.resume is set by the study"),
        ({"pretrain": replace(SHARED, init=InitConfig(MINIATURE.output))}, r"pretrain\.init\.run is set by"),
        ({"regimes": ("lora_pretrained",)}, "add full"),
        ({"regimes": ()}, "regimes is empty"),
        ({"regimes": ("full", "full")}, "each once"),
        ({"sources": ("latent",)}, "masks once is for uniform data"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_options_that_do_not_go_together(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        freezing_study(replace(MINIATURE, **{"output": tmp_path, **changes}), ONE)


def test_the_command_reads_its_options(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(workflow, "freezing_study", lambda config: (seen.append(config), ({}, 0))[1])

    def run(*arguments):
        return freezing_study_command(arguments)

    assert run("--quick", "--seeds", "2", "--output", str(tmp_path), "--pretrain.lora.rank", "4") == 0
    assert seen[0].seeds == 2 and seen[0].output == tmp_path
    assert seen[0].pretrain.lora == replace(FREEZING_STUDIES["quick"].pretrain.lora, rank=4)
    large = FREEZING_STUDIES["large"]
    assert run() == 0 and seen[1] == replace(large, output=large.output.absolute())
    assert seen[1].pretrain.lora == LoRAConfig(rank=16)
    assert run("--config", "huge") == 2


@pytest.mark.slow
def test_the_quick_study_shows_what_it_must(tmp_path, monkeypatch):
    """Of each kind of data the regimes that something is claimed of, on a smaller model and less data."""
    monkeypatch.setattr(workflow, "measure_costs", lambda *_: {})
    quick = FREEZING_STUDIES["quick"]
    small = changed(quick.pretrain, "model", layers=1, embedding_size=32, hidden_size=32, heads=2)
    shared = ("full", "lora", "lora_only")
    claimed = {"uniform": shared, "latent": (*shared, "all_but_adapted", "lora_pretrained")}
    # Few subjects are learnt by heart sooner, of many there is more to learn.
    sizes = {"uniform": (120, 100, 5, 8, 1e-2), "latent": (1000, 80, 4, 16, 5e-3)}
    found = set()
    for source, regimes in claimed.items():
        subjects, vocabulary, epochs, batch, rate = sizes[source]
        run = changed(small, "data", subjects=subjects, vocabulary_size=vocabulary)
        run = changed(run, "optimizer", learning_rate=rate)
        study, status = freezing_study(
            replace(
                quick,
                pretrain=changed(run, "train", epochs=epochs, batch_size=batch),
                sources=(source,),
                regimes=regimes,
                output=tmp_path / source,
            ),
            ONE,
        )
        assert status == 0
        assert [verdict for verdict in study["verdicts"] if not verdict["holds"]] == []
        found |= {verdict["id"] for verdict in study["verdicts"]}
    assert found == {
        "no-leak",
        *(f"{name}-{regime}" for name in ("once-memorises", "once-frozen", "fresh-forgets")
          for regime in ("full", "lora")),
        "frozen-latent",
        *(f"learns-latent-{regime}" for regime in claimed["latent"] if regime != "lora_only"),
    }  # fmt: skip
