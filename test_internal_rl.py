"""Tests: independent computations, no leak from the future, invariants, and whole runs at tiny sizes."""
import ast
import copy
import hashlib
import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # tensors are tiny here; several threads get in each other's way

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from torch.distributions import Normal, kl_divergence

import ant_tasks as ant
import gridworld
import internal_rl as rl

HERE = Path(__file__).parent
CONFIG = rl.configure("gridworld", "quick", width=32, heads=2, walls=2, rank=5)
gridworld.HELD_OUT, ant.HELD_OUT = 64, 24  # trajectories; more take long
ENCODERS = [rl.TrajectoryEncoder, rl.SegmentEndEncoder]

def generator(seed=0):
    return torch.Generator().manual_seed(seed)

def base_model(config):
    torch.manual_seed(0)
    model = rl.Base(config)
    for block in model.blocks:
        if isinstance(block, rl.Block):
            nn.init.normal_(block.position_bias.weight)  # as after training, so that positions matter
    return model

@pytest.fixture
def base():
    return base_model(CONFIG)

@pytest.fixture
def batch():
    return gridworld.expert_batch(CONFIG, 24, generator())

def metacontroller(encoder=rl.TrajectoryEncoder, gate_bias=-0.5):
    """Some of its gates are open, others are not."""
    torch.manual_seed(1)
    gate = rl.Gate(CONFIG)
    nn.init.constant_(gate.switch[-1].bias, gate_bias)
    return rl.Metacontroller(nn.LayerNorm(32), gate, rl.Hypernetwork(CONFIG), encoder(CONFIG))

def new_run(folder, **changes):
    return rl.Run(replace(CONFIG, **changes), folder, "cpu")

def states(module):
    return copy.deepcopy(module.state_dict())

# ======== The grid

def test_pretraining_tasks_match_tables_and_withhold_transitions():
    for kind, size in gridworld.SUBGOAL_SIZE.items():
        tasks = gridworld.pretraining_tasks(kind)
        assert len({tuple(task) for task in tasks.tolist()}) == 16
        goals = tasks[:, ::size] // size
        assert torch.equal(goals.repeat_interleave(size, 1) * size + torch.arange(3 * size) % size, tasks)
        changes = {(a, b) for task in goals.tolist() for a, b in zip(task, task[1:])}
        assert changes == {(a, b) for a in range(4) for b in range(4) if b not in (a, (a + 1) % 4)}
    assert gridworld.pretraining_tasks("pairs")[0].tolist() == [0, 1, 4, 5, 0, 1]  # A C A
    assert gridworld.pretraining_tasks("singles")[0].tolist() == [0, 3, 2]  # A D C

def ahead(cell, size):
    """{action: cell} of the moves that stay on the grid."""
    row, column = divmod(cell, size)
    moves = {0: (row - 1, column), 1: (row + 1, column), 2: (row, column - 1), 3: (row, column + 1)}
    return {a: r * size + c for a, (r, c) in moves.items() if 0 <= r < size and 0 <= c < size}

def shortest(layouts, i, size, cell, target):
    """By breadth-first search on plain sets: steps from cell to target, actions that start such a path."""
    blocked = {*layouts.walls[i].tolist(), *layouts.colours[i].tolist()} - {target}
    steps = {target: 0}  # of each cell to the target
    queue = [target]
    for near in queue:
        for far in {*ahead(near, size).values()} - blocked - {*steps}:
            steps[far] = steps[near] + 1
            queue.append(far)
    after = {a: steps[to] for a, to in ahead(cell, size).items() if to in steps}
    least = min(after.values(), default=math.inf)
    return least + 1, [a for a in after if after[a] == least]

