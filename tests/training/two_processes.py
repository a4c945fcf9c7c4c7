"""One of two processes that train together; started by test_processes.

Arguments: port of the first process, number of this one, devices of each, FSDP devices.
"""

import json
import sys

import jax

if __name__ == "__main__":
    port, process, devices, fsdp = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)

    import numpy as np

    from behrt_jax.training.devices import put_rows
    from tests.training.test_processes import losses

    found = losses(fsdp)
    rows = put_rows(np.arange(16), found.mesh)
    own = sorted(int(row) for shard in rows.addressable_shards for row in shard.data)
    print(json.dumps({"losses": found.losses, "rows": own}))
