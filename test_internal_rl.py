"""Tests: independent computations, no leak from the future, invariants, and the documented commands on the tiny preset."""
import ast
import collections
import copy
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import gymnasium
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are tiny; several threads only get in each other's way

import mujoco
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env

import ant_tasks as ant
import gridworld
import internal_rl as rl

HERE = Path(__file__).parent
CONFIG = rl.configure("gridworld", "quick", width=32, heads=2, layers=4, walls=2, rank=5, bf16=False)
PAPER = dict(n_z=8, code_std=0.0, rate=0.0)  # codes as in the paper


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def base_model(config):
    torch.manual_seed(0)
    model = rl.Base(config)
    for block in model.blocks:
        if isinstance(block, rl.Block):
            torch.nn.init.normal_(block.position_bias.weight)  # as after training, so that positions matter
    return model


@pytest.fixture
def base():
    return base_model(CONFIG)


@pytest.fixture
def meta():
    torch.manual_seed(1)
    return rl.Metacontroller(CONFIG)


@pytest.fixture
def batch():
    return gridworld.expert_batch(CONFIG, 24, generator())


# ---------------------------------------------------------------------------------------------------------------- gridworld

def test_pretraining_tasks_match_tables_and_withhold_transitions():
    for kind in ("pairs", "singles"):
        tasks = gridworld.pretraining_tasks(kind)
        assert len({tuple(task.tolist()) for task in tasks}) == 16
        for row in (tasks // gridworld.SUBGOAL_SIZE[kind]).tolist():
            assert set(row) <= set(range(gridworld.SUBGOALS))
            changes = {(a, b) for a, b in zip(row, row[1:]) if a != b}
            assert not changes & {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert gridworld.pretraining_tasks("pairs")[0].tolist() == [0, 1, 4, 5, 0, 1]  # A C A
    assert [0, 3, 2] in gridworld.pretraining_tasks("singles").tolist()


def reference_distance(layouts, i, size, start, target):
    """Breadth-first search on plain Python sets, walls and other colours blocked."""
    blocked = set(layouts.walls[i].tolist()) | set(layouts.colours[i].tolist()) - {target}
    queue, seen = collections.deque([(start, 0)]), {start}
    while queue:
        cell, steps = queue.popleft()
        if cell == target:
            return steps
        for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            r, c = cell // size + dr, cell % size + dc
            to = r * size + c
            if 0 <= r < size and 0 <= c < size and to not in seen and to not in blocked:
                seen.add(to)
                queue.append((to, steps + 1))
    return None


@pytest.mark.parametrize("size,colours,walls,kind", [(5, 4, 3, "singles"), (7, 8, 4, "pairs")])
def test_expert_paths_are_shortest(size, colours, walls, kind):
    tasks, pair = gridworld.pretraining_tasks(kind), gridworld.SUBGOAL_SIZE[kind]
    layouts = gridworld.draw_layouts(40, size, colours, walls, generator())
    paths = gridworld.expert_paths(layouts, size, tasks[torch.arange(40) % 16], 100, generator(1), subgoal_size=pair)
    assert (paths.success == 1).all() and paths.valid.sum() == paths.length.sum()
    for i in range(40):
        cell, pursued = int(layouts.agent[i]), []
        for colour in tasks[i % 16].tolist():
            target = int(layouts.colours[i, colour])
            pursued += [colour // pair] * reference_distance(layouts, i, size, cell, target)
            cell = target
        total = len(pursued)
        assert int(paths.length[i]) == total and paths.subgoal[i, :total].tolist() == pursued
        assert int(paths.observation[i, total, -1]) == cell


def test_expert_noise_never_ends_an_episode_and_uses_all_shortest_moves():
    layouts = gridworld.draw_layouts(200, 5, 4, 2, generator())
    tasks = gridworld.pretraining_tasks("singles")[torch.arange(200) % 16]
    noisy = gridworld.expert_paths(layouts, 5, tasks, 60, generator(1), epsilon=0.2)
    game = gridworld.Game(layouts, 5, tasks, 60)
    for t in range(noisy.action.shape[1]):
        game.step(noisy.action[:, t])
    assert (game.visits == 3).all() and (noisy.success == 1).all()
    clean = gridworld.expert_paths(layouts, 5, tasks, 60, generator(1))
    assert noisy.length.float().mean() > clean.length.float().mean()
    again = gridworld.expert_paths(layouts, 5, tasks, 60, generator(2))
    assert torch.equal(again.length, clean.length) and not torch.equal(again.observation, clean.observation)


def test_bayes_floor_matches_a_slow_filter():
    tasks = gridworld.pretraining_tasks("singles")
    layouts = gridworld.draw_layouts(12, 5, 4, 2, generator())
    own = torch.arange(12)
    paths = gridworld.expert_paths(layouts, 5, tasks[own], 60, generator(1))
    blind = right = 0.0

    def probability(i, target, cell, action):
        here = reference_distance(layouts, i, 5, cell, target)
        if here is None:  # cut off from it by the colour just visited: this task would not have come here
            return 0
        blocked = set(layouts.walls[i].tolist()) | set(layouts.colours[i].tolist()) - {target}
        good = []
        for a, (dr, dc) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            r, c = cell // 5 + dr, cell % 5 + dc
            if 0 <= r < 5 and 0 <= c < 5 and r * 5 + c not in blocked:
                if reference_distance(layouts, i, 5, r * 5 + c, target) == here - 1:
                    good.append(a)
        return (action in good) / len(good)

    for i in range(12):
        weight, stage = np.full(16, 1 / 16), np.zeros(16, dtype=int)
        for t in range(int(paths.length[i])):
            cell, action, to = int(paths.observation[i, t, -1]), int(paths.action[i, t]), int(paths.observation[i, t + 1, -1])
            p = np.array([probability(i, int(layouts.colours[i, tasks[m, stage[m]]]), cell, action) if stage[m] < 3 else 0 for m in range(16)])
            right += max(sum(w for w, task, s in zip(weight, tasks.tolist(), stage) if s < 3 and task[s] == k) for k in range(4))
            blind -= np.log((weight * p).sum())
            weight = weight * p / (weight * p).sum()
            for m in range(16):
                stage[m] += stage[m] < 3 and to == int(layouts.colours[i, tasks[m, stage[m]]])
    steps = paths.length.sum().item()
    assert gridworld.bayes_floor(layouts, 5, paths, tasks, 60) == pytest.approx((blind / steps, right / steps), abs=1e-5)


def test_batched_game_equals_gymnasium_on_random_play():
    size, colours, walls, task = 5, 4, 2, "1-0-3"
    layouts = gridworld.draw_layouts(30, size, colours, walls, generator())
    game = gridworld.Game(layouts, size, gridworld.parse_task(task, colours), 25)
    envs = [gymnasium.make("GridworldPinpad-v0", size=size, colours=colours, walls=walls, max_steps=25, task=task).unwrapped for _ in range(30)]
    for i, env in enumerate(envs):
        env.reset(options={"agent": int(layouts.agent[i]), "colours": layouts.colours[i].tolist(), "walls": layouts.walls[i].tolist()})
    over, ends = [False] * 30, collections.Counter()
    for t in range(25):
        actions = torch.randint(4, (30,), generator=generator(t))
        reward, terminated, truncated = game.step(actions)
        for i, env in enumerate(envs):
            if not over[i]:
                observation, r, term, trunc, info = env.step(int(actions[i]))
                assert (r, term, trunc) == (reward[i], terminated[i], truncated[i])
                assert (info["agent"], info["visits"]) == (int(game.agent[i]), int(game.visits[i]))
                assert observation.reshape(-1, size * size)[-1].argmax() == info["agent"] and observation.sum() == colours + walls + 1
                over[i] = term or trunc
                ends[(term, trunc)] += over[i]
    assert all(over) and ends[(True, False)] and ends[(False, True)]


def scripted(task, max_steps=20):
    """3×3:  0 . 1 / @ # . / . . .   as a Gymnasium environment."""
    env = gymnasium.make("GridworldPinpad-v0", size=3, colours=2, walls=1, max_steps=max_steps, task=task, render_mode="ansi").unwrapped
    env.reset(options={"agent": 3, "colours": [0, 2], "walls": [4]})
    return env


def test_a_visit_needs_a_move():
    env = scripted("0-1")
    assert env.render() == "0 . 1\n@ # .\n. . ."
    assert env.step(gridworld.RIGHT)[4]["agent"] == 3  # a wall is a no-op
    assert env.step(gridworld.UP)[4]["visits"] == 1
    for action in (gridworld.UP, gridworld.LEFT):  # standing on colour 0, off the grid: not a second, wrong visit
        _, reward, terminated, _, info = env.step(action)
        assert (reward, terminated, info["visits"]) == (0, False, 1)
    env.step(gridworld.RIGHT)
    _, reward, terminated, truncated, _ = env.step(gridworld.RIGHT)
    assert (reward, terminated, truncated) == (1, True, False)


def test_wrong_colour_and_time_limit_end_differently():
    assert scripted("1-0").step(gridworld.UP)[1:4] == (0.0, True, False)
    env = scripted("1-0", max_steps=1)
    assert env.step(gridworld.DOWN)[1:4] == (0.0, False, True)
    assert scripted("0", max_steps=1).step(gridworld.UP)[1:4] == (1.0, True, False)


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_gymnasium_checks(mode):
    env = gymnasium.make("GridworldPinpad-v0", render_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    first, info = env.reset(seed=5)
    again, _ = env.reset(seed=5)
    assert np.array_equal(first, again) and first.shape == (637,) and info["visits"] == 0
    assert not np.array_equal(first, env.reset(seed=6)[0])


@pytest.mark.parametrize("options,words", [
    ({"agent": 0, "colours": [0, 2]}, "same cell"), ({"agent": 99}, "whole numbers"), ({"colours": [1]}, "2 needed"),
    ({"agent": 0, "colours": [2, 8], "walls": [1]}, None), ({"task": "0-0"}, "twice"), ({"task": "0-7"}, "colour 7"), ({"x": 1}, "unknown"),
])
def test_given_layouts(options, words):
    env = gymnasium.make("GridworldPinpad-v0", size=3, colours=2, walls=1, max_steps=9, task="0-1").unwrapped
    if words is None:
        assert env.reset(options=options)[1]["walls"].tolist() == [1]
    else:
        with pytest.raises(ValueError, match=words):
            env.reset(options=options)


def test_impossible_layout_is_refused():
    env = gymnasium.make("GridworldPinpad-v0", size=3, colours=1, walls=2, max_steps=9, task="0").unwrapped
    with pytest.raises(ValueError, match="impossible"):
        env.reset(options={"agent": 0, "colours": [8], "walls": [1, 3]})


def test_symmetries_commute_with_the_rules():
    cells, actions = gridworld.symmetries(5)
    to = gridworld.neighbours(5)
    assert len({tuple(row.tolist()) for row in cells}) == 8
    for k in range(8):
        for a in range(4):
            assert torch.equal(to[cells[k], actions[k, a]], cells[k, to[:, a]])


def test_inputs_stand_for_the_one_hot_observation(batch):
    places = gridworld.absolute_inputs(batch.observation, 5, 4)
    one_hot = gridworld.one_hot_observation(batch.observation[:, 3], 5)
    assert torch.equal(F.one_hot(places[:, 3], gridworld.input_count("absolute", 5, 4, 2)).sum(1).float(), one_hot)
    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(one_hot.shape[1], 6, mode="sum")
    assert torch.allclose(table(places[:, 3]), one_hot @ table.weight, atol=1e-5)
    assert gridworld.egocentric_inputs(batch.observation, 5, 4).max() < gridworld.input_count("egocentric", 5, 4, 2)


# -------------------------------------------------------------------------------------------------------------------- model

@pytest.fixture(scope="module", params=[(name, kind) for name in ("gridworld", "ant") for kind in ("transformer", "windowed", "hawk")], ids="-".join)
def world(request):
    """A base model of each kind in each world, and expert trajectories of that world."""
    name, kind = request.param
    sizes = {"walls": 2} if name == "gridworld" else {"max_steps": 250, "thin": 1.0, "bursts": 0.0}
    config = rl.configure(name, "quick", width=32, heads=2, layers=4, rank=5, window=5 * (kind == "windowed"), **sizes)
    block = ant.Block if kind == "hawk" else rl.Block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.module, "Block", block, raising=False)
        base = base_model(config)
    assert {type(block) for block in base.blocks} == {block}
    return config, base, config.module.expert_batch(config, 12, generator())


def test_each_world_has_its_own_kind_of_block():
    blocks = {name: {type(block) for block in rl.Base(rl.configure(name, "tiny")).blocks} for name in ("gridworld", "ant")}
    assert blocks == {"gridworld": {rl.Block}, "ant": {ant.Block}}


def test_base_cannot_see_the_future(world):
    config, base, batch = world
    x = batch.observation
    changed = x.clone()
    changed[:, 5:] = rl.mirrored(config, batch, generator(9)).observation[:, 5:]
    with torch.no_grad():
        assert torch.allclose(base(x)[:, :5], base(changed)[:, :5], atol=1e-6)
        assert not torch.allclose(base(x)[:, 5:], base(changed)[:, 5:], atol=1e-3)


def test_cached_acting_equals_the_full_forward(world):
    """For the Hawk this is also: the parallel scan equals the recurrence."""
    config, base, batch = world
    x, cache = batch.observation[:, :60], [None] * config.layers
    with torch.no_grad():
        steps = [base.upper(base.lower(x[:, t:t + 1], cache), cache) for t in range(x.shape[1])]
        assert torch.allclose(torch.cat(steps, 1), base(x), atol=1e-4)


def test_a_block_sees_as_far_back_as_its_window(world):
    config, base, _ = world
    x = torch.randn(1, 12, 32, generator=generator(), requires_grad=True)
    seen = torch.autograd.grad(base.blocks[0](x)[0][0, 9].square().sum(), x)[0][0].abs().sum(-1) > 0
    assert seen.tolist() == [(t >= 5 if config.window else True) and t <= 9 for t in range(12)]


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 50])
def test_scan_equals_the_recurrence_with_its_gradient(time):
    torch.manual_seed(time)
    a, b = (torch.rand(3, time, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h, states = torch.zeros(3, 5, dtype=torch.float64), []
    for t in range(time):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    expected, weight = torch.stack(states, 1), torch.randn(3, time, 5, dtype=torch.float64)
    found = ant.LinearRecurrence.apply(a, b)
    assert torch.allclose(found, expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (a, b)) for x in (found, expected))
    assert all(torch.allclose(x, y) for x, y in zip(ours, theirs))


def old_relative_bucket(distance):
    """As first written, for distances [...] ≥ 0."""
    far = 16 + (distance.clamp(min=1) / 16).log() / math.log(128 / 16) * 16
    return torch.where(distance < 16, distance, far.long().clamp(max=31))


@pytest.mark.parametrize("time,seen", [(1, 1), (1, 40), (7, 7), (3, 20), (200, 200)])
def test_relative_buckets(time, seen):
    bucket, future = rl.relative_bucket(time, seen, 0, torch.device("cpu"))
    ago = torch.arange(seen - time, seen)[:, None] - torch.arange(seen)
    assert torch.equal(bucket, old_relative_bucket(ago.clamp(min=0))) and torch.equal(future, ago < 0)
    hidden = rl.relative_bucket(time, seen, 5, torch.device("cpu"))[1]  # each sees itself and four steps before it
    assert torch.equal(hidden, (ago < 0) | (ago > 4)) and (~hidden).sum(1).tolist() == [min(5, seen - time + i + 1) for i in range(time)]
    assert bucket[-1].flip(0)[:16].tolist() == list(range(min(16, seen))) and bucket.max() <= 31  # the last query: exact up to 15 steps
    assert (bucket[-1].diff() <= 0).all() and (seen < 130 or bucket.max() == 31)


def test_steps_at_which_a_cell_is_entered_against_a_loop():
    config = rl.configure("ant", "quick", max_steps=250, thin=0.1, bursts=0.0, width=32, heads=2)
    batch = ant.expert_batch(config, 6, generator())
    cells = ant.places(batch.observation, 4)[..., -1].tolist()
    chosen = ant.thinned(replace(config, thin=1e-6), batch, 1.0, generator())
    inner = lambda thinned, rows: (thinned.length - chosen.length[rows]).sum() / (batch.length - chosen.length)[rows].sum()
    assert 0.06 < inner(ant.thinned(config, batch, 1.0, generator()), [0, 1, 3, 5]) < 0.14  # of longer episodes there are fewer
    assert 0.28 < inner(ant.thinned(config, batch, 0.5, generator()), [0, 3]) < 0.36
    base, errors = rl.Base(config), []
    predicted = base.head.observation(base.last_residual(base.lower(chosen.observation[:, :-1])))
    for i, path in enumerate(cells):
        length = int(batch.length[i])
        steps = [t for t in range(length) if t == 0 or path[t] != path[t - 1]]
        assert ant.entries(batch, 4)[i].nonzero()[:, 0].tolist() == steps and chosen.length[i] == len(steps)
        assert torch.equal(chosen.observation[i, :len(steps)], batch.observation[i, steps])
        assert (chosen.observation[i, len(steps):] == batch.observation[i, length]).all()  # the last observation
        assert torch.equal(chosen.action[i, :len(steps)], batch.action[i, steps]) and torch.equal(chosen.subgoal[i, :len(steps)], batch.subgoal[i, steps])
        for k, following in enumerate([*steps[1:], length]):  # "next" is where the next cell is entered
            errors.append(0.5 * ((predicted[i, k] - batch.observation[i, following]) ** 2).sum())
    loss, action_part = rl.pretraining_loss(config, base, chosen)
    assert loss.item() == pytest.approx((action_part + 10 * sum(errors) / len(errors)).item(), rel=1e-5)
    at = torch.minimum(torch.arange(batch.observation.shape[1]), batch.length[:, None])  # all steps, then the last observation
    before = at[:, :-1].clamp(max=batch.action.shape[1] - 1)
    row = torch.arange(len(at))[:, None]
    every = replace(batch, observation=batch.observation[row, at], action=batch.action[row, before], subgoal=batch.subgoal[row, before])
    whole = ant.thinned(config, batch, 0.0, generator())
    assert all(torch.equal(x, y) for x, y in zip(vars(whole).values(), vars(every.pick([0])).values()))
    assert ant.thinned(replace(config, thin=1.0), batch, 1.0, generator()) is batch
    assert gridworld.thinned(CONFIG, batch, 0.0, generator()) is batch


def test_torque_log_prob_against_torch():
    out, torques = torch.randn(5, 16), torch.randn(5, 8)
    normal = torch.distributions.Normal(out[:, :8], out[:, 8:].exp())
    assert torch.allclose(ant.log_prob(out, torques), normal.log_prob(torques).sum(-1), atol=1e-4)
    draws = ant.sample(out[:1].expand(20_000, -1), generator())
    assert torch.allclose(draws.mean(0), out[0, :8], atol=0.1) and torch.allclose(draws.std(0).log(), out[0, 8:], atol=0.05)


def test_move_log_prob_against_torch(base, batch):
    logits = torch.randn(6, 3, 4)
    action = torch.randint(4, (6, 3), generator=generator())
    assert torch.allclose(gridworld.log_prob(logits, action), torch.distributions.Categorical(logits=logits).log_prob(action), atol=1e-6)
    draws = gridworld.sample(logits[0, :1].expand(20_000, -1), generator())
    assert torch.allclose(draws.bincount(minlength=4) / 20_000, logits[0, 0].softmax(-1), atol=0.015)
    out = base(batch.observation[:, :-1])
    expected = F.cross_entropy(out[batch.valid], batch.action[batch.valid])
    assert rl.action_loss(CONFIG, out, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_losses_ignore_padding(base, meta, batch):
    longer = replace(batch, observation=F.pad(batch.observation, (0, 0, 0, 4), value=3), action=F.pad(batch.action, (0, 4), value=2),
                     subgoal=F.pad(batch.subgoal, (0, 4), value=1))
    for a, b in zip(rl.pretraining_loss(CONFIG, base, batch), rl.pretraining_loss(CONFIG, base, longer)):
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        for forget in (lambda: None, meta.forget_codes):
            forget()
            one, two = (meta.eval()(base.lower(x.observation), x.length, generator()) for x in (batch, longer))
            for a, b in zip(one[1:], two[1:]):  # z differs, because its noise does
                assert torch.allclose(a, b[:, :a.shape[1]], atol=1e-5)


def test_a_process_without_rows_takes_the_last(batch, monkeypatch):
    monkeypatch.setattr(rl, "WORLD_SIZE", 3)
    for rank, rows in enumerate(([0, 3], [1, 4], [2])):
        monkeypatch.setattr(rl, "RANK", rank)
        assert rl.mine(torch.arange(5)).tolist() == rows and rl.mine(torch.arange(2)).tolist() == [min(rank, 1)]
        assert torch.equal(rl.mine(batch.pick([0, 1])).length, batch.length[[min(rank, 1)]])


def test_next_observation_loss_against_a_loop(base, batch):
    config = replace(CONFIG, next_obs=0.5)
    loss, action_part = rl.pretraining_loss(config, base, batch)
    last = base.last_residual(base.lower(batch.observation))
    total, count = 0.0, 0
    for i in range(len(batch.length)):
        for t in range(int(batch.length[i])):
            logits = base.head.observation(last[i, t]).view(-1, 25).log_softmax(-1)
            total -= sum(logits[j, cell] for j, cell in enumerate(batch.observation[i, t + 1].tolist()))
            count += 1
    assert torch.allclose(loss, action_part + 0.5 * total / count, rtol=1e-5)


def test_zero_control_leaves_the_base_unchanged(base, meta, batch):
    e = base.lower(batch.observation)
    with torch.no_grad():
        meta.hyper.write.zero_()
        meta.alpha.zero_()
    assert torch.equal(meta.hyper(e, torch.randn(*e.shape[:2], 4)), e)
    assert torch.equal(rl.LabelledControllers(CONFIG)(e[:, :-1], batch.subgoal), e[:, :-1])
    loss, nll, _, _ = rl.discovery_loss(CONFIG, base, meta, batch, generator())
    expected = rl.action_loss(CONFIG, base(batch.observation[:, :-1]), batch).item()
    assert loss.item() == pytest.approx(expected, abs=1e-6) and nll.item() == pytest.approx(expected, abs=1e-6)


def low_rank_control(e, a, b):
    """ê = e + Bᵀ(A e)/√C  (Eq. 11): e [..., C], a, b [..., R, C] → [..., C]."""
    read = (a @ e.unsqueeze(-1)) / math.sqrt(e.shape[-1])  # [..., R, 1]
    return e + (b.transpose(-1, -2) @ read).squeeze(-1)


def test_low_rank_control_is_the_matrix_product(meta):
    e, z, hyper = torch.randn(3, 2, 32), torch.randn(3, 2, 4), meta.hyper
    hidden = torch.cat([hyper.units(z), torch.ones(3, 2, 1)], -1)  # [3, 2, J+1]
    a, b = (torch.einsum("btj,jrc->btrc", hidden, weight) for weight in (hyper.read, hyper.write))  # A(z), B(z), Eq. 18
    assert a.shape == (3, 2, 5, 32)
    expected = torch.empty_like(e)
    for i in range(3):
        for t in range(2):
            u = b[i, t].T @ a[i, t] / 32 ** 0.5
            assert not torch.allclose(u, u.T, atol=1e-3)
            expected[i, t] = e[i, t] + u @ e[i, t]
    assert torch.allclose(low_rank_control(e, a, b), expected, atol=1e-5)
    assert torch.allclose(rl.linear_control(e, hidden, hyper.read, hyper.write), expected, atol=1e-5)
    assert torch.allclose(hyper(e, z), expected, atol=1e-5)
    hyper.bias = True  # the control of e + b(z)
    added = hyper(e, z) - e
    assert torch.allclose(added, b[:, :, 0], atol=1e-5) and torch.allclose(hyper(e + 1, z) - e - 1, added, atol=1e-5)


@pytest.mark.parametrize("rank", [5, 0])
def test_labelled_controllers_are_one_matrix_a_subgoal(rank):
    torch.manual_seed(rank)
    controllers = rl.LabelledControllers(replace(CONFIG, rank=rank)).double()
    torch.nn.init.normal_(controllers.b)
    assert controllers.b.shape == (4, rank or 32, 32) and controllers.a.requires_grad == (rank > 0)
    e, subgoal = torch.randn(6, 9, 32, dtype=torch.float64), torch.randint(3, (6, 9), generator=generator())  # the last of the four never
    found, old = controllers(e, subgoal), low_rank_control(e, controllers.a[subgoal], controllers.b[subgoal])
    assert torch.allclose(found, old, rtol=0, atol=1e-12)
    for i in range(6):
        for t in range(9):
            a, b = controllers.a[subgoal[i, t]], controllers.b[subgoal[i, t]]
            u = b.T @ a / 32 ** 0.5
            assert rank or torch.allclose(u, b.T, atol=1e-6)  # a full matrix; √C is rounded to float32
            assert torch.linalg.matrix_rank(u) == (rank or 32)
            assert torch.allclose(found[i, t], e[i, t] + u @ e[i, t], rtol=0, atol=1e-12)
            assert torch.allclose(controllers(e[i, t], subgoal[i, t]), found[i, t], rtol=0, atol=1e-12)
    trained = [p for p in controllers.parameters() if p.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad((x ** 2).sum(), trained) for x in (found, old))):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10) and not ours[3].any() and ours[:3].any()


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 240])
def test_gates_replace_and_hold(time):
    """Against the recurrence step by step, with its gradient; hard gates replace and hold exactly."""
    torch.manual_seed(time)
    beta, proposal = torch.rand(3, time, dtype=torch.float64, requires_grad=True), torch.randn(3, time, 8, dtype=torch.float64, requires_grad=True)
    z = [proposal[:, 0]]
    for t in range(1, time):
        z.append(beta[:, t, None] * proposal[:, t] + (1 - beta[:, t, None]) * z[-1])
    expected, found, weight = torch.stack(z, 1), rl.integrate(beta, proposal), torch.randn(3, time, 8, dtype=torch.float64)
    assert torch.allclose(found, expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (beta, proposal), allow_unused=True) for x in (found, expected))
    assert all(torch.allclose(x, torch.zeros_like(x) if y is None else y) for x, y in zip(ours, theirs))
    is_open = beta > 0.5
    last = [max([0, *(s for s in range(1, t + 1) if is_open[1, s])]) for t in range(time)]
    assert torch.equal(rl.integrate(is_open.double(), proposal)[1], proposal[1, last])


