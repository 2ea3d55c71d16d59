"""Internal RL in one file: reinforce the thoughts of a pretrained sequence model instead of its tokens.

A minimal PyTorch reimplementation of "Emergent temporal abstractions in autoregressive models enable hierarchical
reinforcement learning" (arXiv:2512.20605; sections, equations and tables cited below are the paper's).

The story
    1. pretrain   A causal transformer learns to predict the actions of an expert that pursues hidden subgoals.
    2. probe      A linear read-out finds the hidden subgoal in the middle of its residual stream.
    3. steer      One low-rank linear map per subgoal, added in the middle, makes the frozen model pursue that subgoal.
    4. discover   Without labels, a metacontroller learns to emit such maps, to hold them, and when to switch them.
    5. rl         A small policy learns from one sparse reward per episode which codes to emit: internal RL.
                  Token-level RL on the same model, with as many episodes, never sees a reward.

                                      s = f_emb(e_1…e_T)  sees the future; replaced by the policy π(z | e) in stage 5
                                                  │
    o_1…o_t ─► blocks 1…l ─► e_t ─┬─► history h ──┼─► encoder ─► μ_t, Σ_t ─► z̃_t ─┐
                                  │               └─► switch gate β_t ────────────┴─► z_t = β_t z̃_t + (1−β_t) z_{t−1}
                                  │                                                     │ hypernetwork
                                  └─► ê_t = e_t + U_t e_t ◄──── U_t = B(z_t)ᵀ A(z_t) ◄──┘
                                            └─► blocks l+1…L ─► p(a_t | o_1…o_t, z_1…z_t)

Glossary (code name: paper symbol, where)
    e            residual stream e_{t,l} after block l, l = L/2            base.lower, base.upper       Sec. 1
    U, A, B      linear controller U_t = B(z)ᵀA(z), rank r                 low_rank_control             Eq. 1, 11, 18
    h            causal history h_t                                        Metacontroller.history       Eq. 12
    s            summary of the whole trajectory, one vector               Metacontroller.embedder      Eq. 13
    mu, sigma    μ_t, diagonal Σ_t of the proposed code                    Metacontroller.encoder       Eq. 14, 15
    beta         switch gate β_t (1 = take the proposal, 0 = keep)         Metacontroller.switch        Eq. 16
    z            controller code z_t ∈ R^{n_z}                             integrate                    Eq. 2, 17
    alpha        weight α of the KL to N(0, I)                             discovery_loss               Eq. 3, 9
    lambda       weight λ of the next-observation loss                     pretraining_loss             Eq. 4, 5
    D, D*        expert data for the base / for everything after it        expert_batch                 App. C
Dims: B batch, T actions of an episode, C residual width, N objects (colours + walls), K subgoals, Z code, R rank, S switches.

Run it
    python internal_rl.py --task gridworld                    all stages of the quick preset; see README.md for what to expect
    python internal_rl.py --task gridworld --preset tiny      first contact, under a minute
    python internal_rl.py --help                              every setting

What differs from the paper is marked where it happens: grep "differs from the paper".
"""
import argparse
import contextlib
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

import gridworld

# ============================================================================================================== settings

STAGES = {  # name → the stages whose result it builds on
    "pretrain": [], "probe": ["pretrain"], "steer": ["pretrain"], "discover": ["pretrain"], "rl": ["pretrain", "discover"],
}


def setting(default, stage, text):
    return field(default=default, metadata={"stage": stage, "help": text})


