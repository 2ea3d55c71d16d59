"""What does a setting do? Runs stages with several of its values and seeds, and compares numbers.

    python -m studies.vary --vary pretrain_steps=1200,2400 --vary mirror=True,False --seeds 0,1 \\
        --stage discover --show withheld,gate_recall --base runs/gridworld-quick-s{seed}

Each combination of values is a run of its own (runs/vary/mirror=False-s0, …). What a finished run (--base)
has learned under the same settings is copied. Other arguments are those of internal_rl.py.
"""
import argparse
import itertools
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import internal_rl as rl
from studies.rivals import again

def flag(setting, value):
    """A setting as an argument of internal_rl.py."""
    name = setting.replace("_", "-")
    return {"True": f"--{name}", "False": f"--no-{name}"}.get(value, f"--{name}={value}")

def same_stages(base, config):
    """The stages of a finished run that no setting which differs touches."""
    if not (base / "config.json").exists():
        rl.refuse(f"--base {base} is no run")
    theirs = json.loads((base / "config.json").read_text())
    changed = [s for s in fields(config) if theirs[s.name] != getattr(config, s.name)]
    touched = set().union(*(s.metadata["stages"] for s in changed))
    return " ".join(p.stem for p in base.glob("*.pt") if not touched & {p.stem, *rl.STAGES[p.stem]})

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.vary", allow_abbrev=False)
    parser.add_argument("--vary", action="append", metavar="SETTING=VALUE,VALUE")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--show", default="internal_success", help="numbers that --stage measures")
    parser.add_argument("--base", metavar="FOLDER", help="a finished run; {seed} stands for the seed")
    ours, rest = parser.parse_known_args(arguments)
    shown = ours.show.split(",")
    varied = [text.partition("=") for text in ours.vary or ["mirror=True,False"]]
    choices = [[(setting, value) for value in values.split(",")] for setting, _, values in varied]
    results = {}  # combination → of each seed, the numbers to show

    for combination, seed in itertools.product(itertools.product(*choices), ours.seeds.split(",")):
        flags = [flag(*choice) for choice in combination]
        name = ",".join(map("=".join, combination))
        command = [*rest, *flags, f"--seed={seed}"]
        options, config = rl.parse_arguments(command)
        out = Path(options.out or "runs/vary")
        base = Path((ours.base or "").format(seed=seed))
        stages = same_stages(base, config) if ours.base else ""
        result = again(base, stages, out / f"{name}-s{seed}", command)
        results.setdefault(name, []).append([result.get(number, np.nan) for number in shown])

    figure, axes = rl.new_figure(5 * len(shown), 2 + 0.3 * len(results), 1, len(shown))
    for i, axis in enumerate(np.atleast_1d(axes)):
        print(f"\n{shown[i]}: median over seeds, then seeds {ours.seeds}")
        for row, (name, numbers) in enumerate(results.items()):
            values = np.array([each[i] for each in numbers], dtype=float)  # [seeds] or [seeds, n]
            print(f"  {name:40}", np.median(values, 0).round(4), " ", *values.round(4))
            if values.ndim == 1:
                axis.plot(values, [name] * len(values), "o", alpha=0.7)
            else:
                axis.plot(values.T, color=f"C{row}", label=[name] + [""] * (len(values) - 1))
                axis.legend()
        axis.set_xlabel(shown[i] + (", a dot a seed" if values.ndim == 1 else " by layer, a line a seed"))
    figure.savefig(out / "vary.png", dpi=110)
    return results

if __name__ == "__main__":
    main()
