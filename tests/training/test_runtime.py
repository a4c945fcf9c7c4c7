"""The folder of compiled programs: used by default, moved, turned off, and never in the way."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from behrt_jax.training import runtime as compilation
from behrt_jax.training.memory import keep_freed_memory
from behrt_jax.training.runtime import (
    KeptProgram,
    Startup,
    default_folder,
    host_fingerprint,
    use_compilation_cache,
)

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def no_cache_of_the_user(monkeypatch, tmp_path):
    """As in a process whose user has set nothing; the settings of the tests come back afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(compilation, "_ours", None)
    monkeypatch.setattr(
        compilation, "_source_digest", lambda: "code"
    )  # who edits while tests run breaks none
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def compile_something(value: float) -> None:
    jax.jit(lambda x: x * value + 1)(1.0).block_until_ready()


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*-cache")}


def test_default_folder_is_the_users_and_quick_programs_are_kept_too(no_cache_of_the_user, tmp_path):
    assert use_compilation_cache() is None
    compile_something(3.25)
    place = tmp_path / "caches" / "behrt_jax" / "compiled" / host_fingerprint()
    assert entries(place)


def test_moved(no_cache_of_the_user, tmp_path):
    assert use_compilation_cache(tmp_path / "first") is None
    compile_something(4.25)
    assert use_compilation_cache(tmp_path / "second") is None
    compile_something(5.25)
    assert entries(tmp_path / "first") and entries(tmp_path / "second")
    assert not entries(tmp_path / "caches")


def test_off_keeps_nothing_and_can_be_turned_on_again(no_cache_of_the_user, tmp_path):
    use_compilation_cache()
    assert use_compilation_cache("off") is None
    compile_something(6.25)
    assert not entries(tmp_path)
    use_compilation_cache()
    compile_something(7.25)
    assert entries(tmp_path)