@pytest.mark.parametrize("size,colours,walls,kind", [(5, 4, 3, "singles"), (7, 8, 4, "pairs")])
def test_expert_paths_are_shortest(size, colours, walls, kind):
    pair = gridworld.SUBGOAL_SIZE[kind]
    tasks = gridworld.pretraining_tasks(kind)[torch.arange(40) % 16]
    layouts = gridworld.draw_layouts(40, size, colours, walls, generator())
    paths = gridworld.expert_paths(layouts, size, tasks, 100, generator(1), subgoal_size=pair)
    assert paths.success.all()
    for i, length in enumerate(paths.length.tolist()):
        cell, pursued = int(layouts.agent[i]), []
        for colour in tasks[i].tolist():
            target = int(layouts.colours[i, colour])
            pursued += [colour // pair] * shortest(layouts, i, size, cell, target)[0]
            cell = target
        assert paths.subgoal[i, :length].tolist() == pursued
        assert paths.observation[i, length, -1] == cell

def test_bayes_floor_matches_a_slow_filter():
    tasks = gridworld.pretraining_tasks("singles")
    layouts = gridworld.draw_layouts(8, 5, 4, 2, generator())
    paths = gridworld.expert_paths(layouts, 5, tasks[:8], 60, generator(1))
    nll = right = 0.0
    for i, length in enumerate(paths.length.tolist()):
        belief = [(1 / 16, task) for task in tasks.tolist()]  # probability, what is still to be visited
        for t in range(length):
            cell, to = paths.observation[i, t:t + 2, -1].tolist()
            right += max(sum(p for p, task in belief if task[:1] == [k]) for k in range(4))
            likely = []
            for p, task in belief:
                target = int(layouts.colours[i, task[0]])
                good = shortest(layouts, i, 5, cell, target)[1]
                if paths.action[i, t] in good and (task[1:] or to != target or t + 1 == length):
                    likely.append((p / len(good), task[to == target:]))
            total = sum(p for p, _ in likely)
            nll -= math.log(total)
            belief = [(p / total, task) for p, task in likely]
    steps = paths.length.sum().item()
    found = gridworld.bayes_floor(layouts, 5, paths, tasks, 60)
    assert found == pytest.approx((nll / steps, right / steps), abs=1e-5)

def test_random_success_counts_all_sequences_of_moves():
    config = rl.configure("gridworld", "quick", size=3, max_steps=5, post_task="0-1")
    layouts = gridworld.draw_layouts(40, 3, 4, 1, generator())
    sequences = torch.cartesian_prod(*[torch.arange(4)] * 5)  # [1024, 5]
    game = gridworld.Game(layouts[torch.arange(40).repeat_interleave(1024)], 3, [0, 1], 5)
    for action in sequences.repeat(40, 1).T:
        game.step(action)
    share = game.success().view(40, 1024).double().mean(1)
    assert (share > 0).sum() > 10 and (share == 0).any()
    torch.testing.assert_close(gridworld.random_success(config, layouts), share)

def same_games(game, envs, see, draw):
    """Plays a batched game and Gymnasium environments until all are over → what they ended with."""
    ends = {}
    while len(ends) < len(envs):
        action = draw()
        results = game.step(torch.as_tensor(action))
        for i in [i for i in range(len(envs)) if i not in ends]:
            observation, *found, info = envs[i].step(action[i])
            assert np.array_equal(observation, see(game)[i])
            assert found == [part[i].item() for part in results]
            assert info["visits"] == game.visits[i]
            if game.done[i]:
                ends[i] = info.get("reason", tuple(found))
    return set(ends.values())

def test_the_batched_game_equals_gymnasium():
    layouts = gridworld.draw_layouts(60, 5, 4, 2, generator())
    envs = [gridworld.GridworldPinpad(5, 4, 2, max_steps=25, task="1-0") for _ in range(60)]
    for i, env in enumerate(envs):
        env.reset(options={part: cells[i].tolist() for part, cells in vars(layouts).items()})
    see = lambda game: F.one_hot(game.observation(), 25).flatten(1)
    random = lambda: np.random.default_rng(int(game.steps.sum())).integers(4, size=60)
    game = gridworld.Game(layouts, 5, [1, 0], 25)
    assert same_games(game, envs, see, random) == {(1, True, False), (0, True, False), (0, False, True)}

def test_batched_ants_equal_gymnasium():
    layouts = ant.draw_layouts(8, 4, 4, 1, generator(4))
    game = ant.Game(layouts, 4, [0, 1, 2, 3], 45)
    envs = [ant.AntPinpad(max_steps=45) for _ in range(8)]
    for i, env in enumerate(envs):
        options = {name: getattr(layouts, name)[i].numpy() for name in ("colours", "walls", "qpos", "qvel")}
        assert np.array_equal(env.reset(seed=i, options=options)[0], game.observation()[i])
    eastwards = lambda: ant.gait(game.simulation.qpos, game.simulation.qvel, np.zeros(8))
    assert len(same_games(game, envs, ant.Game.observation, eastwards)) >= 3

@pytest.mark.filterwarnings("error", "ignore:.*A Box observation space m..imum value is -?infinity.*")
@pytest.mark.parametrize("name", ["GridworldPinpad-v0", "AntPinpad-v0"])
def test_gymnasium_checks(name):
    env = gymnasium.make(name, render_mode="rgb_array").unwrapped
    check_env(env)
    assert not np.array_equal(env.reset(seed=5)[0], env.reset(seed=6)[0])

def scripted(task, max_steps=20):
    """3×3:  0 . 1 / @ # . / . . .   as a Gymnasium environment."""
    env = gridworld.GridworldPinpad(3, 2, 1, max_steps, task, render_mode="ansi")
    env.reset(options={"agent": 3, "colours": [0, 2], "walls": [4]})
    return env

def test_a_visit_needs_a_move_and_what_ends_a_game():
    env = scripted("0-1")
    assert env.render() == "0 . 1\n@ # .\n. . ."
    assert env.step(gridworld.RIGHT)[4]["agent"] == 3  # a wall
    assert env.step(gridworld.UP)[4]["visits"] == 1
    for action in (gridworld.UP, gridworld.LEFT):  # off the grid, standing on colour 0: no second visit
        assert env.step(action)[1:4] == (0, False, False)
    assert [env.step(gridworld.RIGHT)[1:4] for _ in range(2)] == [(0, False, False), (1, True, False)]
    assert scripted("1-0").step(gridworld.UP)[1:4] == (0, True, False)
    assert scripted("1-0", max_steps=1).step(gridworld.DOWN)[1:4] == (0, False, True)
    assert scripted("0", max_steps=1).step(gridworld.UP)[1:4] == (1, True, False)

def test_symmetries_obey_the_rules(batch):
    cells, actions = gridworld.symmetries(5)
    to = gridworld.neighbours(5)
    assert len({tuple(image) for image in cells.tolist()}) == gridworld.SYMMETRIES == 8
    for image, turned in zip(cells, actions):
        assert torch.equal(to[image[:, None], turned], image[to])
    image = rl.mirrored(CONFIG, batch, generator())
    assert not torch.equal(image.observation, batch.observation)
    agent, valid = image.observation[..., -1], batch.valid
    assert torch.equal(to[agent[:, :-1], image.action][valid], agent[:, 1:][valid])
    for i, last in enumerate(batch.length.tolist()):  # it ends on the colour that it was heading for
        assert agent[i, last] == image.observation[i, last, batch.subgoal[i, last - 1]]

# ======== Chapters 1 to 3

@pytest.fixture(scope="module", params=["transformer", "windowed", "hawk"])
def world(request):
    """(config, base model, trajectories). The ant's blocks are Hawk."""
    config = replace(CONFIG, window=5 * (request.param == "windowed"))
    if request.param == "hawk":
        config = rl.configure("ant", "quick", width=32, heads=2, rank=5, max_steps=250)
    return config, base_model(config), config.world.expert_batch(config, 12, generator())

def test_base_cannot_see_the_future_and_acts_step_by_step_as_in_one_pass(world):
    config, model, trajectories = world
    x = trajectories.observation
    changed = x.clone()
    changed[:, 5:] = rl.mirrored(config, trajectories, generator(9)).observation[:, 5:]
    assert torch.allclose(model(x)[:, :5], model(changed)[:, :5], atol=1e-6)
    assert not torch.allclose(model(x)[:, 5:], model(changed)[:, 5:], atol=1e-3)
    x, cache = x[:, :60], [None] * config.layers
    steps = [model.upper(model.lower(x[:, t:t + 1], cache), cache) for t in range(x.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), model(x), atol=1e-4)

def test_a_block_sees_as_far_back_as_its_window(world):
    config, model, _ = world
    x = torch.randn(1, 12, 32, generator=generator(), requires_grad=True)
    gradient, = torch.autograd.grad(model.blocks[0](x)[0][0, 9].square().sum(), x)
    assert gradient[0].any(-1).nonzero()[:, 0].tolist() == [*range(5 if config.window else 0, 10)]

def test_relative_buckets():
    bucket, hidden = rl.relative_bucket(3, 200, 0, torch.device("cpu"))
    far = [min(16 + int(16 * math.log(ago / 16) / math.log(8)), 31) for ago in range(16, 200)]
    for i in range(3):  # the query of step 197 + i; the future is hidden
        assert bucket[i].flip(0).tolist() == ([0] * 2 + [*range(16), *far])[i:][:200]
        assert hidden[i].tolist() == [False] * (198 + i) + [True] * (2 - i)

def same_with_gradient(found, expected, *inputs):
    assert torch.allclose(found, expected)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    assert all(map(torch.allclose, ours, theirs))

@pytest.mark.parametrize("time", [1, 15, 16, 17, 50])
def test_hawks_scan_equals_the_recurrence_with_its_gradient(time):
    torch.manual_seed(time)
    a, b = torch.rand(2, 3, time, 5, dtype=torch.float64, requires_grad=True)
    states = [torch.zeros(3, 5)]
    for t in range(time):
        states.append(a[:, t] * states[-1] + b[:, t])
    same_with_gradient(ant.LinearRecurrence.apply(a, b), torch.stack(states[1:], 1), a, b)

def test_pretraining_loss_against_a_loop(base, batch):
    loss, nll = rl.pretraining_loss(replace(CONFIG, next_obs=0.5), base, batch)
    last = base.last_residual(base.lower(batch.observation))
    actions = following = 0.0
    for i, length in enumerate(batch.length.tolist()):
        for t in range(length):
            actions -= base.head(last[i, t]).log_softmax(-1)[batch.action[i, t]]
            logits = base.head.observation(last[i, t]).view(-1, 25).log_softmax(-1)  # a row a thing
            following -= logits.gather(1, batch.observation[i, t + 1][:, None]).sum()
    found = torch.stack([nll, loss]) * batch.length.sum()
    assert torch.allclose(found, torch.stack([actions, actions + 0.5 * following]), rtol=1e-5)

@pytest.mark.parametrize("encoder", ENCODERS)
def test_losses_ignore_padding(encoder, base, batch):
    longer = replace(batch, observation=F.pad(batch.observation, (0, 0, 0, 4), value=3),
                     action=F.pad(batch.action, (0, 4), value=2))
    for a, b in zip(rl.pretraining_loss(CONFIG, base, batch), rl.pretraining_loss(CONFIG, base, longer)):
        assert torch.allclose(a, b, atol=1e-6)
    meta = metacontroller(encoder).eval()
    plain, padded = (meta(base.lower(x.observation), x.length, generator()) for x in (batch, longer))
    step = torch.arange(batch.observation.shape[1])
    for a, b, end in zip(plain[1:], padded[1:], (1, 1, 0)):  # β, gates and μ, which nobody reads at the end;
        inside = step < batch.length[:, None] + end  # z differs, because its noise does
        assert torch.allclose(a[inside], b[:, :a.shape[1]][inside], atol=1e-5)

@torch.no_grad()
def test_zero_control_gives_exactly_the_base_model(base, batch):
    e = base.lower(batch.observation[:, :-1])
    meta = metacontroller()
    meta.hyper.B.zero_()
    assert torch.equal(meta.hyper(e, torch.randn(*e.shape[:2], 4)), e)
    assert torch.equal(rl.LabelledControllers(CONFIG)(e, batch.subgoal), e)
    nll, _ = rl.discovery_loss(CONFIG, base, meta, batch, batch, generator())
    plain = rl.action_loss(CONFIG, base(batch.observation[:, :-1]), batch)
    assert nll.item() == pytest.approx(plain.item(), abs=1e-6)

def test_low_rank_control_equals_the_dense_matrix_product():
    hyper = metacontroller().hyper.double()
    e, z = torch.randn(2, 3, 32).double(), torch.randn(2, 3, 4).double()
    w = F.pad(hyper.units(z), (0, 1), value=1)
    A, B = (torch.einsum("btm,mrc->btrc", w, weight) for weight in (hyper.A, hyper.B))  # Eq. 18
    U = B.transpose(2, 3) @ A / math.sqrt(32)
    assert torch.allclose(hyper(e, z), e + torch.einsum("btij,btj->bti", U, e), rtol=0, atol=1e-10)

def test_labelled_controllers_are_one_matrix_a_subgoal():
    controllers = rl.LabelledControllers(CONFIG).double()
    nn.init.normal_(controllers.B)
    e, subgoal = torch.randn(6, 9, 32).double(), torch.randint(4, (6, 9))
    found = controllers(e, subgoal)
    for k in range(4):
        U = controllers.B[k].T @ controllers.A[k] / math.sqrt(32)
        here = subgoal == k
        assert torch.allclose(found[here], e[here] + e[here] @ U.T, rtol=0, atol=1e-10)

@pytest.mark.parametrize("subgoals,task,order", [
    ("singles", "0-1-3", [0, 1, 3]), ("pairs", "0-1-6-7-2", [0, 0, 3, 3, 1])])
def test_labels_follow_the_visits(subgoals, task, order):
    config = rl.configure("gridworld", "tiny", size=7, colours=8, subgoals=subgoals, post_task=task)
    game = SimpleNamespace(visits=torch.zeros(9, dtype=torch.long), rows=torch.arange(9))
    asked = rl.with_labels(config, lambda e, subgoal: subgoal.tolist(), game)
    for visits in range(len(order)):
        game.visits[4] = visits
        assert asked(torch.tensor([1, 4, 8]), None) == [order[0], order[visits], order[0]]

# ======== Chapter 4

@pytest.mark.parametrize("time", [2, 16, 17, 100])
def test_gates_replace_and_hold(time):
    torch.manual_seed(time)
    beta = torch.rand(3, time, dtype=torch.float64, requires_grad=True)
    proposal = torch.randn(3, time, 8, dtype=torch.float64, requires_grad=True)
    z = [proposal[:, 0]]
    for t in range(1, time):
        z.append(beta[:, t, None] * proposal[:, t] + (1 - beta[:, t, None]) * z[-1])
    same_with_gradient(rl.integrate(beta, proposal), torch.stack(z, 1), beta, proposal)
    opens = beta > 0.5
    last = [max(s for s in range(t + 1) if s == 0 or opens[1, s]) for t in range(time)]
    assert torch.equal(rl.integrate(opens.double(), proposal)[1], proposal[1, last])

@pytest.mark.parametrize("encoder", ENCODERS)
def test_gates_cannot_see_the_future_and_the_encoders_do(encoder, base, batch):
    meta, rows = metacontroller(encoder).eval(), torch.arange(24)
    e = base.lower(batch.observation)
    changed = e.clone()
    future = batch.length - int(encoder is rl.TrajectoryEncoder)  # it reads e_{1:T}, the other also what
    changed[rows, future] += torch.randn(32, generator=generator(3))  # the last move leads to
    _, beta, _, mu = meta(e, batch.length, generator())
    _, beta_changed, _, mu_changed = meta(changed, batch.length, generator())
    before = torch.arange(beta.shape[1]) < future[:, None]
    assert torch.equal(beta[before], beta_changed[before]) and not torch.equal(beta, beta_changed)
    assert (beta[:, 0] == 1).all()
    assert (mu[rows, future - 1] - mu_changed[rows, future - 1]).abs().amax(1).min() > 1e-5

def test_a_code_is_inferred_from_where_the_gate_opens_next_and_nothing_else(base, batch):
    encoder = metacontroller(rl.SegmentEndEncoder).encoder
    e = base.lower(batch.observation)
    opens = torch.rand(e.shape[:2], generator=generator()) < 0.3
    mu = encoder(e, opens.float(), batch.length)
    for i, last in enumerate(batch.length.tolist()):
        end = [min((u for u in range(t + 1, last) if opens[i, u]), default=last) for t in range(last)]
        assert torch.allclose(mu[i, :last], encoder.mean(e[i, end]), atol=1e-5)

def test_the_gate_that_ends_a_segment_gets_a_gradient():
    gates = torch.tensor([[1.0, 0, 0.5, 0, 0]], requires_grad=True)
    x = torch.tensor([[[9.0], [8], [3], [7], [5]]])
    end = rl.at_segment_end(gates, x, torch.tensor([4]))
    assert end.flatten().tolist() == [4, 4, 5, 5, 5]  # half of what is seen at step 2, half of the very end
    assert torch.autograd.grad(end[0, 0, 0], gates)[0][0, 2] == 3 - 5

@pytest.mark.parametrize("encoder", ENCODERS)
def test_codes_have_one_length(encoder, base, batch):
    meta = metacontroller(encoder)
    e = base.lower(batch.observation)
    opens = torch.rand(e.shape[:2], generator=generator()) < 0.3
    raw = meta.encoder(e, opens.float(), batch.length)
    expected = raw / raw.norm(dim=-1, keepdim=True) * math.sqrt(4 * (1 - 0.4 ** 2))
    assert torch.allclose(meta.code_means(e, opens.float(), batch.length), expected, atol=1e-3)

def test_gates_are_drawn_in_training_only_and_pass_gradients_as_if_they_were_beta(base, batch):
    meta = metacontroller()
    e = base.lower(batch.observation).detach()
    _, beta, gates, _ = meta(e, batch.length, generator())
    drawn = torch.stack([meta(e, batch.length, generator(seed))[2] for seed in range(100)]).detach()
    assert set(drawn.round(decimals=5).unique().tolist()) == {0, 1}
    assert (drawn.mean(0) - beta).abs().mean() < 0.05
    same_with_gradient(gates - gates.detach(), beta - beta.detach(), *meta.gate.parameters())
    z, beta, gates, _ = meta.eval()(e, batch.length, generator())
    assert torch.allclose(gates, (beta > 3 / 8).float(), atol=1e-6)
    held = gates[:, 1:] < 0.5
    assert held.any() and not held.all()
    assert torch.allclose(z[:, 1:][held], z[:, :-1][held], atol=1e-5)

def test_gradient_reaches_every_trainable_and_no_frozen_parameter(base, batch):
    base.requires_grad_(False)
    meta, codes, policy = metacontroller(), metacontroller(rl.SegmentEndEncoder), rl.Policy(CONFIG)
    nll, kl = rl.discovery_loss(CONFIG, base, meta, batch, batch, generator())
    image = rl.mirrored(CONFIG, batch, generator())
    means = policy.replay(torch.randn(3, 4, 32), torch.tensor([4, 2, 3]))
    other, _ = rl.discovery_loss(CONFIG, base, codes, batch, image, generator())
    (nll + 0.1 * kl + other + means.sum()).backward()
    for module in (meta, codes.hyper, codes.encoder, policy):
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in base.parameters())

