"""The commands, in one table; options from the command line to a configuration, and errors to one line.

``behrt-jax COMMAND``, ``python -m behrt_jax COMMAND`` and the scripts of ``experiments/`` all come from here.
"""

import ast
import math
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from inspect import cleandoc, getsource
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from behrt_jax.config.commands import (
    AskConfig,
    CombineConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    ImportWeightsConfig,
    PredictConfig,
    ReportConfig,
)
from behrt_jax.config.data import MakeLabelsConfig, PrepareConfig
from behrt_jax.config.training import FinetuneConfig, PretrainConfig
from behrt_jax.errors import InputError
from behrt_jax.presets import FINETUNE, PRETRAIN
from behrt_jax.tracking.console import lasting_streams, tell
from behrt_jax.training.memory import keep_freed_memory

C = TypeVar("C")


@dataclass(frozen=True)
class Command(Generic[C]):
    """One command: its options, and the function that they are given to."""

    options: type[C]
    """Configuration class; its docstring and those of its fields are the help."""
    run: str
    """``module:function`` with the configuration as its argument; imported when the command is run."""
    help: str = ""
    """What it does, in a line."""
    first: tuple[str, ...] = ()
    """The options that everybody needs, at the top of its ``--help``."""
    positional: str = ""
    """Name of the option that plain words are the values of: ``doctor RUN`` is ``doctor --run RUN``."""
    named: Mapping[str, C] = field(default_factory=dict)
    """Configurations for ``--config NAME``; without any, all options start from the defaults of the class."""
    default: str = ""
    """Name of the configuration that is taken without ``--config``."""
    status: Callable[[Any], int] = lambda result: 0
    """Exit status of what the function returned."""


COMMANDS: dict[str, Command[Any]] = {
    "prepare": Command(
        PrepareConfig,
        "behrt_jax.workflows.prepare:prepare_records",
        "turn records of any source into a prepared data set",
        first=("source", "input", "output", "codes", "like"),
    ),
    "pretrain": Command(
        PretrainConfig,
        "behrt_jax.workflows.pretrain:pretrain",
        "train by masked codes or questions, on prepared, MEDS or generated records",
        first=("config", "data", "output", "train.epochs", "resume"),
        named=PRETRAIN,
        default="small_lora",
        status=attrgetter("exit_status"),
    ),
    "make-labels": Command(
        MakeLabelsConfig,
        "behrt_jax.workflows.make_labels:make_labels",
        "label prepared data: next visit, first occurrence, readmission, death",
        first=("task", "data", "output", "codes", "horizon_days"),
    ),
    "finetune": Command(
        FinetuneConfig,
        "behrt_jax.workflows.finetune:finetune",
        "fit a pretrained model to labels, alone or several at once",
        first=("config", "data", "labels", "init", "output"),
        named=FINETUNE,
        default="lora",
        status=attrgetter("exit_status"),
    ),
    "combine-adapters": Command(
        CombineConfig,
        "behrt_jax.workflows.combine:combine_adapters",
        "make one adapter of several on the same base",
        first=("adapters", "weights", "method", "rank", "output"),
        positional="adapters",
    ),
    "predict": Command(
        PredictConfig,
        "behrt_jax.workflows.predict:predict",
        "write predictions of a fine-tuned model, or embeddings",
        first=("model", "data", "labels", "split", "output"),
    ),
    "ask": Command(
        AskConfig,
        "behrt_jax.workflows.ask:ask",
        "answer a question about the future, by a model pretrained on questions",
        first=("model", "data", "codes", "horizon_days", "output"),
    ),
    "evaluate": Command(
        EvaluateConfig,
        "behrt_jax.workflows.evaluate:evaluate",
        "judge predictions, with intervals, groups and simple baselines",
        first=("predictions", "output", "data", "labels", "baselines"),
    ),
    "export": Command(
        ExportConfig,
        "behrt_jax.workflows.export:export",
        "write a trained model, with a model card, into a folder to pass on",
        first=("run", "output", "adapters", "stablehlo", "licence"),
        positional="run",
    ),
    "import-weights": Command(
        ImportWeightsConfig,
        "behrt_jax.workflows.import_weights:import_weights",
        "make such a folder of a checkpoint of BEHRT in PyTorch",
        first=("weights", "vocabulary", "heads", "output", "alpha"),
    ),
    "doctor": Command(
        DoctorConfig,
        "behrt_jax.workflows.doctor:examine_folder",
        "examine a run, or prepared data and labels, for mistakes",
        first=("run", "data", "labels", "horizon_days", "output"),
        positional="run",
        status=lambda findings: int(any(finding.severity == "error" for finding in findings)),
    ),
    "report": Command(
        ReportConfig,
        "behrt_jax.workflows.report:report",
        "make the report of a run again, or compare several on one page",
        first=("runs", "output"),
        positional="runs",
    ),
}
"""Name -> command, in the order of use."""


