"""Checkpoints of the PyTorch reference compute the same here, and ours the same there."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

from behrt_jax.errors import InputError
from behrt_jax.weights.torch_behrt import from_state_dict, read_state_dict, to_state_dict
from tests.weights.torch_case import MODEL, assert_agree, drawn_params, ours, reference, theirs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["pt", "under model_state_dict", "safetensors", "compiled"])
def test_a_checkpoint_of_the_reference_computes_the_same(tmp_path, form):
    module = reference()
    path = tmp_path / "model.pt"
    if form == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(module.state_dict(), path)
    elif form == "under model_state_dict":
        torch.save({"model_state_dict": module.state_dict(), "epoch": 3, "loss": 0.5}, path)
    elif form == "compiled":
        torch.save({f"_orig_mod.{name}": value for name, value in module.state_dict().items()}, path)
    else:
        torch.save(module.state_dict(), path)
    found = from_state_dict(read_state_dict(path), heads=MODEL.heads)
    assert (found.model.layers, found.model.ffn_size, found.model.visit_rows) == (2, 40, 6)
    assert_agree(ours(found.params), theirs(module))


def test_our_parameters_compute_the_same_in_the_reference():
    params, module = drawn_params(), reference(1)
    tensors = {name: torch.from_numpy(values) for name, values in to_state_dict(MODEL, params).items()}
    module.load_state_dict(tensors, strict=True)
    assert_agree(theirs(module), ours(params))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_would_run_when_it_is_loaded_is_refused(tmp_path):
    trap = tmp_path / "sprung"
    torch.save({"model_state_dict": reference().state_dict(), "optimizer": Trap(trap)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="tensors alone"):
        read_state_dict(tmp_path / "model.pt")
    assert not trap.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1, 2], "holds no state_dict"),
        ({"epoch": 3, "model": {"x": torch.zeros(1)}}, "epoch, model is no tensor"),
        (None, "tensors alone"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, held, message):
    path = tmp_path / "model.pt"
    if held is None:
        path.write_bytes(b"nothing of the kind")
    else:
        torch.save(held, path)
    with pytest.raises(InputError, match=message):
        read_state_dict(path)