@dataclass
class Settings:
    """Every dial, with the defaults of the `quick` preset. Each belongs to the first stage that it changes."""
    seed: int = setting(0, "pretrain", "random seed of everything that is trained")
    size: int = setting(5, "pretrain", "grid size G")
    colours: int = setting(4, "pretrain", "coloured cells O")
    walls: int = setting(1, "pretrain", "wall cells W")
    max_steps: int = setting(60, "pretrain", "episode length limit")
    subgoals: str = setting("singles", "pretrain", "pretraining tasks: 'singles' (Table A2) or 'pairs' of colours (Table A1)")
    epsilon: float = setting(0.0, "pretrain", "expert noise ε in the base model's data")
    view: str = setting("egocentric", "pretrain", "input form: 'egocentric' offsets from the agent or the paper's 'absolute' one-hots")
    width: int = setting(128, "pretrain", "residual width n_e")
    layers: int = setting(4, "pretrain", "transformer blocks L; control acts after block L/2")
    heads: int = setting(4, "pretrain", "attention heads")
    mlp: int = setting(256, "pretrain", "hidden width of each block's MLP")
    pretrain_steps: int = setting(8000, "pretrain", "base model: training steps")
    pretrain_batch: int = setting(64, "pretrain", "base model: trajectories a step")
    pretrain_lr: float = setting(3e-3, "pretrain", "base model: peak learning rate")
    weight_decay: float = setting(0.1, "pretrain", "base model: AdamW weight decay")
    cosine: bool = setting(True, "pretrain", "warm up 200 steps, then cosine decay of the learning rate to 2% (all supervised stages)")
    next_obs: float = setting(0.0, "pretrain", "λ, weight of the next-observation loss")
    bf16: bool = setting(True, "pretrain", "bfloat16 autocast in the base model while it is pretrained")
    probe_steps: int = setting(400, "probe", "linear probe: training steps")
    probe_lr: float = setting(3e-3, "probe", "linear probe: learning rate")
    steer_steps: int = setting(1000, "steer", "labelled controllers: training steps")
    steer_lr: float = setting(3e-3, "steer", "labelled controllers: learning rate")
    post_task: str = setting("0-1-2-3", "steer", "post-training task, made of withheld transitions only")
    rank: int = setting(16, "steer", "rank of a linear controller U")
    n_z: int = setting(8, "discover", "size of a controller code z")
    n_h: int = setting(32, "discover", "size of the causal history h")
    n_s: int = setting(32, "discover", "size of the trajectory summary s")
    discover_steps: int = setting(3000, "discover", "metacontroller: training steps")
    discover_batch: int = setting(64, "discover", "metacontroller (and labelled controllers, probe): trajectories a step")
    discover_lr: float = setting(3e-3, "discover", "metacontroller: learning rate")
    alpha: float = setting(0.15, "discover", "α, weight of the KL term")
    alpha_free: float = setting(0.4, "discover", "share of the steps before α starts to rise from 0")
    alpha_ramp: float = setting(0.3, "discover", "share of the steps over which α rises to its value")
    mirror: bool = setting(True, "discover", "decode each code in a randomly mirrored copy of its world")
    rl_episodes: int = setting(200_000, "rl", "episodes for internal RL, and again for token-level RL")
    rl_batch: int = setting(1024, "rl", "episodes an update")
    rl_lr: float = setting(3e-3, "rl", "internal RL: learning rate of the policy")
    raw_lr: float = setting(1e-4, "rl", "token-level RL: learning rate of the base model")
    rl_epochs: int = setting(3, "rl", "passes over each batch of episodes")
    rl_minibatch: int = setting(256, "rl", "episodes a gradient step")
    clip: float = setting(0.2, "rl", "PPO clip range")
    policy_width: int = setting(128, "rl", "hidden width of the policy")
    std_start: float = setting(1.0, "rl", "policy standard deviation at the start")
    std_end: float = setting(0.25, "rl", "policy standard deviation at the end")
    threshold: float = setting(0.5, "rl", "β above this switches (hard gate)")


PRESETS = {
    "quick": {},
    "tiny": {},
    "paper": {},
}

# ========================================================================================================== expert data

@dataclass
class Batch:
    """Expert trajectories, padded: objects [B, N] cells, agent [B, T+1] cells (the last observation included), action [B, T],
    subgoal [B, T] hidden index of the subgoal pursued (evaluation and steering only), length [B] actions taken."""
    objects: torch.Tensor
    agent: torch.Tensor
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
        return Batch(self.objects[rows], self.agent[rows, :longest + 1], self.action[rows, :longest], self.subgoal[rows, :longest],
                     self.length[rows])


