"""gridworld-pinpad (arXiv:2512.20605, App. A.1): visit coloured cells in a hidden order, without a hint of which order.

A G×G grid holds O uniquely coloured cells, W walls and one agent, all placed at random. A *task* is a sequence of
colours. Moving onto a coloured cell from another cell visits it; visiting anything but the next colour of the task ends
the episode without reward, completing the sequence ends it with reward 1. The observation never shows the task.

    layouts = draw_layouts(n, size, colours, walls, generator)      where everything is
    game    = Game(layouts, size, tasks, max_steps)                 n games in a batch; game.step(actions [n])
    paths   = expert_paths(layouts, size, tasks, …)                 stochastic shortest paths, the pretraining data
    env     = gymnasium.make("GridworldPinpad-v0")                  one game with the Gymnasium interface

Dims: B games, T time, G grid size, O colours, W walls, N = O + W, K length of a task, M tasks; cell = row·G + column.
"""
import functools
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

UP, DOWN, LEFT, RIGHT = range(4)
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (row, column) of each action
FAR = 100  # "no path": larger than any shortest path, small enough that FAR + 1 fits an int8

# Subgoals A, B, C, D are single colours 0, 1, 2, 3 (Table A2) or the pairs 0-1, 2-3, 4-5, 6-7 (Table A1).
# No pretraining task ever contains A→B, B→C, C→D or D→A.
SUBGOALS, SUBGOAL_SIZE = 4, {"singles": 1, "pairs": 2}
PRETRAINING_TASKS = {
    "pairs": "ACA ACB ADB BAC BDB BDC CAC CAD CBD DBA DBD DCA ADC BAD CBA DCB".split(),
    "singles": "ADC BAD CBA DCB ACA ACB ADB BAC BDB BDC CAC CAD CBD DBA DBD DCA".split(),
}


def pretraining_tasks(kind):
    """The 16 pretraining tasks of `kind` ("pairs": Table A1, "singles": Table A2): [16, K] colours to visit in order."""
    letters = torch.tensor([["ABCD".index(letter) for letter in task] for task in PRETRAINING_TASKS[kind]])
    size = SUBGOAL_SIZE[kind]
    return (letters[..., None] * size + torch.arange(size)).flatten(1)


class Unusable(ValueError):
    """Settings under which the expert solves nothing."""


def parse_task(text, colours):
    """'0-1-2-3' → [0, 1, 2, 3]. Raises ValueError for anything that is not a visitable sequence of known colours."""
    try:
        task = [int(part) for part in text.split("-")]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"task {text!r} is not a sequence of colours such as '0-1-2-3'") from None
    for colour, following in zip(task, task[1:] + [None]):
        if not 0 <= colour < colours:
            raise ValueError(f"task {text!r} names colour {colour}; the colours are 0 to {colours - 1}")
        if colour == following:
            raise ValueError(f"task {text!r} visits colour {colour} twice in a row")
    return task


def check_sizes(size, colours, walls, max_steps):
    """Raises ValueError unless `colours` + `walls` + agent fit on the grid."""
    for name, value in dict(size=size, colours=colours, walls=walls, max_steps=max_steps).items():
        if not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} {value!r} is not a whole number")
    if not 2 <= size <= 9:
        raise ValueError(f"size {size} is outside 2 … 9")
    if colours < 1 or walls < 0 or colours + walls + 1 > size * size:
        raise ValueError(f"{colours} colours, {walls} walls and an agent do not fit on {size}×{size} cells")
    if max_steps < 1:
        raise ValueError(f"max_steps {max_steps} is not positive")

# ---------------------------------------------------------------------------------------------------- layouts

@dataclass
class Layouts:
    """B starting positions: agent [B], colours [B, O], walls [B, W], all cell numbers (int64)."""
    agent: torch.Tensor
    colours: torch.Tensor
    walls: torch.Tensor

    def __len__(self):
        return len(self.agent)

    def __getitem__(self, index):
        return type(self)(*(part[index] for part in vars(self).values()))

    @property
    def objects(self):
        """Cells of everything that stands still, colours first: [B, O+W]."""
        return torch.cat([self.colours, self.walls], dim=1)


