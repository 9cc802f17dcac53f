"""A loop with everything around it that training has, and next to nothing inside, run as a process by tests.

    python -m tests.stepping FOLDER STEPS [key=value ...]

Each step waits for the others through a device, as a training step does. Keys: timeouts of config.timeouts; `slow=N`,
process 1's data of step N takes `seconds`; `raises=N`, process 1 fails at step N; `compiles`, step 1 stays outside of Python;
`sets_up`, the last process takes so many seconds before its first step; `fails_at_the_end`, process 0 fails so many seconds
after all have ended their steps.
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from avlm_jax.processes.multihost import Timeouts, crash, initialize, leave, ready, say
from avlm_jax.processes.peers import COMPUTES, SAVES
from avlm_jax.processes.preemption import Stopped, StopSignal
from avlm_jax.processes.watchdog import Watchdog
from avlm_jax.sharding import batch_sharding, make_mesh
from input_pipeline.errors import UserError


def main(folder: Path, steps: int, options: dict[str, float]) -> None:
    fields = Timeouts.__dataclass_fields__
    timeouts = Timeouts(**{key: value for key, value in options.items() if key in fields})
    initialize(timeouts)
    mesh = make_mesh()
    total = jax.jit(lambda rows: jnp.sum(rows))
    me, count, saved = jax.process_index(), jax.process_count(), folder / f"saved-{jax.process_index()}"
    start = int(saved.read_text()) if saved.exists() else 0
    with Watchdog(timeouts) as watchdog, StopSignal(timeouts.grace, watchdog.describe) as stop:
        watchdog.stage("toy", folder)
        say("sets up")
        if me == count - 1:
            time.sleep(options.get("sets_up", 0))
        ready("before the first step")
        with stop.deferred():
            for number in range(start + 1, steps + 1):
                if stop.reached(number - 1):
                    watchdog.at(SAVES)
                    saved.write_text(str(number - 1))
                    stop.end(number - 1)
                watchdog.step(number)
                if me == 1 and number == options.get("slow"):
                    time.sleep(options["seconds"])
                if me == 1 and number == options.get("raises"):
                    raise UserError("shard 3 is not there")
                watchdog.at(COMPUTES)
                if number == 1 and "compiles" in options:
                    print("compiles", flush=True)
                    # Keeps the main thread in C without Python's lock, as a compiler does; no signal ends it.
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
                rows = jax.make_array_from_process_local_data(
                    batch_sharding(mesh), np.full(mesh.size // count, number, np.float32)
                )
                assert float(total(rows)) == number * mesh.size
                print(f"step {number}", flush=True)
                time.sleep(0.05)
        ready("at the end")
    say("finished")
    if me == 0 and (seconds := options.get("fails_at_the_end")):
        time.sleep(seconds)
        raise UserError("the disk is full")


if __name__ == "__main__":
    try:
        main(
            Path(sys.argv[1]),
            int(sys.argv[2]),
            {key: float(value) for key, value in (item.split("=") for item in sys.argv[3:])},
        )
    except (UserError, Stopped) as error:
        print(error, file=sys.stderr, flush=True)
        leave(error.exit_code, "" if isinstance(error, Stopped) else str(error))
        sys.exit(error.exit_code)
    except Exception:
        crash(traceback.format_exc())
        raise
