"""The encoder, its adapters, and the parameters of both that are trained."""

from dataclasses import dataclass, replace
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
    """Width of the feed-forward layer. Where not given: 4 * hidden_size, or as many parameters of a gated one
    (8/3 * hidden_size, up to a multiple of 8)."""
    ffn: Literal["gelu", "geglu", "swiglu"] = "gelu"
    """Feed-forward layer: two products with GELU between them, or gated by a third one through GELU or SiLU
    (Shazeer 2020, arXiv 2002.05202)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), which subtracts no mean."""
    bias: bool = True
    """Dense layers, LayerNorm and the MLM head's first layer have a bias. Off: none but the decoder's."""
    tied_decoder: bool = False
    """The last layer of the MLM head is the code embedding, in place of a matrix of its own."""
    positions: int = 50
    """Longest sequence, in tokens, that the model reads."""
    position_embedding: Literal["learned", "sinusoidal", "rope", "rope_time"] = "learned"
    """A trained table, the fixed sinusoids of Vaswani et al. 2017, or rotary positions (Su et al. 2021, arXiv
    2104.09864), by which attention reads distances: rope in what position_of counts, rope_time in days."""
    position_of: Literal["event", "visit"] = "event"
    """What a position counts: tokens in the sequence, or (as in the BEHRT paper) visits."""
    rope_base: float = 10_000.0
    """Of rotary positions: the slowest pair of components turns once in 2 pi times so many steps, or days."""
    time: Literal["none", "gaps", "time2vec"] = "none"
    """What is embedded of time beside age, by Time2Vec (Kazemi et al. 2019, arXiv 1907.05321). gaps: days
    since the visit before. time2vec: also the date, which means nothing where each subject's are shifted."""
    age_bin_years: float = 5.0
    """Width of an age bin in years (0.08333333333333333 for months)."""
    age_rows: int = 22
    """Rows of the age table; older ages share the last row."""
    visit_embedding: Literal["ordinal", "alternating", "none"] = "ordinal"
    """A row per visit ordinal, or (as in the BEHRT paper) two rows, A and B, in turn."""
    visit_rows: int = 512
    """Rows of the ordinal visit table; later visits share the last row."""
    cls_token: bool = False
    """Each sequence starts with [CLS] (needed for `cls` pooling)."""
    sep_token: bool = False
    """Each visit ends with [SEP]."""
    fact_tokens: bool = False
    """Facts that do not change (sex, race, ethnicity: `static_codes` of the preparation) stand as tokens
    before the first event of each sequence, and of each window of a longer history. They are never masked."""
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

    def resolved(self) -> "ModelConfig":
        """The same model with the value of each setting written out that follows from another one."""
        dropout = self.dropout if self.attention_dropout is None else self.attention_dropout
        return replace(self, ffn_size=self.inner_size, attention_dropout=dropout)

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layer, where `ffn_size` is not given too."""
        gated = 8 * -(-self.hidden_size // 3)
        return self.ffn_size or (4 * self.hidden_size if self.ffn == "gelu" else gated)

    @property
    def reads_days(self) -> bool:
        """Whether the day of an event makes a difference, beside the order of events and the age."""
        return self.time != "none" or self.position_embedding == "rope_time"


# Adapters, and what of the model is trained.


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 8
    """Inner width of every adapter, at most that of its layer."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; alpha is 2 * rank where not given."""
    dropout: float = 0.0
    """Dropout rate on an adapter's input."""
    targets: tuple[str, ...] = ("query", "key", "value", "out")
    """Dense layers to adapt, by name (query key value out intermediate output, and gate where model.ffn has
    one) or, with a slash in it, by a glob pattern over the whole path (behrt/encoder/layer_0/*)."""
    exclude: tuple[str, ...] = ()
    """Layers to leave as they are although the targets match them, named likewise."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks of single layers: PATTERN=RANK, named likewise (out=4 behrt/encoder/layer_0/*=16). Of
    several that match a layer the first counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas of single layers: PATTERN=ALPHA."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    init: Literal["default", "orthogonal", "pissa"] = "default"
    """First values; the model's outputs are those of its base under each. default: a at random, b zero.
    orthogonal: both at random, in orthogonal parts of the rank. pissa: the largest singular values and
    vectors of the layer, which are taken out of it (Meng et al. 2024, arXiv 2404.02948)."""
    product: Literal["auto", "activations", "extended", "merged"] = "auto"
    """How x @ (W + scale * a @ b) is computed: on activations; in one product with x extended by x @ a and
    W by b (faster on an accelerator); or with the weights merged in the forward pass and a low-rank backward
    pass (faster in float32 on a CPU). Equal results. `auto` takes `merged` where it is allowed (float32, no
    adapter dropout, adapted kernels frozen), `extended` where only the precision forbids that."""


@dataclass(frozen=True)
class FreezingConfig:
    """Parameter groups (of lora, embedding, head and base) that are trained."""

    regime: Literal["full", "lora", "lora_pretrained", "lora_only", "all_but_adapted"] = "full"
    """full: all. lora: adapters, embeddings and head (right from scratch). lora_pretrained: adapters
    and head (embeddings already pretrained). lora_only and all_but_adapted are known mistakes, kept
    for study: they warn."""
    groups: tuple[Literal["lora", "embedding", "head", "base"], ...] = ()
    """An explicit set of groups to train, in place of a named regime."""
