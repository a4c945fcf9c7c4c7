"""Two processes with four devices each compute what one process with eight does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from behrt_jax.config.training import MeshConfig
from behrt_jax.errors import InputError
from behrt_jax.training import processes as of_run
from behrt_jax.training.devices import make_mesh, put_rows, replicated, shardings_of
from behrt_jax.training.state import init_state, set_up
from behrt_jax.training.step import make_update_step, masked_code_objective
from tests.models.rows import VOCABULARY, random_batch
from tests.training.test_step import SGD, SHALLOW

ROOT = Path(__file__).parents[2]


def test_a_value_that_is_not_that_of_the_first_process_is_named(monkeypatch):
    of_run.check_same({"rate": 0.1}, "mend it.")  # alone
    first = {"rate": 0.1, "sizes": [1, 2], "step": None}
    monkeypatch.setattr(of_run, "from_first", lambda make: first)
    of_run.check_same(dict(first), "mend it.")
    with pytest.raises(
        InputError, match=r"^sizes is \[1\] in process 0 of 1 .*, but \[1, 2\] in the .*: mend it"
    ):
        of_run.check_same({**first, "sizes": [1]}, "mend it.")
    with pytest.raises(InputError, match=r"^step is 40 in process"):
        of_run.check_same({**first, "step": 40}, "mend it.")


class Losses(NamedTuple):
    losses: list[float]
    mesh: Mesh


def losses(fsdp: int) -> Losses:
    """Losses and gradient norms of some steps on all devices of all processes."""
    mesh = make_mesh(None, MeshConfig(fsdp=fsdp))
    setup = set_up(SHALLOW, VOCABULARY, mesh)
    # Made where it stays: no process holds the whole of it.
    state = init_state(setup, SGD, jax.random.key(0), mesh, large=128)
    update = make_update_step(
        masked_code_objective(setup.predictor, SHALLOW.masking),
        SGD,
        setup.mask,
        jax.random.key(1),
        clip_norm=1.0,
    )
    step = jax.jit(update, donate_argnums=0, out_shardings=(shardings_of(state), replicated(mesh)))
    found = []
    for index in range(3):
        state, totals = step(state, put_rows(random_batch(index, rows=16), mesh))
        found += [float(totals["loss"] / totals["targets"]), float(totals["gradient_norm"])]
    return Losses(found, mesh)


def said_by_two(module, *arguments):
    """What each of two processes has printed as JSON; `arguments` follow the port and the number of each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, (port, process, *arguments))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_two_processes_equal_one(fsdp):
    first, second = said_by_two("tests.training.two_processes", 4, fsdp)
    assert first["rows"] == list(range(8))
    assert second["rows"] == list(range(8, 16))
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], losses(fsdp).losses, rtol=1e-5)


@pytest.mark.slow
def test_each_process_gathers_the_rows_of_its_own_devices():
    """Each has compared its rows with those of the whole batch, and counted the tokens that it read."""
    first, second = said_by_two("tests.training.shared_rows")
    for rows in {rows for rows, _ in first["rows"]}:
        of_devices = np.split(np.arange(rows), 4)
        for found, own in ((first, (0, 2)), (second, (1, 3))):
            expected = [[rows, place] for device in own for place in of_devices[device]]
            assert [one for one in found["rows"] if one[0] == rows] == expected
    for kind, (own, whole) in first["counts"].items():
        other, same = second["counts"][kind]
        assert own > 0 and other > 0 and own + other == whole == same, kind
