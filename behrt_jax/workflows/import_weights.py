"""A checkpoint of BEHRT in PyTorch into an exported folder, its vocabulary in the order of ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from behrt_jax.adapters import lora
from behrt_jax.config.commands import ImportWeightsConfig
from behrt_jax.data.vocabulary import SPECIAL_TOKENS, Vocabulary
from behrt_jax.errors import InputError
from behrt_jax.files import check_new_folder, read_json
from behrt_jax.models.stacked_layers import Tree
from behrt_jax.run_folder import shown_files
from behrt_jax.tracking.console import open_console
from behrt_jax.weights.portable import PortableConfig, write_model
from behrt_jax.weights.torch_behrt import TorchWeights, from_state_dict, read_state_dict

ALIASES = {
    "[PAD]": ("PAD", "PADDING"),
    "[MASK]": ("MASK",),
    "[UNK]": ("UNK", "UNKNOWN", "OOV"),
    "[CLS]": ("CLS",),
    "[SEP]": ("SEP",),
}
"""Special token -> names that it goes by, in any case, with brackets or underscores around them or bare."""
NEVER = -1e4
"""Logit of a token that the checkpoint does not have: it is never predicted."""


def import_weights(config: ImportWeightsConfig) -> PortableConfig:
    """Write ``config.output``, whole or not at all: `load`, ``--init.run`` and ``finetune --init`` take it.

    Adapters are merged into the weights. Special tokens get the ids that they have here; where the checkpoint
    has no [CLS] or [SEP], their rows are zero and their logits far below all others.

    Returns:
        Content of its config.json.

    Raises:
        InputError: an option is missing, a file cannot be read, the checkpoint is not in the layout of
            `weights.torch_behrt`, or its vocabulary does not fit it or lacks a special token.
    """
    for name in ("weights", "vocabulary", "heads", "output"):
        if getattr(config, name) is None:
            raise InputError(f"--{name} is missing: see behrt-jax import-weights --help.")
    assert config.weights and config.vocabulary and config.heads is not None and config.output
    check_new_folder(config.output, "--output")
    with open_console() as console:
        theirs = read_codes(config.vocabulary)
        found = from_state_dict(
            read_state_dict(config.weights),
            config.heads,
            config.alpha,
            config.age_bin_years,
            str(config.weights),
        )
        rows = order_of_rows(theirs.codes, found.vocabulary_size, config)
        for layer in found.left_out:
            console.log(
                f"warning: the adapter on {layer} is left out: nn.MultiheadAttention never calls that layer, "
                "so that the adapter was no part of the model and did not train."
            )
        if found.adapters is not None:
            console.log(
                f"Adapters on {len(lora.layer_paths(found.lora))} layers are merged into the weights."
            )
        texts = (*theirs.descriptions, None)  # of a row that is not there
        vocabulary = Vocabulary(
            (*SPECIAL_TOKENS, *(theirs.codes[row] for row in rows[len(SPECIAL_TOKENS) :])),
            np.zeros(len(rows), np.int64),
            tuple(texts[row] for row in rows),
        )
        model = replace(found.model, cls_token=config.cls_token, sep_token=config.sep_token)
        written = write_model(config.output, model, vocabulary, None, reordered(found, rows))
        console.log(f"Written to {config.output}: {', '.join(shown_files(config.output))}")
    return written


class Codes(NamedTuple):
    """The vocabulary of a PyTorch system, in the order of its ids."""

    codes: list[str]
    descriptions: list[str | None]


def read_codes(path: Path) -> Codes:
    """Read code -> id: a JSON object, or a list in the order of the ids; Parquet or CSV with the columns
    `code` and `id`, and maybe `description`.

    Raises:
        InputError: the file cannot be read, is none of these, or its ids are not 0, 1, ... once each.
    """
    if path.suffix == ".json":
        held = read_json(path)
        if isinstance(held, list):
            held = (
                {code: row for row, code in enumerate(held)}
                if len(set(map(str, held))) == len(held)
                else None
            )
        if not isinstance(held, dict) or not all(type(row) is int for row in held.values()):
            raise InputError(
                f"{path} must be an object of code -> id, or a list of codes, each of them once."
            )
        codes, ids, texts = list(held), list(held.values()), [None] * len(held)
    else:
        table = _read_table(path)
        codes, ids = table["code"].to_pylist(), table["id"].to_pylist()
        texts = table["description"].to_pylist() if "description" in table.column_names else [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda place: (ids[place] is None, ids[place]))
    for row, place in enumerate(order):
        if ids[place] != row or not isinstance(codes[place], str):
            raise InputError(
                f"{path}: ids must be 0, 1, 2, ... with a code each, but in place of {row} there is "
                f"{ids[place]} ({codes[place]!r}): give the vocabulary that the model was trained with."
            )
    if len(set(codes)) < len(codes):
        raise InputError(f"{path} has a code twice: give the vocabulary that the model was trained with.")
    return Codes([codes[place] for place in order], [texts[place] for place in order])


def _read_table(path: Path) -> pa.Table:
    """A table with `code` as text and `id` as whole numbers."""
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            text = pyarrow.csv.ConvertOptions(column_types={"code": pa.string()}, strings_can_be_null=False)
            table = pyarrow.csv.read_csv(path, convert_options=text)
        columns = {"code": table["code"].cast(pa.string()), "id": table["id"].cast(pa.int64())}
    except (OSError, KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"{path} cannot be read as a vocabulary: give JSON (.json), Parquet (.parquet) or CSV with the "
            "columns code and id."
        ) from error
    if "description" in table.column_names:
        columns["description"] = table["description"].cast(pa.string())
    return pa.table(columns)


def order_of_rows(codes: Sequence[str], rows: int, config: ImportWeightsConfig) -> np.ndarray:
    """Row of the checkpoint for each row of ours, int64 ``[V]``: special tokens first, -1 for one not there.

    Args:
        codes: of the checkpoint, by id.
        rows: of its code table.
        config: gives names of special tokens, and whether its sequences had [CLS] and [SEP].

    Raises:
        InputError: it has not as many codes as rows, or a special token is not there, or more than once.
    """
    if len(codes) != rows:
        raise InputError(
            f"--vocabulary: {config.vocabulary} has {len(codes)} codes, the code table of {config.weights} "
            f"{rows} rows: give the vocabulary that the model was trained with."
        )
    places = {code: row for row, code in enumerate(codes)}
    named = _named(config.special, places)
    special = [
        places[named[token]] if token in named else _find(token, codes, f"--vocabulary: {config.vocabulary}")
        for token in SPECIAL_TOKENS
    ]
    needed = {"[PAD]", "[MASK]", "[UNK]"}
    needed |= {token for token, used in (("[CLS]", config.cls_token), ("[SEP]", config.sep_token)) if used}
    for token, row in zip(SPECIAL_TOKENS, special, strict=True):
        if row < 0 and token in needed:
            raise InputError(
                f"--vocabulary: {config.vocabulary} has nothing like {token} (looked for "
                f"{', '.join(ALIASES[token])}): say which code it is by --special {token}=CODE."
            )
    others = [row for row in range(rows) if row not in special]
    clashing = [codes[row] for row in others if codes[row] in SPECIAL_TOKENS]
    if clashing:
        raise InputError(f"--special: {clashing[0]} is a special token here, and cannot be an ordinary code.")
    return np.array([*special, *others])


def _named(special: Sequence[str], places: Mapping[str, int]) -> dict[str, str]:
    """Special token -> code, as options say."""
    named = dict(entry.split("=", 1) for entry in special if "=" in entry)
    if len(named) < len(special) or not named.keys() <= set(SPECIAL_TOKENS):
        raise InputError(f"--special takes TOKEN=CODE, TOKEN one of {' '.join(SPECIAL_TOKENS)}.")
    for code in named.values():
        if code not in places:
            raise InputError(f"--special: the vocabulary has no code {code}.")
    return named


def _find(token: str, codes: Sequence[str], where: str) -> int:
    """Row of the code that is a special token by its name, -1 where there is none.

    A name with brackets counts before one without, which may be an ordinary code.
    """
    names = "|".join(ALIASES[token])
    for pattern in (rf"[\[<(_|]+({names})[\])>_|]+", names):
        found = [row for row, code in enumerate(codes) if re.fullmatch(pattern, code, re.IGNORECASE)]
        if len(found) > 1:
            told = ", ".join(codes[row] for row in found)
            raise InputError(f"{where} has {told}: say which is {token} by --special {token}=CODE.")
        if found:
            return found[0]
    return -1


def reordered(found: TorchWeights, rows: np.ndarray) -> Tree:
    """Parameters with adapters merged, whose codes are in the order of `rows` (:func:`order_of_rows`)."""
    params = found.params
    if found.adapters is not None:
        params = lora.merge(params, found.lora, found.adapters)
    missing = rows < 0
    table, decoder = params["behrt"]["embeddings"]["code"], params["mlm_head"]["decoder"]
    codes = np.where(missing[:, None], 0.0, np.asarray(table["embedding"])[rows])  # [V, E]
    kernel = np.where(missing, 0.0, np.asarray(decoder["kernel"])[:, rows])  # [D, V]
    bias = np.where(missing, NEVER, np.asarray(decoder["bias"])[rows])  # [V]
    embeddings = {**params["behrt"]["embeddings"], "code": {"embedding": codes}}
    return {
        "behrt": {**params["behrt"], "embeddings": embeddings},
        "mlm_head": {**params["mlm_head"], "decoder": {"kernel": kernel, "bias": bias}},
    }