@pytest.mark.parametrize("mirror", [False, True])
def test_codes_of_one_world_act_in_its_image_and_cost_at_open_gates(mirror, base, batch):
    meta = metacontroller()
    image = rl.mirrored(CONFIG, batch, generator()) if mirror else batch
    nll, kl = rl.discovery_loss(CONFIG, base, meta, batch, image, generator(3))
    z, _, gates, mu = (x[:, :-1] for x in meta(base.lower(batch.observation), batch.length, generator(3)))
    out = base.upper(meta.hyper(base.lower(image.observation[:, :-1]), z))
    assert nll.item() == pytest.approx(rl.action_loss(CONFIG, out, image).item(), rel=1e-5)
    assert not torch.allclose(out, base(image.observation[:, :-1]), atol=1e-3)  # control matters
    cost = kl_divergence(Normal(mu, torch.tensor(rl.CODE_STD)), Normal(0.0, 1.0)).sum(-1)
    assert kl.item() == pytest.approx((cost * gates)[batch.valid].mean().item(), rel=1e-4)
    assert cost.max() - cost.min() < 1e-3  # all cost the same

def test_alpha_follows_the_rate():
    for nats, pace, percent in ((1.8, 1, 1), (99, 1, 2), (1.2, 1, 0), (0.6, 0.5, -0.5), (0, 1, -2)):
        alpha = torch.tensor(0.01)
        rl.follow_rate(alpha, torch.tensor(nats), 1.2, pace)
        assert alpha.item() == pytest.approx(0.01 * math.exp(percent / 100), rel=1e-4)
    for nats, bound in ((9, 2), (0, 1e-3)):
        for _ in range(400):
            rl.follow_rate(alpha, torch.tensor(nats), 1.2, 1)
        assert alpha.item() == pytest.approx(bound)

