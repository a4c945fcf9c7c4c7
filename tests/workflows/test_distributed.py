"""Runs of several processes, as commands: they equal a run of one, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PRETRAIN = [
    "pretrain", "--config", "small_lora", "--model.layers", "1", "--data.subjects", "150",
    "--data.vocabulary_size", "200", "--train.batch_size", "16", "--train.validate_every", "4",
    "--train.log_every", "1", "--optimizer.schedule", "constant", "--optimizer.warmup_fraction", "0",
]  # fmt: skip
TRAINED = [*PRETRAIN, "--train.max_steps", "8"]


@contextmanager
def started(processes, devices, arguments, also=()):
    """A command as so many processes, with so many devices each; killed in the end.

    `also` are arguments of the last process alone.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Threads of one share a core: each more of them is another that spins.
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    found = []
    for number in range(processes):
        who = ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", processes,
               "--distributed.process", number, "--distributed.timeout", 10]  # fmt: skip
        options = [*arguments, *(who if processes > 1 else ()), *(also if number == processes - 1 else ())]
        command = [sys.executable, "-m", "behrt_jax", *map(str, options)]
        found.append(
            subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def run(processes, devices, arguments, also=()):
    """Status, output and errors of each process."""
    with started(processes, devices, arguments, also) as found:
        return ended(found)


def ended(found):
    said = [process.communicate(timeout=400) for process in found]
    return [(process.returncode, out, err) for process, (out, err) in zip(found, said, strict=True)]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def wait_for_line(folder, number):
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if (folder / "metrics.jsonl").exists() and len(lines(folder)) >= number:
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} has no {number} lines")


def same_figures(first, second):
    """The lines of two runs are of the same steps, and say the same."""
    assert [(line["step"], line["split"]) for line in first] == [
        (line["step"], line["split"]) for line in second
    ]
    for name in ("loss", "targets", "accuracy"):
        np.testing.assert_allclose(*([line[name] for line in one] for one in (first, second)), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process with one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    [(status, _, err)] = run(1, 1, [*TRAINED, "--output", folder])
    assert status == 0, err
    return folder


def test_two_processes_leave_what_one_does(alone, tmp_path):
    found = run(2, 4, [*TRAINED, "--mesh.fsdp", 8, "--output", tmp_path / "run"])
    assert [status for status, _, _ in found] == [0, 0], found
    same_figures(lines(tmp_path / "run"), lines(alone))
    ours, theirs = summary(tmp_path / "run"), summary(alone)
    for name in ("baselines", "stop_reason", "best_step", "data", "parameters"):
        assert ours[name] == theirs[name], name
    assert ours.keys() == theirs.keys()
    of_one, of_two = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in path.parts)
        for folder in (alone, tmp_path / "run")
    )
    assert of_two == of_one
    # The second process is silent, but for the library that connects it.
    said = [line for line in found[1][1].splitlines() if "[Gloo]" not in line]
    assert not said and not found[1][2]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    endless = [*PRETRAIN, "--train.max_steps", "100000", "--train.epochs", "10000", "--output"]
    folder = tmp_path / "run"
    with started(2, 2, [*endless, folder]) as found:
        wait_for_line(folder, 3)
        found[1].send_signal(signal.SIGTERM)
        said = ended(found)
    assert [status for status, _, _ in said] == [128 + signal.SIGTERM] * 2, said
    assert summary(folder)["stop_reason"] == "interrupted by SIGTERM"
    step = lines(folder)[-1]["step"]
    assert str(step) in [path.name for path in (folder / "checkpoints").iterdir()]
    # One process with one device goes on, on the same examples with the same masks.
    until = ["--train.max_steps", step + 4]
    for place, more in ((folder, ["--resume"]), (tmp_path / "whole", [])):
        [(status, _, err)] = run(1, 1, [*endless, place, *until, *more])
        assert status == 0, err
    same_figures(
        [line for line in lines(folder) if line["step"] > step],
        [line for line in lines(tmp_path / "whole") if line["step"] > step],
    )


def test_a_process_that_is_killed_ends_the_others(alone, tmp_path):
    folder = tmp_path / "run"
    options = [*PRETRAIN, "--train.max_steps", "8", "--output", folder]
    with started(2, 2, [*options, "--train.validate_every", "4"]) as found:
        wait_for_line(folder, 5)
        found[1].kill()
        began = time.monotonic()
        (status, _, err), _ = ended(found)
    if status:  # it may have been done by then
        assert status == 75
        assert re.fullmatch(r"error: process 1 of 2 was not heard of for 10 seconds\. .*--resume\.\n", err)
        assert time.monotonic() - began < 60
    assert [status for status, _, _ in run(3, 1, [*options, "--resume"])] == [0, 0, 0]
    same_figures(lines(folder), lines(alone))