def neighbours(size, device="cpu"):
    """[G², 4] cell reached by each action; the own cell where the move would leave the grid."""
    cell = torch.arange(size * size)[:, None]
    row, column = cell // size + MOVES[:, 0], cell % size + MOVES[:, 1]  # [G², 4]
    return (row.clamp(0, size - 1) * size + column.clamp(0, size - 1)).to(device)


def distances(layouts, size):
    """Steps to each colour around its obstacles, walls and all *other* colours (App. C.1.1): [B, O, G²] int8, FAR if there
    is no path or at an obstacle; then the same with the steps of an agent that stands on an obstacle and walks off."""
    batch, colours = layouts.colours.shape
    blocked = torch.zeros(batch, size * size, dtype=torch.bool, device=layouts.agent.device)
    blocked.scatter_(1, layouts.objects, True)
    target = layouts.colours[:, :, None]  # [B, O, 1]
    blocked = blocked[:, None].repeat(1, colours, 1).scatter_(2, target, False)
    distance = torch.full(blocked.shape, FAR, dtype=torch.int8, device=blocked.device).scatter_(2, target, 0)

    def one_step_further(distance):
        rim = F.pad(distance.unflatten(2, (size, size)), (1, 1, 1, 1), value=FAR)
        vertical = torch.minimum(rim[:, :, :-2, 1:-1], rim[:, :, 2:, 1:-1])
        horizontal = torch.minimum(rim[:, :, 1:-1, :-2], rim[:, :, 1:-1, 2:])
        return torch.minimum(distance, (torch.minimum(vertical, horizontal) + 1).clamp(max=FAR).flatten(2))

    before = None
    while before is None or not torch.equal(before, distance):
        before, distance = distance, one_step_further(distance).masked_fill(blocked, FAR)
    return distance, one_step_further(distance)


def solvable(layouts, size):
    """Can every colour be reached from the agent and from every other colour? [B] bool"""
    starts = torch.cat([layouts.agent[:, None], layouts.colours], 1)[:, None]  # [B, 1, 1+O]
    _, distance = distances(layouts, size)
    return (distance.gather(2, starts.expand(-1, distance.shape[1], -1)) < FAR).flatten(1).all(1)