def expert_batch(config, n, generator, epsilon=0.0):
    """n fresh expert trajectories of random pretraining tasks: D (epsilon = config.epsilon) or D* (epsilon = 0)."""
    tasks, subgoals = (x.to(generator.device) for x in gridworld.pretraining_tasks(config.subgoals))
    layouts = gridworld.draw_layouts(n, config.size, config.colours, config.walls, generator)
    own = torch.randint(len(tasks), (n,), generator=generator, device=generator.device)
    paths = gridworld.expert_paths(layouts, config.size, tasks[own], config.max_steps, generator, epsilon)
    subgoal = subgoals[own].gather(1, paths.stage.clamp(max=tasks.shape[1] - 1))
    return Batch(layouts.objects, paths.agent, paths.action, subgoal, paths.length)


def expert_batches(config, batch_size, generator, epsilon=0.0, count=16):
    """`count` batches of similar length each: a pool sorted by length and dealt out, which halves the padding."""
    pool = expert_batch(config, count * batch_size, generator, epsilon)
    deal = pool.length.argsort().view(count, batch_size)
    return [pool.pick(rows) for rows in deal[torch.randperm(count, generator=generator, device=generator.device)]]


def mirrored(config, batch, generator):
    """Each trajectory in a random one of the 8 rotations and reflections of its world: same colours in the same order,
    but other directions."""
    cells, actions = (x.to(batch.agent.device) for x in gridworld.symmetries(config.size))
    k = torch.randint(8, (len(batch.length), 1), generator=generator, device=generator.device)
    return replace(batch, objects=cells[k, batch.objects], agent=cells[k, batch.agent], action=actions[k, batch.action])


def base_inputs(config, objects, agent):
    """objects [B, N], agent [B, T] → [B, T, N+1], the positions of the ones in the observation vectors."""
    return gridworld.INPUTS[config.view](objects, agent, config.size, config.colours)


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