def test_an_error_in_one_process_ends_the_others(tmp_path):
    (first, out, err), (second, _, own) = run(
        2, 1, [*TRAINED, "--output", tmp_path / "run"], ["--mesh.fsdp", 3]
    )
    assert second == 2 and own.startswith("error: mesh.fsdp is 3") and own.count("\n") == 1
    assert first == 75 and out.count("step ") == 0
    assert re.fullmatch(
        r"error: process 1 of 2 \(.*\) has ended \(InputError\): see what it said\. .*\n", err
    )


def test_processes_that_were_started_with_other_settings_do_not_train_together(tmp_path):
    (first, out, _), (second, _, own) = run(
        2, 1, [*TRAINED, "--output", tmp_path / "run"], ["--optimizer.learning_rate", 0.5]
    )
    assert second == 2 and own.count("\n") == 1
    assert re.match(
        r"error: optimizer.learning_rate is 0.5 in process 1 of 2 \(.*\), but 0.003 in the first", own
    )
    assert first == 75 and out.count("step ") == 0


def test_a_training_that_diverges_ends_in_every_process_as_in_one(tmp_path):
    folder, least = tmp_path / "run", ["--optimizer.learning_rate", 1e30, "--optimizer.clip_norm", 1e30]
    found = run(2, 1, [*PRETRAIN, "--train.max_steps", 8, *least, "--output", folder])
    assert [status for status, _, _ in found] == [1, 1], found
    assert all(err.startswith("error: Loss nan and gradient norm") for _, _, err in found), found
    assert summary(folder)["stop_reason"].startswith("diverged") and (folder / "report.html").is_file()


def test_a_job_is_queued_again_where_it_can_go_on(tmp_path):
    """With stand-ins for what a cluster has; no more than so often after an error."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "scontrol": 'echo "$@" >> "$SEEN"',
        "srun": 'echo "srun $SRUN_CPUS_PER_TASK $*" >> "$SEEN"; exit "$STATUS"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").touch()
    queued = []
    for status, before in (
        (138, 50),
        (75, 19),
        (75, 20),
        (137, 0),
        (137, 20),
        (2, 0),
        (1, 0),
        (143, 0),
        (0, 0),
    ):
        seen = tmp_path / f"seen-{status}-{before}"
        slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(before)}
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "SEEN": str(seen), "STATUS": str(status), **slurm}
        script = ROOT / "experiments" / "clusters" / "slurm_train.sh"
        done = subprocess.run(["bash", script, tmp_path / "begun", "pretrain"], env=env, capture_output=True)
        assert (done.returncode, done.stderr) == (status, b"")
        started, *again = seen.read_text().splitlines()
        assert started == f"srun 8 behrt-jax pretrain --output {tmp_path}/begun --resume --distributed auto"
        assert again in ([], ["requeue 7"])
        queued += [(status, before)] * len(again)
    assert queued == [(138, 50), (75, 19), (137, 0)]


def test_the_scripts_for_clusters_start_processes_that_find_each_other(tmp_path):
    """With stand-ins for what a cluster has; the run ends at a mistake that names the devices of both."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "behrt-jax": f'exec {sys.executable} -m behrt_jax "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & started+=($!); done\n'
        'for one in "${started[@]}"; do wait "$one" || status=$?; done; exit "${status:-0}"',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    slurm = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    env = {**os.environ, **slurm, "PORT": str(port), "PATH": f"{tools}:{os.environ['PATH']}",
           "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}  # fmt: skip
    mistaken = [*TRAINED, "--mesh.fsdp", "3"]
    for command in (
        ["one_machine.sh", "2", *mistaken, "--output", tmp_path / "first"],
        ["slurm_train.sh", tmp_path / "second", *mistaken],
    ):
        script = ROOT / "experiments" / "clusters" / str(command[0])
        found = subprocess.run(
            ["bash", script, *map(str, command[1:])], env=env, capture_output=True, text=True, timeout=400
        )
        assert found.returncode == 2, found
        assert found.stderr.count("mesh.fsdp is 3, which does not divide the 4 devices") == 2
    assert not (tmp_path / "requeued").exists()