def draw_layouts(n, size, colours, walls, generator):
    """n random solvable layouts, on the generator's device."""
    kept, count = [], 0
    while count < n:
        if len(kept) >= 100 + 100 * count:
            raise ValueError(f"found no solvable layout of {colours} colours and {walls} walls on {size}×{size} cells")
        order = torch.rand(n + n // 4 + 8, size * size, generator=generator, device=generator.device)
        order = order.topk(colours + walls + 1).indices
        drawn = Layouts(order[:, 0], order[:, 1:1 + colours], order[:, 1 + colours:])
        kept.append(drawn[solvable(drawn, size)])
        count += len(kept[-1])
    return Layouts(*(torch.cat(parts)[:n] for parts in zip(*(vars(part).values() for part in kept))))

# ------------------------------------------------------------------------------------------------------ rules

class Game:
    """B games played in step, with one task for all ([K]) or one for each ([B, K]). Finished games ignore actions.
    State: agent [B] cell, visits [B] made so far, first [B] colour visited (−1: none yet), steps [B], done [B]."""

    def __init__(self, layouts, size, tasks, max_steps):
        device, batch = layouts.agent.device, len(layouts)
        self.layouts, self.max_steps, self.cells = layouts, max_steps, size * size
        tasks = torch.as_tensor(tasks, device=device).expand(batch, -1)
        self.goal = tasks.shape[1]  # visits needed
        self.tasks = F.pad(tasks, (0, 1), value=-2).reshape(-1)  # [B·(K+1)]; after the last visit nothing is right
        self.rows = torch.arange(batch, device=device)
        names = torch.arange(layouts.colours.shape[1], device=device).expand(batch, -1)
        colour_at = torch.full((batch, self.cells), -1, device=device).scatter_(1, layouts.colours, names)
        self.colour_at = colour_at.view(-1)  # [B·G²], −1 for no colour
        to = neighbours(size, device).expand(batch, -1, -1)  # [B, G², 4]
        self.is_wall = torch.zeros(batch, self.cells, dtype=torch.bool, device=device).scatter_(1, layouts.walls, True)
        hits_wall = self.is_wall.gather(1, to.reshape(batch, -1)).view_as(to)
        self.next_cell = torch.where(hits_wall, torch.arange(self.cells, device=device)[:, None], to).reshape(-1)  # [B·G²·4]
        self.agent = layouts.agent
        self.visits = self.steps = self.first = torch.zeros_like(self.agent)
        self.terminated = self.done = torch.zeros_like(self.agent, dtype=torch.bool)
        self.reset()

    def reset(self, games=None):
        """Puts all games, or those where `games` [B] is true, back to their start."""
        games = torch.ones_like(self.done) if games is None else games
        self.agent = torch.where(games, self.layouts.agent, self.agent)
        self.visits, self.steps = self.visits.masked_fill(games, 0), self.steps.masked_fill(games, 0)
        self.first = self.first.masked_fill(games, -1)
        self.terminated, self.done = self.terminated & ~games, self.done & ~games

    def step(self, action):
        """action [B] → reward [B] float, terminated [B], truncated [B] (both stay true once a game is over)."""
        return self.enter(self.next_cell[(self.rows * self.cells + self.agent) * 4 + action])

    def enter(self, to, failed=False):
        """The agents enter the cells `to` [B], or something else `failed` [B] and ends the game. Returns as `step`."""
        to = torch.where(self.done | failed, self.agent, to)
        colour = self.colour_at[self.rows * self.cells + to]
        visit = (to != self.agent) & (colour >= 0)  # standing still never counts
        right = visit & (colour == self.tasks[self.rows * (self.goal + 1) + self.visits])
        self.agent, self.visits, self.steps = to, self.visits + right, self.steps + ~self.done
        self.first = torch.where((self.first < 0) & visit, colour, self.first)
        self.terminated = self.terminated | (self.visits == self.goal) | (visit & ~right) | failed
        truncated = (self.steps >= self.max_steps) & ~self.terminated
        self.done = self.terminated | truncated
        return ((self.visits == self.goal) & right).float(), self.terminated, truncated

    def target(self):
        """The colour to visit next (of a solved game: the last one): [B]"""
        return self.tasks[self.rows * (self.goal + 1) + self.visits.clamp(max=self.goal - 1)]

    def success(self):
        """Is the game solved? [B] float 0/1"""
        return (self.visits == self.goal).float()

    def observation(self, games=slice(None)):
        """Cells of the objects and of the agent, the ones of `one_hot_observation`: [B, N+1]"""
        return torch.cat([self.layouts.objects[games], self.agent[games, None]], 1)


@dataclass
class Trajectories:
    """B episodes of an expert or a model, padded to the longest: observation [B, T+1, D], action [B, T] moves or
    [B, T, 8] torques, length [B] actions taken, success [B] float 0/1; of an expert also subgoal [B, T], the index of
    the one it pursues at each step, which no model sees except where a function says so."""
    observation: torch.Tensor
    action: torch.Tensor
    length: torch.Tensor
    success: torch.Tensor
    subgoal: torch.Tensor | None = None

    @property
    def valid(self):
        """Is there an action (not padding)? [B, T] bool"""
        return torch.arange(self.action.shape[1], device=self.length.device) < self.length[:, None]

    def pick(self, rows):
        """The trajectories `rows`, cut to the longest of them."""
        longest = int(self.length[rows].max())
        return Trajectories(self.observation[rows, :longest + 1], self.action[rows, :longest], self.length[rows],
                            self.success[rows], self.subgoal[rows, :longest])

    def to(self, device):
        return Trajectories(*(None if part is None else part.to(device) for part in vars(self).values()))


def one_hot_observation(places, size):
    """The paper's: a one-hot cell for every object and the agent: places [..., N+1] → [..., (N+1)·G²] float."""
    return F.one_hot(places, size * size).flatten(-2).float()


def absolute_inputs(places, size, colours):
    """Positions of the ones in `one_hot_observation`: cells of the objects and the agent [..., N+1] → [..., N+1]"""
    return places + torch.arange(places.shape[-1], device=places.device) * size * size


def egocentric_inputs(places, size, colours):
    """The same as seen from the agent: the offset of every object (all walls alike) and the agent's cell. Cells of the
    objects and the agent [..., N+1] → [..., N+1] in 0 … (O+1)·(2G−1)² + G² − 1."""
    objects, agent = places[..., :-1], places[..., -1:]
    span = 2 * size - 1
    row = objects // size - agent // size + size - 1  # [..., N], 0 … 2G−2
    column = objects % size - agent % size + size - 1
    channel = torch.arange(objects.shape[-1], device=objects.device).clamp(max=colours)
    offset = channel * span * span + row * span + column
    return torch.cat([offset, (colours + 1) * span * span + agent], -1)


def input_count(view, size, colours, walls):
    """How many different numbers the inputs of `view` take: the width of the one-hot vector they stand for."""
    if view == "absolute":
        return (colours + walls + 1) * size ** 2
    return (colours + 1) * (2 * size - 1) ** 2 + size ** 2

# ----------------------------------------------------------------------------------------------------- expert

def shortest_moves(layouts, size):
    """[B, O, G², 4] bool: does this action, from this cell, start a shortest path to this colour?"""
    before, distance = distances(layouts, size)
    return before[..., neighbours(size, distance.device)] == distance[..., None] - 1


def race(probability, generator):
    """A draw from each distribution [..., n] → [...]: the first of n exponential clocks to ring."""
    noise = torch.rand(probability.shape, generator=generator, device=probability.device)
    return (probability / -noise.log()).argmax(-1)


def expert_probabilities(game, moves, epsilon):
    """The expert's action distribution [B, 4]: uniform over shortest moves [B, O, G², 4]; with probability epsilon uniform
    over the actions that visit no wrong colour (Sec. C.1.1, Fig. A2)."""
    target = game.target()
    best = moves[game.rows, target, game.agent].float()
    best = best / best.sum(-1, keepdim=True).clamp(min=1)
    if epsilon == 0:
        return best
    to = game.next_cell.view(-1, 4)[game.rows * game.cells + game.agent]
    colour = game.colour_at.view(-1, game.cells).gather(1, to)
    safe = ((colour < 0) | (colour == target[:, None]) | (to == game.agent[:, None])).float()
    return (1 - epsilon) * best + epsilon * safe / safe.sum(-1, keepdim=True)


def expert_paths(layouts, size, tasks, max_steps, generator, epsilon=0.0, subgoal_size=1):
    """The expert solves tasks [B, K] in B layouts. With epsilon > 0 it may run out of time: these episodes stay, cut."""
    game, moves = Game(layouts, size, tasks, max_steps), shortest_moves(layouts, size)
    observations, actions, subgoals = [game.observation()], [], []
    while not game.done.all():
        subgoals.append(game.target() // subgoal_size)
        actions.append(race(expert_probabilities(game, moves, epsilon), generator))
        game.step(actions[-1])
        observations.append(game.observation())
    observation, action, subgoal = (torch.stack(steps, 1) for steps in (observations, actions, subgoals))
    return Trajectories(observation, action, game.steps, game.success(), subgoal)


def bayes_floor(layouts, size, paths, tasks, max_steps, epsilon=0.0, subgoal_size=1):
    """Of the best task-blind predictor of these paths, with the posterior over all tasks [M, K] given the actions so far:
    exact mean NLL per action, in nats, and the posterior of the likeliest subgoal: how often the best read-out is right."""
    batch, many = len(layouts), len(tasks)
    row = torch.arange(batch, device=tasks.device).repeat_interleave(many)  # [B·M]: every path as if of every task
    game, moves = Game(layouts[row], size, tasks.repeat(batch, 1), max_steps), shortest_moves(layouts, size)[row]
    posterior = torch.full((batch, many), 1 / many, device=tasks.device)
    blind, right = 0.0, 0.0
    for t, action in enumerate(paths.action.unbind(1)):
        probability = expert_probabilities(game, moves, epsilon)[game.rows, action[row]]
        probability = probability.masked_fill(game.done, 0).view(batch, many)
        valid, pursued = t < paths.length, game.target().view(batch, many) // subgoal_size  # [B], [B, M]
        belief = posterior.new_zeros(batch, SUBGOALS).scatter_add_(1, pursued, posterior)
        right += belief.max(1).values[valid].sum().item()
        predictive = (posterior * probability).sum(1)
        blind -= predictive[valid].log().sum().item()
        updated = posterior * probability / predictive[:, None].clamp(min=1e-30)
        posterior = torch.where(valid[:, None], updated, posterior)
        game.step(action[row])
    steps = paths.length.sum().item()
    return blind / steps, right / steps

# --------------------------------------------------------------------------------------------------- symmetry

@functools.cache
def symmetries(size):
    """The 8 rotations and reflections of the square: new cell of each cell [8, G²], new action of each [8, 4]."""
    grid = torch.arange(size * size).view(size, size)
    flipped = [grid, grid.flip(1), grid.flip(0), grid.flip(0, 1)]
    cells = torch.stack([image.flatten() for image in flipped + [image.T for image in flipped]])
    # The image of an action leads from the image of every cell to the image of its neighbour.
    to = neighbours(size)
    same = to[cells][..., None] == cells[:, to][:, :, None]  # [8, G², 4 images, 4 actions]
    return cells, same.all(1).int().argmax(1)


def mirror(observation, action, k, size):
    """Each episode in the image k [B] of its world: observation [B, T+1, N+1] cells, action [B, T] → the same shapes"""
    cells, actions = (x.to(observation.device) for x in symmetries(size))
    return cells[k[:, None, None], observation], actions[k[:, None], action]

# ------------------------------------------------------------------------- the world that internal_rl.py sees

SETTINGS = {}  # of this world alone: name → (default, help, lowest, highest value); of the base model's stage
PRESETS = {
    "quick": {},  # the defaults in internal_rl.py
    "tiny": dict(
        width=32, heads=2, rank=16, pretrain_steps=160, pretrain_batch=32, probe_steps=32, steer_steps=48,
        gate_steps=64, code_steps=48, discover_batch=32, rl_episodes=1024, rl_batch=256, evaluation=128),
    # The paper's kind of subgoal, a pair of colours, on a smaller grid; eight visits.
    "pairs": dict(
        size=6, colours=8, subgoals="pairs", max_steps=100, post_task="0-1-2-3-4-5-6-7", rate=0.46,
        rl_episodes=100_000),
    # The paper's sizes and schedules (Tables A1, A4, A6, A7, A9, A13, A16).
    "paper": dict(
        size=7, colours=8, walls=4, max_steps=100, subgoals="pairs", post_task="0-1-2-3-4-5-6-7-0-1-2-3",
        view="absolute", width=256, layers=6, pretrain_steps=256_000, pretrain_batch=1024, pretrain_lr=3e-4,
        next_obs=0.01, cosine=False, probe_steps=8000, probe_lr=1e-3, steer_steps=3200, steer_lr=1e-3,
        control_layer=0, rank=16, gate_steps=64_000, code_steps=0, discover_batch=512, discover_lr=1e-3,
        read_embedding=False, alpha=0.1, rate=0.0, n_z=8, code_std=0.0,
        rl_episodes=102_400_000, rl_lr=3e-5, raw_lr=3e-5, std_end=1.0),
}
SYMMETRIES = 8  # images of a world, see `mirror`
RAW = "token-level"  # what RL on the model's own actions is called
LOOK = dict(trajectories=1024, layouts=32, film=(1, 2))  # how much is looked at; see internal_rl.py
EXPECT = dict(  # medians of the quick preset's seeds in the README
    gap="0.04", probe_best="0.52", probe_ceiling="0.69", random_success="7e-5", base_success="0", steer_success="0.9",
    labels_withheld="0.98", gate_precision="1", gate_recall="1", goal_accuracy="1", held_share="0.82", shown="0.99",
    withheld="0.98", product="0.91", internal_success="0.92", switches_solved="5", raw_success="0")


def check(config):
    """Raises ValueError for settings that cannot work together in this world."""
    check_sizes(config.size, config.colours, config.walls, config.max_steps)
    draw_layouts(1, config.size, config.colours, config.walls, torch.Generator())
    needed = SUBGOALS * SUBGOAL_SIZE[config.subgoals]
    if config.colours < needed:
        raise ValueError(f"colours {config.colours} is too few: pretraining tasks of {config.subgoals!r} use {needed}")
    if max(parse_task(config.post_task, config.colours)) >= needed:
        raise ValueError(f"post_task {config.post_task!r} names a colour that no pretraining task visits")


def random_tasks(config, n, generator, noise, draw_layouts=draw_layouts, expert_paths=expert_paths):
    """The expert of a world on n random tasks: (layouts, tasks [16, K], its paths)"""
    layouts = draw_layouts(n, config.size, config.colours, config.walls, generator)
    tasks = pretraining_tasks(config.subgoals).to(layouts.agent.device)
    own = torch.randint(len(tasks), (n,), generator=generator, device=generator.device).to(tasks.device)
    paths = expert_paths(layouts, config.size, tasks[own], config.max_steps, generator, noise,
                         subgoal_size=SUBGOAL_SIZE[config.subgoals])
    return layouts, tasks, paths


def expert_batch(config, n, generator, noise=0.0, **world):
    """Those of n fresh expert trajectories that are solved: D (noise = config.noise) or D* (noise = 0)."""
    # differs from the paper: only solved episodes are kept. (C.1.1 calls D successful, then says not always.)
    paths = random_tasks(config, n, generator, noise, **world)[-1]
    if not paths.success.any():
        raise Unusable(f"the expert solves none of {n} episodes within max_steps {config.max_steps}")
    return paths.pick(paths.success.nonzero()[:, 0]).to(generator.device)


def source(config, noise, folder):
    """Where training trajectories come from: a function (n, generator) → Trajectories. Here they are always fresh."""
    return lambda n, generator: expert_batch(config, n, generator, noise)


def thinned(config, batch, thinning, generator):
    """The steps to train on: here all of them."""
    return batch


def entries(batch, size):
    """At which steps has the agent just entered a cell? [B, T] bool: at each."""
    return batch.valid


def action_floor(config, n, generator):
    """Of the best possible task-blind predictor of n expert trajectories of D: NLL, nats per action, and how often it is
    right about the subgoal."""
    layouts, tasks, paths = random_tasks(config, n, generator, config.noise)
    return bayes_floor(layouts, config.size, paths, tasks, config.max_steps, config.noise, SUBGOAL_SIZE[config.subgoals])


def random_success(config, layouts):
    """How often uniformly random moves solve the post-training task, exactly: [B], from the chances p [B, V, G²] to have
    made v visits and to stand on a cell, step by step."""
    layouts = Layouts(*(part.cpu() for part in vars(layouts).values()))  # doubles, which not every device has
    task = torch.tensor(parse_task(config.post_task, config.colours))[:, None]  # [V, 1]
    game, here = Game(layouts, config.size, task[:, 0], config.max_steps), torch.arange(config.size ** 2)
    to, colour = game.next_cell.view(len(layouts), -1, 4), game.colour_at.view(len(layouts), 1, -1)
    moves = 0.25 * (to != here[:, None]).double()  # [B, G², 4]
    stays = 1 - moves.sum(2)[:, None]  # [B, 1, G²]
    moves = torch.zeros(*to.shape[:2], len(here), dtype=torch.double).scatter_add_(2, to, moves)  # [B, from, to]
    p = torch.zeros(len(layouts), len(task), len(here), dtype=torch.double)
    p[:, 0] = F.one_hot(layouts.agent, len(here))
    solved = torch.zeros(len(layouts), dtype=torch.double)
    for _ in range(config.max_steps):
        arrivals = p @ moves
        right = arrivals * (colour == task)
        p = p * stays + arrivals * (colour < 0)  # a wrong colour ends the game
        p[:, 1:] += right[:, :-1]
        solved += right[:, -1].sum(1)
        if p.sum() < 1e-12:  # all games are over
            break
    return solved


def places(observation, size):
    """Cells of the objects and of the agent, which is what this world observes: [..., N+1] → [..., N+1]"""
    return observation


class Embedding(nn.Module):
    """Observation → e_{t,0}: a vector for where each thing is, summed (= a linear layer on the one-hot observation)."""
    # differs from the paper: egocentric inputs (--view absolute for its own), because they are learned faster.

    def __init__(self, config):
        super().__init__()
        self.size, self.colours = config.size, config.colours
        self.inputs = absolute_inputs if config.view == "absolute" else egocentric_inputs
        numbers = input_count(config.view, config.size, config.colours, config.walls)
        self.cells = nn.EmbeddingBag(numbers, config.width, mode="sum")
        nn.init.normal_(self.cells.weight, std=0.3)

    def forward(self, places):
        """[B, T, N+1] → [B, T, C]"""
        active = self.inputs(places, self.size, self.colours)  # [B, T, N+1] positions of the ones
        return self.cells(active.flatten(0, 1)).view(*places.shape[:2], -1)


class Head(nn.Module):
    """Last residual [..., C] → logits of the moves [..., 4]; what comes next is predicted from it, too, for Eq. 4."""

    def __init__(self, config):
        super().__init__()
        self.things = config.colours + config.walls + 1
        self.action = nn.Linear(config.width, 4)
        self.observation = nn.Linear(config.width, self.things * config.size ** 2)

    def forward(self, last):
        return self.action(last)

    def next_observation_loss(self, last, batch):
        """−ln p(o_{t+1} | o_{1:t}), mean over steps: last residual [B, T, C] → scalar"""
        cells = self.observation(last)[batch.valid].float().unflatten(-1, (self.things, -1))  # [n, N+1, G²]
        return F.cross_entropy(cells.flatten(0, 1), batch.observation[:, 1:][batch.valid].flatten()) * self.things

    def heat(self, temperature):
        """Divides the logits of moves by this, once."""
        for parameter in self.action.parameters():
            parameter.data /= temperature


def log_prob(logits, action):
    """ln p(action): logits [..., 4], moves [...] → [...]"""
    return logits.float().log_softmax(-1).gather(-1, action[..., None])[..., 0]


def sample(logits, generator):
    """A move from each distribution: logits [n, 4] → [n]"""
    return race(logits.softmax(-1), generator)

# ---------------------------------------------------------------------------------------------------- drawing

PALETTE = np.array([[228, 26, 28], [55, 126, 184], [77, 175, 74], [255, 170, 0], [152, 78, 163], [0, 190, 190],
                    [166, 86, 40], [247, 129, 191], [120, 120, 0], [90, 90, 160]], dtype=np.uint8)


def draw_cells(colours, walls, size, pixels):
    """One RGB picture [G·pixels, G·pixels, 3] uint8: coloured cells, dark walls, grid lines."""
    picture = np.full((size * size, 3), 245, dtype=np.uint8)
    picture[colours], picture[walls] = np.resize(PALETTE, (len(colours), 3)), 70
    picture = picture.reshape(size, size, 3).repeat(pixels, 0).repeat(pixels, 1)
    picture[::pixels] = picture[:, ::pixels] = 200
    return picture


def picture(observation, size, colours, pixels=32):
    """An observation [N+1] as a picture [G·pixels, G·pixels, 3] uint8, the agent a black dot with a white rim."""
    *objects, agent = observation.tolist()
    picture = draw_cells(objects[:colours], objects[colours:], size, pixels)
    y, x = np.mgrid[:pixels, :pixels] - (pixels - 1) / 2
    radius = np.hypot(x, y) / pixels
    square = picture[agent // size * pixels:, agent % size * pixels:][:pixels, :pixels]
    square[radius < 0.36], square[radius < 0.28] = 255, 0
    return picture


def film(frame, titles, marked, path, every, fps):
    """Writes an episode, a picture frame(t) and a title a step, as the strip PATH.png (about 15 steps and the first nine
    marked ones, in bold) and as the animation PATH.gif (every so many steps)."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    def show(axis, t):
        axis.clear()
        axis.axis("off")
        axis.imshow(frame(t))
        axis.set_title(titles[t], fontsize=9, fontweight="bold" if marked[t] else "normal")

    last = len(titles) - 1
    shown = sorted({*range(0, last, -(-last // 15)), *np.flatnonzero(marked)[:9].tolist(), last})
    rows = -(-len(shown) // 8)
    figure = Figure(figsize=(10.4, 1.6 * rows), layout="tight")
    for i, t in enumerate(shown):
        show(figure.add_subplot(rows, 8, i + 1), t)
    figure.savefig(f"{path}.png", dpi=110)

    figure = Figure(figsize=(3, 3.3))
    axis = figure.add_subplot()
    film = FuncAnimation(figure, lambda t: show(axis, t), frames=[*range(0, last, every), last])
    film.save(f"{path}.gif", writer=PillowWriter(fps=fps))


class GridworldPinpad(gymnasium.Env):
    """One game with the Gymnasium interface (a batch of one `Game`).
    Observation: MultiBinary(G²·(O+W+1)), the paper's one-hot. Action: Discrete(4). Info: agent, colours, walls (cells),
    visits. `reset(options={"agent": …, "colours": …, "walls": …, "task": …})` sets up a layout, the rest is drawn."""
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}
    options = ("agent", "colours", "walls", "task")  # of `reset`
    picture = staticmethod(picture)

    def __init__(self, size=7, colours=8, walls=4, max_steps=100, task="0-1-2-3-4-5-6-7-0-1-2-3", render_mode=None):
        check_sizes(size, colours, walls, max_steps)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is none of {self.metadata['render_modes']}")
        self.size, self.colours, self.walls = size, colours, walls
        self.max_steps, self.render_mode, self.task = max_steps, render_mode, parse_task(task, colours)
        self.observation_space = gymnasium.spaces.MultiBinary(size ** 2 * (colours + walls + 1))
        self.action_space = gymnasium.spaces.Discrete(4)
        self.game = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2 ** 62)))
        options = self._checked({} if options is None else options)
        task = parse_task(options["task"], self.colours) if "task" in options else self.task
        self.game = self._new_game(self._layout(options, generator), task, options, generator)
        return self._observation(), self._info()

    def _checked(self, options):
        if not isinstance(options, dict) or set(options) - set(self.options):
            raise ValueError(f"unknown reset options {options!r}; known are {', '.join(self.options)}")
        return options

    def _new_game(self, layouts, task, options, generator):
        return Game(layouts, self.size, task, self.max_steps)

    def _layout(self, options, generator):
        """What is given in `options`; the rest is drawn until the layout can be solved."""
        cells, counts = self.size ** 2, {"agent": 1, "colours": self.colours, "walls": self.walls}
        given = {name: np.atleast_1d(options[name]).tolist() for name in counts if name in options}
        if not given:
            return draw_layouts(1, self.size, self.colours, self.walls, generator)
        taken = [cell for part in given.values() for cell in part]
        for name, part in given.items():
            if len(part) != counts[name]:
                raise ValueError(f"{name}: {len(part)} cells given, {counts[name]} needed")
        if not all(isinstance(cell, int) and 0 <= cell < cells for cell in taken):
            raise ValueError(f"cells are whole numbers from 0 to {cells - 1}")
        if len(set(taken)) != len(taken):
            raise ValueError("two things stand on the same cell")
        for _ in range(1000):
            free = [cell for cell in torch.randperm(cells, generator=generator).tolist() if cell not in taken]
            whole = [given.get(name) or [free.pop() for _ in range(count)] for name, count in counts.items()]
            agent, colours, walls = (torch.tensor([part], dtype=torch.long) for part in whole)
            layouts = Layouts(agent[:, 0], colours, walls)
            if solvable(layouts, self.size):
                return layouts
        raise ValueError("impossible layout: some colour cannot be reached")

    def step(self, action):
        if self.game is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        reward, terminated, truncated = self.game.step(self._batched(action))
        return self._observation(), reward.item(), terminated.item(), truncated.item(), self._info()

    def _batched(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"action {action!r} is none of 0 (up), 1 (down), 2 (left), 3 (right)")
        return torch.tensor([int(action)])

    def render(self):
        if self.render_mode is None or self.game is None:
            return None
        if self.render_mode == "rgb_array":
            return self.picture(self.game.observation()[0], self.size, self.colours)
        info, text = self._info(), np.full(self.size ** 2, ".")
        text[info["colours"]] = list("0123456789"[:self.colours]) if self.colours <= 10 else "c"
        text[info["walls"]], text[info["agent"]] = "#", "@"
        return "\n".join(" ".join(row) for row in text.reshape(self.size, self.size))

    def _observation(self):
        return one_hot_observation(self.game.observation(), self.size)[0].numpy().astype(np.int8)

    def _info(self):
        layouts = self.game.layouts
        return {"agent": self.game.agent.item(), "colours": layouts.colours[0].numpy().copy(),
                "walls": layouts.walls[0].numpy().copy(), "visits": self.game.visits.item()}


gymnasium.register("GridworldPinpad-v0", entry_point="gridworld:GridworldPinpad")