class Base(nn.Module):
    """Causal transformer over observations, split at the control layer l = L/2 into `lower` and `upper`.

    `cache` is a list with one entry a block; passing the same list again continues the sequence (acting, one step at a time).
    """

    def __init__(self, config):
        super().__init__()
        self.half = config.layers // 2
        inputs = gridworld.input_count(config.view, config.size, config.colours, config.walls)
        self.embed = nn.EmbeddingBag(inputs, config.width, mode="sum")  # = a linear layer on the one-hot observation
        nn.init.normal_(self.embed.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.action_head = nn.Linear(config.width, 4)
        self.observation_head = nn.Linear(config.width, (config.colours + config.walls + 1) * config.size ** 2)

    def run(self, x, blocks, cache):
        for i in blocks:
            x, kept = self.blocks[i](x, None if cache is None else cache[i])
            if cache is not None:
                cache[i] = kept
        return x

    def new_cache(self):
        return [None] * len(self.blocks)

    def lower(self, inputs, cache=None):
        """inputs [B, T, N+1] → e_{t,l} [B, T, C]"""
        embedded = self.embed(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)
        return self.run(embedded, range(self.half), cache)

    def last_residual(self, e, cache=None):
        return self.norm(self.run(e, range(self.half, len(self.blocks)), cache))

    def upper(self, e, cache=None):
        """e_{t,l} [B, T, C] → action logits [B, T, 4]"""
        return self.action_head(self.last_residual(e, cache))

    def forward(self, inputs):
        return self.upper(self.lower(inputs))

    def residuals(self, inputs):
        """inputs [B, T, N+1] → e_{t,0} … e_{t,L}: [L+1, B, T, C]"""
        streams = [self.embed(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)]
        for i in range(len(self.blocks)):
            streams.append(self.run(streams[-1], [i], None))
        return torch.stack(streams)


def action_loss(logits, batch):
    """Mean −ln p(a_t | …) over the actions that exist: logits [B, ≥T, 4] → scalar, nats per action."""
    valid = batch.valid
    return F.cross_entropy(logits[:, :valid.shape[1]][valid].float(), batch.action[valid])


def pretraining_loss(config, base, batch):
    """Eq. 4-5: −ln p(a_t | o_{1:t}) − λ ln p(o_{t+1} | o_{1:t}), means over steps. Returns (loss, action part)."""
    last = base.last_residual(base.lower(base_inputs(config, batch.objects, batch.agent[:, :-1])))
    action_part = action_loss(base.action_head(last), batch)
    if config.next_obs == 0:
        return action_part, action_part
    valid = batch.valid
    following = torch.cat([batch.objects[:, None].expand(-1, valid.shape[1], -1), batch.agent[:, 1:, None]], -1)  # [B, T, N+1]
    cell_logits = base.observation_head(last).unflatten(-1, (following.shape[-1], -1))  # [B, T, N+1, G²]
    observation_part = F.cross_entropy(cell_logits[valid].flatten(0, 1).float(), following[valid].flatten()) * following.shape[-1]
    return action_part + config.next_obs * observation_part, action_part


# ============================================================================================== probe, labelled controllers

class Probe(nn.Module):
    """One linear read-out of the hidden subgoal per layer: p(g_t | e_{t,l}) = softmax(U_l e_{t,l})  (Eq. 6-7)."""

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
        shape = (len(gridworld.SUBGOALS[config.subgoals]), config.rank, config.width)
        self.a, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape))

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
        width, self.rank = config.width, config.rank
        self.norm = nn.LayerNorm(width)
        self.history = nn.GRU(width, config.n_h, batch_first=True)  # Eq. 12
        # differs from the paper: f_emb is a GRU instead of a Hawk stack, because one layer is enough here.
        self.embedder = nn.GRU(width, config.n_s, batch_first=True)  # Eq. 13
        self.encoder = nn.Sequential(nn.Linear(width + config.n_h + config.n_s, 64), nn.ReLU(), nn.Linear(64, 2 * config.n_z))
        self.switch_in, self.switch_z = nn.Linear(width + config.n_h, 64), nn.Linear(config.n_z, 64, bias=False)
        self.switch_out = nn.Linear(64, 1)
        self.hypernetwork = nn.Sequential(nn.Linear(config.n_z, 32), nn.ReLU(), nn.Linear(32, 2 * config.rank * width))
        with torch.no_grad():
            self.encoder[-1].bias[config.n_z:] = -1  # initial ln σ
            self.hypernetwork[-1].bias.view(2, -1)[0].normal_()  # A reads e at unit scale whatever z is, so that B(z) learns at once

    def switch(self, features, z):
        """β_t = f_switch(e_t, h_{t−1}, z_{t−1})  (Eq. 16). features = switch_in([e_t, h_{t−1}]) [B, 64], z [B, Z] → [B]"""
        return self.switch_out(F.relu(features + self.switch_z(z))).squeeze(-1).sigmoid()

    def propose(self, e, length):
        """The non-causal half, on normalised residuals: e [B, T+1, C] → μ, ln σ [B, T+1, Z] and switch features [B, T+1, 64]."""
        h, _ = self.history(e)
        h = F.pad(h[:, :-1], (0, 0, 1, 0))  # h_{t−1}, zero at the start: [B, T+1, n_h]
        s = self.embedder(e)[0][torch.arange(len(e), device=e.device), length]  # after the last observation: [B, n_s]
        mu, log_sigma = self.encoder(torch.cat([e, h, s[:, None].expand(-1, e.shape[1], -1)], -1)).chunk(2, -1)  # Eq. 15
        return mu, log_sigma.clamp(-6, 3), self.switch_in(torch.cat([e, h], -1))

    def forward(self, e, length, generator):
        """e [B, T+1, C] of whole trajectories, length [B] → z [B, T+1, Z], beta [B, T+1], mu, log_sigma [B, T+1, Z]"""
        mu, log_sigma, features = self.propose(self.norm(e), length)
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        proposal = mu + log_sigma.exp() * noise  # Eq. 14
        z, beta = [proposal[:, 0]], [torch.ones(len(e), device=e.device)]  # β_1 = 1: the first step takes the proposal
        for t in range(1, e.shape[1]):
            beta.append(self.switch(features[:, t], z[-1]))
            z.append(integrate(beta[-1], proposal[:, t], z[-1]))
        return torch.stack(z, 1), torch.stack(beta, 1), mu, log_sigma

    def control(self, e, z):
        """ê_t = e_t + U_t e_t with U_t = f_hyp(z_t)  (Eq. 11, 18): e [..., C], z [..., Z] → [..., C]"""
        a, b = self.hypernetwork(z).unflatten(-1, (2, self.rank, -1)).unbind(-3)  # [..., R, C] each
        return low_rank_control(e, a, b)


