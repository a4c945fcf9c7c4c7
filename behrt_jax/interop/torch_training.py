"""Masked-code pretraining of the PyTorch reference, as PyTorch is commonly and well used."""

from typing import Literal

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from behrt_jax.config import LoRAConfig, MaskingConfig, ModelConfig, OptimizerConfig
from behrt_jax.data.vocabulary import MASK, SPECIAL_TOKENS
from behrt_jax.interop.torch_batches import TorchBatch
from behrt_jax.interop.torch_reference import Regime, TorchBEHRTForMLM

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
        loss = self._loss(shown, batch.ages, batch.visits, batch.padding, labels)
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
        labels: torch.Tensor,
    ) -> torch.Tensor:
        with self._autocast:
            logits = self.module(shown, ages, visits, padding)  # [B, L, V]
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