def test_gates_are_learned_first_and_codes_anew(base, tmp_path, monkeypatch):
    run = new_run(tmp_path, gate_steps=16, code_steps=16, discover_batch=8)
    loss, seen, nats = rl.discovery_loss, [], []
    def spy(config, base, meta, batch, image, rng):
        found = loss(config, base, meta, batch, image, rng)
        cells = (batch.length - 1).sum()  # see the world below
        seen.append((meta.training, image is batch, states(meta), found[1] * batch.length.sum() / cells))
        return found
    monkeypatch.setattr(rl, "discovery_loss", spy)
    monkeypatch.setattr(rl.Run, "look_at_gates", lambda *_: {})
    monkeypatch.setattr(gridworld, "entries", lambda batch, size: F.pad(batch.valid, (-1, 0)))
    monkeypatch.setattr(rl, "follow_rate", lambda alpha, found, *_: (alpha.mul_(0.9), nats.append(found)))
    gates = rl.learn_gates(run, base.requires_grad_(False))
    learned = states(gates)
    meta = rl.learn_codes(run, base, gates)
    assert torch.allclose(torch.stack(nats), torch.stack([cost for *_, cost in seen[:16]]))  # nats a cell
    for i, (training, plain, before, _) in enumerate(seen):
        assert training == plain == (i < 16)  # drawn gates, the same world; then gates at rest, an image
        after = seen[i + 1][2] if i != 15 and i != 31 else states(gates if i == 15 else meta)
        changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == ({"norm", "gate", "hyper", "encoder", "alpha"} if i < 16 else {"hyper", "encoder"})
    start = seen[16][2]
    kept = {name[:4] for name in {*start} & {*learned} if torch.equal(start[name], learned[name])}
    assert kept == {"norm", "gate"}
    assert not meta.training and not any(p.requires_grad for p in meta.parameters())

# ======== Chapter 5

@torch.no_grad()
def test_the_gate_that_acts_is_the_gate_that_learned(base, batch):
    meta = metacontroller().eval()
    e = base.lower(batch.observation)
    _, _, gates, _ = meta(e, batch.length, generator())
    proposal = torch.randn(*gates.shape, CONFIG.n_z, generator=generator())
    expected = meta.hyper(e, rl.integrate(gates, proposal))
    actor = rl.CodeActor(CONFIG, meta, None, 24, 0.0, generator())
    opened = torch.zeros(gates.shape)

    def choose(e, games):
        actor.count[games] += 1
        opened[games, t] = 1
        return proposal[games, t]

    actor.choose = choose
    for t in range(gates.shape[1]):
        games = (t <= batch.length).nonzero()[:, 0]  # the games that still run
        assert torch.allclose(actor(games, e[games, t]), expected[games, t], atol=1e-5)
        assert torch.equal(opened[games, t], gates[games, t].round())
    assert 0.1 < opened.mean() < 0.9

@torch.no_grad()
def test_the_policy_acts_and_advances_only_at_switches_and_replay_equals_rollout(base):
    torch.manual_seed(2)
    policy = rl.Policy(CONFIG)
    nn.init.normal_(policy.mean.weight)
    actor = rl.CodeActor(CONFIG, metacontroller(gate_bias=-0.7), policy, 64, 0.7, generator(1))
    seen = []
    def watched(games, e):
        count, memory, code = actor.count.clone(), actor.memory[0].clone(), actor.code.clone()
        controlled = actor(games, e)
        assert torch.equal((actor.memory[0] != memory).any(1), actor.count > count)
        assert torch.equal((actor.code != code).any(1), actor.count > count)
        assert torch.equal(controlled, actor.meta.hyper(e, actor.code[games]))
        seen.append(torch.zeros(64, 32).index_copy(0, games, e))
        return controlled

    game = gridworld.Game(gridworld.draw_layouts(64, 5, 4, 2, generator()), 5, [0, 1, 2, 3], 60)
    played = rl.play(CONFIG, base, game, generator(2), watched)
    own = base.lower(played.observation[:, :-1])  # each game is played as if it were alone
    assert torch.allclose(torch.stack(seen, 1)[played.valid], own[played.valid], atol=1e-4)
    count, S = actor.count, int(actor.count.max())
    assert count.min() == 1 and S > 2 and count.sum() < played.length.sum()
    mask = torch.arange(S) < count[:, None]
    e, z = actor.e[:, :S], actor.z[:, :S]
    replayed = rl.gaussian_log_prob(z, policy.replay(e, count), 0.7)
    rolled_out = Normal(actor.mean[:, :S], 0.7).log_prob(z).sum(-1)
    assert torch.allclose(replayed[mask], rolled_out[mask], atol=1e-4)
    changed = policy.replay(torch.cat([e[:, :1], e[:, 1:] + torch.randn(32)], 1), count)
    assert torch.equal(changed[:, 0], policy.replay(e, count)[:, 0])  # it cannot see the future
    assert not torch.equal(changed, policy.replay(e, count))

