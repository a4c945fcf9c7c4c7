"""Checkpoints of PyTorch become exported folders, their codes in the order of ours."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from behrt_jax.cli import COMMANDS, main, parse
from behrt_jax.config.commands import ExportConfig, ImportWeightsConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.models.behrt import BEHRTForMLM
from behrt_jax.training.pretrained import open_pretrained
from behrt_jax.weights.portable import open_portable, read_weights
from behrt_jax.weights.torch_behrt import from_state_dict, to_state_dict
from behrt_jax.workflows.export import export
from behrt_jax.workflows.finetune import finetune
from behrt_jax.workflows.import_weights import import_weights, order_of_rows, read_codes
from behrt_jax.workflows.loaded import load
from tests.models.rows import random_batch
from tests.weights.test_torch_behrt import CODES, LAYER, MODEL, adapted, drawn
from tests.workflows.finetune_case import ONE, changed

# In another order than ours, and named otherwise; "PAD" is an ordinary code.
THEIRS = ["<unk>", "A", "<pad>", "B", "PAD", "[mask]", "C", "D", "__SEP__", "E", "F"]
OURS = ("A", "B", "PAD", "C", "D", "E", "F")


@pytest.fixture
def given(tmp_path):
    """A checkpoint and its vocabulary."""
    save_file(to_state_dict(MODEL, drawn()), tmp_path / "model.safetensors")
    (tmp_path / "codes.json").write_text(json.dumps(THEIRS))
    return ImportWeightsConfig(
        weights=tmp_path / "model.safetensors",
        vocabulary=tmp_path / "codes.json",
        heads=2,
        output=tmp_path / "imported",
    )


def logits(model, params, rows):
    """At real positions of histories whose codes are the given rows."""
    batch = random_batch(0, segments=1)
    codes = np.asarray(rows)[batch.codes % len(rows)].astype(np.int32)
    found = jax.jit(BEHRTForMLM(model, len(params["mlm_head"]["decoder"]["bias"])).apply)(
        {"params": params}, batch._replace(codes=codes)
    )
    return np.asarray(found)[batch.segment_ids > 0]


def test_codes_mean_the_same_after_they_have_moved(given):
    import_weights(given)
    found = open_portable(given.output)
    assert found.vocabulary.codes == (*SPECIAL_TOKENS, *OURS)
    assert (found.model.heads, found.model.hidden_size, found.model.layers) == (2, 8, 2)
    params, _ = read_weights(found)
    here = [found.vocabulary.codes.index(code) for code in ("A", "F", "PAD", "[UNK]", "[MASK]")]
    there = [THEIRS.index(code) for code in ("A", "F", "PAD", "<unk>", "[mask]")]
    ours, theirs = logits(found.model, params, here), logits(MODEL, drawn(), there)
    assert np.std(theirs, axis=0).min() > 0.01
    names = dict(
        zip(["[PAD]", "[MASK]", "[UNK]", "[SEP]"], ["<pad>", "[mask]", "<unk>", "__SEP__"], strict=True)
    )
    moved = [THEIRS.index(names.get(code, code)) for code in found.vocabulary.codes if code != "[CLS]"]
    kept = [row for row, code in enumerate(found.vocabulary.codes) if code != "[CLS]"]
    np.testing.assert_allclose(ours[:, kept], theirs[:, moved], atol=1e-5)
    probabilities = np.asarray(jax.nn.softmax(ours, axis=-1))
    assert probabilities[:, found.vocabulary.codes.index("[CLS]")].max() == 0.0
    np.testing.assert_allclose(probabilities[:, kept], jax.nn.softmax(theirs, axis=-1)[:, moved], atol=1e-6)


def test_adapters_are_merged_and_those_never_called_are_told(given, capsys):
    tensors, a, b = adapted(load_file(given.weights), f"{LAYER}.linear1", 2, "ours")
    tensors, _, _ = adapted(tensors, f"{LAYER}.self_attn.out_proj", 2, "ours")
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, given.weights)
    import_weights(replace(given, alpha=6.0))
    said = " ".join(capsys.readouterr().out.split())
    assert f"the adapter on {LAYER}.self_attn.out_proj is left out" in said
    found, _ = read_weights(open_portable(given.output))
    before, after = (tree["behrt"]["encoder"]["layer_0"] for tree in (drawn(), found))
    difference = after["intermediate"]["kernel"] - before["intermediate"]["kernel"]
    np.testing.assert_allclose(difference, 3.0 * a @ b, atol=1e-5)
    np.testing.assert_array_equal(after["attention"]["out"]["kernel"], before["attention"]["out"]["kernel"])


def test_a_vocabulary_is_read_from_each_kind_of_file(tmp_path):
    ids = list(range(len(THEIRS)))[::-1]
    table = pa.table({"id": ids, "code": THEIRS, "description": [f"text of {code}" for code in THEIRS]})
    pq.write_table(table, tmp_path / "codes.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "codes.csv")
    for name in ("codes.parquet", "codes.csv"):
        found = read_codes(tmp_path / name)
        assert found.codes == THEIRS[::-1]
        assert found.descriptions[0] == "text of F"
    (tmp_path / "codes.json").write_text(json.dumps(dict(zip(THEIRS, ids, strict=True))))
    assert read_codes(tmp_path / "codes.json").codes == THEIRS[::-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("codes.json", '{"A": 0, "B": 2}', "in place of 1 there is 2 \\('B'\\)"),
        ("codes.json", '{"A": 0, "B": 0}', "in place of 1 there is 0"),
        ("codes.json", '{"A": "0"}', "code -> id"),
        ("codes.json", '["A", "A"]', "each of them once"),
        ("codes.csv", "code,id\nA,0\nA,1\n", "code twice"),
        ("codes.csv", "code,number\nA,0\n", "columns code and id"),
        ("codes.parquet", "no such thing", "cannot be read as a vocabulary"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_codes(tmp_path / name)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (THEIRS[:-1], {}, r"10 codes, the code table of .* 11 rows"),
        ([*THEIRS[:5], "G", *THEIRS[6:]], {}, r"nothing like \[MASK\] .* --special \[MASK\]=CODE"),
        ([*THEIRS[:-1], "(Mask)"], {}, r"has \[mask\], \(Mask\): say which"),
        (THEIRS, {"cls_token": True}, r"nothing like \[CLS\]"),
        (THEIRS, {"special": ("[MASK]=G",)}, "no code G"),
        (THEIRS, {"special": ("MASK=A",)}, "TOKEN=CODE"),
        ([*THEIRS[:-1], "[CLS]"], {"special": ("[CLS]=A",)}, r"\[CLS\] is a special token here"),
    ],
)
def test_codes_that_cannot_be_matched_are_refused(given, codes, options, message):
    with pytest.raises(InputError, match=message):
        order_of_rows(codes, CODES, replace(given, **options))


def test_special_tokens_are_named_by_an_option(given):
    codes = [*THEIRS[:5], "G", *THEIRS[6:]]
    assert order_of_rows(codes, CODES, replace(given, special=("[MASK]=G", "[CLS]=F")))[:5].tolist() == [
        2, 5, 0, 10, 8,
    ]  # fmt: skip


@pytest.mark.parametrize("missing", ["weights", "vocabulary", "heads", "output"])
def test_what_is_missing_is_named(given, missing):
    with pytest.raises(InputError, match=f"--{missing} is missing"):
        import_weights(replace(given, **{missing: None}))


def test_the_command_takes_its_options(given, capsys):
    options = ["--weights", str(given.weights), "--vocabulary", str(given.vocabulary), "--heads", "2"]
    assert main(["import-weights", *options, "--output", str(given.output)]) == 0
    assert (given.output / "model.safetensors").is_file()
    assert main(["import-weights", *options, "--output", str(given.output)]) == 2
    assert "holds other files: give an --output" in capsys.readouterr().err
    chosen = parse(COMMANDS["import-weights"], ["--special", "[MASK]=<m>", "[PAD]=<p>"], "")
    assert chosen.special == ("[MASK]=<m>", "[PAD]=<p>")


@pytest.mark.slow
def test_a_run_goes_out_and_in_again_and_is_fine_tuned(case, tmp_path):
    export(ExportConfig(run=case.base, output=tmp_path / "exported", format="torch"), ONE)
    config = ImportWeightsConfig(
        weights=tmp_path / "exported/model_torch.safetensors",
        vocabulary=tmp_path / "exported/vocabulary.parquet",
        heads=2,
        output=tmp_path / "imported",
    )
    import_weights(config)
    base, imported = load(case.base, devices=ONE), load(tmp_path / "imported", devices=ONE)
    assert imported.vocabulary.codes == base.vocabulary.codes
    jax.tree.map(np.testing.assert_array_equal, imported.params, base.params)
    assert open_pretrained(tmp_path / "imported").model.layers == base.config.layers
    task = changed(replace(case.config(), init=tmp_path / "imported"), "train", epochs=1)
    finetune(replace(task, output=tmp_path / "task"), ONE)
    assert (tmp_path / "task/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_fine_tuned_run_goes_out_with_its_adapters_merged(case, tmp_path):
    export(ExportConfig(run=case.run(), output=tmp_path / "exported", format="torch"), ONE)
    tensors = load_file(tmp_path / "exported/model_torch.safetensors")
    params = load(case.run(), devices=ONE).params
    np.testing.assert_array_equal(tensors["task_head.weight"], params["task_head"]["dense"]["kernel"].T)
    layer = params["behrt"]["encoder"]["layer_0"]
    np.testing.assert_array_equal(tensors[f"{LAYER}.linear1.weight"], layer["intermediate"]["kernel"].T)
    with pytest.raises(InputError, match=r"unknown: task_head\.bias, task_head\.weight"):
        from_state_dict(tensors, heads=2)


@pytest.mark.slow
def test_an_adapter_as_peft_saves_it_predicts_beside_its_task(case, tmp_path):
    source, folder = case.run() / "adapter", tmp_path / "saved"
    folder.mkdir()
    shutil.copy(source / "task.json", folder)
    tensors = load_file(source / "adapter_model.safetensors")
    halved = {
        name: values / 2 if name.endswith("lora_B.weight") else values for name, values in tensors.items()
    }
    save_file(halved, folder / "adapter_model.safetensors")
    stored = json.loads((source / "adapter_config.json").read_text())
    stored["lora_alpha"] *= 2  # of half the product
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    expected, found = (
        case.predicted(tmp_path / f"{name}.parquet", model=model, base=case.base)
        for name, model in (("own", source), ("saved", folder))
    )
    column = "predicted_boolean_probability"
    np.testing.assert_allclose(found[column].to_numpy(), expected[column].to_numpy(), rtol=1e-6)
