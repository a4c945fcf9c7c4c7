"""Going on where a run stopped."""

from typing import Any

import jax

from behrt_jax.tracking.console import Console
from behrt_jax.training.checkpoints import Checkpoints
from behrt_jax.training.loop import Cursor
from behrt_jax.training.update import TrainState


def restore_latest(checkpoints: Checkpoints, state: TrainState, console: Console) -> tuple[Any, Cursor]:
    """State and cursor of the latest checkpoint; the fresh ones where there is none yet."""
    step = checkpoints.latest_step()
    if step is None:
        console.log("No checkpoint was written yet: the run starts from its beginning.")
        return state, Cursor()
    params, lora, opt_state = checkpoints.restore(
        step, params=state.variables["params"], lora=state.variables["lora"], opt_state=state.opt_state
    )
    console.log(f"Resuming after step {step:,}.")
    step_array = jax.device_put(state.step.dtype.type(step), state.step.sharding)
    return (
        TrainState(step_array, {"params": params, "lora": lora}, opt_state),
        Cursor.from_json(checkpoints.read_cursor(step)),
    )