def test_the_clipped_surrogate_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    new, advantage = torch.tensor([[0.5, 0.1], [-0.9, 9.0]]), torch.tensor([2.0, -1.0])
    # Advantage 2: e^0.5 is cut at 1.5, e^0.1 is not. Advantage −1: e^−0.9 is cut at 0.5; the last is padding.
    found = rl.clipped_surrogate(new, torch.zeros(2, 2), advantage, mask)
    assert found.item() == pytest.approx(-(2 * 1.5 + 2 * math.exp(0.1) - 0.5) / 2, rel=1e-5)
    found = rl.clipped_surrogate(-new, torch.zeros(2, 2), advantage, mask)  # nothing is cut that is worse
    expected = -(2 * math.exp(-0.5) + 2 * math.exp(-0.1) - math.exp(0.9)) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)

def test_reinforce_by_hand():
    theta, asked = nn.Parameter(torch.zeros(4, 2)), []
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    def reinforce(success, lr):
        log_prob_of = lambda rows: asked.append(rows.tolist()) or theta[rows]
        optimizer = torch.optim.SGD([theta], lr=9)
        return rl.reinforce(log_prob_of, torch.zeros(4, 2), success, mask, optimizer, lr, generator())
    loss = reinforce(torch.tensor([1.0, 0, 0, 0]), lr=0.0)
    assert len(asked) == 12
    assert all(sorted(sum(asked[i:i + 4], [])) == [0, 1, 2, 3] for i in (0, 4, 8))  # three passes over all
    row, = asked[-1]
    advantage = (0.75 if row == 0 else -0.25) / (math.sqrt(3 / 16) + 1e-3)
    assert loss.item() == pytest.approx(-advantage * mask[row].sum().item(), rel=1e-5)  # ratios are 1
    reinforce(torch.tensor([1.0, 0, 0, 0]), lr=0.01)
    assert torch.equal(theta.sign(), torch.tensor([[1.0, 1], [-1, -1], [-1, 0], [-1, -1]]))
    before = theta.tolist()
    assert reinforce(torch.zeros(4), 0.01) == reinforce(torch.ones(4), 0.01) == 0  # all end alike
    assert theta.tolist() == before and len(asked) == 24  # nothing is learned

# ======== Looking inside

def test_gate_scores_by_hand():
    subgoal = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])  # new at steps 3 and 8
    batch = gridworld.Trajectories(None, torch.zeros(1, 10), torch.tensor([10]), None, subgoal)
    beta = torch.tensor([[1.0, 0, 0, 0, 0.38, 0.37, 0.9, 0, 0, 0, 1]])  # open at steps 4 and 6
    for tolerance, scores in {0: (0, 0), 1: (0.5, 0.5), 2: (1, 1)}.items():
        assert tuple(rl.gate_scores(beta, batch, tolerance).values()) == scores

def test_composition_counts_what_follows(base, tmp_path, monkeypatch):
    """Of games decided here: 0 is always reached first, others in half of them; then b unless b = a + 1."""
    def play(config, base, game, rng, intervene):
        first, then = game.tasks.view(-1, 3)[:, :2].T
        for visits, asked in enumerate((first, then, then)):
            game.visits = torch.full_like(first, visits)
            assert torch.equal(intervene(game.rows, None), asked)
        reached = (first == 0) | (game.rows % 2 == 0)
        success = reached & (then != (first + 1) % 4)
        game.visits = reached.long() + success
        return SimpleNamespace(success=success.float())
    monkeypatch.setattr(rl, "play", play)
    matrix = rl.composition(new_run(tmp_path), base, lambda e, subgoal: subgoal).nan_to_num(9).tolist()
    assert matrix == [[1, 0.5, 0.5, 0.5], [9, 0, 1, 1], [1, 9, 0, 1], [1, 1, 9, 0], [0, 1, 1, 9]]

@pytest.mark.parametrize("subgoals,size", gridworld.SUBGOAL_SIZE.items())
@pytest.mark.parametrize("task,product", [("0123", 0.9 * 0.5 * 0.6 * 0.7), ("1201", 0.1 * 0.6 * 0.4 * 0.5)])
def test_composition_scores_by_hand(task, product, subgoals, size):
    nan = math.nan
    matrix = torch.tensor([[0.9, 0.1, 0.2, 0.3],
                           [nan, 0.5, 1, 1], [1, nan, 0.6, 0.8], [0.4, 1, nan, 0.7], [0.1, 1, 0.6, nan]])
    task = "-".join(str(int(goal) * size + i) for goal in task for i in range(size))
    config = rl.configure("gridworld", "quick", colours=8, subgoals=subgoals, post_task=task)
    expected = {"shown": 6.8 / 8, "withheld": (0.5 + 0.6 + 0.7 + 0.1) / 4, "product": product}
    assert rl.composition_scores(config, matrix) == pytest.approx(expected)

@pytest.mark.parametrize("subgoals,size", gridworld.SUBGOAL_SIZE.items())
def test_by_codes_finds_what_attains_a_subgoal(subgoals, size, tmp_path, monkeypatch):
    hidden = torch.tensor([[1.0, 0, 0, 1], [-1, 0, 1, 0], [0, 1, -1, 0], [0, -1, 0, -1]])

    def play(config, base, game, rng, intervene):
        tasks = game.tasks.view(len(game.rows), -1)[:, :-1]
        k = tasks[:, 0] // size
        assert torch.equal(tasks, k[:, None] * size + torch.arange(size))
        distance = (intervene(game.rows, None) - hidden[k]).norm(dim=1)
        game.visits = game.goal * (torch.rand(len(k), generator=rng) < (-distance).exp())
    monkeypatch.setattr(rl, "play", play)
    run = new_run(tmp_path, size=6, colours=8, subgoals=subgoals)
    found = rl.by_codes(run, None, SimpleNamespace(hyper=lambda e, z: z))(None, torch.arange(4))
    assert (found - hidden).norm(dim=1).max() < 0.6 < torch.pdist(hidden).min() / 2

# ======== The ant

GAIT = """
-.13686455 .66245898 .55532371 .91621166 .0541055 -.02119909 .39645855 -.05446933 1.12194127 .02187957
-.79499455 -.03859357 -.49791933 -.07579754 .8729075 -.33100576 1.54892886 -.31118978 -.56430937 -1.5135197
.09412552 .68293346 -1.29391741 3.30536077 -3.7706957 -.89492081 2.02755325 -3.0737023 1.7404427 1.89677162
.13755518 -.1920213 .02173562 -.72389185 -.13190183 .17599634 .08066003 -.28445132
"""  # qpos 15, qvel 14, heading, torques 8

def test_gait_matches_its_test_vectors():
    qpos, qvel, heading, torques = np.split(np.array(GAIT.split(), float)[None], [15, 29, 30], 1)
    assert np.abs(ant.gait(qpos, qvel, heading[:, 0]) - torques).max() < 1e-6

