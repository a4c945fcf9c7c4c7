import subprocess
import sys

import pytest

from behrt_jax import files as module
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


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch, dead):
    monkeypatch.setattr(module.platform, "node", lambda: "host.of[me]")
    names = {
        f".making-o[u]t.host-of-me-.{dead}.abc": False,
        f".making-o[u]t.host-of-me-.{module.os.getpid()}.abc": True,  # in use
        f".making-o[u]t.another.{dead}.abc": True,  # cannot be known
        f".making-out.host-of-me-.{dead}.abc": True,  # of another output
        f".making-o[u]t.host-of-me-.{dead}x.abc": True,
    }
    for name in names:
        (tmp_path / name / "prepared").mkdir(parents=True)
    with work_folder(tmp_path, "making-o[u]t"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}
