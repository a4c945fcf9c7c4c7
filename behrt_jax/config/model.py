"""The encoder and its adapters."""

from dataclasses import dataclass
from typing import Literal

Attention = Literal["auto", "dense", "chunked", "cudnn"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the BEHRT encoder and its MLM head."""

    embedding_size: int = 64
    """Width of the code, age, visit and position embeddings."""
    hidden_size: int = 128
    """Width of the encoder; the embeddings are projected to it where the two differ."""
    layers: int = 2
    """Number of transformer blocks."""
    heads: int = 4
    """Attention heads; hidden_size must be divisible by it."""
    ffn_size: int | None = None
    """Width of the feed-forward layer; 4 * hidden_size where not given."""
    positions: int = 50
    """Longest sequence, in tokens, that the model reads."""
    position_embedding: Literal["learned", "sinusoidal"] = "learned"
    """A trained table, or the fixed sinusoids of Vaswani et al. 2017."""
    position_of: Literal["event", "visit"] = "event"
    """What a position counts: tokens in the sequence, or (as in the BEHRT paper) visits."""
    age_bin_years: float = 5.0
    """Width of an age bin in years (0.08333333333333333 for months)."""
    age_rows: int = 22
    """Rows of the age table; older ages share the last row."""
    visit_embedding: Literal["ordinal", "alternating"] = "ordinal"
    """A row per visit ordinal, or (as in the BEHRT paper) two rows, A and B, in turn."""
    visit_rows: int = 512
    """Rows of the ordinal visit table; later visits share the last row."""
    cls_token: bool = False
    """Each sequence starts with [CLS] (needed for `cls` pooling)."""
    sep_token: bool = False
    """Each visit ends with [SEP]."""
    dropout: float = 0.1
    """Dropout rate on embeddings and residual branches."""
    attention_dropout: float | None = None
    """Dropout rate on attention weights; the same as `dropout` where not given."""
    attention: Attention = "auto"
    """dense holds all weights of a batch at once; chunked works them out in tiles, with memory linear in the
    length, and skips tiles between separate subjects: equal results. cudnn is NVIDIA's library (bfloat16,
    no attention dropout): equal up to rounding. auto takes cudnn where it can, else dense for short rows and
    chunked for long ones."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products; parameters, softmax, LayerNorm and loss stay float32."""
    rematerialise: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time. On a CPU memory is
    saved with scan_layers alone."""
    scan_layers: bool = False
    """Compile one block and run it once a layer, its parameters stacked over layers. Deep models compile
    faster by it, shallow ones run slower."""
    head_chunk: int | None = None
    """Codes of the vocabulary whose logits are held at once, for all masked codes. Where not given: the
    whole vocabulary while its logits take little memory, else parts of it. Equal results."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 8
    """Inner width of every adapter."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; alpha is 2 * rank where not given."""
    dropout: float = 0.0
    """Dropout rate on an adapter's input."""
    targets: tuple[str, ...] = ("query", "key", "value", "out")
    """Dense layers to adapt, by name (query key value out intermediate output) or, with a slash in
    it, by a glob pattern over the whole path (behrt/encoder/layer_0/*)."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    product: Literal["auto", "activations", "extended", "merged"] = "auto"
    """How x @ (W + scale * a @ b) is computed: on activations; in one product with x extended by x @ a and
    W by b (faster on an accelerator); or with the weights merged in the forward pass and a low-rank backward
    pass (faster in float32 on a CPU). Equal results. `auto` takes `merged` where it is allowed (float32, no
    adapter dropout, adapted kernels frozen), `extended` where only the precision forbids that."""
