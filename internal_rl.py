"""Internal RL in one file: reinforce the thoughts of a pretrained sequence model instead of its tokens.

A minimal PyTorch reimplementation of "Emergent temporal abstractions in autoregressive models enable
hierarchical reinforcement learning" (arXiv:2512.20605; sections, equations and tables cited are the paper's).
An expert visits coloured cells in an order that nobody is told; the next one is its hidden subgoal.

Contents
    Settings, what stages share
    1  pretrain      a causal model learns to predict the moves of the expert
    2  probe         a linear read-out finds the hidden subgoal in its residual stream
    3  steer         one linear map per subgoal, added there, makes the frozen model pursue that subgoal
    4  discover      without labels, a metacontroller learns when to switch such maps, then to what
    5  internal RL   a small policy learns from one reward per episode which codes to emit
    then what the method does not need

One forward pass
    x_1…x_{T+1} ─► encoder (in 5: policy π, of e_t) ─► μ_t ─► z̃_t ─┐
    x_t, x_{t−1} ─► gate β_t ──────────────────────────────────────┤
                                                   z_t = β_t z̃_t + (1−β_t) z_{t−1}
                                                                   │ hypernetwork f_hyp
    o_1…o_t ─► blocks 1…l ─► e_t ─► ê_t = e_t + U_t e_t ◄─ U_t = BᵀA/√C of z_t
                                     └─► blocks l+1…L ─► p(a_t | o_1…o_t, z_1…z_t)

Glossary (code name: paper symbol; where)
  e              residual stream e_{t,l} after block l; Base.lower, Base.upper, Sec. 1
  x              e_{t,l} normalised, as gate and encoder read it; Metacontroller
  A, B           factors of a linear controller U = BᵀA/√C of rank R; linear_control, Eq. 1, 18
  history        causal history h_t; TrajectoryEncoder, Eq. 12
  summary        summary s of the whole trajectory, f_emb; TrajectoryEncoder, Eq. 13
  mu, CODE_STD   μ_t and √Σ_t of the proposed code z̃_t; Metacontroller, Eq. 14, 15
  beta           switch gate β_t, f_switch (1: take the proposal, 0: keep the code); Gate, Eq. 16
  z              controller code z_t ∈ R^{n_z}; integrate, Eq. 2, 17
  alpha          weight α of the KL to the prior N(0, I); follow_rate, Eq. 3, 9
  next_obs       weight λ of the next-observation loss; pretraining_loss, Eq. 4, 5
  batch          Trajectories: observation [B, T+1, D], action [B, T, …], subgoal, valid [B, T], length
                 (actions), success [B]; of a noisy expert (data D) in stage 1, then of one without noise (D*)
In shapes: B batch, n rows of any kind, T actions, S choices of a code, D numbers of an observation,
C residual width, H heads, K subgoals, M factors, V visits of a task, Z code, R rank.
Every deviation is marked: grep "differs from the paper".
"""
import argparse
import copy
import functools
import hashlib
import importlib
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gridworld

# ======== Settings

def dial(default, text, stages="pretrain", low=None, high=10 ** 12, choices=None):
    """A setting: default (the grid's quick preset), help, the first stages that it changes, range."""
    if low is None:
        low = int(type(default) is int)  # a count is at least 1
    about = dict(help=text, stages=set(stages.split()), low=low, high=high, choices=choices)
    return field(default=default, metadata=about)

@dataclass
class Settings:
    task: str = dial("gridworld", "gridworld, ant, or a file of your own")
    seed: int = dial(0, "random seed of all training", low=0, high=2 ** 40)
    # differs from the paper: a smaller grid, because that takes minutes instead of days.
    size: int = dial(5, "grid size G")
    colours: int = dial(4, "coloured cells O")
    walls: int = dial(1, "wall cells W", low=0)
    max_steps: int = dial(60, "episode length limit", low=10, high=10 ** 5)
    # differs from the paper: single colours as on its ant, because they need fewer visits.
    subgoals: str = dial("singles", "single colours or pairs of them", choices=list(gridworld.SUBGOAL_SIZE))
    noise: float = dial(0.0, "expert noise in D: share of random moves; σ of torques", high=1)
    trajectories: int = dial(40_000, "the ant's expert episodes on disk")
    width: int = dial(128, "residual width C, also of the policy")
    layers: int = dial(4, "blocks L of the base model", low=2)
    heads: int = dial(4, "attention heads (Hawk: blocks of its gates)")
    window: int = dial(0, "attention sees so many steps; 0: all (paper)", low=0)
    pretrain_steps: int = dial(4800, "base model: training steps")
    pretrain_batch: int = dial(64, "base model: trajectories a step")
    pretrain_lr: float = dial(3e-3, "base model: peak learning rate")
    next_obs: float = dial(0.01, "λ, weight of the next-observation loss")
    probe_steps: int = dial(400, "probe: training steps", "probe")
    # differs from the paper: control after block 1, because in the middle labels get .46, not .91.
    control_layer: int = dial(1, "control acts after this block l; 0: L/2", "steer gates", low=0)
    # differs from the paper: rank 64 instead of 16, because labelled controllers get stronger.
    rank: int = dial(64, "rank R of a linear controller U", "steer gates")
    steer_steps: int = dial(1000, "labelled controllers: training steps", "steer")
    steer_lr: float = dial(3e-2, "labelled controllers: learning rate", "steer")
    gate_steps: int = dial(1200, "steps to learn when to switch", "gates")
    code_steps: int = dial(2400, "steps to learn what to send", "codes")
    discover_batch: int = dial(64, "stages 2 to 4: trajectories a step", "probe steer gates")
    discover_lr: float = dial(3e-3, "metacontroller: peak learning rate", "gates")
    # Knows hidden truth: 1.15 · 3.67 nats (the cost of a code) · true switches of subgoal per cell entered.
    rate: float = dial(1.2, "nats that codes may cost per cell entered", "gates", low=1e-6)
    # differs from the paper: n_z = 4 instead of 8, because with 8 RL reaches less than half.
    n_z: int = dial(4, "dimensions Z of a code", "gates")
    mirror: bool = dial(True, "codes are decoded in a mirror image of the world", "codes")
    post_task: str = dial("0-1-2-3-0", "post-training task, of withheld transitions only", "rl raw")
    rl_episodes: int = dial(81_920, "episodes for internal RL, and for the baseline", "rl raw")
    rl_batch: int = dial(1024, "episodes an update", "rl raw", low=4)
    rl_lr: float = dial(3e-3, "internal RL: peak learning rate", "rl")
    raw_lr: float = dial(1e-4, "baseline: learning rate", "raw")
    evaluation: int = dial(1024, "layouts on which success is measured", "", low=8)

    @property
    def world(self):
        """The module with rules, expert and pictures: gridworld.py, ant_tasks.py or your own."""
        alone = Path(__file__).with_name(f"{self.task}.py").exists()
        return importlib.import_module(self.task if alone else f"{self.task}_tasks")

# ======== What stages share
# A stage is a plain loop over `run.steps(…)`, which goes on where an earlier run stopped, and saves. A step
# has stage, number, count, progress 0 … 1, due (time to report) and log(name=number). `run.begin(…)` seeds
# random numbers; look_at_base and look_at_gates measure what has been learned.

# Several processes (torchrun) draw their own shares of a batch and average gradients.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

def gather(x):
    """The rows of all processes, one after another: [n, …] → [N·n, …]. Alone: what it is given."""
    if WORLD_SIZE == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    torch.distributed.all_gather(parts, x)
    return torch.cat(parts)

def descend(loss, optimizer, lr):
    """One optimizer step at learning rate lr."""
    group, = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    for p in group["params"]:
        if p.grad is not None:
            p.grad = gather(p.grad[None]).mean(0)
    optimizer.step()