def test_the_users_own_folder_wins(no_cache_of_the_user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert use_compilation_cache(tmp_path / "other") is None
    compile_something(8.25)
    assert entries(tmp_path / "own") and not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_gives_one_line_and_no_cache(no_cache_of_the_user, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    line = use_compilation_cache(tmp_path / "file" / "below")
    assert line is not None and "\n" not in line and str(tmp_path / "file") in line
    compile_something(9.25)  # and no error
    assert not entries(tmp_path)


def test_the_oldest_programs_are_removed_when_there_are_too_many(no_cache_of_the_user, tmp_path, monkeypatch):
    place = tmp_path / "kept" / host_fingerprint()
    place.mkdir(parents=True)
    for age, name in enumerate(["new", "middle", "old"]):
        (place / f"{name}-cache").write_bytes(bytes(100))
        os.utime(place / f"{name}-cache", (1e9 - age, 1e9 - age))
    (place / "step-0.program").write_bytes(bytes(100))  # now
    monkeypatch.setattr(compilation, "MOST_BYTES", 350)
    use_compilation_cache(tmp_path / "kept")
    assert entries(place) == {"new-cache", "middle-cache"} and (place / "step-0.program").exists()


# Programs kept whole.

SETTINGS = {"rate": 0.5}
VALUES = np.arange(4.0, dtype=np.float32)


class Traced(Exception):
    """A function was traced that should have been found on disk."""


def kept(settings=SETTINGS, arguments=(VALUES,), refuse: bool = False) -> KeptProgram:
    """A program of its own; one that refuses to be traced is of any use only where it is found on disk."""

    @jax.jit
    def step(*values):
        if refuse:
            raise Traced
        return sum(jax.numpy.sin(value) * 0.5 for value in values)

    placed = tuple(jax.device_put(value, jax.devices()[0]) for value in arguments)
    return KeptProgram(step, settings, placed, jax.devices()[:1])


@pytest.fixture
def kept_file(no_cache_of_the_user, tmp_path) -> Path:
    """The file of a program that was kept."""
    use_compilation_cache()
    first = kept()
    first.compiled()
    first.keep()
    (file,) = (tmp_path / "caches").rglob("*.program")
    return file


def found_on_disk(**changed) -> bool:
    try:
        kept(**changed, refuse=True).compiled()
    except Traced:
        return False
    return True


def test_a_kept_program_is_neither_traced_nor_lowered_again_and_computes_the_same(kept_file):
    watched = Startup()
    loaded = kept(refuse=True).compiled()
    watched.mark("first step")
    assert watched.programs.keys() == {"step"} and watched.programs["step"].keys() == {"load"}
    np.testing.assert_array_equal(loaded(VALUES), kept().compiled()(VALUES))


def test_a_program_of_other_settings_arguments_flags_or_code_is_another(kept_file, monkeypatch):
    assert found_on_disk()
    assert not found_on_disk(settings={"rate": 0.25})
    assert not found_on_disk(arguments=(np.arange(5.0, dtype=np.float32),))
    assert not found_on_disk(arguments=(np.arange(4, dtype=np.int32),))
    assert not found_on_disk(arguments=(VALUES,) * 2)
    with jax.default_matmul_precision("float32"):
        assert not found_on_disk()
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert not found_on_disk()
    with monkeypatch.context() as patched:
        patched.setattr(jax, "__version__", "0.0.1")
        assert not found_on_disk()
    with monkeypatch.context() as patched:
        patched.setattr(compilation, "_source_digest", lambda: "edited")
        assert not found_on_disk()
        patched.setattr(compilation, "_source_digest", lambda: None)  # of code that is not the one that runs
        unknown = kept(arguments=(VALUES[:2],))
        unknown.compiled()
        unknown.keep()
        assert list(kept_file.parent.glob("*.program")) == [kept_file]
    assert found_on_disk()


def test_code_that_was_edited_after_the_start_of_the_process_has_no_digest(tmp_path):
    """The process may run what was there before: its program would be kept as that of the new code."""

    def digest(place: str, changed: float, text: str = "x = 1\n") -> str | None:
        root = tmp_path / place
        (root / "part").mkdir(parents=True)
        file = root / "part" / "step.py"
        file.write_text(text)
        os.utime(file, (changed, changed))
        return compilation._source_digest(root)

    began = time.time() - compilation.process_seconds()
    assert digest("before", began - 1) is not None
    assert digest("before and moved", began - 9) == digest("again", began - 1)
    assert digest("other", began - 1, "x = 2\n") != compilation._source_digest(tmp_path / "before")
    assert digest("after", began + 1) is None


def test_what_this_user_did_not_write_is_never_unpickled(kept_file, monkeypatch, tmp_path):
    content, secret = kept_file.read_bytes(), tmp_path / "caches" / "behrt_jax" / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600

    unpickled = []  # an error in its place would count as that of a file that cannot be read

    with monkeypatch.context() as patched:
        patched.setattr(compilation.pickle, "loads", unpickled.append)
        for damaged in (content[:-1], content[:40] + b"x" + content[41:], bytes(32) + content[32:], b""):
            kept_file.write_bytes(damaged)
            assert not found_on_disk()
        kept_file.write_bytes(content)
        own = secret.read_bytes()
        secret.write_bytes(bytes(32))  # of another user, say
        assert not found_on_disk()
        secret.write_bytes(own)
        secret.chmod(0o644)
        assert not found_on_disk()
        secret.chmod(0o600)
        with patched.context() as other_user:
            other_user.setattr(os, "getuid", lambda: secret.stat().st_uid + 1)
            assert not found_on_disk()
        other = kept(arguments=(VALUES[:3],))
        other.compiled()
        other.keep()
        (file,) = (path for path in kept_file.parent.glob("*.program") if path != kept_file)
        file.write_bytes(content)  # one program under the name of another
        assert not found_on_disk(arguments=(VALUES[:3],))
    assert not unpickled and found_on_disk()


def test_a_secret_that_cannot_be_written_leaves_nothing_behind(no_cache_of_the_user, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    use_compilation_cache()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        program = kept()
        program.compiled()
        program.keep()
        assert not list((tmp_path / "caches").rglob("*.program"))
        assert [path.name for path in (tmp_path / "caches" / "behrt_jax").iterdir()] == ["compiled"]
    again = kept(arguments=(VALUES, VALUES))
    again.compiled()
    again.keep()
    assert found_on_disk(arguments=(VALUES, VALUES))


@pytest.mark.parametrize("arguments", [(VALUES[:3],), (VALUES, VALUES), (VALUES.astype(np.int32),)])
def test_a_program_for_other_arguments_is_not_taken_whatever_its_name(kept_file, monkeypatch, arguments):
    monkeypatch.setattr(compilation, "_program_key", lambda *parts: "same")
    first = kept(settings={"other": 1})
    kept_file.unlink()
    jax.config.update("jax_enable_compilation_cache", False)  # whose programs are not written again
    jax_cache.reset_cache()
    first.compiled()
    first.keep()
    assert found_on_disk()
    assert not found_on_disk(arguments=arguments)


def test_what_came_out_of_jaxs_cache_is_not_written_again(kept_file):
    kept_file.unlink()
    again = kept()
    again.compiled()
    again.keep()
    assert not kept_file.exists()


def test_nothing_is_kept_without_a_folder_or_in_one_that_the_user_gave_jax(no_cache_of_the_user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    use_compilation_cache()
    for _ in range(2):
        program = kept()
        assert program.compiled() is not None
        program.keep()
        use_compilation_cache("off")
    assert not list(tmp_path.rglob("*.program"))


def test_processors_with_other_instructions_have_other_folders(monkeypatch):
    monkeypatch.setattr(compilation, "_processor", lambda: ["flags: sse avx2"])
    ours = host_fingerprint()
    monkeypatch.setattr(compilation, "_processor", lambda: ["flags: sse avx2 avx512f"])
    assert host_fingerprint() != ours


@pytest.mark.parametrize(("platform", "place"), [("linux", ".cache"), ("darwin", "Library/Caches")])
def test_default_folder_without_xdg(monkeypatch, platform, place):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", "/somebody")
    assert default_folder() == Path("/somebody") / place / "behrt_jax" / "compiled"


def test_training_imports_nothing_that_only_later_or_optional_parts_need():
    unwanted = ("torch", "sklearn", "matplotlib", "polars", "tyro", "orbax", "tensorstore", "safetensors")
    code = f"import sys, behrt_jax.workflows.pretrain; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What a step frees stays with the process: no page is faulted in anew at each step.


def faults_of_using(megabytes: int, times: int) -> int:
    """Page faults of asking for memory, writing to it and freeing it again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(megabytes * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    faults_of_using(100, times=1)  # the heap grows to it once
    assert faults_of_using(100, times=10) < 100  # otherwise 25,600 pages a time, or 500 huge ones


IN_A_THREAD = """
import resource, threading
from behrt_jax.training.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(100 * 2**20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
found, kept = [], keep_freed_memory()
for _ in range(2):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
print(found[-1] if kept else "not glibc")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is of glibc")
def test_threads_that_start_later_use_it_again_too():
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "not glibc":
        pytest.skip("the C library is not glibc")
    assert int(done.stdout) < 100


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
