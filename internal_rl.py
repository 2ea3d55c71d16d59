"""Internal RL in one file: reinforce the thoughts of a pretrained sequence model instead of its tokens.

A minimal PyTorch reimplementation of "Emergent temporal abstractions in autoregressive models enable hierarchical
reinforcement learning" (arXiv:2512.20605; sections, equations and tables cited below are the paper's).

The story
    1. pretrain   A causal model learns to predict the actions of an expert that pursues hidden subgoals: a transformer the moves
                  on a grid, a Hawk SSM the joint torques of a MuJoCo ant that walks over one.
    2. probe      A linear read-out finds the hidden subgoal in the middle of its residual stream.
    3. steer      One low-rank linear map per subgoal, added in the middle, makes the frozen model pursue that subgoal.
    4. discover   Without labels, a metacontroller learns to emit such maps, to hold them, and when to switch them.
    5. rl         A small policy learns from one sparse reward per episode which codes to emit: internal RL.
                  Token-level (ant: raw-action) RL on the same model, with as many episodes, never sees a reward.

                                      s = f_emb(e_1…e_T)  sees the future; replaced by the policy π(z | e) in stage 5
                                                  │
    o_1…o_t ─► blocks 1…l ─► e_t ─┬─► history h ──┼─► encoder ─► μ_t, Σ_t ─► z̃_t ─┐
                                  │               └─► switch gate β_t ────────────┴─► z_t = β_t z̃_t + (1−β_t) z_{t−1}
                                  │                                                     │ hypernetwork
                                  └─► ê_t = e_t + U_t e_t ◄──── U_t = B(z_t)ᵀ A(z_t) ◄──┘
                                            └─► blocks l+1…L ─► p(a_t | o_1…o_t, z_1…z_t)
    (the ant: history, gate and f_emb read the embedding e_{t,0}, and f_emb that of another trajectory; e_t is what is steered)

Glossary (code name: paper symbol, where)
    e            residual stream e_{t,l} after block l, L/2 or as set      base.lower, base.upper       Sec. 1
    U, A, B      linear controller U_t = B(z)ᵀA(z)/√C, rank R              low_rank_control             Eq. 1, 11, 18
    h            causal history h_t                                        Metacontroller.history       Eq. 12
    s            summary of the whole trajectory, one vector               Metacontroller.embedder      Eq. 13
    mu, sigma    μ_t, diagonal Σ_t of the proposed code                    Metacontroller.encoder       Eq. 14, 15
    beta         switch gate β_t (1 = take the proposal, 0 = keep)         Metacontroller.switch        Eq. 16
    z            controller code z_t ∈ R^{n_z}                             integrate                    Eq. 2, 17
    alpha        weight α of the KL to N(0, I)                             discovery_loss               Eq. 3, 9
    lambda       weight λ of the next-observation loss                     pretraining_loss             Eq. 4, 5
    D, D*        expert data for the base / for everything after it        expert_batch                 App. C
    a_t, h_t     in Hawk: decay and state of the linear recurrence         Hawk, parallel_scan          App. D.1
Dims: B batch, n games that still run, T actions of an episode, D numbers of an observation, C residual width, O colours, N objects
(colours + walls), K subgoals, V visits of a task, Z code, R rank, J hidden units of f_hyp, S switches, P policy width.

Run it
    python internal_rl.py --task gridworld                    all stages of the quick preset; see README.md for what to expect
    python internal_rl.py --task gridworld --preset tiny      first contact, under a minute
    python internal_rl.py --task ant                          the same with eight joint torques
    python internal_rl.py --help                              every setting

What differs from the paper is marked where it happens: grep "differs from the paper".
"""
import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import ant_tasks
import gridworld

WORLDS = {"gridworld": gridworld, "ant": ant_tasks}  # both offer draw_layouts, Game, expert_paths, SYMMETRIES, mirror, places, picture

# ============================================================================================================== settings

STAGES = {  # name → all the stages that it builds on, or shares settings with
    "pretrain": [], "probe": ["pretrain"], "steer": ["pretrain"], "audition": ["pretrain"], "discover": ["pretrain", "audition"],
    "rl": ["pretrain", "audition", "discover"], "raw": ["pretrain"],
}
COMMANDS = ["all", "pretrain", "probe", "steer", "discover", "rl", "bench", "figures"]  # discover includes audition, rl includes raw


def setting(default, stages, text):
    return field(default=default, metadata={"stages": set(stages.split()), "help": text})


@dataclass
class Settings:
    """Every dial, with the defaults of the `quick` preset, and the first stages that it changes."""
    task: str = setting("gridworld", "pretrain", "world: gridworld or ant")
    seed: int = setting(0, "pretrain", "random seed of everything that is trained")
    size: int = setting(5, "pretrain", "grid size G")
    colours: int = setting(4, "pretrain", "coloured cells O")
    walls: int = setting(1, "pretrain", "wall cells W")
    max_steps: int = setting(60, "pretrain", "episode length limit")
    subgoals: str = setting("singles", "pretrain", "pretraining tasks: 'singles' (Table A2) or 'pairs' of colours (Table A1)")
    noise: float = setting(0.0, "pretrain", "expert noise in the base model's data: probability ε of a random move; standard deviation of the ant's torques")
    trajectories: int = setting(0, "pretrain", "expert episodes made for the base model (the rest: a quarter); solved ones stay on disk; 0: always fresh ones")
    view: str = setting("egocentric", "pretrain", "input form: 'egocentric' features or the paper's 'absolute' observation")
    base: str = setting("transformer", "pretrain", "base model: 'transformer' or 'hawk'")
    width: int = setting(128, "pretrain", "residual width n_e")
    layers: int = setting(4, "pretrain", "blocks L of the base model")
    heads: int = setting(4, "pretrain", "attention heads; Hawk: blocks of the gates' matrices")
    mlp: int = setting(256, "pretrain", "hidden width of each block's MLP")
    pretrain_steps: int = setting(9600, "pretrain", "base model: training steps")
    pretrain_batch: int = setting(64, "pretrain", "base model: trajectories a step")
    pretrain_lr: float = setting(3e-3, "pretrain", "base model: peak learning rate")
    weight_decay: float = setting(0.03, "pretrain", "AdamW weight decay (all supervised stages)")
    cosine: bool = setting(True, "pretrain", "warm up 200 steps, then cosine decay of the learning rate to 2%% (all supervised stages but audition)")
    next_obs: float = setting(0.02, "pretrain", "λ, weight of the next-observation loss")
    next_cell: float = setting(0.0, "pretrain", "ant: weight of predicting, on entering a cell, which way the next cell lies")
    thin: float = setting(1.0, "pretrain", "ant: train on the steps that enter a cell and this share of the others (pretrain, discover: rising to 1; audition: 0)")
    bursts: float = setting(0.0, "pretrain", "ant: probability a step that the expert is pushed into a random direction for 8 steps")
    bf16: bool = setting(True, "pretrain", "bfloat16 autocast in the base model while it is pretrained")
    probe_steps: int = setting(400, "probe", "linear probe: training steps")
    probe_lr: float = setting(3e-3, "probe", "linear probe: learning rate")
    steer_steps: int = setting(1000, "steer", "labelled controllers: training steps")
    steer_lr: float = setting(3e-2, "steer", "labelled controllers: learning rate")
    control_layer: int = setting(0, "steer audition", "block l after which control acts; 0: the middle, L/2")
    post_task: str = setting("0-1-2-3", "steer rl raw", "post-training task, made of withheld transitions only")
    rank: int = setting(16, "steer audition", "rank of a linear controller U; 0: a full matrix")
    n_z: int = setting(8, "audition", "size of a controller code z")
    n_h: int = setting(32, "audition", "size of the causal history h")
    n_s: int = setting(32, "audition", "size of the trajectory summary s")
    candidates: int = setting(5, "audition", "metacontrollers that start; the one with the most consistent codes goes on")
    audition_steps: int = setting(720, "audition", "training steps of each candidate, without KL")
    discover_steps: int = setting(2200, "discover", "metacontroller: further training steps of the chosen one")
    discover_batch: int = setting(64, "probe steer audition", "metacontroller (and labelled controllers, probe): trajectories a step")
    discover_lr: float = setting(3e-3, "audition", "metacontroller: learning rate")
    alpha: float = setting(0.15, "discover", "α, weight of the KL term")
    alpha_free: float = setting(0.2, "discover", "share of the steps before α starts to rise from 0")
    alpha_ramp: float = setting(0.35, "discover", "share of the steps over which α rises to its value")
    mirror: bool = setting(True, "audition", "decode each code in a randomly mirrored copy of its world")
    embedded: bool = setting(False, "audition", "the metacontroller reads the embedding e_{t,0} instead of e_{t,l}")
    swap: bool = setting(False, "audition", "infer each code with the summary s of another trajectory that visits the same colours")
    rl_episodes: int = setting(150_000, "rl raw", "episodes for internal RL, and again for token-level RL")
    rl_batch: int = setting(1024, "rl raw", "episodes an update")
    rl_lr: float = setting(3e-3, "rl", "internal RL: learning rate of the policy")
    raw_lr: float = setting(1e-4, "raw", "token-level RL: learning rate of the base model")
    rl_epochs: int = setting(3, "rl raw", "passes over each batch of episodes")
    rl_minibatch: int = setting(256, "rl raw", "episodes a gradient step")
    clip: float = setting(0.2, "rl raw", "PPO clip range")
    policy_width: int = setting(128, "rl", "hidden width of the policy")
    std_start: float = setting(3.0, "rl", "policy standard deviation at the start (1 is the prior of the codes)")
    std_end: float = setting(0.25, "rl", "policy standard deviation at the end")
    threshold: float = setting(0.5, "audition rl", "β above this switches (hard gate)")
    tolerance: int = setting(1, "", "steps between a gate and a true change of subgoal that count as a hit")
    evaluation: int = setting(1024, "audition", "layouts on which success is measured, a multiple of 64; codes are looked at in a fixed share of that")


TINY = dict(width=32, heads=2, mlp=64, pretrain_steps=160, pretrain_batch=32, probe_steps=32, steer_steps=48, candidates=2, audition_steps=32,
            discover_steps=64, discover_batch=32, rl_episodes=1024, rl_batch=256, rl_minibatch=128, evaluation=128)
ANT = dict(task="ant", size=4, max_steps=500, noise=0.1, trajectories=40_000, base="hawk", tolerance=3)
# differs from the paper: λ = 1 instead of 10, control of rank 16 instead of a full matrix, after block 1 of 4 instead of the middle one.
ANT_QUICK = dict(
    ANT, next_obs=1.0, next_cell=4.0, thin=1 / 16, bursts=0.01, pretrain_steps=8000, control_layer=1, steer_steps=2400, embedded=True, swap=True,
    candidates=1, audition_steps=8000, discover_steps=1600, alpha=0.5, rl_episodes=102_400, rl_batch=512, rl_minibatch=128,
    std_start=2.0)
