"""Masked-code pretraining of the PyTorch reference, as PyTorch is commonly and well used."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from behrt_jax.config.model import LoRAConfig, ModelConfig
from behrt_jax.config.training import MaskingConfig, OptimizerConfig
from behrt_jax.data.batches import gather_rows
from behrt_jax.data.packing import choose_windows, one_per_row
from behrt_jax.data.sequences import Sequences
from behrt_jax.data.vocabulary import MASK, SPECIAL_TOKENS
from behrt_jax.errors import InputError
from behrt_jax.files import from_stored
from experiments.benchmarks.ours import DISTINCT_BATCHES, load_patients, steps_of
from experiments.benchmarks.torch_model import Regime, TorchBEHRTForMLM

# Batches for the PyTorch reference, one subject a row or rows full of tokens.


class TorchBatch(NamedTuple):
    """Rows of events, one sequence each, and where they are padded."""

    codes: torch.Tensor
    """Vocabulary ids, int64 ``[rows, length]``."""
    ages: torch.Tensor
    """Age at the event in years, float32 ``[rows, length]``."""
    visits: torch.Tensor
    """Ordinal of the visit, int64 ``[rows, length]``."""
    padding: torch.Tensor | None
    """bool ``[rows, length]``, True at padding; None where there is none."""
    days: torch.Tensor | None = None
    """Of the event since 1970, int64 ``[rows, length]``; where the model reads them."""

    def to(self, device: str) -> "TorchBatch":
        """Copy to a device."""
        return TorchBatch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # pyright: ignore[reportArgumentType]


def padded_batches(sequences: Sequences, length: int, batch_size: int, seed: int = 0) -> Iterator[TorchBatch]:
    """One pass over the subjects in random order, each a row of its own: its last `length` events, then
    padding. Subjects that do not fill a batch at the end are left out, so that all shapes are the same.

    Args:
        sequences: histories, each of one event at least.
        length: tokens of a row.
        batch_size: rows of a batch.
        seed: decides the order.

    Raises:
        InputError: there are fewer subjects than `batch_size`.
    """
    windows = choose_windows(sequences, length, "recent")
    plan = one_per_row(len(windows), np.random.default_rng(seed))
    for rows in _whole_batches(len(plan), batch_size):
        batch = gather_rows(sequences, windows, plan, rows, length, cls_token=False)
        yield _tensors(batch.codes, batch.ages, batch.visits, batch.segment_ids == 0)


def full_batches(sequences: Sequences, length: int, batch_size: int, seed: int = 0) -> Iterator[TorchBatch]:
    """One pass over the tokens in rows without padding, for timing: all histories end to end, cut every
    `length` tokens whoever's they are, in random order. What is left over at the end is left out.

    Arguments and errors as in :func:`padded_batches`, with rows in place of subjects.
    """
    count = len(sequences.codes) // length

    def cut(values: np.ndarray) -> np.ndarray:
        return values[: count * length].reshape(count, length)

    fields = [cut(values) for values in (sequences.codes, sequences.ages, sequences.visits)]
    order = np.random.default_rng(seed).permutation(count)
    for rows in _whole_batches(count, batch_size):
        yield _tensors(*(values[order[rows]] for values in fields), padding=None)


def _whole_batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
    if not 1 <= batch_size <= count:
        raise InputError(f"batch_size is {batch_size} and there are {count} rows: give 1 to {count}.")
    for start in range(0, count - batch_size + 1, batch_size):
        yield np.arange(start, start + batch_size)


def _tensors(
    codes: np.ndarray, ages: np.ndarray, visits: np.ndarray, padding: np.ndarray | None
) -> TorchBatch:
    return TorchBatch(
        torch.from_numpy(codes).long(),
        torch.from_numpy(ages),
        torch.from_numpy(visits).long(),
        None if padding is None else torch.from_numpy(padding),
    )


IGNORED = -100
"""Label of a position that is not predicted."""


class TorchTrainStep:
    """A step of training on each call; made by :func:`make_torch_step`."""

    def __init__(
        self,
        module: TorchBEHRTForMLM,
        optimizer: torch.optim.Optimizer,
        masking: MaskingConfig,
        clip_norm: float | None,
        autocast: torch.autocast,
        compile_mode: str | None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.masking = masking
        self.clip_norm = clip_norm
        self._autocast = autocast
        self._mask, self._loss = mask_codes, self._loss_of
        if compile_mode is not None:
            self._mask = torch.compile(self._mask, mode=compile_mode, dynamic=False)
            self._loss = torch.compile(self._loss, mode=compile_mode, dynamic=False)

    def __call__(self, batch: TorchBatch) -> torch.Tensor:
        """Mask codes anew, and train on them.

        Args:
            batch: on the module's device; of one shape in all calls where the step is compiled.

        Returns:
            The loss before the update, a float32 scalar on the device. Nothing waits for the device;
            ``.item()`` does.
        """
        return self.update(batch, *self._mask(batch.codes, self.module.vocabulary_size, self.masking))

    def update(self, batch: TorchBatch, shown: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Train on given masks.

        Args:
            batch: see above; its codes are not read.
            shown: codes as the model sees them, int64 `[rows, length]`.
            labels: codes to predict, `IGNORED` elsewhere, int64 `[rows, length]`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(shown, batch.ages, batch.visits, batch.padding, batch.days, labels)
        loss.backward()
        if self.clip_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        return loss.detach()

    def _loss_of(
        self,
        shown: torch.Tensor,
        ages: torch.Tensor,
        visits: torch.Tensor,
        padding: torch.Tensor | None,
        days: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        with self._autocast:
            logits = self.module(shown, ages, visits, padding, days)  # [B, L, V]
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def make_torch_step(
    model_config: ModelConfig,
    vocabulary_size: int,
    *,
    regime: Regime = "full",
    lora: LoRAConfig | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    compiled: bool = False,
    compile_mode: str = "default",
    device: str = "cpu",
    optimizer: OptimizerConfig | None = None,
    masking: MaskingConfig | None = None,
    seed: int = 0,
) -> TorchTrainStep:
    """Build the train step of a fresh model.

    Args:
        model_config: sizes and dropout rates, see :class:`TorchBEHRTForMLM`.
        vocabulary_size: special tokens included.
        regime: `full`, `frozen` or `lora`.
        lora: adapters of regime `lora`.
        precision: `bfloat16` runs forward pass and loss under autocast. In `float32`, a GPU's products
            follow ``torch.set_float32_matmul_precision``, which is left as it is.
        compiled: compile masking, forward and backward pass with ``torch.compile`` on the first call,
            which needs a C++ compiler on a CPU.
        compile_mode: `mode` of ``torch.compile``, such as `reduce-overhead`.
        device: `cpu` or `cuda`.
        optimizer: AdamW at a constant `learning_rate`, with `weight_decay` on matrices only, `b1`, `b2`
            and `clip_norm`; the other fields are not read.
        masking: the defaults where not given.
        seed: of the initial weights, the masks and dropout: of PyTorch's global generator.

    Raises:
        InputError: see :class:`TorchBEHRTForMLM`.

    Example:
        >>> step = make_torch_step(config, 1000, precision="bfloat16", compiled=True, device="cuda")
        >>> losses = [step(batch.to("cuda")) for batch in padded_batches(sequences, 200, 128)]
    """
    settings = optimizer or OptimizerConfig()
    torch.manual_seed(seed)
    module = TorchBEHRTForMLM(model_config, vocabulary_size, regime, lora).to(device).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        fused=True,
    )
    return TorchTrainStep(
        module,
        adamw,
        masking or MaskingConfig(),
        settings.clip_norm,
        torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"),
        compile_mode if compiled else None,
    )


def mask_codes(
    codes: torch.Tensor, vocabulary_size: int, masking: MaskingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide each code with probability `masking.probability` (Devlin et al. 2018, arXiv 1810.04805).

    Args:
        codes: vocabulary ids, int64 `[rows, length]`; special tokens are left alone.
        vocabulary_size: random codes are drawn up to it.
        masking: probability and shares.

    Returns:
        Codes as the model sees them and labels, both int64 `[rows, length]`; a label is the code that
        stood there or `IGNORED`.
    """
    first_code = len(SPECIAL_TOKENS)
    chosen = (torch.rand(codes.shape, device=codes.device) < masking.probability) & (codes >= first_code)
    kind = torch.rand(codes.shape, device=codes.device)
    random_codes = torch.randint(first_code, vocabulary_size, codes.shape, device=codes.device)
    shown = torch.where(chosen & (kind < masking.mask_share), MASK, codes)
    randomised = (kind >= masking.mask_share) & (kind < masking.mask_share + masking.random_share)
    shown = torch.where(chosen & randomised, random_codes, shown)
    return shown, torch.where(chosen, codes, IGNORED)