def ant_game(task, ants=1, max_steps=50):
    """4×4:  @ 0 1 2 / . # . 3 / . . . . / . . . .   with ants at rest."""
    cells = (torch.tensor([0] * ants), torch.tensor([[1, 2, 3, 7]] * ants), torch.tensor([[5]] * ants))
    layouts = ant.with_pose(gridworld.Layouts(*cells), 4, generator())
    layouts.qvel.zero_()
    return ant.Game(layouts, 4, gridworld.parse_task(task, 4), max_steps)

def put(game, x, y):
    """Puts the ant above a point for a step → (reward, terminated, truncated, reason, visits)"""
    game.simulation.qpos[0, :2] = x, y
    return (*(part.item() for part in game.step(np.zeros((1, 8)))), game.reason(0), game.visits.item())

def test_an_ant_visits_colours_and_what_ends_its_game(monkeypatch):
    game = ant_game("0-1")
    assert put(game, -0.9, 1.1) == (0, False, False, "", 1)
    assert put(game, -0.2, 1.9) == (0, False, False, "", 1)  # still on colour 0: no second, wrong visit
    assert put(game, 0.5, 1.5) == (1, True, False, "solved", 2)
    assert put(game, -1.5, -1.5) == (0, True, False, "solved", 2)  # over
    for x, y, reason in [(0.5, 1.5, "wrong colour"), (-0.5, 0.5, "wall"), (2.1, 0.5, "outside"),
                         (-2.1, 0.5, "outside"), (0.5, 2.1, "outside"), (0.5, -2.1, "outside")]:
        game = ant_game("0-1")
        assert put(game, x, y) == put(game, -0.5, 1.5) == (0, True, False, reason, 0)  # colour 0 is too late
    assert put(ant_game("0-1", max_steps=1), -0.5, 1.5) == (0, False, True, "time", 1)
    assert put(ant_game("0", max_steps=1), -0.5, 1.5) == (1, True, False, "solved", 1)
    for healthy in ((0.2, 0.4), (0.7, 1.0)):  # it is higher, it is lower
        monkeypatch.setattr(ant, "HEALTHY", healthy)
        assert put(ant_game("0"), -0.5, 1.5) == (0, True, False, "fallen", 0)

def plain_step(state, torques):
    """One control step of one ant in plain MuJoCo: state [30] → (state [30], was there a warning?)"""
    model, whole = ant.Simulation.model, mujoco.mjtState.mjSTATE_FULLPHYSICS
    data, after = mujoco.MjData(model), np.empty(30)
    mujoco.mj_setState(model, data, state, whole)
    data.ctrl[:] = torques
    warned = False
    for _ in range(ant.SUBSTEPS):
        mujoco.mj_step(model, data)
        warned = warned or data.warning.number.any()
    mujoco.mj_getState(model, data, after, whole)
    return after, warned

def test_simulation_equals_plain_mujoco_and_ants_do_not_depend_on_company(monkeypatch):
    random = np.random.default_rng(0)
    layouts = ant.draw_layouts(9, 4, 4, 1, generator())
    together, apart = (ant.Game(layouts, 4, [0], 9).simulation for _ in range(2))
    states = together.state.copy()
    for torques in random.uniform(-1, 1, (60, 9, 8)):
        monkeypatch.setattr(ant.Simulation, "threads", 1)
        together.step(torques, np.arange(9))
        monkeypatch.setattr(ant.Simulation, "threads", 2)
        for ants in np.split(random.permutation(9), [1, 1, 4]):  # of 1, 0, 3 and 5 ants
            apart.step(torques[ants], ants)
        states = np.array([plain_step(*ant)[0] for ant in zip(states, torques)])
        assert np.array_equal(together.state, states) and np.array_equal(apart.state, states)

def test_a_broken_simulation_ends_only_its_own_game():
    random = np.random.default_rng(0)
    game = ant_game("0-1", ants=200)
    game.simulation.qvel[:] += 10 ** random.uniform(0, 11, (200, 1)) * random.standard_normal((200, 14))
    before, torques = game.simulation.state.copy(), random.uniform(-1, 1, (200, 8))
    torques[:10, 3] = np.nan
    game.step(torques)
    ended = [game.reason(i) == "simulation" for i in range(200)]
    assert 20 < sum(ended) < 180
    for i in range(200):
        after, warned = plain_step(before[i], torques[i])
        assert ended[i] == warned
        assert np.array_equal(game.simulation.state[i], before[i] if warned else after)

def test_the_ants_expert_solves_tasks_and_walks_only_where_it_may():
    tasks = gridworld.pretraining_tasks("singles").repeat(3, 1)
    layouts = ant.draw_layouts(48, 4, 4, 1, generator(3))
    paths = ant.expert_paths(layouts, 4, tasks, 500, generator(4), sigma=0.1)
    assert paths.success.mean() >= 0.85
    for i in paths.success.nonzero()[:, 0].tolist():
        x, y = (paths.observation[i, :paths.length[i] + 1, ant.POSITION].double() * 2).T
        entered = (4 * (2 - y).floor() + (2 + x).floor()).unique_consecutive().tolist()
        colours = layouts.colours[i].tolist()
        assert entered[0] == layouts.agent[i] and layouts.walls[i].item() not in entered
        assert [colours.index(cell) for cell in entered if cell in colours] == tasks[i].tolist()
        assert paths.subgoal[i, :paths.length[i]].unique_consecutive().tolist() == tasks[i].tolist()

def test_the_simulation_and_the_expert_are_symmetric():
    """Mirrored starts and torques give mirrored trajectories; in a mirrored world the gait is mirrored."""
    def walk(qpos, qvel, torque_map):
        simulation = ant.Simulation(4)
        simulation.put(slice(None), qpos, qvel)
        for torques in np.random.default_rng(0).uniform(-1, 1, (20, 4, 8)):
            simulation.step(torques @ torque_map.T, np.arange(4))
        return pose(simulation.qpos, simulation.qvel)

    pose = lambda qpos, qvel: np.concatenate([qpos[:, 2:], qvel, qpos[:, :2]], 1)  # as in an observation
    layouts, heading = ant.draw_layouts(4, 4, 4, 1, generator()), np.linspace(-3, 3, 4)
    start = layouts.qpos.numpy(), layouts.qvel.numpy()
    maps, torque_maps = (x.double().numpy() for x in ant.symmetries(5))
    assert len({m.round(3).tobytes() for m in maps}) == ant.SYMMETRIES == 32
    for m, torque_map in zip(maps[:, :29, :29], torque_maps):
        image = pose(*start) @ m.T
        qpos, qvel = np.concatenate([image[:, 27:], image[:, :13]], 1), image[:, 13:27]
        x, y = m[27:, 27:] @ [np.cos(heading), np.sin(heading)]
        found = ant.gait(qpos, qvel, np.arctan2(y, x))
        assert np.abs(found - ant.gait(*start, heading) @ torque_map.T).max() < 1e-4
        assert np.abs(walk(qpos, qvel, torque_map) - walk(*start, np.eye(8)) @ m.T).max() < 1e-5

