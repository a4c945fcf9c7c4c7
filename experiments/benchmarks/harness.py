"""Contenders of a benchmark, each in a process of its own, that take turns."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import behrt_jax
from behrt_jax.errors import InputError
from behrt_jax.tracking.plots import DPI

# Picture of the training benchmark: events per second of each contender.

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/): ours blue and sky blue, PyTorch's warm.
OURS = ("#0072B2", "#56B4E9", "#009E73")
THEIRS = ("#D55E00", "#E69F00", "#CC79A7", "#999999")
WIDE_RANGE = 30
"""The fastest by the slowest, from which on the scale is logarithmic."""


def plot_speeds(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw bars of events per second for each size and regime; where they differ by far, on a log scale.

    Args:
        results: of the training benchmark: ``size``, ``regime``, ``contender``, ``tokens_per_second``.
        file: PNG to write. Nothing is drawn where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    groups = list(dict.fromkeys((r["size"], r["regime"]) for r in results))
    names = list(dict.fromkeys(r["contender"] for r in results))
    kinds = list(dict.fromkeys(map(_kind, names)))
    ours = [kind for kind in kinds if kind.startswith("ours")]
    theirs = [kind for kind in kinds if kind not in ours]
    colours = dict(zip(ours, OURS * len(ours), strict=False)) | dict(
        zip(theirs, THEIRS * len(theirs), strict=False)
    )
    speeds = {(r["size"], r["regime"], r["contender"]): r["tokens_per_second"] for r in results}
    figure = Figure(figsize=(2 + 1.8 * len(groups), 4.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    place, ticks = 0.0, []
    for group in groups:
        present = [name for name in names if (*group, name) in speeds]
        ticks.append(place + (len(present) - 1) / 2)
        for name in present:
            value = speeds[(*group, name)]
            kind = _kind(name)
            label = kind if kind not in axes.get_legend_handles_labels()[1] else None
            axes.bar(place, value, width=0.9, color=colours[kind], label=label)
            axes.annotate(f"{value:,.0f}", (place, value), ha="center", va="bottom", fontsize=7, rotation=45)
            place += 1
        place += 0.8
    if max(speeds.values()) > WIDE_RANGE * min(speeds.values()):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.margins(y=0.12)
    axes.set_xticks(ticks, [" ".join(group) for group in groups])
    axes.set_ylabel("events per second (padding not counted)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(file)


def _kind(name: str) -> str:
    """Name of a contender without the size of its batch."""
    return name.rstrip("0123456789").rstrip()


def run_script(script: str, options: Sequence[str], **environment: str) -> str:
    """Run a script of `experiments` in a process of its own, without the user's compiled programs.

    Args:
        script: its path below `experiments`.
        options: of its command line.
        environment: variables that it gets beside ours.

    Returns:
        Its standard output.

    Raises:
        InputError: it failed; the last line that it wrote says why.
    """
    path = Path(behrt_jax.__file__).parents[1] / "experiments" / script
    ours = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    search = os.pathsep.join([str(path.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(path), *options],
        env={**ours, "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise InputError(f"The run failed: {reason}")
    return done.stdout


class Contender:
    """A process of `benchmark_contender`, idle but in its turns."""

    def __init__(self, name: str, task: Mapping[str, Any], errors: Path):
        """Start it; it builds and compiles what it runs, see :meth:`wait`. What it writes to its standard
        error goes to the file `errors`.
        """
        self.name = name
        self.facts: dict[str, Any] = {}
        self.seconds: list[float] = []
        self.peak_bytes = 0
        root = Path(behrt_jax.__file__).parents[1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = errors
        with errors.open("w") as error_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.benchmarks.contender", json.dumps(dict(task))],
                # Several contenders share an accelerator: none may take all of its memory.
                env={**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
            )

    def wait(self) -> None:
        """Return when it is built, with its facts."""
        self.facts = self._answer()

    def take_turn(self) -> None:
        """Run once and note the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.seconds.append(self._answer())

    def end(self) -> None:
        """Let it tell its peak memory and stop."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.peak_bytes = self._answer()["peak_bytes"]
        self.kill()

    def kill(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        with self._process:  # closes its pipes and waits for it
            pass

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            written = self._errors.read_text(errors="replace").strip()
            reason = (written or f"exit status {self._process.returncode}").splitlines()
            raise InputError(f"The contender {self.name} failed: {reason[-1]}")
        return json.loads(line)


@contextmanager
def contest(
    tasks: Mapping[str, Mapping[str, Any]], rounds: int, together: bool = False
) -> Iterator[list[Contender]]:
    """Run all contenders in turns, A B C A B C, so that whatever else the machine does falls on all alike.

    Args:
        tasks: name -> what `benchmark_contender` is to build.
        rounds: turns of each.
        together: build all at the same time, not one after the other.

    Yields:
        The contenders, each with `seconds` `[rounds]`, `facts` and `peak_bytes`.

    Raises:
        InputError: a contender failed; the last line that it wrote says why.
    """
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            for name, task in tasks.items():
                contenders.append(Contender(name, task, Path(folder) / f"{len(contenders)}.txt"))
                if not together:
                    contenders[-1].wait()
            for contender in contenders if together else ():
                contender.wait()
            for _ in range(rounds):
                for contender in contenders:
                    contender.take_turn()
            for contender in contenders:
                contender.end()
        except BaseException:
            for contender in contenders:
                contender.kill()
            raise
    yield contenders