# The train step of the PyTorch reference as a contender of the training benchmark.


def torch_contender(task: Mapping[str, Any]) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """The PyTorch reference on padded or full rows."""
    model = ModelConfig(**task["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    data = load_patients(task)
    make_batches = full_batches if task["layout"] == "full" else padded_batches
    stream = make_batches(data.splits["train"], model.positions, task["patients"])
    placed = [batch.to(device) for batch, _ in zip(stream, range(DISTINCT_BATCHES), strict=False)]
    regime = task["torch_regime"]
    adapters = None
    if regime == "lora":
        adapters = from_stored(LoRAConfig, task["lora"])
    step = make_torch_step(
        model,
        len(data.vocabulary),
        regime=regime,
        lora=adapters,
        precision=task["precision"],
        compiled=task["compiled"],
        compile_mode=task["compile_mode"],
        device=device,
        optimizer=OptimizerConfig(learning_rate=task["learning_rate"]),
    )
    steps = steps_of(task, device)

    def turn(index: int) -> float:
        loss = torch.zeros(())
        for number in range(index * steps, (index + 1) * steps):
            loss = step(placed[number % len(placed)])
        if device == "cuda":
            torch.cuda.synchronize()  # the update comes after the loss
        return loss.item()

    started = time.perf_counter()
    turn(0)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    turn(1)
    rows, length = placed[0].codes.shape
    padding = [0.0 if batch.padding is None else float(batch.padding.sum()) for batch in placed]
    real = rows * length - float(np.mean(padding))
    return turn, {
        "compile_seconds": max(0.0, seconds - (time.perf_counter() - started)) if task["compiled"] else 0.0,
        "flops": None,
        "micro_batches": 1,
        "steps_per_turn": steps,
        "rows": rows,
        "row_length": length,
        "tokens_per_step": real,
        "patients_per_step": float(rows),
        "patients_in_flight": float(rows),
        "fill": real / (rows * length),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in step.module.parameters()),
    }