PRESETS = {  # (task, preset) → what differs from the defaults
    ("gridworld", "quick"): {},
    ("gridworld", "tiny"): TINY,
    # The paper's sizes and schedules (Tables A1, A4, A7, A9, A13, A16).
    ("gridworld", "paper"): dict(
        next_obs=0.01, candidates=1, audition_steps=1, size=7, colours=8, walls=4, max_steps=100, subgoals="pairs", view="absolute",
        post_task="0-1-2-3-4-5-6-7-0-1-2-3", width=256, layers=6, heads=4, mlp=512, pretrain_steps=256_000, pretrain_batch=1024, pretrain_lr=3e-4,
        weight_decay=0.03, cosine=False, probe_steps=8000, probe_lr=1e-3, steer_steps=3200, steer_lr=1e-3, discover_steps=64_000,
        discover_batch=512, discover_lr=1e-3, mirror=False, alpha=0.1, alpha_free=0.0, alpha_ramp=0.0, rl_episodes=1_000_000, rl_batch=1024,
        rl_lr=3e-5, raw_lr=3e-5, policy_width=256, std_start=1.0, std_end=1.0),
    ("ant", "quick"): ANT_QUICK,
    ("ant", "tiny"): {**ANT_QUICK, **TINY, **dict(
        trajectories=64, max_steps=150, pretrain_steps=48, pretrain_batch=8, probe_steps=8, steer_steps=16, audition_steps=8, discover_steps=16,
        discover_batch=8, rl_episodes=64, rl_batch=32, rl_minibatch=16)},
    # Tables A2, A5, A8, A10, A14, A15.
    ("ant", "paper"): {**ANT, **dict(
        next_obs=10.0, view="absolute", trajectories=104_000, candidates=1, audition_steps=1, width=256, layers=8, heads=8, mlp=512,
        pretrain_steps=204_800, pretrain_batch=512, pretrain_lr=3e-4, weight_decay=0.03, cosine=False, probe_steps=8000, probe_lr=1e-3,
        steer_steps=3200, steer_lr=3e-4, rank=0, discover_steps=32_000, discover_batch=128, discover_lr=3e-4, mirror=False, alpha=0.1,
        alpha_free=0.0, alpha_ramp=0.0, rl_episodes=1_000_000, rl_batch=256, rl_lr=3e-5, raw_lr=3e-5, policy_width=256, std_start=1.0,
        std_end=1.0)},
}

# ========================================================================================================== expert data

@dataclass
class Batch:
    """Expert trajectories, padded: observation [B, T+1, D] (the last one included), action [B, T] (ant: [B, T, 8] torques),
    subgoal [B, T] hidden index of the subgoal pursued (evaluation and steering only), length [B] actions taken. After `only` some steps
    are left out, and what follows a step is the next one that was kept."""
    observation: torch.Tensor
    action: torch.Tensor
    subgoal: torch.Tensor
    length: torch.Tensor

    @property
    def valid(self):
        """[B, T] bool: is there an action (not padding)?"""
        return torch.arange(self.action.shape[1], device=self.length.device) < self.length[:, None]

    def pick(self, rows):
        """The trajectories `rows`, cut to the longest of them."""
        longest = int(self.length[rows].max())
        return Batch(self.observation[rows, :longest + 1], self.action[rows, :longest], self.subgoal[rows, :longest], self.length[rows])

    def only(self, chosen):
        """The steps where `chosen` [B, T], one after the other, and the last observation."""
        kept = F.pad(chosen & self.valid, (0, 1))  # [B, T+1]
        count, steps = kept.sum(1), torch.arange(kept.shape[1], device=kept.device)
        at = torch.where(kept, steps, self.length[:, None]).sort(1).values[:, :int(count.max()) + 1]  # kept steps, then the last observation
        row, before = torch.arange(len(at), device=at.device)[:, None], at[:, :-1].clamp(max=self.action.shape[1] - 1)
        return Batch(self.observation[row, at], self.action[row, before], self.subgoal[row, before], count)

    def to(self, device):
        return Batch(self.observation.to(device), self.action.to(device), self.subgoal.to(device), self.length.to(device))


def draw_layouts(config, n, generator):
    return WORLDS[config.task].draw_layouts(n, config.size, config.colours, config.walls, generator)


def expert_batch(config, n, generator, noise=0.0):
    """Fresh expert trajectories of random pretraining tasks: D (noise = config.noise) or D* (noise = 0). Those of the n that the
    expert fails to solve are left out (ant: a few, or one in seven when it is pushed)."""
    tasks, subgoals = gridworld.pretraining_tasks(config.subgoals)
    layouts = draw_layouts(config, n, generator)
    device = layouts.agent.device
    own = torch.randint(len(tasks), (n,), generator=generator, device=generator.device).to(device)
    pushes = {"bursts": config.bursts} if config.task == "ant" else {}
    paths = WORLDS[config.task].expert_paths(layouts, config.size, tasks.to(device)[own], config.max_steps, generator, noise, **pushes)
    subgoal = subgoals.to(device)[own].gather(1, paths.stage.clamp(max=tasks.shape[1] - 1))
    # differs from the paper: only solved episodes are kept, so that the data always shows a whole task.
    return Batch(paths.observation, paths.action, subgoal, paths.length).pick(paths.solved.nonzero()[:, 0]).to(generator.device)


