"""Contenders of a benchmark, each in a process of its own, that take turns."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import behrt_jax
from behrt_jax.errors import InputError


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
                [sys.executable, "-m", "behrt_jax.workflows.benchmark_contender", json.dumps(dict(task))],
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
