"""What does discovery find as the paper writes it, with gates and codes learned at once?

    python -m studies.as_published --alpha 0.1 [--preset paper]

Eq. 3 and App. D.2 as printed: a learned Σ, soft gates that blend codes, a KL of constant weight α at every
step, encoder and gate with all their inputs, from the middle layer, rank 16, n_z = 8, no mirror; then gates
that open where β > ½ in internal RL. All else is the main script's. --preset paper adds sizes and schedules
of Tables A1 to A16 and absolute inputs. NOBODY HAS EVER RUN THAT: it would take days on a large GPU. Ours
stay GRUs for Hawk layers, initial weights, clipped gradients, β_1 = 1, internal RL. Only scores know hidden
truth.
"""
import argparse
from unittest import mock

import torch
import torch.nn as nn
import gridworld
import internal_rl as rl
from studies.rivals import learn

METHOD = "--control-layer=0 --rank=16 --n-z=8 --no-mirror --stage=rl".split()
PAPER = dict(  # its 64,000 steps of discovery are the sum of gate_steps and code_steps
    size=7, colours=8, walls=4, max_steps=100, subgoals="pairs", post_task="0-1-2-3-4-5-6-7-0-1-2-3",
    width=256, layers=6, pretrain_steps=256_000, pretrain_batch=1024, pretrain_lr=3e-4, next_obs=0.01,
    gate_steps=32_000, code_steps=32_000, discover_batch=512, discover_lr=1e-3,
    rl_episodes=102_400_000, rl_lr=3e-5)

class AbsoluteEmbedding(gridworld.Embedding):
    def forward(self, places):
        """A one-hot cell for each object and the agent, [B, T, N+1] → [B, T, C]; some rows are spare."""
        ones = places + torch.arange(places.shape[-1], device=places.device) * self.size ** 2
        return self.cells(ones.flatten(0, 1)).view(*places.shape[:2], -1)

class Metacontroller(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.history = nn.GRU(config.width, 32, batch_first=True)  # Eq. 12
        self.summary = nn.GRU(config.width, 32, batch_first=True)  # Eq. 13
        self.encoder = rl.perceptron(config.width + 64, 2 * config.n_z)  # Eq. 15
        self.gate = nn.Sequential(rl.perceptron(config.width + 32 + config.n_z, 1), nn.Sigmoid())  # Eq. 16
        self.hyper = rl.Hypernetwork(config)  # Eq. 18

    def forward(self, x, length, rng):
        """x [B, T+1, C], length [B] → z [B, T+1, Z], β [B, T+1] twice, μ as z"""
        h = nn.functional.pad(self.history(x)[0][:, :-1], (0, 0, 1, 0))  # h_{t−1} [B, T+1, 32]
        s = self.summary(x)[0].gather(1, (length - 1)[:, None, None].expand(-1, -1, 32)).expand_as(h)
        mu, log_sigma = self.encoder(torch.cat([x, h, s], -1)).chunk(2, -1)
        log_sigma = log_sigma.clamp(-6, 3)
        self.cost = 0.5 * (mu ** 2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(-1)  # KL [B, T+1]
        proposal = mu + log_sigma.exp() * torch.randn(mu.shape, generator=rng, device=mu.device)  # Eq. 14
        z, beta = [proposal[:, 0]], [torch.ones_like(x[:, 0, :1])]
        for t in range(1, x.shape[1]):
            beta.append(self.gate(torch.cat([x[:, t], h[:, t], z[-1]], -1)))
            z.append(beta[-1] * proposal[:, t] + (1 - beta[-1]) * z[-1])  # Eq. 17
        beta = torch.cat(beta, 1)
        return torch.stack(z, 1), beta, beta, mu

def discover(run, base, alpha):
    """Minimises Eq. 3 over all of the metacontroller. → it"""
    rng = run.begin("gates")
    return learn(run, base, Metacontroller(run.config).to(run.device), alpha, rng)

class Actor(rl.CodeActor):
    def __call__(self, games, e):
        """Acts with β_t > ½. `before`, what the main script's gate saw last, holds h_{t−1} here."""
        h = self.before[games, :32]
        beta = self.meta.gate(torch.cat([e, h, self.code[games]], -1))[:, 0]
        self.before[games, :32] = self.meta.history(e[:, None], h[None])[0][:, 0]
        opens = (beta > rl.THRESHOLD) | (self.count[games] == 0)
        if opens.any():
            self.code[games[opens]] = self.choose(e[opens], games[opens])
        return self.meta.hyper(e, self.code[games])

@mock.patch.dict(gridworld.PRESETS, paper=PAPER)
def main(arguments=None):
    parser = argparse.ArgumentParser("studies.as_published", allow_abbrev=False)
    parser.add_argument("--alpha", type=float, default=0.1, help="weight of the KL (in the paper 0 to 1)")
    ours, rest = parser.parse_known_args(arguments)
    options, config = rl.parse_arguments(rest)
    folder = f"runs/as_published-{options.preset}-alpha{ours.alpha:g}-s{config.seed}"
    changes = dict(learn_gates=lambda run, base: discover(run, base, ours.alpha), THRESHOLD=0.5,
                   learn_codes=lambda run, base, meta: meta, CodeActor=Actor)
    embedding = gridworld.Embedding
    if options.preset == "paper":
        changes["learning_rate"] = lambda peak, step: peak
        embedding = AbsoluteEmbedding
    with mock.patch.multiple(rl, **changes), mock.patch.object(gridworld, "Embedding", embedding):
        return rl.main([*METHOD, f"--out={folder}", *rest])

if __name__ == "__main__":
    main()
