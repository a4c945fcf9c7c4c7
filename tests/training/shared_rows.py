"""One of two processes, of two devices each, that share batches; started by test_processes.

Arguments: port of the first process, number of this one. The devices of the mesh belong to them in turns.
"""

import json
import sys

import jax

if __name__ == "__main__":
    port, process = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)

    import numpy as np

    from behrt_jax.data.batches import TaskBatches, ValidationBatches
    from behrt_jax.training.devices import make_mesh, replicated
    from behrt_jax.training.feeding import PlacedBatches, from_host
    from behrt_jax.training.validation import score
    from tests.data.shared_batches import KINDS, leaves, watched

    devices = jax.devices()
    mesh = make_mesh([devices[place] for place in (0, 2, 1, 3)])
    rows, counts = set(), {}
    for kind, make in KINDS.items():
        whole = make(2 * mesh.size)  # two micro-batches
        batches, columns = watched(whole)
        steps = range(whole.steps_per_epoch)
        if isinstance(batches, ValidationBatches):
            placed = list(PlacedBatches(batches, mesh))
        else:
            placed, tokens = [], []
            with from_host(None, batches, mesh, steps) as feed:
                for step in steps:
                    batch, of_step = feed.next_inputs(step, 1)
                    placed.append(batch)
                    tokens += of_step
            assert tokens == [np.count_nonzero(whole.batch(step).segment_ids) for step in steps], kind
        own_tokens = 0
        for step, batch in zip(steps, placed, strict=True):
            for array, expected in zip(leaves(batch), leaves(whole.batch(step)), strict=True):
                assert array.shape == expected.shape and array.dtype == expected.dtype, kind
                for shard in array.addressable_shards:
                    np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=kind)
                    rows |= {
                        (len(expected), place) for place in range(*shard.index[0].indices(len(expected)))
                    }
            shards = batch.segment_ids.addressable_shards
            own_tokens += sum(int(np.count_nonzero(shard.data)) for shard in shards)
        assert {column.read for column in columns.values()} == {own_tokens}, kind
        counts[kind] = own_tokens, sum(int(np.count_nonzero(whole.batch(step).segment_ids)) for step in steps)
        if isinstance(batches, TaskBatches):  # each process has what a model says of all examples
            answers = jax.jit(lambda variables, batch: batch.targets, out_shardings=replicated(mesh))
            np.testing.assert_array_equal(score(answers, {}, batches, mesh), whole.targets, err_msg=kind)
            assert {column.read for column in columns.values()} == {2 * own_tokens}, kind
    print(json.dumps({"rows": sorted(rows), "counts": counts}))
