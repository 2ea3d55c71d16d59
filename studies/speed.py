"""How fast is it? `python -m studies.speed [--device cuda]` prints medians of five rounds, on one CPU thread.
It takes a minute in the grid's quick preset, knows no hidden truth and writes no files."""
import time
from types import SimpleNamespace

import numpy as np
import torch
import internal_rl as rl

class Stopwatch(rl.Run):
    def steps(self, name, *others, **modules):
        """Six rounds of 16 steps, of which the first warms up; nothing is logged or saved."""
        marks = [time.perf_counter()]
        for _ in range(6):
            for i in range(16):
                yield SimpleNamespace(stage=name, number=i, count=16, progress=0, due=False, log=dict)
            torch.zeros(1, device=self.device).item()  # waits for a GPU
            marks.append(time.perf_counter())
        print(f"{name:24}{np.median(np.diff(marks)[1:]) / 16 * 1000:10.2f} ms", flush=True)

def main(arguments=None):
    torch.set_num_threads(1)
    options, config = rl.parse_arguments(arguments)
    run = Stopwatch(config, "unused", options.device.replace("auto", "cpu"), options.data)
    base = rl.pretrain(run)
    meta = rl.learn_codes(run, base, rl.learn_gates(run, base))
    policy = rl.Policy(config).to(run.device).requires_grad_(False)
    game = config.world.Game(run.layouts(64), config.size, rl.post_task(config), config.max_steps)
    for step in run.steps("acting in 64 games"):
        if step.number == 0:  # episodes begin anew
            cache = [None] * config.layers
            actor = rl.CodeActor(config, meta, policy, 64, 1.0, run.evaluation("codes"))
        e = base.lower(game.observation()[:, None], cache)[:, 0]
        base.upper(actor(game.rows, e)[:, None], cache)

if __name__ == "__main__":
    main()