def test_gate_is_causal_and_the_encoders_see_the_future(base, meta, batch):
    meta.eval()
    with torch.no_grad():
        e = base.lower(batch.observation)
        changed = e.clone()
        changed[torch.arange(24), batch.length] += torch.randn(32)
        for forget in (lambda: None, meta.forget_codes):
            forget()
            _, beta, _, mu, _ = meta(e, batch.length, generator())
            _, beta_changed, _, mu_changed, _ = meta(changed, batch.length, generator())
            assert (beta[:, 0] == 1).all() and len(beta[:, 1:].unique()) > 100
            last = batch.length[:, None] - 1  # the last step that acts, before the observation that was changed
            before = torch.arange(beta.shape[1]) <= last
            assert torch.equal(beta[before], beta_changed[before]) and not torch.equal(beta, beta_changed)
            assert (mu.gather(1, last[..., None].expand(-1, -1, 4)) - mu_changed.gather(1, last[..., None].expand(-1, -1, 4))).abs().amax((1, 2)).min() > 1e-5


def test_next_opening_against_a_loop():
    length, is_open = torch.randint(1, 12, (40,), generator=generator()), torch.rand(40, 13, generator=generator()) < 0.3
    found = rl.next_opening(is_open, length)
    for i, last in enumerate(length.tolist()):
        for t in range(13):
            later = [u for u in range(t + 1, last) if is_open[i, u]]
            assert found[i, t] == (later[0] if later else last)


def test_a_code_is_inferred_from_the_end_of_its_segment_and_nothing_else(base, meta, batch):
    """Whatever happens elsewhere changes no code, and all steps of a segment propose the same one."""
    meta.forget_codes()
    e = meta.norm(base.lower(batch.observation)).detach()
    encode = lambda e: meta.encode(e, is_open, batch.length)[0]
    is_open = torch.rand(e.shape[:2], generator=generator()) < 0.3
    end = rl.next_opening(is_open, batch.length)
    mu = encode(e)
    elsewhere = torch.ones(e.shape[:2], dtype=torch.bool).scatter(1, end, False)
    assert torch.equal(encode(torch.where(elsewhere[..., None], torch.randn_like(e), e)), mu)
    same = end[:, 1:] == end[:, :-1]
    assert torch.equal(mu[:, 1:][same], mu[:, :-1][same]) and same.any() and not same.all()


def test_centred_codes_point_everywhere(base, meta, batch):
    """A new encoder's codes all point one way; so each batch has mean 0 and spread 1 before codes get their length."""
    meta.forget_codes()
    e = base.embed(batch.observation).detach()
    starts = torch.rand(e.shape[:2], generator=generator()) < 0.3
    centred, _ = meta.encode(meta.norm(e), starts, batch.length)
    length = math.sqrt(CONFIG.n_z * (1 - CONFIG.code_std ** 2))
    raw = meta.encoder(meta.evidence(meta.norm(e), starts, batch.length))
    plain = length * F.normalize(raw, dim=-1)
    inside = torch.arange(e.shape[1]) <= batch.length[:, None]
    raw = raw - raw[inside].mean(0)
    raw = raw / (raw[inside].square().mean(0) + 1e-5).sqrt()
    assert torch.allclose(centred, length * raw / raw.norm(dim=-1, keepdim=True), atol=1e-4)
    one_way = lambda mu: mu.mean((0, 1)).norm() / length
    assert one_way(plain) > 0.5 and one_way(centred) < 0.2


@pytest.mark.parametrize("read_embedding", [False, True])
def test_the_gate_compares_the_present_with_the_step_before(read_embedding, base, meta, batch, monkeypatch):
    """e_{t−1} with e_t: the gate of step t is the gate that acting computes step by step."""
    monkeypatch.setattr(rl, "THRESHOLD", -1.0)
    config = replace(CONFIG, read_embedding=read_embedding)
    with torch.no_grad():
        e, embedding = base.lower(batch.observation), base.embed(batch.observation)
        z, beta, _, _, _ = meta(rl.meta_input(config, base, batch.observation), batch.length, generator())
        control = rl.CodeIntervention(config, meta, lambda x, games: z[games, len(control.trace)], 24)
        games = torch.arange(24)
        for t in range(5):
            controlled = control(rl.Moment(e[:, t], embedding[:, t], games, t, None))
            assert control.trace[t][2].all() and torch.allclose(controlled, meta.hyper(e[:, t], z[:, t]), atol=1e-5)
    for t in range(1, 5):
        assert torch.allclose(control.trace[t][1], beta[:, t], atol=1e-5)


def test_gradient_reaches_every_trainable_and_no_frozen_parameter(base, meta, batch):
    base.requires_grad_(False)
    for config in (CONFIG, replace(CONFIG, **PAPER)):
        meta = rl.Metacontroller(config)
        meta.alpha.fill_(0.1)
        for mirror in (False, True):
            loss, nll, kl, _ = rl.discovery_loss(config, base, meta, batch, generator(), mirror)
            assert loss.item() == pytest.approx(nll.item() + 0.1 * kl.item(), rel=1e-6)
            loss.backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in meta.parameters())
            meta.zero_grad()
            meta.forget_codes()
        assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("changes", [{}, PAPER])
