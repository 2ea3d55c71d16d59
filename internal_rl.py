"""Internal RL in one file: reinforce the thoughts of a pretrained sequence model instead of its tokens.

A minimal PyTorch reimplementation of "Emergent temporal abstractions in autoregressive models enable
hierarchical reinforcement learning" (arXiv:2512.20605; sections, equations and tables cited are the paper's).

Contents
    Settings           every dial, its default and its range
    What stages share  one optimizer step, learning rate, batches of expert data
    1  pretrain        a causal model learns to predict the actions of an expert that pursues hidden subgoals
    2  probe           a linear read-out finds the hidden subgoal in its residual stream
    3  steer           one linear map per subgoal, added there, makes the frozen model pursue that subgoal
    4  discover        without labels, a metacontroller learns when to switch such maps, then to what
    5  internal RL     a small policy learns from one reward per episode which codes to emit
       the baseline    token-level RL on the same model: PPO on its own actions, as many episodes
    ── nothing below is needed to understand the method ──
    Several processes · Checkpoints · Looking inside · Figures · Benchmark · Comparisons · Command line

One forward pass
                          the future ─► encoder (in 5: policy π) ─► μ_t, Σ_t ─► z̃_t ─────────────┐
                               ┌─► gate β_t(e_t, e_{t−1}) ────────────────────────────────────────┤
 o_1…o_t ─► blocks 1…l ─► e_t ─┤                                    z_t = β_t z̃_t + (1−β_t) z_{t−1}
                               │                                                │ hypernetwork
                               └─► ê_t = e_t + U_t e_t ◄─── U_t = BᵀA/√C of z_t ┘
                                         └─► blocks l+1…L ─► p(a_t | o_1…o_t, z_1…z_t)

Glossary (code name: paper symbol, where)
  e            residual stream e_{t,l} after block l, L/2 or as set      Base.lower, Base.upper    Sec. 1
               (the metacontroller reads the embedding e_{t,0} on the grid, e_{t,l} of the ant)
  U, A, B      linear controller U = BᵀA/√C of rank R                    linear_control            Eq. 1,11,18
  h            causal history h_t                                        Metacontroller.history    Eq. 12
  s            summary f_emb of the whole trajectory, one vector         Metacontroller.summary    Eq. 13
  mu, log_sigma  μ_t, ln √Σ_t (diagonal) of the proposed code            Metacontroller.encode     Eq. 14, 15
  beta         switch gate β_t (1 = take the proposal, 0 = keep)         Gate                      Eq. 16
  z            controller code z_t ∈ R^{n_z}                             integrate                 Eq. 2, 17
  alpha        weight α of the KL to N(0, I)                             discovery_loss            Eq. 3, 9
  next_obs     weight λ of the next-observation loss                     pretraining_loss          Eq. 4, 5
  batch        Trajectories: observation [B, T+1, D], action [B, T, …], subgoal, valid [B, T], length [B]
  D, D*        expert data for the base / for everything after it        ExpertData                App. C
Dims: B batch, n rows of any kind (say, games that still run), T actions of an episode, S switches of an
episode, D numbers of an observation, C residual width, O colours, N objects (colours, then walls), K
subgoals, V visits of a task, Z code, R rank, J hidden units of f_hyp.
What differs from the paper is marked where it happens: grep "differs from the paper".
"""
import argparse
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # while the libraries load
fcntl, resource = map(importlib.import_module, ("fcntl", "resource")) if os.name == "posix" else (None, None)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed
from torch.utils.flop_counter import FlopCounterMode

import gridworld

# ============================================================================================= Settings

def setting(default, stages, text, low=None, high=None, choices=None):
    """A dial: default (grid, quick preset), the first stages that it changes (makes stale), help, bounds."""
    return field(default=default, metadata=dict(stages=set(stages.split()), help=text, low=low, high=high,
                                                choices=choices))


@dataclass
class Settings:
    world: str = setting("gridworld", "pretrain", "the world")
    seed: int = setting(0, "pretrain", "random seed of everything that is trained", 0, 2 ** 40)
    # differs from the paper: a smaller world, single colours as subgoals, control after the first block, of
    # rank 64 (there 16).
    size: int = setting(5, "pretrain", "grid size G", 2, 9)
    colours: int = setting(4, "pretrain", "coloured cells O", 1, 10)
    walls: int = setting(1, "pretrain", "wall cells W", 0, 70)
    max_steps: int = setting(60, "pretrain", "episode length limit", 10, 10 ** 5)
    subgoals: str = setting("singles", "pretrain", "single colours (Table A2) or pairs of them (A1)",
                            choices=list(gridworld.SUBGOAL_SIZE))
    noise: float = setting(0.0, "pretrain", "expert noise in D: share of random moves; σ of torques", 0, 1)
    view: str = setting("egocentric", "pretrain", "input: offsets from the agent, or absolute places (paper)",
                        choices=["egocentric", "absolute"])
    width: int = setting(128, "pretrain", "residual width n_e, also of the policy", 1, 8192)
    layers: int = setting(4, "pretrain", "blocks L of the base model", 2, 128)
    heads: int = setting(4, "pretrain", "attention heads, or blocks of Hawk's gate matrices", 1, 128)
    window: int = setting(0, "pretrain", "attention sees so many last steps; 0: all (paper)", 0, 10 ** 5)
    pretrain_steps: int = setting(9600, "pretrain", "base model: training steps", 1, 10 ** 8)
    pretrain_batch: int = setting(64, "pretrain", "base model: trajectories a step", 1, 10 ** 5)
    pretrain_lr: float = setting(3e-3, "pretrain", "base model: peak learning rate", 1e-12, 1e6)
    weight_decay: float = setting(0.03, "pretrain", "base model: AdamW weight decay", 0, 100)
    cosine: bool = setting(True, "pretrain", "stages 1-4: learning rates fall along a cosine")
    # differs from the paper: λ = 0.02 instead of 0.01.
    next_obs: float = setting(0.02, "pretrain", "λ, weight of the next-observation loss", 0, 1000)
    bf16: bool = setting(True, "pretrain", "bfloat16 autocast in the base model in stages 1 and 4")
    probe_steps: int = setting(400, "probe", "probe: training steps", 1, 10 ** 8)
    probe_lr: float = setting(3e-3, "probe", "probe: learning rate", 1e-12, 1e6)
    control_layer: int = setting(1, "steer gates", "control acts after this block l; 0: L/2", 0, 128)
    rank: int = setting(64, "steer gates", "rank of a linear controller U; 0: a full matrix", 0, 8192)
    control_decay: float = setting(0.03, "steer gates", "(meta)controllers: AdamW weight decay", 0, 100)
    steer_steps: int = setting(1000, "steer", "labelled controllers: training steps", 1, 10 ** 8)
    steer_lr: float = setting(3e-2, "steer", "labelled controllers: learning rate", 1e-12, 1e6)
    post_task: str = setting("0-1-2-3-0", "rl raw", "post-training task, of withheld transitions only")
    gate_steps: int = setting(2400, "gates", "steps to learn when to switch", 1, 10 ** 8)
    code_steps: int = setting(3200, "codes", "steps to learn what to send; 0: codes of gates stay", 0, 10 ** 8)
    discover_batch: int = setting(64, "probe steer gates", "stages 2-4: trajectories", 1, 10 ** 5)
    discover_lr: float = setting(3e-3, "gates", "metacontroller: learning rate", 1e-12, 1e6)
    alpha: float = setting(0.01, "gates", "α, weight of the KL; with a rate: at first", 0, 1000)
    rate: float = setting(1.2, "gates", "α holds the KL at so many nats a cell of the way; 0: α stays", 0, 1000)
    n_z: int = setting(4, "gates", "dimensions of a code z", 1, 1000)  # differs from the paper: 8
    code_std: float = setting(0.4, "gates", "σ of codes; 0: the paper's codes and gates (σ learned)", 0, 0.99)
    mirror: bool = setting(True, "codes", "codes are decoded in a mirror image of the world")
    read_embedding: bool = setting(True, "gates", "the metacontroller reads e_{t,0} instead of e_{t,l}")
    rl_episodes: int = setting(150_000, "rl raw", "episodes for internal RL, and the baseline", 1, 10 ** 10)
    rl_batch: int = setting(1024, "rl raw", "episodes an update", 4, 10 ** 6)
    rl_lr: float = setting(3e-3, "rl", "internal RL: learning rate of the policy, times its std", 1e-12, 1e6)
    raw_lr: float = setting(1e-4, "raw", "baseline: learning rate of the base model", 1e-12, 1e6)
    std_start: float = setting(1.0, "rl", "the policy's std where it solves nothing (prior: 1)", 1e-6, 1000)
    std_end: float = setting(0.25, "rl", "the policy's std where it solves everything", 1e-6, 1000)
    method: str = setting("internal", "gates", "rivals: raw (tokens only), forced (every gate is open), "
                          "cotrain (the base model learns, too, from scratch), compile (CompILE)",
                          choices=["internal", "raw", "forced", "cotrain", "compile"])
    bias: bool = setting(False, "codes", "control: in the end e + b(z) in place of e + U(z) e")
    per_step: bool = setting(False, "gates", "control: gates are learned with a summary s_t of o_t … o_T+1")
    temperature: float = setting(1.0, "raw", "control: divides the logits of the baseline's start", 0.01, 100)
    scratch: bool = setting(False, "raw", "control: the baseline starts from random weights")
    tolerance: int = setting(0, "", "only measures: how many steps a gate may be off", 0, 100)
    evaluation: int = setting(1024, "", "only measures: layouts on which success is measured", 8, 10 ** 6)

    @property
    def module(self):
        """The module of the world, see `load_world`."""
        return load_world(self.world)

# ==================================================================================== What stages share
# A stage is a plain loop over `run.steps(…)`, which goes on where an earlier run stopped and saves. A `step`
# has number, count, progress 0 … 1, due (time to report), log(…). Of `run`, generator(stage) is for training;
# evaluation(purpose), held_out(noise), layouts(n) are draws, trajectories and boards for measuring. Unless
# several processes share a batch, mine(x) and everyones(x) are x, and own(generator) is the generator.

ROUND = 16  # steps of supervised training between two moments at which a run may stop; batches in a pool


def descend(loss, optimizer, lr, count=1):
    """One step at learning rate lr; a gradient of norm above 1 is scaled to 1. `count`: the loss is a mean
    over so many steps or episodes, which weighs it if several processes share a batch."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    average_gradients(parameters, count)
    nn.utils.clip_grad_norm_(parameters, 1.0)  # differs from the paper, which mentions no clipping.
    optimizer.step()


def learning_rate(config, peak, number, count):
    """Of step `number` of `count`: warm-up (200 steps, or a tenth), then a cosine to 2% of the peak."""
    # differs from the paper: larger rates that decay (--no-cosine: constant), because there are fewer steps.
    if not config.cosine:
        return peak
    warm_up = min(200, count // 10 + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * number / count))
    return peak * min(1, (number + 1) / warm_up) * (0.02 + 0.98 * cosine)


class ExpertData:
    """Batches of expert trajectories: D (noise = config.noise) or D* (noise = 0)."""
    # differs from the paper: 16 batches are drawn at once and dealt out by length, which halves the padding.

    def __init__(self, run, batch_size, noise, generator):
        self.config, self.batch_size, self.generator = run.config, batch_size, generator
        self.pool, self.deal = None, []
        self.draw = run.config.module.source(run.config, noise, None if run.dry else run.data)

    def batch(self, thinning):
        """The next Trajectories. Thinning, 0 (they are whole) … 1, is for worlds of small steps, like the ant's."""
        if not self.deal:
            try:
                self.pool = self.draw(ROUND * self.batch_size, self.generator)
            except ValueError as error:
                refuse(error)
            rows = self.pool.length.argsort().tensor_split(ROUND)
            if len(self.pool.length) < ROUND:
                raise gridworld.Unusable(f"the expert solves only {len(self.pool.length)} episodes of a pool")
            order = torch.randperm(ROUND, generator=self.generator, device=self.generator.device)
            self.deal = [rows[i] for i in order.tolist()]
        batch = self.pool.pick(self.deal.pop(0))
        return mine(self.config.module.thinned(self.config, batch, thinning, self.generator))


def draw_layouts(config, n, generator):
    return config.module.draw_layouts(n, config.size, config.colours, config.walls, generator)


def mirrored(config, batch, generator):
    """Each trajectory in a random one of the symmetric images of its world: same colours, same order, other
    directions. The grid has 8 images. The ant has 32: its legs can be counted from any of the four, too."""
    module = config.module
    k = torch.randint(module.SYMMETRIES, (len(batch.length),), generator=generator, device=generator.device)
    observation, action = module.mirror(batch.observation, batch.action, k, config.size)
    return replace(batch, observation=observation, action=action)

# ================================================================================= Chapter 1 · pretrain
# You should see `gap`, the distance to the best possible predictor, fall to about 0.04 nats per action.

@functools.lru_cache(64)
def relative_bucket(queries, keys, window, device):
    """How far key j lies before query i: (bucket, hidden?), each [queries, keys]; queries are the last keys.
    Buckets of App. D.1: 16 exact distances, then 16 logarithmic ones up to 128. Hidden is the future, and
    what lies `window` steps back or more, if that is not 0."""
    ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    far = 16 + (ago.clamp(min=1) / 16).log() / math.log(128 / 16) * 16
    hidden = (ago < 0) | (ago >= (window or keys))
    return torch.where(ago < 16, ago.clamp(min=0), far.long().clamp(max=31)), hidden


