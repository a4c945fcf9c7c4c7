"""The commands: their table, options, help, and one clear error for each mistake before anything is done."""

import errno
import importlib
import inspect
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt_jax.cli import COMMANDS, Command, main, parse
from behrt_jax.config.training import FinetuneConfig
from behrt_jax.errors import DivergenceError, InputError
from behrt_jax.presets import MODERN, PRETRAIN
from behrt_jax.workflows import pretrain as module
from behrt_jax.workflows.run import RunResult
from tests.records.meds_folder import by_remainder, history_rows, write_meds

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "pretrain.py"

# The table.


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_function_of_its_options(name):
    command = COMMANDS[name]
    module, function = command.run.split(":")
    first = next(
        iter(inspect.signature(getattr(importlib.import_module(module), function)).parameters.values())
    )
    assert first.annotation is command.options
    assert all(isinstance(config, command.options) for config in command.named.values())
    assert command.default in (command.named or {""})


def test_help_lists_each_command_in_a_line(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: behrt-jax COMMAND")
    listed = [line.split(maxsplit=1) for line in shown.splitlines() if line.startswith("  ")]
    assert listed == [[name, command.help] for name, command in COMMANDS.items()]
    assert list(COMMANDS) == [
        "prepare", "pretrain", "make-labels", "finetune", "combine-adapters", "predict", "ask", "evaluate",
        "export", "import-weights", "doctor", "report",
    ]  # fmt: skip
    assert main([]) == 2
    assert capsys.readouterr().err == shown


def test_the_list_of_commands_needs_the_standard_library_alone():
    script = (
        "import sys; before = set(sys.modules); from behrt_jax.cli import main; main(['--help']); "
        "found = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print('found', *sorted(found - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found behrt_jax"


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert main(["pretrian", "--config", "small"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: 'pretrian' is no command: did you mean pretrain? behrt-jax --help lists all."
    assert main(["make_labels"]) == 2
    assert "did you mean make-labels?" in capsys.readouterr().err
    assert main(["--config", "small"]) == 2
    assert capsys.readouterr().err == "error: '--config' is no command: behrt-jax --help lists all.\n"


def help_of(run, capsys):
    """First line of the help that this prints, and the rest."""
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 0
    return capsys.readouterr().out.split("\n", 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_script_of_a_command_has_its_options(name, monkeypatch, capsys):
    file = f"{name.replace('-', '_')}.py"
    usage, options = help_of(lambda: main([name, "--help"]), capsys)
    assert usage.startswith(f"usage: behrt-jax {name} [-h]")
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    of_script = help_of(lambda: runpy.run_path(str(SCRIPT.with_name(file)), run_name="__main__"), capsys)
    assert of_script[0].startswith(f"usage: {file} [-h]")
    assert of_script[1] == options


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_with_what_everybody_needs_and_has_every_option_once(name, monkeypatch, capsys):
    import tyro

    command = COMMANDS[name]
    monkeypatch.setenv("COLUMNS", "100")
    _, shown = help_of(lambda: main([name, "--help"]), capsys)
    first, _, others = shown.split("What everybody needs:\n")[1].partition("\n\n")
    named = re.compile(r"^  --([a-z_.]+)", re.MULTILINE)
    assert named.findall(first) == list(command.first)
    of_parser = ["--help"], command.named.get(command.default, command.options())
    _, expected = help_of(lambda: tyro.cli(command.options, args=of_parser[0], default=of_parser[1],
                                           use_underscores=True, config=(tyro.conf.AvoidSubcommands,)),
                          capsys)  # fmt: skip
    options = re.findall(r"^\W+--([a-z_.]+)", expected, re.MULTILINE)
    assert len(command.first) == min(5, len(options))
    short = [option for option in command.first if option not in options]
    assert sorted(named.findall(first + "\n" + others)) == sorted(options + short)
    assert short in ([], ["config"], ["config", "data"])
    assert len(command.first) == min(5, len(options + short))


@pytest.mark.parametrize(("columns", "width"), [("40", 80), ("93", 93), ("300", 100)])
def test_help_is_as_wide_as_can_be_read(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for name in COMMANDS:
        _, shown = help_of(lambda name=name: main([name, "--help"]), capsys)
        longest = max(map(len, shown.splitlines()))
        assert width - 12 < longest <= width, name


def test_help_shows_the_values_of_the_named_configuration(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setitem(sys.modules, "tyro", None)  # which it does without
    _, small = help_of(lambda: main(["pretrain", "--config", "small", "--help"]), capsys)
    _, large = help_of(lambda: main(["pretrain", "-h", "--config", "large_lora"]), capsys)
    assert re.search(r"--model.layers INT +Number of transformer blocks. \(default: 2\)", small)
    assert re.search(r"--model.layers INT +Number of transformer blocks. \(default: 6\)", large)
    assert "Shown are the values of large_lora." in large
    assert "\nlora: Low-rank adapters" in large and "--lora.rank" not in small
    words = " ".join(large.split())
    assert re.search(r"--lora.targets \[STR ...\] [^[]*\(default: query key value out\)", words)


def test_plain_words_are_the_values_of_one_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["a"], ["--run", "a"], ["a", "--output", "b"], ["--output", "b", "a"],
                      ["--output=b", "a"]):  # fmt: skip
        config = parse(COMMANDS["doctor"], arguments, "doctor")
        assert config.run == tmp_path / "a"
        assert config.output == (tmp_path / "b" if len(arguments) > 1 and "--run" not in arguments else None)
    several = Command(FinetuneConfig, "", positional="labels")
    config = parse(several, ["--resume", "--train.epochs", "2", "a", "--population.values", "1", "2"], "x")
    assert (config.labels, config.resume, config.train.epochs) == (tmp_path / "a", True, 2)
    assert config.population.values == (1.0, 2.0)
    for command, arguments in (("doctor", ["a", "b"]), ("evaluate", ["a"])):
        with pytest.raises(SystemExit):
            parse(COMMANDS[command], arguments, command)


def test_statuses_of_what_ran(tmp_path):
    stopped = RunResult(tmp_path, {}, 143)
    assert COMMANDS["pretrain"].status(stopped) == COMMANDS["finetune"].status(stopped) == 143
    assert COMMANDS["prepare"].status({"subjects": 3}) == COMMANDS["doctor"].status([]) == 0


def test_the_package_runs_as_a_module():
    def run(*arguments):
        command = [sys.executable, "-m", "behrt_jax", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = run("--help")
    assert listed.returncode == 0 and listed.stdout.startswith("usage: python -m behrt_jax COMMAND")
    wrong = run("evaluate", "--output", "there")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --predictions is missing")


def test_what_commands_need_is_told_where_it_is_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["predict"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "pip install 'behrt-jax[commands]'" in line


# Options of pretraining.


def parsed(*arguments):
    return parse(COMMANDS["pretrain"], arguments, prog="pretrain.py")


def test_names_of_the_configurations():
    sizes = ("small", "medium", "large", "base", "xl", "long")
    both = [name for size in sizes for name in (size, f"{size}_lora")]
    modern = [f"modern_{name}" for name in (*both[:8], "small_latent", "small_latent_lora")]
    assert list(PRETRAIN) == [*both, "paper", "small_latent", "small_latent_lora", *modern]
    assert all(config.name == name for name, config in PRETRAIN.items())


def test_modern_configurations_have_the_sizes_of_their_namesakes():
    for name in (name for name in PRETRAIN if name.startswith("modern_")):
        config, plain = PRETRAIN[name], PRETRAIN[name.removeprefix("modern_")]
        assert (config.model.position_embedding, config.model.visit_embedding) == ("rope", "alternating")
        assert (config.model.ffn, config.model.norm, config.model.bias) == ("swiglu", "rms", False)
        assert config.masking.probability == 0.2
        as_before = replace(config.model, **{option: getattr(plain.model, option) for option in MODERN})
        assert replace(config, name=plain.name, model=as_before, masking=plain.masking) == plain


def test_large_lora_is_what_it_is_said_to_be():
    config = parsed("--config", "large_lora")
    assert (config.data.subjects, config.train.epochs, config.train.batch_size) == (5000, 100, 128)
    assert (config.model.dropout, config.optimizer.weight_decay) == (0.2, 0.01)
    assert (config.lora and config.lora.rank, config.train.patience) == (16, 10)


def test_overrides_are_typed_and_leave_the_rest():
    config = parsed(
        "--config=large_lora", "--lora.targets", "out", "query", "--train.max_steps", "1", "--data.no_packed",
        "--optimizer.learning_rates.lora", "3e-3", "--freezing.groups", "lora", "head",
    )  # fmt: skip
    assert config.lora and config.lora.targets == ("out", "query")
    assert config.lora.rank == 16
    assert config.train.max_steps == 1
    assert config.data.packed is False
    assert config.optimizer.learning_rates.lora == 3e-3
    assert config.freezing.groups == ("lora", "head")
    assert config.model == PRETRAIN["large_lora"].model


def test_data_is_short_for_prepared_data_at_a_path():
    for arguments in (["--data", "prepared/x"], ["--data=prepared/x"]):
        config = parsed(*arguments, "--data.window", "recent")
        assert (config.data.source, config.data.path) == ("prepared", Path.cwd() / "prepared" / "x")
        assert config.data.window == "recent"
    for arguments in (["--data"], ["--data", "--train.epochs", "3"]):
        with pytest.raises(InputError, match="--data needs the folder"):
            parsed(*arguments)


def test_every_path_is_resolved_where_options_become_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = parsed(
        "--data=~/x", "--init.run", "runs/../runs/a", "--output=~/[b]*$c:ü d", "--compilation_cache", "off"
    )
    assert (config.data.path, config.init.run) == (tmp_path / "x", tmp_path / "runs" / "a")
    assert (config.output, config.compilation_cache) == (tmp_path / "[b]*$c:ü d", "off")
    command = COMMANDS["finetune"]
    config = parse(
        command, ["--population.labels", "~/a.parquet", "b/../c.parquet", "--init=~/r"], "finetune"
    )
    assert config.population.labels == (tmp_path / "a.parquet", tmp_path / "c.parquet")
    assert config.init == tmp_path / "r"


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_is_told_before_anything_is_read(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([name, "--output", str(tmp_path / "file" / "out.parquet")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot write") and "Give another --output" in line


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DivergenceError("Loss nan\nat step 3"), 1),
        (InputError("/a\nb is not there"), 2),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (KeyError("x"), 70),
    ],
)
def test_whatever_ends_a_command_is_one_line(error, status, tmp_path, monkeypatch, capsys):
    def fails(config):
        raise error

    monkeypatch.setattr("behrt_jax.workflows.doctor.examine_folder", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["doctor"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_an_interruption_waits_until_libraries_are_imported(monkeypatch, capsys):
    def parsing(*_):
        signal.raise_signal(signal.SIGINT)
        reached.append(True)

    reached = []
    monkeypatch.setattr("behrt_jax.cli.parse", parsing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["doctor"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached and capsys.readouterr().err.startswith("error: interrupted by SIGINT")


STREAMS = """
import os, sys
from behrt_jax.tracking.console import lasting_streams, open_console
with lasting_streams():
    print("第 1")
    sys.stdin.readline()  # until nobody reads any more
    with open_console() as console:
        console.log("第 2")
    print("third")
    print("第", file=sys.stderr)
sys.exit(7)
"""


def test_a_command_outlives_the_reader_of_its_output():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        [sys.executable, "-c", STREAMS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout.readline() == b"? 1\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (7, b"\\u7b2c\n")


def test_a_command_runs_with_its_output_closed():
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} -m behrt_jax doctor >&- 2>&-"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2


def test_help_names_configurations_and_explains_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parsed("--config", "small_lora", "--help")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        *PRETRAIN,
        "--lora.targets",
        "--train.static_masks",
        "--data.path",
        "Inner width of every adapter",
    ):
        assert part in text
    sections = ("model", "lora", "freezing", "data", "masking", "optimizer", "train")
    for section in sections:
        assert f"--{section}." in text


@pytest.fixture(scope="module")
def meds(tmp_path_factory):
    """A healthy MEDS folder and broken ones, by name."""
    root = tmp_path_factory.mktemp("meds")
    rows = history_rows(subjects=40)
    splits = by_remainder(rows)
    write_meds(root / "healthy", rows, splits=splits)
    write_meds(root / "no_code", rows, splits=splits, leave_out=("code",))
    write_meds(root / "no_train", rows, splits={"tuning": splits["tuning"], "held_out": splits["train"]})
    (root / "empty" / "data").mkdir(parents=True)
    pq.write_table(
        pa.table({"subject_id": pa.array([], pa.int64()), "time": pa.array([], pa.timestamp("us")),
                  "code": pa.array([], pa.string())}),
        root / "empty" / "data" / "0.parquet",
    )  # fmt: skip
    return root


CUDNN = ["--model.attention", "cudnn", "--model.compute_dtype", "bfloat16", "--model.attention_dropout", "0"]
MISTAKES = {
    "unknown configuration": (["--config", "large_lorra"], "choose one of small, small_lora, medium"),
    "no name after --config": (["--config"], "--config needs a name"),
    "adapters of a model without any": (["--config", "small", "--lora.rank", "4"], "small has no adapters"),
    "regime without adapters": (["--config", "small", "--freezing.regime", "lora"], "has no adapters"),
    "no path": (["--data.source", "meds"], "data.path is missing"),
    "missing path": (["--data.source", "meds", "--data.path", "{meds}/nowhere"], "nowhere"),
    "parquet without code": (["--data.source", "meds", "--data.path", "{meds}/no_code"], "code"),
    "empty data set": (["--data.source", "meds", "--data.path", "{meds}/empty"], "no event"),
    "no train split": (["--data.source", "meds", "--data.path", "{meds}/no_train"], "train"),
    "path of a generated source": (["--data.path", "{meds}/healthy"], "add --data.source meds"),
    "length over positions": (["--data.max_length", "51"], "the model has 50 positions"),
    "rotation of odd heads": (
        ["--model.position_embedding", "rope", "--model.hidden_size", "60"], "heads have the odd size 15"
    ),
    "days and visits": (
        ["--model.position_embedding", "rope_time", "--model.position_of", "visit"], "rope_time counts days"
    ),
    "hidden not divisible by heads": (["--model.heads", "5"], "not divisible by model.heads 5"),
    "cudnn in float32": (
        ["--model.attention", "cudnn"], "needs bfloat16, but model.compute_dtype is float32"),
    "cudnn with dropout": (
        ["--model.attention", "cudnn", "--model.compute_dtype", "bfloat16"],
        "set model.attention_dropout to 0"),
    "cudnn with odd heads": (
        [*CUDNN, "--model.heads", "32"], "model.hidden_size / model.heads is 4: change one of them"),
    "cudnn without a GPU": (CUDNN, "needs an NVIDIA GPU, but JAX runs on cpu"),
    "alpha that is no number": (["--lora.alpha", "nan"], "lora.alpha is nan"),
    "decay that is no number": (["--optimizer.weight_decay", "nan"], "optimizer.weight_decay is nan"),
    "rate without end": (["--optimizer.learning_rate", "inf"], "optimizer.learning_rate is inf"),
    "moment that never decays": (["--optimizer.b2", "1"], "optimizer.b2 is 1.0"),
    "rank 0": (["--lora.rank", "0"], "lora.rank is 0"),
    "target that matches nothing": (["--lora.targets", "qkv"], "Names that could match: decoder"),
    "merged where it would be wrong": (
        ["--lora.product", "merged", "--lora.dropout", "0.1"], "lora.dropout is above 0"),
    "broken pattern": (["--data.codes", "DX//("], "data.codes has 'DX//('"),
    "too small a vocabulary": (["--data.vocabulary_size", "20"], "data.vocabulary_size"),
    "batch of nothing": (["--train.batch_size", "0"], "train.batch_size is 0"),
    "nothing to predict": (["--masking.probability", "0"], "masking.probability is 0"),
    "an address in place of a path": (["--init.run", "gs://bucket/run"], "gs://bucket/run is an address"),
    "another word than auto": (["--distributed", "slurm"], "--distributed takes the word auto"),
    "processes without their number": (
        ["--distributed.coordinator", "localhost:1"], "distributed.processes is missing"),
    "a coordinator without a port": (
        ["--distributed.coordinator", "host", "--distributed.processes", "2", "--distributed.process", "0"],
        "give HOST:PORT"),
    "a process that is none": (
        ["--distributed.coordinator", "h:1", "--distributed.processes", "2", "--distributed.process", "2"],
        "distributed.process is 2 of 2: give 0 to 1"),
    "auto and a process": (["--distributed", "auto", "--distributed.process", "0"], "leave out auto, or"),
    "resume without a run": (["--resume"], "holds no run to go on with"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_before_training(mistake, meds, tmp_path, capsys):
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(meds=meds) for argument in arguments]
    status = main(["pretrain", *arguments, "--output", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "step 1" not in captured.out
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_with_another_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["pretrain", "--output", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_takes_an_address_for_its_output(name, tmp_path, monkeypatch, capsys):
    """And makes no folder of its name."""
    monkeypatch.chdir(tmp_path)
    assert main([name, "--output", "s3://bucket/mine"]) == 2
    assert "error: s3://bucket/mine is an address, not a path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_distributed_auto_is_spelled_out():
    for arguments in (["--distributed", "auto"], ["--distributed=auto"], ["--distributed.auto"]):
        assert parsed(*arguments).distributed.auto
    assert not parsed().distributed.auto


def test_an_option_without_meaning_leaves_with_status_2():
    with pytest.raises(SystemExit) as left:
        parsed("--train.epocs", "3")
    assert left.value.code == 2


def test_parse_raises_for_callers():
    with pytest.raises(InputError):
        parsed("--config", "none")


@pytest.mark.slow
def test_large_lora_with_adapters_on_out_prints_the_figures(tmp_path, monkeypatch, capsys):
    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    # The figures are printed and stored, and no step is compiled.
    monkeypatch.setattr(module, "on_device", lambda *_: True)
    monkeypatch.setattr(module, "open_checkpoints", stop)
    options = ["--lora.targets", "out", "--data.subjects", "300", "--output", str(tmp_path / "run")]
    with pytest.raises(Reached):
        module.pretrain(parsed("--config", "large_lora", *options))
    parameters = json.loads((tmp_path / "run" / "parameters.json").read_text())
    assert (parameters["total"], parameters["trainable"]) == (20_366_312, 1_450_984)
    shown = capsys.readouterr().out
    assert "20,366,312" in shown and "7.1 %" in shown
    assert len(parameters["adapters"]) == 6


@pytest.mark.slow
def test_a_signal_saves_and_the_run_goes_on_later(tmp_path):
    # Through a process that hears the signals again, where the tests run under nohup.
    heard = (
        "import os, signal, sys; "
        "[signal.signal(sent, signal.SIG_DFL) for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", heard, sys.executable, SCRIPT, "--config", "small_lora",
               "--output", tmp_path / "run", "--model.layers", "1", "--data.subjects", "150",
               "--data.vocabulary_size", "200", "--train.epochs", "100000"]  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"

    def steps():
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines]

    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before, deadline = steps(), time.monotonic() + 200
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(steps()) == len(before) and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(sent)
        output, _ = run.communicate(timeout=200)
        assert run.returncode == 128 + sent, output
        assert f"interrupted by {sent.name}" in output
        assert ("Resuming after step" in output) == bool(before)
        if not before:
            command.append("--resume")
    until = steps()[-1] + 4
    done = subprocess.run([*command, "--train.max_steps", str(until)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stop_reason"] == "finished"
    assert steps() == sorted(steps()) and steps()[-1] == until


def test_the_script_runs_from_anywhere(tmp_path):
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--config", "nothing"], capture_output=True, text=True, cwd=tmp_path,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config 'nothing' is unknown")


@pytest.mark.parametrize(
    "script",
    [
        "benchmark.py",
        *(pytest.param(f"{name}_study.py", marks=pytest.mark.slow) for name in ("freezing", "forecast")),
    ],
)
def test_what_needs_a_checkout_finds_the_rest_of_it(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = ["prepare", "--help"] if script == "benchmark.py" else ["--help"]
    done = subprocess.run(
        [sys.executable, SCRIPT.with_name(script), *arguments], capture_output=True, text=True, cwd=tmp_path,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}")
