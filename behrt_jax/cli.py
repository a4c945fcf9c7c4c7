"""Commands: options from the command line to a configuration, and errors to one line."""

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import cleandoc
from typing import Any, TypeVar

from behrt_jax.config import (
    DoctorConfig,
    EvaluateConfig,
    FinetuneConfig,
    MakeLabelsConfig,
    PredictConfig,
    PrepareConfig,
    PretrainConfig,
)
from behrt_jax.errors import InputError

C = TypeVar("C", bound=Any)


def parse(arguments: Sequence[str], configurations: Mapping[str, C], default: str, prog: str) -> C:
    """Take ``--config NAME`` from the arguments, and the rest as overrides of that configuration.

    ``--help`` prints every option and leaves by ``SystemExit``.

    Raises:
        InputError: NAME is missing or unknown (the message lists the names), or options of adapters
            are given for a configuration without any.
    """
    import tyro

    name, rest = _take_name(list(arguments), default)
    if isinstance(configurations[default], PretrainConfig):
        rest = _spell_out_data(rest)
    if name not in configurations:
        raise InputError(f"--config {name!r} is unknown: choose one of {', '.join(configurations)}.")
    config = configurations[name]
    adapter_options = [argument for argument in rest if argument.startswith("--lora.")]
    if getattr(config, "lora", None) is None and adapter_options:
        with_adapters = [key for key, other in configurations.items() if getattr(other, "lora", None)]
        raise InputError(
            f"{adapter_options[0]}: {name} has no adapters, choose one of {', '.join(with_adapters)}."
        )
    description = (
        f"{type(config).__doc__} Start from a named configuration with --config NAME "
        f"({', '.join(configurations)}; {default} where not given) and override single settings. "
        f"Shown are the values of {name}."
    )
    return tyro.cli(
        type(config),
        prog=prog,
        description=description,
        default=config,
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )


def pretrain_command(
    arguments: Sequence[str], configurations: Mapping[str, PretrainConfig], default: str
) -> int:
    """Run the pretraining command; returns the exit status of :func:`exit_status`."""

    def run() -> int:
        config = parse(arguments, configurations, default, "pretrain.py")
        from behrt_jax.workflows.pretrain import pretrain

        return pretrain(config).exit_status

    return exit_status(run)


def finetune_command(
    arguments: Sequence[str], configurations: Mapping[str, FinetuneConfig], default: str
) -> int:
    """Run the fine-tuning command; as :func:`pretrain_command`."""

    def run() -> int:
        config = parse(arguments, configurations, default, "finetune.py")
        from behrt_jax.workflows.finetune import finetune

        return finetune(config).exit_status

    return exit_status(run)


def predict_command(arguments: Sequence[str]) -> int:
    """Run the prediction command; returns the exit status of :func:`exit_status`."""
    import tyro

    config = tyro.cli(
        PredictConfig,
        prog="predict.py",
        description=PredictConfig.__doc__,
        args=list(arguments),
        use_underscores=True,
    )

    def run() -> int:
        from behrt_jax.workflows.predict import predict

        predict(config)
        return 0

    return exit_status(run)


def prepare_command(arguments: Sequence[str]) -> int:
    """Run the preparation command; returns the exit status of :func:`exit_status`."""
    import tyro

    config = tyro.cli(
        PrepareConfig,
        prog="prepare.py",
        description=PrepareConfig.__doc__,
        args=list(arguments),
        use_underscores=True,
    )

    def run() -> int:
        from behrt_jax.workflows.prepare import prepare_records

        prepare_records(config)
        return 0

    return exit_status(run)


def make_labels_command(arguments: Sequence[str]) -> int:
    """Make a label table of prepared data; returns the exit status of :func:`exit_status`."""
    import tyro

    config = tyro.cli(
        MakeLabelsConfig,
        prog="make_labels.py",
        description=cleandoc(MakeLabelsConfig.__doc__ or ""),
        args=list(arguments),
        use_underscores=True,
    )

    def run() -> int:
        from behrt_jax.workflows.make_labels import make_labels

        make_labels(config)
        return 0

    return exit_status(run)


def doctor_command(arguments: Sequence[str]) -> int:
    """Examine a run or data; 1 where a finding is an error, else the status of :func:`exit_status`."""
    import tyro

    config = tyro.cli(
        DoctorConfig,
        prog="doctor.py",
        description=DoctorConfig.__doc__,
        args=list(arguments),
        use_underscores=True,
    )

    def run() -> int:
        if (config.run is None) == (config.data is None):
            raise InputError("Give either --run RUN or --data DIR.")
        if config.labels is not None and config.data is None:
            raise InputError("--labels are audited with the data that they belong to: add --data DIR.")
        if config.run is not None:
            from behrt_jax.workflows.doctor import examine_run as examine
        else:
            from behrt_jax.workflows.doctor import audit_data as examine
        findings = examine(config)
        return 1 if any(finding.severity == "error" for finding in findings) else 0

    return exit_status(run)


def evaluate_command(arguments: Sequence[str]) -> int:
    """Judge predictions; returns the exit status of :func:`exit_status`."""
    import tyro

    config = tyro.cli(
        EvaluateConfig,
        prog="evaluate.py",
        description=EvaluateConfig.__doc__,
        args=list(arguments),
        use_underscores=True,
    )

    def run() -> int:
        from behrt_jax.workflows.evaluate import evaluate

        evaluate(config)
        return 0

    return exit_status(run)


def exit_status(command: Callable[[], int]) -> int:
    """Run a command: its own status, 2 for wrong input, 1 for a training that diverged.

    A run that a signal stopped returns 128 plus the signal's number, so that a scheduler can tell
    it from a finished one and start it again with ``--resume``.
    """
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def _take_name(arguments: list[str], default: str) -> tuple[str, list[str]]:
    for index, argument in enumerate(arguments):
        if argument == "--config":
            if index + 1 == len(arguments) or arguments[index + 1].startswith("--"):
                raise InputError("--config needs a name after it.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:index] + arguments[index + 1 :]
    return default, arguments