class Block(nn.Module):
    """Pre-norm transformer block with a relative-position bias added to the attention logits (Table A16)."""
    # differs from the paper: each block has its own bias, and PyTorch's default initial weights.

    def __init__(self, config):
        super().__init__()
        width, heads = config.width, config.heads
        self.heads, self.window = heads, config.window
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.position_bias = nn.Embedding(32, heads)
        nn.init.zeros_(self.position_bias.weight)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, past=None):
        """x [B, T, C] → ([B, T, C], (keys, values)). `past`: those of T' earlier steps, [B, H, T', C/H]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)  # [B, T, 3, H, C/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, C/H]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # [B, H, T'+T, C/H]
        bucket, hidden = relative_bucket(length, k.shape[2], self.window, x.device)
        bias = self.position_bias(bucket).permute(2, 0, 1).masked_fill(hidden, -torch.inf)  # [H, T, T'+T]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias  # [B, H, T, T'+T]
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)  # [B, T, C]
        x = x + self.mix(attended)
        x = x + self.down(F.relu(self.up(self.norm_2(x))))
        return x, (k[:, :, -self.window:], v[:, :, -self.window:])


class Base(nn.Module):
    """Causal model of observations: the world's embedding, L blocks, the world's head; `lower` and `upper`
    are split after block l. A `cache` is a list with one entry a block; passing the same list again continues
    the sequence (acting, one step at a time)."""

    def __init__(self, config):
        super().__init__()
        self.split = config.control_layer or config.layers // 2  # l
        self.embed, block = config.module.Embedding(config), getattr(config.module, "Block", Block)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(config.width), config.module.Head(config)

    def run_blocks(self, x, which, cache=None):
        for i in which:
            x, kept = self.blocks[i](x, None if cache is None else cache[i])
            if cache is not None:
                cache[i] = kept
        return x

    def lower(self, observation, cache=None):
        """observation [B, T, D] → e_{t,l} [B, T, C]"""
        return self.run_blocks(self.embed(observation), range(self.split), cache)

    def last_residual(self, e, cache=None):
        """e_{t,l} [B, T, C] → normalised e_{t,L} [B, T, C]"""
        return self.norm(self.run_blocks(e, range(self.split, len(self.blocks)), cache))

    def upper(self, e, cache=None):
        """e_{t,l} [B, T, C] → logits of moves [B, T, 4] (ant: mean and ln σ of torques [B, T, 16])"""
        return self.head(self.last_residual(e, cache))

    def forward(self, observation):
        return self.upper(self.lower(observation))

    def residuals(self, observation):
        """observation [B, T, D] → e_{t,0} … e_{t,L}: [L+1, B, T, C]"""
        streams = [self.embed(observation)]
        for i in range(len(self.blocks)):
            streams.append(self.run_blocks(streams[-1], [i]))
        return torch.stack(streams)


def action_loss(config, out, batch):
    """Mean −ln p(a_t | …) over the actions that exist: model output [B, T, …] → scalar, nats per action."""
    return -config.module.log_prob(out[batch.valid], batch.action[batch.valid]).mean()


def pretraining_loss(config, base, batch):
    """Eq. 4-5: −ln p(a_t | o_{1:t}) − λ ln p(o_{t+1} | o_{1:t}), means over steps. → (loss, first part)"""
    last = base.last_residual(base.lower(batch.observation[:, :-1]))
    loss = nll = action_loss(config, base.head(last), batch)
    if config.next_obs > 0:
        loss = loss + config.next_obs * base.head.next_observation_loss(last, batch)
    return loss, nll


@torch.no_grad()
def measure_base(run, base, floor):
    loss, nll = pretraining_loss(run.config, base, run.held_out(run.config.noise))
    return {"eval_loss": loss.item(), "eval_nll": nll.item(), "gap": nll.item() - floor}


def pretrain(run):
    """Stage 1: the base model predicts the expert's actions. Returns it and its gap."""
    config, generator = run.config, run.generator("pretrain")
    torch.manual_seed(config.seed)
    base = Base(config).to(run.device)
    print(f"pretrain: base model with {sum(p.numel() for p in base.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(base.parameters(), weight_decay=config.weight_decay)
    data = ExpertData(run, config.pretrain_batch, config.noise, generator)
    many, held_out = config.module.LOOK["trajectories"], run.evaluation("held-out trajectories")
    floor, _ = config.module.action_floor(config, many, held_out)
    for step in run.steps("pretrain", config.pretrain_steps, generator, optimizer, base=base):
        batch = data.batch(1 - step.progress ** 2)  # at last whole, as they are when the model acts
        # differs from the paper: bfloat16 matrix products (--no-bf16: float32), because they are faster.
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            loss, nll = pretraining_loss(config, base, batch)
        descend(loss, optimizer, learning_rate(config, config.pretrain_lr, step.number, step.count),
                batch.valid.sum())
        step.log(loss=loss, nll=nll)
        if step.due:
            step.log(**measure_base(run, base, floor))
    return base.requires_grad_(False).eval(), measure_base(run, base, floor)["gap"]

# ==================================================================================== Chapter 2 · probe
# You should see the accuracy jump after the first block or two, to about 0.5 (chance: 0.25). The model infers
# which colour the expert is heading for, although nobody tells it.

class Probe(nn.Module):
    """A linear read-out of the subgoal per layer, softmax(W_l e_{t,l})  (Eq. 6-7, which say U_l)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.layers + 1, config.width, gridworld.SUBGOALS))

    def forward(self, residuals):
        """[L+1, n, C] → logits [L+1, n, K]"""
        # differs from the paper: each layer's stream at unit scale, so that one learning rate suits them all.
        return F.layer_norm(residuals, residuals.shape[-1:]) @ self.weight


def train_probe(run, base):
    """Stage 2: in which layer can the hidden subgoal be read linearly? (Fig. 3, A1) Returns the accuracy on
    held-out trajectories, one number a layer, the embedding first."""
    config, generator = run.config, run.generator("probe")
    probe = Probe(config).to(run.device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0)
    data = ExpertData(run, config.discover_batch, 0.0, generator)

    @torch.no_grad()
    def examples(batch):
        """Residuals [L+1, n, C] and hidden subgoals [n] of all steps that exist."""
        return base.residuals(batch.observation[:, :-1])[:, batch.valid], batch.subgoal[batch.valid]

    def accuracy():
        residuals, subgoal = examples(run.held_out())
        return [round(x, 4) for x in (probe(residuals).argmax(-1) == subgoal).float().mean(1).tolist()]

    for step in run.steps("probe", config.probe_steps, generator, optimizer, probe=probe):
        residuals, subgoal = examples(data.batch(1))
        logits = probe(residuals)  # [L+1, n, K]
        loss = F.cross_entropy(logits.flatten(0, 1), subgoal.repeat(len(logits))) * len(logits)
        descend(loss, optimizer, learning_rate(config, config.probe_lr, step.number, step.count),
                len(subgoal))
        step.log(loss=loss)
        if step.due:
            step.log(probe_accuracy=accuracy())
    return accuracy()

# ==================================================================================== Chapter 3 · steer
# You should see success on the post-training task, whose transitions the data never shows: 0 for the model
# alone, about 0.9 when the linear map of the right subgoal is added.

def linear_control(e, w, a, b):
    """ê = e + U e  (Eq. 1, 11, 18), where U = BᵀA/√C with A = Σ_m w_m A_m and B = Σ_m w_m B_m: e [..., C],
    w [..., M], a, b [M, R, C] → [..., C]. M: K one-hot labels, or J+1 units of f_hyp. U is never built."""
    w = w.unsqueeze(-1)  # [..., M, 1]
    each = (e @ a.flatten(0, 1).T).unflatten(-1, a.shape[:2]) / math.sqrt(e.shape[-1])  # [..., M, R]
    read = (w * each).sum(-2, keepdim=True)  # A e/√C: [..., 1, R]
    return e + (w * read).flatten(-2) @ b.flatten(0, 1)


class LabelledControllers(nn.Module):
    """One linear controller per subgoal, chosen by its true label (Eq. 1)."""

    def __init__(self, config):
        super().__init__()
        width, shape = config.width, (gridworld.SUBGOALS, config.rank or config.width, config.width)
        # A full matrix: A = √C·I stays, and U = Bᵀ.
        a = torch.randn(shape) if config.rank else math.sqrt(width) * torch.eye(width).repeat(shape[0], 1, 1)
        self.a, self.b = nn.Parameter(a, requires_grad=config.rank > 0), nn.Parameter(torch.zeros(shape))

    def forward(self, e, subgoal):
        """e [..., C], subgoal [...] index → ê [..., C]"""
        return linear_control(e, F.one_hot(subgoal, len(self.a)).to(e.dtype), self.a, self.b)


@dataclass
class Moment:
    """What an intervention sees of n running games: e_{t,l}, e_{t,0} [n, C], their indices [n], time t; the
    visits so far [n] are for labels only."""
    e: torch.Tensor
    embedding: torch.Tensor
    games: torch.Tensor
    t: int
    visits: torch.Tensor


@torch.no_grad()
def play(config, base, game, generator, intervene=None):
    """The base model acts until all games (B, see gridworld.Game) are over, at temperature 1. → Trajectories.
    What intervene(Moment) returns, ê [n, C], replaces the residual stream after block l."""
    module, device = config.module, generator.device
    games, cache = game.rows, [None] * len(base.blocks)  # games [n]: which still run, at first 0 … B−1
    observation = game.observation().to(device)
    observations, actions = [observation], []
    while len(games):
        embedding = base.embed(observation[games, None])  # [n, 1, C]
        e = base.run_blocks(embedding, range(base.split), cache)
        if intervene is not None:
            visits = game.visits[games].to(device)
            e = intervene(Moment(e[:, 0], embedding[:, 0], games.to(device), len(actions), visits))[:, None]
        drawn = module.sample(base.upper(e, cache)[:, 0], generator)
        action = torch.zeros(len(game.rows), *drawn.shape[1:], dtype=drawn.dtype, device=device)
        action[games] = drawn
        game.step(action.to(game.rows.device))
        observation = observation.clone()
        observation[games] = game.observation(games).to(device)
        actions.append(action)
        observations.append(observation)
        running = (~game.done[games]).nonzero()[:, 0]
        if len(running) < len(games):  # finished games leave the batch
            games, running = games[running], running.to(device)
            cache = [tuple(part[running] for part in kept) for kept in cache]
    return gridworld.Trajectories(torch.stack(observations, 1), torch.stack(actions, 1),
                                  game.steps.to(device), game.success().to(device))


def new_game(config, layouts, task):
    return config.module.Game(layouts, config.size, task, config.max_steps)


def post_task(config):
    return gridworld.parse_task(config.post_task, config.colours)


def solved(run, base, intervene=None):
    """Success on the post-training task in evaluation layouts: [n] 0/1"""
    game = new_game(run.config, run.layouts(run.config.evaluation), post_task(run.config))
    return play(run.config, base, game, run.evaluation("actions"), intervene).success


def with_labels(config, controllers):
    """The intervention that activates labelled controllers in the order of the task, by the visits so far."""
    colours = torch.tensor(post_task(config), device=controllers.b.device)  # [V]
    order = colours // gridworld.SUBGOAL_SIZE[config.subgoals]  # [V] the subgoal that each visit is part of
    return lambda now: controllers(now.e, order[now.visits])


def steer(run, base):
    """Stage 3: controllers trained with the true subgoal (Fig. 4). Returns them."""
    config, generator = run.config, run.generator("steer")
    torch.manual_seed(config.seed)
    controllers = LabelledControllers(config).to(run.device)
    optimizer = torch.optim.AdamW(controllers.parameters(), weight_decay=config.control_decay)
    data = ExpertData(run, config.discover_batch, 0.0, generator)
    for step in run.steps("steer", config.steer_steps, generator, optimizer, controllers=controllers):
        batch = data.batch(1)
        with torch.no_grad():
            e = base.lower(batch.observation[:, :-1])
        loss = action_loss(config, base.upper(controllers(e, batch.subgoal)), batch)
        descend(loss, optimizer, learning_rate(config, config.steer_lr, step.number, step.count),
                batch.valid.sum())
        step.log(loss=loss)
    return controllers

# ================================================================================= Chapter 4 · discover
# You should see gates that open where the hidden subgoal changes, and in the end codes that mean a colour:
# goal_accuracy and held_share high, R² of direction and distance low. Good gates alone prove little.

N_H, N_S, J = 32, 32, 32  # sizes of history h, summary s, hidden layer of f_hyp (Table A9)
# differs from the paper, where it is ½. Gradients pass as if a drawn gate were β, so β rests where 1 − β is the
# price of opening over twice its gain (if the loss is quadratic): at few legs below ½, but each may cost a game.
THRESHOLD = 3 / 8  # a gate is open if its β is above this (in training: above a random number)


def integrate(beta, proposal):
    """Temporal integration (Eq. 2, 17), z_t = β_t z̃_t + (1−β_t) z_{t−1} from z_1 = z̃_1 on, at all steps in
    log₂ T rounds: z_t = z + kept · z_{t−1}, then two such steps in one, four, … [B, T], [B, T, Z] → z"""
    beta = F.pad(beta[:, 1:], (1, 0), value=1)[..., None]
    z, kept, steps = beta * proposal, 1 - beta, 1
    while steps < z.shape[1]:
        z = z + kept * F.pad(z[:, :-steps], (0, 0, steps, 0))
        kept, steps = kept * F.pad(kept[:, :-steps], (0, 0, steps, 0)), 2 * steps
    return z


def kl_to_standard_normal(mu, log_sigma):
    """KL(N(μ, Σ) ‖ N(0, I)) summed over the code's dimensions: [..., Z] → [...]"""
    return 0.5 * (mu ** 2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(-1)


class Hypernetwork(nn.Module):
    """f_hyp: z → U(z) = B(z)ᵀA(z)/√C, where w(z) is J ReLU units of z, and a 1; A(z) = Σ_j w_j read_j and
    B(z) = Σ_j w_j write_j, each [R, C]  (Eq. 11, 18)."""

    def __init__(self, config):
        super().__init__()
        shape = J + 1, config.rank or config.width, config.width
        self.bias, self.units = False, nn.Sequential(nn.Linear(config.n_z, J), nn.ReLU())
        self.read = nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(J))
        # differs from the paper: B starts small, because codes that mean nothing yet disturb the base model;
        # not at 0, as LabelledControllers.b does: no gradient would reach encoder and gate.
        self.write = nn.Parameter(torch.empty(shape).uniform_(-0.2, 0.2) / math.sqrt(J))
        with torch.no_grad():
            self.read[-1].normal_()  # A reads e at unit scale whatever z is, so that B(z) can learn at once

    def forward(self, e, z):
        """ê_t = e_t + U(z_t) e_t: e [..., C], z [..., Z] → [..., C]"""
        # differs from the paper: with rank 0, U is a product of two full matrices, instead of emitted itself.
        w = F.pad(self.units(z), (0, 1), value=1)
        return e + w @ self.write[:, 0] if self.bias else linear_control(e, w, self.read, self.write)


def next_opening(is_open, length):
    """The step after t at which a gate opens next, else `length`, the last: [B, T+1], [B] → [B, T+1]"""
    last = length[:, None].expand_as(is_open)
    opens = torch.where(is_open, torch.arange(is_open.shape[1], device=length.device), last).minimum(last)
    return torch.cat([opens[:, 1:], last[:, :1]], 1).flip(1).cummin(1).values.flip(1)


def backwards(x, length):
    """Each trajectory from its last step to its first: [B, T+1, C], [B] → [B, T+1, C]"""
    t = (length[:, None] - torch.arange(x.shape[1], device=x.device)).clamp(min=0)
    return x.gather(1, t[..., None].expand_as(x))


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


class Gate(nn.Module):
    """β_t = f_switch(e_t, e_{t−1}) of normalised residuals (Eq. 16)"""
    # differs from the paper: the gate sees e_{t−1} instead of h_{t−1} and z_{t−1}. With a memory it learns which
    # colour follows which, and stays shut where another one does; without z it still fits when codes are new.

    def __init__(self, config):
        super().__init__()
        self.forced = float(config.method == "forced")
        self.switch = perceptron(2 * config.width, 1)
        # differs from the paper: gates start almost shut, which favours codes worth holding.
        nn.init.constant_(self.switch[-1].bias, -2)

    def step(self, e, before):
        """e_t, e_{t−1} [..., C] → β_t [...]"""
        return self.switch(torch.cat([e, before], -1))[..., 0].sigmoid().clamp(min=self.forced)

    def forward(self, e):
        """Whole trajectories, e [B, T+1, C] → β [B, T+1]"""
        return F.pad(self.step(e[:, 1:], e[:, :-1]), (1, 0), value=1)  # β_1 = 1


class Metacontroller(nn.Module):
    """Emits, holds and replaces linear controllers of the frozen base model (App. D.2, Fig. 5)."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.norm = nn.LayerNorm(width)  # differs from the paper: all but `hyper` reads a normalised e.
        self.gate, self.hyper = Gate(config), Hypernetwork(config)
        self.history = nn.GRU(width, N_H, batch_first=True)  # Eq. 12
        # differs from the paper: f_emb is a GRU instead of a Hawk stack, because one layer is enough here.
        self.summary = nn.GRU(width, N_S, batch_first=True)  # Eq. 13
        # differs from the paper: the first encoder reads e_t only through h_t.
        self.encoder = perceptron(N_H + N_S, config.n_z if config.code_std > 0 else 2 * config.n_z)
        with torch.no_grad():
            self.encoder[-1].bias[config.n_z:] = -1  # initial ln σ
            self.summary.bias_ih_l0[N_S:2 * N_S] += 2  # differs from the paper: a long memory from the start.
        self.register_buffer("alpha", torch.tensor(config.alpha))

    def forget_codes(self):
        """A new encoder, which reads where a segment ends instead of h and s, and a new f_hyp."""
        self.history = self.summary = None
        self.encoder = perceptron(self.config.width, self.encoder[-1].out_features)
        self.hyper = Hypernetwork(self.config)

    def evidence(self, e, starts, length):
        """What a code is inferred from; arguments as of `encode` → [B, T+1, …]"""
        if self.summary is not None:
            # differs from the paper: s has read o_{T+1}, too.
            s = self.summary(e)[0][torch.arange(len(e), device=e.device), length]  # [B, N_S]
            s = s[:, None].expand(-1, e.shape[1], -1)
            if self.config.per_step:
                s = backwards(self.summary(backwards(e, length))[0], length)  # s_t has read o_{T+1} … o_t
            return torch.cat([self.history(e)[0], s], -1)
        # differs from the paper: a code is inferred from where its segment ends, the observation at which the
        # next gate opens. It shows the goal, on the grid neither the way there nor its length. The ant's e_{t,l}
        # tells some of both, but in mirror images that explains nothing.
        return e.gather(1, next_opening(starts, length)[..., None].expand_as(e))

    def encode(self, e, starts, length):
        """e [B, T+1, C], segments' starts [B, T+1], length [B] → μ, ln σ [B, T+1, Z]"""
        mu, std = self.encoder(self.evidence(e, starts, length)), self.config.code_std
        if std > 0:
            # differs from the paper: in a batch (of each process) μ has mean 0 and spread 1, because a new
            # encoder's codes all point one way. Then all codes get one length and one σ, and look like draws
            # from the prior. So all cost the same, and what is worth its price is worth holding.
            inside = torch.arange(e.shape[1], device=e.device) <= length[:, None]  # not padding
            variance, mean = torch.var_mean(mu[inside], 0, correction=0)
            mu = (mu - mean) / (variance + 1e-5).sqrt()
            mu = F.normalize(mu, dim=-1) * math.sqrt(mu.shape[-1] * (1 - std ** 2))
            return mu, torch.full_like(mu, math.log(std))
        mu, log_sigma = mu.chunk(2, -1)  # Eq. 15
        return mu, log_sigma.clamp(-6, 3)  # differs from the paper: ln σ is kept within −6 … 3.

    def draw_gates(self, beta, generator):
        """β [B, T+1] → open? and gates, through which gradients pass [B, T+1]"""
        draw = torch.rand(beta.shape, generator=generator, device=beta.device) if self.training else THRESHOLD
        is_open = beta > draw
        # differs from the paper: gates are 0 or 1, drawn in training; gradients pass as if they were β.
        return is_open, (is_open.float() + beta - beta.detach() if self.config.code_std > 0 else beta)

    def kl(self, beta, gates, mu, log_sigma):
        """The KL to the prior at each step, of what `forward` returned: [B, T+1]"""
        kl = kl_to_standard_normal(mu, log_sigma)
        # differs from the paper: a proposal that no gate takes is free.
        return kl * gates if self.config.code_std > 0 else kl

    def forward(self, e, length, generator):
        """e [B, T+1, C] of whole trajectories, length [B] → z [B, T+1, Z], β, gates [B, T+1], μ, ln σ as z"""
        e = self.norm(e)
        beta = self.gate(e)
        is_open, gates = self.draw_gates(beta, generator)
        mu, log_sigma = self.encode(e, is_open, length)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        proposal = mu + log_sigma.exp() * noise  # Eq. 14
        return integrate(gates, proposal), beta, gates, mu, log_sigma


def meta_input(config, base, observation):
    """Read by the metacontroller: observation [B, T, D] → e_{t,l} (read_embedding: e_{t,0}) [B, T, C]"""
    # differs from the paper: on the grid e_{t,0}, where the gate sees its cell. The ant's gate, which must tell
    # a new cell from the same one, needs e_{t,l}: block 1 has read the last steps.
    return base.embed(observation) if config.read_embedding else base.lower(observation)


def discovery_loss(config, base, meta, batch, generator, mirror=False):
    """Eq. 3, 9: −ln p(a_t | o_{1:t}, z_{1:t}) + α KL, means over the steps that have an action. Of a frozen
    base model only the upper blocks pass gradients back. → (loss, nll, KL, β [B, T+1])"""
    # differs from the paper: codes may be decoded in a mirror image of their world: "go up" explains nothing.
    image = mirrored(config, batch, generator) if mirror else batch
    with torch.autocast(generator.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        e = meta_input(config, base, batch.observation).float()
        e_image = base.lower(image.observation)[:, :-1].float()
    z, *rest = meta(e, batch.length, generator)
    with torch.autocast(e.device.type, dtype=torch.bfloat16, enabled=config.bf16):
        nll = action_loss(config, base.upper(meta.hyper(e_image, z[:, :-1])), image)
    kl = meta.kl(*rest)[:, :-1][batch.valid].mean()
    return nll + meta.alpha * kl, nll, kl, rest[0]


def hold_rate(alpha, kl, rate, pace):
    """After each step α rises where codes carry more than `rate` nats a cell, else falls: at most by 2% · pace."""
    # differs from the paper: α follows a rate. Below it codes are almost free, so they cannot die out before
    # they mean anything; above it their price rises, so they cannot be sent again at every step. All cost the
    # same, so the rate limits how often gates open, and they open where a leg begins. α slows down with the learning
    # rate: when the ant's many steps within cells come, gates hardly learn any more, and it would shut them.
    alpha.mul_((0.02 * pace * (kl.detach() / rate - 1).clamp(-1, 1)).exp()).clamp_(1e-3, 2)


def learn_gates(run, base, meta, count):
    """When to switch: all of the metacontroller learns (and a base model in training mode, see
    `discover_by`); codes mean directions as yet."""
    config, generator = run.config, run.generator("gates")
    learners = nn.ModuleDict({"meta": meta.train()} | ({"base": base} if base.training else {}))
    optimizer = torch.optim.AdamW(learners.parameters(), weight_decay=config.control_decay)
    data = ExpertData(run, config.discover_batch, 0.0, generator)
    for step in run.steps("gates", count, generator, optimizer, reports=4, **learners):
        batch = data.batch((1 - step.progress ** 3) / 2)
        loss, nll, kl, beta = discovery_loss(config, base, meta, batch, own(generator))
        lr = learning_rate(config, config.discover_lr, step.number, step.count)
        descend(loss, optimizer, lr, batch.valid.sum())
        if config.rate > 0:
            steps_a_cell = batch.valid.sum() / config.module.entries(batch, config.size).sum()
            nats = everyones((kl * steps_a_cell)[None]).mean()
            hold_rate(meta.alpha, nats, config.rate, lr / config.discover_lr)
        step.log(loss=loss, nll=nll, kl=kl, alpha=meta.alpha.clone(),
                 beta=beta[:, 1:-1][batch.valid[:, 1:]].mean())
        if step.due:
            step.log(**inspect_gates(run, base, meta))
    meta.requires_grad_(False).eval()


def learn_codes(run, base, meta):
    """What to send: encoder and f_hyp start anew, the gate rests."""
    config, generator = run.config, run.generator("codes")
    torch.manual_seed(config.seed)
    meta.forget_codes()
    meta.hyper.bias = config.bias
    optimizer = torch.optim.AdamW(meta.to(run.device).parameters(), weight_decay=config.control_decay)
    data = ExpertData(run, config.discover_batch, 0.0, generator)
    for step in run.steps("codes", config.code_steps, generator, optimizer, reports=3, meta=meta):
        batch = data.batch(1)
        _, nll, kl, beta = discovery_loss(config, base, meta, batch, own(generator), config.mirror)
        descend(nll, optimizer, learning_rate(config, config.discover_lr, step.number, step.count),
                batch.valid.sum())
        step.log(loss=nll, kl=kl, beta=beta[:, 1:-1][batch.valid[:, 1:]].mean())
        if step.due:
            step.log(**inspect_codes(run, base, meta)[0])
    meta.requires_grad_(False)


def discover(run, base, kind=Metacontroller, more_steps=0):
    """Stage 4: when to switch, then what to send (Fig. 5, 6). Returns the metacontroller.
    (`kind`, `more_steps` of the first part, and a base model that learns, too: for rivals only.)"""
    # differs from the paper, which learns both at once. There "two up, one left" is as good a code as "to the
    # red one", and comes first; gates come out right all the same. By these gates codes learn anew, from an
    # input and in a world (see `evidence`, `discovery_loss`) where only goals help.
    config = run.config
    torch.manual_seed(config.seed)
    meta = kind(config).to(run.device)
    print(f"gates: metacontroller with {sum(p.numel() for p in meta.parameters()):,} parameters", flush=True)
    learn_gates(run, base, meta, config.gate_steps + more_steps)
    base.requires_grad_(False).eval()
    if config.code_steps > 0:
        learn_codes(run, base, meta)
    return meta

# ============================================================================== Chapter 5 · internal RL
# You should see `success` leave zero after 6 to 25 thousand episodes; untuned, the baseline's stays there.

class CodeIntervention:
    """The metacontroller while acting (Algorithm 1): gates are hard; where they open, choose(e [m, C], games)
    → z [m, Z] is asked, for these m games. With `hold` the first code stays for the whole episode."""

    def __init__(self, config, meta, choose, batch, hold=False):
        self.config, self.meta, self.choose, self.hold, device = config, meta, choose, hold, meta.alpha.device
        self.before = torch.zeros(batch, config.width, device=device)  # what the gate saw last
        self.z = torch.zeros(batch, config.n_z, device=device)
        self.trace = []  # (games, β, open) of every step

    def __call__(self, now):
        x = self.meta.norm(now.embedding if self.config.read_embedding else now.e)
        beta, self.before[now.games] = self.meta.gate.step(x, self.before[now.games]), x  # Eq. 16
        is_open = (beta > THRESHOLD) & (not self.hold) | (now.t == 0)  # β_1 = 1
        at = is_open.nonzero()[:, 0]
        if len(at):
            self.z[now.games[at]] = self.choose(now.e[at], now.games[at])
        self.trace.append((now.games, beta, is_open))
        return self.meta.hyper(now.e, self.z[now.games])  # Eq. 11


class Policy(nn.Module):
    """π(z | e at the switches so far): Gaussian, its mean from a recurrent layer whose state advances only
    when it acts (App. D.3)."""

    def __init__(self, config):
        super().__init__()
        # differs from the paper: a GRU instead of a Hawk layer, and it reads the normalised residual.
        self.norm, self.embed = nn.LayerNorm(config.width), nn.Linear(config.width, config.width)
        self.memory = nn.GRU(config.width, config.width, batch_first=True)
        self.mean = nn.Linear(config.width, config.n_z)
        nn.init.normal_(self.mean.weight, std=0.01)
        nn.init.zeros_(self.mean.bias)
        self.register_buffer("success", torch.zeros(()))  # averaged over recent updates

    def forward(self, e, memory=None):
        """e [B, S, C] residuals at the switches → (mean [B, S, Z], memory [1, B, C])"""
        out, memory = self.memory(F.relu(self.embed(self.norm(e))), memory)
        return self.mean(out), memory

    def replay(self, e, count):
        """Means of whole episodes with count [B] switches: `forward` without work on padding → [B, S, Z]"""
        x = F.relu(self.embed(self.norm(e)))
        packed = nn.utils.rnn.pack_padded_sequence(x, count.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = self.memory(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        return self.mean(out)


def gaussian_log_prob(z, mean, std):
    """ln N(z; mean, std² I), summed over the code's dimensions: [..., Z] → [...]"""
    return (-0.5 * ((z - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


class PolicyActor:
    """Lets the policy choose codes, and writes down e [B, max_steps, C], its means and choices z [B, max_steps,
    Z], of which the first count [B] are filled."""

    def __init__(self, config, policy, batch, std, generator):
        self.policy, self.std, self.generator, device = policy, std, generator, generator.device
        self.memory = torch.zeros(1, batch, config.width, device=device)
        self.e = torch.zeros(batch, config.max_steps, config.width, device=device)
        self.z = torch.zeros(batch, config.max_steps, config.n_z, device=device)
        self.mean = torch.zeros(batch, config.max_steps, config.n_z, device=device)
        self.count = torch.zeros(batch, dtype=torch.long, device=device)

    def __call__(self, e, games):
        mean, self.memory[:, games] = self.policy(e[:, None], self.memory[:, games].contiguous())
        mean, slot = mean[:, 0], self.count[games]
        z = mean + self.std * torch.randn(mean.shape, generator=self.generator, device=mean.device)
        self.e[games, slot], self.z[games, slot], self.mean[games, slot] = e, z, mean
        self.count[games] += 1
        return z


def advantages(success):
    """(R − mean R) / (std R + 1e-3) over the batch, the same at every switch (App. C.5): [B] → [B]"""
    return (success - success.mean()) / (success.std(correction=0) + 1e-3)


def clipped_surrogate(log_prob, old_log_prob, advantage, mask, clip=0.5):
    """PPO's clipped objective summed over an episode's steps (Eq. 10), as a loss: [B, S], [B] → scalar"""
    # The text gives no value; this one exceeds the usual 0.2, so that a rare reward may move π farther.
    ratio, advantage = (log_prob - old_log_prob).exp(), advantage[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * mask).sum(1).mean()


def minibatches(success, generator):
    """The episodes' rows, shuffled, in four parts, three times over; none if every advantage is 0."""
    # differs from the paper: several passes, in minibatches, over each batch of episodes.
    if success.std(correction=0) > 0:
        for _ in range(3):
            shuffled = torch.randperm(len(success) // WORLD_SIZE, generator=generator, device=success.device)
            yield from shuffled.tensor_split(4)


def layout_pool(run, generator):
    """A function that draws an update's layouts."""
    # differs from the paper: from a fixed pool of 16 batches; the paper's are new in every episode.
    n = run.config.rl_batch
    pool = draw_layouts(run.config, 16 * n, generator)
    rows = lambda: mine(torch.randint(16 * n, (n,), generator=generator, device=run.device))
    return lambda: pool[rows().to(pool.agent.device)]


def internal_rl(run, base, meta):
    """Stage 5: a policy over codes is reinforced; all else is its environment (Algorithms 1-3, Fig. 8)."""
    config, task, generator = run.config, post_task(run.config), run.generator("rl")
    torch.manual_seed(config.seed)
    layouts = layout_pool(run, generator)
    policy = Policy(config).to(run.device)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0)
    updates = math.ceil(config.rl_episodes / config.rl_batch)
    needed = len(task) / gridworld.SUBGOAL_SIZE[config.subgoals]  # codes that solve an episode
    for step in run.steps("rl", updates, generator, optimizer, unit=1, reports=50, policy=policy):
        # differs from the paper: the policy's std (E.2: fixed) and learning rate (3e-5) fall as the success
        # of a single code rises, so codes vary like the prior's until they earn rewards.
        std = config.std_start + (config.std_end - config.std_start) * policy.success.item() ** (1 / needed)
        boards, draws = layouts(), own(generator)
        actor = PolicyActor(config, policy, len(boards), std, draws)
        intervention = CodeIntervention(config, meta, actor, len(boards))
        success = everyones(play(config, base, new_game(config, boards, task), draws, intervention).success)
        policy.success.lerp_(success.mean(), 0.1)
        switches, advantage, loss = int(actor.count.max()), mine(advantages(success)), 0.0
        e, z, mean = (x[:, :switches] for x in (actor.e, actor.z, actor.mean))  # [B, S, …]
        mask = torch.arange(switches, device=e.device) < actor.count[:, None]
        old_log_prob = gaussian_log_prob(z, mean, std)
        for rows in minibatches(success, generator):
            log_prob = gaussian_log_prob(z[rows], policy.replay(e[rows], actor.count[rows]), std)
            loss = clipped_surrogate(log_prob, old_log_prob[rows], advantage[rows], mask[rows])
            descend(loss, optimizer, config.rl_lr * std)
        step.log(method="internal", episodes=(step.number + 1) * config.rl_batch, loss=loss,
                 success=success.mean(), switches=actor.count.float().mean())
    return policy.requires_grad_(False).eval()


def raw_rl(run, base):
    """The baseline: the same update on the base model's own actions, all of θ trained (App. C.5.3)."""
    config, task, generator = run.config, post_task(run.config), run.generator("raw")
    layouts, log_prob_of = layout_pool(run, generator), config.module.log_prob
    torch.manual_seed(config.seed)
    model = (Base(config).to(run.device) if config.scratch else copy.deepcopy(base)).requires_grad_(True)
    model.head.heat(config.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    updates = math.ceil(config.rl_episodes / config.rl_batch)
    for step in run.steps("raw", updates, generator, optimizer, unit=1, reports=50, model=model):
        episodes = play(config, model, new_game(config, layouts(), task), own(generator))
        loss, old, success = 0.0, None, everyones(episodes.success)
        advantage, mask, action = mine(advantages(success)), episodes.valid, episodes.action
        for rows in minibatches(success, generator):
            if old is None:  # once a batch, before its first update; never if no game was solved
                with torch.no_grad():
                    old = log_prob_of(model(episodes.observation[:, :-1]), action)  # [B, T]
            log_prob = log_prob_of(model(episodes.observation[rows, :-1]), action[rows])
            loss = clipped_surrogate(log_prob, old[rows], advantage[rows], mask[rows])
            descend(loss, optimizer, config.raw_lr)
        step.log(method="raw", episodes=(step.number + 1) * config.rl_batch, loss=loss,
                 success=success.mean(), length=episodes.length.float().mean())
    return model.requires_grad_(False).eval()

# ═══════════════════════════ Nothing below is needed to understand the method ═══════════════════════════

# ==================================================================================== Several processes
# torchrun --nproc-per-node=N internal_rl.py …: with one seed, N processes share every batch. All draw the
# same random numbers, keep their own rows, and average gradients. With more seeds they share the seeds.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


def mine(batch):
    """This process's rows of a tensor or of Trajectories; the last one where there are fewer than processes."""
    count = len(batch if torch.is_tensor(batch) else batch.length)
    rows = slice(min(RANK, count - 1), None, WORLD_SIZE)
    return batch[rows] if torch.is_tensor(batch) else batch.pick(rows)


def everyones(rows):
    """The rows of all processes, as many of each, in their order: [B / WORLD_SIZE, …] → [B, …]"""
    parts = [rows.detach().clone() for _ in range(WORLD_SIZE)]
    if WORLD_SIZE > 1:
        distributed.all_gather(parts, parts[RANK])
    return torch.stack(parts, 1).flatten(0, 1)


def leave(status=0):
    """Ends all processes together: torch 2.13's gloo aborts some orderly ends."""
    if WORLD_SIZE == 1:
        raise SystemExit(status)
    everyones(torch.zeros(1))
    sys.stdout.flush()
    os._exit(status)


def own(generator):
    """For draws that are different in every process. Alone: the generator itself."""
    if WORLD_SIZE == 1:
        return generator
    seed = torch.randint(2 ** 40, (), generator=generator, device=generator.device).item()
    return torch.Generator(generator.device).manual_seed(seed + RANK)


def average_gradients(parameters, count):
    """The mean over all processes, weighed by `count`."""
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = nn.utils.parameters_to_vector(gradients)
        flat = torch.cat([flat, flat.new_ones(1)]) * count
        distributed.all_reduce(flat)
        nn.utils.vector_to_parameters(flat[:-1] / flat[-1], gradients)


def deal_seeds(seeds, arguments, together):
    """Each process runs its share of the seeds, one after another, as commands of their own, whose output
    goes to TOGETHER-sSEED.log. → did any fail, of all processes?"""
    threads = max(1, os.cpu_count() // LOCAL_SIZE)
    alone = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(threads)}
    failed, Run.in_stage = torch.zeros(len(seeds)), True
    for i in range(RANK, len(seeds), WORLD_SIZE):
        folder = f"{together}-s{seeds[i]}"
        command = [sys.executable, __file__, *arguments, f"--seeds={seeds[i]}", f"--out={folder}"]
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "a") as log:
            failed[i] = subprocess.run(command, env=alone, stdout=log, stderr=log).returncode
        print(f"seed {seeds[i]}: status {int(failed[i])}, see {folder}.log", file=sys.stderr, flush=True)
        if Run.stop is not None:  # torchrun's signal reaches workers, too
            break
    return everyones(failed).any().item()

# ========================================================================================== Checkpoints

STAGES = {  # name → all the stages that it builds on, or shares settings with
    "pretrain": [], "probe": ["pretrain"], "steer": ["pretrain"],
    "gates": ["pretrain"], "codes": ["pretrain", "gates"],
    "rl": ["pretrain", "gates", "codes"], "raw": ["pretrain"]}
EVALUATION_SEEDS = {name: seed for seed, name in enumerate((  # training's seeds are 10,000 and above
    "held-out trajectories", "layouts", "actions", "proposals", "codes", "find layouts", "score layouts",
    "bar codes", "bar plays", "film layouts", "film plays", "gate trajectories", "gate proposals", "search",
    "pairs"), start=101)}


def refuse(message, status=2):
    """Ends the process with one line on stderr. Exit status 2: bad input; 1: training went wrong."""
    if RANK == 0 or status != 2:
        print(f"internal_rl.py: {message}", file=sys.stderr)
    raise SystemExit(status)


class Step:
    """Training step `number` of `count` (whole rounds, so the last may exceed it); `due` ends a reported round."""

    def __init__(self, number, count, due, metrics):
        self.number, self.count, self.due, self.metrics = number, count, due, metrics
        self.progress = min(1, number / count)

    def log(self, **metrics):
        """Floats and tensors are averaged over the round; of everything else the last one counts."""
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self.metrics.setdefault(name, []).append(value)


def as_json(content, **how):
    """As text; nan, which JSON does not have, becomes null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda nan: None), **how)


def write_file(path, content):
    """Writes bytes, or anything else as JSON, so that the file is never half-written. (One process does.)"""
    if RANK > 0 or Run.dry:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (as_json(content, indent=1) + "\n").encode()
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Run:
    """One run's folder, device and settings: config.json, metrics.jsonl, a checkpoint a stage, figures."""
    stop, in_stage = None, False  # the signal that asked all runs to stop; is there something to save first?
    dry = False  # only print what stages will cost

    def __init__(self, config, folder, device, data="data"):
        self.config, self.folder, self.device, self.data = config, Path(folder), device, Path(data)
        self.changes = {}  # of a variation: the settings in which it differs from the run of this folder
        self.lines, self.fingerprints = {}, {}  # of each stage: its curves; of a finished one: its weights
        self.few = min(config.module.LOOK["layouts"], max(1, config.evaluation // 32))  # layouts for one code
        processes = f"{WORLD_SIZE} processes of " if WORLD_SIZE > 1 else ""
        self.made_with = f"torch {torch.__version__}, {processes}{torch.get_num_threads()} threads"

    def vary(self, **changes):
        """The same run with other settings. It shares the stages that they do not touch."""
        changes = {name: x for name, x in changes.items() if x != getattr(self.config, name)}
        other = Run(replace(self.config, **changes), self.folder, self.device, self.data) if changes else self
        other.changes = changes
        return other

    def lock(self):
        """Keeps other processes out of the folder until this one ends (not on Windows)."""
        if RANK > 0 or Run.dry:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locked = open(self.folder / ".lock", "w")
        try:
            if fcntl is not None:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            refuse(f"another process is at work in {self.folder}")

    def generator(self, stage):
        """Draws of a stage's training data and noise."""
        seed = 10_000 * (self.config.seed + 1) + list(STAGES).index(stage)
        return torch.Generator(self.device).manual_seed(seed)

    def evaluation(self, purpose):
        """A generator that is the same in every run, and that no training uses."""
        return torch.Generator(self.device).manual_seed(EVALUATION_SEEDS[purpose])

    def layouts(self, n, purpose="layouts"):
        return draw_layouts(self.config, n, self.evaluation(purpose))

    @functools.cache
    def held_out(self, noise=0.0):
        """Expert trajectories that no stage trains on."""
        module, generator = self.config.module, self.evaluation("held-out trajectories")
        return module.expert_batch(self.config, module.LOOK["trajectories"], generator, noise)

    def steps(self, stage, count, *state, **more):
        """`every_step`; the third prints what all will cost, and ends the stage with --dry-run."""
        batch = dict(pretrain="pretrain_batch", rl="rl_batch", raw="rl_batch").get(stage, "discover_batch")
        for i, step in enumerate(self.every_step(stage, count, *state, **more)):
            with FlopCounterMode(display=False) if i == 0 else contextlib.nullcontext() as counter:
                yield step
            if i == 0:
                flops, started = counter.get_total_flops() * WORLD_SIZE, time.time()
            if i == 2:
                left = (time.time() - started) / 2 * (count - step.number)
                kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0  # on Linux
                memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 1024 * kib
                print(f"{stage}: {count:,} steps of {getattr(self.config, batch):,} episodes, "
                      f"{flops / 1e9:.3g} GFLOP each; at this speed about {left / 60:.1f} minutes, "
                      f"until {time.ctime(time.time() + left)}; memory {memory / 2**30:.1f} GiB", flush=True)
                if self.dry:
                    return

    def every_step(self, stage, count, generator, optimizer, unit=ROUND, reports=12, **modules):
        """Yields a stage's training steps, from where it stopped; none if it is finished.

        The modules, the optimizer and the generator are all of its state. It is saved, and a stop is obeyed,
        between rounds of `unit` steps, so that a resumed stage does exactly what it would have done.
        """
        unit = min(unit, count)
        rounds, saved, done, before, lines = math.ceil(count / unit), self.load(stage), 0, 0.0, []
        if len(everyones(torch.tensor([saved["steps"] if saved else 0])).unique()) > 1:
            refuse(f"{self.path(stage)}: processes find different checkpoints, but must share --out")
        if saved is not None:
            for name, module in modules.items():
                module.load_state_dict(saved["modules"][name])
            done, before, lines = saved["steps"] // unit, saved["seconds"], saved["lines"]
            other = "" if saved["made_with"] == self.made_with else f" (made with {saved['made_with']})"
            if done == rounds:
                self.log(stage, lines)
                print(f"{stage}: finished before, reused{other}", flush=True)
                return
            if saved["device"] != self.device.type:
                refuse(f"{self.path(stage)} was begun on {saved['device']}: go on there or change --out")
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            print(f"{stage}: resumed after {done * unit} of {rounds * unit} steps{other}", flush=True)
        self.log(stage, lines)  # what was written after the checkpoint will be written again
        started = last_save = time.time()
        while done < rounds:
            metrics, last = {}, done + 1 == rounds
            due = last or (done + 1) % max(1, rounds // reports) == 0
            for i in range(unit):
                yield Step(done * unit + i, count, due and i == unit - 1, metrics)
                Run.in_stage = not self.dry  # only now: the first step may make data, with nothing to save
            done += 1
            spent = before + time.time() - started
            for name, values in metrics.items():
                averaged = isinstance(values[-1], (float, torch.Tensor))
                metrics[name] = float(sum(values) / len(values)) if averaged else values[-1]
            states = {name: module.state_dict() for name, module in modules.items()}
            watched = {name: x for name, x in metrics.items() if "loss" in name or name in ("nll", "kl")}
            for name, x in [*watched.items(), *(pair for state in states.values() for pair in state.items())]:
                if not torch.as_tensor(x).isfinite().all():
                    kept = self.path(stage) if self.path(stage).exists() else "none yet"
                    refuse(f"{stage}: {name} is not finite at step {done * unit}; last good checkpoint: "
                           f"{kept}", 1)
            if due:
                lines.append({"stage": stage, "step": done * unit, "time_s": round(spent, 2), **metrics})
                self.log(stage, lines)
            signalled = int(everyones(torch.tensor([self.stop or 0])).max())  # read once: it may change
            if signalled or last or time.time() - last_save > 60:
                more = {} if last else dict(optimizer=optimizer.state_dict(), generator=generator.get_state())
                self.save(stage, steps=done * unit, seconds=spent, lines=lines, device=self.device.type,
                          modules=states, **more)
                last_save = time.time()
            if due:
                shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
                print(f"{stage} {done * unit}/{rounds * unit}", *shown,
                      f"| {spent:.0f} s, {spent / done * (rounds - done):.0f} s to go", flush=True)
            if signalled:
                print(f"\nstopped in {stage} after step {done * unit} of {rounds * unit}; saved "
                      f"{self.path(stage)}. The same command goes on from there.")
                leave(128 + signalled)
        Run.in_stage = False
        everyones(torch.zeros(1))  # all wait until the first process has saved
        self.load(stage)

    def path(self, stage):
        """A stage's checkpoint; in a variation, in a folder named after the changes that touch the stage."""
        touch = {s.name for s in fields(self.config) if s.metadata["stages"] & {stage, *STAGES[stage]}}
        changes = [f"{name}={value}" for name, value in sorted(self.changes.items()) if name in touch]
        return self.folder / ",".join(changes) / f"{stage}.pt"

    def save(self, stage, **content):
        file, parents = io.BytesIO(), {name: self.fingerprints.get(name) for name in STAGES[stage]}
        torch.save(dict(content, stage=stage, config=asdict(self.config), parents=parents,
                        made_with=self.made_with), file)
        write_file(self.path(stage), file.getvalue())

    def load(self, stage):
        """The checkpoint of `stage`, or None. Refuses a damaged one and one of other settings or parents."""
        path = self.path(stage)
        if not path.exists():
            return None
        try:
            file = zipfile.ZipFile(path)
            saved = None if file.testzip() else torch.load(path, map_location="cpu", weights_only=True)
            theirs, its_stage = saved["config"], saved["stage"]
        except Exception as error:  # torch raises many kinds for a damaged file
            why = str(error).partition("\n")[0] or type(error).__name__
            refuse(f"{path} cannot be read ({why}); if it is damaged, delete it to train this stage again")
        for s in fields(self.config):
            its, mine = theirs.get(s.name), getattr(self.config, s.name)
            if s.metadata["stages"] & {stage, *STAGES[stage]} and its != mine:
                refuse(f"{path} was made with {s.name}={its}, not {mine}; choose another --out or delete it")
        if its_stage != stage:
            refuse(f"{path} is a checkpoint of {its_stage}; delete it to train this stage again")
        for name, its in saved["parents"].items():
            if self.fingerprints.get(name, its) != its:
                refuse(f"{path} was made on another {name}.pt; delete it to train this stage again")
        self.lines[stage] = saved["lines"]
        if "optimizer" not in saved:  # it is finished
            self.fingerprints[stage] = [entry.CRC for entry in file.infolist() if "/data/" in entry.filename]
        return saved

    def metrics(self):
        return [line for stage in STAGES for line in self.lines.get(stage, [])]

    def log(self, stage, lines):
        """Writes metrics.jsonl, with these lines of `stage`. Those of a variation stay in its checkpoints."""
        self.lines[stage] = lines
        if not self.changes:
            text = "".join(as_json(line) + "\n" for line in self.metrics())
            write_file(self.folder / "metrics.jsonl", text.encode())

# ======================================================================================= Looking inside

def gate_scores(beta, batch, tolerance):
    """Precision and recall of open gates against true changes of subgoal, ± `tolerance` steps; the first step
    opens by construction and does not count. β [B, T+1] → two numbers, nan if there is nothing to score."""
    valid = batch.valid[:, 1:]
    true = (batch.subgoal[:, 1:] != batch.subgoal[:, :-1]) & valid
    opened = (beta[:, 1:-1] > THRESHOLD) & valid
    near = lambda x: F.max_pool1d(x[:, None].float(), 2 * tolerance + 1, 1, tolerance)[:, 0] > 0
    hits, found = opened & near(true), true & near(opened)
    return (hits.sum() / opened.sum()).item(), (found.sum() / true.sum()).item()


def trivial_gates(run):
    """The scores of two gates that anybody could build: always open; open on every coloured cell."""
    batch, result = run.held_out(), {}
    places = run.config.module.places(batch.observation, run.config.size)
    coloured = (places[..., :run.config.colours] == places[..., -1:]).any(-1)  # [B, T+1]
    for name, gate in (("coloured", coloured), ("always", torch.ones_like(coloured))):
        result[f"{name}_precision"], result[f"{name}_recall"] = gate_scores(gate, batch, run.config.tolerance)
    return result


def explained_variance(x, y):
    """R² of a linear read-out of y [n, D] from x [n, Z], fitted on half of the rows, scored on the other."""
    x, y = torch.cat([x, torch.ones_like(x[:, :1])], 1).cpu().double(), y.cpu().double()
    half = len(x) // 2
    residual = y[half:] - x[half:] @ torch.linalg.lstsq(x[:half], y[:half]).solution
    return round(1 - (residual.var(0).sum() / y[half:].var(0).sum()).item(), 4)  # more digits vary


def code_scores(config, mu, beta, batch):
    """What do the codes at open gates mean? Share of subgoals that a nearest-centroid read-out of μ gets
    right (chance 1/K), R² of a linear one of displacement and distance to the subgoal's first colour."""
    opened, size = (beta[:, :-1] > THRESHOLD) & batch.valid, config.size
    codes, goals = mu[:, :-1][opened], batch.subgoal[opened]
    half = len(codes) // 2
    centroids = torch.stack([codes[:half][goals[:half] == k].mean(0) for k in range(gridworld.SUBGOALS)])
    accuracy = (torch.cdist(codes[half:], centroids).argmin(1) == goals[half:]).float().mean().item()
    places = config.module.places(batch.observation[:, :-1], size)[opened]  # [n, N+1]
    target = places.gather(1, goals[:, None] * gridworld.SUBGOAL_SIZE[config.subgoals])[:, 0]
    rows, columns = target // size - places[:, -1] // size, target % size - places[:, -1] % size
    offset = torch.stack([rows, columns], -1).float()
    return {"goal_accuracy": accuracy, "r2_direction": explained_variance(codes, offset),
            "r2_distance": explained_variance(codes, offset.abs().sum(-1, keepdim=True))}


def held_codes(run, base, meta, codes, layouts, generator):
    """Which colour does each of codes [n, Z] reach first, held for a whole episode in each of the layouts?
    → counts [n, O+1], the last column for episodes that reach none."""
    config, each = run.config, codes.repeat_interleave(len(layouts), 0)
    game = new_game(config, layouts[torch.arange(len(layouts)).repeat(len(codes))], [0])  # one visit ends it
    held = CodeIntervention(config, meta, lambda e, games: each[games], len(each), hold=True)
    play(config, base, game, generator, held)
    first = game.first.view(len(codes), -1) % (config.colours + 1)  # −1, none, becomes O
    return F.one_hot(first, config.colours + 1).sum(1)


def held_share(run, base, meta):
    """How often does a random code, held, reach its favourite colour first? The favourite is found in half of
    the layouts and scored in the others. Needs no hidden label: visits can be seen."""
    generator, n = run.evaluation("codes"), run.few
    codes = torch.randn(32, run.config.n_z, generator=generator, device=run.device)
    find, score = (held_codes(run, base, meta, codes, run.layouts(n, purpose), generator)
                   for purpose in ("find layouts", "score layouts"))
    favourite = find[:, :-1].argmax(1)
    share = score.gather(1, favourite[:, None])[:, 0] / score.sum(1)
    return {"held_share": share.mean().item(), "held_colours": len(favourite.unique())}


def one_code_each(run, base, meta):
    """A code per subgoal, found by playing: a cross-entropy search for codes that, held, attain it. Needs no
    hidden label either. → [K, Z]"""
    config, generator, n, count = run.config, run.evaluation("search"), run.few, gridworld.SUBGOALS
    layouts = run.layouts(n, "find layouts")[torch.arange(n).repeat(count * 32)]  # K·32·n games
    tasks = torch.arange(count * gridworld.SUBGOAL_SIZE[config.subgoals]).view(count, -1)  # [K, visits]
    mean, std = torch.zeros(count, 1, config.n_z, device=run.device), 1.0
    for _ in range(4):
        noise = torch.randn(count, 32, config.n_z, generator=generator, device=run.device)
        codes = mean + std * noise  # [K, 32, Z]
        each = codes.flatten(0, 1).repeat_interleave(n, 0)  # [K·32·n, Z]
        game = new_game(config, layouts, tasks.repeat_interleave(32 * n, 0).to(layouts.agent.device))
        held = CodeIntervention(config, meta, lambda e, games: each[games], len(each), hold=True)
        attained = play(config, base, game, generator, held).success.view(count, 32, n).sum(2)  # [K, 32]
        best = codes.gather(1, attained.topk(6).indices[..., None].expand(-1, -1, config.n_z))
        mean, std = best.mean(1, keepdim=True), best.std(1, keepdim=True) + 0.1
    return mean[:, 0]


def composition(run, base, control):
    """The composition matrix: P(subgoal b is reached next | a just was), each control(e, subgoal) → ê held
    until its subgoal is reached. → [K+1, K]: a row for the start, one for each a (nan at b = a)."""
    config, count, size = run.config, gridworld.SUBGOALS, gridworld.SUBGOAL_SIZE[run.config.subgoals]
    layouts = run.layouts(3 * run.few, "score layouts")
    pairs = torch.tensor([(a, b) for a in range(count) for b in range(count) if a != b])
    order = pairs.repeat_interleave(len(layouts), 0).to(run.device)  # [K·(K−1)·n, 2]
    tasks = (order.cpu()[..., None] * size + torch.arange(size)).flatten(1).to(layouts.agent.device)
    game = new_game(config, layouts[torch.arange(len(layouts)).repeat(len(pairs))], tasks)
    intervene = lambda now: control(now.e, order[now.games, (now.visits // size).clamp(max=1)])
    success = play(config, base, game, run.evaluation("pairs"), intervene).success
    first = (game.visits >= size).view(len(pairs), -1).float().sum(1).cpu()
    matrix = torch.full((count + 1, count), math.nan)
    matrix[0] = first.view(count, -1).mean(1) / len(layouts)
    matrix[pairs[:, 0] + 1, pairs[:, 1]] = success.view(len(pairs), -1).sum(1).cpu() / first
    return matrix


def composition_scores(config, matrix):
    """Means over the transitions that the data shows and over those it withholds, from a to a + 1 modulo K:
    there, control must overrule the base model. `product`: of the cells along the post-training task, about
    what a policy with one code a subgoal can reach, if gates open where they should."""
    size = gridworld.SUBGOAL_SIZE[config.subgoals]
    order = [colour // size for colour in post_task(config)[::size]]
    product = matrix[0, order[0]] * math.prod(matrix[a + 1, b] for a, b in zip(order, order[1:]))
    withheld = matrix[1:].roll(-1, 1).diagonal()
    shown = torch.cat([matrix[1:].roll(-k, 1).diagonal() for k in range(2, len(withheld))])
    return {"shown": shown.nanmean().item(), "withheld": withheld.nanmean().item(), "product": product.item()}


@torch.no_grad()
def inspect_gates(run, base, meta):
    """Gates and codes on held-out trajectories: precision, recall, and what codes mean."""
    config, batch, training = run.config, run.held_out(), meta.training
    e = meta_input(config, base, batch.observation)
    _, beta, _, mu, _ = meta.eval()(e, batch.length, run.evaluation("proposals"))
    meta.train(training)
    precision, recall = gate_scores(beta, batch, config.tolerance)
    return {"gate_precision": precision, "gate_recall": recall, **code_scores(config, mu, beta, batch)}


@torch.no_grad()
def inspect_codes(run, base, meta):
    """`inspect_gates`, and what codes do when held. → (numbers, composition matrix of one code a subgoal)"""
    codes = one_code_each(run, base, meta)
    matrix = composition(run, base, lambda e, subgoal: meta.hyper(e, codes[subgoal]))
    return {**inspect_gates(run, base, meta), **held_share(run, base, meta),
            **composition_scores(run.config, matrix)}, matrix

# ============================================================================================== Figures

def plotting():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def figures(run, base, meta, policy, result):
    """All pictures of one run, from the trained modules, its numbers and the curves in metrics.jsonl."""
    plt, accuracy = plotting(), result["probe"]
    config, module, palette = run.config, run.config.module, gridworld.PALETTE / 255

    def finish(name):
        plt.tight_layout()
        plt.savefig(run.folder / name, dpi=110)
        plt.close()

    # Gates over subgoals (Fig. A3)
    batch = module.expert_batch(config, 24, run.evaluation("gate trajectories"))
    with torch.no_grad():
        e = meta_input(config, base, batch.observation)
        beta = meta(e, batch.length, run.evaluation("gate proposals"))[1]
    _, axes = plt.subplots(6, 1, figsize=(8, 6), sharex=True)
    for axis, steps, subgoal, gate in zip(axes, batch.length.tolist(), batch.subgoal.tolist(), beta.cpu()):
        for t in range(steps):
            axis.axvspan(t - 0.5, t + 0.5, color=palette[subgoal[t]], alpha=0.35, lw=0)
        axis.step(range(steps), gate[:steps], where="mid", color="black")
        axis.set(ylim=(-0.05, 1.05), yticks=[0, 1], ylabel="β")
    axes[0].set_title("Switch gate β over the expert's hidden subgoal (background colour)")
    axes[-1].set_xlabel("step")
    finish("gates.png")

    # Probe (Fig. 3, A1)
    _, axis = plt.subplots(figsize=(5, 3))
    axis.plot(accuracy, "o-", color="black")
    if "probe_ceiling" in result:
        axis.axhline(result["probe_ceiling"], color=palette[0], label="best possible, on average")
        axis.legend()
    axis.axvline(base.split, ls=":", color="gray")
    axis.set(xticks=range(len(accuracy)), xlabel="layer l (dotted: control layer)", ylabel="probe's accuracy")
    finish("probe.png")

    # Success (Fig. 8, A5)
    _, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for method, name, colour in (("internal", "internal", palette[1]), ("raw", module.RAW, palette[0])):
        lines = [line for line in run.metrics() if line.get("method") == method]
        episodes = [line["episodes"] / 1000 for line in lines]
        success = np.array([line["success"] for line in lines])
        axes[0].plot(episodes, success, color=colour, label=f"{name} RL")
        axes[1].semilogy(episodes, success.clip(min=0.5 / config.rl_batch), color=colour)
    for axis in axes:
        axis.axhline(result["steer_success"], ls="--", color="gray", label="labelled controllers")
    axes[0].set(xlabel="thousand episodes", ylabel=f"success on {config.post_task}", ylim=(-0.02, 1.02))
    expert = result["expert_success"] or 1.0  # if it solves nothing: plain success
    ratio = lambda y: y / expert, lambda y: y * expert
    axes[0].secondary_yaxis("right", functions=ratio, ylabel="divided by the expert's")
    axes[1].set(xlabel="thousand episodes", title=f"log scale (floor: half an episode in {config.rl_batch})")
    axes[0].legend()
    finish("success.png")

    # What held codes reach
    codes = torch.randn(32, config.n_z, generator=run.evaluation("bar codes"), device=run.device)
    layouts = run.layouts(2 * run.few)
    reached = held_codes(run, base, meta, codes, layouts, run.evaluation("bar plays")).cpu() / len(layouts)
    reached = reached[(reached[:, :-1].argmax(1) - reached[:, :-1].max(1).values).argsort()].numpy()
    _, axis = plt.subplots(figsize=(8, 3))
    for k in range(config.colours + 1):
        shade, label = (palette[k], f"colour {k}") if k < config.colours else ("lightgray", "none")
        axis.bar(range(32), reached[:, k], bottom=reached[:, :k].sum(1), color=shade, width=0.9, label=label)
    axis.set(xlabel="random code z ~ N(0, I), held for a whole episode", ylabel="first colour reached")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=config.colours + 1, frameon=False)
    finish("codes.png")

    # Composition matrices; what the data never shows is framed
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for axis, name in zip(axes, ("labels", "codes")):
        cells = np.array(result[f"matrix_{name}"], dtype=float)
        axis.imshow(cells, vmin=0, vmax=1, cmap="Greens")
        for (a, b), cell in np.ndenumerate(cells):
            if not math.isnan(cell):
                shade = "white" if cell > 0.6 else "black"
                axis.text(b, a, f"{cell:.2f}", ha="center", va="center", color=shade)
            if a and b == a % len(cells[0]):
                axis.add_patch(plt.Rectangle((b - 0.5, a - 0.5), 1, 1, fill=False, color=palette[0], lw=2))
        axis.set(title=f"by {name}", xlabel="next", xticks=range(len(cells[0])), yticks=range(len(cells)),
                 yticklabels=["start", *range(len(cells[0]))], ylabel="just reached")
    finish("matrix.png")

    # A shortest solved episode, if there is one
    game = new_game(config, run.layouts(64, "film layouts"), post_task(config))
    intervention = with_policy(run, meta, policy, 64)
    episodes = play(config, base, game, run.evaluation("film plays"), intervention).to("cpu")
    best = int((episodes.success * 1000 - episodes.length).argmax())
    steps = int(episodes.length[best])
    opened = [bool(is_open[games == best][0]) for games, _, is_open in intervention.trace[:steps]]
    titles = [f"{t}: code {sum(opened[:t + 1])}" + " (new)" * opened[t] for t in range(steps)]
    frame = lambda t: module.picture(episodes.observation[best, t], config.size, config.colours)
    gridworld.film(frame, [*titles, "end"], [*opened, False], run.folder / "episode", *module.LOOK["film"])
    print(f"figures: gates, probe, success, codes, matrix, episode in {run.folder}", flush=True)

# ============================================================================================ Benchmark

def bench(run):
    """Time of a discovery step and a cached acting step (64 trajectories of 32 steps on the paper's grid, 4
    blocks of 128), and of a million steps of the batched environment (8,192 games of 5×5), on one thread."""
    torch.set_num_threads(1)
    config = configure("gridworld", "quick", size=7, colours=8, walls=4, view="absolute")
    generator, device = run.evaluation("held-out trajectories"), run.device
    integers = lambda below, *shape: torch.randint(below, shape, generator=generator, device=device)
    base, meta = Base(config).to(device).requires_grad_(False), Metacontroller(config).to(device)
    optimizer, games = torch.optim.AdamW(meta.parameters()), torch.arange(64, device=device)
    batch = gridworld.Trajectories(integers(49, 64, 33, 13), integers(4, 64, 32), 0 * games + 32, None)
    game = gridworld.Game(gridworld.draw_layouts(8192, 5, 4, 1, generator), 5, [0, 1, 2, 3], 60)
    actions = integers(4, 100, 8192)

    def discovery_step():
        descend(discovery_loss(config, base, meta, batch, generator)[0], optimizer, 1e-3)

    @torch.no_grad()
    def acting_steps():
        choose = lambda e, games: torch.randn(len(games), config.n_z, generator=generator, device=device)
        intervene, cache = CodeIntervention(config, meta, choose, 64), [None] * config.layers
        for t in range(32):
            e = base.lower(batch.observation[:, t:t + 1], cache)[:, 0]
            base.upper(intervene(Moment(e, e, games, t, None))[:, None], cache).softmax(-1)

    def environment_steps():
        for action in actions:
            game.step(action)
            game.reset(game.done)

    for name, work, scale in (("discovery step, ms", discovery_step, 1e3),
                              ("acting step, ms", acting_steps, 1e3 / 32),
                              ("a million environment steps, s", environment_steps, 1 / 0.8192)):
        seconds = []
        for _ in range(6):  # the first warms up
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        print(f"bench: grid, {name} {scale * sorted(seconds[1:])[2]:.3f}")

# ========================================================================================= Comparisons
# --figure NAME. Rivals (Fig. 8, C.4-5): raw: PPO on moves. forced: a code every step. cotrain: base model and
# metacontroller from scratch, together. compile: CompILE. With code_steps 0 gates and codes are learned at
# once, as in the paper; else codes are learned anew. baselines (Fig. 8), controls: success over episodes; rate
# (Fig. 7): KL over NLL; depth, pretraining (Fig. 3, 4, A1, A2): labelled controllers; discovery: parts left
# out, rivals with codes learned anew; variance (E.2): the first policy gradient, where base models know the way.

MOST, SEGMENT = 4, 4  # CompILE: segments of a trajectory at most; their mean length in its prior


class CompILE(Metacontroller):
    """A rival (App. C.4.3, as far as the text goes): relaxed switches with a prior, at most MOST segments, a
    code inferred from a recurrent encoder's states where a segment begins and ends; θ learns, too."""
    # differs from the paper: the encoder is a GRU (there: blocks like the base model's), it reads e_{t,0}, an
    # affine map of the raw observation; codes have one length and σ; one α for both KL terms; SEGMENT (there
    # 10) is about the length of a leg, as it is there; where a segment ends passes no gradient.

    def draw_gates(self, beta, generator):
        uniform = torch.rand(beta.shape, generator=generator, device=beta.device)
        noise = uniform.logit(eps=1e-6) if self.training else 0
        gates = ((beta.logit(eps=1e-6) + noise) / 0.5).sigmoid()  # Gumbel-softmax of two, temperature 0.5
        gates = gates * (MOST - gates.cumsum(1) + gates).clamp(0, 1)
        return gates > THRESHOLD, gates

    def evidence(self, e, starts, length):
        h, _ = self.history(e)
        return torch.cat([h, h.gather(1, next_opening(starts, length)[..., None].expand_as(h))], -1)

    def kl(self, beta, gates, mu, log_sigma):
        p = beta[:, 1:].clamp(1e-6, 1 - 1e-6)  # β_1 = 1 is no choice
        switches = p * (p * SEGMENT).log() + (1 - p) * ((1 - p) / (1 - 1 / SEGMENT)).log()
        return super().kl(beta, gates, mu, log_sigma) + F.pad(switches, (1, 0))

    def forget_codes(self):
        super().forget_codes()
        self.__class__ = Metacontroller  # with new codes it learns on as ours does


def discover_by(run, base):
    """Stage 4 by `--method` → (base model, metacontroller). forced: every gate is open (C.4.1). cotrain: θ
    and φ learn together from random weights (C.4.2). compile: CompILE, which starts from the pretrained θ."""
    config, scratch = run.config, run.config.method == "cotrain"
    if config.method not in ("cotrain", "compile"):
        return base, discover(run, base)
    torch.manual_seed(config.seed)
    # differs from the paper: from scratch on the ant, too (there from the pretrained θ).
    base = (Base(config).to(run.device) if scratch else copy.deepcopy(base)).requires_grad_(True).train()
    kind, more_steps = (Metacontroller, config.pretrain_steps) if scratch else (CompILE, 0)
    return base, discover(run, base, kind, more_steps)


def mixed_up(run, base, meta, policy):
    """Success with something else in place of the policy's codes. (Dealt among the games that choose at the
    same step, which often want the same one: no zero is to be expected.)"""
    draws, result = run.evaluation("bar codes"), {}
    dealt = lambda z: z[torch.randperm(len(z), generator=draws, device=z.device)]
    prior = lambda z: torch.randn(z.shape, generator=draws, device=z.device)
    for name, change in dict(dealt_codes=dealt, prior_codes=prior, zero_codes=torch.zeros_like).items():
        intervention = with_policy(run, meta, policy, run.config.evaluation)
        intervention.choose = lambda *now, actor=intervention.choose: change(actor(*now))
        result[name] = solved(run, base, intervention).mean().item()
    return result


def gradient_noise(run):
    """How noisy is the policy gradient where RL starts, on tasks of 1, 2, … visits whose transitions the base
    model knows? → noise: variance of an episode's gradient, mean over parameters (of other networks, so
    compare how it grows); episodes_needed: until the variance of their mean is the squared gradient. Lists,
    a number a task; nan if fewer than ten episodes are solved, or more are needed than were played."""
    config, generator, tokens = run.config, run.evaluation("codes"), run.config.method == "raw"
    n, size, result = 4 * config.rl_batch, gridworld.SUBGOAL_SIZE[config.subgoals], {}
    task = [subgoal * size + i for subgoal in (0, 2, 0, 2, 0) for i in range(size)]  # A C A C A
    base, meta = (pretrain(run)[0], None) if tokens else discover_by(run, pretrain(run)[0])
    torch.manual_seed(config.seed)
    learner = base.requires_grad_(True) if tokens else Policy(config).to(run.device)
    for visits in range(1, len(task) + 1):
        actor = None if tokens else PolicyActor(config, learner, n, config.std_start, generator)
        intervene = None if tokens else CodeIntervention(config, meta, actor, n)
        played = play(config, base, new_game(config, run.layouts(n), task[:visits]), generator, intervene)
        gradients, advantage = [], advantages(played.success)
        for rows in torch.arange(n, device=run.device).tensor_split(min(n, 64)):
            if tokens:
                log_prob = config.module.log_prob(base(played.observation[rows, :-1]), played.action[rows])
                mask = played.valid[rows]
            else:
                mean = learner.replay(actor.e[rows], actor.count[rows])
                log_prob = gaussian_log_prob(actor.z[rows], mean, config.std_start)
                mask = torch.arange(config.max_steps, device=run.device) < actor.count[rows, None]
            gain = ((log_prob * mask).sum(1) * advantage[rows]).mean()
            each = torch.autograd.grad(gain, list(learner.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in each if g is not None]))
        gradients = torch.stack(gradients)  # [64, parameters]
        variance = gradients.var(0) * n / len(gradients)  # of one episode's
        squared = gradients.mean(0).square().sum() - variance.sum() / n  # without bias
        known, needed = played.success.sum() >= 10, (variance.sum() / squared).item()
        needed = needed if known and 0 < needed < n else math.nan
        result.setdefault("noise", []).append(variance.mean().item() if known else math.nan)
        result.setdefault("episodes_needed", []).append(needed)
    return result


def draw_curves(plt, config, results):
    """Success, median and quartiles, over episodes and over minutes, those of all stages before included."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="row", sharey="col")
    print(f"\n{'':60}{'first':>9}{'final':>9}{'thousand episodes to .5':>26}   (medians)")
    for (label, seeds), colour in zip(results.items(), ["black", *plt.get_cmap("tab20").colors]):
        curves = [[(line["episodes"] / 1000, result["minutes_before"] + line["time_s"] / 60, line["success"])
                   for line in result["curve"]] for result in seeds.values()]
        episodes, minutes, success = np.array(curves).transpose(2, 0, 1)  # each [seeds, reports]
        half = [next((k for k, x in zip(*curve) if x >= 0.5), math.inf) for curve in zip(episodes, success)]
        final = [result.get("internal_success", result.get("raw_success")) for result in seeds.values()]
        print(f"{label:60}{np.median(success[:, 0]):9.4f}{np.median(final):9.4f}{np.median(half):26.0f}")
        low, middle, high = np.quantile(success, (0.25, 0.5, 0.75), axis=0).clip(0.5 / config.rl_batch)
        for row, x, name in zip(axes, (episodes, minutes), ("thousand episodes", "minutes")):
            for axis, scale in zip(row, ("linear", "log")):
                axis.plot(np.median(x, 0), middle, color=colour, label=label)
                axis.fill_between(np.median(x, 0), low, high, color=colour, alpha=0.2)
                axis.set(xlabel=name, ylabel=f"success on {config.post_task}", yscale=scale)
    axes[0, 0].legend(fontsize=6)
    return figure


def draw_rate(plt, config, results):
    """KL over NLL, filled where gates are aligned with subgoals (precision and recall, ±0, at least 0.9)."""
    figure, axis = plt.subplots(figsize=(7, 5))
    for label, seeds in results.items():
        colour = "C1" if "cotrain" in label else "C0"
        for result in seeds.values():
            last, aligned = result["gates"], min(result["gate_precision"], result["gate_recall"]) >= 0.9
            axis.plot(last["nll"], last["kl"], "o", color=colour, mfc=colour if aligned else "none")
            axis.annotate(label.split("alpha ")[-1], (last["nll"], last["kl"]), fontsize=6)
    axis.set(xlabel="−ln p of the expert's move, nats", ylabel="KL, nats a step", yscale="log")
    return figure


def draw_numbers(plt, results, names):
    """A column for each of these numbers: a dot a seed, a bar at the median. Of lists: a line, the median."""
    median = lambda x: np.ma.filled(np.ma.median(np.ma.masked_invalid(x), 0), np.nan)  # of what is known
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names) + 1, 2 + 0.25 * len(results)))
    for axis, name in zip(axes, names):
        axis.set(xlabel=name.replace("_", " "))
        for row, (label, seeds) in enumerate(results.items()):
            values = np.array([result.get(name) for result in seeds.values()], float)  # [seeds] or [seeds, x]
            if values.ndim == 2:
                x = np.arange(values.shape[1]) + (name != "probe")
                axis.plot(x, median(values), "o-", label=label)
                axis.set(yscale="linear" if name == "probe" else "log", ylabel=name,
                         xlabel="layer l" if name == "probe" else "visits of the task")
                axis.legend(fontsize=6)
            else:
                axis.plot(values, row + 0.1 * (np.arange(len(values)) - len(values) // 2), "o", alpha=0.7)
                axis.plot(median(values), row, "|", color="black", ms=14)
                axis.set_yticks(range(len(results)), results if axis is axes[0] else [""] * len(results))
                axis.set_ylim(len(results) - 0.5, -0.5)
    return figure


def grid(**settings):
    """Variations: every combination of these values of settings."""
    return [dict(zip(settings, values)) for values in itertools.product(*settings.values())]


AT_ONCE = dict(gate_steps=[5600], code_steps=[0])  # gates and codes at once, in as many steps as ours
FIGURES = {  # name: what to see, parts of `run_stages`, varied settings, how to draw or which numbers
    "baselines": ("Internal RL and its rivals, as many episodes each", "discover rl",
        [{}, *grid(method=["internal", "forced"], **AT_ONCE), *grid(method=["cotrain"], code_steps=[0]),
         *grid(method=["compile"], rate=[0.0], alpha=[0.03], **AT_ONCE), dict(method="raw")], draw_curves),
    "controls": ("What a sceptic would try instead", "discover rl",
        [{}, *grid(method=["raw"], temperature=[1.0, 2.0, 3.0, 5.0], raw_lr=[1e-4, 1e-3]),
         *grid(method=["raw"], scratch=[True], raw_lr=[1e-4, 3e-4, 1e-3]), dict(method="forced"),
         dict(bias=True)], draw_curves),
    "rate": ("Rate and distortion in gates, by α (orange: cotrain; filled: open at new subgoals)", "discover",
        grid(pretrain_steps=[2400], code_steps=[0], rate=[0.0], method=["internal", "cotrain"],
             alpha=[0.02, 0.06, 0.2]), draw_rate),
    "depth": ("Where the subgoal can be read, and where control must act", "probe steer",
        [*grid(control_layer=[1, 2, 3, 4]), *grid(layers=[2], control_layer=[1, 2]),
         *grid(pretrain_steps=[1200, 2400, 4800])], ("steer_success", "labels_withheld", "probe")),
    "pretraining": ("Which base model can be steered", "steer discover",
        [{}, *grid(pretrain_steps=[2400, 19200]), *grid(weight_decay=[0.0, 0.3]), *grid(next_obs=[0.0, 0.1]),
         *grid(noise=[0.1, 0.2])], ("gap", "steer_success", "labels_withheld", "withheld")),
    "discovery": ("What each choice in discovery buys, and rivals with codes learned anew", "discover rl",
        [{}, *grid(**AT_ONCE), dict(mirror=False), dict(read_embedding=False), dict(per_step=True),
         dict(rate=0.0, alpha=0.06), dict(method="cotrain"),
         dict(method="compile", rate=0.0, alpha=0.03)],
        ("gate_precision", "gate_recall", "withheld", "product", "internal_success")),
    "variance": ("On known transitions: how much the gradient varies, and how many episodes it needs", "noise",
        [{}, *grid(method=["forced", "raw"])], ("noise", "episodes_needed"))}
MINUTES = dict(  # of a stage of the quick preset, one thread of a slow Xeon; raw: ten times that if rewarded
    pretrain=9, probe=0.5, steer=1, gates=3.75, codes=4.3, rl=3.5, raw=2)


def stages_of(config, parts):
    """The stages that these parts need, in their order."""
    if config.method == "raw":
        return ["pretrain"] if parts == "noise" else ["pretrain", "raw"]
    discovery = "gates" + " codes" * (config.code_steps > 0)
    return ["pretrain", *re.sub("discover|noise", discovery, parts).split()]


def compare(runs, name, together):
    """One of FIGURES over the seeds of all runs, whose finished stages are used. Prints what it will cost,
    writes TOGETHER-NAME.json with all numbers and TOGETHER-NAME.png."""
    text, parts, variations, draw = FIGURES[name]
    varied, cost = [(changes, run.vary(**changes)) for run in runs for changes in variations], {}
    for _, run in varied:
        for stage in stages_of(run.config, parts):
            setting, saved = stage.rstrip("s") + "_steps", run.load(stage)
            count, usual = (getattr(c, setting, c.rl_episodes) for c in (run.config, Settings))
            if stage == "gates" and run.config.method == "cotrain":
                count = 1.5 * (count + run.config.pretrain_steps)  # a step of all of θ, too, takes longer
            cost[run.path(stage)] = MINUTES[stage] * count / usual * (not saved or "optimizer" in saved)
    print(f"figure {name}: {len(variations)} variations of {len(runs)} seeds, about "
          f"{sum(cost.values()):.0f} minutes on one thread of a slow Xeon, in the quick preset", flush=True)
    results = {}
    for changes, run in varied:
        label = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as it is"
        label = re.sub(r"(gate_steps \d+, )?code_steps 0", "at once", label)
        print(f"\n{name}, seed {run.config.seed}: {label}", flush=True)
        result = gradient_noise(run) if parts == "noise" else run_stages(run, parts.split())
        *before, last = stages_of(run.config, parts)
        before = before[1:] if run.config.method == "cotrain" else before  # it learned its θ in gates
        result |= dict(curve=run.lines[last], gates=run.lines.get("gates", [None])[-1],
                       minutes_before=sum(run.lines[stage][-1]["time_s"] for stage in before) / 60)
        results.setdefault(label, {})[run.config.seed] = result
    write_file(Path(f"{together}-{name}.json"), results)
    plt, config = plotting(), runs[0].config
    figure = draw(plt, config, results) if callable(draw) else draw_numbers(plt, results, draw)
    figure.suptitle(f"{text} (seeds {', '.join(map(str, next(iter(results.values()))))})", fontsize=9)
    figure.tight_layout()
    figure.savefig(f"{together}-{name}.png", dpi=110)
    plt.close(figure)
    print(f"\nwritten to {together}-{name}.json and {together}-{name}.png", flush=True)

# ========================================================================================= Command line

SOLVED = 0.6  # a seed counts as solved if internal RL reaches this success
COMPARED = ("base_success", "raw_success", "internal_success", "steer_success")  # shown as dots, one a seed
WORLD = ("SETTINGS PRESETS RAW LOOK EXPECT SYMMETRIES check draw_layouts Game expert_paths expert_batch "
         "source thinned entries action_floor random_success mirror places picture Embedding Head log_prob "
         "sample").split()
TABLE = {  # name in result.json → what it is
    "gap": "base model above the best possible predictor, nats per action",
    "probe_best": "linear probe of the hidden subgoal, best layer",
    "probe_ceiling": "the best possible read-out of it (Bayes posterior)",
    "random_success": "uniformly random moves on {post_task}, exactly",
    "expert_success": "the expert on {post_task}, without noise",
    "base_success": "base model alone on {post_task}",
    "steer_success": "labelled controllers on {post_task}",
    "labels_withheld": "labelled controllers: b next after a, withheld transitions",
    "gate_precision": "gate precision, ±{tolerance} steps",
    "gate_recall": "gate recall, ±{tolerance} steps",
    "coloured_precision": "precision of a gate that opens on every coloured cell",
    "coloured_recall": "recall of that",
    "always_precision": "precision of a gate that is always open",
    "goal_accuracy": "subgoal read from the code by nearest centroid",
    "held_share": "one held random code reaches the same colour (chance 1/O)",
    "shown": "one code a subgoal: b next after a, transitions of the data",
    "withheld": "one code a subgoal: b next after a, withheld transitions",
    "product": "one code a subgoal: product of the cells along {post_task}",
    "internal_success": "internal RL, success on held-out layouts",
    "switches_solved": "codes chosen in an episode that it solves",
    "dealt_codes": "the same codes, dealt to other games that choose at the same step",
    "prior_codes": "codes from N(0, I) instead",
    "zero_codes": "the code 0 instead",
    "raw_success": "RL on the model's own actions, success on held-out layouts",
    "raw_cold": "the same, almost without noise (temperature 0.1)",
    "seconds": "seconds of all stages"}


@functools.cache
def load_world(name):
    """The module NAME.py or NAME_tasks.py beside this file. A third world is one new file with the names in
    WORLD, as gridworld.py has them; it may also have its own Block."""
    found = [file for file in (name, f"{name}_tasks") if (Path(__file__).parent / f"{file}.py").is_file()]
    if not (name.isidentifier() and found):
        refuse(f"--task {name}: there is no {name}.py or {name}_tasks.py beside internal_rl.py")
    module = importlib.import_module(found[0])
    lacking = [name for name in WORLD if not hasattr(module, name)]
    if "quick" not in getattr(module, "PRESETS", ()):
        lacking.append("a preset named quick")
    if lacking:
        refuse(f"--task {name}: {found[0]}.py is no world, it lacks {', '.join(lacking)}")
    return module


def configure(world, preset, **changes):
    """The settings of a preset, with some changed; SETTINGS of the world are added to the class Settings."""
    module = load_world(world)
    own = [(name, type(s[0]), setting(s[0], "pretrain", *s[1:])) for name, s in module.SETTINGS.items()]
    settings = make_dataclass("Settings", own, bases=(Settings,))
    return settings(**{"world": world, **module.PRESETS[preset], **changes})


def with_policy(run, meta, policy, batch):
    """The intervention by the policy's mean codes."""
    actor = PolicyActor(run.config, policy, batch, 0.0, run.evaluation("codes"))
    return CodeIntervention(run.config, meta, actor, batch)


def without_learning(run):
    """How often the expert solves the post-training task, and random moves, if the world knows."""
    config, layouts, moves = run.config, run.layouts(run.config.evaluation), run.evaluation("actions")
    tasks = torch.tensor([post_task(config)] * len(layouts), device=layouts.agent.device)
    expert = config.module.expert_paths(layouts, config.size, tasks, config.max_steps, moves).success
    chance = config.module.random_success(config, layouts)
    return {"expert_success": expert.mean().item()} | (
        {} if chance is None else {"random_success": chance.mean().item()})


PARTS = {"pretrain": "", "probe": "probe", "steer": "steer", "discover": "discover", "rl": "discover rl raw",
         "raw": "raw", "all": "probe steer discover rl raw"}  # --stage → the parts of `run_stages`


def run_stages(run, parts):
    """Runs these parts of an experiment (see PARTS) → the numbers of TABLE it got to, and a few more."""
    result, config = {}, run.config
    if config.method == "raw" and "rl" in parts:
        parts = ["raw"]
    base, result["gap"] = pretrain(run)
    if "probe" in parts:
        result["probe"] = train_probe(run, base)
        result["probe_best"] = max(result["probe"])
        _, ceiling = config.module.action_floor(config, config.module.LOOK["trajectories"],
                                                run.evaluation("held-out trajectories"))
        if ceiling is not None:
            result["probe_ceiling"] = ceiling
    if "steer" in parts:
        controllers = steer(run, base)
        result["steer_success"] = solved(run, base, with_labels(config, controllers)).mean().item()
        matrix = composition(run, base, controllers)
        result.update(matrix_labels=np.round(matrix.tolist(), 3).tolist(),
                      labels_withheld=composition_scores(config, matrix)["withheld"])
        result["base_success"] = solved(run, base).mean().item()
        result |= without_learning(run)
        print(f"steer: success on {config.post_task}: base alone {result['base_success']:.4f}, "
              f"with labelled controllers {result['steer_success']:.4f}", flush=True)
    if "discover" in parts:
        controlled, meta = discover_by(run, base)
        scores, matrix = inspect_codes(run, controlled, meta)
        result.update(scores, **trivial_gates(run), matrix_codes=np.round(matrix.tolist(), 3).tolist())
    if "rl" in parts:
        policy = internal_rl(run, controlled, meta)
        intervention = with_policy(run, meta, policy, config.evaluation)
        success = solved(run, controlled, intervention)
        result["internal_success"] = success.mean().item()
        if success.any():
            result["switches_solved"] = intervention.choose.count[success > 0].float().mean().item()
        result |= mixed_up(run, controlled, meta, policy)
    if "raw" in parts:
        model = raw_rl(run, base)
        result["raw_success"] = solved(run, model).mean().item()
        model.head.heat(0.1)
        result["raw_cold"] = solved(run, model).mean().item()
    for name, text in ("internal_success", "internal"), ("raw_success", config.module.RAW):
        if name in result:
            print(f"rl: success on held-out layouts: {text} {result[name]:.4f}", flush=True)
    if parts == PARTS["all"].split():
        result["seconds"] = round(sum(saved["seconds"] for saved in map(run.load, STAGES) if saved), 1)
        if RANK == 0:
            figures(run, controlled, meta, policy, result)
    return result


def dry_run(run):
    """Three steps of every stage of training, from what finished stages have left."""
    base, _ = pretrain(run)
    if run.config.method != "raw":
        train_probe(run, base)
        steer(run, base)
        internal_rl(run, *discover_by(run, base))
    raw_rl(run, base)


def print_table(config, results):
    """One column a seed, then the median and what to expect. A row that no seed measured is left out."""
    seeds = "".join(f"{f'seed {seed}':>10}" for seed in results)
    print(f"\n{'':62}{seeds}{'median':>10}   expect (quick)")
    for name, text in TABLE.items():
        values = np.array([result.get(name) for result in results.values()], float)  # nan: nothing to measure
        if not np.isnan(values).all():
            print(f"{text.format(**asdict(config)):62}" + "".join(f"{v:10.4g}" for v in values)
                  + f"{np.nanmedian(values):10.4g}   {config.module.EXPECT.get(name, '')}")


def binomial_interval(hits, n):
    """Exact 95% interval of a probability (Clopper, Pearson), after `hits` of n → (low, high)"""
    at_least = lambda k, p: sum(math.comb(n, i) * p ** i * (1 - p) ** (n - i) for i in range(k, n + 1))
    p = np.linspace(0, 1, 10_001)
    return (p[at_least(hits, p) >= 0.025].min() if hits else 0.0,
            p[at_least(hits + 1, p) <= 0.975].max() if hits < n else 1.0)


def compare_seeds(config, results, together):
    """Of several seeds: every one as a dot in TOGETHER-seeds.png, and how many reach SOLVED."""
    plt = plotting()
    figure, axis = plt.subplots(figsize=(8, 3.2))
    rows = ("base model alone", f"{config.module.RAW} RL", "internal RL", "labelled controllers")
    for row, name in enumerate(COMPARED):
        values = sorted(result[name] for result in results.values())
        axis.plot(values, row + 0.06 * np.arange(len(values)) - 0.03 * len(values), "o", alpha=0.7)
    axis.axvline(SOLVED, ls=":", color="gray")
    axis.set(yticks=range(len(rows)), yticklabels=rows, xlim=(-0.02, 1.02),
             xlabel=f"success on {config.post_task}, one dot a seed")
    plt.tight_layout()
    plt.savefig(f"{together}-seeds.png", dpi=110)
    values = [result["internal_success"] for result in results.values()]
    hits = sum(value >= SOLVED for value in values)
    low, high = binomial_interval(hits, len(values))
    print(f"\ninternal RL reaches {SOLVED} on {hits} of {len(values)} seeds (exact 95% interval {low:.3f} to "
          f"{high:.3f}); median {np.median(values):.3f}, worst {min(values):.3f}")


def parse_arguments(arguments):
    """Command line → (argparse namespace, Settings). Every setting is a flag; flags override the preset."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.error = refuse
    task.add_argument("--task", default="gridworld", metavar="WORLD",
                      help="gridworld (the default), ant, or a world of your own: the name of its file")
    world = task.parse_known_args(arguments)[0].task
    quick = configure(world, "quick")
    parser = argparse.ArgumentParser("internal_rl.py", allow_abbrev=False, parents=[task], description=(
        f"Internal RL, all stages. In brackets: the quick preset of {world}."))
    parser.error = refuse
    parser.add_argument("--preset", choices=list(quick.module.PRESETS), default="quick",
                        help="named settings: tiny (a minute), quick (default), pairs (grid, an hour), "
                             "paper (a large GPU, days)")
    parser.add_argument("--stage", default="all", choices=[*PARTS, "table", "bench"],
                        help="what to run, after what it builds on; table: only compare seeds that are "
                             "finished; bench: speed")
    parser.add_argument("--figure", choices=[*FIGURES, "all"],
                        help="compare variations of the settings (made for the quick preset), see FIGURES")
    parser.add_argument("--seeds", metavar="0,1,2", help="several seeds one after another (overrides --seed)")
    parser.add_argument("--dry-run", action="store_true", help="three steps of each stage of training: what "
                        "would it cost? Writes nothing")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where")
    parser.add_argument("--out", metavar="FOLDER", help="run folder (runs/TASK-PRESET-sSEED); with --seeds, "
                        "-sSEED is added")
    parser.add_argument("--data", default="data", metavar="FOLDER", help="where expert trajectories are kept")
    for s in fields(quick)[1:]:
        kind = dict(action=argparse.BooleanOptionalAction) if s.type is bool else dict(
            type=s.type, choices=s.metadata["choices"])
        parser.add_argument("--" + s.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{s.metadata['help']} ({getattr(quick, s.name)})", **kind)
    options = parser.parse_args(arguments)
    changes = {s.name: getattr(options, s.name) for s in fields(quick)[1:] if hasattr(options, s.name)}
    return options, configure(world, options.preset, **changes)


def check(config):
    """Refuses settings that cannot work, in one line."""
    for s in fields(config):
        low, high, value = s.metadata["low"], s.metadata["high"], getattr(config, s.name)
        if low is not None and not low <= value <= high:
            refuse(f"{s.name} {value} is outside {low} … {high}")
    if config.width % config.heads or config.rank > config.width:
        refuse(f"width {config.width} is not a multiple of heads {config.heads}, or below rank {config.rank}")
    if config.code_std == 0 < config.code_steps:
        refuse("code_std 0 needs code_steps 0: codes that have no fixed length must have a price")
    if config.layers % 2 or config.control_layer > config.layers:
        refuse(f"layers {config.layers} is odd, or below control_layer {config.control_layer}")
    try:
        config.module.check(config)
    except ValueError as error:
        refuse(error)


def stop(number, frame):
    """SIGINT and SIGTERM end a stage after its present round; a second one, or between stages: at once."""
    if Run.stop is not None or not Run.in_stage:
        os._exit(128 + number)  # an exception could be lost in a library
    Run.stop = number


def main(arguments):
    Run.stop, Run.in_stage = None, False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    options, config = parse_arguments(arguments)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [config.seed]
    except ValueError:
        seeds = []
    if len(seeds) != len(set(seeds)) or not seeds:
        refuse(f"--seeds {options.seeds!r} is not a list of different whole numbers such as 0,1,2")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = max(found, key=found.get) if options.device == "auto" else options.device
    if not found[device]:
        refuse(f"--device {device}: torch finds no such device here")
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(LOCAL_RANK % torch.cuda.device_count())
    device, runs, results = torch.device(device), [], {}
    names = list(FIGURES) if options.figure == "all" else [options.figure] if options.figure else []
    together = str(Path(options.out or f"runs/{options.task}-{options.preset}"))
    for seed in seeds:
        check(own := replace(config, seed=seed))
        for changes in (changes for name in names for changes in FIGURES[name][2]):
            check(replace(own, **changes))
        folder = together if options.out and len(seeds) == 1 else f"{together}-s{seed}"
        runs.append(Run(own, folder, device, options.data))
    if names and (options.stage != "all" or config.method != "internal"):
        refuse("--figure chooses --stage and --method itself")
    if options.dry_run and (names or len(seeds) > 1 or options.stage != "all"):
        refuse("--dry-run is for all stages of one seed")
    Run.dry = options.dry_run
    if WORLD_SIZE > 1:
        if names or options.stage in ("bench", "table"):
            refuse("torchrun: --figure, table and bench are for one process")
        if len(seeds) == 1 and (config.rl_batch % WORLD_SIZE or 4 * WORLD_SIZE > min(
                config.pretrain_batch, config.discover_batch, config.rl_batch)):
            refuse(f"torchrun: batches of this preset cannot be shared by {WORLD_SIZE} processes")
        if len(seeds) == 1 and device.type == "cuda" and LOCAL_SIZE > torch.cuda.device_count():
            refuse(f"torchrun: {LOCAL_SIZE} processes share {torch.cuda.device_count()} GPUs")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=7))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    if WORLD_SIZE > 1 and len(seeds) > 1:
        if deal_seeds(seeds, arguments, together):
            leave(1)
        if RANK > 0 or options.stage != "all":
            return
        options.stage = "table"
    if options.stage == "bench":
        return bench(runs[0])
    for run in runs:  # refuse before anything is trained
        if options.stage == "table":
            try:
                results[run.config.seed] = result = json.loads((run.folder / "result.json").read_text())
                [float(result[name]) for name in (COMPARED if config.method != "raw" else ["raw_success"])]
            except (ValueError, TypeError, KeyError):
                refuse(f"{run.folder / 'result.json'} is not the result of a whole run")
            continue
        if run.data.is_file():
            refuse(f"--data {run.data} is a file")
        run.lock()
        for stage in STAGES:
            run.load(stage)

    for run in runs if options.stage != "table" else ():
        print(f"{options.task}, preset {options.preset}, seed {run.config.seed}, {device}, {run.made_with}; "
              f"writing {'nothing' if Run.dry else f'{run.folder}/'}", flush=True)
        write_file(run.folder / "config.json", asdict(run.config))
        if Run.dry:
            dry_run(run)
        elif not names:
            results[run.config.seed] = result = run_stages(run, PARTS[options.stage].split())
            if options.stage == "all":
                write_file(run.folder / "result.json", result)
    for name in names:
        compare(runs, name, together if len(runs) > 1 else runs[0].folder)
    if results:
        print_table(config, results)
    if len(results) > 1 and options.stage in ("all", "table"):
        write_file(Path(f"{together}-results.json"), results)
        if config.method != "raw":
            compare_seeds(config, results, together)
        print(f"\nwritten to {together}-results.json")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        leave()
    except (OSError, MemoryError, RuntimeError, gridworld.Unusable) as error:
        if isinstance(error, RuntimeError) and not re.search(
                "out of memory|allocate memory|Connection closed|Connection reset|Broken pipe", str(error)):
            raise
        print(f"internal_rl.py: {str(error).partition(chr(10))[0] or type(error).__name__}", file=sys.stderr)
        if WORLD_SIZE > 1:  # see `leave`; the others may be gone
            sys.stderr.flush()
            os._exit(2)
        raise SystemExit(2)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all is done; Python's own end takes a moment
