"""The package as others have it: built as a wheel, without the repository, and with few other packages."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SHORT = "--data.subjects", "200", "--train.max_steps", "2"


def output_of(*command, cwd, **environment):
    """Standard output of a process that does not see the checkout, which must end well."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**kept, **environment}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of nothing but what belongs to the package."""
    root = tmp_path_factory.mktemp("wheel")
    source, built = root / "source", root / "built"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "behrt_jax", source / "behrt_jax", ignore=ignored)
    shutil.copytree(ROOT / "experiments", source / "experiments", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "data", source / "tests" / "data", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    output_of(sys.executable, "-c", build, str(built), cwd=source)
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    """What is in the wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_has_every_module_of_the_package_and_nothing_else(folder):
    def modules(root):
        return sorted(str(path.relative_to(root)) for path in root.glob("behrt_jax/**/*.py"))

    assert modules(folder) == modules(ROOT)
    assert (folder / "behrt_jax" / "py.typed").is_file()
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"behrt_jax"}


def test_the_wheel_says_what_it_is(folder):
    (file,) = folder.glob("*.dist-info/METADATA")
    told = email.message_from_string(file.read_text(encoding="utf-8"))
    assert told["Author"] == "The behrt_jax developers"
    assert told["License-Expression"] == "Apache-2.0" and told["Requires-Python"] == ">=3.11"
    assert {"JAX", "electronic health records"} <= set(told["Keywords"].split(","))
    assert {"Typing :: Typed", "Programming Language :: Python :: 3.12"} <= set(told.get_all("Classifier"))
    addresses = told.get_all("Project-URL", [])
    assert addresses and all(re.fullmatch(r"[\w ]+, https://\S+", line) for line in addresses)
    assert told.get_payload().startswith("# behrt_jax")


INSTALLED = textwrap.dedent("""
    import sys
    from importlib.metadata import Distribution
    from pathlib import Path

    folder, *arguments = sys.argv[1:]
    of_repository = [path for path in sys.path if Path(path, "experiments", "pretrain.py").exists()]
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", *of_repository))]
    import behrt_jax

    assert Path(behrt_jax.__file__).parents[1] == Path(folder), behrt_jax.__file__
    (distribution,) = Distribution.discover(name="behrt-jax", path=[folder])
    (script,) = distribution.entry_points.select(group="console_scripts", name="behrt-jax")
    sys.argv[:] = ["behrt-jax", *arguments]
    sys.exit(script.load()())
""")


def test_the_installed_command_has_the_named_configurations(folder, tmp_path):
    installed = sys.executable, "-c", INSTALLED, str(folder)
    assert output_of(*installed, "--help", cwd=tmp_path).startswith("usage: behrt-jax COMMAND")
    options = output_of(*installed, "pretrain", "--config", "large_lora", "--help", cwd=tmp_path)
    assert "Shown are the values of large_lora." in " ".join(options.split())


@pytest.mark.slow
def test_the_main_job_runs_where_the_wheel_is_installed(wheel, tmp_path):
    # The packages that it needs are those of this environment, whose own behrt_jax is hidden by the wheel's.
    venv.create(tmp_path / "venv")
    python, command = (tmp_path / "venv" / "bin" / name for name in ("python", "behrt-jax"))
    site = output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    Path(site.strip(), "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    install = "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)
    output_of(sys.executable, *install, cwd=tmp_path)
    where = output_of(python, "-c", "import behrt_jax; print(behrt_jax.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(tmp_path / "venv")
    output_of(command, "pretrain", "--config", "small_lora", *SHORT, "--output", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["name"] == "small_lora"
    assert (tmp_path / "run" / "adapter").is_dir()


# With no other packages than those that `pip install behrt-jax` brings.

BARE = textwrap.dedent("""
    import sys
    from importlib.abc import MetaPathFinder


    class Absent(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)


    absent = set(sys.argv.pop(1).split())
    for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
        del sys.modules[name]  # which some file of the environment imports at its start
    sys.meta_path.insert(0, Absent())
    before = set(sys.modules)
    import behrt_jax

    found = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
    assert found == {"behrt_jax"}, found
""")
TRAINING = textwrap.dedent("""
    from dataclasses import replace
    from pathlib import Path

    from behrt_jax.presets import PRETRAIN
    from behrt_jax.workflows.pretrain import pretrain

    config = PRETRAIN["small_lora"]
    pretrain(
        replace(
            config,
            output=Path("run"),
            data=replace(config.data, subjects=200),
            train=replace(config.train, max_steps=2),
        )
    )
""")


def needed(name):
    """Distributions that a distribution needs without extras, by their canonical names, itself included."""
    names, found = [name], set()
    while names:
        if (one := canonicalize_name(names.pop())) in found:
            continue
        found.add(one)
        try:
            requirements = importlib.metadata.requires(one) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def absent():
    """Modules that only other packages have, as one text."""
    core = needed("behrt-jax")
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "chex", "pyarrow"} <= core
    modules = importlib.metadata.packages_distributions().items()
    absent = {
        name for name, owners in modules if core.isdisjoint(canonicalize_name(owner) for owner in owners)
    }
    assert {"tyro", "matplotlib", "safetensors", "meds", "pytest", "sklearn", "polars"} <= absent
    return " ".join(sorted(absent))


def test_the_package_and_its_training_are_imported_with_the_core_packages_alone(absent, tmp_path):
    script = BARE + "from behrt_jax.workflows.pretrain import pretrain; import behrt_jax.cli"
    output_of(sys.executable, "-c", script, absent, cwd=tmp_path, PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_a_training_ends_well_with_the_core_packages_alone(absent, tmp_path):
    printed = output_of(sys.executable, "-c", BARE + TRAINING, absent, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stop_reason"] == "finished"
    assert "need the package safetensors: pip install safetensors. Its values are in checkpoints" in printed
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "adapter").exists()
