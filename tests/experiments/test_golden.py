"""The JAX model computes what the PyTorch reference computed, read from files."""

import jax
import numpy as np
import pytest

from tests.experiments.golden_reference import CASES, FOLDER, summary
from tests.experiments.reference_cases import TOLERANCE, is_key_bias, ours, weights


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "large")) for name in CASES]
)
def test_loss_logits_and_gradients_are_those_of_the_reference(name):
    config, lora = CASES[name]
    results = ours(config, weights(config, lora), lora)
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    compared = {tuple(path.split("/")): results.gradients[tuple(path.split("/"))] for path in golden["paths"]}
    if lora is None:
        assert compared.keys() == results.gradients.keys()
    else:
        assert sum(path[0] == "lora" for path in compared) == len(
            jax.tree.leaves(weights(config, lora)["lora"])
        )
    got = summary(results._replace(gradients=compared))
    assert list(got["paths"]) == list(golden["paths"])

    np.testing.assert_allclose(got["loss"], golden["loss"], rtol=TOLERANCE)
    assert np.linalg.norm(got["logits"] - golden["logits"]) < TOLERANCE * np.linalg.norm(golden["logits"])
    # The key bias has no gradient but rounding: it is measured against the others.
    key_bias = np.array([is_key_bias(tuple(path.split("/"))) for path in golden["paths"]])
    scale = np.where(key_bias, np.median(golden["norms"]), golden["norms"])
    distance = np.sqrt(np.square(got["projections"] - golden["projections"]).mean(axis=1))
    for measured in (distance, np.abs(got["norms"] - golden["norms"])):
        worst = np.argmax(measured / scale)
        assert measured[worst] < TOLERANCE * scale[worst], (
            golden["paths"][worst],
            measured[worst] / scale[worst],
        )