def discovery_loss(config, base, meta, batch, alpha, generator):
    """Eq. 3, 9: −ln p(a_t | o_{1:t}, z_{1:t}) + α KL, means over the steps that have an action. Returns (loss, parts, β)."""
    world = mirrored(config, batch, generator) if config.mirror else batch
    with torch.no_grad():  # the base model is frozen; gradients only flow back through its upper blocks
        e = base.lower(base_inputs(config, batch.objects, batch.agent))
        # differs from the paper: codes are decoded in a mirrored copy of the world, because a code that means "go up" then explains nothing.
        e_world = base.lower(base_inputs(config, world.objects, world.agent)) if config.mirror else e
    z, beta, mu, log_sigma = meta(e, batch.length, generator)
    time = batch.action.shape[1]
    nll = action_loss(base.upper(meta.control(e_world[:, :time], z[:, :time])), world)
    kl = kl_to_standard_normal(mu, log_sigma)[:, :time][batch.valid].mean()
    return nll + alpha * kl, {"nll": nll.item(), "kl": kl.item()}, beta

# =========================================================================================== acting in the environment

@dataclass
class Episodes:
    """What B games left behind: agent [B, T+1] cells, action [B, T], length [B], success [B] 0/1, first [B] first colour
    visited (−1: none)."""
    agent: torch.Tensor
    action: torch.Tensor
    length: torch.Tensor
    success: torch.Tensor
    first: torch.Tensor


@torch.no_grad()
def play(config, base, layouts, task, generator, control=None):
    """Acts with the base model in every layout until all games are over. Actions are sampled at temperature 1.

    control(e [n, C], games [n], t) → ê [n, C] intervenes on the residual stream of the games that still run. It may read the
    game's state through `control.game`, which is set here.
    """
    game = gridworld.Game(layouts, config.size, task, config.max_steps)
    if control is not None:
        control.game = game
    running, cache, objects = game.rows, base.new_cache(), layouts.objects
    first = torch.full_like(game.agent, -1)
    agents, actions = [game.agent], []
    while len(running):
        e = base.lower(base_inputs(config, objects[running], game.agent[running, None]), cache)  # [n, 1, C]
        if control is not None:
            e = control(e[:, 0], running, len(actions))[:, None]
        probability = base.upper(e, cache)[:, 0].softmax(-1)
        action = torch.zeros_like(game.agent)
        noise = torch.rand(probability.shape, generator=generator, device=probability.device)
        action[running] = (probability / -noise.log()).argmax(-1)  # a draw from `probability` (the exponential race)
        game.step(action)
        actions.append(action)
        agents.append(game.agent)
        colour = game.colour_at.view(len(layouts), -1).gather(1, game.agent[:, None])[:, 0]
        first = torch.where((first < 0) & (agents[-1] != agents[-2]), colour, first)
        still = ~game.done[running]
        if not still.all():
            running, cache = running[still], [(k[still], v[still]) for k, v in cache]
    return Episodes(torch.stack(agents, 1), torch.stack(actions, 1), game.steps, (game.stage == game.goal).float(), first)


class LabelledControl:
    """Activates the labelled controllers in the order of the task, by the true number of visits so far."""

    def __init__(self, controllers, order):
        self.controllers, self.order = controllers, order  # order [K]: the subgoal each visit belongs to

    def __call__(self, e, games, t):
        return self.controllers(e, self.order[self.game.stage[games]])


class InternalControl:
    """The metacontroller while acting (Algorithm 1): the gate is hard, and `act` chooses a code only where it fires.

    act(e [n, C], games [n]) → z [n, Z]. With `hold` the first code stays for the whole episode.
    """

    def __init__(self, config, meta, act, batch, hold=False):
        device = next(meta.parameters()).device
        self.meta, self.act, self.hold, self.threshold = meta, act, hold, config.threshold
        self.h, self.z = torch.zeros(1, batch, config.n_h, device=device), torch.zeros(batch, config.n_z, device=device)
        self.trace = []  # (games, β, fired) of every step

    def __call__(self, e, games, t):
        x, h = self.meta.norm(e), self.h[:, games]
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


def clipped_surrogate(log_prob, old_log_prob, advantage, mask, clip):
    """PPO's clipped objective summed over an episode's steps (Eq. 10), as a loss: [B, S] (advantage [B]) → scalar"""
    ratio = (log_prob - old_log_prob).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    return -(gain * mask).sum(1).mean()


