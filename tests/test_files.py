import subprocess
import sys

import pytest

from behrt_jax import files as module
from behrt_jax.errors import InputError
from behrt_jax.files import work_folder


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_folder_is_removed_whatever_happens(tmp_path):
    with pytest.raises(KeyError), work_folder(tmp_path, "making-out") as folder:
        (folder / "part").write_text("half")
        assert folder.name.startswith(".making-out.")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.platform, "node", lambda: "host.of[me]")
    names = {
        ".making-o[u]t.host-of-me-.abc": False,
        ".making-o[u]t.another.abc": True,  # cannot be known
        ".making-out.host-of-me-.abc": True,  # of another output
    }
    for name in names:
        (tmp_path / name / "prepared").mkdir(parents=True)
    with (
        work_folder(tmp_path, "making-o[u]t"),
        pytest.raises(InputError, match="another process works there"),
        work_folder(tmp_path, "making-o[u]t"),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}
