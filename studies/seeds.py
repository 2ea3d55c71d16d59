"""How often does internal RL work? The same command with several seeds.

    python -m studies.seeds --seeds 0,1,2,3 --at-once 2

Each seed is a run of internal_rl.py in a process and a folder of its own (runs/gridworld-quick-s0, …), which
prints to FOLDER.log. Other arguments are passed on to it. A second call goes on with what is not finished. A
seed that fails counts as one that misses the bar. It takes as long as the runs do and uses no hidden truth.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import internal_rl as rl

ROWS = dict(base_success="base", raw_success="tokens", internal_success="internal RL", steer_success="labels")

def interval(hits, n):
    """The exact 95% interval (Clopper, Pearson) of a probability, after `hits` of n. → (low, high)"""
    p = np.linspace(0, 1, 100_001)
    chances = [math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)]  # of k hits
    return p[sum(chances[hits:]) >= 0.025].min(), p[sum(chances[:hits + 1]) >= 0.025].max()

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.seeds", allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--at-once", type=int, default=1, metavar="K", help="so many runs at the same time")
    parser.add_argument("--bar", type=float, default=0.6, help="the success that a seed has to reach")
    ours, rest = parser.parse_known_args(arguments)
    options, config = rl.parse_arguments(rest)
    out = options.out or f"runs/{config.task}-{options.preset}"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // ours.at_once)), **os.environ}

    def run(seed):
        """The numbers of a seed, or None if it fails."""
        folder = f"{out}-s{seed}"
        command = [sys.executable, rl.__file__, *rest, "--stage=all", f"--seed={seed}", f"--out={folder}"]
        with open(f"{folder}.log", "a") as log:
            status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        print(f"seed {seed} {'failed' if status else 'finished'}, see {folder}.log", flush=True)
        return None if status else json.loads(Path(folder, "result.json").read_text())

    seeds = ours.seeds.split(",")
    with ThreadPoolExecutor(ours.at_once) as pool:
        results = {seed: result for seed, result in zip(seeds, pool.map(run, seeds)) if result}

    figure, axis = rl.new_figure(8, 3)
    print(f"\n{'seed':20}" + "".join(f"{name:>10}" for name in [*results, "median", "lowest"]))
    example = next(iter(results.values()), {})
    for name in [name for name, x in example.items() if x is None or isinstance(x, float)]:
        values = np.array([result[name] for result in results.values()], dtype=float)  # None becomes nan
        print(f"{name:20}" + "".join(f"{x:10.4g}" for x in [*values, np.median(values), min(values)]))
        if name in ROWS:
            axis.plot(values, [ROWS[name]] * len(values), "o", alpha=0.5)
    axis.set(xlabel=f"success on {config.post_task}, one dot a seed", xlim=(-0.02, 1.02))
    figure.savefig(f"{out}-seeds.png", dpi=110)

    hits = sum(result["internal_success"] >= ours.bar for result in results.values())
    low, high = interval(hits, len(seeds))
    print(f"\nInternal RL reaches {ours.bar} on {hits} of {len(seeds)} seeds (exact 95% interval of it: "
          f"{low:.3f} to {high:.3f}); failed: {', '.join(s for s in seeds if s not in results) or 'none'}.")
    return results

if __name__ == "__main__":
    main()