def main(arguments: Sequence[str] | None = None, prog: str = "behrt-jax") -> int:
    """Run the command that the first argument names; the others are its options.

    Args:
        arguments: those of the process where not given.
        prog: how this program was called, for usage and errors.

    Returns:
        The exit status of :func:`run_command`; 2 where no command is named.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return run_command(COMMANDS[name], rest, f"{prog} {name}")
    if name in ("-h", "--help"):
        print(_list(prog))
        return 0
    if not name:
        print(_list(prog), file=sys.stderr)
        return 2
    near = "".join(f"did you mean {close}? " for close in get_close_matches(name, COMMANDS, n=1))
    print(f"error: {name!r} is no command: {near}{prog} --help lists all.", file=sys.stderr)
    return 2


def _list(prog: str) -> str:
    """Every command with its line of help."""
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:{width}}{command.help}" for name, command in COMMANDS.items())
    return "\n".join(
        [
            f"usage: {prog} COMMAND [OPTIONS]",
            "\nPretrain and adapt BERT-style encoders on electronic health records.\n",
            *lines,
            f"\n{prog} COMMAND --help shows the options of one.",
        ]
    )


def run_command(command: Command[C], arguments: Sequence[str], prog: str) -> int:
    """Run a command; whatever ends it is told in one line.

    Returns:
        Its own status; 2 for wrong input, 1 for a training that diverged, `errors.NO_ROOM` where space or
        memory ran out, `errors.UNFORESEEN` for anything else, whose traceback is written to a file. A run
        that a signal stopped returns 128 plus the signal's number, so that a scheduler can tell it from a
        finished one and start it again with ``--resume``.

    Args:
        command: of the table, or of a study.
        arguments: its options; ``--help`` prints them all and leaves by ``SystemExit``.
        prog: name of the program in usage and errors.
    """
    output = None
    keep_freed_memory()  # before a library starts threads
    with lasting_streams():
        try:
            with _holding_back(signal.SIGINT):
                config = parse(command, arguments, prog)
                output = getattr(config, "output", None)
                _check_outputs(config)
                module, _, name = command.run.partition(":")
                function = getattr(import_module(module), name)
            return command.status(function(config))
        except (Exception, KeyboardInterrupt) as error:
            return tell(error, output)


@contextmanager
def _holding_back(number: int) -> Iterator[None]:
    """Let a signal wait: libraries that are interrupted while they are imported may crash."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parse(command: Command[C], arguments: Sequence[str], prog: str) -> C:
    """Take ``--config NAME`` from the arguments, and the rest as overrides of that configuration.

    Its paths are absolute, without ``~`` and ``..``.

    Raises:
        InputError: NAME is missing or unknown (the message lists the names), options of adapters are given
            for a configuration without any, or a path names the folder of no user.
        SystemExit: with status 0 after ``--help``, with 2 where an option or its value has no meaning.
    """
    config, name, rest = command.options(), "", list(arguments)
    if command.named:
        name, rest = _take_name(rest, command.default)
        config = _find(command.named, name, rest)
    if not {"-h", "--help"}.isdisjoint(rest):
        print(_help(command, config, name, prog))
        raise SystemExit(0)
    if command.positional:
        rest = _spell_out_words(rest, command.positional, config)
    if command.options is PretrainConfig:
        rest = _spell_out_data(rest)
    rest = _spell_out_distributed(rest)
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: pip install 'behrt-jax[commands]' adds what commands need.") from error

    parsed = tyro.cli(
        command.options,
        prog=prog,
        default=config,
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )
    from behrt_jax.files import resolved

    return _with_paths(parsed, resolved)