def reinforce(config, parameters, optimizer, success, log_prob_of, old_log_prob, mask, generator):
    """PPO epochs over one batch of episodes. log_prob_of(rows) → [b, S] under the current parameters. Returns the last loss."""
    gain, loss = advantage(success), torch.zeros(())
    if success.std(correction=0) == 0:
        return 0.0  # every advantage is 0, and so is the gradient
    for _ in range(config.rl_epochs):
        for rows in torch.randperm(len(success), generator=generator, device=success.device).split(config.rl_minibatch):
            loss = clipped_surrogate(log_prob_of(rows), old_log_prob[rows], gain[rows], mask[rows], config.clip)
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
                     lambda rows: gaussian_log_prob(z[rows], policy(e[rows])[0], std), old, mask, generator)
    return {"loss": loss, "success": episodes.success.mean().item(), "switches": actor.count.float().mean().item()}


def raw_rl_round(config, base, optimizer, layouts, task, generator):
    """The baseline: the same update on the base model's own action tokens, all of θ trained (App. C.4.1). Returns metrics."""
    episodes = play(config, base, layouts, task, generator)
    mask = torch.arange(episodes.action.shape[1], device=episodes.length.device) < episodes.length[:, None]

    def log_prob_of(rows):
        logits = base(base_inputs(config, layouts.objects[rows], episodes.agent[rows, :-1]))
        return logits.log_softmax(-1).gather(-1, episodes.action[rows, :, None])[..., 0]

    with torch.no_grad():
        everything = torch.arange(len(layouts), device=mask.device)
        old = log_prob_of(everything) if episodes.success.any() else torch.zeros(mask.shape)
    loss = reinforce(config, list(base.parameters()), optimizer, episodes.success, log_prob_of, old, mask, generator)
    return {"loss": loss, "success": episodes.success.mean().item(), "length": episodes.length.float().mean().item()}

# =========================================================================================== what to look at: gates, codes

def gate_scores(beta, batch, threshold):
    """Precision and recall of β > threshold against true subgoal changes, ±1 step; the first step is a switch by
    construction and does not count. beta [B, T+1] → (precision, recall), nan where there is nothing to score."""
    time = batch.action.shape[1]
    valid = batch.valid[:, 1:]
    true = (batch.subgoal[:, 1:] != batch.subgoal[:, :-1]) & valid
    fired = (beta[:, 1:time] > threshold) & valid
    near = lambda x: F.max_pool1d(x[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    return ((fired & near(true)).sum() / fired.sum()).item(), ((true & near(fired)).sum() / true.sum()).item()


def explained_variance(x, y):
    """R² of a linear read-out of y [n, D] from x [n, Z], fitted on one half of the rows and scored on the other."""
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    y = y.double()
    half = len(x) // 2
    weight = torch.linalg.lstsq(x[:half], y[:half]).solution
    residual = y[half:] - x[half:] @ weight
    return 1 - (residual.var(0).sum() / y[half:].var(0).sum()).item()


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
    row, column = batch.objects // config.size, batch.objects % config.size
    agent = batch.agent[:, :time]
    target = first[batch.subgoal]  # [B, T]
    offset = torch.stack([row.gather(1, target) - agent // config.size, column.gather(1, target) - agent % config.size], -1)[fired]
    return {"goal_accuracy": accuracy, "r2_direction": explained_variance(codes, offset.float()),
            "r2_distance": explained_variance(codes, offset.abs().sum(-1, keepdim=True).float())}


def held_codes(config, base, meta, codes, layouts, generator):
    """Which colour does each code reach first when it is held for a whole episode? codes [n, Z], m layouts for every code
    → counts [n, O+1], the last column for episodes that reach none."""
    repeated = layouts[torch.arange(len(layouts), device=codes.device).repeat(len(codes))]
    each = codes.repeat_interleave(len(layouts), 0)
    control = InternalControl(config, meta, lambda e, games: each[games], len(each), hold=True)
    episodes = play(config, base, repeated, [0], generator, control)
    first = episodes.first.view(len(codes), -1) % (config.colours + 1)  # −1 → O
    return F.one_hot(first, config.colours + 1).sum(1)
