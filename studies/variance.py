"""How noisy is the policy gradient where RL starts, for codes and for tokens? (App. E.2)

    python -m studies.variance --base runs/gridworld-quick-s0

On tasks of 1, 2, … visits whose transitions the data shows, both kinds of RL earn rewards at once. It takes a
few minutes in the grid's quick preset and knows hidden truth: which transitions the data shows.
"""
import argparse
import copy
import json
import math

import torch
import gridworld
import internal_rl as rl
from studies.rivals import finished

def gradient_noise(learner, log_prob_of, success):
    """→ variance of an episode's gradient, mean over parameters; number of episodes whose mean gradient has a
    variance as large as its square. nan: rewards, or episodes, are too few to tell"""
    if success.sum() < 10:
        return math.nan, math.nan
    advantage = (success - success.mean()) / (success.std(correction=0) + 1e-3)
    gradients = []
    for rows in torch.arange(len(success), device=success.device).tensor_split(64):
        gain = (log_prob_of(rows) * advantage[rows]).mean()
        each = torch.autograd.grad(gain, list(learner.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in each if g is not None]))
    gradients = torch.stack(gradients)  # [64, parameters]
    variance = gradients.var(0) * len(success) / len(gradients)
    squared = gradients.mean(0).square().sum() - variance.sum() / len(success)  # without bias
    needed = (variance.sum() / squared).item()
    return variance.mean().item(), needed if 0 < needed < len(success) else math.nan

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.variance", allow_abbrev=False)
    parser.add_argument("--base", default="runs/gridworld-quick-s0", type=finished, help="a finished run")
    study, _ = parser.parse_known_args(arguments)
    config = rl.Settings(**json.loads((study.base / "config.json").read_text()))
    run = rl.Run(config, study.base, "cpu")
    run.open()
    base = rl.pretrain(run)
    meta = rl.learn_codes(run, base, rl.learn_gates(run, base))
    policy = rl.Policy(config).to(run.device)
    model = copy.deepcopy(base).requires_grad_(True)

    size = gridworld.SUBGOAL_SIZE[config.subgoals]
    task = [subgoal * size + i for subgoal in (0, 2, 0, 2, 0) for i in range(size)]  # A C A C A
    layouts = run.layouts(4 * config.rl_batch)
    figure, axes = rl.new_figure(9, 3.5, 1, 2)
    results = {"codes": [], "tokens": []}
    for name, learner in (("codes", policy), ("tokens", model)):
        for visits in range(1, len(task) + 1):
            game = config.world.Game(layouts, config.size, task[:visits], config.max_steps)
            actor = rl.CodeActor(config, meta, policy, len(layouts), 1.0, run.evaluation("codes"))
            played = rl.play(config, base, game, run.evaluation("actions"), {"codes": actor}.get(name))

            def log_prob_of(rows):
                if name == "tokens":
                    out = model(played.observation[rows, :-1])
                    return (config.world.log_prob(out, played.action[rows]) * played.valid[rows]).sum(1)
                mean = policy.replay(actor.e[rows], actor.count[rows])  # [n, S, Z]
                made = torch.arange(mean.shape[1], device=run.device) < actor.count[rows, None]
                return (rl.gaussian_log_prob(actor.z[rows], mean, 1.0) * made).sum(1)

            results[name].append(gradient_noise(learner, log_prob_of, played.success))
        for axis, values, text in zip(axes, zip(*results[name]), ("gradient's variance", "episodes needed")):
            print(f"{name:8} {text:24}" + "".join(f"{x:10.3g}" for x in values))
            axis.plot(range(1, len(task) + 1), values, "o-", label=f"RL on {name}")
            axis.set(xlabel="visits of the task", ylabel=text, yscale="log")
            axis.legend()
    figure.savefig(run.folder / "variance.png", dpi=110)
    return results

if __name__ == "__main__":
    main()