class StoredEpisodes:
    """Expert trajectories kept on disk, loaded into memory end to end: M observations and the actions that follow them."""

    def __init__(self, config, folder, noise):
        settings = {name: getattr(config, name) for name in ("task", "seed", "size", "colours", "walls", "max_steps", "subgoals")}
        count = config.trajectories if noise else config.trajectories // 4

        def make(i):
            generator = torch.Generator().manual_seed(10_000 * (config.seed + 1) + (1000 if noise else 2000) + i)
            batch = expert_batch(config, min(ant_tasks.SHARD, count), generator, noise)
            kept = F.pad(batch.valid, (1, 0), value=True)  # [B, T+1]: as many rows of everything as observations
            return {"observation": batch.observation[kept].half().numpy(), "action": F.pad(batch.action, (0, 0, 0, 1))[kept].half().numpy(),
                    "subgoal": F.pad(batch.subgoal, (0, 1))[kept].byte().numpy(), "length": batch.length.numpy()}

        settings.update(noise=noise, bursts=config.bursts, episodes=min(ant_tasks.SHARD, count))
        shards = ant_tasks.expert_data(folder, max(1, count // ant_tasks.SHARD), settings, make)
        join = lambda name: torch.from_numpy(np.concatenate([shard[name] for shard in shards]))
        self.observation, self.action, self.subgoal, self.length = (join(name) for name in ("observation", "action", "subgoal", "length"))
        self.start = F.pad((self.length + 1).cumsum(0), (1, -1))

    def pick(self, rows):
        """The trajectories `rows` [B] as a Batch; beyond the end of a trajectory its last row is repeated."""
        length = self.length[rows]
        at = torch.minimum(torch.arange(int(length.max()) + 1), length[:, None]) + self.start[rows, None]  # [B, T+1]
        return Batch(self.observation[at].float(), self.action[at[:, :-1]].float(), self.subgoal[at[:, :-1]].long(), length)


def expert_batches(config, batch_size, generator, noise=0.0, count=16, stored=None):
    """`count` batches of similar length each: a pool sorted by length and dealt out, which halves the padding. The pool is
    fresh, or drawn from `stored` trajectories."""
    if stored is None:
        pool = expert_batch(config, count * batch_size, generator, noise)
        rows = torch.arange(len(pool.length), device=generator.device)
    else:
        pool, rows = stored, torch.randint(len(stored.length), (count * batch_size,), generator=generator, device=generator.device).cpu()
    deal = rows[pool.length[rows].argsort()].tensor_split(count)
    order = torch.randperm(count, generator=generator, device=generator.device).tolist()
    if stored is None:
        return [pool.pick(deal[i]) for i in order]
    # differs from the paper: stored trajectories are mirrored at every use. Simulation and expert are symmetric: that is as good as a fresh one.
    return (mirrored(config, pool.pick(deal[i]).to(generator.device), generator) for i in order)


def mirrored(config, batch, generator):
    """Each trajectory in a random one of the symmetric images of its world: same colours in the same order, but other directions.
    The grid has 8, its rotations and reflections. The ant has 32: its legs can be counted from any of the four, too, so that not even
    the directions relative to its body stay the same."""
    k = torch.randint(WORLDS[config.task].SYMMETRIES, (len(batch.length),), generator=generator, device=generator.device)
    observation, action = WORLDS[config.task].mirror(batch.observation, batch.action, k, config.size)
    return replace(batch, observation=observation, action=action)


# =========================================================================================================== base model

def relative_bucket(distance):
    """Buckets of the relative-position bias (App. D.1): 16 exact distances, then 16 logarithmic ones up to 128. [...] → [...]"""
    far = 16 + (distance.clamp(min=1) / 16).log() / math.log(128 / 16) * 16
    return torch.where(distance < 16, distance, far.long().clamp(max=31))


class Block(nn.Module):
    """Pre-norm transformer block with a relative-position bias added to the attention logits (Table A16)."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.position_bias = nn.Embedding(32, heads)
        nn.init.zeros_(self.position_bias.weight)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x, past=None):
        """x [B, T, C] → ([B, T, C], (keys, values)). `past` holds the keys and values [B, heads, T', C/heads] of earlier steps."""
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, C/H]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = k.shape[2]  # T' + T
        ago = torch.arange(seen - time, seen, device=x.device)[:, None] - torch.arange(seen, device=x.device)  # [T, T'+T]
        bias = self.position_bias(relative_bucket(ago.clamp(min=0))).permute(2, 0, 1)  # [H, T, T'+T]
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias.masked_fill(ago < 0, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width)
        x = x + self.mix(attended)
        return x + self.down(F.relu(self.up(self.norm_2(x)))), (k, v)


def parallel_scan(a, b, chunk=16):
    """h_t = a_t h_{t−1} + b_t with h_0 = 0: a, b [B, T, C] → h [B, T, C]. All chunks of 16 steps at once, then from chunk to chunk."""
    batch, time, width = b.shape
    extra = -time % chunk
    reach, h = (F.pad(x, (0, 0, 0, extra)).view(batch, -1, chunk, width) for x in (a, b))  # [B, T/16, 16, C]
    reach, h = (x.clone() if extra == 0 else x for x in (reach, h))  # pad copies
    for t in range(1, chunk):
        h[:, :, t].addcmul_(reach[:, :, t], h[:, :, t - 1])
    for t in range(1, chunk):
        reach[:, :, t].mul_(reach[:, :, t - 1])  # a_1 … a_t: what is left of the chunk before
    for n in range(1, h.shape[1]):
        h[:, n].addcmul_(reach[:, n], h[:, n - 1, -1:])
    return h.view(batch, -1, width)[:, :time]


class LinearRecurrence(torch.autograd.Function):
    """`parallel_scan` with a gradient that is a scan, too: the same recurrence run backwards in time."""

    @staticmethod
    def forward(context, a, b):
        h = parallel_scan(a, b)
        context.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(context, gradient):
        a, h = context.saved_tensors
        later = F.pad(a[:, 1:], (0, 0, 0, 1))  # a_{t+1}
        g = parallel_scan(later.flip(1), gradient.flip(1)).flip(1)  # g_t = gradient_t + a_{t+1} g_{t+1}
        return g * F.pad(h[:, :-1], (0, 0, 1, 0)), g


class Hawk(nn.Module):
    """Pre-norm recurrent block of the ant's base model (App. D.1, Table A15): a short causal convolution and a real-gated linear
    recurrent unit, multiplied by a gated branch, then an MLP."""

    WINDOW = 4  # of the convolution

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.branches, self.mix = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)
        self.convolution = nn.Conv1d(width, width, self.WINDOW, groups=width)
        self.gates = nn.Parameter(torch.randn(heads, width // heads, 2 * width // heads) * (heads / width) ** 0.5)  # block-diagonal
        self.gate_bias = nn.Parameter(torch.zeros(heads, 2 * width // heads))
        decay = torch.linspace(0.9, 0.999, width)  # of a full recurrence gate in one step: a = decay = exp(−8 softplus(Λ))
        self.decay = nn.Parameter((-decay.log() / 8).expm1().log())  # Λ
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x, past=None):
        """x [B, T, C] → ([B, T, C], (window, h)). `past` holds the convolution's last inputs [B, 3, C] and the state h [B, C]."""
        batch, time, width = x.shape
        gate, inner = self.branches(self.norm_1(x)).chunk(2, -1)
        window, state = past if past is not None else (inner.new_zeros(batch, self.WINDOW - 1, width), x.new_zeros(batch, width))
        inner = torch.cat([window, inner], 1)  # [B, 3 + T, C]
        window = inner[:, -(self.WINDOW - 1):]
        inner = self.convolution(inner.transpose(1, 2)).transpose(1, 2)  # [B, T, C]
        gates = torch.einsum("bthi,hij->bthj", inner.unflatten(-1, (len(self.gates), -1)), self.gates) + self.gate_bias
        forget, use = (g.flatten(2).float().sigmoid() for g in gates.chunk(2, -1))  # each [B, T, C]
        log_a = -8 * F.softplus(self.decay) * forget
        a, b = log_a.exp(), (-torch.expm1(2 * log_a) + 1e-6).sqrt() * use * inner.float()
        if past is not None:
            b = torch.cat([(b[:, :1] + a[:, :1] * state[:, None]), b[:, 1:]], 1)
        h = LinearRecurrence.apply(a, b)
        x = x + self.mix(F.gelu(gate, approximate="tanh") * h.to(gate.dtype))
        return x + self.down(F.relu(self.up(self.norm_2(x)))), (window, h[:, -1])


class TorqueHead(nn.Linear):
    """Mean and ln σ of each torque: [..., C] → [..., 16]."""
    # differs from the paper: the spread is learned, but the same in every state. One that depends on the state lets controllers gain
    # likelihood on the noiseless D* by shrinking it, without steering at all.

    def __init__(self, width):
        super().__init__(width, ant_tasks.ACTION)
        self.log_sigma = nn.Parameter(torch.full((ant_tasks.ACTION,), -1.5))

    def forward(self, x):
        mean = super().forward(x)
        return torch.cat([mean, self.log_sigma.to(mean.dtype).expand_as(mean)], -1)


class Base(nn.Module):
    """Causal model of observations, split at the control layer l (L/2, or as set) into `lower` and `upper`.

    `cache` is a list with one entry a block; passing the same list again continues the sequence (acting, one step at a time).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.split, objects = config, config.control_layer or config.layers // 2, config.colours + config.walls  # split: l
        # differs from the paper: egocentric features (--view absolute for its own), because they are learned faster.
        self.cells = self.body = None
        if config.task == "gridworld" or config.view == "egocentric":
            inputs = gridworld.input_count(config.view, config.size, config.colours, config.walls)
            self.cells = nn.EmbeddingBag(inputs, config.width, mode="sum")  # = a linear layer on the one-hot observation
            nn.init.normal_(self.cells.weight, std=0.3)
        if config.task == "ant":
            self.body = nn.Linear(ant_tasks.FEATURES if config.view == "egocentric" else ant_tasks.OBSERVATION + 2 * objects, config.width)
        block = {"transformer": Block, "hawk": Hawk}[config.base]
        self.blocks = nn.ModuleList(block(config.width, config.heads, config.mlp) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        if config.task == "gridworld":
            self.action_head, self.observation_head = nn.Linear(config.width, 4), nn.Linear(config.width, (objects + 1) * config.size ** 2)
        else:
            self.action_head = TorqueHead(config.width)
            self.observation_head = nn.Linear(config.width, ant_tasks.OBSERVATION + 2 * objects)
            self.way_head = nn.Linear(config.width, 9)

    def embed(self, observation):
        """[B, T, D] → e_{t,0} [B, T, C]"""
        config, embedded = self.config, 0
        if self.cells is not None:
            places = WORLDS[config.task].places(observation, config.size)
            active = gridworld.INPUTS[config.view](places, config.size, config.colours)  # [B, T, N+1] positions of the ones
            embedded = self.cells(active.flatten(0, 1)).view(*observation.shape[:2], -1)
        if self.body is not None:
            embedded = embedded + self.body(ant_tasks.body_features(observation, config.size) if config.view == "egocentric" else observation)
        return embedded

    def run_blocks(self, x, blocks, cache):
        for i in blocks:
            x, kept = self.blocks[i](x, None if cache is None else cache[i])
            if cache is not None:
                cache[i] = kept
        return x

    def new_cache(self):
        return [None] * len(self.blocks)

    def lower(self, observation, cache=None):
        """observation [B, T, D] → e_{t,l} [B, T, C]"""
        return self.run_blocks(self.embed(observation), range(self.split), cache)

    def meta_input(self, observation):
        """What the metacontroller's history, summary and gate read: observation [B, T, D] → e_{t,l}, or e_{t,0} with `embedded`."""
        # differs from the paper (the ant): e_{t,0}, where colours visited are easier to read than distances.
        return self.embed(observation) if self.config.embedded else self.lower(observation)

    def last_residual(self, e, cache=None):
        return self.norm(self.run_blocks(e, range(self.split, len(self.blocks)), cache))

    def upper(self, e, cache=None):
        """e_{t,l} [B, T, C] → action logits [B, T, 4], or mean and ln σ of the torques [B, T, 16]"""
        return self.action_head(self.last_residual(e, cache))

    def forward(self, observation):
        return self.upper(self.lower(observation))

    def residuals(self, observation):
        """observation [B, T, D] → e_{t,0} … e_{t,L}: [L+1, B, T, C]"""
        streams = [self.embed(observation)]
        for i in range(len(self.blocks)):
            streams.append(self.run_blocks(streams[-1], [i], None))
        return torch.stack(streams)


def action_log_prob(out, action):
    """ln p(action) under the model's output: logits [..., 4] of moves [...], or Gaussians [..., 16] of torques [..., 8] → [...]"""
    if not action.is_floating_point():
        return out.float().log_softmax(-1).gather(-1, action[..., None])[..., 0]
    mean, log_sigma = out.float().chunk(2, -1)
    return (-0.5 * ((action - mean) / log_sigma.exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample_action(config, out, generator):
    """A draw from the model's output [n, 4 or 16] → moves [n] or torques [n, 8]"""
    if config.task == "gridworld":
        probability = out.softmax(-1)
        noise = torch.rand(probability.shape, generator=generator, device=probability.device)
        return (probability / -noise.log()).argmax(-1)  # the exponential race
    mean, log_sigma = out.chunk(2, -1)
    return mean + log_sigma.exp() * torch.randn(mean.shape, generator=generator, device=mean.device)


def action_loss(out, batch):
    """Mean −ln p(a_t | …) over the actions that exist: out [B, ≥T, 4 or 16] → scalar, nats per action."""
    valid = batch.valid
    out, action = out[:, :valid.shape[1]][valid], batch.action[valid]
    return -action_log_prob(out, action).mean() if action.is_floating_point() else F.cross_entropy(out.float(), action)


def pretraining_loss(config, base, batch):
    """Eq. 4-5: −ln p(a_t | o_{1:t}) − λ ln p(o_{t+1} | o_{1:t}), means over steps; for the ant also the next-cell loss, mean over the
    steps at which it enters a cell. Returns (loss, action part)."""
    last = base.last_residual(base.lower(batch.observation[:, :-1]))
    action_part = action_loss(base.action_head(last), batch)
    loss = action_part
    if config.next_obs > 0:
        loss = loss + config.next_obs * next_observation_loss(config, base, batch, last)
    if config.next_cell > 0:
        entered = entries(config, batch)
        loss = loss + config.next_cell * F.cross_entropy(base.way_head(last)[entered].float(), ways(config, batch)[entered])
    return loss, action_part


def entries(config, batch):
    """At which steps has the torso just entered its cell? [B, T] bool"""
    cell = WORLDS[config.task].places(batch.observation, config.size)[..., -1]  # [B, T+1]
    return F.pad(cell[:, 1:-1] != cell[:, :-2], (1, 0), value=True) & batch.valid


def ways(config, batch):
    """Which way lies the cell that the torso enters next? [B, T] in 0 … 8: 3·(rows down + 1) + columns right + 1, so 4 if it enters none"""
    # differs from the paper: of the observation to come, the next cell is predicted, too, because a single control step hardly depends on the map.
    cell = WORLDS[config.task].places(batch.observation, config.size)[..., -1]  # [B, T+1]
    following, later = [], cell[:, -1]
    for t in reversed(range(cell.shape[1] - 1)):
        later = torch.where(cell[:, t + 1] != cell[:, t], cell[:, t + 1], later)
        following.append(later)
    following, here = torch.stack(following[::-1], 1), cell[:, :-1]
    down, right = following // config.size - here // config.size, following % config.size - here % config.size
    return 3 * (down.clamp(-1, 1) + 1) + right.clamp(-1, 1) + 1


def thinned(config, batch, share, generator):
    """The steps at which the ant enters a cell, and a random share of all others."""
    # differs from the paper: only on entering a cell, about every fifteen steps, is the action not given away by the motion. On all steps at
    # once a model learns to continue the motion and never to choose it.
    some = torch.rand(batch.valid.shape, generator=generator, device=generator.device) < share
    return batch.only(entries(config, batch) | some)


def rising_share(config, progress):
    """The share for `thinned`, from config.thin at progress 0 to all steps at 1."""
    return config.thin ** (1 - progress ** 3)


def next_observation_loss(config, base, batch, last):
    """−ln p(o_{t+1} | o_{1:t}), mean over steps, from the last residual [B, T, C]; in a thinned batch, of the next observation kept."""
    valid, following = batch.valid, batch.observation[:, 1:]
    out = base.observation_head(last)[valid].float()
    if config.task == "gridworld":
        cell_logits = out.unflatten(-1, (following.shape[-1], -1))  # [n, N+1, G²]
        return F.cross_entropy(cell_logits.flatten(0, 1), following[valid].flatten()) * following.shape[-1]
    return 0.5 * ((out - following[valid]) ** 2).sum(-1).mean()  # a Gaussian of unit variance


# ============================================================================================== probe, labelled controllers

class Probe(nn.Module):
    """One linear read-out of the hidden subgoal per layer, here of the normalised stream: p(g_t | e_{t,l}) = softmax(U_l e_{t,l})  (Eq. 6-7)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.layers + 1, config.width, len(gridworld.SUBGOALS[config.subgoals])))

    def forward(self, residuals):
        """[L+1, n, C] → logits [L+1, n, K]"""
        return residuals @ self.weight


def low_rank_control(e, a, b):
    """ê = e + Bᵀ(A e)/√C  (Eq. 11): e [..., C], a, b [..., R, C] → [..., C]. U = BᵀA/√C is never built."""
    read = (a @ e.unsqueeze(-1)) / math.sqrt(e.shape[-1])  # [..., R, 1]
    return e + (b.transpose(-1, -2) @ read).squeeze(-1)


class LabelledControllers(nn.Module):
    """One linear controller per subgoal, chosen by its true label (Eq. 1)."""

    def __init__(self, config):
        super().__init__()
        shape = (len(gridworld.SUBGOALS[config.subgoals]), config.rank or config.width, config.width)
        a = torch.randn(shape) if config.rank else math.sqrt(config.width) * torch.eye(config.width).expand(shape)  # full: A = √C·I, U = B
        self.a, self.b = nn.Parameter(a, requires_grad=config.rank > 0), nn.Parameter(torch.zeros(shape))

    def forward(self, e, subgoal):
        """e [..., C], subgoal [...] index → ê [..., C]"""
        return low_rank_control(e, self.a[subgoal], self.b[subgoal])


# ======================================================================================================== metacontroller

def integrate(beta, proposal, z):
    """Temporal integration (Eq. 2, 17): z_t = β_t z̃_t + (1−β_t) z_{t−1}. beta [B], proposal, z [B, Z] → [B, Z]"""
    return beta[:, None] * proposal + (1 - beta[:, None]) * z


def kl_to_standard_normal(mu, log_sigma):
    """KL(N(μ, Σ) ‖ N(0, I)) summed over the code's dimensions: [..., Z] → [...]"""
    return 0.5 * (mu ** 2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(-1)


class Metacontroller(nn.Module):
    """Emits, holds and replaces linear controllers of the frozen base model (App. D.2, Fig. 5)."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width)
        self.history = nn.GRU(width, config.n_h, batch_first=True)  # Eq. 12
        # differs from the paper: f_emb is a GRU instead of a Hawk stack, because one layer is enough here.
        self.embedder = nn.GRU(width, config.n_s, batch_first=True)  # Eq. 13
        # differs from the paper: the encoder reads e_t only through h_t, because directions and distances then fit less easily into a code.
        self.encoder = nn.Sequential(nn.Linear(config.n_h + config.n_s, 64), nn.ReLU(), nn.Linear(64, 2 * config.n_z))
        self.switch_in, self.switch_z = nn.Linear(width + config.n_h, 64), nn.Linear(config.n_z, 64, bias=False)
        self.switch_out = nn.Linear(64, 1)
        # f_hyp: an MLP from z to the matrices A(z) and B(z), its last layer's weights (and, as row J, its bias) kept as tensors.
        self.hyper = nn.Sequential(nn.Linear(config.n_z, 32), nn.ReLU())
        rank = config.rank or width
        self.read = nn.Parameter(torch.empty(33, rank, width).uniform_(-1, 1) / math.sqrt(32))  # [J+1, R, C]
        self.write = nn.Parameter(torch.empty(33, rank, width).uniform_(-1, 1) / math.sqrt(32))
        with torch.no_grad():
            self.encoder[-1].bias[config.n_z:] = -1  # initial ln σ
            self.read[-1].normal_()  # A reads e at unit scale whatever z is, so that B(z) can learn at once

    def switch(self, features, z):
        """β_t = f_switch(e_t, h_{t−1}, z_{t−1})  (Eq. 16). features = switch_in([e_t, h_{t−1}]) [B, 64], z [B, Z] → [B]"""
        return self.switch_out(F.relu(features + self.switch_z(z))).squeeze(-1).sigmoid()

    def propose(self, e, length, partner=None):
        """All that does not depend on z, for all steps at once: normalised residuals e [B, T+1, C] → μ, ln σ [B, T+1, Z] and switch
        features [B, T+1, 64]. With `partner` [B] each trajectory takes the summary of that one instead of its own."""
        h, _ = self.history(e)
        before = F.pad(h[:, :-1], (0, 0, 1, 0))  # h_{t−1}, zero at the start: [B, T+1, n_h]
        s = self.embedder(e)[0][torch.arange(len(e), device=e.device), length]  # after the last observation: [B, n_s]
        s = s if partner is None else s[partner]
        mu, log_sigma = self.encoder(torch.cat([h, s[:, None].expand(-1, e.shape[1], -1)], -1)).chunk(2, -1)  # Eq. 15
        return mu, log_sigma.clamp(-6, 3), self.switch_in(torch.cat([e, before], -1))

    def forward(self, e, length, generator, partner=None):
        """e [B, T+1, C] of whole trajectories, length [B] → z [B, T+1, Z], beta [B, T+1], mu, log_sigma [B, T+1, Z]"""
        mu, log_sigma, features = self.propose(self.norm(e), length, partner)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        proposal = mu + log_sigma.exp() * noise  # Eq. 14
        z, beta = [proposal[:, 0]], [torch.ones(len(e), device=e.device)]  # β_1 = 1: the first step takes the proposal
        for t in range(1, e.shape[1]):
            beta.append(self.switch(features[:, t], z[-1]))
            z.append(integrate(beta[-1], proposal[:, t], z[-1]))
        return torch.stack(z, 1), torch.stack(beta, 1), mu, log_sigma

    def matrices(self, z):
        """A(z), B(z) = f_hyp(z)  (Eq. 18): z [..., Z] → two of [..., R, C]"""
        hidden = F.pad(self.hyper(z), (0, 1), value=1)  # [..., J+1]
        return tuple((hidden @ weight.flatten(1)).unflatten(-1, weight.shape[1:]) for weight in (self.read, self.write))

    def control(self, e, z):
        """ê_t = e_t + U_t e_t (Eq. 11), e [..., C], z [..., Z] → [..., C]: low_rank_control(e, *matrices(z)) in another order of
        the sums, so that no matrix is built for any single step."""
        hidden = F.pad(self.hyper(z), (0, 1), value=1).unsqueeze(-1)  # [..., J+1, 1]
        read = (e @ self.read.flatten(0, 1).T).unflatten(-1, self.read.shape[:2]) / math.sqrt(e.shape[-1])  # [..., J+1, R]
        read = (hidden * read).sum(-2, keepdim=True)  # A e/√C: [..., 1, R]
        return e + (hidden * read).flatten(-2) @ self.write.flatten(0, 1)


def two_worlds(config, base, batch, generator):
    """Residuals of the trajectories, from which codes are inferred, and of the world in which they are decoded.

    Returns (e [B, T+1, C], e_world [B, T, C], world: the Batch of the latter, partner [B]: whose summary each trajectory takes, or None).
    The base model is frozen; gradients only flow back through its upper blocks.
    """
    # differs from the paper: codes are decoded in a mirrored copy of the world, because a code that means "go up" explains nothing there.
    world = mirrored(config, batch, generator) if config.mirror else batch
    with torch.no_grad():
        e = base.meta_input(batch.observation)
        e_world = base.lower(world.observation) if config.mirror or config.embedded else e
    return e, e_world[:, :batch.action.shape[1]], world, same_visits(config, batch) if config.swap else None


def same_visits(config, batch):
    """For each trajectory another one that visits the same colours in the same order (itself if there is none): index [B]"""
    # differs from the paper: the summary s comes from that one, because all that it can tell about this one is the order of the colours, and
    # not where they are. Of solved episodes, that order is the hidden task: weak supervision, though no label is read.
    places = WORLDS[config.task].places(batch.observation, config.size)[:, :, [*range(config.colours), -1]]  # [B, T+1, O+1]
    on = (places[..., :-1] == places[..., -1:]) & (torch.arange(places.shape[1], device=places.device) <= batch.length[:, None])[..., None]
    entered = on & ~F.pad(on, (0, 0, 1, 0))[:, :-1]  # [B, T+1, O]
    colour, later = (entered * torch.arange(1, config.colours + 1, device=on.device)).sum(-1), entered.any(-1).flip(1).cumsum(1).flip(1)
    order = (colour * (config.colours + 1) ** (later - 1).clamp(min=0)).sum(1)  # the visits as digits of a number
    rows = order.argsort()
    groups = order[rows].unique_consecutive(return_counts=True)[1].tolist()
    partner = torch.empty_like(rows)
    for group in rows.split(groups):
        partner[group] = group.roll(1)
    return partner


def discovery_loss(base, meta, e, e_world, world, partner, alpha, generator):
    """Eq. 3, 9: −ln p(a_t | o_{1:t}, z_{1:t}) + α KL, means over the steps that have an action. Arguments as from `two_worlds`.
    Returns (loss, parts, β [B, T+1])."""
    z, beta, mu, log_sigma = meta(e, world.length, generator, partner)
    valid = world.valid
    nll = action_loss(base.upper(meta.control(e_world, z[:, :valid.shape[1]])), world)
    kl = kl_to_standard_normal(mu, log_sigma)[:, :valid.shape[1]][valid].mean()
    return nll + alpha * kl, {"nll": nll.item(), "kl": kl.item()}, beta


# =========================================================================================== acting in the environment

@dataclass
class Episodes:
    """What B games left behind: observation [B, T+1, D], action [B, T] or [B, T, 8], length [B], success [B] 0/1, first [B] first
    colour visited (−1: none)."""
    observation: torch.Tensor
    action: torch.Tensor
    length: torch.Tensor
    success: torch.Tensor
    first: torch.Tensor


@torch.no_grad()
def play(config, base, layouts, task, generator, control=None):
    """Acts with the base model in every layout until all games are over. Actions are sampled at temperature 1.

    control(e [n, C], games [n], t) → ê [n, C] intervenes on the residual stream of the games that still run. It may read the
    games' state and e_{t,0} [n, C] in `control.game` and `control.embedded`, which are set here.
    """
    device = generator.device
    game = WORLDS[config.task].Game(layouts, config.size, task, config.max_steps)
    if control is not None:
        control.game = game
    running, cache, observation = game.rows, base.new_cache(), game.observation().to(device)
    observations, actions = [observation], []
    while len(running):
        embedded = base.embed(observation[running, None])
        e = base.run_blocks(embedded, range(base.split), cache)  # [n, 1, C]
        if control is not None:
            control.embedded = embedded[:, 0]
            e = control(e[:, 0], running, len(actions))[:, None]
        drawn = sample_action(config, base.upper(e, cache)[:, 0], generator)
        action = torch.zeros(len(layouts), *drawn.shape[1:], dtype=drawn.dtype, device=device)
        action[running] = drawn
        game.step(action.to(game.rows.device))
        observation = observation.clone()
        observation[running] = game.observation(running).to(device)
        actions.append(action)
        observations.append(observation)
        still = ~game.done[running]
        if not still.all():
            running, cache = running[still], [tuple(part[still] for part in kept) for kept in cache]
    return Episodes(torch.stack(observations, 1), torch.stack(actions, 1), game.steps.to(device),
                    (game.stage == game.goal).float().to(device), game.first.to(device))


class LabelledControl:
    """Activates the labelled controllers in the order of the task, by the true number of visits so far."""

    def __init__(self, controllers, order):
        self.controllers, self.order = controllers, order  # order [V]: the subgoal each visit belongs to

    def __call__(self, e, games, t):
        return self.controllers(e, self.order[self.game.stage[games]])


class InternalControl:
    """The metacontroller while acting (Algorithm 1): the gate is hard, and `act` chooses a code only where it fires.

    act(e [n, C], games [n]) → z [n, Z]. With `hold` the first code stays for the whole episode.
    """

    def __init__(self, config, meta, act, batch, hold=False):
        device = next(meta.parameters()).device
        self.meta, self.act, self.hold, self.threshold, self.reads_embedding = meta, act, hold, config.threshold, config.embedded
        self.h, self.z = torch.zeros(1, batch, config.n_h, device=device), torch.zeros(batch, config.n_z, device=device)
        self.trace = []  # (games, β, fired) of every step

    def __call__(self, e, games, t):
        x, h = self.meta.norm(self.embedded if self.reads_embedding else e), self.h[:, games]
        beta = self.meta.switch(self.meta.switch_in(torch.cat([x, h[0]], -1)), self.z[games])
        fired = torch.ones_like(beta, dtype=torch.bool) if t == 0 else (beta > self.threshold) & (not self.hold)
        self.h[:, games] = self.meta.history(x[:, None], h.contiguous())[1]
        if fired.any():
            self.z[games[fired]] = self.act(e[fired], games[fired])
        self.trace.append((games, beta, fired))
        return self.meta.control(e, self.z[games])


# ============================================================================================================ internal RL

class Policy(nn.Module):
    """π(z | e at the switches so far): Gaussian with mean from a one-layer GRU whose state advances only when it acts (App. D.3)."""

    def __init__(self, config):
        super().__init__()
        # differs from the paper: a GRU instead of a Hawk layer.
        self.norm, self.embed = nn.LayerNorm(config.width), nn.Linear(config.width, config.policy_width)
        self.memory = nn.GRU(config.policy_width, config.policy_width, batch_first=True)
        self.mean = nn.Linear(config.policy_width, config.n_z)
        nn.init.normal_(self.mean.weight, std=0.01)
        nn.init.zeros_(self.mean.bias)

    def forward(self, e, memory=None):
        """e [B, S, C] residuals at the switches → (mean [B, S, Z], memory [1, B, P])"""
        out, memory = self.memory(F.relu(self.embed(self.norm(e))), memory)
        return self.mean(out), memory

    def replay(self, e, count):
        """The means of whole episodes of count [B] switches: e [B, S, C] → [B, S, Z]. As `forward`, without working on padding."""
        x = F.relu(self.embed(self.norm(e)))
        packed = nn.utils.rnn.pack_padded_sequence(x, count.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.memory(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.mean(out)


def gaussian_log_prob(z, mean, std):
    """ln N(z; mean, std² I), summed over the code's dimensions: [..., Z] → [...]"""
    return (-0.5 * ((z - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


class PolicyActor:
    """Lets the policy choose codes and writes down what it saw and chose: e [B, S, C], z [B, S, Z], log_prob [B, S], count [B]."""

    def __init__(self, config, policy, batch, std, generator):
        self.policy, self.std, self.generator = policy, std, generator
        device, room = generator.device, config.max_steps
        self.memory = torch.zeros(1, batch, config.policy_width, device=device)
        self.e = torch.zeros(batch, room, config.width, device=device)
        self.z = torch.zeros(batch, room, config.n_z, device=device)
        self.log_prob = torch.zeros(batch, room, device=device)
        self.count = torch.zeros(batch, dtype=torch.long, device=device)

    def __call__(self, e, games):
        mean, self.memory[:, games] = self.policy(e[:, None], self.memory[:, games].contiguous())
        mean = mean[:, 0]
        z = mean + self.std * torch.randn(mean.shape, generator=self.generator, device=mean.device)
        slot = self.count[games]
        self.e[games, slot], self.z[games, slot] = e, z
        if self.std > 0:
            self.log_prob[games, slot] = gaussian_log_prob(z, mean, self.std)
        self.count[games] += 1
        return z


def advantage(success):
    """(R − mean R) / (std R + 1e-3) over the batch, the same for all abstract steps of an episode (App. C.5): [B] → [B]"""
    return (success - success.mean()) / (success.std(correction=0) + 1e-3)


def clipped_surrogate(log_prob, old_log_prob, weight, mask, clip):
    """PPO's clipped objective summed over an episode's steps (Eq. 10), as a loss: [B, S], weight (the advantage) [B] → scalar"""
    ratio = (log_prob - old_log_prob).exp()
    gain = torch.minimum(ratio * weight[:, None], ratio.clamp(1 - clip, 1 + clip) * weight[:, None])
    return -(gain * mask).sum(1).mean()


def reinforce(config, parameters, optimizer, success, log_prob_of, old_log_prob, mask, generator):
    """PPO epochs over one batch of episodes. log_prob_of(rows) → [b, S] under the current parameters. Returns the last loss."""
    weight, loss = advantage(success), torch.zeros(())
    if success.std(correction=0) == 0:
        return 0.0  # every advantage is 0, and so is the gradient
    for _ in range(config.rl_epochs):
        for rows in torch.randperm(len(success), generator=generator, device=success.device).split(config.rl_minibatch):
            loss = clipped_surrogate(log_prob_of(rows), old_log_prob[rows], weight[rows], mask[rows], config.clip)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return loss.item()


def internal_rl_round(config, base, meta, policy, optimizer, layouts, task, std, generator):
    """One batch of episodes and the update from it (Algorithms 2-3). Returns metrics."""
    actor = PolicyActor(config, policy, len(layouts), std, generator)
    episodes = play(config, base, layouts, task, generator, InternalControl(config, meta, actor, len(layouts)))
    steps = int(actor.count.max())
    e, z, old = actor.e[:, :steps], actor.z[:, :steps], actor.log_prob[:, :steps]
    mask = torch.arange(steps, device=e.device) < actor.count[:, None]
    loss = reinforce(config, list(policy.parameters()), optimizer, episodes.success,
                     lambda rows: gaussian_log_prob(z[rows], policy.replay(e[rows], actor.count[rows]), std), old, mask, generator)
    return {"loss": loss, "success": episodes.success.mean().item(), "switches": actor.count.float().mean().item()}


def raw_rl_round(config, base, optimizer, layouts, task, generator):
    """The baseline: the same update on the base model's own action tokens, all of θ trained (App. C.4.1). Returns metrics."""
    episodes = play(config, base, layouts, task, generator)
    mask = torch.arange(episodes.action.shape[1], device=episodes.length.device) < episodes.length[:, None]

    def log_prob_of(rows):
        return action_log_prob(base(episodes.observation[rows, :-1]), episodes.action[rows])

    with torch.no_grad():
        everything = torch.arange(len(layouts), device=mask.device)
        old = log_prob_of(everything) if episodes.success.any() else torch.zeros(mask.shape)
    loss = reinforce(config, list(base.parameters()), optimizer, episodes.success, log_prob_of, old, mask, generator)
    return {"loss": loss, "success": episodes.success.mean().item(), "length": episodes.length.float().mean().item()}

# =========================================================================================== what to look at: gates, codes

def gate_scores(beta, batch, threshold, tolerance):
    """Precision and recall of β > threshold against true subgoal changes, ± `tolerance` steps; the first step is a switch by
    construction and does not count. beta [B, T+1] → (precision, recall), nan where there is nothing to score."""
    time = batch.action.shape[1]
    valid = batch.valid[:, 1:]
    true = (batch.subgoal[:, 1:] != batch.subgoal[:, :-1]) & valid
    fired = (beta[:, 1:time] > threshold) & valid
    near = lambda x: F.max_pool1d(x[:, None].float(), 2 * tolerance + 1, stride=1, padding=tolerance)[:, 0] > 0
    return ((fired & near(true)).sum() / fired.sum()).item(), ((true & near(fired)).sum() / true.sum()).item()


def explained_variance(x, y):
    """R² of a linear read-out of y [n, D] from x [n, Z], fitted on one half of the rows and scored on the other."""
    x, y = torch.cat([x, torch.ones_like(x[:, :1])], 1).cpu().double(), y.cpu().double()
    half = len(x) // 2
    weight = torch.linalg.lstsq(x[:half], y[:half]).solution
    residual = y[half:] - x[half:] @ weight
    return round(1 - (residual.var(0).sum() / y[half:].var(0).sum()).item(), 4)  # LAPACK's last digits depend on memory alignment


def code_scores(config, mu, beta, batch):
    """What do the codes at the switches mean? Share of the subgoal that a nearest-centroid read-out of μ gets right (chance 1/K
    for useless codes), and R² of a linear read-out of the displacement and of the distance to the subgoal's next colour."""
    time = batch.action.shape[1]
    fired = (beta[:, :time] > config.threshold) & batch.valid
    codes, goals = mu[:, :time][fired], batch.subgoal[fired]
    half = len(codes) // 2
    kinds = range(len(gridworld.SUBGOALS[config.subgoals]))
    centroids = torch.stack([codes[:half][goals[:half] == k].mean(0) for k in kinds])
    accuracy = (torch.cdist(codes[half:], centroids).argmin(1) == goals[half:]).float().mean().item()
    first = torch.tensor([colours[0] for colours in gridworld.SUBGOALS[config.subgoals]], device=codes.device)
    places = WORLDS[config.task].places(batch.observation[:, :time], config.size)  # [B, T, N+1]
    target, agent = places.gather(2, first[batch.subgoal][..., None])[..., 0], places[..., -1]
    offset = torch.stack([target // config.size - agent // config.size, target % config.size - agent % config.size], -1)[fired]
    return {"goal_accuracy": accuracy, "r2_direction": explained_variance(codes, offset.float()),
            "r2_distance": explained_variance(codes, offset.abs().sum(-1, keepdim=True).float())}


def held_codes(config, base, meta, codes, layouts, generator):
    """Which colour does each code reach first when it is held for a whole episode? codes [n, Z], m layouts for every code
    → counts [n, O+1], the last column for episodes that reach none."""
    repeated = layouts[torch.arange(len(layouts)).repeat(len(codes))]
    each = codes.repeat_interleave(len(layouts), 0)
    control = InternalControl(config, meta, lambda e, games: each[games], len(each), hold=True)
    episodes = play(config, base, repeated, [0], generator, control)  # in a task of one visit the first colour ends the game
    first = episodes.first.view(len(codes), -1) % (config.colours + 1)  # −1 → O
    return F.one_hot(first, config.colours + 1).sum(1)

# ================================================================================================================== stages

class Run:
    """One run's folder, device and settings: config.json, metrics.jsonl, a checkpoint a stage, figures."""

    def __init__(self, config, folder, device, data="data"):
        self.config, self.folder, self.device, self.data, self.stop = config, Path(folder), device, Path(data), None

    @functools.cache
    def stored(self, noise):
        """The expert trajectories kept on disk, made if missing, or None where the settings ask for fresh ones."""
        if self.config.trajectories == 0:
            return None
        try:
            return StoredEpisodes(self.config, self.data / f"{self.config.task}-s{self.config.seed}-noise{noise:g}", noise)
        except ValueError as error:
            refuse(error)

    def generator(self, stage):
        """Training data and noise of one stage; evaluation uses seeds below 10,000, which no stage ever has."""
        return torch.Generator(self.device).manual_seed(10_000 * (self.config.seed + 1) + list(STAGES).index(stage))

    def evaluation_generator(self, number=1):
        return torch.Generator(self.device).manual_seed(number)

    def path(self, stage):
        return self.folder / f"{stage}.pt"

    def log(self, **line):
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self):
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]  # a killed run may have left half a line

    def rewind_log(self, stage, step):
        """Forgets what `stage` wrote after `step`: it will be written again."""
        kept = [line for line in self.metrics() if line["stage"] != stage or line["step"] <= step]
        temporary = self.folder / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.folder / "metrics.jsonl")

    def save(self, stage, **content):
        temporary = self.path(stage).with_suffix(".tmp")
        torch.save({"config": asdict(self.config), **content}, temporary)
        os.replace(temporary, self.path(stage))

    def load(self, stage):
        """The checkpoint of `stage`, or None. Refuses (exit 2) a damaged one and one made with other settings."""
        path = self.path(stage)
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            theirs = saved["config"]
        except Exception as error:  # torch raises many kinds for a damaged file
            refuse(f"{path} cannot be read ({type(error).__name__}); delete it to train this stage again")
        needed = {stage, *STAGES[stage]}
        for setting in fields(Settings):
            mine = getattr(self.config, setting.name)
            if setting.metadata["stages"] & needed and theirs.get(setting.name) != mine:
                refuse(f"{path} was made with {setting.name}={theirs.get(setting.name)}, not {mine}; choose another --out or delete it")
        return saved


def refuse(message):
    print(f"internal_rl.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def learning_rate(peak, step, steps):
    """200 steps of warm-up (a tenth of a short run), then a cosine down to 2% of the peak."""
    # differs from the paper: larger rates that decay (--no-cosine for constant ones), because there are far fewer steps.
    warm_up = min(200, steps // 10 + 1)
    return peak * min(1, (step + 1) / warm_up) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(run, stage, modules, optimizers, generator, rounds, one_round, report_every, watch):
    """Calls one_round(i) → metrics for i in 0 … rounds−1; reports, saves, resumes. All of a stage's state is in its arguments.

    A round is the smallest unit: an interrupt is honoured, and a checkpoint written, between rounds only, so a resumed stage
    repeats exactly what it would have done. Returns at once if the stage is finished.
    """
    saved = run.load(stage)
    done, seconds, last_save, last_report = 0, 0.0, time.time(), 0
    if saved is not None:
        for name, module in modules.items():
            module.load_state_dict(saved["modules"][name])
        done, seconds = saved["round"], saved["seconds"]
        if done == rounds:
            print(f"{stage}: finished before, reused", flush=True)
            return
        if saved["device"] != run.device.type:
            refuse(f"{run.path(stage)} was begun on {saved['device']}; finish it there or choose another --out")
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        generator.set_state(saved["generator"].cpu())
        print(f"{stage}: resumed after {done} of {rounds} rounds", flush=True)
    run.rewind_log(stage, done)
    started = time.time()

    def save():
        to_go_on = {"optimizers": {k: o.state_dict() for k, o in optimizers.items()}, "generator": generator.get_state()} if done < rounds else {}
        run.save(stage, modules={k: m.state_dict() for k, m in modules.items()}, round=done, device=run.device.type,
                 seconds=seconds + time.time() - started, **to_go_on)

    while done < rounds:
        metrics = one_round(done)
        if not all(math.isfinite(x) for k, x in metrics.items() if "loss" in k or k in ("nll", "kl")):
            at = f"the last good checkpoint is {run.path(stage)}" if run.path(stage).exists() else "there is no checkpoint yet"
            print(f"internal_rl.py: {stage}: the loss is not finite at round {done + 1}; {at}", file=sys.stderr)
            raise SystemExit(1)
        done += 1
        if done % report_every == 0 or done == rounds:
            spent = seconds + time.time() - started
            metrics = {**metrics, **(watch(done) if watch else {})}
            run.log(stage=stage, step=done, time_s=round(spent, 2), **metrics)
            shown = " ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            print(f"{stage} {done}/{rounds} {shown} | {spent:.0f} s, {spent / done * (rounds - done):.0f} s to go", flush=True)
        if run.stop is not None or done == rounds or time.time() - last_save > 60:
            save()
            last_save = time.time()
        if run.stop is not None and done < rounds:
            print(f"\nstopped in {stage} after round {done} of {rounds}; saved {run.path(stage)}. The same command goes on from there.")
            raise SystemExit(128 + run.stop)


def supervised(run, stage, modules, parameters, peak, steps, loss_of, noise=0.0, watch=None, constant=False, share=None):
    """Trains `parameters` on expert batches with AdamW. loss_of(batch, step, generator) → (loss, {metric: value}).
    One round is a pool of batches, dealt out by length. `constant`: the learning rate does not change. With config.thin < 1 the
    batches are `thinned`: of the steps that enter no cell share(progress) is kept, progress in 0 … 1, or config.thin."""
    config, generator, pool = run.config, run.generator(stage), min(16, steps)
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=config.weight_decay)
    batch_size = config.pretrain_batch if stage == "pretrain" else config.discover_batch

    def one_round(i):
        totals = {}
        for j, batch in enumerate(expert_batches(config, batch_size, generator, noise, pool, run.stored(noise))):
            step = i * pool + j
            for group in optimizer.param_groups:
                group["lr"] = peak if constant or not config.cosine else learning_rate(peak, step, steps)
            if config.thin < 1:
                batch = thinned(config, batch, share(min(1, step / steps)) if share else config.thin, generator)
            loss, parts = loss_of(batch, step, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for name, value in {"loss": loss.item(), **parts}.items():
                totals[name] = totals.get(name, 0.0) + value / pool
        return totals

    rounds = math.ceil(steps / pool)
    train(run, stage, modules, {"adamw": optimizer}, generator, rounds, one_round, max(1, rounds // 12), watch)


def frozen(module):
    return module.requires_grad_(False).eval()


def held_out_batch(run, n, noise=0.0):
    """n expert trajectories that no stage trains on; of the ant, whose episodes are ten times as long, a quarter."""
    return expert_batch(run.config, n // 4 if run.config.task == "ant" else n, run.evaluation_generator(), noise)


def evaluation_layouts(run, n, number=2):
    return draw_layouts(run.config, n, run.evaluation_generator(number))


def solved(run, base, control=None):
    """Which of config.evaluation fixed layouts are solved on the post-training task; `control` as in `play`: [n] 0/1"""
    task = gridworld.parse_task(run.config.post_task, run.config.colours)
    return play(run.config, base, evaluation_layouts(run, run.config.evaluation), task, run.evaluation_generator(3), control).success


def pretrain(run):
    """Stage 1: the base model predicts the expert's actions."""
    config = run.config
    torch.manual_seed(config.seed)
    base = Base(config).to(run.device)
    print(f"pretrain: base model with {sum(p.numel() for p in base.parameters()):,} parameters", flush=True)
    floor = action_floor(run)
    held_out = held_out_batch(run, 1024, config.noise)

    def loss_of(batch, step, generator):
        # differs from the paper: bfloat16 matrix products (--no-bf16 for float32), because they are faster on recent CPUs.
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            loss, action_part = pretraining_loss(config, base, batch)
        return loss, {"nll": action_part.item()}

    @torch.no_grad()
    def watch(done):
        loss, nll = pretraining_loss(config, base, held_out)
        return {"eval_loss": loss.item(), "eval_nll": nll.item(), "gap": nll.item() - floor}

    supervised(run, "pretrain", {"base": base}, list(base.parameters()), config.pretrain_lr, config.pretrain_steps, loss_of,
               config.noise, watch, share=lambda progress: rising_share(config, progress))
    return frozen(base)


def action_floor(run):
    """NLL of the best possible predictor, nats per action. Grid: the exact task-blind one on the held-out trajectories. Ant: the
    entropy of the noise on the expert's torques, as if the task were known."""
    config, generator = run.config, run.evaluation_generator()
    if config.task == "ant":
        return ant_tasks.ACTION * (math.log(max(config.noise, 1e-3)) + 0.5 * math.log(2 * math.pi * math.e))
    tasks, _ = (x.to(run.device) for x in gridworld.pretraining_tasks(config.subgoals))
    layouts = draw_layouts(config, 1024, generator)
    own = torch.randint(len(tasks), (1024,), generator=generator, device=run.device)
    paths = gridworld.expert_paths(layouts, config.size, tasks[own], config.max_steps, generator, config.noise)
    return gridworld.bayes_floor(layouts, config.size, paths, tasks, own, config.max_steps, config.noise)[0]


def probe(run, base):
    """Stage 2: in which layer can the hidden subgoal be read linearly? (Fig. 3, A1)"""
    config = run.config
    probe, held_out = Probe(config).to(run.device), held_out_batch(run, 1024)

    def of_batch(batch):
        with torch.no_grad():
            residuals = base.residuals(batch.observation[:, :-1])[:, batch.valid]  # [L+1, n, C]
        # differs from the paper: each layer's stream at unit scale, so that one learning rate suits all of them.
        return probe(F.layer_norm(residuals, residuals.shape[-1:])), batch.subgoal[batch.valid]

    def loss_of(batch, step, generator):
        logits, goal = of_batch(batch)
        return F.cross_entropy(logits.flatten(0, 1), goal.repeat(len(logits))) * len(logits), {}

    @torch.no_grad()
    def watch(done):
        logits, goal = of_batch(held_out)
        return {"probe_accuracy": [round(x, 4) for x in (logits.argmax(-1) == goal).float().mean(1).tolist()]}

    supervised(run, "probe", {"probe": probe}, list(probe.parameters()), config.probe_lr, config.probe_steps, loss_of, watch=watch)


def steer(run, base):
    """Stage 3: controllers trained with the true subgoal, activated in the order of the post-training task (Fig. 4)."""
    config = run.config
    torch.manual_seed(config.seed)
    controllers = LabelledControllers(config).to(run.device)

    def loss_of(batch, step, generator):
        with torch.no_grad():
            e = base.lower(batch.observation[:, :-1])
        loss = action_loss(base.upper(controllers(e, batch.subgoal)), batch)
        return loss, {"nll": loss.item()}

    supervised(run, "steer", {"controllers": controllers}, list(controllers.parameters()), config.steer_lr, config.steer_steps, loss_of)
    return controllers


def subgoal_order(config, device):
    """The subgoal that each visit of the post-training task belongs to: [V]"""
    subgoal_of = {colour: i for i, colours in enumerate(gridworld.SUBGOALS[config.subgoals]) for colour in colours}
    return torch.tensor([subgoal_of[colour] for colour in gridworld.parse_task(config.post_task, config.colours)], device=device)


def alpha_at(config, step):
    """α: 0 for a while, then up to its value."""
    # differs from the paper: not constant, because with α > 0 from the start the codes collapse before they mean anything.
    progress = step / config.discover_steps
    return config.alpha * min(1.0, max(0.0, (progress - config.alpha_free) / max(config.alpha_ramp, 1e-9)))


def held_share(run, base, meta):
    """32 random codes, each held in 64 layouts (the ant's in 32): how often does a code reach its favourite colour first? The favourite is
    found on one half of the layouts and scored on the other. Needs no hidden label: visits can be seen."""
    generator, many = run.evaluation_generator(5), run.config.evaluation // (64 if run.config.task == "ant" else 32)
    codes = torch.randn(32, run.config.n_z, generator=generator, device=run.device)
    find, score = (held_codes(run.config, base, meta, codes, evaluation_layouts(run, many, number), generator) for number in (6, 7))
    favourite = find[:, :-1].argmax(1)
    share = score.gather(1, favourite[:, None])[:, 0] / score.sum(1)
    return {"held_share": share.mean().item(), "held_colours": len(favourite.unique())}


@torch.no_grad()
def inspect_codes(run, base, meta):
    """Gates and codes on held-out trajectories: gate precision and recall, what the codes mean, what they do when held."""
    config, generator = run.config, run.evaluation_generator(4)
    batch = held_out_batch(run, 512)
    _, beta, mu, _ = meta(base.meta_input(batch.observation), batch.length, generator)
    precision, recall = gate_scores(beta, batch, config.threshold, config.tolerance)
    return {"gate_precision": precision, "gate_recall": recall, **code_scores(config, mu, beta, batch),
            **held_share(run, base, meta)}


def transplant(run, base, meta):
    """Codes that were active when a colour was reached in one layout, injected into others (App. B.3.2).

    transplant: a code from step 30 on (grid: step 2); share of the episodes then still running that reach its colour first.
    withheld: a code of 0 from the start and, once 0 is reached, one of 1; share of the episodes that reach 0 first in which 1 comes
    next, which never happens in the data. …_without: the same without the (last) code. Empty if some colour is never reached.
    """
    config, generator, moment = run.config, run.evaluation_generator(12), 30 if run.config.task == "ant" else 2
    n = config.evaluation // 4
    prior = InternalControl(config, meta, lambda e, games: torch.randn(len(e), config.n_z, generator=generator, device=e.device), 4 * n)
    first = play(config, base, evaluation_layouts(run, 4 * n, 13), [0], generator, prior).first
    found = [prior.z[first == colour] for colour in range(config.colours)]
    if min(len(codes) for codes in found) == 0:
        return {}

    def some(colour):
        codes = found[colour]
        return codes[torch.randint(len(codes), (), generator=generator, device=run.device)]

    def rate(task, codes, active, counts):
        def control(e, games, t):
            stage = control.game.stage[games].to(e.device)
            return torch.where(active(stage, t)[:, None], meta.control(e, codes[games, stage]), e)

        episodes = play(config, base, evaluation_layouts(run, n, 14), task, run.evaluation_generator(15), control)
        counted = counts(episodes)
        return (episodes.success * counted).sum().item() / max(1, counted.sum().item())

    target = torch.randint(config.colours, (n,), generator=generator, device=run.device).tolist()
    codes = torch.stack([some(colour) for colour in target])[:, None]  # [n, 1, Z]
    later = lambda stage, t: torch.full_like(stage, t >= moment, dtype=torch.bool)
    always, never, at_first = (lambda stage, t: stage >= 0), (lambda stage, t: stage < 0), (lambda stage, t: stage == 0)
    pairs = torch.stack([torch.stack([some(0), some(1)]) for _ in range(n)])  # [n, 2, Z]
    still, arrived = (lambda episodes: episodes.length > moment), (lambda episodes: episodes.first == 0)
    tasks = torch.tensor(target)[:, None]
    return {"transplant": rate(tasks, codes, later, still), "transplant_without": rate(tasks, codes, never, still),
            "withheld": rate([0, 1], pairs, always, arrived), "withheld_without": rate([0, 1], pairs, at_first, arrived)}


def audition(run, base):
    """Stage 4, first half: several metacontrollers start without KL; returns the one whose held codes most consistently mean one colour.

    What a code comes to mean, the subgoal or only its distance, is decided early and by chance.
    """
    # differs from the paper: selection among metacontrollers by their codes, where the paper selects by the success of RL (the ant: one
    # candidate, no selection).
    config = run.config
    torch.manual_seed(config.seed)
    metas = nn.ModuleList(Metacontroller(config) for _ in range(config.candidates)).to(run.device)

    def loss_of(batch, step, generator):
        worlds = two_worlds(config, base, batch, generator)
        losses = [discovery_loss(base, meta, *worlds, 0.0, generator)[0] for meta in metas]
        return sum(losses), {f"nll_{i}": loss.item() for i, loss in enumerate(losses)}

    supervised(run, "audition", {"metas": metas}, list(metas.parameters()), config.discover_lr, config.audition_steps, loss_of,
               constant=True, share=lambda progress: 0)
    if config.candidates == 1:
        return metas[0]
    shares = [held_share(run, base, meta)["held_share"] for meta in metas]
    best = int(np.argmax(shares))
    print("audition: consistency of the codes", " ".join(f"{share:.3f}" for share in shares), f"→ candidate {best}", flush=True)
    return metas[best]


def discover(run, base):
    """Stage 4: the metacontroller learns codes and gates from unlabelled D* (Fig. 5, 6)."""
    config = run.config
    meta = audition(run, base)
    print(f"discover: metacontroller with {sum(p.numel() for p in meta.parameters()):,} parameters", flush=True)

    def loss_of(batch, step, generator):
        alpha = alpha_at(config, step)
        loss, parts, beta = discovery_loss(base, meta, *two_worlds(config, base, batch, generator), alpha, generator)
        return loss, {**parts, "alpha": alpha, "beta": beta[:, 1:-1][batch.valid[:, 1:]].mean().item()}

    supervised(run, "discover", {"meta": meta}, list(meta.parameters()), config.discover_lr, config.discover_steps, loss_of,
               watch=lambda done: inspect_codes(run, base, meta),
               share=lambda progress: rising_share(config, progress))
    return frozen(meta)


def policy_std(config, progress):
    """The policy's standard deviation falls linearly from std_start to std_end over the run."""
    # differs from the paper: scheduled instead of learned, because a learned one shrinks before anything is found; it starts wider than
    # the prior, because typical codes are too weak to overrule the base model's belief that a withheld transition never happens.
    return config.std_start + (config.std_end - config.std_start) * progress


def reinforcement(run, base, meta, method):
    """Stage 5: 'internal' trains a policy over codes, 'raw' the base model itself; the same episodes and update (Fig. 8)."""
    config, stage = run.config, "rl" if method == "internal" else "raw"
    torch.manual_seed(config.seed)
    task = gridworld.parse_task(config.post_task, config.colours)
    generator = run.generator(stage)
    pool = draw_layouts(config, 16 * config.rl_batch, generator)
    rounds = math.ceil(config.rl_episodes / config.rl_batch)
    if method == "internal":
        learner, rate = Policy(config).to(run.device), config.rl_lr
    else:
        learner, rate = copy.deepcopy(base).requires_grad_(True), config.raw_lr
    # differs from the paper: no weight decay, so that a batch without any reward leaves the parameters as they are.
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=0)

    def one_round(i):
        layouts = pool[torch.randint(len(pool), (config.rl_batch,), generator=generator, device=run.device).to(pool.agent.device)]
        if method == "internal":
            metrics = internal_rl_round(config, base, meta, learner, optimizer, layouts, task, policy_std(config, i / rounds), generator)
        else:
            metrics = raw_rl_round(config, learner, optimizer, layouts, task, generator)
        return {"method": method, "episodes": (i + 1) * config.rl_batch, **metrics}

    train(run, stage, {"learner": learner}, {"adamw": optimizer}, generator, rounds, one_round, max(1, rounds // 50), None)
    return frozen(learner)


def acting_control(run, meta, policy, batch):
    """InternalControl by the policy's mean codes."""
    actor = PolicyActor(run.config, policy, batch, 0.0, run.evaluation_generator(5))
    return InternalControl(run.config, meta, actor, batch)


# ======================================================================================================== bench and figures

def bench(run):
    """Speed of one discovery step, one cached acting step and the batched environment, on one thread."""
    torch.set_num_threads(1)
    config = replace(run.config, size=7, colours=8, walls=4, subgoals="pairs", view="absolute", width=128, layers=4, heads=4, mlp=256,
                     rank=16, n_z=8, mirror=False, embedded=False, swap=False)
    generator = run.evaluation_generator()
    base, meta = frozen(Base(config).to(run.device)), Metacontroller(config).to(run.device)
    batch = expert_batch(config, 64, generator)
    time_ = 32  # exactly T = 32: cut or padded
    fit = lambda x, n: torch.cat([x[:, :n], x[:, -1:].expand(-1, max(0, n - x.shape[1]), *x.shape[2:])], 1)
    batch = Batch(fit(batch.observation, time_ + 1), fit(batch.action, time_), fit(batch.subgoal, time_),
                  torch.full_like(batch.length, time_))
    optimizer = torch.optim.AdamW(meta.parameters())

    def discovery_step():
        loss, _, _ = discovery_loss(base, meta, *two_worlds(config, base, batch, generator), 0.1, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    actor = lambda e, games: torch.randn(len(games), config.n_z, generator=generator, device=run.device)

    @torch.no_grad()
    def acting_steps():
        control, cache, games = InternalControl(config, meta, actor, 64), base.new_cache(), torch.arange(64, device=run.device)
        for t in range(time_):
            e = base.lower(batch.observation[:, t:t + 1], cache)[:, 0]
            base.upper(control(e, games, t)[:, None], cache).softmax(-1)

    layouts = gridworld.draw_layouts(8192, 5, 4, 1, generator)
    game = gridworld.Game(layouts, 5, [0, 1, 2, 3], 60)
    actions = torch.randint(4, (100, 8192), generator=generator, device=run.device)

    def environment_steps():
        for action in actions:
            game.step(action)
            game.reset(game.done)

    def seconds(work, repeats=5):
        work()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    result = {"discovery_step_ms": 1e3 * seconds(discovery_step), "acting_step_ms": 1e3 * seconds(acting_steps) / time_,
              "environment_million_steps_per_s": actions.numel() / seconds(environment_steps) / 1e6}
    for name, value in result.items():
        print(f"bench: {name} {value:.2f}")


def figures(run, base, meta, policy):
    """All pictures, from the checkpoints and metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    config, palette = run.config, [tuple(c / 255) for c in gridworld.PALETTE]
    task = gridworld.parse_task(config.post_task, config.colours)

    def finish(name):
        plt.tight_layout()
        plt.savefig(run.folder / name, dpi=110)
        plt.close()

    # Gates over true subgoals (Fig. A3)
    batch = expert_batch(config, 24 if config.task == "ant" else 6, run.evaluation_generator(6))  # the ant's expert fails at times
    with torch.no_grad():
        _, beta, _, _ = meta(base.meta_input(batch.observation), batch.length, run.evaluation_generator(7))
    figure, axes = plt.subplots(6, 1, figsize=(8, 6), sharex=True)
    for i, axis in enumerate(axes):
        steps = int(batch.length[i])
        changes = [0, *((batch.subgoal[i, 1:steps] != batch.subgoal[i, :steps - 1]).nonzero()[:, 0] + 1).tolist(), steps]
        for t, following in zip(changes, changes[1:]):
            axis.axvspan(t - 0.5, following - 0.5, color=palette[int(batch.subgoal[i, t])], alpha=0.35, lw=0)
        axis.step(range(steps), beta[i, :steps].cpu(), where="mid", color="black")
        axis.set(ylim=(-0.05, 1.05), yticks=[0, 1], ylabel="β")
    axes[0].set_title("Switch gate β over the expert's hidden subgoal (background colour)")
    axes[-1].set_xlabel("step")
    finish("gates.png")

    # Probe accuracy by layer (Fig. 3, A1)
    accuracy = last_metric(run, "probe", "probe_accuracy")
    plt.figure(figsize=(5, 3))
    plt.plot(range(len(accuracy)), accuracy, "o-", color="black")
    plt.axvline(base.split, ls=":", color="gray")
    plt.xticks(range(len(accuracy)))
    plt.xlabel("layer l (dotted: control layer)")
    plt.ylabel("subgoal accuracy of a linear probe")
    finish("probe.png")

    # Success curves (Fig. 8, A5)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for method, colour in (("internal", palette[1]), ("raw", palette[0])):
        lines = [line for line in run.metrics() if line.get("method") == method]
        episodes, success = [line["episodes"] / 1000 for line in lines], np.array([line["success"] for line in lines])
        axes[0].plot(episodes, success, color=colour, label={"internal": "internal RL", "raw": f"{RAW[config.task]} RL"}[method])
        axes[1].semilogy(episodes, success.clip(min=0.5 / config.rl_batch), color=colour)
    axes[0].set(xlabel="thousand episodes", ylabel=f"success on {config.post_task}", ylim=(-0.02, 1.02))
    axes[1].set(xlabel="thousand episodes", title=f"log scale (floor: half an episode in {config.rl_batch})")
    axes[0].legend()
    finish("success.png")

    # Codes → first colour reached
    codes = torch.randn(32, config.n_z, generator=run.evaluation_generator(8), device=run.device)
    reached = held_codes(config, base, meta, codes, evaluation_layouts(run, config.evaluation // (32 if config.task == "ant" else 16)),
                         run.evaluation_generator(9)).cpu().float()
    reached = reached / reached.sum(1, keepdim=True)
    order = (reached[:, :-1].argmax(1) - reached[:, :-1].max(1).values).argsort()
    plt.figure(figsize=(8, 3))
    bottom = np.zeros(len(codes))
    for k in range(config.colours + 1):
        share = reached[order, k].numpy()
        plt.bar(range(len(codes)), share, bottom=bottom, color=palette[k] if k < config.colours else "lightgray", width=0.9,
                label=f"colour {k}" if k < config.colours else "none")
        bottom += share
    plt.xlabel("random code z ~ N(0, I), held for a whole episode")
    plt.ylabel("first colour reached")
    plt.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncol=config.colours + 1, frameon=False)
    finish("codes.png")

    # A shortest solved episode of internal RL, if there is one: film strip and animation
    layouts = evaluation_layouts(run, 64, number=10)
    control = acting_control(run, meta, policy, len(layouts))
    episodes = play(config, base, layouts, task, run.evaluation_generator(11), control)
    best = int((episodes.success * 1000 - episodes.length).argmax())  # a shortest success, if there is any
    fired, steps = [], int(episodes.length[best])
    for games, _, switched in control.trace[:steps]:
        fired.append(bool(switched[games == best][0]))
    segment = np.cumsum(fired)  # which code is in force at each step

    def frame(t):
        return WORLDS[config.task].picture(episodes.observation[best, t], config.size, config.colours)

    def title(t):
        return "end" if t == steps else f"{t}: code {segment[t]}" + (" (new)" if fired[t] else "")

    shown = sorted({*range(0, steps, math.ceil(steps / 15)), *np.flatnonzero(fired)[:9].tolist(), steps})
    columns = min(8, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for t, axis in zip(shown, axes.flat):
        axis.imshow(frame(t))
        axis.set_title(title(t), fontsize=8, fontweight="bold" if t < steps and fired[t] else "normal")
    finish("episode.png")

    figure, axis = plt.subplots(figsize=(3, 3.3))
    picture = axis.imshow(frame(0))
    axis.axis("off")

    def show(t):
        picture.set_data(frame(t))
        axis.set_title(title(t), fontweight="bold" if t < steps and fired[t] else "normal")
        return [picture]

    every, speed = (4, 10) if config.task == "ant" else (1, 2)
    FuncAnimation(figure, show, frames=[*range(0, steps, every), steps]).save(run.folder / "episode.gif", writer=PillowWriter(fps=speed))
    plt.close(figure)
    print(f"figures: gates, probe, success, codes, episode in {run.folder}", flush=True)


# ==================================================================================================================== main

RAW = {"gridworld": "token-level", "ant": "raw-action"}
EXPECT = {  # name → (what it is, medians of the quick preset's seeds: on the grid, with the ant)
    "gap": ("base model above its floor (Bayes; ant: noise entropy), nats", "0.04", "1.4"),
    "probe_best": ("linear probe of the hidden subgoal, best layer", "0.53", "0.42"),
    "base_success": ("base model alone on the post-training task", "0", "0"),
    "steer_success": ("labelled controllers on the post-training task", "0.75", "0.59"),
    "gate_precision": ("gate precision, ±1 step (ant: ±3)", "1", "0.99"),
    "gate_recall": ("gate recall, ±1 step (ant: ±3)", "1", "1"),
    "goal_accuracy": ("subgoal read from the code by nearest centroid", "1", "0.97"),
    "held_share": ("one held random code reaches the same colour (chance 1/K)", "0.74", "0.64"),
    "transplant": ("a code found elsewhere, injected: its colour is next", "0.58", "0.48"),
    "transplant_without": ("… without it", "0.2", "0.26"),
    "withheld": ("codes of 0, then 1 found elsewhere, injected: 1 follows 0", "0.12", "0.29"),
    "withheld_without": ("… without the second code", "0.006", "0.007"),
    "internal_success": ("internal RL, success on held-out layouts", "0.61", "0.42"),
    "switches_solved": ("codes chosen in an episode that it solves", "4.5", "4.5 to 6"),
    "raw_success": ("token-level or raw-action RL, success on held-out layouts", "0", "0"),
    "seconds": ("seconds of all stages", "", ""),
}


def run_stages(run, stage):
    """Runs `stage` (or all) and what it builds on. Returns the measured numbers of EXPECT that it got to."""
    def wanted(name):
        return stage in ("all", "figures", name)

    result = {}
    base = pretrain(run)
    result["gap"] = last_metric(run, "pretrain", "gap")
    if wanted("probe"):
        probe(run, base)
        result["probe_best"] = max(last_metric(run, "probe", "probe_accuracy"))
    if wanted("steer"):
        controllers = steer(run, base)
        order = subgoal_order(run.config, run.device)
        result["base_success"] = solved(run, base).mean().item()
        result["steer_success"] = solved(run, base, LabelledControl(controllers, order)).mean().item()
        print(f"steer: success on {run.config.post_task}: base alone {result['base_success']:.4f}, "
              f"with labelled controllers {result['steer_success']:.4f}", flush=True)
    if wanted("discover") or stage == "rl":
        meta = discover(run, base)
        result.update({name: last_metric(run, "discover", name) for name in ("gate_precision", "gate_recall", "goal_accuracy", "held_share")})
        if wanted("discover"):
            moved = transplant(run, base, meta)
            print("discover: transplanted codes", " ".join(f"{name} {value:.3f}" for name, value in moved.items()), flush=True)
            result.update(moved)
    if wanted("rl"):
        policy = reinforcement(run, base, meta, "internal")
        control = acting_control(run, meta, policy, run.config.evaluation)
        success = solved(run, base, control)
        result["internal_success"] = success.mean().item()
        if success.any():
            result["switches_solved"] = control.act.count[success > 0].float().mean().item()
        result["raw_success"] = solved(run, reinforcement(run, base, meta, "raw")).mean().item()
        print(f"rl: success on held-out layouts: internal {result['internal_success']:.4f}, raw {result['raw_success']:.4f}", flush=True)
    if wanted("figures"):
        figures(run, base, meta, policy)
    seconds = {line["stage"]: line["time_s"] for line in run.metrics()}  # the last line of each stage
    result["seconds"] = round(sum(seconds.values()), 1)
    return result


def last_metric(run, stage, name):
    for line in reversed(run.metrics()):
        if line["stage"] == stage and name in line:
            return line[name]
    refuse(f"{run.folder}/metrics.jsonl lacks {name} of {stage}, though {stage}.pt is finished; copy it too, or delete {stage}.pt")


def print_table(task, results):
    """One column a seed, then the median and what to expect. A row that no seed measured is left out."""
    print(f"\n{'':62}" + "".join(f"{'seed ' + str(seed):>10}" for seed in results) + f"{'median':>10}   expect (quick)")
    for name, (text, *expected) in EXPECT.items():
        expected = expected[list(WORLDS).index(task)]
        values = [result.get(name, math.nan) for result in results.values()]  # nan: there was nothing to measure
        if not np.isnan(values).all():
            print(f"{text:62}" + "".join(f"{v:10.4g}" for v in values) + f"{np.median(values):10.4g}   {expected}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        refuse(message)


def parse_arguments(arguments):
    """Command line → (argparse namespace, Settings). Every setting is a flag; flags override the preset."""
    parser = Parser(prog="internal_rl.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    allow_abbrev=False,
                    description="Internal RL (arXiv:2512.20605) from pretraining to reinforced controller codes. The values shown as quick are the "
                                "gridworld's; the ant's are in PRESETS.")
    parser.add_argument("--task", choices=list(WORLDS), default="gridworld", help="world")
    parser.add_argument("--preset", choices=["tiny", "quick", "paper"], default="quick", help="named settings: tiny (a minute), quick, paper (a GPU)")
    parser.add_argument("--stage", choices=COMMANDS, default="all",
                        help="what to run; the stages it builds on are reused or run first")
    parser.add_argument("--seeds", default=None, metavar="0,1,2", help="several seeds one after another (overrides --seed)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    parser.add_argument("--out", default=None, metavar="FOLDER", help="run folder (default runs/TASK-PRESET-sSEED; several seeds: OUT-sSEED)")
    parser.add_argument("--data", default="data", metavar="FOLDER", help="where expert trajectories are kept")
    for setting in [s for s in fields(Settings) if s.name != "task"]:
        flag, text = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        kind = {"action": argparse.BooleanOptionalAction} if setting.type is bool else {"type": setting.type}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} (quick: {setting.default})", **kind)
    options = parser.parse_args(arguments)
    given = {s.name: getattr(options, s.name) for s in fields(Settings) if hasattr(options, s.name)}
    return options, Settings(**{**PRESETS[options.task, options.preset], **given})


def check(config):
    """Refuses settings that cannot work, in one line each."""
    try:
        gridworld.check_sizes(config.size, config.colours, config.walls, config.max_steps)
        draw_layouts(config, 1, torch.Generator())
        task = gridworld.parse_task(config.post_task, config.colours)
        if config.subgoals not in gridworld.SUBGOALS:
            raise ValueError(f"subgoals {config.subgoals!r} is none of {list(gridworld.SUBGOALS)}")
        if config.base not in ("transformer", "hawk"):
            raise ValueError(f"base {config.base!r} is none of ['transformer', 'hawk']")
        if config.view not in gridworld.INPUTS:
            raise ValueError(f"view {config.view!r} is none of {list(gridworld.INPUTS)}")
        needed = max(max(colours) for colours in gridworld.SUBGOALS[config.subgoals]) + 1
        if config.colours < needed:
            raise ValueError(f"colours {config.colours} is too few: the pretraining tasks of {config.subgoals!r} use {needed}")
        if max(task) >= needed:
            raise ValueError(f"post_task {config.post_task!r} names a colour that no pretraining task visits")
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of heads {config.heads}")
        positive = ("candidates", "audition_steps", "width", "heads", "mlp", "n_z", "n_h", "n_s", "pretrain_steps", "pretrain_batch", "probe_steps", "steer_steps",
                    "discover_steps", "discover_batch", "rl_episodes", "rl_batch", "rl_epochs", "rl_minibatch", "policy_width",
                    "pretrain_lr", "probe_lr", "steer_lr", "discover_lr", "rl_lr", "raw_lr", "clip", "std_start", "std_end")
        for name in positive:
            if not 0 < getattr(config, name) < math.inf:
                raise ValueError(f"{name} {getattr(config, name)} is not positive")
        if config.evaluation < 64 or config.evaluation % 64:
            raise ValueError(f"evaluation {config.evaluation} is not a multiple of 64")
        if config.max_steps < 10:
            raise ValueError(f"max_steps {config.max_steps} is less than 10, too short for the pretraining tasks")
        if config.seed >= 2 ** 40:
            raise ValueError(f"seed {config.seed} is too large")
        if config.layers < 2 or config.layers % 2:
            raise ValueError(f"layers {config.layers} is not an even number of at least 2")
        if not 0 <= config.control_layer <= config.layers:
            raise ValueError(f"control_layer {config.control_layer} is outside 0 … {config.layers}")
        for name in ("noise", "bursts", "alpha_free", "alpha_ramp", "threshold"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"{name} {getattr(config, name)} is outside 0 … 1")
        if not 0 < config.thin <= 1:
            raise ValueError(f"thin {config.thin} is outside 0 … 1, 0 excluded")
        for name in ("next_cell", "thin", "bursts", "trajectories") if config.task != "ant" else ():
            if getattr(config, name) != getattr(Settings(), name):
                raise ValueError(f"{name} {getattr(config, name)} is for --task ant only")
        if config.trajectories % (4 if config.trajectories <= ant_tasks.SHARD else 4 * ant_tasks.SHARD):
            raise ValueError(f"trajectories {config.trajectories} is neither a multiple of {4 * ant_tasks.SHARD} nor one of 4 up to {ant_tasks.SHARD}")
        for name in ("seed", "alpha", "next_obs", "weight_decay", "rank", "trajectories", "tolerance", "next_cell"):
            if not 0 <= getattr(config, name) < math.inf:
                raise ValueError(f"{name} {getattr(config, name)} is negative or not finite")
    except ValueError as error:
        refuse(error)


def choose_device(name):
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        refuse(f"--device {name}: torch finds no such device here")
    return torch.device(name)


def main(arguments=None):
    options, config = parse_arguments(arguments)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else [config.seed]
    except ValueError:
        refuse(f"--seeds {options.seeds!r} is not a list of whole numbers such as 0,1,2")
    if options.stage == "bench" and options.task != "gridworld":
        refuse("--stage bench: measures the gridworld; for the speed of the ant's simulation run ant_tasks.py")
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    results, runs = {}, []
    for seed in seeds:
        config = replace(config, seed=seed)
        check(config)
        folder = options.out or f"runs/{options.task}-{options.preset}"
        runs.append(Run(config, folder if options.out and len(seeds) == 1 else f"{folder}-s{seed}", device, options.data))

    for run in runs:
        for stage in STAGES if options.stage != "bench" else []:
            run.load(stage)  # refuse before anything is written
        if run.folder.is_file():
            refuse(f"--out {run.folder} is a file")

    for run in runs:
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"{options.task}, preset {options.preset}, seed {run.config.seed}, {device} ({name}), torch {torch.__version__}", flush=True)
        if options.stage == "bench":
            bench(run)
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.json").write_text(json.dumps(asdict(run.config), indent=1) + "\n")
        print(f"writing {run.folder}/: config.json, metrics.jsonl, a checkpoint a stage, figures", flush=True)

        def stop(number, frame):
            if run.stop is not None:
                raise SystemExit(128 + number)
            run.stop = number
            print("\nstopping at the end of this round (again: at once)", flush=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        results[run.config.seed] = run_stages(run, options.stage)
        if options.stage == "all":
            (run.folder / "result.json").write_text(json.dumps(results[run.config.seed], indent=1) + "\n")
        if run.stop is not None:
            raise SystemExit(128 + run.stop)
    if results:
        print_table(options.task, results)
    if len(results) > 1:
        together = Path(f"{folder}-results.json")
        together.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nwritten to {together}")


if __name__ == "__main__":
    main()