def _with_paths(value: Any, change: Callable[[Path], Path]) -> Any:
    """`value`, a configuration or a part of one, with all its paths changed."""
    if isinstance(value, Path):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_paths(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{own.name: _with_paths(getattr(value, own.name), change) for own in fields(value)}
        )
    return value


def _check_outputs(config: object) -> None:
    """Refuse outputs that cannot be written before any work is done."""
    from behrt_jax.files import check_writable

    for name in ("output", "to_meds"):
        if (path := getattr(config, name, None)) is not None:
            check_writable(path, f"--{name}")


def _take_name(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """The name after ``--config``, and the arguments without it."""
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments) or arguments[index + 1].startswith("--"):
                raise InputError("--config needs a name after it.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:index] + arguments[index + 1 :]
    return default, arguments


def _find(named: Mapping[str, C], name: str, options: Sequence[str]) -> C:
    """The configuration of this name, which has adapters if options are about them."""
    if name not in named:
        raise InputError(f"--config {name!r} is unknown: choose one of {', '.join(named)}.")
    of_adapters = [option for option in options if option.startswith("--lora.")]
    if of_adapters and getattr(named[name], "lora", None) is None:
        with_adapters = [other for other, config in named.items() if getattr(config, "lora", None)]
        raise InputError(
            f"{of_adapters[0]}: {name} has no adapters, choose one of {', '.join(with_adapters)}."
        )
    return named[name]


def _spell_out_data(arguments: list[str]) -> list[str]:
    """``--data DIR`` as the two options that it is short for."""
    for index, argument in enumerate(arguments):
        if argument == "--data" or argument.startswith("--data="):
            _, joined, folder = argument.partition("=")
            after = arguments[index + 1 :]
            folder, rest = (folder, after) if joined else ("".join(after[:1]), after[1:])
            if not folder or folder.startswith("--"):
                raise InputError("--data needs the folder of the prepared data after it.")
            return [*arguments[:index], "--data.source", "prepared", "--data.path", folder, *rest]
    return arguments


def _spell_out_distributed(arguments: list[str]) -> list[str]:
    """``--distributed auto`` as the option that it stands for."""
    for index, argument in enumerate(arguments):
        if argument == "--distributed" or argument.startswith("--distributed="):
            _, joined, how = argument.partition("=")
            after = arguments[index + 1 :]
            how, rest = (how, after) if joined else ("".join(after[:1]), after[1:])
            if how != "auto":
                raise InputError(
                    "--distributed takes the word auto; elsewhere give --distributed.coordinator HOST:PORT, "
                    "--distributed.processes N and --distributed.process I."
                )
            return [*arguments[:index], "--distributed.auto", *rest]
    return arguments


def _spell_out_words(arguments: Sequence[str], name: str, config: object) -> list[str]:
    """The arguments with the words that are no option's value after ``--name``."""
    takes = {option.name: option.takes for _, options in _sections(config) for option in options}
    words, rest, left = [], [], 0
    for argument in arguments:
        if argument.startswith("--"):
            given = argument.removeprefix("--").replace("-", "_")
            left = 0 if "=" in argument else takes.get(given, 0 if "no_" in given else 1)
        elif left:
            left -= 1
        else:
            words.append(argument)
            continue
        rest.append(argument)
    return [f"--{name}", *words, *rest] if words else rest


# Help: the options that everybody needs, then all others, each part of the settings for itself.


@dataclass(frozen=True)
class _Option:
    """One option: a field of a configuration, or of a part of it."""

    name: str
    """With those of the parts that it is in: ``train.epochs``."""
    form: str
    """How it is written, with its values."""
    text: str
    takes: float = 1
    """Most values that it takes."""


def _sections(config: object, prefix: str = "", heading: str = "") -> list[tuple[str, list[_Option]]]:
    """Heading and options of a configuration, and of each part of it."""
    texts, kinds = _docstrings(type(config)), get_type_hints(type(config))
    own: list[_Option] = []
    parts: list[tuple[str, list[_Option]]] = []
    for name in (own_field.name for own_field in fields(config)):  # pyright: ignore[reportArgumentType]
        value = getattr(config, name)
        if is_dataclass(value):
            about = texts.get(name) or cleandoc(type(value).__doc__ or "").partition("\n\n")[0]
            parts += _sections(value, f"{prefix}{name}.", f"{prefix}{name}: {' '.join(about.split())}")
        elif not any(is_dataclass(kind) for kind in get_args(kinds[name])):  # adapters that are not there
            own.append(_option(f"{prefix}{name}", kinds[name], value, texts.get(name, "")))
    return [(heading, own), *parts]


def _docstrings(kind: type) -> dict[str, str]:
    """Docstring of each field of a dataclass."""
    definition = ast.parse(textwrap.dedent(getsource(kind))).body[0]
    assert isinstance(definition, ast.ClassDef)
    return {
        own.target.id: " ".join(text.value.value.split())
        for own, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(own, ast.AnnAssign) and isinstance(own.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _option(name: str, kind: Any, default: object, text: str) -> _Option:
    """The option of a field of this type."""
    if kind is bool:
        part, dot, own = name.rpartition(".")
        form, takes, shown = f"--{name}, --{part}{dot}no_{own}", 0, "on" if default else "off"
    elif get_origin(kind) is tuple:
        form, takes, shown = f"--{name} [{_values(get_args(kind)[0])} ...]", math.inf, default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else ""
    else:
        form, takes, shown = f"--{name} {_values(kind)}", 1, "" if default is None else str(default)
    return _Option(name, form, f"{text} (default: {shown})" if shown else text, takes)


def _values(kind: Any) -> str:
    """Values of a type: ``INT``, ``{yes,no}``."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) in (Union, UnionType):
        return "|".join(_values(one) for one in get_args(kind) if one is not NoneType)
    return kind.__name__.upper()


def _help(command: Command[C], config: C, name: str, prog: str) -> str:
    """Every option of a command, with the values of this configuration, 80 to 100 columns wide."""
    sections = _sections(config)
    if command.named:
        names = f"{', '.join(command.named)} ({command.default} where not given)"
        sections[0][1].append(_Option("config", "--config NAME", f"Settings to start from: {names}."))
    if command.options is PretrainConfig:
        text = (
            "Folder of prepared data, in place of generated records: --data.source prepared --data.path DIR."
        )
        sections[0][1].append(_Option("data", "--data DIR", text))
    by_name = {option.name: option for _, options in sections for option in options}
    words = ""
    if command.positional:
        several = " ..." if by_name[command.positional].takes > 1 else ""
        words = f"[{command.positional.upper()}{several}] "
    width = min(max(shutil.get_terminal_size().columns, 80), 100)
    lines = [f"usage: {prog} [-h] {words}[OPTIONS]"]
    about = cleandoc(command.options.__doc__ or "").split("\n\n")
    if command.named:
        about.append(f"Any setting of a named configuration can be changed. Shown are the values of {name}.")
    for paragraph in about:
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
    first = [by_name[option] for option in command.first]
    others = [(heading, [o for o in options if o not in first]) for heading, options in sections]
    for heading, options in [("What everybody needs:", first), *others]:
        if options:
            lines += ["", *textwrap.wrap(heading or ("All others:" if first else "Options:"), width)]
        for option in options:
            lines += _explained(option, width)
    return "\n".join(lines)


def _explained(option: _Option, width: int) -> list[str]:
    """Lines of an option, its text in a column of its own."""
    column = 30
    text = textwrap.wrap(option.text, width - column, break_on_hyphens=False)
    form = f"  {option.form}"
    if len(form) < column - 1 and text:
        return [form.ljust(column) + text[0], *(" " * column + line for line in text[1:])]
    return [form, *(" " * column + line for line in text)]