def learning_rate(peak, step):
    """A warm-up of 200 steps, or a tenth of all, then a cosine down to 2% of the peak."""
    # differs from the paper: larger rates that decay, because there are fewer steps.
    warm_up = min(200, step.count // 10 + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * step.number / step.count))
    return peak * min(1, (step.number + 1) / warm_up) * (0.02 + 0.98 * cosine)

AdamW = functools.partial(torch.optim.AdamW, fused=True)
WEIGHT_DECAY = 0.03  # of AdamW in stages 1, 3 and 4 (Tables A4 to A10)
ROUND = 16  # batches that are drawn at once; so many steps lie between two moments at which a run may stop

class ExpertData:
    """The batches of a stage."""
    # differs from the paper: 16 batches are drawn at once and dealt by length, because that halves padding.

    def __init__(self, run, batch_size, noise, rng):
        self.config = run.config
        self.rng = rng
        self.draw = run.config.world.source(run.config, noise, run.data)
        self.batches = self.deal(max(1, batch_size // WORLD_SIZE))

    def deal(self, batch_size):
        while True:
            pool = self.draw(ROUND * batch_size, self.rng)
            if len(pool.length) < ROUND:
                raise gridworld.Unusable(f"the expert solves only {len(pool.length)} episodes of a pool")
            by_length = pool.length.argsort().tensor_split(ROUND)
            order = torch.randperm(ROUND, generator=self.rng, device=self.rng.device)
            for i in order.tolist():
                yield pool.pick(by_length[i])

    def batch(self, step):
        """Trajectories to learn from. A world of small steps, like the ant's, leaves out some steps."""
        batch = next(self.batches)
        return self.config.world.thinned(self.config, batch, step.stage, step.progress, self.rng)

# ======== Chapter 1 · pretrain
# A causal transformer predicts the expert's next move from the observations so far. To do that well it has to
# infer what the expert is after.
# You should see `gap`, the distance to the best possible predictor, fall to about 0.05 nats per action.

@functools.lru_cache(64)
def relative_bucket(queries, keys, window, device):
    """How far each key lies before each query, if the queries are the last keys, in 32 buckets (App. D.1): 16
    exact distances, then 16 logarithmic ones up to 128. → (bucket, hidden?), both [queries, keys]
    Hidden is the future and, unless window is 0, what lies `window` or more steps back."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    ago = query - torch.arange(keys, device=device)
    far = 16 + (ago.clamp(min=1) / 16).log() / math.log(128 / 16) * 16
    bucket = torch.where(ago < 16, ago.clamp(min=0), far.long().clamp(max=31))
    return bucket, (ago < 0) | (ago >= (window or keys))

class Block(nn.Module):
    """Pre-norm transformer block with a relative-position bias added to the attention logits (Table A16)."""
    # differs from the paper: PyTorch's initial weights, because they learn as well.

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.window = config.window
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.position_bias = nn.Embedding(32, config.heads)
        nn.init.zeros_(self.position_bias.weight)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x, past=None):
        """x [B, T, C] → ([B, T, C], (keys, values)). `past`: those of T' earlier steps, [B, H, T', C/H]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)  # [B, T, 3, H, C/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, C/H]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # [B, H, T'+T, C/H]

        bucket, hidden = relative_bucket(length, k.shape[2], self.window, x.device)
        bias = self.position_bias(bucket).permute(2, 0, 1).masked_fill(hidden, -torch.inf)  # [H, T, T'+T]
        attended = F.scaled_dot_product_attention(q, k, v, bias)  # [B, H, T, C/H]
        attended = attended.transpose(1, 2).reshape(batch, length, width)  # [B, T, C]

        x = x + self.mix(attended)
        x = x + self.down(F.relu(self.up(self.norm_2(x))))
        return x, (k[:, :, -self.window:], v[:, :, -self.window:])  # all of them if window is 0

class Base(nn.Module):
    """Causal model of observations: an embedding, L blocks and a head. Control acts after block l, where
    `lower` ends and `upper` begins. A `cache`, one entry a block, lets a sequence go on."""

    def __init__(self, config):
        super().__init__()
        self.split = config.control_layer or config.layers // 2  # l
        make_block = getattr(config.world, "Block", Block)  # a world may bring its own
        self.embed = config.world.Embedding(config)
        self.blocks = nn.ModuleList(make_block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = config.world.Head(config)

    def run_blocks(self, x, which, cache=None):
        for i in which:
            x, kept = self.blocks[i](x, cache[i] if cache else None)
            if cache:
                cache[i] = kept
        return x

    def lower(self, observation, cache=None):
        """observation [B, T, D] → e_{t,l} [B, T, C]"""
        return self.run_blocks(self.embed(observation), range(self.split), cache)

    def last_residual(self, e, cache=None):
        """e_{t,l} [B, T, C] → normalised e_{t,L} [B, T, C]"""
        return self.norm(self.run_blocks(e, range(self.split, len(self.blocks)), cache))

    def upper(self, e, cache=None):
        """e_{t,l} [B, T, C] → the head's output: logits of moves [B, T, 4] or a Gaussian of torques"""
        return self.head(self.last_residual(e, cache))

    def forward(self, observation):
        return self.upper(self.lower(observation))

def action_loss(config, out, batch):
    """Mean −ln p(a_t | …) over the actions that exist: the head's output [B, T, …] → scalar, nats"""
    return -config.world.log_prob(out[batch.valid], batch.action[batch.valid]).mean()

def pretraining_loss(config, base, batch):
    """Eq. 4-5: −ln p(a_t | o_{1:t}) − λ ln p(o_{t+1} | o_{1:t}), means over steps → (both, the first)"""
    last = base.last_residual(base.lower(batch.observation[:, :-1]))
    nll = action_loss(config, base.head(last), batch)
    return nll + config.next_obs * base.head.next_observation_loss(last, batch), nll

def pretrain(run):
    """Stage 1: the base model predicts the expert's actions. Returns it, frozen."""
    config = run.config
    rng = run.begin("pretrain")
    base = Base(config).to(run.device)
    optimizer = AdamW(base.parameters(), weight_decay=WEIGHT_DECAY)
    data = ExpertData(run, config.pretrain_batch, config.noise, rng)

    for step in run.steps("pretrain", config.pretrain_steps, rng, optimizer, base=base):
        batch = data.batch(step)
        loss, nll = pretraining_loss(config, base, batch)
        descend(loss, optimizer, learning_rate(config.pretrain_lr, step))
        step.log(loss=loss, nll=nll)
        if step.due:
            step.log(**run.look_at_base(base))
    return base.requires_grad_(False).eval()

# ======== Chapter 2 · probe
# Does the model know where the expert is heading? A linear map tries to read that off its residual stream. It
# learns from labels, the true subgoals.
# You should see the accuracy jump after the first block or two, to about 0.5 (chance: 0.25).

class Probe(nn.Module):
    """A linear read-out of the subgoal for each layer, softmax(W_l e_{t,l})  (Eq. 6-7, which say U_l)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.layers + 1, config.width, gridworld.SUBGOALS))

    def forward(self, residuals):
        """[L+1, n, C] → logits [L+1, n, K]"""
        return residuals @ self.weight

@torch.no_grad()
def probe_examples(base, batch):
    """Residual streams e_{t,0} … e_{t,L} [L+1, n, C] and hidden subgoals [n] of all steps that exist."""
    streams = [base.embed(batch.observation[:, :-1])]
    for i in range(len(base.blocks)):
        streams.append(base.run_blocks(streams[-1], [i]))
    return torch.stack(streams)[:, batch.valid], batch.subgoal[batch.valid]

def train_probe(run, base):
    """Stage 2: in which layer can the hidden subgoal be read linearly? (Fig. 3, A1) Returns the probe."""
    config = run.config
    rng = run.begin("probe")
    probe = Probe(config).to(run.device)
    optimizer = AdamW(probe.parameters(), weight_decay=0)
    data = ExpertData(run, config.discover_batch, 0.0, rng)

    for step in run.steps("probe", config.probe_steps, rng, optimizer, probe=probe):
        residuals, subgoal = probe_examples(base, data.batch(step))
        logits = probe(residuals)  # [L+1, n, K]
        loss = F.cross_entropy(logits.flatten(0, 1), subgoal.repeat(len(logits))) * len(logits)
        descend(loss, optimizer, learning_rate(3e-3, step))
        step.log(loss=loss)
    return probe

# ======== Chapter 3 · steer
# What can be read can be written. One linear map per subgoal is added to the residual stream of the frozen
# model; which one, the true labels say.
# You should see success on a task whose transitions no data shows: 0 without these maps, 0.9 with them.

def linear_control(e, w, A, B):
    """ê = e + U e with U = BᵀA/√C, without ever building U (Eq. 1, 11, 18): e [..., C] → [..., C].
    Its factors are A = Σ_m w_m A[m] and B = Σ_m w_m B[m], with weights w [..., M] and A, B [M, R, C]."""
    w = w.unsqueeze(-1)  # [..., M, 1]
    read = e @ A.flatten(0, 1).T / math.sqrt(e.shape[-1])  # all A[m] e/√C: [..., M·R]
    mixed = (w * read.unflatten(-1, A.shape[:2])).sum(-2, keepdim=True)  # A e/√C: [..., 1, R]
    return e + (w * mixed).flatten(-2) @ B.flatten(0, 1)  # e + Σ_m w_m B[m]ᵀ (A e/√C): [..., M·R] @ [M·R, C]

class LabelledControllers(nn.Module):
    """One linear controller per subgoal, chosen by its true label (Eq. 1)."""

    def __init__(self, config):
        super().__init__()
        shape = (gridworld.SUBGOALS, config.rank, config.width)
        self.A = nn.Parameter(torch.randn(shape))
        self.B = nn.Parameter(torch.zeros(shape))  # so that U is 0 at first

    def forward(self, e, subgoal):
        """e [..., C], subgoal [...] index → ê [..., C]"""
        one_hot = F.one_hot(subgoal, len(self.A)).to(e.dtype)
        return linear_control(e, one_hot, self.A, self.B)

def steer(run, base):
    """Stage 3: controllers trained with the true subgoal (Fig. 4). Returns them."""
    config = run.config
    rng = run.begin("steer")
    controllers = LabelledControllers(config).to(run.device)
    optimizer = AdamW(controllers.parameters(), weight_decay=WEIGHT_DECAY)
    data = ExpertData(run, config.discover_batch, 0.0, rng)

    for step in run.steps("steer", config.steer_steps, rng, optimizer, controllers=controllers):
        batch = data.batch(step)
        with torch.no_grad():
            e = base.lower(batch.observation[:, :-1])
        loss = action_loss(config, base.upper(controllers(e, batch.subgoal)), batch)
        descend(loss, optimizer, learning_rate(config.steer_lr, step))
        step.log(loss=loss)
    return controllers

@torch.no_grad()
def play(config, base, game, rng, intervene=None):
    """The base model acts until all B games are over, at temperature 1. → Trajectories
    What intervene(games [n], e_{t,l} [n, C]) returns, ê, replaces e_{t,l}."""
    games = game.rows  # the numbers of those that still run: [n], at first 0 … B−1
    cache = [None] * len(base.blocks)
    observations = [game.observation()]
    actions = []
    while len(games):
        e = base.lower(observations[-1][games, None], cache)  # [n, 1, C]
        if intervene is not None:
            e = intervene(games, e[:, 0])[:, None]
        drawn = config.world.sample(base.upper(e, cache)[:, 0], rng)  # [n, …]
        action = drawn.new_zeros(len(game.rows), *drawn.shape[1:])  # [B, …]
        action[games] = drawn
        game.step(action)
        actions.append(action)
        observations.append(game.observation())

        running = ~game.done[games]
        if not running.all():  # finished games leave the batch
            games = games[running]
            cache = [tuple(part[running] for part in kept) for kept in cache]
    observation, action = torch.stack(observations, 1), torch.stack(actions, 1)
    return gridworld.Trajectories(observation, action, game.steps, game.success())

def post_task(config):
    """The colours of the post-training task, in order."""
    return gridworld.parse_task(config.post_task, config.colours)

def with_labels(config, controllers, game):
    """Activates labelled controllers in the order of the task, by a hidden truth: the visits so far."""
    task = torch.tensor(post_task(config), device=game.rows.device)  # [V] colours
    subgoals = task // gridworld.SUBGOAL_SIZE[config.subgoals]  # [V]; pair k is colours 2k and 2k + 1
    return lambda games, e: controllers(e, subgoals[game.visits[games]])

# ======== Chapter 4 · discover
# Now without labels. A metacontroller emits codes z; f_hyp turns each into a linear controller, which is held
# until a gate β opens. All of it learns to make the expert's moves likely.
# differs from the paper: two parts, because at once codes mean "two up, one left", not "to the red one".
# The first part keeps only its gates: whatever codes mean, a new one pays where the expert turns to its next
# colour. Between two openings lies a segment. The second part learns a code for each anew: the encoder sees
# where it ends, and the code must explain moves in a mirror image, where the old directions are wrong.
# You should see gate_precision and gate_recall near 1, then goal_accuracy and withheld.

CODE_STD = 0.4  # differs from the paper: σ of all codes, not learned, because then all cost the same.
THRESHOLD = 3 / 8  # differs from the paper: there ½, because a switch that is missed may cost a game.

def perceptron(inputs, outputs):
    """One hidden layer of 64 (Table A9)."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))

class TrajectoryEncoder(nn.Module):
    """The encoder of the first part: μ_t from the history h_t and a summary s of the whole trajectory."""
    # differs from the paper: f_emb is a GRU instead of a Hawk stack, because one layer is enough here.

    def __init__(self, config):
        super().__init__()
        self.history = nn.GRU(config.width, 32, batch_first=True)  # Eq. 12
        self.summary = nn.GRU(config.width, 32, batch_first=True)  # Eq. 13
        self.mean = perceptron(config.width + 64, config.n_z)

    def forward(self, x, gates, length):
        """x [B, T+1, C], gates [B, T+1] (not read), length [B] → μ [B, T+1, Z]  (Eq. 15)"""
        before = F.pad(self.history(x)[0][:, :-1], (0, 0, 1, 0))  # h_{t−1}: [B, T+1, 32]
        s = self.summary(x)[0][torch.arange(len(x), device=x.device), length - 1]  # s(e_{1:T}): [B, 32]
        s = s[:, None].expand(-1, x.shape[1], -1)  # the same at each step
        return self.mean(torch.cat([x, before, s], -1))

def integrate(gates, proposal):
    """z_t = β_t z̃_t + (1−β_t) z_{t−1}, from z_1 = z̃_1 on (Eq. 2, 17): [B, T], [B, T, Z] → z [B, T, Z]
    A loop over t, but in log₂ T rounds: after each, z_t = z[t] + kept[t] · z_{t−steps}."""
    gates = F.pad(gates[:, 1:], (1, 0), value=1)[..., None]  # [B, T, 1]
    z = gates * proposal
    kept = 1 - gates
    steps = 1
    while steps < z.shape[1]:
        z = z + kept * F.pad(z[:, :-steps], (0, 0, steps, 0))
        kept = kept * F.pad(kept[:, :-steps], (0, 0, steps, 0))
        steps = 2 * steps
    return z

def at_segment_end(gates, x, length):
    """For each t < length: x_u, where u > t is the first step with an open gate, else `length`. This is Eq. 2
    run backwards. gates [B, T+1], x [B, T+1, Z], length [B] → [B, T+1, Z]"""
    over = torch.arange(x.shape[1], device=x.device) >= length[:, None]
    x = integrate(torch.where(over, 1.0, gates).flip(1), x.flip(1)).flip(1)  # the first from t on
    return torch.cat([x[:, 1:], x[:, -1:]], 1)

class SegmentEndEncoder(nn.Module):
    """The encoder of the second part: μ_t from x where the segment of t ends and the next gate opens."""
    # differs from the paper: it reads only that, because it shows the goal, not the way there or its length.

    def __init__(self, config):
        super().__init__()
        self.mean = perceptron(config.width, config.n_z)

    def forward(self, x, gates, length):
        """x [B, T+1, C], gates [B, T+1], length [B] → μ [B, T+1, Z]"""
        return at_segment_end(gates, self.mean(x), length)

class Gate(nn.Module):
    """β_t = f_switch(x_t, x_{t−1})  (Eq. 16)"""
    # differs from the paper: no h_{t−1}, because a memory learns the orders of the data, and RL's is new.
    # differs from the paper: no z_{t−1}, because the gate must still fit when codes are learned anew.

    def __init__(self, config):
        super().__init__()
        self.switch = perceptron(2 * config.width, 1)
        # differs from the paper: gates start rather shut, because else up to 11% open in vain at the end.
        nn.init.constant_(self.switch[-1].bias, -1)

    def step(self, x, before):
        """x_t, x_{t−1} [..., C] → β_t [...]"""
        return self.switch(torch.cat([x, before], -1))[..., 0].sigmoid()

    def forward(self, x):
        """Whole trajectories, x [B, T+1, C] → β [B, T+1]"""
        return F.pad(self.step(x[:, 1:], x[:, :-1]), (1, 0), value=1)  # β_1 = 1

class Hypernetwork(nn.Module):
    """f_hyp: z → U(z) = B(z)ᵀA(z)/√C. Both factors are mixed from J + 1 learned ones, by J ReLU units of z
    and a constant 1 (Eq. 11, 18)."""

    def __init__(self, config):
        super().__init__()
        J = 32  # Table A9
        self.units = nn.Sequential(nn.Linear(config.n_z, J), nn.ReLU())
        shape = (J + 1, config.rank, config.width)
        self.A = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(J))
        # differs from the paper: B starts small, because codes that mean nothing yet disturb the model.
        self.B = nn.Parameter(torch.empty(shape).uniform_(-0.2, 0.2) / math.sqrt(J))
        with torch.no_grad():
            self.A[-1].normal_()  # A(z) reads e at unit scale whatever z is, so that B(z) can learn at once

    def forward(self, e, z):
        """ê_t = e_t + U(z_t) e_t: e [..., C], z [..., Z] → [..., C]"""
        w = F.pad(self.units(z), (0, 1), value=1)  # [..., J+1]
        return linear_control(e, w, self.A, self.B)

class Metacontroller(nn.Module):
    """Emits, holds and replaces linear controllers of the frozen base model (App. D.2, Fig. 5)."""

    def __init__(self, norm, gate, hyper, encoder):
        super().__init__()
        # differs from the paper: gate and encoder read e normalised, because else RL stays at 0.
        self.norm = norm
        self.gate = gate
        self.hyper = hyper
        self.encoder = encoder
        self.register_buffer("alpha", torch.tensor(0.01))

    def code_means(self, x, gates, length):
        """x [B, T+1, C], gates [B, T+1], length [B] → μ [B, T+1, Z]"""
        mu = self.encoder(x, gates, length)
        # differs from the paper: |μ|² = Z (1 − σ²), because then the KL of each code is −Z ln σ = 3.67 nats,
        # and the price of codes is a price of openings.
        return F.normalize(mu, dim=-1) * math.sqrt(mu.shape[-1] * (1 - CODE_STD ** 2))

    def forward(self, x, length, rng):
        """e_{t,l} [B, T+1, C], length [B] → z [B, T+1, Z], β and gates [B, T+1], μ [B, T+1, Z]"""
        x = self.norm(x)
        beta = self.gate(x)
        threshold = THRESHOLD
        if self.training:  # then a gate opens with probability β
            threshold = torch.rand(beta.shape, generator=rng, device=beta.device)
        # differs from the paper: gates are 0 or 1, with gradients as if they were β, because RL's are, too.
        gates = (beta > threshold).float() + beta - beta.detach()
        mu = self.code_means(x, gates, length)
        noise = torch.randn(mu.shape, generator=rng, device=mu.device)
        proposal = mu + CODE_STD * noise  # Eq. 14
        return integrate(gates, proposal), beta, gates, mu

def discovery_loss(config, base, meta, batch, image, rng):
    """The two parts of Eq. 3, 9, means over steps: −ln p(a_t | o_{1:t}, z_{1:t}) and the KL. Codes are
    inferred from `batch` and decoded in `image`, the same or its mirror image. → (nll, KL)"""
    z, _, gates, _ = meta(base.lower(batch.observation), batch.length, rng)
    e = base.lower(image.observation[:, :-1])
    nll = action_loss(config, base.upper(meta.hyper(e, z[:, :-1])), image)
    # With hard gates the KL is due where they open: the bound of App. E.1 before its relaxation.
    kl = -config.n_z * math.log(CODE_STD) * gates  # Eq. 8, see `code_means`
    return nll, kl[:, :-1][batch.valid].mean()

def follow_rate(alpha, nats, rate, pace):
    """α rises by up to 2% · pace (learning rate ÷ peak) if codes cost more nats per cell than `rate`, or
    falls."""
    # differs from the paper: α is not constant, because that shuts all gates or leaves them open.
    excess = (nats / rate - 1).clamp(-1, 1)
    alpha.mul_((0.02 * pace * excess).exp()).clamp_(1e-3, 2)

def learn_gates(run, base):
    """Stage 4, first part: when to switch. All of a metacontroller learns and pays for codes. Returns it."""
    config = run.config
    rng = run.begin("gates")
    norm = nn.LayerNorm(config.width)
    meta = Metacontroller(norm, Gate(config), Hypernetwork(config), TrajectoryEncoder(config)).to(run.device)
    optimizer = AdamW(meta.parameters(), weight_decay=WEIGHT_DECAY)
    data = ExpertData(run, config.discover_batch, 0.0, rng)

    for step in run.steps("gates", config.gate_steps, rng, optimizer, meta=meta):
        batch = data.batch(step)
        nll, kl = discovery_loss(config, base, meta, batch, batch, rng)
        loss = nll + meta.alpha * kl
        lr = learning_rate(config.discover_lr, step)
        descend(loss, optimizer, lr)
        entered = config.world.entries(batch, config.size).sum()  # cells
        nats = gather((kl.detach() * batch.valid.sum() / entered)[None]).mean()  # per cell
        follow_rate(meta.alpha, nats, config.rate, lr / config.discover_lr)
        step.log(loss=loss, nll=nll, kl=kl, alpha=meta.alpha.clone())
        if step.due:
            step.log(**run.look_at_gates(base, meta))
    return meta.requires_grad_(False).eval()

def mirrored(config, batch, rng):
    """Each trajectory in a random symmetric image of its world: the same colours, other directions."""
    world = config.world
    k = torch.randint(world.SYMMETRIES, (len(batch.length),), generator=rng, device=rng.device)
    observation, action = world.mirror(batch.observation, batch.action, k, config.size)
    return replace(batch, observation=observation, action=action)

def learn_codes(run, base, gates):
    """Stage 4, second part: what to send. New encoder and f_hyp learn, the gate of `gates` is frozen."""
    config = run.config
    rng = run.begin("codes")
    encoder = SegmentEndEncoder(config)
    hyper = Hypernetwork(config)
    meta = Metacontroller(gates.norm, gates.gate, hyper, encoder).to(run.device)
    meta.eval()  # gates are no longer drawn
    optimizer = AdamW([*hyper.parameters(), *encoder.parameters()], weight_decay=WEIGHT_DECAY)
    data = ExpertData(run, config.discover_batch, 0.0, rng)

    for step in run.steps("codes", config.code_steps, rng, optimizer, meta=meta):
        batch = image = data.batch(step)
        if config.mirror:
            # differs from the paper: decoded in a mirror image, because there "go up" explains nothing.
            image = mirrored(config, batch, rng)
        # The KL is left out: with frozen gates it is constant.
        loss, _ = discovery_loss(config, base, meta, batch, image, rng)
        descend(loss, optimizer, learning_rate(config.discover_lr, step))
        step.log(loss=loss)
        if step.due:
            step.log(**run.look_at_gates(base, meta))
    return meta.requires_grad_(False)

# ======== Chapter 5 · internal RL
# A small policy takes the place of the encoder that saw the future: it chooses a code where a gate opens.
# Base model, gate and f_hyp are frozen; to the policy they are part of the environment.
# You should see `success` leave zero after 6 to 40 thousand episodes.

class Policy(nn.Module):
    """π(z | e at the switches so far): a Gaussian whose mean a recurrent layer makes (App. D.3)."""
    # differs from the paper: a GRU that reads a normalised e instead of a Hawk layer, because one is enough.

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.embed = nn.Linear(config.width, config.width)
        self.memory = nn.GRU(config.width, config.width, batch_first=True)
        self.mean = nn.Linear(config.width, config.n_z)
        nn.init.normal_(self.mean.weight, std=0.01)
        nn.init.zeros_(self.mean.bias)
        self.register_buffer("success", torch.zeros(()))  # averaged over recent updates

    def forward(self, e, memory):
        """One choice: e [n, C] where gates open, memory [1, n, C] → (mean [n, Z], memory)"""
        x = F.relu(self.embed(self.norm(e[:, None])))
        out, memory = self.memory(x, memory)
        return self.mean(out)[:, 0], memory

    def replay(self, e, count):
        """The means of whole episodes with count [B] choices each: e [B, S, C] → [B, S, Z]"""
        x = F.relu(self.embed(self.norm(e)))
        packed = nn.utils.rnn.pack_padded_sequence(x, count.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = self.memory(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return self.mean(out)

class CodeActor:
    """The metacontroller while it acts in B games (Algorithm 1): gates are hard, and where one opens the
    policy chooses a code. Of all choices, count [B], it keeps e, mean and z [B, max_steps, …]."""

    def __init__(self, config, meta, policy, games, std, rng):
        self.config = config
        self.meta = meta
        self.policy = policy
        self.std = std
        self.rng = rng
        zeros = functools.partial(torch.zeros, device=rng.device)
        self.before = zeros(games, config.width)  # what the gate saw last
        self.code = zeros(games, config.n_z)  # the code that is held
        self.memory = zeros(1, games, config.width)  # of the policy, which advances only when it acts
        self.e = zeros(games, config.max_steps, config.width)
        self.mean, self.z = zeros(2, games, config.max_steps, config.n_z)
        self.count = zeros(games, dtype=torch.long)

    def __call__(self, games, e):
        x = self.meta.norm(e)
        beta = self.meta.gate.step(x, self.before[games])  # Eq. 16
        self.before[games] = x
        opens = (beta > THRESHOLD) | (self.count[games] == 0)  # β_1 = 1
        if opens.any():
            self.code[games[opens]] = self.choose(e[opens], games[opens])
        return self.meta.hyper(e, self.code[games])  # Eq. 11

    def choose(self, e, games):
        """Codes for m games whose gates open: e [m, C], games [m] → z [m, Z]"""
        mean, self.memory[:, games] = self.policy(e, self.memory[:, games].contiguous())
        z = mean + self.std * torch.randn(mean.shape, generator=self.rng, device=mean.device)
        at = (games, self.count[games])
        self.e[at] = e
        self.mean[at] = mean
        self.z[at] = z
        self.count[games] += 1
        return z

def gaussian_log_prob(z, mean, std):
    """ln N(z; mean, std² I), summed over the code's dimensions: [..., Z] → [...]"""
    return torch.distributions.Normal(mean, std).log_prob(z).sum(-1)

def clipped_surrogate(log_prob, old_log_prob, advantage, mask, clip=0.5):
    """PPO's clipped objective summed over an episode's choices (Eq. 10), as a loss: [B, S], [B] → scalar"""
    # Eq. 10 prints min(r, clip r)·A; we read it as PPO's min(r·A, clip(r)·A). Its clip is not given.
    ratio = (log_prob - old_log_prob).exp()
    advantage = advantage[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * mask).sum(1).mean()

def reinforce(log_prob_of, old_log_prob, success, mask, optimizer, lr, rng):
    """Updates the parameters behind log_prob_of(rows) [n, S], by episodes with success [B] and a mask [B, S]
    of their choices, in three passes, unless all end alike. → the last loss"""
    everyone = gather(success)
    advantage = (success - everyone.mean()) / (everyone.std(correction=0) + 1e-3)  # App. C.5
    loss = 0.0
    # How many passes there are and in how many minibatches, the paper does not say.
    for _ in range(3 if everyone.std(correction=0) > 0 else 0):
        order = torch.randperm(len(success), generator=rng, device=success.device)
        for rows in order.tensor_split(4):
            loss = clipped_surrogate(log_prob_of(rows), old_log_prob[rows], advantage[rows], mask[rows])
            descend(loss, optimizer, lr)
    return loss

def new_game(config, rng):
    """Games of the post-training task, in new layouts."""
    n = config.rl_batch // WORLD_SIZE
    layouts = config.world.draw_layouts(n, config.size, config.colours, config.walls, rng)
    return config.world.Game(layouts, config.size, post_task(config), config.max_steps)

def internal_rl(run, base, meta):
    """Stage 5: a policy over codes is reinforced; all else is its environment (Algorithms 1-3, Fig. 8)."""
    config = run.config
    rng = run.begin("rl")
    policy = Policy(config).to(run.device)
    optimizer = AdamW(policy.parameters(), weight_decay=0)
    updates = math.ceil(config.rl_episodes / config.rl_batch)

    for step in run.steps("rl", updates, rng, optimizer, policy=policy):
        # differs from the paper: σ (there fixed) falls from 1 to ¼ with success, because at 1 it ends lower.
        std = 1 - 0.75 * policy.success.item()
        game = new_game(config, rng)
        actor = CodeActor(config, meta, policy, len(game.rows), std, rng)
        success = play(config, base, game, rng, actor).success  # [B]
        reached = gather(success).mean()
        policy.success.lerp_(reached, 0.1)

        switches = int(actor.count.max())
        e, mean, z = actor.e[:, :switches], actor.mean[:, :switches], actor.z[:, :switches]  # [B, S, …]
        mask = torch.arange(switches, device=e.device) < actor.count[:, None]

        def log_prob_of(rows):
            return gaussian_log_prob(z[rows], policy.replay(e[rows], actor.count[rows]), std)

        old_log_prob = gaussian_log_prob(z, mean, std)
        lr = learning_rate(config.rl_lr, step)
        loss = reinforce(log_prob_of, old_log_prob, success, mask, optimizer, lr, rng)
        codes = actor.count.float().mean()
        step.log(episodes=(step.number + 1) * config.rl_batch, loss=loss, success=reached, codes=codes)
    return policy.requires_grad_(False).eval()

# ==== Nothing below is needed to understand the method ====

# ======== The baseline

def raw_rl(run, base):
    """Token-level RL: the same update on the base model's own actions, all of θ trained (App. C.5.3)."""
    config = run.config
    rng = run.begin("raw")
    model = copy.deepcopy(base).requires_grad_(True)
    optimizer = AdamW(model.parameters(), weight_decay=0)
    updates = math.ceil(config.rl_episodes / config.rl_batch)

    for step in run.steps("raw", updates, rng, optimizer, model=model):
        played = play(config, model, new_game(config, rng), rng)
        reached = gather(played.success).mean()

        def log_prob_of(rows):
            return config.world.log_prob(model(played.observation[rows, :-1]), played.action[rows])  # [n, T]

        old_log_prob = None
        if reached > 0:
            with torch.no_grad():
                old_log_prob = log_prob_of(slice(None))
        loss = reinforce(log_prob_of, old_log_prob, played.success, played.valid, optimizer, config.raw_lr,
                         rng)
        step.log(episodes=(step.number + 1) * config.rl_batch, loss=loss, success=reached)
    return model.requires_grad_(False).eval()

# ======== Run folder

STAGES = {  # name → all the stages that it builds on
    "pretrain": [], "probe": ["pretrain"], "steer": ["pretrain"], "gates": ["pretrain"],
    "codes": ["pretrain", "gates"], "rl": ["pretrain", "gates", "codes"], "raw": ["pretrain"]}
REPORTS = dict(gates=4, codes=3, rl=50, raw=50)  # how often a stage reports; others: 12 times
PURPOSES = ("held out", "layouts", "actions", "proposals", "codes", "find", "score", "bars", "bar plays",
            "film", "film plays", "gates", "gate proposals", "search", "pairs")

def refuse(message, status=2):
    """Ends all with one line on stderr, for bad input (status 2) or training gone wrong (1)."""
    print(f"internal_rl.py: {message}", file=sys.stderr)
    raise SystemExit(status)

def as_json(content, **how):
    """As text; nan, which JSON does not have, becomes null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda nan: None), **how) + "\n"

def write_file(path, content):
    """Writes bytes or text, never by halves."""
    if RANK == 0:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)

class Run:
    """Settings, device and folder of a run."""

    def __init__(self, config, folder, device, data="data"):
        self.config = config
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.data = Path(data)
        self.lines = {}  # of each stage: its reports
        self.digests = {}  # of each finished stage: that of its checkpoint
        self.in_stage, self.stop = False, 0  # the signal that asks a stage to stop after this round

    def open(self):
        """Makes the folder and keeps others out of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0 and os.name == "posix":
            import fcntl
            self.locked = open(self.folder / ".lock", "a")
            try:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                refuse(f"another process is at work in {self.folder}")
        for stage in STAGES:
            self.load(stage)
        write_file(self.folder / "config.json", as_json(asdict(self.config), indent=1))

    def note(self, number, frame):
        """A signal ends the run at once if it is the second one, or no stage is at work."""
        if self.stop or not self.in_stage:
            raise SystemExit(128 + number)
        self.stop = number

    def begin(self, stage, resumed=0):
        """Seeds torch, for initial weights. → a generator for data and noise, which processes do not share"""
        torch.manual_seed(self.config.seed)
        seed = 10_000 * (self.config.seed + 1) + list(STAGES).index(stage)
        return torch.Generator(self.device).manual_seed(seed + (10 ** 9 + resumed) * RANK)

    def evaluation(self, purpose):
        """Random numbers that are the same in every run, and that no training uses."""
        return torch.Generator(self.device).manual_seed(101 + PURPOSES.index(purpose))

    def layouts(self, n, purpose="layouts"):
        c = self.config
        return c.world.draw_layouts(n, c.size, c.colours, c.walls, self.evaluation(purpose))

    @functools.cache
    def held_out(self, noise=0.0):
        """Expert trajectories that no stage trains on."""
        world, rng = self.config.world, self.evaluation("held out")
        return world.expert_batch(self.config, world.HELD_OUT, rng, noise)

    def steps(self, stage, count, rng, optimizer, **modules):
        """Yields a stage's steps, from where it stopped. Its state, saved between rounds of steps, is the
        modules, the optimizer and the random numbers."""
        unit = 1 if stage in ("rl", "raw") else min(ROUND, count)
        rounds = math.ceil(count / unit)
        every = max(1, rounds // REPORTS.get(stage, 12))
        saved = self.load(stage) or dict(steps=0, seconds=0.0, lines=[])
        done, lines = saved["steps"] // unit, saved["lines"]
        self.log(stage, lines)  # what was written after the checkpoint will be written again
        for name, module in modules.items() if done else ():
            module.load_state_dict(saved["modules"][name])
        if 0 < done < rounds:
            if saved["device"] != self.device.type:
                refuse(f"{stage}.pt was begun on {saved['device']}; go on there")
            optimizer.load_state_dict(saved["optimizer"])
            rng.set_state(saved["generator"] if RANK == 0 else self.begin(stage, done).get_state())
        if done:
            print(f"{stage}: {done} of {rounds} rounds done before", flush=True)

        started = last_save = time.time()
        while done < rounds:
            metrics = {}
            due = done + 1 == rounds or (done + 1) % every == 0
            for number in range(done * unit, (done + 1) * unit):
                last = number + 1 == (done + 1) * unit
                yield SimpleNamespace(stage=stage, number=number, count=count, due=due and last,
                                      progress=min(1, number / count), log=metrics.update)
                self.in_stage = True  # only now: the first step may make data, for minutes
            done += 1
            spent = saved["seconds"] + time.time() - started
            metrics = {name: x.item() if torch.is_tensor(x) else x for name, x in metrics.items()}
            states = {name: module.state_dict() for name, module in modules.items()}
            self.check_finite(stage, done * unit, metrics, states)
            if due:
                lines.append({"stage": stage, "step": done * unit, "time_s": round(spent, 2), **metrics})
                self.log(stage, lines)
                shown = " ".join(f"{name} {round(x, 4)}" for name, x in metrics.items())
                time_left = f"{spent:.0f} s, {spent / done * (rounds - done):.0f} s to go"
                print(f"{stage} {done * unit}/{rounds * unit} {shown} | {time_left}", flush=True)
            stop = int(gather(torch.tensor([self.stop])).max())
            if stop or done == rounds or time.time() - last_save > 60:
                more = dict(optimizer=optimizer.state_dict(), generator=rng.get_state())
                self.save(stage, steps=done * unit, seconds=spent, lines=lines, modules=states,
                          **(more if done < rounds else {}))
                last_save = time.time()
            if stop:
                print(f"saved {stage} at step {done * unit}; the same command goes on there", flush=True)
                raise SystemExit(128 + stop)
        self.in_stage = False
        gather(torch.zeros(1))  # all wait until the first process has saved
        self.load(stage)  # remembers its digest

    def check_finite(self, stage, step, metrics, states):
        """Ends the run where a loss or a weight is nan or infinite."""
        weights = [pair for state in states.values() for pair in state.items()]
        for name, x in [("loss", metrics["loss"]), *weights]:
            if not torch.as_tensor(x).isfinite().all():
                kept = self.folder / f"{stage}.pt"
                kept = kept if kept.exists() else "none yet"
                refuse(f"{stage}: {name} is not finite at step {step}; last good checkpoint: {kept}", 1)

    def log(self, stage, lines):
        """Writes metrics.jsonl, with these lines of `stage`."""
        self.lines[stage] = lines
        text = "".join(as_json(line) for name in STAGES for line in self.lines.get(name, []))
        write_file(self.folder / "metrics.jsonl", text)

    def save(self, stage, **content):
        """Writes a checkpoint, followed by a digest of its bytes."""
        parents = {name: self.digests.get(name) for name in STAGES[stage]}
        file = io.BytesIO()
        torch.save(dict(content, stage=stage, config=asdict(self.config), parents=parents,
                        device=self.device.type), file)
        write_file(self.folder / f"{stage}.pt", file.getvalue() + hashlib.sha256(file.getvalue()).digest())

    def load(self, stage):
        """The checkpoint of `stage`, or None. Refuses one that is damaged or does not belong here."""
        path = self.folder / f"{stage}.pt"
        if not path.exists():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            refuse(f"{path} is damaged; delete it to train it again")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for s in fields(self.config):
            its, ours = saved["config"].get(s.name), getattr(self.config, s.name)
            if s.metadata["stages"] & {stage, *STAGES[stage]} and its != ours:
                refuse(f"{path} was made with {s.name}={its}, not {ours}; delete it or change --out")
        strangers = [name for name, its in saved["parents"].items() if self.digests.get(name, its) != its]
        if strangers or saved["stage"] != stage:
            refuse(f"{path} belongs to another {[*strangers, saved['stage']][0]}.pt; delete it")
        self.lines[stage] = saved["lines"]
        if "optimizer" not in saved:  # it is finished
            self.digests[stage] = data[-32:].hex()
        return saved

    @torch.no_grad()
    def look_at_base(self, base):
        """The loss of actions on held-out trajectories, and how far it is from the best possible."""
        config, world = self.config, self.config.world
        _, nll = pretraining_loss(config, base, self.held_out(config.noise))
        floor, _ = world.action_floor(config, world.HELD_OUT, self.evaluation("held out"))
        return {"eval_nll": nll.item(), "gap": nll.item() - floor}

    @torch.no_grad()
    def look_at_gates(self, base, meta):
        """On held-out trajectories: do gates open at new subgoals, do codes tell the subgoal?"""
        batch, training = self.held_out(), meta.training
        e = base.lower(batch.observation)
        _, beta, _, mu = meta.eval()(e, batch.length, self.evaluation("proposals"))
        meta.train(training)
        scores = gate_scores(beta, batch, self.config.world.TOLERANCE)
        return {**scores, "goal_accuracy": goal_accuracy(mu, beta, batch)}

# ======== Looking inside

def gate_scores(beta, batch, tolerance):
    """Open gates, of β [B, T+1], against true changes of subgoal, ± `tolerance` steps, from step 2 on."""
    valid = batch.valid[:, 1:]
    true = (batch.subgoal[:, 1:] != batch.subgoal[:, :-1]) & valid
    opened = (beta[:, 1:-1] > THRESHOLD) & valid

    def near(x):
        return F.max_pool1d(x[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0

    precision = (opened & near(true)).sum() / opened.sum()
    recall = (true & near(opened)).sum() / true.sum()
    return {"gate_precision": precision.item(), "gate_recall": recall.item()}

def goal_accuracy(mu, beta, batch):
    """How often the nearest centroid tells the subgoal from the code μ at an open gate (chance 1/K)."""
    opened = (beta[:, :-1] > THRESHOLD) & batch.valid
    codes = mu[:, :-1][opened]  # [n, Z]
    goals = batch.subgoal[opened]  # [n]
    half = len(codes) // 2
    centroids = torch.stack([codes[:half][goals[:half] == k].mean(0) for k in range(gridworld.SUBGOALS)])
    right = torch.cdist(codes[half:], centroids).argmin(1) == goals[half:]
    return right.float().mean().item()

def by_codes(run, base, meta):
    """A control(e, subgoal) → ê by one code a subgoal, found without hidden labels: a cross-entropy search
    for codes that, held for a whole episode, attain the subgoal."""
    config, K = run.config, gridworld.SUBGOALS
    rng = run.evaluation("search")
    n = max(1, config.evaluation // config.world.EVALUATIONS_A_LAYOUT)
    layouts = run.layouts(n, "find")[torch.arange(n).repeat(K * 32)]  # K·32·n games
    visits = torch.arange(K * gridworld.SUBGOAL_SIZE[config.subgoals], device=run.device).view(K, -1)
    tasks = visits.repeat_interleave(32 * n, 0)  # [K·32·n, visits of a subgoal]
    mean, std = torch.zeros(K, 1, config.n_z, device=run.device), 1.0
    for _ in range(4):
        codes = mean + std * torch.randn(K, 32, config.n_z, generator=rng, device=run.device)
        held = codes.flatten(0, 1).repeat_interleave(n, 0)  # [K·32·n, Z]
        game = config.world.Game(layouts, config.size, tasks, config.max_steps)
        play(config, base, game, rng, lambda games, e: meta.hyper(e, held[games]))
        attained = game.success().view(K, 32, n).sum(2)  # [K, 32]
        best = attained.topk(6).indices[..., None].expand(-1, -1, config.n_z)
        elite = codes.gather(1, best)  # [K, 6, Z]
        mean, std = elite.mean(1, keepdim=True), elite.std(1, keepdim=True) + 0.1
    return lambda e, subgoal: meta.hyper(e, mean[subgoal, 0])

def composition(run, base, control):
    """P(subgoal b is reached next | a just was), each by its control(e, subgoal) → ê: [K+1, K]. The first row
    is for the start; b = a is nan."""
    config, K = run.config, gridworld.SUBGOALS
    size = gridworld.SUBGOAL_SIZE[config.subgoals]
    n = 3 * max(1, config.evaluation // config.world.EVALUATIONS_A_LAYOUT)
    pairs = torch.tensor([(a, b) for a in range(K) for b in range(K) if a != b])
    order = pairs.repeat_interleave(n, 0).to(run.device)  # [K·(K−1)·n, 2]
    tasks = (order[..., None] * size + torch.arange(size, device=run.device)).flatten(1)
    layouts = run.layouts(n, "score")[torch.arange(n).repeat(len(pairs))]
    game = config.world.Game(layouts, config.size, tasks, config.max_steps)

    def intervene(games, e):
        reached = (game.visits[games] // size).clamp(max=1)  # the first subgoal, already?
        return control(e, order[games, reached])

    success = play(config, base, game, run.evaluation("pairs"), intervene).success
    first = (game.visits >= size).view(len(pairs), n).float().sum(1).cpu()
    matrix = torch.full((K + 1, K), math.nan)
    matrix[0] = first.view(K, -1).mean(1) / n
    matrix[pairs[:, 0] + 1, pairs[:, 1]] = success.view(len(pairs), n).sum(1).cpu() / first
    return matrix

def composition_scores(config, matrix):
    """Means over transitions that the data shows and withholds (a to a + 1 modulo K), and the product along
    the post-training task, about what a policy can reach."""
    size = gridworld.SUBGOAL_SIZE[config.subgoals]
    order = [colour // size for colour in post_task(config)[::size]]
    product = matrix[0, order[0]] * math.prod(matrix[a + 1, b] for a, b in zip(order, order[1:]))
    withheld = matrix[1:].roll(-1, 1).diagonal()
    shown = torch.cat([matrix[1:].roll(-k, 1).diagonal() for k in range(2, len(withheld))])
    return {"shown": shown.nanmean().item(), "withheld": withheld.nanmean().item(), "product": product.item()}

# ======== Pictures

def new_figure(width, height, rows=1, columns=1):
    from matplotlib.figure import Figure  # instead of pyplot, which depends on the reader's backend
    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(rows, columns)

def draw_gates(run, base, meta):
    """Gates over subgoals (Fig. A3)."""
    config = run.config
    batch = config.world.expert_batch(config, 24, run.evaluation("gates"))
    with torch.no_grad():
        e = base.lower(batch.observation)
        beta = meta(e, batch.length, run.evaluation("gate proposals"))[1]
    figure, axes = new_figure(8, 6, 6)
    axes[0].set_title("gate β and its threshold over the expert's hidden subgoal (background), step by step")
    for axis, steps, subgoal, gate in zip(axes, batch.length.tolist(), batch.subgoal.cpu(), beta.cpu()):
        colours = gridworld.PALETTE[subgoal[:steps]][None]  # [1, steps, 3]
        axis.imshow(colours, alpha=0.35, aspect="auto", extent=(-0.5, steps - 0.5, -0.05, 1.05))
        axis.step(range(steps), gate[:steps], where="mid", color="black")
        axis.axhline(THRESHOLD, ls=":", color="gray")
    figure.savefig(run.folder / "gates.png", dpi=110)

def draw_success(run, result):
    """Success over episodes (Fig. 8)."""
    figure, axis = new_figure(6, 3.2)
    for stage, name in (("rl", "internal RL"), ("raw", f"{run.config.world.RAW} RL")):
        episodes = [line["episodes"] / 1000 for line in run.lines[stage]]
        axis.plot(episodes, [line["success"] for line in run.lines[stage]], label=name)
    axis.axhline(result["steer_success"], ls="--", color="gray", label="labelled controllers")
    axis.set(xlabel="thousand episodes", ylabel=f"success on {run.config.post_task}")
    axis.legend()
    figure.savefig(run.folder / "success.png", dpi=110)

def draw_matrix(run, result):
    """Composition matrices; what the data never shows is framed."""
    from matplotlib.patches import Rectangle
    figure, axes = new_figure(8, 4, 1, 2)
    for axis, name in zip(axes, ("labels", "codes")):
        cells = np.array(result[f"matrix_{name}"], dtype=float)
        K = len(cells[0])
        axis.imshow(cells, vmin=0, vmax=1, cmap="Greens")
        for (a, b), cell in np.ndenumerate(cells):
            if not math.isnan(cell):
                axis.text(b, a, f"{cell:.2f}", ha="center", color="black" if cell < 0.6 else "white")
            if a and b == a % K:
                axis.add_patch(Rectangle((b - 0.5, a - 0.5), 1, 1, fill=False, color="red", lw=2))
        axis.set(title=f"by {name}", xlabel="next", xticks=range(K), yticks=range(K + 1),
                 yticklabels=["start", *range(K)], ylabel="just reached")
    figure.savefig(run.folder / "matrix.png", dpi=110)

def draw_episode(run, base, meta, policy):
    """A solved episode, as a strip and as an animation."""
    config, world = run.config, run.config.world
    game = world.Game(run.layouts(64, "film"), config.size, post_task(config), config.max_steps)
    actor = CodeActor(config, meta, policy, 64, 0.0, run.evaluation("codes"))
    choices = []  # so far, of all games, at each step

    def watched(games, e):
        e = actor(games, e)
        choices.append(actor.count.tolist())
        return e

    episodes = play(config, base, game, run.evaluation("film plays"), watched).to("cpu")
    best = int((episodes.success * 1000 - episodes.length).argmax())
    count = [counts[best] for counts in choices[:int(episodes.length[best])]]
    new = [now > before for before, now in zip([0, *count], count)]
    titles = [f"{t}: code {n}" + " (new)" * new[t] for t, n in enumerate(count)]
    seen = episodes.observation[best, :len(count) + 1]
    pictures = [world.picture(observation, config.size, config.colours) for observation in seen]
    gridworld.film(pictures.__getitem__, [*titles, "end"], [*new, False], run.folder / "episode", *world.FILM)

# ======== Command line

PARTS = ("all", "pretrain", "probe", "steer", "discover", "rl", "raw")

def configure(task, preset="quick", **changes):
    """The settings of a preset of a world, with some changed."""
    return Settings(**{"task": task, **Settings(task).world.PRESETS[preset], **changes})

def run_stages(run, part="all"):
    """Trains and measures one of PARTS and what it builds on. → numbers, which the README explains"""
    config, world = run.config, run.config.world
    game = world.Game(run.layouts(config.evaluation), config.size, post_task(config), config.max_steps)

    def success(model, intervene=None):
        """On the post-training task in evaluation layouts: [n] 0/1"""
        game.reset(game.done)
        return play(config, model, game, run.evaluation("actions"), intervene).success

    base = pretrain(run)
    result = {"gap": run.look_at_base(base)["gap"]}
    if part in ("probe", "all"):
        probe = train_probe(run, base)
        residuals, subgoal = probe_examples(base, run.held_out())
        result["probe"] = (probe(residuals).argmax(-1) == subgoal).float().mean(1).tolist()
        result["probe_best"] = max(result["probe"])
        result["probe_ceiling"] = world.action_floor(config, world.HELD_OUT, run.evaluation("held out"))[1]
    if part in ("steer", "all"):
        controllers = steer(run, base)
        matrix = composition(run, base, controllers)
        result["matrix_labels"] = matrix.tolist()
        result["labels_withheld"] = composition_scores(config, matrix)["withheld"]
        result["steer_success"] = success(base, with_labels(config, controllers, game)).mean().item()
        result["base_success"] = success(base).mean().item()
    if part in ("discover", "rl", "all"):
        meta = learn_codes(run, base, learn_gates(run, base))
        matrix = composition(run, base, by_codes(run, base, meta))
        result["matrix_codes"] = matrix.tolist()
        result |= {**run.look_at_gates(base, meta), **composition_scores(config, matrix)}
    if part in ("rl", "all"):
        policy = internal_rl(run, base, meta)
        actor = CodeActor(config, meta, policy, config.evaluation, 0.0, run.evaluation("codes"))
        result["internal_success"] = success(base, actor).mean().item()
    if part in ("raw", "all"):
        result["raw_success"] = success(raw_rl(run, base)).mean().item()
    if part == "all" and RANK == 0:
        result["seconds"] = round(sum(run.lines[stage][-1]["time_s"] for stage in STAGES), 1)
        made_with = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {run.device}"
        whole = {**result, "made_with": made_with, "settings": asdict(config)}
        write_file(run.folder / "result.json", as_json(whole, indent=1))
        draw_gates(run, base, meta)
        draw_success(run, result)
        draw_matrix(run, result)
        draw_episode(run, base, meta, policy)
    return result

def check(config):
    """Refuses settings that cannot work."""
    for s in fields(config):
        low, high, value = s.metadata["low"], s.metadata["high"], getattr(config, s.name)
        if s.type in (int, float) and not low <= value <= high:
            refuse(f"{s.name} {value} is outside {low} … {high}")
    if config.width % config.heads or config.rank > config.width or config.control_layer > config.layers:
        refuse("width must be a multiple of heads, rank at most width, control_layer at most layers")
    if config.rl_batch % WORLD_SIZE:
        refuse(f"rl_batch {config.rl_batch} cannot be shared by {WORLD_SIZE} processes")
    try:
        config.world.check(config)
    except ValueError as error:
        refuse(error)

def parse_arguments(arguments):
    """Command line → (argparse namespace, Settings). Every setting is a flag; flags override the preset."""
    about = "Internal RL. In brackets: the quick preset of gridworld."
    parser = argparse.ArgumentParser("internal_rl.py", allow_abbrev=False, description=about)
    parser.error = refuse
    parser.add_argument("--preset", default="quick", help="named settings: quick, tiny or (grid) pairs")
    parser.add_argument("--stage", default="all", choices=PARTS, help="run this and what it builds on")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where")
    parser.add_argument("--out", help="run folder (runs/TASK-PRESET-sSEED)")
    parser.add_argument("--data", default="data", help="folder of the ant's expert trajectories")
    for s in fields(Settings):
        how = dict(type=s.type, choices=s.metadata["choices"])
        if s.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + s.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{s.metadata['help']} ({s.default})", **how)
    options = parser.parse_args(arguments)
    changes = {s.name: getattr(options, s.name) for s in fields(Settings) if hasattr(options, s.name)}
    task = changes.pop("task", "gridworld")
    try:
        return options, configure(task, options.preset, **changes)
    except (ImportError, AttributeError, ValueError):
        refuse(f"--task {task}: no world {task}.py or {task}_tasks.py beside internal_rl.py")
    except KeyError:
        refuse(f"--preset {options.preset}: {task} has {', '.join(Settings(task).world.PRESETS)}")

def main(arguments=None):
    """The command line. → what `run_stages` returns"""
    options, config = parse_arguments(arguments)
    check(config)
    device = options.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if getattr(torch, device).device_count() == 0:
        refuse(f"--device {device}: torch finds no such device here")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")

    folder = options.out or f"runs/{config.task}-{options.preset}-s{config.seed}"
    run = Run(config, folder, device, options.data)
    handlers = {number: signal.signal(number, run.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.open()
        parameters = sum(p.numel() for p in Base(config).parameters())
        print(f"{folder}/: seed {config.seed}, {device}, {parameters:,} parameters", flush=True)
        result = run_stages(run, options.stage)
    except (OSError, MemoryError, gridworld.Unusable) as error:
        refuse(str(error) or "out of memory")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(f"\n{'':20}{'this run':>12}   expect (quick preset)")
    for name, number in result.items():
        if isinstance(number, float):
            print(f"{name:20}{number:12.4g}   {config.world.EXPECT.get(name, '')}")
    return result

if __name__ == "__main__":
    main()