def test_kl_is_charged_where_codes_are_sent_or_everywhere_as_in_the_paper(changes, base, batch):
    config = replace(CONFIG, **changes)
    torch.manual_seed(1)
    meta = rl.Metacontroller(config)
    with torch.no_grad():
        meta.gate.switch[-1].bias += 2  # so that some gates open
        _, nll, kl, beta = rl.discovery_loss(config, base, meta, batch, generator(5))
        z, _, gates, mu, log_sigma = meta(rl.meta_input(config, base, batch.observation), batch.length, generator(5))
    total, opened = 0.0, 0
    for i, length in enumerate(batch.length.tolist()):
        for t in range(length):
            normal = torch.distributions.Normal(mu[i, t], log_sigma[i, t].exp())
            one = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum().item()
            total += one * (gates[i, t].item() if config.code_std else 1)
            opened += gates[i, t].item()
    assert kl.item() == pytest.approx(total / batch.length.sum().item(), rel=1e-4)
    if config.code_std:
        assert set(gates.round(decimals=6).unique().tolist()) == {0, 1} and (gates[:, 0] == 1).all() and len(batch.length) < opened < batch.length.sum()
        assert kl.item() == pytest.approx(opened / batch.length.sum().item() * -4 * math.log(0.4), rel=1e-4)  # every code costs the same
    else:
        assert torch.equal(gates, beta) and ((beta[:, 1:] > 0) & (beta[:, 1:] < 1)).all() and log_sigma.unique().numel() > 100


def test_codes_have_one_length_and_look_like_draws_from_the_prior(base, meta, batch):
    with torch.no_grad():
        z, _, gates, mu, log_sigma = meta(base.embed(batch.observation), batch.length, generator())
    assert torch.allclose((mu ** 2).sum(-1) + 4 * 0.4 ** 2, torch.tensor(4.0), atol=1e-4)
    assert torch.allclose(log_sigma, torch.full_like(mu, math.log(0.4)))
    assert (z ** 2).sum(-1).mean().item() == pytest.approx(4, rel=0.1)
    held = (gates[:, 1:] == 0)
    assert torch.equal(z[:, 1:][held], z[:, :-1][held]) and held.any() and not held.all()


def test_gates_are_drawn_in_training_only_and_pass_gradients_as_if_they_were_beta(base, meta, batch):
    e = base.embed(batch.observation).detach()
    def gates(seed):
        return meta(e, batch.length, generator(seed))[1:3]
    beta, drawn = gates(0)
    assert not torch.equal(drawn, gates(1)[1])
    shares = torch.stack([gates(seed)[1][:, 1] for seed in range(200)]).mean(0)
    seen = torch.stack([gates(seed)[0][:, 1] for seed in range(200)]).mean(0)
    assert (shares - seen).abs().mean() < 0.03
    parameters = list(meta.gate.switch.parameters())
    ours, theirs = (torch.autograd.grad(x[:, 1].sum(), parameters, retain_graph=True) for x in (drawn, beta))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(ours, theirs))
    meta.eval()
    beta, hard = gates(0)
    assert torch.equal(hard[:, 1:], (beta[:, 1:] > rl.THRESHOLD).float())
    meta.gate.forced = 1.0
    assert (gates(0)[0] == 1).all() and (gates(0)[1] == 1).all()


def test_alpha_follows_the_rate():
    alpha = torch.tensor(0.01)
    for kl, factor in ((2.4, math.exp(0.02)), (99.0, math.exp(0.02)), (1.2, 1), (0.6, math.exp(-0.01)), (0.0, math.exp(-0.02))):
        before = alpha.item()
        rl.hold_rate(alpha, torch.tensor(kl), 1.2, 1.0)
        assert alpha.item() == pytest.approx(before * factor, rel=1e-4)
    before = alpha.item()
    rl.hold_rate(alpha, torch.tensor(2.4), 1.2, 0.25)
    assert alpha.item() == pytest.approx(before * math.exp(0.005), rel=1e-4)
    for kl, bound in ((9.0, 2), (0.0, 1e-3)):
        for _ in range(1000):
            rl.hold_rate(alpha, torch.tensor(kl), 1.2, 1.0)
        assert alpha.item() == pytest.approx(bound)


def test_the_rate_counts_cells_and_not_steps(tmp_path, monkeypatch):
    """On the ant α follows the nats of a whole batch over the cells that its torsos enter, as fast as the rest learns."""
    config, loss, seen = rl.configure("ant", "tiny", trajectories=0, thin=1.0, discover_batch=8), rl.discovery_loss, []
    monkeypatch.setattr(rl, "inspect_gates", lambda *_: {})
    monkeypatch.setattr(rl, "learning_rate", lambda config, peak, number, count: peak / 8)
    monkeypatch.setattr(rl, "hold_rate", lambda alpha, nats, rate, pace: seen.append((nats.item(), pace)))

    def spy(config, base, meta, batch, *rest):
        found = loss(config, base, meta, batch, *rest)
        seen.append((batch, found[2].item()))
        return found

    monkeypatch.setattr(rl, "discovery_loss", spy)
    rl.learn_gates(rl.Run(config, tmp_path, torch.device("cpu")), rl.Base(config).requires_grad_(False).eval(), rl.Metacontroller(config), 1)
    (batch, kl), (nats, pace) = seen
    cell = (batch.observation[..., 27:29] * config.size / 2).floor()
    cells = sum(1 + (own[1:n] != own[:n - 1]).any(-1).sum().item() for own, n in zip(cell, batch.length.tolist()))
    assert 5 * cells < batch.length.sum() and nats == pytest.approx(kl * batch.length.sum().item() / cells, rel=1e-5)
    assert pace == 0.125


def test_gates_are_learned_first_and_codes_anew(base, tmp_path, monkeypatch):
    """All parts learn while gates are learned; then encoder and f_hyp alone, from new values that the seed alone decides."""
    config = replace(CONFIG, gate_steps=16, code_steps=128, discover_batch=8)
    stages, moments, loss = [], collections.defaultdict(list), rl.discovery_loss
    monkeypatch.setattr(rl, "inspect_gates", lambda *_: {})
    monkeypatch.setattr(rl, "inspect_codes", lambda *_: ({}, None))
    monkeypatch.setattr(rl.Run, "steps", lambda run, stage, *rest, steps=rl.Run.steps, **more: (stages.append(stage), steps(run, stage, *rest, **more))[1])

    def spy(config, base, meta, batch, generator, mirror=False):
        moments[stages[-1]].append((mirror, meta.training, {name: value.clone() for name, value in meta.state_dict().items()}))
        return loss(config, base, meta, batch, generator, mirror)

    monkeypatch.setattr(rl, "discovery_loss", spy)
    run = rl.Run(config, tmp_path, torch.device("cpu"))
    meta = rl.discover(run, base.requires_grad_(False))
    assert meta.summary is None and not meta.training and not any(p.requires_grad for p in meta.parameters())
    assert {stage: len(steps) for stage, steps in moments.items()} == dict(gates=16, codes=128)
    for stage, steps in moments.items():
        for (mirror, drawn, before), (_, _, after) in zip(steps, steps[1:]):
            changed = {name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])}
            assert mirror == (stage == "codes") and drawn == (stage == "gates")
            assert changed == ({"norm", "gate", "hyper", "history", "summary", "encoder", "alpha"} if stage == "gates" else {"encoder", "hyper"})
    gates, codes = moments["gates"][-1][2], moments["codes"][0][2]
    assert not any(torch.equal(gates[name], codes[name]) for name in codes if name.startswith("hyper.") and name in gates and "weight" in name)
    torch.manual_seed(config.seed)
    new = rl.Metacontroller(config)
    torch.manual_seed(config.seed)
    new.forget_codes()
    assert all(torch.equal(codes[name], value) for name, value in new.state_dict().items() if name.startswith(("encoder.", "hyper.")))
    paper = rl.Run(replace(config, code_steps=0), tmp_path / "paper", torch.device("cpu"))
    paper.folder.mkdir()
    at_once = rl.discover(paper, base)
    assert at_once.summary is not None and stages == ["gates", "codes", "gates"]


@pytest.mark.parametrize("above", [False, True])
def test_gates_that_act_open_above_three_eighths(above, meta):
    """Drawn in training, else by a threshold: also a little to either side of it."""
    beta = torch.full((4, 9), 0.376 if above else 0.374)
    is_open, gates = meta.eval().draw_gates(beta, generator())
    assert (is_open == above).all() and torch.equal(gates > 0.5, is_open)
    assert 0 < meta.train().draw_gates(beta, generator())[0].float().mean() < 1


def test_kl_against_torch():
    mu, log_sigma = torch.randn(4, 8), torch.randn(4, 8)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, log_sigma.exp()), normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(rl.kl_to_standard_normal(mu, log_sigma), expected, atol=1e-5)


