"""Writes README.md's table and assets/success.png from stored results of declared seeds.

    python -m studies.readme [--store grid FOLDER FOLDER …]

--store first stores finished runs in assets/results/grid.json: of each seed its result.json and two curves of
success. A file also says which program, command and machine made them; edit these words by hand, they stay.
"""
import argparse
import json
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from studies.rivals import curve

ASSETS = Path(__file__).parent.parent / "assets"
WORLDS = {"grid": "5×5 grid", "pairs": "6×6, pairs", "ant": "ant"}
ROWS = {  # name in result.json → what README says of it
    "gap": "base model: nats above the best predictor",
    "probe_best": "subgoal read by a probe (chance 0.25)",
    "steer_success": "success of labelled controllers",
    "gate_precision": "openings at true changes of subgoal",
    "gate_recall": "true changes found",
    "goal_accuracy": "subgoal read from a code (chance 0.25)",
    "shown": "codes: next colour reached, if the data shows this order",
    "withheld": "the same, if it never does",
    "internal_success": "**success of internal RL**",
    "raw_success": "**success of RL on tokens**, torques"}

def store(world, folders):
    path = ASSETS / "results" / f"{world}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"program": "", "command": "", "machine": ""}
    seeds = {}
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        seed = result["settings"]["seed"]
        seeds[seed] = {"result": result, "rl": curve(folder, "rl"), "raw": curve(folder, "raw")}
    path.write_text(json.dumps({**stored, "seeds": dict(sorted(seeds.items()))}) + "\n")

def load(world):
    return json.loads((ASSETS / "results" / f"{world}.json").read_text())["seeds"].values()

def cell(world, name):
    """Median and range of a number over the seeds of a world."""
    values = [seed["result"][name] for seed in load(world)]
    low, middle, high = (f"{x:.2f}" for x in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"

def table():
    heads = [f"{text}, {len(load(world))} seeds" for world, text in WORLDS.items()]
    rows = [["number", "meaning", *heads], ["---"] * (len(heads) + 2)]
    rows += [[f"`{name}`", text, *(cell(world, name) for world in WORLDS)] for name, text in ROWS.items()]
    return "".join(f"|{'|'.join(row)}|\n" for row in rows)

def draw_success():
    figure = Figure(figsize=(10, 3), layout="tight")
    for axis, (world, title) in zip(figure.subplots(1, len(WORLDS), sharey=True), WORLDS.items()):
        for stage, colour, legend in (("rl", "tab:blue", "internal RL"), ("raw", "tab:red", "RL on tokens")):
            axis.plot([], [], color=colour, label=f"{legend}, a line a seed")
            for seed in load(world):
                episodes, success = zip(*seed[stage])
                axis.plot([n / 1000 for n in episodes], success, color=colour, lw=1)
        axis.set(title=title, xlabel="thousand episodes", ylim=(-0.03, 1))
    figure.axes[0].set_ylabel("success in training")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(ASSETS / "success.png", dpi=110)

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.readme", allow_abbrev=False)
    parser.add_argument("--store", choices=WORLDS, help="first store these folders as results of this world")
    parser.add_argument("folders", nargs="*", type=Path, help="run folders, one a seed")
    options = parser.parse_args(arguments)
    if options.store:
        store(options.store, options.folders)
    draw_success()
    readme = ASSETS.parent / "README.md"
    between = "(?s)(?<=<!-- table -->\n).*(?=<!-- end -->\n)"
    readme.write_text(re.sub(between, lambda old: table(), readme.read_text()))

if __name__ == "__main__":
    main()
