"""The rivals of Fig. 8 (App. C.4): how far do other ways to learn codes get in as many episodes?

    python -m studies.rivals --base runs/gridworld-quick-s0 [--only forced,compile] [--alpha 0.03]

The base is a finished run; settings of internal_rl.py may follow, those of the base.
    forced   a new code at every step, in discovery and in RL (C.4.1)
    cotrain  our metacontroller, but the base model learns along with it, from random weights (C.4.2)
    compile  CompILE: soft segments, with a prior on their length; the base model learns, too (C.4.3)
All learn gates and codes at once, for a constant price α, in as many steps as our two parts. None is tuned.
Hidden truth: SEGMENT is about as long as a leg. They take 12, 25 and 12 minutes.
"""
import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.distributions import Bernoulli, kl_divergence
import internal_rl as rl

MOST = 4  # CompILE: segments of a trajectory in training; in RL there is no limit, for its task is longer
SEGMENT = 4  # CompILE: mean length in the prior. differs from the paper: 10, because our legs are short.

class AlwaysOpen(rl.Gate):
    def step(self, x, before):
        return torch.ones_like(x[..., 0])

class FreeCodes(rl.Metacontroller):
    """Codes as in the paper: μ and σ are learned, so the KL limits how much a code says (Eq. 14, 15)."""
    def open_gates(self, beta, rng):
        """β [B, T+1] → open?, gates that gradients pass, and what switches cost, each [B, T+1]"""
        return beta > rl.THRESHOLD, beta, 0

    def forward(self, x, length, rng):
        x = self.norm(x)
        beta = self.gate(x)
        opens, gates, price = self.open_gates(beta, rng)
        mu, log_sigma = self.encoder(x, opens.float(), length).chunk(2, -1)
        noise = torch.randn(mu.shape, generator=rng, device=mu.device)
        kl = 0.5 * (mu ** 2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(-1)
        self.cost = gates * kl + price  # of this batch, in nats [B, T+1]
        return rl.integrate(gates, mu + log_sigma.exp() * noise), beta, gates, mu

class CompILE(FreeCodes):
    """Gates are relaxed by the Gumbel-softmax of two, at temperature ½."""
    def open_gates(self, beta, rng):
        noise = torch.rand(beta.shape, generator=rng, device=beta.device).logit(eps=1e-6)
        logit = beta.logit(eps=1e-6) + noise * self.training
        gates = (logit / 0.5).sigmoid()
        left = (MOST - gates.cumsum(1) + gates).clamp(0, 1)
        opens = (logit.sigmoid() > rl.THRESHOLD) & (left > 0)
        return opens, gates * left, kl_divergence(Bernoulli(beta), Bernoulli(1 / SEGMENT))

class SegmentEncoder(rl.TrajectoryEncoder):
    """CompILE's encoder: a code from the states of a recurrent layer where its segment begins and ends."""
    def forward(self, x, gates, length):
        h, _ = self.history(x)  # [B, T+1, 32]
        return self.mean(torch.cat([x, h, rl.at_segment_end(gates, h, length)], -1))

RIVALS = {  # name: legend, gate, metacontroller, encoder, what it returns (2: μ and ln σ)
    "forced": ("a new code at every step", AlwaysOpen, FreeCodes, rl.TrajectoryEncoder, 2),
    "cotrain": ("co-training from random weights", rl.Gate, rl.Metacontroller, rl.TrajectoryEncoder, 1),
    "compile": ("CompILE", rl.Gate, CompILE, SegmentEncoder, 2)}

def learn(run, base, meta, alpha, rng, more_steps=0):
    """Gates and codes at once: minimises −ln p + α · KL, or α · meta.cost if there is one. → meta"""
    config = run.config
    count = config.gate_steps + config.code_steps + more_steps
    optimizer = torch.optim.AdamW([*meta.parameters(), *base.parameters()], weight_decay=rl.WEIGHT_DECAY)
    data = rl.ExpertData(run, config.discover_batch, 0.0, rng)
    for step in run.steps("gates", count, rng, optimizer, meta=meta, base=base):
        batch = data.batch(step)
        nll, kl = rl.discovery_loss(config, base, meta, batch, batch, rng)
        if hasattr(meta, "cost"):
            kl = meta.cost[:, :-1][batch.valid].mean()
        loss = nll + alpha * kl
        rl.descend(loss, optimizer, rl.learning_rate(config.discover_lr, step))
        step.log(loss=loss, nll=nll, kl=kl)
        if step.due:
            step.log(**run.look_at_gates(base, meta))
    base.requires_grad_(False)
    meta.requires_grad_(False).eval()
    rl.draw_gates(run, base, meta)
    return meta

def discover(name, alpha, run, base):
    """Makes and trains a rival's metacontroller, and of two rivals the base model, which changes."""
    config = run.config
    rng = run.begin("gates")
    _, gate, kind, encoder, outputs = RIVALS[name]
    encoder = encoder(replace(config, n_z=outputs * config.n_z))
    norm = torch.nn.LayerNorm(config.width)
    meta = kind(norm, gate(config), rl.Hypernetwork(config), encoder).to(run.device)
    base.requires_grad_(name != "forced")
    if name != "cotrain":
        return learn(run, base, meta, alpha, rng)
    base.load_state_dict(rl.Base(config).state_dict())
    return learn(run, base, meta, alpha, rng, config.pretrain_steps)

def curve(folder, stage):
    """[episodes, success] at each report of RL"""
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [[line["episodes"], line["success"]] for line in lines if line["stage"] == stage]

def finished(folder):
    """The folder of a finished run; another one is refused."""
    if not (Path(folder) / "result.json").exists():
        rl.refuse(f"--base {folder} is no finished run")
    return Path(folder)

def again(base, stages, folder, arguments, **changes):
    """The main script, perhaps changed, goes on from finished stages in another folder. → its numbers"""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages.split():
        shutil.copy(base / f"{stage}.pt", folder)
    with mock.patch.dict(vars(rl), changes):  # in here it finds these in place of its own
        return rl.main([*arguments, "--out", str(folder)])

def draw(curves, path):
    figure, axis = rl.new_figure(7, 4)
    for name, points in curves.items():
        axis.plot([n / 1000 for n, _ in points], [success for _, success in points], label=name)
    axis.set(xlabel="thousand episodes", ylabel="success")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)