def test_cells_and_body_features_are_read_off_the_observation():
    layouts = ant.draw_layouts(50, 4, 4, 1, generator())
    game = ant.Game(layouts, 4, [0, 1], 9)
    observation, xy = game.observation(), game.simulation.qpos[:, :2]
    features = ant.body_features(observation, 4)
    turned = ant.body_features(observation @ ant.symmetries(5)[0][4].T, 4)  # in a world turned by a quarter
    assert torch.allclose(features[:, [0, *range(10, 32)]], turned[:, [0, *range(10, 32)]], atol=1e-5)
    yaw = 2 * torch.atan2(layouts.qpos[:, 6], layouts.qpos[:, 3])
    x, y = torch.from_numpy(ant.centres(layouts.agent, 4) + [0, 1] - xy).T  # to the centre of the cell above
    up = torch.polar(torch.ones(50).double(), torch.atan2(y, x) - yaw)
    assert torch.allclose(features[:, 32:34].double(), torch.view_as_real(up), atol=1e-4)
    cells = torch.cat([layouts.objects, layouts.agent[:, None]], 1)
    assert torch.equal(ant.places(observation, 4), cells)
    xy[:] = ant.centres(layouts.agent, 4) - 0.4999  # almost over the border; in half precision, as stored
    assert torch.equal(ant.places(game.observation().half().float(), 4), cells)

def test_stored_data_is_kept_and_refused_when_it_does_not_fit(tmp_path):
    made = []
    def data(noise=0.1):
        try:
            return ant.expert_data(tmp_path, 2, {"noise": noise}, lambda i: made.append(i) or {"x": i})
        except gridworld.Unusable as error:
            return str(error)
    assert data() == data() == [{"x": 0}, {"x": 1}]
    assert "noise=0.1, not 0.2" in data(0.2)
    content = (tmp_path / "001.npz").read_bytes()
    shutil.copy(tmp_path / "000.npz", tmp_path / "001.npz")
    assert "shard=0, not 1" in data()
    (tmp_path / "001.npz").write_bytes(content[:100])
    assert "001.npz cannot be read" in data()
    assert made == [0, 1] and sorted(os.listdir(tmp_path)) == ["000.npz", "001.npz"]

def test_thinned_steps_against_a_loop(monkeypatch):
    config = rl.configure("ant", "quick", max_steps=250)
    batch = ant.expert_batch(config, 24, generator())
    whole = ant.thinned(config, batch, "pretrain", 1.0, generator())  # as episodes are when the model acts
    assert torch.equal(whole.observation, batch.pick(torch.arange(0, len(batch.length), 8)).observation)
    monkeypatch.setattr(ant, "THIN", 1e-9)
    thin = ant.thinned(config, batch, "probe", 0.0, generator())
    for i, path in enumerate(ant.places(batch.observation, 4)[..., -1].tolist()):
        length = int(batch.length[i])
        steps = [t for t in range(length) if t == 0 or path[t] != path[t - 1]]
        assert ant.entries(batch, 4)[i].nonzero()[:, 0].tolist() == steps
        assert thin.length[i] == len(steps)
        for name, last in (("observation", [length]), ("action", []), ("subgoal", [])):
            expected = getattr(batch, name)[i, steps + last]
            assert torch.equal(getattr(thin, name)[i, :len(expected)], expected)

def test_the_ants_own_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ant, "FILM", (40, 10))
    ant.main(["--episodes", "2", "--out", str(tmp_path / "new")])
    assert capsys.readouterr().out.count("σ") == 4
    assert {*os.listdir(tmp_path / "new")} == {"ant.png", "ant.gif"}

# ======== Whole runs, in folders

SMALL = ("--preset tiny --device cpu --layers 2 --max-steps 30 --pretrain-steps 32 --probe-steps 16 "
         "--steer-steps 16 --gate-steps 32 --code-steps 32 --rl-episodes 128 --rl-batch 64 --evaluation 32 "
         "--post-task 0").split()
PICTURES = {"gates.png", "success.png", "matrix.png", "episode.png", "episode.gif"}
START = "import sys, gridworld, internal_rl; gridworld.HELD_OUT = 64; internal_rl.main(sys.argv[1:])"

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, result) of a whole tiny run of the grid. Copy the folder to change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, rl.main([*SMALL, "--out", str(folder)])

def refused(capsys, *arguments):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        rl.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1, error
    return error

def checkpoint(path):
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)

def left_behind(folder):
    """All that a run leaves in its folder, but times and pictures: {file: content}"""
    def plain(x):
        if isinstance(x, dict):
            return {key: plain(x[key]) for key in x if key not in ("seconds", "time_s", "parents")}
        if isinstance(x, list):
            return [plain(part) for part in x]
        return x.tolist() if torch.is_tensor(x) else x
    found = {path.name: checkpoint(path) for path in folder.glob("*.pt")}  # with their lines of metrics.jsonl
    found |= {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: json.dumps(plain(content)) for name, content in found.items()}

def test_a_tiny_run_of_the_grid(finished):
    folder, result = finished
    others = {".lock", "config.json", "metrics.jsonl", "result.json"}
    assert {*os.listdir(folder)} == {f"{stage}.pt" for stage in rl.STAGES} | others | PICTURES
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = dict(pretrain=32, probe=16, steer=16, gates=32, codes=32, rl=2, raw=2)
    assert {line["stage"]: line["step"] for line in lines} == steps
    assert lines[1]["nll"] < lines[0]["nll"]
    assert json.loads((folder / "result.json").read_text())["gap"] == result["gap"] > 0
    assert result["base_success"] > 0.1  # one visit; all parts of a result are numbers or lists of them
    assert all(0 <= result[f"{name}_success"] <= 1 for name in ("steer", "internal", "raw"))

def test_a_second_call_reuses_finished_stages(finished, tmp_path, monkeypatch):
    folder, result = finished
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr(rl, "descend", None)  # nothing is trained
    assert str(rl.main([*SMALL, "--out", str(tmp_path / "run")])) == str(result)
    assert left_behind(tmp_path / "run") == left_behind(folder)

