"""Tests: independent computations, no leak from the future, invariants, and the documented commands on the tiny preset."""
import collections
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are tiny; several threads only get in each other's way

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env

import ant_tasks as ant
import gridworld
import internal_rl as rl

HERE = Path(__file__).parent
CONFIG = rl.Settings(width=32, heads=2, mlp=48, layers=4, walls=2, rank=5, n_z=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def base_model(config):
    torch.manual_seed(0)
    model = rl.Base(config)
    for block in model.blocks:
        if config.base == "transformer":
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
    return rl.expert_batch(CONFIG, 24, generator())


# ---------------------------------------------------------------------------------------------------------------- gridworld

def test_pretraining_tasks_match_tables_and_withhold_transitions():
    for kind in ("pairs", "singles"):
        tasks, subgoals = gridworld.pretraining_tasks(kind)
        assert len({tuple(task.tolist()) for task in tasks}) == 16
        for row in subgoals.tolist():
            changes = {(a, b) for a, b in zip(row, row[1:]) if a != b}
            assert not changes & {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert gridworld.pretraining_tasks("pairs")[0][0].tolist() == [0, 1, 4, 5, 0, 1]  # A C A
    assert [0, 3, 2] in gridworld.pretraining_tasks("singles")[0].tolist()


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
    tasks, _ = gridworld.pretraining_tasks(kind)
    layouts = gridworld.draw_layouts(40, size, colours, walls, generator())
    paths = gridworld.expert_paths(layouts, size, tasks[torch.arange(40) % 16], 100, generator(1))
    for i in range(40):
        cell, total = int(layouts.agent[i]), 0
        for colour in tasks[i % 16].tolist():
            target = int(layouts.colours[i, colour])
            total += reference_distance(layouts, i, size, cell, target)
            cell = target
        assert int(paths.length[i]) == total
        assert int(paths.observation[i, total, -1]) == cell


def test_expert_noise_never_ends_an_episode_and_uses_all_shortest_moves():
    layouts = gridworld.draw_layouts(200, 5, 4, 2, generator())
    tasks = gridworld.pretraining_tasks("singles")[0][torch.arange(200) % 16]
    noisy = gridworld.expert_paths(layouts, 5, tasks, 60, generator(1), epsilon=0.2)
    game = gridworld.Game(layouts, 5, tasks, 60)
    for t in range(noisy.action.shape[1]):
        game.step(noisy.action[:, t])
    assert (game.stage == 3).all()
    clean = gridworld.expert_paths(layouts, 5, tasks, 60, generator(1))
    assert noisy.length.float().mean() > clean.length.float().mean()
    again = gridworld.expert_paths(layouts, 5, tasks, 60, generator(2))
    assert torch.equal(again.length, clean.length) and not torch.equal(again.observation, clean.observation)


def test_bayes_floor_matches_a_slow_filter():
    tasks, _ = gridworld.pretraining_tasks("singles")
    layouts = gridworld.draw_layouts(12, 5, 4, 2, generator())
    own = torch.arange(12)
    paths = gridworld.expert_paths(layouts, 5, tasks[own], 60, generator(1))
    blind = aware = 0.0

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
            blind -= np.log((weight * p).sum())
            aware -= np.log(p[i])
            weight = weight * p / (weight * p).sum()
            for m in range(16):
                stage[m] += stage[m] < 3 and to == int(layouts.colours[i, tasks[m, stage[m]]])
    steps = paths.length.sum().item()
    assert gridworld.bayes_floor(layouts, 5, paths, tasks, own, 60) == pytest.approx((blind / steps, aware / steps), abs=1e-5)


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
                assert (info["agent"], info["stage"]) == (int(game.agent[i]), int(game.stage[i]))
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
    assert env.step(gridworld.UP)[4]["stage"] == 1
    for action in (gridworld.UP, gridworld.LEFT):  # standing on colour 0, off the grid: not a second, wrong visit
        _, reward, terminated, _, info = env.step(action)
        assert (reward, terminated, info["stage"]) == (0, False, 1)
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
    assert np.array_equal(first, again) and first.shape == (637,) and info["stage"] == 0
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

@pytest.fixture(scope="module", params=[(task, base) for task in ("gridworld", "ant") for base in ("transformer", "hawk")], ids="-".join)
def world(request):
    """A base model of each kind in each world, and expert trajectories of that world."""
    task, kind = request.param
    sizes = {"walls": 2} if task == "gridworld" else {"size": 4, "max_steps": 250, "tolerance": 3}
    config = rl.Settings(task=task, base=kind, width=32, heads=2, mlp=48, layers=4, rank=5, n_z=8, **sizes)
    return config, base_model(config), rl.expert_batch(config, 12, generator())


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
    x, cache = batch.observation[:, :60], base.new_cache()
    with torch.no_grad():
        steps = [base.upper(base.lower(x[:, t:t + 1], cache), cache) for t in range(x.shape[1])]
        assert torch.allclose(torch.cat(steps, 1), base(x), atol=1e-4)


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 50])
def test_scan_equals_the_recurrence_with_its_gradient(time):
    torch.manual_seed(time)
    a, b = (torch.rand(3, time, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h, states = torch.zeros(3, 5, dtype=torch.float64), []
    for t in range(time):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    expected, weight = torch.stack(states, 1), torch.randn(3, time, 5, dtype=torch.float64)
    found = rl.LinearRecurrence.apply(a, b)
    assert torch.allclose(found, expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (a, b)) for x in (found, expected))
    assert all(torch.allclose(x, y) for x, y in zip(ours, theirs))


def test_steps_at_which_a_cell_is_entered_against_a_loop():
    config = rl.Settings(task="ant", size=4, max_steps=250, next_cell=2.0, next_obs=0.0, width=32, heads=2, mlp=48)
    batch = rl.expert_batch(config, 6, generator())
    cells = ant.places(batch.observation, 4)[..., -1].tolist()
    chosen = rl.thinned(config, batch, 0.0, generator())
    thin = rl.thinned(config, batch, 0.1, generator())
    assert batch.length.sum() * 0.05 < (thin.length - chosen.length).sum() < batch.length.sum() * 0.15
    logits, ways = [], []
    base = rl.Base(config)
    for i, path in enumerate(cells):
        length = int(batch.length[i])
        steps = [t for t in range(length) if t == 0 or path[t] != path[t - 1]]
        assert rl.entries(config, batch)[i].nonzero()[:, 0].tolist() == steps and chosen.length[i] == len(steps)
        assert torch.equal(chosen.observation[i, :len(steps)], batch.observation[i, steps])
        assert torch.equal(chosen.action[i, :len(steps)], batch.action[i, steps]) and torch.equal(chosen.subgoal[i, :len(steps)], batch.subgoal[i, steps])
        for t in steps:
            following = next(cell for cell in path[t:] if cell != path[t])
            ways.append(3 * (following // 4 - path[t] // 4 + 1) + following % 4 - path[t] % 4 + 1)
        logits.append(base.way_head(base.last_residual(base.lower(chosen.observation[i:i + 1, :len(steps)])))[0])
    ways = torch.tensor(ways)
    for some in (batch, chosen, thin):  # the way to the next cell does not depend on the steps between
        assert torch.equal(rl.ways(config, some)[rl.entries(config, some)], ways)
    assert all(torch.equal(x, y) for x, y in zip(vars(rl.thinned(config, batch, 1.0, generator())).values(), vars(batch.only(batch.valid)).values()))
    loss, action_part = rl.pretraining_loss(config, base, chosen)
    assert loss.item() == pytest.approx((action_part + 2 * F.cross_entropy(torch.cat(logits), ways)).item(), rel=1e-5)


def test_torque_log_prob_against_torch():
    out, torques = torch.randn(5, 16), torch.randn(5, 8)
    normal = torch.distributions.Normal(out[:, :8], out[:, 8:].exp())
    assert torch.allclose(rl.action_log_prob(out, torques), normal.log_prob(torques).sum(-1), atol=1e-4)
    draws = rl.sample_action(rl.Settings(task="ant"), out[:1].expand(20_000, -1), generator())
    assert torch.allclose(draws.mean(0), out[0, :8], atol=0.1) and torch.allclose(draws.std(0).log(), out[0, 8:], atol=0.05)


def test_losses_ignore_padding(base, meta, batch):
    longer = rl.Batch(F.pad(batch.observation, (0, 0, 0, 4), value=3), F.pad(batch.action, (0, 4), value=2), F.pad(batch.subgoal, (0, 4), value=1),
                      batch.length)
    for a, b in zip(rl.pretraining_loss(CONFIG, base, batch), rl.pretraining_loss(CONFIG, base, longer)):
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        one, two = (meta.propose(meta.norm(base.lower(x.observation)), x.length) for x in (batch, longer))
    for a, b in zip(one, two):
        assert torch.allclose(a, b[:, :a.shape[1]], atol=1e-5)


def test_next_observation_loss_against_a_loop(base, batch):
    config = replace(CONFIG, next_obs=0.5)
    loss, action_part = rl.pretraining_loss(config, base, batch)
    last = base.last_residual(base.lower(batch.observation))
    total, count = 0.0, 0
    for i in range(len(batch.length)):
        for t in range(int(batch.length[i])):
            logits = base.observation_head(last[i, t]).view(-1, 25).log_softmax(-1)
            total -= sum(logits[j, cell] for j, cell in enumerate(batch.observation[i, t + 1].tolist()))
            count += 1
    assert torch.allclose(loss, action_part + 0.5 * total / count, rtol=1e-5)


def test_zero_control_leaves_the_base_unchanged(base, meta, batch):
    e = base.lower(batch.observation)
    with torch.no_grad():
        meta.write.zero_()
    assert torch.equal(meta.control(e, torch.randn(*e.shape[:2], 8)), e)
    assert torch.equal(rl.LabelledControllers(CONFIG)(e[:, :-1], batch.subgoal), e[:, :-1])
    worlds = rl.two_worlds(replace(CONFIG, mirror=False), base, batch, generator())
    loss, parts, _ = rl.discovery_loss(base, meta, *worlds, 0.0, generator())
    assert loss.item() == pytest.approx(rl.action_loss(base(batch.observation), batch).item(), abs=1e-6)


def test_low_rank_control_is_the_matrix_product(meta):
    e, z = torch.randn(3, 2, 32), torch.randn(3, 2, 8)
    a, b = meta.matrices(z)
    assert a.shape == (3, 2, 5, 32)
    expected = torch.empty_like(e)
    for i in range(3):
        for t in range(2):
            u = b[i, t].T @ a[i, t] / 32 ** 0.5
            assert not torch.allclose(u, u.T, atol=1e-3)
            expected[i, t] = e[i, t] + u @ e[i, t]
    assert torch.allclose(rl.low_rank_control(e, a, b), expected, atol=1e-5)
    assert torch.allclose(meta.control(e, z), expected, atol=1e-5)


def test_gate_replaces_and_holds():
    proposal, z = torch.randn(3, 8), torch.randn(3, 8)
    mixed = rl.integrate(torch.tensor([1.0, 0.0, 0.25]), proposal, z)
    assert torch.equal(mixed[0], proposal[0]) and torch.equal(mixed[1], z[1])
    assert torch.allclose(mixed[2], 0.25 * proposal[2] + 0.75 * z[2])


def test_gate_is_causal_and_reads_the_integrated_code_while_the_encoder_sees_the_future(base, meta, batch):
    with torch.no_grad():
        e = meta.norm(base.lower(batch.observation))
        changed = e.clone()
        changed[torch.arange(24), batch.length] += 3
        mu, _, features = meta.propose(e, batch.length)
        mu_changed, _, features_changed = meta.propose(changed, batch.length)
        shortest = int(batch.length.min())
        assert torch.equal(features[:, :shortest], features_changed[:, :shortest])
        assert (mu[:, 0] - mu_changed[:, 0]).abs().amax(1).min() > 1e-5
        z, beta, _, _ = meta(base.lower(batch.observation), batch.length, generator())
        assert (beta[:, 0] == 1).all()
        assert torch.allclose(beta[:, 4], meta.switch(features[:, 4], z[:, 3]), atol=1e-6)
        assert not torch.allclose(beta[:, 4], meta.switch(features[:, 4], z[:, 3] + 1), atol=1e-4)


def test_history_excludes_the_present(base, meta, batch):
    """h_{t−1} with e_t: the gate of step t is the gate that acting computes step by step."""
    with torch.no_grad():
        e = base.lower(batch.observation)
        z, beta, _, _ = meta(e, batch.length, generator())
        control = rl.InternalControl(replace(CONFIG, threshold=-1.0), meta, lambda x, games: z[games, len(control.trace)], 24)
        games = torch.arange(24)
        for t in range(5):
            control(e[:, t], games, t)
    for t in range(1, 5):
        assert torch.allclose(control.trace[t][1], beta[:, t], atol=1e-5)


def test_gradient_reaches_every_trainable_and_no_frozen_parameter(base, meta, batch):
    rl.frozen(base)
    loss, _, _ = rl.discovery_loss(base, meta, *rl.two_worlds(CONFIG, base, batch, generator()), 0.1, generator())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in meta.parameters())
    assert all(p.grad is None for p in base.parameters())


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


# ----------------------------------------------------------------------------------------------------------------------- RL

def test_partners_visit_the_same_colours():
    grid, world = rl.Settings(walls=2), rl.Settings(**rl.PRESETS["ant", "tiny"])
    ants = rl.expert_batch(world, 96, generator())
    for config, batch in ((grid, rl.expert_batch(grid, 96, generator())), (world, ants), (world, rl.thinned(world, ants, 0.0, generator()))):
        partner = rl.same_visits(config, batch)
        visits = [torch.unique_consecutive(batch.subgoal[i, :int(batch.length[i])]).tolist() for i in range(len(partner))]
        assert all(visits[i] == visits[j] for i, j in enumerate(partner.tolist())) and sorted(partner.tolist()) == list(range(len(partner)))
        assert all((i == j) == (visits.count(visits[i]) == 1) for i, j in enumerate(partner.tolist()))


def test_policy_acts_and_advances_only_at_switches_and_replay_equals_rollout(base, meta):
    torch.manual_seed(2)
    policy = rl.Policy(CONFIG)
    layouts = gridworld.draw_layouts(64, 5, 4, 2, generator())
    actor = rl.PolicyActor(CONFIG, policy, 64, 0.7, generator(1))
    control = rl.InternalControl(CONFIG, meta, actor, 64)
    with torch.no_grad():
        episodes = rl.play(CONFIG, base, layouts, [0, 1, 2, 3], generator(2), control)
        fired = torch.zeros(64, dtype=torch.long)
        for games, _, switched in control.trace:
            fired[games[switched]] += 1
        assert torch.equal(actor.count, fired) and fired.max() > 1 and fired.sum() < episodes.length.sum()
        mean, _ = policy(actor.e)
        replayed = rl.gaussian_log_prob(actor.z, mean, 0.7)
        mask = torch.arange(actor.z.shape[1]) < actor.count[:, None]
        assert torch.allclose(replayed[mask], actor.log_prob[mask], atol=1e-4)
        assert torch.allclose(policy.replay(actor.e, actor.count)[mask], mean[mask], atol=1e-5)
        mean_later, _ = policy(torch.cat([actor.e[:, :1], actor.e[:, 1:] + 1], 1))
        assert torch.equal(mean[:, 0], mean_later[:, 0])


def test_gaussian_log_prob_against_torch():
    z, mean = torch.randn(4, 8), torch.randn(4, 8)
    assert torch.allclose(rl.gaussian_log_prob(z, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(z).sum(-1), atol=1e-4)


def test_advantage_and_surrogate_by_hand():
    gain = rl.advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    deviation = (3 / 16) ** 0.5
    assert gain.tolist() == pytest.approx([0.75 / (deviation + 1e-3)] + [-0.25 / (deviation + 1e-3)] * 3)
    old, new = torch.zeros(2, 2), torch.tensor([[0.5, 0.1], [-0.5, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # trajectory 0 (gain 2): ratio e^.5 is cut at 1.2; trajectory 1 (gain −1): ratio e^−.5 is cut at .8, the padding does not count
    expected = -((2 * 1.2 + 2 * np.exp(0.1)) + (-0.8)) / 2
    assert rl.clipped_surrogate(new, old, torch.tensor([2.0, -1.0]), mask, 0.2).item() == pytest.approx(expected, rel=1e-5)


def test_gate_scores_by_hand():
    subgoal = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    batch = rl.Batch(None, torch.zeros(1, 10, dtype=torch.long), subgoal, torch.tensor([10]))
    beta = torch.tensor([[1.0, 0, 0, 0, 0.9, 0, 0.9, 0, 0, 0, 0]])  # one near the change at 3, one false; the change at 8 is missed
    assert rl.gate_scores(beta, batch, 0.5, 1) == (0.5, 0.5)
    assert rl.gate_scores(beta, batch, 0.5, 2) == (1.0, 1.0)


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
    assert put(game, -0.9, 1.1) == (0, False, False, "") and game.stage.item() == 1
    assert put(game, -0.2, 1.9) == (0, False, False, "") and game.stage.item() == 1  # still on colour 0: not a second, wrong visit
    assert put(game, -0.5, -0.2) == (0, False, False, "") and game.agent.item() == 9
    assert put(game, 0.5, 1.5) == (1, True, False, "solved")
    assert put(game, -1.5, -1.5) == (0, True, False, "solved")  # over: nothing moves any more
    assert (game.agent.item(), game.steps.item(), game.stage.item()) == (2, 5, 2)


@pytest.mark.parametrize("x,y,reason", [(0.5, 1.5, "wrong colour"), (-0.5, 0.5, "wall"), (2.1, 0.5, "outside"), (-2.1, 0.5, "outside"),
                                        (0.5, 2.1, "outside"), (0.5, -2.1, "outside")])
def test_what_ends_an_ants_game(x, y, reason):
    game = ant_game("0-1")
    assert put(game, x, y) == (0, True, False, reason)
    assert put(game, -0.5, 1.5)[0] == 0 and game.stage.item() == 0  # too late


def test_ant_falls(monkeypatch):
    game = ant_game("0-1")
    game.simulation.qpos[0, 2] = 1.1
    assert put(game, -0.5, 1.5) == (0, True, False, "fallen") and game.stage.item() == 0  # the colour below it does not count
    monkeypatch.setattr(ant, "HEALTHY", (0.9, 1.0))
    assert put(ant_game("0"), -0.5, 1.5) == (0, True, False, "fallen")


def test_ants_time_limit():
    game = ant_game("0-1", max_steps=2)
    assert put(game, -0.5, 1.5) == (0, False, False, "")
    assert put(game, -0.5, 1.5) == (0, False, True, "time")
    assert put(ant_game("0", max_steps=1), -0.5, 1.5) == (1, True, False, "solved")


@pytest.mark.parametrize("threads", [1, 2])
def test_broken_simulation_ends_only_its_own_game(threads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo may leave a MUJOCO_LOG.TXT
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
    assert reward.sum() == 0 and game.stage.sum() == 0 and terminated.tolist() == [True] * 2 + [False] * 4
    assert np.array_equal(game.simulation.state[2:], healthy.simulation.state[2:]) and torch.isfinite(game.observation()).all()


def test_ants_are_the_same_on_any_number_of_threads(monkeypatch):
    layouts, paths = ant.draw_layouts(9, 4, 4, 1, generator()), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(ant.Simulation, "threads", threads)
        paths.append(ant.expert_paths(layouts, 4, [0, 1, 2, 3], 60, generator(1), sigma=0.1))
        assert torch.equal(paths[-1].observation, paths[0].observation) and torch.equal(paths[-1].action, paths[0].action)
    assert not torch.equal(paths[0].action, ant.expert_paths(layouts, 4, [0, 1, 2, 3], 60, generator(2), sigma=0.1).action)


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
            assert (info["stage"], info["cell"], info["reason"]) == (game.stage[i], game.agent[i], game.reason(i))
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
    assert first.shape == (41,) and (info["stage"], info["reason"]) == (0, "")
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
    tasks = gridworld.pretraining_tasks("singles")[0][torch.arange(64) % 16]
    layouts = ant.draw_layouts(64, 4, 4, 1, generator(3))
    paths = ant.expert_paths(layouts, 4, tasks, 500, generator(4), sigma=0.1)
    assert paths.solved.float().mean() >= 0.85
    for i in paths.solved.nonzero()[:, 0].tolist():
        x, y = (paths.observation[i, :paths.length[i] + 1, 27:29].double() * 2).T.numpy()
        assert max(abs(x).max(), abs(y).max()) <= 2
        cells = [4 * int(2 - b) + int(2 + a) for a, b in zip(x, y)]
        entered = [cell for before, cell in zip([None] + cells, cells) if cell != before]
        assert cells[0] == layouts.agent[i] and layouts.walls[i].item() not in cells
        colours = layouts.colours[i].tolist()
        assert [colours.index(cell) for cell in entered if cell in colours] == tasks[i].tolist()


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
    observation = ant.Game(layouts, 4, [0, 1], 9).observation()
    assert torch.equal(ant.places(observation, 4), torch.cat([layouts.objects, layouts.agent[:, None]], 1))
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
    (tmp_path / "001.npz").write_bytes((tmp_path / "001.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="001.npz cannot be read"):
        ant.expert_data(tmp_path, 2, {"size": 4, "noise": 0.1}, make)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000.npz", "001.npz"]


def test_stored_episodes_are_whole_and_mirrored_copies_keep_their_colours(tmp_path):
    config = rl.Settings(**{**rl.PRESETS["ant", "tiny"], "trajectories": 24, "max_steps": 250})
    stored = rl.StoredEpisodes(config, tmp_path, 0.1)
    count = len(stored.length)
    assert 18 <= count <= 24 and len(stored.observation) == (stored.length + 1).sum()
    whole = stored.pick(torch.arange(count))
    for batch in [whole, *rl.expert_batches(config, 6, generator(), 0.1, 2, stored)]:
        places = ant.places(batch.observation, 4)
        rows = torch.arange(len(batch.length))
        last = places[rows, batch.length]  # the episode ends on the colour it was heading for
        target = batch.subgoal[rows, batch.length - 1]
        assert torch.equal(last[:, -1], last.gather(1, target[:, None])[:, 0])
        assert batch.observation.isfinite().all() and (batch.action.abs() <= 1).all()



# ------------------------------------------------------------------------------------------------------------- command line

def command(*arguments, **options):
    return subprocess.run([sys.executable, HERE / "internal_rl.py", *map(str, arguments)], capture_output=True, text=True, **options)


SMALL = ("--preset", "tiny", "--device", "cpu", "--pretrain-steps", 32, "--steer-steps", 16, "--probe-steps", 16, "--discover-steps", 32,
         "--audition-steps", 16)


def test_tiny_run_end_to_end(tmp_path):
    done = command("--task", "gridworld", *SMALL, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "token-level" in done.stdout
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "result.json", "pretrain.pt", "probe.pt", "steer.pt", "audition.pt", "discover.pt", "rl.pt", "raw.pt",
                     "gates.png", "probe.png", "success.png", "codes.png", "episode.png", "episode.gif"}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"stage", "step", "time_s"} <= set(line) for line in lines)
    assert {line["method"] for line in lines if "episodes" in line and "success" in line} == {"internal", "raw"}
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names if name.endswith(".pt")}
    again = command("--task", "gridworld", *SMALL, "--out", tmp_path / "run")
    assert again.returncode == 0 and "reused" in again.stdout
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())
    refused = command(*SMALL, "--width", 64, "--out", tmp_path / "run")
    assert refused.returncode == 2 and "width=32" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert command(*SMALL, "--rl-lr", 0.5, "--stage", "steer", "--out", tmp_path / "run").returncode == 2  # rl.pt has another rl_lr
    (tmp_path / "run/discover.pt").write_bytes(before["discover.pt"][:1000])
    broken = command(*SMALL, "--out", tmp_path / "run")
    assert broken.returncode == 2 and "discover.pt cannot be read" in broken.stderr and len(broken.stderr.splitlines()) == 1


def test_tiny_ant_run_end_to_end(tmp_path):
    arguments = ("--task", "ant", "--preset", "tiny", "--device", "cpu", "--data", tmp_path / "data", "--out", tmp_path / "run")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "raw-action RL" in done.stdout
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names >= {"result.json", "pretrain.pt", "probe.pt", "steer.pt", "audition.pt", "discover.pt", "rl.pt", "raw.pt", "gates.png", "probe.png",
                     "success.png", "codes.png", "episode.png", "episode.gif"}
    assert json.loads((tmp_path / "run/result.json").read_text()).keys() >= {"steer_success", "held_share", "internal_success", "raw_success"}
    (tmp_path / "run/probe.pt").unlink()
    refused = command(*arguments, "--trajectories", 32)
    assert refused.returncode == 2 and "trajectories=64, not 32" in refused.stderr and len(refused.stderr.splitlines()) == 1
    (tmp_path / "run/pretrain.pt").unlink()
    shard = next((tmp_path / "data").glob("*noise0.1/000.npz"))
    shard.write_bytes(shard.read_bytes()[:1000])
    broken = command(*arguments, "--stage", "pretrain")
    assert broken.returncode == 2 and "000.npz cannot be read" in broken.stderr and len(broken.stderr.splitlines()) == 1
    assert not (tmp_path / "run/pretrain.pt").exists()


def test_resumed_run_equals_uninterrupted(tmp_path):
    """Every stage, stopped after each round and taken up again, ends bit for bit where an uninterrupted run does."""
    config = rl.Settings(**{**rl.PRESETS["gridworld", "tiny"], "pretrain_steps": 48, "audition_steps": 32, "discover_steps": 48, "rl_episodes": 768, "probe_steps": 16,
                            "steer_steps": 16})

    def everything(run):
        base = rl.pretrain(run)
        meta = rl.discover(run, base)
        rl.reinforcement(run, base, meta, "internal")
        rl.reinforcement(run, base, meta, "raw")

    whole, parts = (rl.Run(config, tmp_path / name, torch.device("cpu")) for name in ("whole", "parts"))
    for run in (whole, parts):
        run.folder.mkdir()
    everything(whole)
    stops = 0
    while True:
        parts.stop = signal.SIGINT
        try:
            everything(parts)
            break
        except SystemExit as stopped:
            assert stopped.code == 130
            stops += 1
    assert stops >= 8
    for stage in ("pretrain", "audition", "discover", "rl", "raw"):
        a, b = whole.load(stage), parts.load(stage)
        for name, module in a["modules"].items():
            for key, value in module.items():
                assert torch.equal(value, b["modules"][name][key]), (stage, key)
    drop_time = lambda run: [{k: v for k, v in line.items() if k != "time_s"} for line in run.metrics()]
    assert str(drop_time(whole)) == str(drop_time(parts))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "internal_rl.py", "--preset", "tiny", "--stage", "pretrain", "--device", "cpu",
                                "--pretrain-steps", "100000", "--out", tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("pretrain:"):
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait(60) == 143 and "The same command goes on" in output
    assert (tmp_path / "run/pretrain.pt").exists()


def test_not_a_number_stops_and_names_the_checkpoint(tmp_path, capsys):
    run = rl.Run(rl.Settings(**rl.PRESETS["gridworld", "tiny"]), tmp_path, torch.device("cpu"))
    module = torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit) as stopped:
        rl.train(run, "pretrain", {"base": module}, {}, generator(), 3, lambda i: {"loss": float("nan") if i else 1.0}, 1, None)
    assert stopped.value.code == 1
    assert "round 2" in capsys.readouterr().err and not (tmp_path / "pretrain.pt").exists()


@pytest.mark.parametrize("arguments,word", [
    (["--task", "chess"], "chess"), (["--preset", "huge"], "huge"), (["--bogus", "1"], "bogus"), (["--alpha", "-1"], "alpha"),
    (["--layers", "3"], "layers"), (["--size", "3", "--subgoals", "pairs", "--colours", "8", "--walls", "0"], "solvable"), (["--max-steps", "3"], "max_steps"), (["--post-task", "0-9"], "colour 9"), (["--heads", "5"], "heads"), (["--seeds", "0,x"], "seeds"),
    (["--size", "1"], "size"), (["--colours", "3"], "colours"), (["--stage", "later"], "later"), (["--pretrain-lr", "nan"], "pretrain_lr"),
    (["--view", "side"], "view"), (["--base", "mamba"], "mamba"), (["--task", "ant", "--noise", "3"], "noise"), (["--task", "ant", "--thin", "0"], "thin"),
    (["--thin", "0.5"], "thin"), (["--next-cell", "1"], "next_cell"), (["--bursts", "0.1"], "bursts"), (["--trajectories", "64"], "trajectories"),
    (["--task", "ant", "--trajectories", "5000"], "trajectories"), (["--task", "ant", "--trajectories", "2"], "trajectories"), (["--task", "ant", "--stage", "bench"], "bench"), (["--threshold", "2"], "threshold"),
    (["--evaluation", "100"], "evaluation"),
    pytest.param(["--device", "cuda"], "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
])
def test_refused_inputs(arguments, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        rl.main([*arguments, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and word in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_bench_command(tmp_path):
    done = command("--stage", "bench", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("bench:") == 3 and not list(tmp_path.iterdir())


def test_help_names_every_setting():
    shown = command("--help").stdout
    assert all("--" + setting.name.replace("_", "-") in shown for setting in rl.fields(rl.Settings))
