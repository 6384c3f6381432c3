"""The same with a loop of one's own: torchrun --nproc-per-node 2 loop_after.py"""

from after import task

import wagontrain as wt

if __name__ == "__main__":
    run = wt.connect(task, "data-parallel")
    for batch in run.batches():
        report = run.step(batch)  # forward, backward, exchange, update
    values = run.validate()
    if run.context.world.rank == 0:
        print(f"loss {values['loss']:.6f}")
    run.finish()