def main(arguments=None):
    parser = argparse.ArgumentParser("studies.rivals", allow_abbrev=False)
    parser.add_argument("--base", default="runs/gridworld-quick-s0", type=finished, help="a finished run")
    parser.add_argument("--only", default="forced,cotrain,compile", help="these rivals")
    parser.add_argument("--out", default="runs/rivals-s0", type=Path, help="folder of this study")
    parser.add_argument("--alpha", type=float, default=0.03, help="price of codes")
    study, settings = parser.parse_known_args(arguments)
    result = json.loads((study.base / "result.json").read_text())
    rows = {"ours": (result["internal_success"], curve(study.base, "rl")),
            "RL on the model's own actions": (result["raw_success"], curve(study.base, "raw"))}
    for name in study.only.split(","):
        folder = study.out / f"{name}-alpha{study.alpha:g}"
        result = again(study.base, "pretrain", folder, [*settings, "--stage", "rl"],
                       learn_gates=lambda run, base: discover(name, study.alpha, run, base),
                       learn_codes=lambda run, base, meta: meta)  # learned along with gates
        rows[RIVALS[name][0]] = (result["internal_success"], curve(folder, "rl"))

    print(f"\n{'':32}{'final success':>14}{'thousand episodes to .5':>26}")
    for name, (final, points) in rows.items():
        half = next((f"{n / 1000:.0f}" for n, success in points if success >= 0.5), "never")
        print(f"{name:32}{final:14.3f}{half:>26}")
    draw({name: points for name, (_, points) in rows.items()}, study.out / "rivals.png")
    return rows

if __name__ == "__main__":
    main()
