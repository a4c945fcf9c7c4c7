"""Metrics of a run, sent on as they are written: to TensorBoard's event files, to Weights & Biases.

Both are optional packages. What they are told is what metrics.jsonl holds, and the settings of the run:
figures of the training, no subjects and no events.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from behrt_jax.config.training import TrackingConfig
from behrt_jax.errors import InputError
from behrt_jax.files import JsonObject, write_text
from behrt_jax.run_folder import is_number
from behrt_jax.tracking.summary import flat

Send = Callable[[JsonObject], None]
"""Takes a record of metrics.jsonl."""

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb"
_ID_FILE = "run_id.txt"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_trackers(config: TrackingConfig) -> None:
    """Raise :class:`InputError`, which says what to install, where a tracker's package is not there."""
    for option, package in _PACKAGES.items():
        if getattr(config, option) and find_spec(package) is None:
            raise InputError(
                f"--tracking.{option} takes {package}, which is not installed: pip install "
                "'behrt-jax[tracking]', or leave the option out."
            )


@contextmanager
def open_trackers(config: TrackingConfig, folder: Path, settings: JsonObject) -> Iterator[Send]:
    """What sends a record to every tracker that is asked for; a run that goes on continues their records.

    Args:
        config: which trackers.
        folder: of the run, in which they keep their files.
        settings: of the run.

    Raises:
        InputError: a package is missing, or Weights & Biases cannot be begun.
    """
    check_trackers(config)
    with ExitStack() as stack:
        takers: list[Callable[[int, dict[str, float]], None]] = []
        if config.tensorboard:
            takers.append(stack.enter_context(_tensorboard(folder / TENSORBOARD_FOLDER)))
        if config.wandb:
            takers.append(stack.enter_context(_wandb(config.project, folder, settings)))

        def send(record: JsonObject) -> None:
            for take in takers:
                take(record["step"], figures(record))

        yield send


def figures(record: JsonObject) -> dict[str, float]:
    """The figures of a record by name, such as ``train/learning_rate/lora``; a population's members by place.

    What is not a finite number is left out, and so is the step.
    """
    members = {str(place): one for place, one in enumerate(record.get("members") or ())}
    named = {**record, "members": members}
    return {
        f"{record['split']}/{name.replace('.', '/')}": float(value)
        for name, value in flat(named)
        if is_number(value) and not isinstance(value, bool) and name not in ("step", "split")
    }


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    from tensorboardX import SummaryWriter

    writers: list[SummaryWriter] = []

    def take(step: int, values: dict[str, float]) -> None:
        # What an interrupted run has written from here on is written again: readers drop the old.
        if not writers:
            writers.append(SummaryWriter(str(folder), purge_step=step, filename_suffix=f".{step}"))
        for name, value in values.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    try:
        yield take
    finally:
        for writer in writers:
            writer.close()


@contextmanager
def _wandb(
    project: str, folder: Path, settings: JsonObject
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    import wandb

    own = folder / WANDB_FOLDER
    own.mkdir(exist_ok=True)
    if not (own / _ID_FILE).is_file():
        write_text(own / _ID_FILE, uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project,
            dir=str(folder),
            id=(own / _ID_FILE).read_text().strip(),
            name=folder.name,
            resume="allow",
            config=settings,
            # Figures and settings alone: no console, code, command line, packages or state of the machine.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                quiet=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
    except wandb.Error as error:
        raise InputError(
            f"--tracking.wandb: {error} Log in (wandb login), or set WANDB_MODE=offline to keep the record "
            "on this machine."
        ) from error
    done = 1
    try:
        yield lambda step, values: run.log(values, step=step)
        done = 0
    finally:
        run.finish(exit_code=done)
