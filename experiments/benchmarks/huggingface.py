"""BERT and ModernBERT of Hugging Face's transformers, trained on masked codes as this encoder is."""

from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from behrt_jax.config.model import ModelConfig
from behrt_jax.config.training import PretrainConfig
from behrt_jax.data.batches import Batch
from behrt_jax.data.vocabulary import PAD
from behrt_jax.training.masking import MaskedCodes
from behrt_jax.training.optimizer import learning_rate_schedule


def make_encoder(architecture: str, model: ModelConfig, vocabulary_size: int) -> nn.Module:
    """A model for masked codes with random parameters, of the sizes of `model`.

    Both are as their configuration classes make them, but for sizes and dropout: BERT (Devlin et al. 2018,
    arXiv 1810.04805) with learned positions, ModernBERT (Warner et al. 2024, arXiv 2412.13663) with rotary
    positions, GeGLU (as wide as makes as many parameters), no biases, and a decoder tied to the code table.
    Rows of up to 128 tokens are within its local attention.
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.positions,
        "pad_token_id": PAD,
    }
    width = model.ffn_size or 4 * model.hidden_size
    if architecture == "bert":
        config = transformers.BertConfig(
            **sizes,
            intermediate_size=width,
            hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout,
        )
        return transformers.BertForMaskedLM(config)
    config = transformers.ModernBertConfig(
        **sizes,
        intermediate_size=width * 2 // 3,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        embedding_dropout=model.dropout,
        mlp_dropout=model.dropout,
        attention_dropout=model.dropout,
    )
    return transformers.ModernBertForMaskedLM(config)


class Peer(nn.Module):
    """A model of Hugging Face on packed rows: subjects of a row do not see each other, positions begin anew
    with each, and the head runs at the masked columns alone, all as in this encoder.
    """

    def __init__(self, architecture: str, model: ModelConfig, vocabulary_size: int, ages_and_visits: bool):
        super().__init__()
        self.encoder: Any = make_encoder(architecture, model, vocabulary_size)
        self.tables: Any = None
        self.bin_years = model.age_bin_years
        if ages_and_visits:
            self.tables = nn.ModuleList(nn.Embedding(rows, model.hidden_size) for rows in (model.age_rows, 2))
            for table in self.tables:
                nn.init.normal_(table.weight, std=self.encoder.config.initializer_range)

    def forward(self, batch: Batch, masked: MaskedCodes) -> torch.Tensor:
        """Loss of each slot, float32 `[rows, slots]`; those that are not used count nothing."""
        segments = torch.from_numpy(batch.segment_ids)
        codes = self.encoder.get_input_embeddings()(torch.from_numpy(masked.codes).long())
        if self.tables is not None:
            ages, visits = self.tables
            bins = (torch.from_numpy(batch.ages) / self.bin_years).long().clamp(0, ages.num_embeddings - 1)
            codes = codes + ages(bins) + visits(torch.from_numpy(batch.visits).long() % 2)
        hidden = self.encoder.base_model(
            inputs_embeds=codes,
            attention_mask=(segments[:, :, None] == segments[:, None, :])[:, None],
            position_ids=torch.from_numpy(batch.positions).long(),
        ).last_hidden_state  # [B, L, D]
        columns = torch.from_numpy(masked.columns).long()[:, :, None]
        asked = hidden.gather(1, columns.expand(-1, -1, hidden.shape[-1]))  # [B, T, D]
        if hasattr(self.encoder, "cls"):
            logits = self.encoder.cls(asked)  # [B, T, V]
        else:
            logits = self.encoder.decoder(self.encoder.head(asked))
        labels = torch.from_numpy(masked.labels).long()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


class TheirStep:
    """Training of a model of Hugging Face on masked rows, by the optimizer and schedule of `config`."""

    def __init__(
        self,
        architecture: str,
        ages_and_visits: bool,
        config: PretrainConfig,
        vocabulary_size: int,
        steps: int,
    ):
        settings = config.optimizer
        torch.manual_seed(config.train.seed)
        self.peer = Peer(architecture, config.model, vocabulary_size, ages_and_visits)
        parameters = list(self.peer.parameters())
        self.parameters = sum(parameter.numel() for parameter in parameters)
        """Their number, each counted once."""
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(settings.b1, settings.b2),
            fused=True,
        )
        schedule = learning_rate_schedule(settings.learning_rate, settings, steps)
        self._rates = iter(np.asarray(jax.vmap(schedule)(np.arange(steps))).tolist())
        self._clip_norm = settings.clip_norm

    def __call__(self, batch: Batch, masked: MaskedCodes) -> None:
        """Do the next step."""
        self.peer.train()
        rate = next(self._rates)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        weights = torch.from_numpy(masked.weights)
        loss = (self.peer(batch, masked) * weights).sum() / weights.sum().clamp(min=1)
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.peer.parameters(), self._clip_norm)
        self._optimizer.step()

    def losses(self, batch: Batch, masked: MaskedCodes) -> np.ndarray:
        """Those of the slots, float32 `[rows, slots]`, without dropout."""
        self.peer.eval()
        with torch.no_grad():
            return self.peer(batch, masked).numpy()
