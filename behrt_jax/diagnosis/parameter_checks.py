"""Checks of what trains: groups, regimes and adapters."""

from collections.abc import Mapping
from typing import Any

from behrt_jax.diagnosis.finding import Finding

Values = Mapping[str, Any]


MOST_TRAINABLE = 50.0
"""Percent of the parameters; above it adapters save little."""


def frozen_at_random(settings: Values, parameters: Values) -> list[Finding]:
    """Groups that neither train nor were loaded from a run."""
    init = settings.get("init") or {}
    loaded = set(init.get("groups") or ()) if init.get("run") else set()
    frozen = {
        group: parameters[group]["total"]
        for group in ("embedding", "head", "base")
        if (parameters.get(group) or {}).get("total")
        and not parameters[group]["trainable"]
        and group not in loaded
    }
    base = frozen.pop("base", None)
    mend = "From scratch use --freezing.regime lora; or give a pretrained run with --init.run."
    findings = []
    if frozen:
        listed = " and ".join(f"{group} ({total:,})" for group, total in frozen.items())
        findings.append(
            Finding(
                "frozen-at-random",
                "error",
                f"Parameters frozen at random values: {listed}.",
                "Adapters cannot make up for random embeddings or a random head: the loss stays near "
                "ln(vocabulary).",
                mend,
            )
        )
    if base is not None:
        adapted = settings.get("lora") is not None
        findings.append(
            Finding(
                "base-at-random",
                "info" if adapted else "warning",
                f"The {base:,} parameters of the base are frozen at random values.",
                "Adapters, embeddings and head learn around it, but not all that a trained encoder would."
                if adapted
                else "A random encoder without adapters can learn little of order and context.",
                "For the best result pretrain with --freezing.regime full first and give that run with "
                "--init.run.",
            )
        )
    return findings


def trainable_share(settings: Values, parameters: Values) -> list[Finding]:
    """Adapters beside a base that trains as well, or beside large embeddings and head."""
    percent = parameters.get("trainable_percent")
    if settings.get("lora") is None or percent is None:
        return []
    base = parameters.get("base") or {}
    regime = parameters.get("regime", "unknown")
    if base.get("trainable"):
        return [
            Finding(
                "trainable-share",
                "warning",
                f"Regime {regime}: {percent:.1f} % of the parameters train although LoRA is on, "
                f"{base['trainable']:,} of them in the base.",
                "Adapters are meant to replace the training of the base: hardly anything is saved over "
                "full training.",
                "Use --freezing.regime lora, or a configuration without adapters.",
            )
        ]
    if percent > MOST_TRAINABLE:
        large = ", ".join(
            f"{group} {parameters[group]['trainable']:,}"
            for group in ("embedding", "head")
            if (parameters.get(group) or {}).get("trainable")
        )
        return [
            Finding(
                "trainable-share",
                "info",
                f"{percent:.1f} % of the parameters train although the base is frozen: {large}.",
                "With a large vocabulary and a small encoder, embeddings and head are most of the model: "
                "LoRA saves little.",
                "Nothing is wrong. Train in full if memory allows, or take a larger encoder.",
            )
        ]
    return []


def adapters_reached(settings: Values, parameters: Values, facts: Values) -> list[Finding]:
    """Adapters that are not there, or that the prediction does not depend on."""
    if settings.get("lora") is None or not parameters:
        return []
    if not (parameters.get("lora") or {}).get("total"):
        return [
            Finding(
                "no-adapters",
                "error",
                "LoRA is on, but the model has no adapters.",
                "Nothing of what lora.targets asks for is trained.",
                "Name layers that exist in --lora.targets (query key value out intermediate output).",
            )
        ]
    unreached = facts.get("unreached_adapters") or []
    if not unreached:
        return []
    return [
        Finding(
            "adapters-not-reached",
            "error",
            f"{len(unreached)} adapter matrices do not take part in the prediction, the first is "
            f"{unreached[0]}.",
            "They get no gradient and stay what they are, while everything looks as if LoRA were on.",
            "See that the layer is a flax Dense and is called inside adapters.lora.applying, or leave it "
            "out of --lora.targets.",
        )
    ]