def test_mirrored_trajectories_still_obey_the_rules(batch):
    world = rl.mirrored(CONFIG, batch, generator())
    objects, agent = world.observation[:, 0, :-1], world.observation[..., -1]
    assert not torch.equal(world.observation, batch.observation)
    layouts = gridworld.Layouts(agent[:, 0], objects[:, :4], objects[:, 4:])
    game = gridworld.Game(layouts, 5, [0], 60)
    for t in range(int(batch.length.min())):
        to = game.next_cell.view(24, 25, 4)[torch.arange(24), agent[:, t], world.action[:, t]]
        assert torch.equal(to, agent[:, t + 1])


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("read_embedding", [False, True])
def test_codes_are_inferred_in_one_world_and_decoded_in_another(mirror, read_embedding, base, meta, batch, monkeypatch):
    config, seen = replace(CONFIG, read_embedding=read_embedding, bf16=False), []
    forward, upper = meta.forward, base.upper
    monkeypatch.setattr(meta, "forward", lambda e, *rest: (seen.append(e), forward(e, *rest))[1])
    monkeypatch.setattr(meta.hyper, "forward", lambda e, z: (seen.append(e), e)[1])
    with torch.no_grad():
        _, nll, _, _ = rl.discovery_loss(config, base, meta, batch, generator(3), mirror)
        image = rl.mirrored(config, batch, generator(3)) if mirror else batch
        assert torch.equal(image.observation, batch.observation) == (not mirror)
        assert torch.equal(seen[0], base.embed(batch.observation) if read_embedding else base.lower(batch.observation))
        assert torch.allclose(seen[1], base.lower(image.observation)[:, :-1], atol=1e-6)
        assert nll.item() == pytest.approx(rl.action_loss(config, base(image.observation[:, :-1]), image).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------- RL

@pytest.mark.parametrize("subgoals,task,order", [("singles", "0-1-3", [0, 1, 3]), ("pairs", "0-1-6-7-2", [0, 0, 3, 3, 1])])
def test_labels_follow_the_visits(subgoals, task, order):
    config = rl.configure("gridworld", "tiny", size=7, colours=8, subgoals=subgoals, post_task=task)
    controllers = rl.LabelledControllers(config)
    torch.nn.init.normal_(controllers.b)
    intervene, e = rl.with_labels(config, controllers), torch.randn(3, 32)
    for visits in range(len(order)):
        now = rl.Moment(e, None, torch.tensor([1, 4, 8]), 0, torch.tensor([0, visits, 0]))
        assert torch.equal(intervene(now), controllers(e, torch.tensor([order[0], order[visits], order[0]])))


def test_policy_acts_and_advances_only_at_switches_and_replay_equals_rollout(base, meta):
    torch.manual_seed(2)
    policy, meta = rl.Policy(CONFIG), copy.deepcopy(meta)
    meta.gate.switch[-1].bias.data.fill_(-0.5)  # some gates open, others do not
    layouts = gridworld.draw_layouts(64, 5, 4, 2, generator())
    actor = rl.PolicyActor(CONFIG, policy, 64, 0.7, generator(1))
    control = rl.CodeIntervention(CONFIG, meta, actor, 64)
    with torch.no_grad():
        episodes = rl.play(CONFIG, base, rl.new_game(CONFIG, layouts, [0, 1, 2, 3]), generator(2), control)
        fired = torch.zeros(64, dtype=torch.long)
        for t, (games, beta, switched) in enumerate(control.trace):
            assert torch.equal(switched, (beta > rl.THRESHOLD) | (t == 0))
            fired[games[switched]] += 1
        assert torch.equal(actor.count, fired) and fired.max() > 1 and fired.sum() < episodes.length.sum()
        mean, _ = policy(actor.e)
        mask = torch.arange(actor.z.shape[1]) < actor.count[:, None]
        assert torch.allclose(mean[mask], actor.mean[mask], atol=1e-5)
        assert torch.allclose(policy.replay(actor.e, actor.count)[mask], mean[mask], atol=1e-5)
        mean_later, _ = policy(torch.cat([actor.e[:, :1], actor.e[:, 1:] + 1], 1))
        assert torch.equal(mean[:, 0], mean_later[:, 0])


@pytest.mark.parametrize("subgoals,task,codes", [("singles", "0-1-2-3-0", 5), ("pairs", "0-1-2-3", 2)])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_policy_narrows_as_it_succeeds_not_with_time(share, subgoals, task, codes, base, meta, tmp_path, monkeypatch):
    config = replace(CONFIG, rl_episodes=60 * 8, rl_batch=8, subgoals=subgoals, post_task=task)
    run, stds, rates = rl.Run(config, tmp_path, torch.device("cpu")), [], []

    def play(config, base, game, generator, intervene):
        stds.append(intervene.choose.std)
        intervene.choose.count += 1
        return gridworld.Trajectories(None, None, None, torch.full((8,), share))

    monkeypatch.setattr(rl, "play", play)
    monkeypatch.setattr(rl, "minibatches", lambda *_: [torch.arange(8)])
    monkeypatch.setattr(rl, "descend", lambda loss, optimizer, lr: rates.append(lr))
    rl.internal_rl(run, base, meta)
    assert stds == pytest.approx([1 - 0.75 * (share * (1 - 0.9 ** n)) ** (1 / codes) for n in range(60)])
    assert rates == pytest.approx([config.rl_lr * std for std in stds])


def test_gaussian_log_prob_against_torch():
    z, mean = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.allclose(rl.gaussian_log_prob(z, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(z).sum(-1), atol=1e-4)


def test_advantage_and_surrogate_by_hand():
    gain = rl.advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    deviation = (3 / 16) ** 0.5
    assert gain.tolist() == pytest.approx([0.75 / (deviation + 1e-3)] + [-0.25 / (deviation + 1e-3)] * 3)
    old, new = torch.zeros(2, 2), torch.tensor([[0.5, 0.1], [-0.5, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # trajectory 0 (gain 2): ratio e^.5 is cut at 1 + ε; trajectory 1 (gain −1): ratio e^−.5 is cut at 1 − ε, the padding does not count
    for clip, high, low in (({}, 1.5, np.exp(-0.5)), ({"clip": 0.2}, 1.2, 0.8)):
        expected = -((2 * high + 2 * np.exp(0.1)) - low) / 2
        assert rl.clipped_surrogate(new, old, torch.tensor([2.0, -1.0]), mask, **clip).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [4, 10, 32])
def test_each_pass_covers_every_episode_once(n):
    success = (torch.arange(n) == 2).float()
    parts = [part.tolist() for part in rl.minibatches(success, generator())]
    passes = [sum(parts[i:i + 4], []) for i in (0, 4, 8)]
    assert len(parts) == 12 and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(sorted(rows) == list(range(n)) for rows in passes) and passes[0] != passes[1] != passes[2]
    for same in (torch.zeros(n), torch.ones(n)):  # every advantage is 0
        assert not list(rl.minibatches(same, generator()))


def test_gate_scores_by_hand():
    subgoal = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    batch = gridworld.Trajectories(None, torch.zeros(1, 10, dtype=torch.long), torch.tensor([10]), None, subgoal)
    beta = torch.tensor([[1.0, 0, 0, 0, 0.9, 0, 0.9, 0, 0, 0, 0]])  # one near the change at 3, one false; the change at 8 is missed
    assert rl.gate_scores(beta, batch, 1) == (0.5, 0.5)
    assert rl.gate_scores(beta, batch, 2) == (1.0, 1.0)


def test_trivial_gates_by_hand(tmp_path, monkeypatch):
    run = rl.Run(replace(CONFIG, colours=1, walls=0), tmp_path, torch.device("cpu"))
    observation = torch.tensor([[[7, cell] for cell in (1, 2, 7, 8, 7, 9)]])  # on the colour at steps 2 and 4
    batch = gridworld.Trajectories(observation, torch.zeros(1, 5, dtype=torch.long), torch.tensor([5]), None, torch.tensor([[0, 0, 1, 1, 1]]))
    monkeypatch.setattr(run, "held_out", lambda: batch)
    assert rl.trivial_gates(run) == {"coloured_precision": 0.5, "coloured_recall": 1.0, "always_precision": 0.25, "always_recall": 1.0}


def test_composition_counts_what_follows(base, tmp_path, monkeypatch):
    """A game whose outcome is decided by hand: 0 is always reached first, others in half of the layouts; then b follows a unless b = a + 1."""
    run, asked = rl.Run(CONFIG, tmp_path, torch.device("cpu")), []

    def play(config, base, game, generator, intervene):
        tasks = game.tasks.view(-1, 3)[:, :2]
        first = (tasks[:, 0] == 0) | (torch.arange(len(tasks)) % 2 == 0)
        for visits in (0, 1, 2):
            games = torch.arange(len(tasks))
            intervene(rl.Moment(torch.zeros(len(tasks), 1), None, games, 0, torch.full((len(tasks),), visits)))
            assert torch.equal(asked[-1], tasks[:, min(visits, 1)])
        success = first & (tasks[:, 1] != (tasks[:, 0] + 1) % 4)
        game.visits = first.long() + success
        return gridworld.Trajectories(None, None, None, success.float())

    monkeypatch.setattr(rl, "play", play)
    matrix = rl.composition(run, base, lambda e, subgoal: asked.append(subgoal))
    assert matrix[0].tolist() == [1, 0.5, 0.5, 0.5]
    assert all(math.isnan(matrix[a + 1, a]) for a in range(4))
    assert all(matrix[a + 1, b] == (b != (a + 1) % 4) for a in range(4) for b in range(4) if a != b)


def test_random_success_counts_all_sequences_of_moves():
    config = rl.configure("gridworld", "quick", size=3, colours=4, max_steps=7, post_task="0-1-2")
    layouts = gridworld.draw_layouts(40, 3, 4, 1, generator())
    sequences = torch.cartesian_prod(*[torch.arange(4)] * 7)
    solved = torch.zeros(40)
    for moves in sequences.split(1024):
        game = gridworld.Game(layouts[torch.arange(40).repeat_interleave(len(moves))], 3, [0, 1, 2], 7)
        for action in moves.repeat(40, 1).T:
            game.step(action)
        solved += game.success().view(40, -1).sum(1)
    assert (solved > 0).sum() > 10 and (solved == 0).any()
    torch.testing.assert_close(gridworld.random_success(config, layouts), solved.double() / 4 ** 7)


@pytest.mark.parametrize("task, product", [("0-1-2-3", 0.9 * 0.5 * 0.6 * 0.7), ("1-2-0-1", 0.1 * 0.6 * 0.4 * 0.5)])
def test_composition_scores_by_hand(task, product):
    nan = math.nan
    matrix = torch.tensor([[0.9, 0.1, 0.2, 0.3], [nan, 0.5, 1, 1], [1, nan, 0.6, 0.8], [0.4, 1, nan, 0.7], [0.1, 1, 0.6, nan]])
    scores = {"shown": (1 + 1 + 1 + 0.8 + 0.4 + 1 + 1 + 0.6) / 8, "withheld": (0.5 + 0.6 + 0.7 + 0.1) / 4, "product": product}
    assert rl.composition_scores(rl.configure("gridworld", "quick", post_task=task), matrix) == pytest.approx(scores)
    pairs = "-".join(f"{2 * int(goal)}-{2 * int(goal) + 1}" for goal in task.split("-"))
    config = rl.configure("gridworld", "quick", colours=8, subgoals="pairs", post_task=pairs)
    assert rl.composition_scores(config, matrix) == pytest.approx(scores)


@pytest.mark.parametrize("subgoals,size", [("singles", 1), ("pairs", 2)])
def test_one_code_each_finds_what_attains_a_subgoal(subgoals, size, base, meta, tmp_path, monkeypatch):
    centres = torch.tensor([[1.0, 0, 0, 1], [-1, 0, 1, 0], [0, 1, -1, 0], [0, -1, 0, -1]])

    def play(config, base, tasks, generator, held):
        k = tasks[:, 0] // size
        assert held.hold and torch.equal(tasks, k[:, None] * size + torch.arange(size))
        distance = (held.choose(None, torch.arange(len(tasks))) - centres[k]).norm(dim=1)
        return gridworld.Trajectories(None, None, None, (torch.rand(len(k), generator=generator) < (-distance).exp()).float())

    monkeypatch.setattr(rl, "new_game", lambda config, layouts, tasks: tasks)
    monkeypatch.setattr(rl, "play", play)
    run = rl.Run(rl.configure("gridworld", "tiny", size=6, colours=8, subgoals=subgoals, evaluation=1024), tmp_path, torch.device("cpu"))
    found = rl.one_code_each(run, base, meta)
    assert (found - centres).norm(dim=1).max() < 0.5 < torch.cdist(centres, centres).fill_diagonal_(9).min()


# ---------------------------------------------------------------------------------------------------------------------- ant

GAIT = [  # qpos, qvel, heading → torques
    ([-0.13686455, 0.66245898, 0.55532371, 0.91621166, 0.0541055, -0.02119909, 0.39645855, -0.05446933, 1.12194127, 0.02187957,
      -0.79499455, -0.03859357, -0.49791933, -0.07579754, 0.8729075],
     [-0.33100576, 1.54892886, -0.31118978, -0.56430937, -1.5135197, 0.09412552, 0.68293346, -1.29391741, 3.30536077, -3.7706957,
      -0.89492081, 2.02755325, -3.0737023, 1.7404427], 1.89677162,
     [0.13755518, -0.1920213, 0.02173562, -0.72389185, -0.13190183, 0.17599634, 0.08066003, -0.28445132]),
    ([0.29092672, -0.60840189, 0.54910514, 0.24111155, 0.04962355, -0.0493605, -0.96797018, -0.12544155, 0.98273645, -0.08943519,
      -0.77632724, 0.15734912, -0.8283892, -0.02213841, 0.55194293],
     [0.25168232, -1.25590204, 0.46452992, 1.18578837, -0.53102647, -0.0123854, -1.38636935, 4.01796093, -2.55832225, 5.0737273, 1.10240128,
      4.46530061, 1.25996746, -0.49784968], -1.46944684,
     [-0.16567544, 0.39994787, 0.24474089, -0.10780265, 0.44730644, -0.62630208, -0.23115638, -0.08279466]),
    ([-0.3622633, 0.49174451, 0.55829158, 0.2018435, -0.02013015, -0.11270703, 0.97270299, 0.06894765, 0.64996493, -0.05189795, -0.53300342,
      -0.08567193, -1.12373163, 0.00771716, 1.13853988],
     [-0.70285574, 0.9008355, -0.28621908, -2.74470109, 1.84458141, 0.1985619, 2.46500855, 2.3237047, -2.15211888, 1.87311284, -2.06510998,
      -3.78688049, 1.31412592, -4.16990614], 2.70816167,
     [0.02328467, -0.38095727, -0.14871084, 0.38645721, 0.11597079, -0.2616203, 0.08899681, 0.98893057]),
]


def test_gait_matches_its_test_vectors():
    qpos, qvel, heading, torque = (np.array(column) for column in zip(*GAIT))
    assert np.abs(ant.gait(qpos, qvel, heading) - torque).max() < 1e-6


def ant_game(task, ants=1, max_steps=50):
    """4×4:  @ 0 1 2 / . # . 3 / . . . . / . . . .   with ants at rest."""
    layouts = gridworld.Layouts(*(torch.tensor([cells] * ants) for cells in (0, [1, 2, 3, 7], [5])))
    layouts = ant.with_pose(layouts, 4, generator())
    layouts.qvel.zero_()
    return ant.Game(layouts, 4, gridworld.parse_task(task, 4), max_steps)


def put(game, x, y, i=0, torques=0.0):
    """Puts ant i above a point and lets one control step pass. Returns reward, terminated, truncated, reason of ant i."""
    game.simulation.qpos[i, :2] = x, y
    reward, terminated, truncated = (part[i].item() for part in game.step(np.full((len(game.done), 8), torques)))
    return reward, terminated, truncated, game.reason(i)


def test_ant_visits_colours_in_order():
    game = ant_game("0-1")
    assert put(game, -1.8, 1.8) == (0, False, False, "") and game.agent.item() == 0
    assert put(game, -0.9, 1.1) == (0, False, False, "") and game.visits.item() == 1
    assert put(game, -0.2, 1.9) == (0, False, False, "") and game.visits.item() == 1  # still on colour 0: not a second, wrong visit
    assert put(game, -0.5, -0.2) == (0, False, False, "") and game.agent.item() == 9
    assert put(game, 0.5, 1.5) == (1, True, False, "solved")
    assert put(game, -1.5, -1.5) == (0, True, False, "solved")  # over: nothing moves any more
    assert (game.agent.item(), game.steps.item(), game.visits.item()) == (2, 5, 2)


@pytest.mark.parametrize("x,y,reason", [(0.5, 1.5, "wrong colour"), (-0.5, 0.5, "wall"), (2.1, 0.5, "outside"), (-2.1, 0.5, "outside"),
                                        (0.5, 2.1, "outside"), (0.5, -2.1, "outside")])
def test_what_ends_an_ants_game(x, y, reason):
    game = ant_game("0-1")
    assert put(game, x, y) == (0, True, False, reason)
    assert put(game, -0.5, 1.5)[0] == 0 and game.visits.item() == 0  # too late


def test_ant_falls(monkeypatch):
    game = ant_game("0-1")
    game.simulation.qpos[0, 2] = 1.1
    assert put(game, -0.5, 1.5) == (0, True, False, "fallen") and game.visits.item() == 0  # the colour below it does not count
    monkeypatch.setattr(ant, "HEALTHY", (0.9, 1.0))
    assert put(ant_game("0"), -0.5, 1.5) == (0, True, False, "fallen")


def test_some_ants_see_what_all_see():
    game = ant_game("0-1", ants=3)
    for games in ([1], [2, 0], []):
        games = torch.tensor(games, dtype=torch.long)
        assert torch.equal(game.observation(games), game.observation()[games])


def test_ants_time_limit():
    game = ant_game("0-1", max_steps=2)
    assert put(game, -0.5, 1.5) == (0, False, False, "")
    assert put(game, -0.5, 1.5) == (0, False, True, "time")
    assert put(ant_game("0", max_steps=1), -0.5, 1.5) == (1, True, False, "solved")


@pytest.mark.parametrize("threads", [1, 2])
def test_broken_simulation_ends_only_its_own_game(threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ant.Simulation, "threads", threads)
    healthy, game = ant_game("0-1", ants=6), ant_game("0-1", ants=6)
    torques = np.random.default_rng(0).uniform(-1, 1, (3, 6, 8))
    for t in range(3):
        healthy.step(torques[t])
        if t == 1:
            torques[t, 0] = np.nan
            game.simulation.qvel[1] = 1e12
            game.simulation.qpos[0, :2] = -0.5, 1.5  # above the right colour
        reward, terminated, _ = game.step(torques[t])
    assert [game.reason(i) for i in range(6)] == ["simulation"] * 2 + [""] * 4
    assert reward.sum() == 0 and game.visits.sum() == 0 and terminated.tolist() == [True] * 2 + [False] * 4
    assert np.array_equal(game.simulation.state[2:], healthy.simulation.state[2:]) and torch.isfinite(game.observation()).all()
    assert not list(tmp_path.iterdir())  # no MUJOCO_LOG.TXT


def plain(state):
    """One ant without `Simulation`: an MjData in this state [30]."""
    data = mujoco.MjData(ant.Simulation.model)
    mujoco.mj_setState(ant.Simulation.model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    return data


def plain_step(data, torques):
    """One control step, the solver started cold → state [30], the first substep with a warning (or None)."""
    state, warned = np.empty(30), None
    data.ctrl[:], data.qacc_warmstart[:] = torques, 0
    for k in range(ant.SUBSTEPS):
        mujoco.mj_step(ant.Simulation.model, data)
        if warned is None and data.warning.number.any():
            warned = k
    mujoco.mj_getState(ant.Simulation.model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    return state, warned


def test_simulation_equals_plain_mujoco():
    layouts, random = ant.draw_layouts(5, 4, 4, 1, generator()), np.random.default_rng(0)
    simulation = ant.Simulation(5)
    simulation.put(slice(None), layouts.qpos.numpy(), layouts.qvel.numpy())
    datas = [plain(state) for state in simulation.state]
    for torques in random.uniform(-1, 1, (150, 5, 8)):
        assert not simulation.step(torques, np.arange(5)).any()
        assert np.array_equal(simulation.state, [plain_step(*each)[0] for each in zip(datas, torques)])


def test_a_simulation_that_breaks_in_any_substep_is_noticed():
    layouts, random = ant.draw_layouts(400, 4, 4, 1, generator()), np.random.default_rng(0)
    simulation, ends = ant.Simulation(400), collections.Counter()
    simulation.put(slice(None), layouts.qpos.numpy(), layouts.qvel.numpy())
    simulation.qvel[:] += 10 ** random.uniform(0, 11, (400, 1)) * random.standard_normal((400, 14))
    simulation.state[::2, 0] = 24.95  # s: some ants have walked for a while
    torques = random.uniform(-1, 1, (400, 8))
    torques[:20, 3] = np.nan
    before = simulation.state.copy()
    broken = simulation.step(torques, np.arange(400))
    for i in range(400):
        after, warned = plain_step(plain(before[i]), torques[i])
        assert broken[i] == (warned is not None)
        assert np.array_equal(simulation.state[i], before[i] if broken[i] else after)
        ends[warned] += 1
    assert set(ends) == {None, 0, 1, 2}, ends


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ants_do_not_depend_on_threads_or_company(threads, monkeypatch):
    layouts, orders = ant.draw_layouts(41, 4, 4, 1, generator()), np.random.default_rng(1)
    torques = np.random.default_rng(0).uniform(-1, 1, (40, 41, 8))
    together, apart = ant.Simulation(41), ant.Simulation(41)
    for simulation in (together, apart):
        simulation.put(slice(None), layouts.qpos.numpy(), layouts.qvel.numpy())
    for now in torques:
        monkeypatch.setattr(ant.Simulation, "threads", 1)
        together.step(now, np.arange(41))
        monkeypatch.setattr(ant.Simulation, "threads", threads)
        for part in np.split(orders.permutation(41), [1, 1, 4, 20]):  # of 1, 0, 3, 16 and 21 ants
            apart.step(now[part], part)
    assert np.array_equal(together.state, apart.state)


def test_ants_are_the_same_on_any_number_of_threads(monkeypatch):
    layouts, paths = ant.draw_layouts(9, 4, 4, 1, generator()), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(ant.Simulation, "threads", threads)
        paths.append(ant.expert_paths(layouts, 4, [0, 1, 2, 3], 60, generator(1), sigma=0.1))
        assert torch.equal(paths[-1].observation, paths[0].observation) and torch.equal(paths[-1].action, paths[0].action)
    assert not torch.equal(paths[0].action, ant.expert_paths(layouts, 4, [0, 1, 2, 3], 60, generator(2), sigma=0.1).action)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_of_an_ant_env_go_on_like_it(make_copy):
    original = gymnasium.make("AntPinpad-v0", max_steps=60)
    original.reset(seed=3)
    torques = np.random.default_rng(0).uniform(-1, 1, (60, 8))
    for now in torques[:5]:
        original.step(now)

    def finish(env):
        results = [env.step(now) for now in torques[5:25]]
        return results + [env.reset(), env.reset(seed=4), env.step(torques[0])]

    first, second = make_copy(original), make_copy(original)
    state = original.unwrapped.game.simulation.state.copy()
    copied = finish(first)
    assert np.array_equal(original.unwrapped.game.simulation.state, state)  # they share nothing
    for env in (original, second):
        for mine, theirs in zip(finish(env), copied):
            assert np.array_equal(mine[0], theirs[0]) and repr(mine[1:]) == repr(theirs[1:])


IN_A_FORK = """
import os, threading, torch, ant_tasks
def run():
    layouts = ant_tasks.draw_layouts(6, 4, 4, 1, torch.Generator().manual_seed(0))
    return ant_tasks.expert_paths(layouts, 4, [0, 1, 2, 3], 40, torch.Generator().manual_seed(1)).observation
ant_tasks.Simulation.threads = 2
expected = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), expected) else 1)
found = []
workers = [threading.Thread(target=lambda: found.append(run())) for _ in range(3)]
[worker.start() for worker in workers], [worker.join() for worker in workers]
assert len(found) == 3 and all(torch.equal(each, expected) for each in found)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_ants_walk_in_forks_and_python_threads():
    assert subprocess.run([sys.executable, "-c", IN_A_FORK], cwd=HERE, timeout=120).returncode == 0


def test_batched_ants_equal_gymnasium():
    n, steps = 8, 45
    layouts = ant.draw_layouts(n, 4, 4, 1, generator(4))
    game, ends = ant.Game(layouts, 4, [0, 1, 2, 3], steps), collections.Counter()
    envs = [gymnasium.make("AntPinpad-v0", max_steps=steps).unwrapped for _ in range(n)]
    for i, env in enumerate(envs):
        options = {name: getattr(layouts, name)[i].numpy() for name in ("colours", "walls", "qpos", "qvel")}
        observation, info = env.reset(seed=i, options=options)
        assert np.array_equal(observation, game.observation()[i]) and info["cell"] == layouts.agent[i]
    noise, over = np.random.default_rng(0), [False] * n
    for t in range(steps):
        east = ant.gait(game.simulation.qpos, game.simulation.qvel, np.zeros(n)) + 0.1 * noise.standard_normal((n, 8))
        torques = east.clip(-1, 1).astype(np.float32)
        reward, terminated, truncated = game.step(torques)
        for i in np.flatnonzero(~np.array(over)):
            observation, r, term, trunc, info = envs[i].step(torques[i])
            assert np.array_equal(observation, game.observation()[i]) and (r, term, trunc) == (reward[i], terminated[i], truncated[i])
            assert (info["visits"], info["cell"], info["reason"]) == (game.visits[i], game.agent[i], game.reason(i))
            over[i] = term or trunc
            ends[info["reason"]] += over[i]
    assert all(over) and len(ends - collections.Counter([""])) >= 3, ends


@pytest.mark.parametrize("mode", [None, "rgb_array"])
def test_ant_gymnasium_checks(mode):
    env = gymnasium.make("AntPinpad-v0", render_mode=mode).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*A Box observation space m..imum value is -?infinity.*")  # as of gymnasium's own ants
        check_env(env)
    first, info = env.reset(seed=5)
    assert np.array_equal(first, env.reset(seed=5)[0]) and not np.array_equal(first, env.reset(seed=6)[0])
    assert first.shape == (41,) and (info["visits"], info["reason"]) == (0, "")
    picture = env.render()
    assert picture is None if mode is None else picture.shape == (256, 256, 3)


def test_ant_steps_are_refused_or_ignored():
    env = gymnasium.make("AntPinpad-v0", max_steps=1).unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(8))
    env.reset(seed=0)
    for action in (np.zeros(7), np.zeros((1, 8)), np.full(8, np.nan), np.full(8, 1.01), "run", None, 0):
        with pytest.raises(ValueError, match="8 torques"):
            env.step(action)
    observation, *_ = env.step([1, -1, 0, 0, 0, 0, 0, 0])
    again, reward, terminated, truncated, info = env.step(np.ones(8))  # over
    assert np.array_equal(observation, again) and (reward, terminated, truncated, info["reason"]) == (0, False, True, "time")


POSE = [0.5, -0.5, 0.75, 1, 0, 0, 0] + [0] * 8  # in cell 10


@pytest.mark.parametrize("options,words", [
    ({"qpos": POSE}, None), ({"qpos": POSE, "qvel": [0] * 14}, None), ({"qpos": POSE, "agent": 10}, "both"),
    ({"qpos": POSE[1:]}, "15 finite"), ({"qpos": [9] + POSE[1:]}, "inside"),
    ({"qpos": POSE[:3] + [0] * 12}, "length 1"),
    ({"qvel": [np.nan] * 14}, "14 finite"), ({"qpos": POSE, "walls": [10]}, "same cell"), ({"agent": 16}, "0 to 15"),
    ({"colours": [1]}, "4 needed"), ({"task": "0-4"}, "colour 4"), ({"qpo": POSE}, "known are agent, colours, walls, task, qpos, qvel"),
])
def test_given_ants(options, words):
    env = gymnasium.make("AntPinpad-v0").unwrapped
    if words is None:
        observation, info = env.reset(seed=0, options=options)
        assert info["cell"] == 10 and 10 not in [*info["colours"], *info["walls"]]
        assert observation[:5].tolist() == [0.75, 1, 0, 0, 0] and observation[27:31].tolist() == [0.25, -0.25, 0, 0]
        assert ("qvel" in options) == (not observation[13:27].any())
    else:
        with pytest.raises(ValueError, match=words):
            env.reset(options=options)


def test_picture_shows_cells_and_ant():
    env = gymnasium.make("AntPinpad-v0", render_mode="rgb_array").unwrapped
    yaw = np.radians(15)
    pose = [-1.3, 0.8, 0.75, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)] + [0] * 8  # torso in the second row, first column; legs straight
    env.reset(options={"colours": [0, 3, 12, 10], "walls": [15], "qpos": pose})
    picture = env.render()
    at = lambda x, y: picture[round((2 - y) * 64 - 0.5), round((x + 2) * 64 - 0.5)].tolist()
    assert [at(*xy) for xy in ((-1.9, 1.9), (1.5, 1.5), (-1.5, -1.5), (0.5, -0.5))] == gridworld.PALETTE[:4].tolist()
    assert at(1.5, -1.5) == [70] * 3 and at(1.5, 0.5) == [245] * 3
    assert at(-1.3, 0.8) == at(-1.3 + 0.23, 0.8) == at(-1.3, 0.8 - 0.23) == [0] * 3  # the torso's radius is 0.25 m
    for leg in range(4):  # stretched legs end 0.8·√2 m from the torso's centre
        azimuth = yaw + np.radians(45 + 90 * leg)
        leg = lambda r, side=0.0: (-1.3 + r * np.cos(azimuth) - side * np.sin(azimuth), 0.8 + r * np.sin(azimuth) + side * np.cos(azimuth))
        inside = [xy for xy in (leg(0.4), leg(0.7), leg(1.1)) if max(map(abs, xy)) < 2]
        assert inside and all(at(*xy) == [0] * 3 for xy in inside)
        assert at(*leg(0.6, 0.11)) not in ([0] * 3, [245] * 3)  # the rim
        if max(map(abs, leg(1.3))) < 2:
            assert at(*leg(1.3)) != [0] * 3
    assert 0.03 < (picture == 0).all(-1).mean() < 0.1  # the ant's area, of 16 m²


def test_ant_expert_solves_tasks_and_walks_only_where_it_may():
    tasks = gridworld.pretraining_tasks("singles")[torch.arange(64) % 16]
    layouts = ant.draw_layouts(64, 4, 4, 1, generator(3))
    paths = ant.expert_paths(layouts, 4, tasks, 500, generator(4), sigma=0.1)
    assert paths.success.float().mean() >= 0.85
    for i in paths.success.nonzero()[:, 0].tolist():
        x, y = (paths.observation[i, :paths.length[i] + 1, 27:29].double() * 2).T.numpy()
        assert max(abs(x).max(), abs(y).max()) <= 2
        cells = [4 * int(2 - b) + int(2 + a) for a, b in zip(x, y)]
        entered = [cell for before, cell in zip([None] + cells, cells) if cell != before]
        assert cells[0] == layouts.agent[i] and layouts.walls[i].item() not in cells
        colours = layouts.colours[i].tolist()
        assert [colours.index(cell) for cell in entered if cell in colours] == tasks[i].tolist()
        assert torch.unique_consecutive(paths.subgoal[i, :paths.length[i]]).tolist() == tasks[i].tolist()


def ant_command(*arguments):
    return subprocess.run([sys.executable, ant.__file__, *map(str, arguments)], capture_output=True, text=True)


def test_ant_command(tmp_path):
    done = ant_command("--episodes", 2, "--out", tmp_path / "new/folder")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("σ") == 4 and "control steps/s" in done.stdout
    assert (tmp_path / "new/folder/ant.png").stat().st_size and 0 < (tmp_path / "new/folder/ant.gif").stat().st_size < 1e6


@pytest.mark.parametrize("arguments,word", [(["--episodes", "0"], "episodes"), (["--episodes", "many"], "many"), (["--seed", "-1"], "seed"),
                                            (["--bogus", "1"], "bogus"), (["--out", __file__], "--out")])
def test_ant_command_refuses(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ant.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and word in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_simulation_and_the_expert_are_symmetric():
    """A mirrored start under mirrored torques gives the mirrored trajectory; the expert's torques in a mirrored world are mirrored."""
    layouts = ant.draw_layouts(8, 4, 4, 1, generator())
    maps, torque_maps = (x.double().numpy() for x in ant.symmetries(5))
    assert len({m.round(3).tobytes() for m in maps}) == ant.SYMMETRIES == 32

    def pose(simulation):  # in the order of an observation: height, quaternion, joints, velocities, xy
        return np.concatenate([simulation.qpos[:, 2:], simulation.qvel, simulation.qpos[:, :2]], 1)

    original = ant.Simulation(8)
    original.put(slice(None), layouts.qpos.numpy(), layouts.qvel.numpy())
    images, torques = [], np.random.default_rng(0).uniform(-1, 1, (40, 8, 8))
    for m in maps:
        start = pose(original) @ m[:29, :29].T
        images.append(ant.Simulation(8))
        images[-1].put(slice(None), np.concatenate([start[:, 27:], start[:, :13]], 1), start[:, 13:27])
    heading = np.linspace(-3, 3, 8)
    towards = np.stack([np.cos(heading), np.sin(heading)], -1)

    def expert_is_symmetric(image, m, torque_map):
        turned = towards @ m[27:29, 27:29].T
        found = ant.gait(image.qpos, image.qvel, np.arctan2(turned[:, 1], turned[:, 0]))
        return np.abs(found - ant.gait(original.qpos, original.qvel, heading) @ torque_map.T).max() < 1e-4

    assert all(map(expert_is_symmetric, images, maps, torque_maps))
    for now in torques:
        original.step(now, np.arange(8))
        for image, m in zip(images, torque_maps):
            image.step(now @ m.T, np.arange(8))
    for image, m in zip(images, maps):
        assert np.abs(pose(image) - pose(original) @ m[:29, :29].T).max() < 1e-5
    # Tilted torsos: where the body's frame is turned by a quarter, its yaw is no longer exactly a quarter more.
    assert all(map(expert_is_symmetric, images[::2], maps[::2], torque_maps[::2]))


def test_cells_and_body_features_can_be_read_off_the_observation():
    layouts = ant.draw_layouts(50, 4, 4, 1, generator())
    game = ant.Game(layouts, 4, [0, 1], 9)
    observation, cells = game.observation(), torch.cat([layouts.objects, layouts.agent[:, None]], 1)
    assert torch.equal(ant.places(observation, 4), cells)
    game.simulation.qpos[:, :2] = ant.centres(layouts.agent, 4) + 0.4999  # almost over the border of the cell; kept in half precision, as on disk
    assert torch.equal(ant.places(game.observation().half().float(), 4), cells)
    features = ant.body_features(observation, 4)
    assert features.shape == (50, ant.FEATURES)
    # Turning the world turns the quaternion and the cells, but not what the ant feels of itself: height, joints, speeds in its own frame.
    turned = ant.body_features(ant.turned(observation, torch.zeros(50, 8))[0], 4)
    own = [0, *range(10, 32)]
    assert torch.allclose(features[:, own], turned[:, own], atol=1e-5)
    assert torch.allclose(features[:, 32:34], turned[:, 36:38], atol=1e-5)  # the way up is, after a quarter turn, the way left


def test_expert_data_is_kept_and_refused_when_it_does_not_fit(tmp_path):
    made = []
    make = lambda i: made.append(i) or {"x": np.full(3, i)}
    first = ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.1}, make)
    again = ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.1}, make)
    assert made == [0, 1] and [part["x"].tolist() for part in again] == [part["x"].tolist() for part in first] == [[0] * 3, [1] * 3]
    with pytest.raises(ValueError, match="noise=0.1, not 0.2"):
        ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.2}, make)
    content = (tmp_path / "001.npz").read_bytes()
    (tmp_path / "001.npz").write_bytes((tmp_path / "000.npz").read_bytes())
    with pytest.raises(ValueError, match="shard=0, not 1"):
        ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.1}, make)
    (tmp_path / "001.npz").write_bytes(content[:100])
    with pytest.raises(ValueError, match="001.npz cannot be read"):
        ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.1}, make)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000.npz", "001.npz"]