def test_a_tiny_run_of_the_ant(tmp_path, monkeypatch):
    monkeypatch.setattr(ant, "FILM", (40, 10))
    monkeypatch.setitem(gridworld.PRETRAINING_TASKS, "singles", "ABCD")  # of one visit
    small = ("--task ant --max-steps 60 --trajectories 24 --pretrain-steps 16 --probe-steps 4 "
             "--steer-steps 4 --gate-steps 4 --code-steps 4 --evaluation 8 --rl-episodes 16 --rl-batch 16")
    rl.main([*SMALL, *small.split(), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    assert {*os.listdir(tmp_path / "run")} >= {"result.json", "raw.pt", "rl.pt"} | PICTURES
    assert len([*(tmp_path / "data").rglob("*.npz")]) == 2  # D and D*

def test_a_run_that_stops_after_each_round_ends_like_an_uninterrupted_one(tmp_path):
    config = rl.parse_arguments([*SMALL, "--probe-steps", "32", "--steer-steps", "32"])[1]

    def everything(run):
        base = rl.pretrain(run)
        rl.train_probe(run, base)
        rl.steer(run, base)
        rl.internal_rl(run, base, rl.learn_codes(run, base, rl.learn_gates(run, base)))
        rl.raw_rl(run, base)

    whole, parts = (rl.Run(config, tmp_path / name, "cpu") for name in ("whole", "parts"))
    whole.open()
    everything(whole)
    parts.open()
    stops = 0
    while parts.digests.keys() != rl.STAGES.keys():
        parts.stop = signal.SIGINT  # as if it came during the next round
        try:
            everything(parts)
        except SystemExit as stopped:
            assert stopped.code == 130
            stops += 1
    assert stops == 14
    assert left_behind(parts.folder) == left_behind(whole.folder)

def test_signals_lose_nothing_and_other_processes_are_kept_out(finished, tmp_path, capsys):
    folder, lines = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    command = [sys.executable, "-c", START, *SMALL, "--stage", "discover", "--out", folder]
    for stage, number, status in (("pretrain", signal.SIGTERM, 143), ("gates", signal.SIGKILL, -9)):
        process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not lines.exists() or f'"{stage}"' not in lines.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        if stage == "pretrain":
            assert "another process" in refused(capsys, *SMALL, "--seed", 1, "--out", folder)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert (error, process.returncode, (folder / "pretrain.pt").exists()) == (b"", status, True)
    rl.main([*SMALL, "--stage", "discover", "--out", str(folder)])
    assert {*left_behind(folder)} == {"config.json", "pretrain.pt", "gates.pt", "codes.pt"}
    assert left_behind(folder).items() <= left_behind(finished[0]).items()

@pytest.mark.parametrize("arguments,words", [
    ("--size 5.5", "size"), ("--heads 0", "heads 0 is outside 1"), ("--heads 5", "multiple of heads"),
    ("--task chess", "chess.py"), ("--preset huge", "quick, tiny, pairs"), ("--post-task 0-9", "colour 9")])
def test_refused_inputs(arguments, words, tmp_path, capsys):
    assert words in refused(capsys, *arguments.split(), "--device", "cpu", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()

def test_checkpoints_that_do_not_fit_are_refused(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    path, again = tmp_path / "run/pretrain.pt", [*SMALL, "--out", tmp_path / "run"]
    assert "pretrain.pt was made with width=32, not 64" in refused(capsys, *again, "--width", 64)
    assert "rl.pt was made with rl_lr=0.003, not 0.1" in refused(capsys, *again, "--rl-lr", 0.1)
    content, saved, file = path.read_bytes(), checkpoint(path), io.BytesIO()
    saved["modules"]["base"]["norm.bias"] += 1
    torch.save(saved, file)
    path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())  # sound, but another one
    assert "probe.pt belongs to another pretrain.pt" in refused(capsys, *again)
    for damaged in (content[:-100], b"", content[:5000] + b"?" + content[5001:]):
        path.write_bytes(damaged)
        assert "pretrain.pt is damaged" in refused(capsys, *again)

@pytest.mark.parametrize("bad", ["loss", "weight"])
def test_a_number_that_is_not_finite_ends_the_stage(bad, tmp_path, capsys):
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    with pytest.raises(SystemExit) as stopped:
        for step in new_run(tmp_path).steps("rl", 3, generator(), optimizer, policy=module):
            step.log(loss=math.nan if bad == "loss" and step.number == 1 else 0.0)
            if bad == "weight" and step.number == 1:
                nn.init.constant_(module.weight, math.inf)
    error, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and f"rl: {bad} is not finite at step 2" in error
    assert not (tmp_path / "rl.pt").exists()

TWO = """
import sys, torch, gridworld, internal_rl as rl
def save(run, stage, **content):
    torch.save(content, f"{run.folder}-{stage}-{rl.RANK}")
gridworld.HELD_OUT, rl.Run.save = 32, save
rl.main(sys.argv[1:])
"""

def test_two_processes_stay_in_step(tmp_path):
    """Their batches differ, their weights do not."""
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    short = ["--stage=rl", "--gate-steps=16", "--code-steps=16", "--out", tmp_path / "run"]
    subprocess.run([*launch, tmp_path / "two.py", *SMALL, *short], check=True, timeout=300,
                   env=dict(os.environ, PYTHONPATH=str(HERE)))
    for stage in ("pretrain", "gates", "codes", "rl"):
        first, second = (torch.load(tmp_path / f"run-{stage}-{rank}") for rank in (0, 1))
        assert first["lines"][-1]["loss"] != second["lines"][-1]["loss"], stage
        for part, weights in first["modules"].items():
            assert all(torch.equal(x, second["modules"][part][name]) for name, x in weights.items()), stage

def test_a_third_world_is_one_file_and_the_grid_does_not_import_mujoco(tmp_path):
    for name, source in (("internal_rl", "internal_rl"), ("gridworld", "gridworld"), ("maze", "gridworld")):
        text = (HERE / f"{source}.py").read_text().replace("HELD_OUT = 1024", "HELD_OUT = 32")
        (tmp_path / f"{name}.py").write_text(text.replace("GridworldPinpad-v0", f"{name}-v0"))
    code = "import sys, internal_rl; internal_rl.main(sys.argv[1:]); assert 'mujoco' not in sys.modules"
    command = [sys.executable, "-c", code, *SMALL, "--task=maze", "--stage=pretrain", "--pretrain-steps=1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "runs/maze-tiny-s0/pretrain.pt").exists()

def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        rl.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  --{s.name.replace('_', '-')}" in shown for s in fields(rl.Settings))

# ======== The files

def test_the_chapters_need_nothing_from_below():
    text = (HERE / "internal_rl.py").read_text()
    before, _ = text.split("Nothing below is needed to understand the method")
    end, tree = before.count("\n") + 1, ast.parse(text).body
    names = [[node.name] if hasattr(node, "name") else [target.id for target in getattr(node, "targets", [])]
             for node in tree if node.lineno > end]
    above = [part for node in tree if node.lineno < end for part in ast.walk(node)]
    used = {node.id for node in above if isinstance(node, ast.Name)}
    assert len(names) > 20 and not used & {*sum(names, [])}
    attributes = [node for node in above if isinstance(node, ast.Attribute)]
    of_run = {node.attr for node in attributes if ast.unparse(node.value) == "run"}
    assert end <= 820 and {"begin", "steps"} < of_run and len(of_run - {"config", "device", "data"}) <= 8

def test_the_size_of_everything():
    studies = sorted(HERE.glob("studies/*.py"))
    worlds = [HERE / "gridworld.py", HERE / "ant_tasks.py"]
    for paths, lines, size in (([HERE / "internal_rl.py"], 1300, 70_000), (worlds, 1480, 84_000),
                               ([Path(__file__)], 1000, 1e9), (studies, 700, 1e9)):
        content = b"".join(path.read_bytes() for path in paths)
        assert content.count(b"\n") <= lines and len(content) <= size, paths
        assert max(map(len, content.decode().splitlines()), default=0) <= 110, paths
    assert len((HERE / "README.md").read_text().split()) <= 1500

BASE = ["--base", "run-s0"]  # a copy of the finished run
STUDIES = {  # of a study: its arguments besides SMALL
    "controls": [*BASE, "--temperatures", "2", "--rates", "1e-4"], "variance": BASE,
    "rivals": [*BASE, "--gate-steps", "1", "--code-steps", "1"], "seeds": ["--seeds", "0", "--out", "run"],
    "vary": [*BASE, "--stage", "discover", "--show", "withheld"]}

@pytest.mark.parametrize("path", sorted(HERE.glob("studies/*.py")), ids=lambda path: path.stem)
def test_every_study_runs(path, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0], "run-s0")
    study = importlib.import_module(f"studies.{path.stem}")
    if path.stem == "speed":
        monkeypatch.setattr(study, "range", lambda n: range(min(n, 2)), raising=False)  # fewer steps
    if path.stem == "readme":  # it writes there
        shutil.copytree(HERE / "assets", "assets")
        shutil.copy(HERE / "README.md", "README.md")
        monkeypatch.setattr(study, "ASSETS", tmp_path / "assets")
    study.main([] if path.stem == "readme" else [*SMALL, *STUDIES.get(path.stem, [])])
