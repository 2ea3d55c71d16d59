"""A sceptic's controls: would something simpler than learned gates, chosen codes or linear maps do as well?

    python -m studies.controls --base runs/gridworld-quick-s0 [--only gates,codes,tokens,bias]

The base is a finished run; settings of internal_rl.py may follow, those of the base.
    gates   open on every coloured cell, always open; and the expert and uniformly random moves as players
    codes   the run's policy, with other codes in place of those that it chooses
    tokens  RL on tokens from logits divided by a temperature (0: from random weights), then "cold": by 0.1
    bias    codes that add a vector, e + b(z) in place of e + U(z) e, are learned and reinforced
Only the scores of gates and the expert know hidden truth. It takes 40 minutes, more if tokens earn rewards.
"""
import argparse
import itertools
import math
from functools import partial
from pathlib import Path

import torch
import internal_rl as rl
from studies.rivals import again, curve, draw, finished

def gates(run):
    """Two gates that anybody could build, and two ways to play that learn nothing."""
    config, world = run.config, run.config.world
    batch = run.held_out()
    places = world.places(batch.observation, config.size)  # [B, T+1, N+1] cells
    coloured = (places[..., :config.colours] == places[..., -1:]).any(-1).float()  # [B, T+1]
    layouts = run.layouts(config.evaluation)
    tasks = torch.tensor([rl.post_task(config)] * len(layouts))
    paths = world.expert_paths(layouts, config.size, tasks, config.max_steps, run.evaluation("actions"))
    chance = world.random_success(config, layouts)  # None for torques: not known
    return {"gate, open on every coloured cell": rl.gate_scores(coloured, batch, world.TOLERANCE),
            "gate, always open": rl.gate_scores(torch.ones_like(coloured), batch, world.TOLERANCE),
            "the expert": {"success": paths.success.mean().item()},
            "random moves": {"success": math.nan if chance is None else chance.mean().item()}}

class OtherCodes(rl.CodeActor):
    def choose(self, e, games):
        return self.change(super().choose(e, games))

CHANGES = {
    "codes, dealt to other games": lambda self, codes: codes.roll(1, 0),  # that choose at the same step
    "codes, drawn from N(0, I)": lambda self, codes: torch.randn_like(codes),
    "codes, all 0": lambda self, codes: 0 * codes}

class AddedVector(rl.Hypernetwork):
    """ê = e + b(z), where b is mixed from J + 1 learned vectors, as each row of B is in f_hyp."""
    def forward(self, e, z):
        return e + self.units(z) @ self.B[:-1, 0] + self.B[-1, 0]

def heat(head, temperature):
    """Divides the logits of moves by a temperature; multiplies the σ of torques by it."""
    if hasattr(head, "log_sigma"):
        head.log_sigma.data += math.log(temperature)
    else:
        head.action.weight.data /= temperature
        head.action.bias.data /= temperature

def tokens(temperature, cold, run, base, reinforce=rl.raw_rl):
    """RL on tokens from a heated base model or from random weights. → what it learned, perhaps cooled"""
    if temperature > 0:
        heat(base.head, temperature)
    else:
        base.load_state_dict(rl.Base(run.config).state_dict())
    model = reinforce(run, base)
    heat(model.head, cold)
    return model

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.controls", allow_abbrev=False)
    parser.add_argument("--base", default="runs/gridworld-quick-s0", type=finished, help="a finished run")
    parser.add_argument("--only", default="gates,codes,tokens,bias", help="these controls")
    parser.add_argument("--out", default="runs/controls-s0", type=Path, help="folder of this study")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1, 2, 3, 5, 0])
    parser.add_argument("--rates", nargs="+", default=["1e-4", "1e-3"], help="of RL on tokens")
    study, settings = parser.parse_known_args(arguments)
    study.out.mkdir(parents=True, exist_ok=True)
    rows, curves = {}, {"internal RL": curve(study.base, "rl")}

    def success(name, stages, part, *more, **changes):
        """What RL on codes or tokens (a part of the main script) reaches with changes."""
        folder = study.out / name
        result = again(study.base, stages, folder, [*settings, "--stage", part, *more], **changes)
        curves[name] = curve(folder, part)
        return {"success": result["raw_success" if part == "raw" else "internal_success"]}

    if "gates" in study.only:
        rows |= gates(rl.Run(rl.parse_arguments(settings)[1], study.out, "cpu"))
    if "codes" in study.only:
        for name, OtherCodes.change in CHANGES.items():
            rows[name] = success("internal RL", "pretrain gates codes rl", "rl", CodeActor=OtherCodes)
    if "bias" in study.only:
        rows["e + b(z)"] = success("e + b(z)", "pretrain gates", "rl", Hypernetwork=AddedVector)
    if "tokens" in study.only:
        for start, rate, cold in itertools.product(study.temperatures, study.rates, (1, 0.1)):
            name = f"tokens, temperature {start:g}, rate {rate}"
            rows[name + ", cold" * (cold < 1)] = success(name, "pretrain", "raw", "--raw-lr", rate,
                                                      raw_rl=partial(tokens, start, cold))

    for name, row in rows.items():
        print(f"{name:42}" + "".join(f"{column} {number:.4g}   " for column, number in row.items()))
    draw(curves, study.out / "controls.png")
    return rows

if __name__ == "__main__":
    main()