def test_stored_episodes_are_whole_and_mirrored_copies_keep_their_colours(tmp_path):
    config = rl.configure("ant", "tiny", trajectories=24, max_steps=250, thin=1.0)
    stored = ant.StoredEpisodes(config, 0.1, tmp_path)
    count = len(stored.length)
    assert 18 <= count <= 24 and len(stored.observation) == (stored.length + 1).sum()
    whole = stored.pick(torch.arange(count))
    data = rl.ExpertData(rl.Run(config, tmp_path, torch.device("cpu"), tmp_path), 6, 0.1, generator())
    pool = ant.source(config, 0.1, tmp_path)(12, generator())
    drawn = pool.pick(torch.arange(12))
    assert torch.equal(pool.length, drawn.length) and set(drawn.length.tolist()) <= set(stored.length.tolist())
    assert sum((whole.observation[:, 0] == start).all(1).any() for start in drawn.observation[:, 0]) <= 4  # the others are mirrored
    for batch in [whole, drawn, data.batch(0), data.batch(None)]:
        places = ant.places(batch.observation, 4)
        rows = torch.arange(len(batch.length))
        last = places[rows, batch.length]  # the episode ends on the colour it was heading for
        target = batch.subgoal[rows, batch.length - 1]
        assert torch.equal(last[:, -1], last.gather(1, target[:, None])[:, 0])
        assert batch.observation.isfinite().all() and (batch.action.abs() <= 1).all()


def test_expert_batches_are_dealt_by_length():
    run = rl.Run(rl.configure("gridworld", "tiny"), "nowhere", torch.device("cpu"))
    data, pools = rl.ExpertData(run, 8, 0.0, generator()), []
    draw = data.draw
    data.draw = lambda n, generator: pools.append(draw(n, generator)) or pools[-1]
    deals = [data.batch(0) for _ in range(32)]
    assert [len(pool.length) for pool in pools] == [128, 128]  # of fresh, noiseless trajectories the expert solves all
    for pool, batches in zip(pools, (deals[:16], deals[16:])):
        assert all(len(batch.length) == 8 and batch.action.shape[1] == batch.length.max() for batch in batches)
        batches = sorted(batches, key=lambda batch: (int(batch.length.min()), int(batch.length.max())))
        assert torch.equal(torch.cat([batch.length.sort().values for batch in batches]), pool.length.sort().values)
        whole = lambda batch: {(o[:n + 1].numpy().tobytes(), a[:n].numpy().tobytes(), g[:n].numpy().tobytes())
                               for o, a, g, n in zip(batch.observation, batch.action, batch.subgoal, batch.length.tolist())}
        assert set.union(*map(whole, batches)) == whole(pool)
    assert not torch.equal(pools[0].length, pools[1].length)


# ------------------------------------------------------------------------------------------------------------- command line

def command(*arguments, **options):
    return subprocess.run([sys.executable, HERE / "internal_rl.py", *map(str, arguments)], capture_output=True, text=True, **options)


def refused(capsys, *arguments):
    """The one line with which a command in this process is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        rl.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1, error
    return error


SMALL = ("--preset", "tiny", "--device", "cpu", "--pretrain-steps", 32, "--steer-steps", 16, "--probe-steps", 16, "--gate-steps", 48,
         "--code-steps", 32, "--evaluation", 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The process and the folder of a finished run, copy it; how many seconds it took."""
    folder, started = tmp_path_factory.mktemp("finished") / "run", time.time()
    return command("--task", "gridworld", *SMALL, "--out", folder), folder, time.time() - started


