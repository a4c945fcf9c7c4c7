"""What is made of the seconds of the training benchmark's contenders."""

from typing import Any

import numpy as np

from behrt_jax.workflows.benchmark_turns import Contender


def figures(
    size: str, regime: str, contender: Contender, contenders: list[Contender], ceiling: float
) -> dict[str, Any]:
    """What was measured of one contender.

    Returns:
        ``size``, ``regime``, ``contender``, its facts, ``step_seconds`` (median), ``tokens_per_second``
        (real tokens, which are events), ``patients_per_second``, ``flops_per_second``, ``mfu`` (of the
        ceiling; None where FLOPs are unknown), ``peak_bytes``, ``peak_bytes_per_patient`` in flight, and
        ``ratios``: patients per second as a multiple of each other contender's, ``[low, median, high]``,
        where low and high are the quartiles over the rounds.
    """
    seconds, facts = float(np.median(contender.seconds)), contender.facts
    achieved = facts["flops"] / seconds if facts["flops"] else None
    return {
        "size": size,
        "regime": regime,
        "contender": contender.name,
        **facts,
        "step_seconds": seconds,
        "all_seconds": contender.seconds,
        "tokens_per_second": tokens_a_patient(contenders) * facts["patients_per_step"] / seconds,
        "patients_per_second": facts["patients_per_step"] / seconds,
        "flops_per_second": achieved,
        "mfu": achieved / ceiling if achieved else None,
        "peak_bytes": contender.peak_bytes,
        "peak_bytes_per_patient": contender.peak_bytes / facts["patients_in_flight"],
        "ratios": {other.name: _ratio(contender, other) for other in contenders if other is not contender},
    }


def tokens_a_patient(contenders: list[Contender]) -> float:
    """Mean tokens of a patient, from all of them: each saw others of the same population."""
    tokens = sum(contender.facts["tokens_per_step"] for contender in contenders)
    return tokens / sum(contender.facts["patients_per_step"] for contender in contenders)


def as_table(results: list[dict[str, Any]]) -> str:
    """Figures of :func:`figures` for one size and regime as aligned text; ratios against the last column."""
    first = results[0]
    lines = [
        f"{first['size']} {first['regime']}, rows of {first['row_length']} tokens",
        f"  {'contender':<30} {'ms/step':>9} {'events/s':>10} {'MFU':>6} {'GFLOP':>8} {'peak MiB':>9} "
        f"{'MiB/patient':>11} {'compile s':>9} {'parts':>5} {'fill':>5}",
    ]
    for r in results:
        mfu = f"{100 * r['mfu']:5.0f}%" if r["mfu"] else f"{'':>6}"
        flops = f"{r['flops'] / 1e9:8.1f}" if r["flops"] else f"{'':>8}"
        lines.append(
            f"  {r['contender']:<30} {1e3 * r['step_seconds']:>9.1f} {r['tokens_per_second']:>10,.0f} "
            f"{mfu} {flops} {r['peak_bytes'] / 2**20:>9,.0f} {r['peak_bytes_per_patient'] / 2**20:>11.1f} "
            f"{r['compile_seconds']:>9.1f} {r['micro_batches']:>5} {100 * r['fill']:>4.0f}%"
        )
    for r in results:
        for other, (low, middle, high) in r["ratios"].items() if r["contender"].startswith("ours") else ():
            if other.startswith("torch"):
                quartiles = f"quartiles {low:.2f} to {high:.2f}"
                lines.append(f"  {r['contender']} / {other}: {middle:.2f} x ({quartiles})")
    return "\n".join(lines)


def _ratio(ours: Contender, theirs: Contender) -> tuple[float, float, float]:
    patients = ours.facts["patients_per_step"] / theirs.facts["patients_per_step"]
    ratios = patients * np.array(theirs.seconds) / np.array(ours.seconds)  # [rounds]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(low), float(middle), float(high)