def test_tiny_run_end_to_end(finished, tmp_path, capsys):
    done, folder, _ = finished
    assert done.returncode == 0, done.stderr
    assert "token-level" in done.stdout
    shutil.copytree(folder, tmp_path / "run")
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "result.json", "pretrain.pt", "probe.pt", "steer.pt", "gates.pt", "codes.pt", "rl.pt", "raw.pt",
                     "gates.png", "probe.png", "success.png", "matrix.png", "codes.png", "episode.png", "episode.gif"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"stage", "step", "time_s"} <= set(line) for line in lines)
    assert {line["method"] for line in lines if "episodes" in line and "success" in line} == {"internal", "raw"}
    assert {line["stage"]: line["step"] for line in lines} == dict(pretrain=32, probe=16, steer=16, gates=48, codes=32, rl=4, raw=4)
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names if name.endswith(".pt")}
    rl.main([*map(str, SMALL), "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("reused") == len(rl.STAGES) == 7
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())
    assert "width=32" in refused(capsys, *SMALL, "--width", 64, "--out", tmp_path / "run")
    assert "rl_lr" in refused(capsys, *SMALL, "--rl-lr", 0.5, "--stage", "steer", "--out", tmp_path / "run")
    (tmp_path / "run/gates.pt").write_bytes(before["gates.pt"][:1000])
    assert "gates.pt cannot be read" in refused(capsys, *SMALL, "--out", tmp_path / "run")


def test_settings_that_only_measure_change_no_checkpoint(finished, tmp_path, capsys):
    done, folder, _ = finished
    assert "gate recall, ±0 steps" in done.stdout and "±2" not in done.stdout
    shutil.copytree(folder, tmp_path / "run")
    kept = [file for file in (tmp_path / "run").iterdir() if file.suffix in (".pt", ".jsonl")]
    before = {file: file.read_bytes() for file in kept}
    assert len(kept) == len(rl.STAGES) + 1 == 8
    rl.main([*map(str, SMALL), "--tolerance", "2", "--evaluation", "40", "--out", str(tmp_path / "run")])
    assert all(file.read_bytes() == content for file, content in before.items())
    again = capsys.readouterr().out
    assert "gate recall, ±2 steps" in again and "±0" not in again
    one, two = (json.loads((place / "result.json").read_text()) for place in (folder, tmp_path / "run"))
    assert one.keys() - {"switches_solved"} == two.keys() - {"switches_solved"} and one["gap"] == two["gap"] and one["seconds"] == two["seconds"]
    assert one["expert_success"] == 1 > one["random_success"]
    assert (two["gate_precision"] or 0) >= (one["gate_precision"] or 0) and two["gate_recall"] >= one["gate_recall"]  # None: no gate opened


def test_tiny_ant_run_end_to_end(tmp_path, capsys):
    arguments = ("--task", "ant", "--preset", "tiny", "--device", "cpu", "--data", tmp_path / "data", "--out", tmp_path / "run")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "raw-action" in done.stdout and "token-level" not in done.stdout
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names >= {"result.json", "pretrain.pt", "probe.pt", "steer.pt", "gates.pt", "codes.pt", "rl.pt", "raw.pt", "gates.png", "probe.png",
                     "success.png", "matrix.png", "codes.png", "episode.png", "episode.gif"}
    assert json.loads((tmp_path / "run/result.json").read_text()).keys() >= {"expert_success", "steer_success", "held_share", "internal_success", "raw_success"}
    (tmp_path / "run/probe.pt").unlink()
    assert "trajectories=64, not 32" in refused(capsys, *arguments, "--trajectories", 32)
    (tmp_path / "run/pretrain.pt").unlink()
    shard = next((tmp_path / "data").glob("*noise0.1/000.npz"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "000.npz cannot be read" in refused(capsys, *arguments, "--stage", "pretrain")
    assert not (tmp_path / "run/pretrain.pt").exists()


@pytest.mark.parametrize("name, arguments, others, most", [
    ("pairs-7x7", ("--preset", "pairs", "--size", 7, "--walls", 4, "--window", 16),  # .065 on 1,024 trajectories, .062 on these; untrained about 1
     (("--size", 6, "size=7"), ("--window", 0, "window=16"), ("--pretrain-batch", 32, "pretrain_batch=64"), ("--seed", 1, "seed=0")), 0.07),
    ("ant", ("--task", "ant", "--seed", 300), (("--next-obs", 1, "next_obs=10.0"), ("--seed", 0, "seed=300")), 2.5)])  # untrained 39
def test_shipped_base_model_fits_its_command(name, arguments, others, most, tmp_path, capsys, monkeypatch):
    """assets/NAME-base.pt predicts well with its settings, is refused with others, and needs no training data."""
    for module in (gridworld, ant):
        monkeypatch.setitem(module.LOOK, "trajectories", 64)
    shutil.copy(HERE / f"assets/{name}-base.pt", tmp_path / "pretrain.pt")
    arguments = (*arguments, "--device", "cpu", "--stage", "pretrain", "--data", tmp_path / "data", "--out", tmp_path)
    for flag, value, field in others:
        assert f"made with {field}, not {value}" in refused(capsys, *arguments, flag, value)
    rl.main([*map(str, arguments)])
    gap = capsys.readouterr().out.split("nats per action")[1].split()[0]
    assert 0 < float(gap) < most and not (tmp_path / "data").exists()


def test_resumed_run_equals_uninterrupted(tmp_path, monkeypatch):
    """Every stage, stopped after each round and taken up again, ends bit for bit where an uninterrupted run does."""
    monkeypatch.setitem(gridworld.LOOK, "trajectories", 64)
    config = rl.configure("gridworld", "tiny", pretrain_steps=48, gate_steps=48, code_steps=64, rl_episodes=768, probe_steps=32, steer_steps=32,
                          evaluation=32)

    def everything(run):
        base, gap = rl.pretrain(run)
        accuracy, steered = rl.train_probe(run, base), rl.steer(run, base)
        meta = rl.discover(run, base)
        rl.internal_rl(run, base, meta)
        rl.raw_rl(run, base)
        return gap, accuracy, steered.b.tolist(), meta.alpha.item(), meta.hyper.write.sum().item()

    whole, parts = (rl.Run(config, tmp_path / name, torch.device("cpu")) for name in ("whole", "parts"))
    for run in (whole, parts):
        run.folder.mkdir()
    expected = everything(whole)
    stops = 0
    while True:
        parts.stop = signal.SIGINT
        try:
            found = everything(parts)
            break
        except SystemExit as stopped:
            assert stopped.code == 130
            stops += 1
    assert stops == 20 and found == expected  # one after each round
    for stage in rl.STAGES:
        a, b = whole.load(stage), parts.load(stage)
        assert a.keys() == b.keys() and a["steps"] == b["steps"]
        for name, module in a["modules"].items():
            for key, value in module.items():
                assert torch.equal(value, b["modules"][name][key]), (stage, key)
    drop_time = lambda run: [{k: v for k, v in line.items() if k != "time_s"} for line in run.metrics()]
    assert str(drop_time(whole)) == str(drop_time(parts))


def test_steps_are_counted_and_their_numbers_averaged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rl.Run, "in_stage", False)
    run, module = rl.Run(rl.configure("gridworld", "tiny"), tmp_path, torch.device("cpu")), torch.nn.Linear(1, 1)
    seen = []
    for step in run.steps("probe", 7, generator(), torch.optim.AdamW(module.parameters()), unit=3, reports=2, probe=module):
        seen.append((step.number, step.count, step.due, step.progress))
        assert rl.Run.in_stage == bool(step.number)  # a stop before the end of the first step, which may make data, is obeyed at once
        step.log(loss=torch.tensor(float(step.number), requires_grad=True), share=0.5 * step.number, episodes=10 * step.number)
        if step.due:
            step.log(accuracy=[step.number, 0.25], held=step.number)
    assert seen == [(i, 7, i in (2, 5, 8), min(1, i / 7)) for i in range(9)]  # whole rounds; reported: each, as 3 // 2 is 1
    lines = [{k: v for k, v in line.items() if k != "time_s"} for line in run.metrics()]
    assert lines == [dict(stage="probe", step=s + 2, loss=s, share=s / 2, episodes=10 * (s + 1), accuracy=[s + 1, 0.25], held=s + 1) for s in (1, 4, 7)]
    assert "probe 9/9 loss 7.000 share 3.500 episodes 80" in capsys.readouterr().out
    assert not list(run.steps("probe", 7, generator(), None, unit=3, probe=module))  # finished
    assert run.load("probe")["steps"] == 9


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "internal_rl.py", "--preset", "tiny", "--stage", "pretrain", "--device", "cpu",
                                "--pretrain-steps", "100000", "--out", tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    while "pretrain: 100,000 steps" not in (line := process.stdout.readline()):  # printed after three of them
        assert line
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait(60) == 143 and "The same command goes on" in output
    assert (tmp_path / "run/pretrain.pt").exists()


def processes(count, script, *arguments):
    """As torchrun starts them, without its watching over them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen([sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE,
                             env=dict(os.environ, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="localhost",
                                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")) for i in range(count)]


SHARED = f"""
import sys
import torch
sys.path.insert(0, {str(HERE)!r})
import internal_rl as rl
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # losses are computed in float32, else
if rl.WORLD_SIZE > 1:
    torch.distributed.init_process_group("gloo")
run = rl.Run(rl.configure("gridworld", "tiny", bf16=False, pretrain_steps=50, post_task="0", gate_steps=32, code_steps=16), sys.argv[1], torch.device("cpu"))
run.stop = 15 if sys.argv[2:] and rl.RANK == 1 else None  # a signal that only one process gets
base, _ = rl.pretrain(run)
rl.train_probe(run, base)
rl.steer(run, base)
g = torch.Generator().manual_seed(0)  # then one update of a policy, from the same 32 episodes of five codes
policy = rl.Policy(rl.configure("gridworld", "tiny"))
optimizer = torch.optim.AdamW(policy.parameters())
e, z, won = torch.randn(32, 5, 32, generator=g), torch.randn(32, 5, 4, generator=g), torch.rand(32, generator=g) ** 4
e, z, success = rl.mine(e), rl.mine(z), rl.everyones(rl.mine(won))
assert torch.equal(success, won)
old, advantage = rl.gaussian_log_prob(z, policy(e)[0], 1.0).detach(), rl.mine(rl.advantages(success))
for rows in rl.minibatches(success[:16 * rl.WORLD_SIZE], g):  # alone: the rows of both
    rows = rows if rl.WORLD_SIZE == 2 else (2 * rows[:, None] + torch.arange(2)).flatten()
    log_prob = rl.gaussian_log_prob(z[rows], policy.replay(e[rows], torch.full((len(rows),), 5)), 1.0)
    rl.descend(rl.clipped_surrogate(log_prob, old[rows], advantage[rows], torch.ones(5)), optimizer, 1e-3)
if rl.WORLD_SIZE == 2:  # both stay equal in the other stages, too
    meta = rl.discover(run, base)
    for module in (meta, rl.internal_rl(run, base, meta), rl.raw_rl(run, base)):
        for parameter in module.parameters():
            both = rl.everyones(parameter.flatten()[None])
            assert torch.equal(both[0], both[1])
    assert all(any(line["success"] > 0 for line in run.lines[stage]) for stage in ("rl", "raw"))
if rl.RANK == 0:
    torch.save(policy.state_dict(), sys.argv[1] + "/policy")
rl.leave()
"""


def test_two_processes_learn_what_one_learns(tmp_path):
    """Even if both stop because one was told to, and go on."""
    (tmp_path / "script.py").write_text(SHARED)
    alone = processes(1, tmp_path / "script.py", tmp_path / "one")
    for stop in (("stop",), ()):
        first, second = processes(2, tmp_path / "script.py", tmp_path / "two", *stop)
        output, error = first.communicate(timeout=240)
        assert second.wait(timeout=240) == first.returncode == (143 if stop else 0), error
        assert not stop or "stopped in pretrain after step 16 of 64" in output
        second.communicate()
    assert alone[0].communicate() and alone[0].returncode == 0
    one, two = ([*torch.load(tmp_path / folder / "policy").values(), *(x for stage in ("pretrain", "probe", "steer") for module in torch.load(
        tmp_path / folder / f"{stage}.pt")["modules"].values() for x in module.values())] for folder in ("one", "two"))
    assert all(x.dtype == torch.float64 and torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(one, two)) and not all(map(torch.equal, one, two))


def test_a_killed_process_ends_all_and_nothing_is_half_written(tmp_path):
    first, second = processes(2, HERE / "internal_rl.py", "--preset", "tiny", "--stage", "pretrain", "--device", "cpu", "--pretrain-steps", 1920, "--out", tmp_path / "run")
    lines = tmp_path / "run/metrics.jsonl"
    while not lines.exists() or lines.stat().st_size == 0:
        assert first.poll() is second.poll() is None
        time.sleep(0.1)
    first.kill()
    _, error = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 2 and re.fullmatch("internal_rl.py: .*Connection.*\n", error), error
    assert not list(tmp_path.rglob("*.tmp")) and [json.loads(line) for line in lines.read_text().splitlines()]


def test_seeds_are_dealt_to_processes(finished, tmp_path):
    """A seed that cannot be run is named, and the others run. When all have, there is a table."""
    _, folder, _ = finished
    for seed in (0, 1):
        shutil.copytree(folder, tmp_path / f"run-s{seed}")
        for path in (tmp_path / f"run-s{seed}").glob("*.pt"):
            content = torch.load(path)
            torch.save(dict(content, config=dict(content["config"], seed=seed)), path)
    probe = (tmp_path / "run-s0/probe.pt").rename(tmp_path / "probe.pt")
    (tmp_path / "run-s0/probe.pt").write_bytes(b"not a checkpoint")
    assert rl.deal_seeds([0, 1], [*map(str, SMALL), "--stage", "pretrain"], tmp_path / "run")
    assert "probe.pt cannot be read" in (tmp_path / "run-s0.log").read_text() and "reused" in (tmp_path / "run-s1.log").read_text()
    probe.replace(tmp_path / "run-s0/probe.pt")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "internal_rl.py", *map(str, SMALL),
                           "--seeds", "0,1", "--out", tmp_path / "run"], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and "internal RL reaches 0.6 on 0 of 2 seeds" in done.stdout, done.stderr
    assert "seed 0: status 0" in done.stderr and "seed 1: status 0" in done.stderr
    results = (tmp_path / "run-results.json").read_bytes()
    rl.main([*map(str, SMALL), "--stage", "probe", "--seeds", "0,1", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run-results.json").read_bytes() == results  # only all stages make one


@pytest.mark.parametrize("arguments, word", [(["--figure", "rate"], "--figure"), (["--stage", "bench"], "bench"), (["--preset", "tiny", "--rl-batch", "33"], "shared by 2 processes"),
                                             (["--preset", "tiny", "--discover-batch", "7"], "shared by 2 processes"), (["--dry-run", "--seeds", "0,1"], "--dry-run"), (["--dry-run", "--stage", "rl"], "--dry-run")])
def test_what_two_processes_or_a_dry_run_cannot_do(arguments, word, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(rl, "WORLD_SIZE", 2)
    assert word in refused(capsys, *arguments, "--device", "cpu", "--out", tmp_path / "run") and not (tmp_path / "run").exists()


def test_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rl.Run, "dry", False)  # to be put back
    done = command(*SMALL, "--dry-run", "--out", tmp_path / "run")
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.stderr
    found = re.findall(r"(\w+): ([\d,]+) steps of (\d+) episodes, ([\d.e+-]+) GFLOP each; .* about [\d.]+ minutes, until .*; memory [\d.]+ GiB", done.stdout)
    assert [name for name, *_ in found] == list(rl.STAGES) and found[0][1:3] == ("32", "32")
    rl.main([*map(str, SMALL), "--dry-run", "--method", "raw", "--out", str(tmp_path / "run")])
    assert re.findall(r"(\w+): [\d,]+ steps of", capsys.readouterr().out) == ["pretrain", "raw"]
    config = rl.configure("gridworld", "tiny")
    products = sum(p.numel() for block in rl.Base(config).blocks for p in block.parameters() if p.ndim == 2)
    steps = 32 * gridworld.expert_batch(config, 512, generator()).length.float().mean().item()  # 3 passes of 2 FLOP a weight and step
    assert 1 < float(found[0][3]) * 1e9 / (6 * products * steps) < 2.5  # attention and heads are more, padding, too


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)])
@pytest.mark.parametrize("name", ["loss", "nll", "kl"])
def test_not_a_number_stops_and_names_the_checkpoint(bad, name, tmp_path, capsys):
    run = rl.Run(rl.configure("gridworld", "tiny"), tmp_path, torch.device("cpu"))
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(module.parameters())

    def train(count):
        with pytest.raises(SystemExit) as stopped:
            for step in run.steps("pretrain", 3, generator(), optimizer, unit=1, base=module):
                step.log(**{name: bad if step.number == count else 1.0})
        return stopped.value.code

    assert train(1) == 1
    error = capsys.readouterr().err
    assert f"{name} is not finite at step 2" in error and "none yet" in error and not (tmp_path / "pretrain.pt").exists()
    run.stop = signal.SIGINT
    assert train(1) == 130
    kept = (tmp_path / "pretrain.pt").read_bytes()
    assert train(1) == 1 and f"last good checkpoint: {tmp_path / 'pretrain.pt'}" in capsys.readouterr().err
    assert (tmp_path / "pretrain.pt").read_bytes() == kept


@pytest.mark.parametrize("arguments,word", [
    (["--task", "chess"], "chess"), (["--preset", "huge"], "huge"), (["--bogus", "1"], "bogus"), (["--alpha", "-1"], "alpha"), (["--code-std", "0"], "code_std"),
    (["--layers", "3"], "layers"), (["--size", "3", "--subgoals", "pairs", "--colours", "8", "--walls", "0"], "solvable"), (["--max-steps", "3"], "max_steps"), (["--post-task", "0-9"], "colour 9"), (["--heads", "5"], "heads"), (["--seeds", "0,x"], "seeds"), (["--seeds", "0,0"], "different"), (["--rank", "33", "--width", "32"], "rank"),
    (["--size", "1"], "size"), (["--colours", "3"], "colours"), (["--stage", "later"], "later"), (["--pretrain-lr", "nan"], "pretrain_lr"),
    (["--view", "side"], "view"), (["--base", "mamba"], "mamba"), (["--task", "ant", "--noise", "3"], "noise"), (["--task", "ant", "--thin", "0"], "thin"),
    (["--thin", "0.5"], "thin"), (["--bursts", "0.1"], "bursts"), (["--trajectories", "64"], "trajectories"),
    (["--task", "ant", "--trajectories", "5000"], "trajectories"), (["--task", "ant", "--trajectories", "2"], "trajectories"), (["--threshold", "2"], "threshold"),
    (["--evaluation", "7"], "evaluation"), (["--task", "ant", "--bursts", "2"], "bursts"),
    (["--task", "ant", "--window", "8"], "window"), (["--window", "-1"], "window"), (["--method", "alchemy"], "alchemy"), (["--figure", "none"], "none"),
    (["--task", "../ant"], "../ant"), (["--task", "numpy"], "numpy"), (["--task"], "--task"), (["--control-layer", "5"], "control_layer"),
    (["--post-task", "0-0"], "twice"), (["--subgoals", "triples"], "triples"), (["--weight-decay", "inf"], "weight_decay"), (["--size", "5.5"], "5.5"),
    (["--noise", "many"], "many"), (["--width", "0"], "width"), (["--rl-batch", "1"], "rl_batch"), (["--seed", "-1"], "seed"), (["--seeds", "0,-1"], "seed"),
    pytest.param(["--device", "cuda"], "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
])
def test_refused_inputs(arguments, word, tmp_path, capsys):
    assert word in refused(capsys, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_binomial_interval_against_published_values():
    for hits, n, low, high in ((0, 10, 0, 0.3085), (9, 10, 0.5550, 0.9975), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129)):
        assert np.allclose(rl.binomial_interval(hits, n), (low, high), atol=2e-4)


def test_table_command(tmp_path, capsys):
    values = {3: 0.59, 4: 0.61, 5: 0.9}
    for seed, value in values.items():
        (tmp_path / f"some-s{seed}").mkdir()
        result = dict(internal_success=value, raw_success=0.0, base_success=0.0, steer_success=0.8, gate_precision=float("nan"))
        (tmp_path / f"some-s{seed}/result.json").write_text(json.dumps(result))
    done = command("--stage", "table", "--seeds", "3,4,5", "--out", tmp_path / "some")
    assert done.returncode == 0, done.stderr
    low, high = rl.binomial_interval(2, 3)
    assert f"reaches 0.6 on 2 of 3 seeds (exact 95% interval {low:.3f} to {high:.3f}); median 0.610, worst 0.590" in done.stdout
    assert (tmp_path / "some-seeds.png").stat().st_size > 5000 and "gate precision" not in done.stdout
    assert json.loads((tmp_path / "some-results.json").read_text())["5"]["internal_success"] == 0.9
    missing = command("--stage", "table", "--seeds", "3,6", "--out", tmp_path / "some")
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1 and "some-s6/result.json" in missing.stderr
    for damaged in ("", "{", "{}", "[]", "1", '{"internal_success": 0.5}', json.dumps(result | {"raw_success": "none"}), json.dumps(result | {"raw_success": None})):
        (tmp_path / "some-s5/result.json").write_text(damaged)
        assert "some-s5/result.json is not" in refused(capsys, "--stage", "table", "--seeds", "3,5", "--out", tmp_path / "some")
    (tmp_path / "some-s5/result.json").write_text('{"raw_success": 0.25}')
    rl.main(["--stage", "table", "--seeds", "3,5", "--method", "raw", "--out", f"{tmp_path}/some/"])
    assert "0.125" in capsys.readouterr().out and json.loads((tmp_path / "some-results.json").read_text()).keys() == {"3", "5"}


def test_variations_share_the_stages_that_they_do_not_touch(tmp_path):
    run = rl.Run(CONFIG, tmp_path, torch.device("cpu"))
    path = lambda stage, **changes: str(run.vary(**changes).path(stage).relative_to(tmp_path))
    assert path("pretrain", rate=0.6, raw_lr=0.1) == "pretrain.pt" and path("gates", rate=0.6, raw_lr=0.1) == "rate=0.6/gates.pt"
    assert path("raw", rate=0.6, raw_lr=0.1) == "raw_lr=0.1/raw.pt" and path("rl", rate=1.2, mirror=False) == "mirror=False/rl.pt"
    assert path("steer", pretrain_steps=5) == "pretrain_steps=5/steer.pt" and path("codes", bias=True) == "bias=True/codes.pt"
    assert path("gates", bias=True) == "gates.pt" == path("gates", evaluation=9) and path("gates", method="raw") != path("gates")
    assert run.vary(rate=1.2) is run and path("rl", rate=0.6, mirror=False) == path("rl", mirror=False, rate=0.6)
    for _, parts, variations, _ in rl.FIGURES.values():
        varied = [run.vary(**changes) for changes in variations]
        assert len({tuple(own.path(stage) for stage in rl.stages_of(own.config, parts)) for own in varied}) == len(varied)
        for own in varied:
            rl.check(own.config)
    for changes, parts, stages in (({}, "discover rl", "pretrain gates codes rl"), (dict(method="raw"), "discover rl", "pretrain raw"),
                                   (dict(code_steps=0), "noise", "pretrain gates"), (dict(mirror=False), "discover", "pretrain gates codes"), ({}, "probe steer", "pretrain probe steer")):
        assert rl.stages_of(replace(CONFIG, **changes), parts) == stages.split()


def test_figure_command(finished, tmp_path, monkeypatch, capsys):
    """Two figures on a finished run: nothing is trained twice, the rivals are trained on its base model or on none."""
    variations = [{}, dict(method="raw"), dict(method="raw", temperature=3.0), dict(method="forced"), dict(method="compile", code_steps=0),
                  dict(method="cotrain", code_steps=0)]
    monkeypatch.setitem(rl.FIGURES, "baselines", ("text", "discover rl", variations, rl.draw_curves))
    monkeypatch.setitem(rl.FIGURES, "rate", ("text", "discover", variations[-1:], rl.draw_rate))
    shutil.copytree(finished[1], tmp_path / "run")
    before, printed = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}, {}
    for name in ("baselines", "rate"):
        rl.main([*map(str, SMALL), "--figure", name, "--out", str(tmp_path / "run")])
        assert (tmp_path / f"run-{name}.png").stat().st_size > 5000
        printed[name] = capsys.readouterr().out
    discovery = [rl.MINUTES[stage] * steps / usual for stage, steps, usual in (("gates", 48, 2400), ("codes", 32, 3200))]
    cotrain, reinforce = 1.5 * rl.MINUTES["gates"] * 80 / 2400, rl.MINUTES["rl"] * 1024 / 150_000
    expected = sum(discovery) + discovery[0] + cotrain + 3 * reinforce + rl.MINUTES["raw"] * 1024 / 150_000
    assert f"6 variations of 1 seeds, about {expected:.0f} minutes" in printed["baselines"] and "about 0 minutes" in printed["rate"]
    assert "gates 48/48" in printed["baselines"] and "/48" not in printed["rate"]
    assert all(file.read_bytes() == content for file, content in before.items())
    results = json.loads((tmp_path / "run-baselines.json").read_text())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert len(results) == 6 and all(list(seeds) == ["0"] for seeds in results.values())
    ours, tokens, hot, forced, compiled, scratch = (seeds["0"] for seeds in results.values())
    assert ours["internal_success"] == result["internal_success"] and tokens["raw_success"] == result["raw_success"]
    for own in (ours, tokens, hot, forced, compiled, scratch):
        raw = own in (tokens, hot)
        assert {line["stage"] for line in own["curve"]} == {"raw" if raw else "rl"} and own["curve"][-1]["episodes"] == 1024
        assert ("dealt_codes" in own) == ("internal_success" in own) == (not raw) and (own["gates"] is None) == raw
    assert forced["gates"]["beta"] == 1 and scratch["gates"]["step"] == 80 and compiled["gates"]["step"] == 48
    assert 0 < tokens["minutes_before"] == hot["minutes_before"] < compiled["minutes_before"] < ours["minutes_before"]
    load = lambda name: torch.load(tmp_path / f"run/{name}.pt", weights_only=True)["modules"]
    assert load("method=forced/gates").keys() == {"meta"}
    moved = {method: sum((x - load(f"method={method}/gates")["base"][name]).square().sum() for name, x in load("pretrain")["base"].items())
             for method in ("compile", "cotrain")}
    assert 0 < moved["compile"] < moved["cotrain"]
    for more in (("--method", "forced"), ("--stage", "rl")):
        assert more[0] in refused(capsys, *SMALL, "--figure", "rate", *more, "--out", tmp_path / "run")
    assert "control_layer 3" in refused(capsys, *SMALL, "--figure", "depth", "--layers", 2, "--out", tmp_path / "new")  # in one of its variations
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", rl.FIGURES)
def test_every_figure_can_be_drawn(name, capsys):
    _, parts, variations, draw = rl.FIGURES[name]
    curve = [dict(episodes=1024 * k, success=x, time_s=60.0 * k) for k, x in ((1, 0.0), (2, 0.5))]
    lists = dict(probe=[0.2, 0.4], noise=[1e-4, 1e-3, None], episodes_needed=[10.0, 20.0, math.nan])
    own = dict.fromkeys(rl.TABLE, 0.7) | lists | dict(curve=curve, minutes_before=10.0, gates=dict(nll=0.3, kl=1.0, gate_precision=math.nan, gate_recall=1.0))
    results = {str(changes): {0: own, 1: own} for changes in variations}
    plt = rl.plotting()
    figure = draw(plt, CONFIG, results) if callable(draw) else rl.draw_numbers(plt, results, draw)
    assert len([line for axis in figure.axes for line in axis.lines]) >= len(variations)
    if draw is rl.draw_curves:
        assert [line.get_xdata().tolist() for line in figure.axes[2].lines] == [[11, 12]] * len(variations)
        assert capsys.readouterr().out.count(f"{0.0:9.4f}{0.7:9.4f}{2.048:26.0f}") == len(variations)
    plt.close(figure)


def test_tokens_alone(finished, tmp_path, capsys, monkeypatch):
    """They need no discovery, and are measured at temperatures 1 and 0.1."""
    heads = []
    monkeypatch.setattr(rl, "solved", lambda run, model, solved=rl.solved: heads.append(next(model.head.action.parameters()).clone()) or solved(run, model))
    shutil.copytree(finished[1], tmp_path / "run")
    for stage in ("gates", "codes", "rl"):
        (tmp_path / f"run/{stage}.pt").unlink()
    rl.main([*map(str, SMALL), "--method", "raw", "--out", str(tmp_path / "run")])
    assert "gates" not in capsys.readouterr().out and not (tmp_path / "run/gates.pt").exists()
    assert set(json.loads((tmp_path / "run/result.json").read_text())) == {"gap", "raw_success", "raw_cold"}
    assert len(heads) == 2 and torch.allclose(heads[1], 10 * heads[0])


def test_gradient_noise_against_a_loop(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[1], tmp_path / "run")
    _, config = rl.parse_arguments([*map(str, SMALL), "--rl-batch", "64"])
    monkeypatch.setattr(rl, "discover_by", lambda run, base: (base, rl.Metacontroller(run.config).requires_grad_(False)))
    played, actors = [], []
    monkeypatch.setattr(rl, "play", lambda *more, play=rl.play: played.append(play(*more)) or played[-1])
    monkeypatch.setattr(rl, "PolicyActor", lambda *more, actor=rl.PolicyActor: actors.append(actor(*more)) or actors[-1])

    def against(each, result):
        """each: gradients [64, parameters] of groups of four episodes."""
        each = torch.stack(each).double()
        assert result["noise"][0] == pytest.approx(each.var(0).mean().item() * 4, rel=1e-3)
        squared = (each.sum(0).square().sum() - each.square().sum()) / (64 * 63)  # pairs of different groups
        needed = (each.var(0).sum() * 4 / squared).item()
        assert result["episodes_needed"][0] == pytest.approx(needed if 0 < needed < 256 else math.nan, rel=1e-2, nan_ok=True)

    for method in ("internal", "raw"):
        played.clear()
        run = rl.Run(replace(config, method=method), tmp_path / "run", torch.device("cpu"))
        result = rl.gradient_noise(run)
        assert len(played) == len(result["noise"]) == len(result["episodes_needed"]) == 5 and result["noise"][0] > 0
        assert [math.isnan(x) for x in result["noise"]] == [episodes.success.sum() < 10 for episodes in played]
        episodes = played[0]
        advantage = (episodes.success - episodes.success.mean()) / (episodes.success.std(correction=0) + 1e-3)
        if method == "internal":
            torch.manual_seed(config.seed)
            policy, actor, each = rl.Policy(config), actors[0], []
            for i in range(0, 256, 4):
                gain = 0
                for k in range(i, i + 4):
                    n = int(actor.count[k])
                    mean = policy(actor.e[k:k + 1, :n])[0][0]
                    gain = gain + torch.distributions.Normal(mean, config.std_start).log_prob(actor.z[k, :n]).sum() * advantage[k] / 4
                each.append(torch.cat([g.flatten() for g in torch.autograd.grad(gain, list(policy.parameters()))]))
            against(each, result)
    base, each = rl.pretrain(run)[0].requires_grad_(True), []
    for i in range(0, 256, 4):
        steps = [(i + j, t) for j in range(4) for t in range(int(episodes.length[i + j]))]
        out = base(episodes.observation[i:i + 4, :-1]).log_softmax(-1)
        gain = sum(out[k - i, t, episodes.action[k, t]] * advantage[k] for k, t in steps) / 4
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(gain, list(base.parameters()), allow_unused=True) if g is not None]))
    against(each, result)


def test_compile_has_few_relaxed_switches_with_a_prior(base, batch):
    torch.manual_seed(0)
    meta, e = rl.CompILE(CONFIG), base.embed(batch.observation).detach()
    meta.gate.switch[-1].bias.data.fill_(1)
    _, beta, gates, mu, log_sigma = meta(e, batch.length, generator())
    assert (gates[:, 0] > 0.999).all() and ((gates[:, 1:3] > 0) & (gates[:, 1:3] < 1)).all() and gates.sum(1).max() < rl.MOST + 1
    p = beta[:, 1:].detach()
    assert torch.allclose(meta.kl(beta, gates, mu, log_sigma)[:, 0], rl.kl_to_standard_normal(mu, log_sigma)[:, 0])
    prior = torch.distributions.Bernoulli(1 / rl.SEGMENT)
    expected = rl.kl_to_standard_normal(mu, log_sigma) * gates + F.pad(torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), prior), (1, 0))
    assert torch.allclose(meta.kl(beta, gates, mu, log_sigma)[:, 1:], expected[:, 1:], atol=1e-4)
    starts = gates > rl.THRESHOLD
    h = meta.history(meta.norm(e))[0]
    ends = rl.next_opening(starts, batch.length)
    steps = [(i, t) for i, length in enumerate(batch.length.tolist()) for t in range(length + 1)]
    raw = torch.stack([meta.encoder(torch.cat([h[i, t], h[i, ends[i, t]]])) for i, t in steps])
    raw = (raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-5).sqrt()
    for (i, t), code in zip(steps, raw):
        assert torch.allclose(mu[i, t], code / code.norm() * (4 * 0.84) ** 0.5, atol=1e-4)
    plain = rl.Metacontroller(CONFIG)
    for rival in (meta, plain):  # with new codes it is one of ours
        rival.eval().forget_codes()
    plain.load_state_dict(meta.state_dict())
    assert type(meta) is rl.Metacontroller
    for a, b in zip(meta(e, batch.length, generator()), plain(e, batch.length, generator())):
        assert torch.equal(a, b)


def test_a_summary_a_step_reads_what_is_to_come(base, batch):
    torch.manual_seed(0)
    meta, e = rl.Metacontroller(replace(CONFIG, per_step=True)), base.embed(batch.observation).detach()
    seen = meta.evidence(e, None, batch.length)
    for i in range(4):
        length = int(batch.length[i])
        assert torch.equal(seen[i, :, :rl.N_H], meta.history(e)[0][i])
        for t in (0, 2, length):
            s = meta.summary(e[i:i + 1, t:length + 1].flip(1))[1][0, 0]
            assert torch.allclose(seen[i, t, rl.N_H:], s, atol=1e-5)


def test_bench_command(tmp_path):
    done = command("--stage", "bench", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("bench:") == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gridworld", "ant"])
def test_help_names_every_setting(name):
    shown, own = command("--task", name, "--help").stdout, {"trajectories", "bursts", "thin"}
    settings = [s.name for s in rl.fields(rl.configure(name, "quick"))[1:]]
    assert all("--" + setting.replace("_", "-") in shown for setting in ["task", "preset", "stage", "seeds", "device", "out", "data", *settings])
    assert own & set(settings) == (own if name == "ant" else set()) and ("--bursts" in shown) == (name == "ant")


# ------------------------------------------------------------------------------------------------------------------- worlds

@pytest.mark.parametrize("name", ["gridworld", "ant"])
def test_every_default_and_preset_lies_in_its_range(name):
    presets = {preset: rl.configure(name, preset) for preset in rl.load_world(name).PRESETS}
    assert presets.keys() == {"quick", "tiny", "paper"} | ({"pairs"} if name == "gridworld" else set())
    for preset, config in presets.items():
        rl.check(config)
        assert config.world == name and config.module is {"gridworld": gridworld, "ant": ant}[name]
        for s in rl.fields(config):
            low, high, choices = (s.metadata[k] for k in ("low", "high", "choices"))
            assert s.metadata["help"] and s.metadata["stages"] <= rl.STAGES.keys() and (low is None) == (high is None)
            for value in (s.default, getattr(config, s.name)):
                assert type(value) is s.type or (s.type is float and type(value) is int), (preset, s.name, value)
                assert low is None or low <= value <= high, (preset, s.name, value)
                assert choices is None or value in choices, (preset, s.name, value)
            assert low is not None or s.type in (bool, str), s.name  # every number has a range


def test_starting_the_grid_does_not_import_mujoco():
    code = "import sys, internal_rl; internal_rl.configure('gridworld', 'tiny'); assert 'mujoco' not in sys.modules and 'ant_tasks' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, timeout=120).returncode == 0


def test_the_method_has_no_branch_on_the_world():
    source = (HERE / "internal_rl.py").read_text()
    assert '"ant"' not in source and "'ant'" not in source
    tree = ast.parse(source)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    texts |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "help" for part in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            assert "ant_tasks" not in node.value and node.value != "ant"
        assert not (isinstance(node, (ast.Name, ast.alias)) and "ant_tasks" in (getattr(node, "id", None), getattr(node, "name", None)))
        if isinstance(node, (ast.Compare, ast.Match)):  # neither config.world nor the module is compared with anything
            assert not {getattr(part, "attr", None) for part in ast.walk(node)} & {"world", "module"}, ast.unparse(node)


def copied(folder, name, old="", new=""):
    """A third world `name` beside a copy of internal_rl.py: the grid, with `old` in its source replaced by `new`."""
    for file in ("internal_rl.py", "gridworld.py"):
        shutil.copy(HERE / file, folder)
    source = (HERE / "gridworld.py").read_text().replace("GridworldPinpad-v0", "Copy-v0")
    assert old in source
    (folder / f"{name}.py").write_text(source.replace(old, new))
    return lambda *arguments: subprocess.run([sys.executable, folder / "internal_rl.py", "--task", name, *map(str, arguments)], capture_output=True,
                                             text=True, cwd=folder)


def test_a_third_world_is_one_file(tmp_path):
    run = copied(tmp_path, "maze", "SETTINGS = {}", 'SETTINGS = {"depth": (3, "of the maze", 1, 9)}')
    arguments = ("--preset", "tiny", "--stage", "steer", "--device", "cpu", "--pretrain-steps", 16, "--steer-steps", 16, "--depth", 4)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "labelled controllers" in done.stdout and (tmp_path / "runs/maze-tiny-s0/steer.pt").exists()
    settings = json.loads((tmp_path / "runs/maze-tiny-s0/config.json").read_text())
    assert (settings["world"], settings["depth"]) == ("maze", 4)
    wrong = run(*arguments[:-1], 10)
    assert wrong.returncode == 2 and "depth 10 is outside 1 … 9" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    wrong = run(*arguments[:-2])  # the world's own settings are of the base model's stage
    assert wrong.returncode == 2 and "depth=4, not 3" in wrong.stderr


@pytest.mark.parametrize("old,new,words", [("def thinned(", "def thicker(", "it lacks thinned"), ("RAW =", "COOKED =", "it lacks RAW"),
                                           ('"quick": {}', '"fast": {}', "it lacks a preset named quick")])
def test_an_incomplete_world_is_refused(old, new, words, tmp_path):
    wrong = copied(tmp_path, "maze", old, new)("--preset", "tiny", "--device", "cpu")
    assert wrong.returncode == 2 and "maze.py" in wrong.stderr and wrong.stderr.endswith(words + "\n") and len(wrong.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------------------------------------------------------- faults

KILLS, DAMAGES = int(os.environ.get("KILLS", 2)), int(os.environ.get("DAMAGES", 6))  # 200 and 500 take an hour each


def left_behind(folder):
    """All that a run leaves in its folder, without times: weights, curves, numbers."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            return x.shape, x.numpy().tobytes()
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items() if key not in ("seconds", "time_s")}
        return [plain(part) for part in x] if isinstance(x, list) else x

    found = {file.name: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}
    found["curves"] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found |= {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    return str(plain(found))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("world", ["gridworld", "ant"])
def test_killed_runs_end_like_uninterrupted_ones(world, finished, tmp_path):
    arguments = [sys.executable, HERE / "internal_rl.py", "--task", world, *map(str, SMALL if world == "gridworld" else ("--preset", "tiny"))]
    if world == "ant" and "KILLS" not in os.environ:
        arguments += ["--stage", "probe"]
    _, whole, duration = finished
    if world == "ant":
        whole, started = tmp_path / "whole", time.time()
        subprocess.run([*arguments, "--out", whole, "--data", tmp_path / "whole-data"], check=True, capture_output=True)
        duration = time.time() - started
    kills, chance = 0, random.Random(KILLS)
    for attempt in range(10 * KILLS):
        data = tmp_path / f"data-{attempt}"
        while kills < KILLS:
            process = subprocess.Popen([*arguments, "--out", tmp_path / "parts", "--data", data], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            try:
                process.wait(chance.uniform(0.5 if number == signal.SIGINT else 0, duration / 2))  # Python itself starts before
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                allowed = (128 + number, 0, *([-number] if number != signal.SIGINT else []))  # SIGTERM: before main
                status, error = process.wait(60), process.stderr.read()
                assert status in allowed and not error, (status, error)
                kills += 1
            else:
                break
        done = subprocess.run([*arguments, "--out", tmp_path / "parts", "--data", data], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert left_behind(tmp_path / "parts") == left_behind(whole)
        if kills == KILLS:
            break
        shutil.rmtree(tmp_path / "parts")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_no_library_can_lose_a_stop():
    code = """import os, signal, internal_rl
signal.signal(signal.SIGTERM, internal_rl.stop)
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    raise IndexError  # as a film without frames does when it is closed"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (done.returncode, done.stderr) == (143, "")


def damage(folder, chance):
    """Truncates, deletes or swaps a file, or flips a bit of it. Returns what it did."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    checkpoints = [file for file in files if file.suffix == ".pt"]
    file, how = chance.choice(chance.choice([files, checkpoints])), chance.choice(["truncate", "flip", "delete", "swap"])
    content = bytearray(file.read_bytes())
    if how == "truncate":
        file.write_bytes(content[:chance.randrange(len(content) + 1)])
    elif how == "flip" and content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif how == "delete":
        file.unlink()
    elif how == "swap":
        other = chance.choice([other for other in files if other.suffix == file.suffix])
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{how} {file.name}"


def test_damaged_files_are_refused_or_make_no_difference(finished, tmp_path, capsys):
    whole, chance, seen = left_behind(finished[1]), random.Random(0), collections.Counter()
    for attempt in range(DAMAGES):
        folder = tmp_path / str(attempt)
        shutil.copytree(finished[1], folder)
        what = damage(folder, chance)
        capsys.readouterr()
        try:
            rl.main(["--task", "gridworld", *map(str, SMALL), "--out", str(folder)])
        except SystemExit as stopped:
            error = capsys.readouterr().err
            assert stopped.code == 2 and len(error.splitlines()) == 1 and str(folder) in error, what
            seen["refused"] += 1
        else:
            assert left_behind(folder) == whole, what
            seen["no difference"] += 1
        shutil.rmtree(folder)
    assert len(seen) == 2


def test_stages_on_other_weights_are_refused(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "run/pretrain.pt").unlink()
    forward = rl.Block.forward
    monkeypatch.setattr(rl.Block, "forward", lambda self, x, past=None: forward(self, 1.01 * x, past))  # other code
    assert "probe.pt was made on another pretrain.pt" in refused(capsys, *SMALL, "--out", tmp_path / "run")


def test_one_process_a_folder(tmp_path):
    arguments = [sys.executable, HERE / "internal_rl.py", "--preset", "tiny", "--stage", "pretrain", "--device", "cpu", "--pretrain-steps", "100000",
                 "--out", tmp_path / "run"]
    first = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("pretrain:") for line in first.stdout)
    config = (tmp_path / "run/config.json").read_bytes()
    for _ in range(2):
        second = subprocess.run([*arguments, "--seed", "1"], capture_output=True, text=True)
        assert second.returncode == 2 and "another process" in second.stderr and len(second.stderr.splitlines()) == 1
    assert (tmp_path / "run/config.json").read_bytes() == config
    first.send_signal(signal.SIGINT)
    first.stdout.read()
    assert first.wait(60) == 130
    again = subprocess.run([*arguments, "--seed", "1"], capture_output=True, text=True)
    assert again.returncode == 2 and "seed=0, not 1" in again.stderr


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    run, module = rl.Run(rl.configure("gridworld", "tiny"), tmp_path, torch.device("cpu")), torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps("rl", 3, generator(), torch.optim.AdamW(module.parameters()), unit=1, policy=module):
            step.log(loss=0.0)
            if step.number == 2:
                torch.nn.init.constant_(module.weight, math.nan)
    assert stopped.value.code == 1 and "rl: weight is not finite at step 3" in capsys.readouterr().err
    assert not (tmp_path / "rl.pt").exists()


@pytest.mark.parametrize("arguments,prepare,words", [
    (["--noise", "1", "--max-steps", "10"], None, "the expert solves"), (["--out", "file/below"], "file", "file"),
    (["--out", "o" * 300], None, "name too long"), (["--data", "file"], "file", "--data file is a file"),
    (["--out", "run"], "run/config.json/", "config.json"), (["--width", "8192", "--layers", "8"], None, "memory"),
])
def test_what_the_system_cannot_give_is_one_line(arguments, prepare, words, tmp_path):
    if prepare and prepare.endswith("/"):
        (tmp_path / prepare).mkdir(parents=True)
    elif prepare:
        (tmp_path / prepare).write_text("")
    limit = ["bash", "-c", 'ulimit -v 3500000; exec "$@"', "-"] if words == "memory" else []
    done = subprocess.run([*limit, sys.executable, HERE / "internal_rl.py", "--preset", "tiny", "--device", "cpu", "--stage", "pretrain", *arguments],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr.lower() and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("world", ["gridworld", "ant"])
def test_nonsense_on_the_command_line(world, capsys):
    """Every flag with every kind of wrong value: refused in one line, or a setting within its bounds."""
    refused = 0
    for s in fields(rl.configure(world, "tiny"))[1:]:
        for value in ("", "x", "nan", "-inf", "inf", "1e400", "-1", "0", "0.5", "9" * 25, "１", "0x10", "1e3", "None", "[1]", "0-1", "\0"):
            flag = "--" + s.name.replace("_", "-")
            try:
                _, config = rl.parse_arguments(["--task", world, "--preset", "tiny", f"{flag}={value}"])
                rl.check(config)
            except SystemExit as stopped:
                error = capsys.readouterr().err
                assert stopped.code == 2 and len(error.splitlines()) == 1, (flag, value)
                refused += 1
            else:
                low, high, found = s.metadata["low"], s.metadata["high"], getattr(config, s.name)
                assert type(found) is s.type and (low is None or low <= found <= high), (flag, value)
    assert refused > 500


JUNK = (None, True, -1, 0, 1, 2, 3, 5, 10 ** 30, 0.5, math.nan, math.inf, 1j, "", "x", "0-1", "0-0", b"0", [], [0], [0, 1], [[0, 1]], {}, {"task": 1},
        {"agent": 3}, {1: 2}, np.nan, np.int64(3), np.zeros(8), np.full(8, 1j), np.full(8, np.nan), np.full(8, "a"), np.zeros((8, 1)), object(), len)


@pytest.mark.parametrize("make", [gridworld.GridworldPinpad, ant.AntPinpad])
def test_ten_thousand_wrong_calls_of_an_environment(make):
    chance, names = random.Random(0), ("size", "colours", "walls", "max_steps", "task", "render_mode")
    env = make(4, 2, 1, 20, "0-1")
    kinds = collections.Counter()
    for _ in range(5000):
        what = chance.choice(["make", "reset", "seed", "step", "right step", "copy"])
        try:
            if what == "make":
                given = dict(size=4, colours=2, walls=1, max_steps=20, task="0-1") | {name: chance.choice(JUNK) for name in chance.sample(names, 2)}
                make(**given)
            elif what == "reset":
                options = {name: chance.choice(JUNK) for name in chance.sample(env.options, chance.randrange(3))}
                env.reset(options=chance.choice([options, *JUNK]) if chance.random() < 0.5 else options)
            elif what == "seed":
                env.reset(seed=chance.choice([0, 1, 10 ** 20]))
            elif what == "copy":
                env = chance.choice([copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])(env)
            else:
                action = env.action_space.sample() if what == "right step" else chance.choice(JUNK)
                observation, reward, terminated, truncated, info = env.step(action)
                assert env.observation_space.contains(observation) and reward in (0.0, 1.0) and isinstance(info, dict)
                assert isinstance(terminated, bool) and isinstance(truncated, bool)
        except (ValueError, gymnasium.error.ResetNeeded) as error:
            kinds[what, "refused"] += 1
        else:
            kinds[what, "taken"] += 1
    assert len(kinds) >= 9 and not kinds["copy", "refused"], kinds
    assert min(kinds[what, how] for what in ("make", "reset", "step") for how in ("taken", "refused")) > 2 and kinds["right step", "taken"] > 100, kinds
