"""gridworld-pinpad (arXiv:2512.20605, App. A.1): visit coloured cells in an order that nobody is told.

A G×G grid holds O uniquely coloured cells, W walls and one agent, all placed at random. A *task* is a list of
colours. Moving onto a coloured cell from another cell visits it. Visiting anything but the next colour of the
task ends the episode without reward; completing the task ends it with reward 1. A task is made of *subgoals*,
each of one colour or a pair of them. Observations show neither the task nor the subgoal.

    layouts = draw_layouts(n, size, colours, walls, generator)    where everything is
    game    = Game(layouts, size, tasks, max_steps)               n games in a batch; game.step(actions [n])
    paths   = expert_paths(layouts, size, tasks, …)               random shortest paths, the pretraining data
    env     = gymnasium.make("GridworldPinpad-v0")                one game with the Gymnasium interface

Dims: B games, T time, G grid size, O colours, W walls, N = O + W objects (colours, then walls), K length of a
task, M tasks, C width of the model. A cell is one number, row·G + column.
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
FAR = 100  # "no path": longer than any shortest path, and FAR + 1 still fits into an int8

# The subgoals A, B, C, D are the colours 0, 1, 2, 3 (Table A2) or the pairs 0-1, 2-3, 4-5, 6-7 (Table A1).
# No pretraining task ever contains A→B, B→C, C→D or D→A; the post-training task has no other transitions.
SUBGOALS, SUBGOAL_SIZE = 4, {"singles": 1, "pairs": 2}  # how many; of how many colours
PRETRAINING_TASKS = {
    "pairs": "ACA ACB ADB BAC BDB BDC CAC CAD CBD DBA DBD DCA ADC BAD CBA DCB".split(),
    "singles": "ADC BAD CBA DCB ACA ACB ADB BAC BDB BDC CAC CAD CBD DBA DBD DCA".split(),
}


class Unusable(ValueError):
    """Settings or data files that cannot be used, such as settings under which the expert solves nothing."""


def pretraining_tasks(kind):
    """The 16 pretraining tasks of "pairs" (Table A1) or "singles" (A2): [16, K] colours to visit in order."""
    size = SUBGOAL_SIZE[kind]
    subgoals = torch.tensor([["ABCD".index(letter) for letter in task] for task in PRETRAINING_TASKS[kind]])
    return (subgoals[..., None] * size + torch.arange(size)).flatten(1)  # [16, 3] → [16, 3 · size]


def parse_task(text, colours):
    """'0-1-2-3' → [0, 1, 2, 3]. Raises ValueError for what is no sequence of colours that can be visited."""
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
        return Layouts(self.agent[index], self.colours[index], self.walls[index])

    @property
    def objects(self):
        """Cells of everything that stands still, colours first: [B, N]"""
        return torch.cat([self.colours, self.walls], dim=1)


def neighbours(size, device="cpu"):
    """The cell that each action leads to, or the agent's own where it would leave the grid: [G², 4]"""
    cell = torch.arange(size * size)[:, None]
    row = (cell // size + MOVES[:, 0]).clamp(0, size - 1)  # [G², 4]
    column = (cell % size + MOVES[:, 1]).clamp(0, size - 1)
    return (row * size + column).to(device)


def distances(layouts, size):
    """Steps from each cell to each colour around its obstacles, which are walls and *other* colours (C.1.1).
    Two tensors [B, O, G²] int8, FAR where there is no path. In the first, obstacles are FAR: nobody may walk
    through. In the second they have the steps of an agent that stands there and walks off."""
    colours = layouts.colours.shape[1]
    blocked = torch.zeros(len(layouts), size * size, dtype=torch.bool, device=layouts.agent.device)
    blocked.scatter_(1, layouts.objects, True)
    blocked = blocked[:, None].repeat(1, colours, 1)  # [B, O, G²]
    target = layouts.colours[:, :, None]  # [B, O, 1]
    blocked.scatter_(2, target, False)
    distance = torch.full(blocked.shape, FAR, dtype=torch.int8, device=blocked.device).scatter_(2, target, 0)

    def one_step_further(distance):
        grid = F.pad(distance.unflatten(2, (size, size)), (1, 1, 1, 1), value=FAR)  # [B, O, G+2, G+2]
        vertical = torch.minimum(grid[:, :, :-2, 1:-1], grid[:, :, 2:, 1:-1])
        horizontal = torch.minimum(grid[:, :, 1:-1, :-2], grid[:, :, 1:-1, 2:])
        nearest = torch.minimum(vertical, horizontal).flatten(2)
        return torch.minimum(distance, (nearest + 1).clamp(max=FAR))

    while True:
        further = one_step_further(distance).masked_fill(blocked, FAR)
        if torch.equal(further, distance):
            return distance, one_step_further(distance)
        distance = further


def solvable(layouts, size):
    """Can every colour be reached from the agent and from every other colour? [B] bool"""
    starts = torch.cat([layouts.agent[:, None], layouts.colours], 1)  # [B, 1+O]
    _, distance = distances(layouts, size)
    steps = distance.gather(2, starts[:, None].expand(-1, distance.shape[1], -1))  # [B, O, 1+O]
    return (steps < FAR).flatten(1).all(1)


def draw_layouts(n, size, colours, walls, generator):
    """n random solvable layouts, on the generator's device."""
    def layouts_of(cells):
        return Layouts(cells[:, 0], cells[:, 1:1 + colours], cells[:, 1 + colours:])

    kept, count = [], 0
    while count < n:
        if len(kept) >= 100 + 100 * count:
            raise ValueError(f"found no solvable layout of {colours} colours, {walls} walls on {size}×{size}")
        rank = torch.rand(n + n // 4 + 8, size * size, generator=generator, device=generator.device)
        cells = rank.topk(colours + walls + 1).indices  # different cells, in random order
        kept.append(cells[solvable(layouts_of(cells), size)])
        count += len(kept[-1])
    return layouts_of(torch.cat(kept)[:n])

# ------------------------------------------------------------------------------------------------------ rules

class Game:
    """B games in step, with one task for all ([K]) or one for each ([B, K]). Finished games ignore actions.
    State, each [B]: `agent` its cell, `visits` right ones so far, `steps`, `terminated` by success or a wrong
    visit, `done` terminated or out of time. Tables with a row a game are flat, as one index is faster than
    two: row · columns + column."""
    def __init__(self, layouts, size, tasks, max_steps):
        self.layouts, self.max_steps = layouts, max_steps
        self.cells = size * size
        batch, device = len(layouts), layouts.agent.device
        self.rows = torch.arange(batch, device=device)
        tasks = torch.as_tensor(tasks, device=device).expand(batch, -1)
        self.goal = tasks.shape[1]  # visits needed
        self.tasks = F.pad(tasks, (0, 1), value=-2).reshape(-1)  # [B·(K+1)]; at last, nothing is right
        colours = torch.arange(layouts.colours.shape[1], device=device).expand(batch, -1)
        colour_at = torch.full((batch, self.cells), -1, device=device)
        self.colour_at = colour_at.scatter_(1, layouts.colours, colours).view(-1)  # [B·G²], −1: none

        self.is_wall = torch.zeros(batch, self.cells, dtype=torch.bool, device=device)
        self.is_wall.scatter_(1, layouts.walls, True)
        ahead = neighbours(size, device).expand(batch, -1, -1)  # [B, G², 4]
        hits_wall = self.is_wall.gather(1, ahead.reshape(batch, -1)).view_as(ahead)
        here = torch.arange(self.cells, device=device)[:, None]
        self.next_cell = torch.where(hits_wall, here, ahead).reshape(-1)  # [B·G²·4]

        self.agent = layouts.agent
        self.visits = self.steps = torch.zeros_like(self.agent)
        self.terminated = self.done = torch.zeros_like(self.agent, dtype=torch.bool)
        self.reset(torch.ones_like(self.done))

    def reset(self, games):
        """Puts those games where `games` [B] is true back to their start."""
        self.agent = torch.where(games, self.layouts.agent, self.agent)
        self.visits, self.steps = self.visits.masked_fill(games, 0), self.steps.masked_fill(games, 0)
        self.terminated, self.done = self.terminated & ~games, self.done & ~games

    def step(self, action):
        """action [B] → reward [B] float, terminated [B], truncated [B], which stay true in finished games"""
        return self.enter(self.next_cell[(self.rows * self.cells + self.agent) * 4 + action])

    def enter(self, cell, failed=False):
        """The agents enter a cell [B], or something else `failed` [B] and ends the game. Returns as step."""
        cell = torch.where(self.done | failed, self.agent, cell)
        colour = self.colour_at[self.rows * self.cells + cell]
        visit = (cell != self.agent) & (colour >= 0)  # standing still never counts
        right = visit & (colour == self.tasks[self.rows * (self.goal + 1) + self.visits])
        self.agent = cell
        self.visits, self.steps = self.visits + right, self.steps + ~self.done

        solved = self.visits == self.goal
        self.terminated = self.terminated | solved | (visit & ~right) | failed
        truncated = (self.steps >= self.max_steps) & ~self.terminated
        self.done = self.terminated | truncated
        return (solved & right).float(), self.terminated, truncated

    def target(self):
        """The colour to visit next (of a solved game: the last one): [B]"""
        return self.tasks[self.rows * (self.goal + 1) + self.visits.clamp(max=self.goal - 1)]

    def success(self):
        """Is the game solved? [B] float 0/1"""
        return (self.visits == self.goal).float()

    def observation(self):
        """Cells of the objects and of the agent: [B, N+1]"""
        return torch.cat([self.layouts.objects, self.agent[:, None]], 1)


@dataclass
class Trajectories:
    """B episodes of an expert or a model, padded to the longest: observation [B, T+1, N+1] (the ant's: D),
    action [B, T] moves ([B, T, 8] torques), length [B] actions taken, success [B] float 0/1. An expert's also
    have subgoal [B, T], which one it pursues at each step: no model sees it but where a function says so."""
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
        """The trajectories `rows` of an expert, cut to the longest of them."""
        end = int(self.length[rows].max())
        return Trajectories(self.observation[rows, :end + 1], self.action[rows, :end], self.length[rows],
                            self.success[rows], self.subgoal[rows, :end])

    def to(self, device):
        return Trajectories(*(None if part is None else part.to(device) for part in vars(self).values()))

# ------------------------------------------------------------------------------------------------- the expert

def shortest_moves(layouts, size):
    """[B, O, G², 4] bool: does this action, from this cell, start a shortest path to this colour?"""
    walking, starting = distances(layouts, size)
    return walking[..., neighbours(size, walking.device)] == starting[..., None] - 1


def race(probability, generator):
    """A draw from each distribution [..., n] → [...]: the first of n exponential clocks to ring."""
    noise = torch.rand(probability.shape, generator=generator, device=probability.device)
    return (probability / -noise.log()).argmax(-1)


def expert_probabilities(game, moves, epsilon):
    """The expert's action distribution [B, 4], given shortest moves [B, O, G², 4]: uniform over those to the
    next colour; with probability epsilon uniform over actions that visit no wrong one (C.1.1, Fig. A2)."""
    target = game.target()
    best = moves[game.rows, target, game.agent].float()
    best = best / best.sum(-1, keepdim=True).clamp(min=1)
    if epsilon == 0:
        return best
    ahead = game.next_cell.view(-1, 4)[game.rows * game.cells + game.agent]  # [B, 4] cells
    colour = game.colour_at.view(-1, game.cells).gather(1, ahead)
    safe = ((colour < 0) | (colour == target[:, None]) | (ahead == game.agent[:, None])).float()
    return (1 - epsilon) * best + epsilon * safe / safe.sum(-1, keepdim=True)


def expert_paths(layouts, size, tasks, max_steps, generator, epsilon=0.0, subgoal_size=1):
    """The expert solves tasks [B, K] in B layouts, or with epsilon > 0 sometimes runs out of time."""
    game, moves = Game(layouts, size, tasks, max_steps), shortest_moves(layouts, size)
    observations, actions, subgoals = [game.observation()], [], []
    while not game.done.all():
        actions.append(race(expert_probabilities(game, moves, epsilon), generator))
        subgoals.append(game.target() // subgoal_size)
        game.step(actions[-1])
        observations.append(game.observation())
    observation, action, subgoal = (torch.stack(steps, 1) for steps in (observations, actions, subgoals))
    return Trajectories(observation, action, game.steps, game.success(), subgoal)


def bayes_floor(layouts, size, paths, tasks, max_steps, epsilon=0.0, subgoal_size=1):
    """How well can these paths be predicted, if their task is not told? Exactly, by Bayes' rule over all
    tasks [M, K]: negative log-likelihood (NLL) of an action in nats; how often one can tell the subgoal."""
    batch, many = len(layouts), len(tasks)
    row = torch.arange(batch, device=tasks.device).repeat_interleave(many)  # [B·M], a game a path and task
    game = Game(layouts[row], size, tasks.repeat(batch, 1), max_steps)
    moves = shortest_moves(layouts, size)[row]
    posterior = torch.full((batch, many), 1 / many, device=tasks.device)
    nll, right = 0.0, 0.0
    for t, action in enumerate(paths.action.unbind(1)):
        valid = t < paths.length  # [B]
        pursued = game.target().view(batch, many) // subgoal_size  # [B, M]
        belief = posterior.new_zeros(batch, SUBGOALS).scatter_add_(1, pursued, posterior)
        right += belief.max(1).values[valid].sum().item()
        likelihood = expert_probabilities(game, moves, epsilon)[game.rows, action[row]]
        likelihood = likelihood.masked_fill(game.done, 0).view(batch, many)
        predictive = (posterior * likelihood).sum(1)
        nll -= predictive[valid].log().sum().item()
        updated = posterior * likelihood / predictive[:, None].clamp(min=1e-30)
        posterior = torch.where(valid[:, None], updated, posterior)
        game.step(action[row])
    steps = paths.length.sum().item()
    return nll / steps, right / steps

# ------------------------------------------------------------------------------------------------- symmetries

@functools.cache
def symmetries(size):
    """The 8 rotations and reflections of the square: image of each cell [8, G²], of each action [8, 4]"""
    grid = torch.arange(size * size).view(size, size)
    flipped = [grid, grid.flip(1), grid.flip(0), grid.flip(0, 1)]
    cells = torch.stack([image.flatten() for image in flipped + [image.T for image in flipped]])
    # The image of an action leads from the image of every cell to the image of its neighbour.
    ahead = neighbours(size)
    same = ahead[cells][..., None] == cells[:, ahead][:, :, None]  # [8, G², 4 images, 4 actions]
    return cells, same.all(1).int().argmax(1)


def mirror(observation, action, k, size):
    """Each episode in the image k [B] of its world: observation [B, T+1, N+1], action [B, T] → same shapes"""
    cells, actions = (image.to(observation.device) for image in symmetries(size))
    return cells[k[:, None, None], observation], actions[k[:, None], action]

# ------------------------------------------------------------------------ what internal_rl.py asks of a world

PRESETS = {  # settings of internal_rl.py that differ from its defaults
    "quick": {},
    "tiny": dict(
        width=32, heads=2, rank=16, pretrain_steps=160, pretrain_batch=32, probe_steps=32, steer_steps=48,
        gate_steps=64, code_steps=48, discover_batch=32, rl_episodes=1024, rl_batch=256, evaluation=128),
    # The paper's kind of subgoal, a pair of colours, on a smaller grid; eight visits.
    "pairs": dict(
        size=6, colours=8, subgoals="pairs", max_steps=100, post_task="0-1-2-3-4-5-6-7", rate=0.46,
        pretrain_steps=6400, gate_steps=1600, code_steps=3200),
}
SYMMETRIES = 8  # images of a world, see `mirror`
RAW = "token-level"  # what RL on the model's own actions is called
HELD_OUT = 1024  # held-out trajectories that are measured
EVALUATIONS_A_LAYOUT = 32  # a code is tried in one layout for each 32 on which success is measured
TOLERANCE = 0  # how many steps a gate may be off
FILM = (1, 2)  # a picture every so many steps, pictures a second
EXPECT = dict(  # about what the quick preset's development seeds 0 and 3 reach
    gap="0.05", probe_best="0.51", probe_ceiling="0.69", base_success="0", steer_success="0.88",
    labels_withheld="0.98", gate_precision="1", gate_recall="1", goal_accuracy="1", shown="0.98",
    withheld="0.98", product="0.9", internal_success="0.88", raw_success="0")


def check(config):
    """Raises ValueError for settings that cannot work together in this world."""
    check_sizes(config.size, config.colours, config.walls, config.max_steps)
    draw_layouts(1, config.size, config.colours, config.walls, torch.Generator())
    needed = SUBGOALS * SUBGOAL_SIZE[config.subgoals]
    if config.colours < needed:
        raise ValueError(f"colours {config.colours} is too few: tasks of {config.subgoals!r} use {needed}")
    if max(parse_task(config.post_task, config.colours)) >= needed:
        raise ValueError(f"post_task {config.post_task!r} names a colour that no pretraining task visits")


def random_tasks(config, n, generator, noise, draw_layouts=draw_layouts, expert_paths=expert_paths):
    """The expert of a world on n random pretraining tasks: (layouts, all tasks [16, K], its paths)."""
    layouts = draw_layouts(n, config.size, config.colours, config.walls, generator)
    tasks = pretraining_tasks(config.subgoals).to(generator.device)
    drawn = torch.randint(len(tasks), (n,), generator=generator, device=generator.device)
    paths = expert_paths(layouts, config.size, tasks[drawn], config.max_steps, generator, noise,
                         subgoal_size=SUBGOAL_SIZE[config.subgoals])
    return layouts, tasks, paths


def expert_batch(config, n, generator, noise=0.0, draw_layouts=draw_layouts, expert_paths=expert_paths):
    """The solved ones of n fresh expert trajectories: D, to pretrain on (noise = config.noise), or D* (0)."""
    # differs from the paper: only solved episodes, because C.1.1 calls D successful, then says not always.
    _, _, paths = random_tasks(config, n, generator, noise, draw_layouts, expert_paths)
    if not paths.success.any():
        raise Unusable(f"the expert solves none of {n} episodes within max_steps {config.max_steps}")
    return paths.pick(paths.success.nonzero()[:, 0])


def source(config, noise, folder):
    """Where training trajectories come from: a function (n, generator) → Trajectories, here fresh ones."""
    return lambda n, generator: expert_batch(config, n, generator, noise)


def thinned(config, batch, stage, progress, generator):
    """The steps to train on, at progress 0 … 1 of a stage: here all of them."""
    return batch


def entries(batch, size):
    """At which steps has the agent just entered a cell? [B, T] bool: here at each."""
    return batch.valid


def action_floor(config, n, generator):
    """The `bayes_floor` of n trajectories of D: nats per action, and how often a subgoal is read right."""
    layouts, tasks, paths = random_tasks(config, n, generator, config.noise)
    return bayes_floor(layouts, config.size, paths, tasks, config.max_steps, config.noise,
                       SUBGOAL_SIZE[config.subgoals])


def random_success(config, layouts):
    """How often uniformly random moves solve the post-training task, exactly: [B]. The chance p [B, K, G²] to
    have made so many visits and to be on this cell is followed step by step, on the CPU for its doubles."""
    layouts = Layouts(layouts.agent.cpu(), layouts.colours.cpu(), layouts.walls.cpu())
    task = torch.tensor(parse_task(config.post_task, config.colours))
    game = Game(layouts, config.size, task, config.max_steps)
    batch, cells = game.is_wall.shape
    ahead, colour = game.next_cell.view(batch, cells, 4), game.colour_at.view(batch, 1, cells)
    chance = 0.25 * (ahead != torch.arange(cells)[:, None]).double()  # [B, G², 4], 0: a move against a wall
    stays = 1 - chance.sum(2)[:, None]  # [B, 1, G²]
    moves = torch.zeros(batch, cells, cells, dtype=torch.double).scatter_add_(2, ahead, chance)  # from, to
    p = torch.zeros(batch, len(task), cells, dtype=torch.double)
    p[:, 0] = F.one_hot(layouts.agent, cells)
    solved = torch.zeros(batch, dtype=torch.double)
    for _ in range(config.max_steps):
        arrivals = p @ moves
        right = arrivals * (colour == task[:, None])
        p = p * stays + arrivals * (colour < 0)  # a wrong colour ends the game
        p[:, 1:] += right[:, :-1]
        solved += right[:, -1].sum(1)
        if p.sum() < 1e-12:  # all games are over
            break
    return solved


def places(observation, size):
    """Cells of the objects and of the agent, which is what this world observes: [..., N+1] → [..., N+1]"""
    return observation


def egocentric_inputs(places, size, colours):
    """What the agent sees, as positions of the ones in a long 0/1 vector: each object's offset from it (walls
    are alike), and its cell. Cells [..., N+1] → [..., N+1] in 0 … (O+1)·(2G−1)² + G² − 1."""
    objects, agent = places[..., :-1], places[..., -1:]
    span = 2 * size - 1
    row = objects // size - agent // size + size - 1  # [..., N], 0 … 2G−2
    column = objects % size - agent % size + size - 1
    kind = torch.arange(objects.shape[-1], device=objects.device).clamp(max=colours)  # colour, or O: wall
    offset = kind * span * span + row * span + column
    return torch.cat([offset, (colours + 1) * span * span + agent], -1)


class Embedding(nn.Module):
    """Observation → e_{t,0}: a vector for where each thing is, summed (= a linear map of the 0/1 vector)."""
    # differs from the paper: egocentric inputs, because they are learned faster.
    def __init__(self, config):
        super().__init__()
        self.size, self.colours = config.size, config.colours
        inputs = (config.colours + 1) * (2 * config.size - 1) ** 2 + config.size ** 2
        self.cells = nn.EmbeddingBag(inputs, config.width, mode="sum")
        nn.init.normal_(self.cells.weight, std=0.3)

    def forward(self, places):
        """[B, T, N+1] → [B, T, C]"""
        ones = egocentric_inputs(places, self.size, self.colours)  # [B, T, N+1]
        return self.cells(ones.flatten(0, 1)).view(*places.shape[:2], -1)


class Head(nn.Module):
    """Last residual [..., C] → logits of the moves [..., 4]; for Eq. 4 also what is observed next."""
    def __init__(self, config):
        super().__init__()
        self.things = config.colours + config.walls + 1
        self.action = nn.Linear(config.width, 4)
        self.observation = nn.Linear(config.width, self.things * config.size ** 2)

    def forward(self, last):
        return self.action(last)

    def next_observation_loss(self, last, batch):
        """−ln p(o_{t+1} | o_{1:t}), mean over steps: last residual [B, T, C] → scalar"""
        logits = self.observation(last)[batch.valid].float().unflatten(-1, (self.things, -1))  # [n, N+1, G²]
        following = batch.observation[:, 1:][batch.valid]  # [n, N+1] cells
        return F.cross_entropy(logits.flatten(0, 1), following.flatten()) * self.things


def log_prob(logits, action):
    """ln p(action): logits [..., 4], moves [...] → [...]"""
    return logits.float().log_softmax(-1).gather(-1, action[..., None])[..., 0]


def sample(logits, generator):
    """A move from each distribution: logits [n, 4] → [n]"""
    return race(logits.softmax(-1), generator)

# --------------------------------------------------------------------------------------------------- pictures

PALETTE = np.array([
    [228, 26, 28], [55, 126, 184], [77, 175, 74], [255, 170, 0], [152, 78, 163],
    [0, 190, 190], [166, 86, 40], [247, 129, 191], [120, 120, 0], [90, 90, 160]], dtype=np.uint8)


def draw_cells(colours, walls, size, pixels):
    """An RGB picture [G·pixels, G·pixels, 3] uint8: coloured cells, dark walls, grid lines."""
    picture = np.full((size * size, 3), 245, dtype=np.uint8)
    picture[colours], picture[walls] = np.resize(PALETTE, (len(colours), 3)), 70
    picture = picture.reshape(size, size, 3).repeat(pixels, 0).repeat(pixels, 1)
    picture[::pixels] = picture[:, ::pixels] = 200
    return picture


def picture(observation, size, colours, pixels=32):
    """An observation [N+1] as a picture [G·pixels, G·pixels, 3] uint8; the agent is a black dot."""
    *objects, agent = observation.tolist()
    picture = draw_cells(objects[:colours], objects[colours:], size, pixels)
    y, x = np.mgrid[:pixels, :pixels] - (pixels - 1) / 2
    radius = np.hypot(x, y) / pixels
    square = picture[agent // size * pixels:, agent % size * pixels:][:pixels, :pixels]
    square[radius < 0.36], square[radius < 0.28] = 255, 0  # with a white rim
    return picture


def film(frame, titles, marked, path, every, fps):
    """Writes an episode, a picture frame(t) and a title a step, as the strip PATH.png (about 15 steps and the
    first nine marked ones, in bold) and as the animation PATH.gif (every so many steps)."""
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
    axis = Figure(figsize=(3, 3.3)).add_subplot()
    film = FuncAnimation(axis.figure, lambda t: show(axis, t), frames=[*range(0, last, every), last])
    film.save(f"{path}.gif", writer=PillowWriter(fps=fps))

# -------------------------------------------------------------------------------------------------- Gymnasium

class GridworldPinpad(gymnasium.Env):
    """One game with the Gymnasium interface (a batch of one `Game`). Observation: MultiBinary(G²·(N+1)), the
    paper's, a one-hot cell for every object and the agent. Action: Discrete(4). Info: agent, colours, walls
    (cells), visits. `reset(options={"agent": …, "colours": …, "walls": …, "task": …})` sets up a layout."""
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}
    options = ("agent", "colours", "walls", "task")  # of `reset`
    picture = staticmethod(picture)

    def __init__(self, size=7, colours=8, walls=4, max_steps=100, task="0-1-2-3-4-5-6-7-0-1-2-3",
                 render_mode=None):
        check_sizes(size, colours, walls, max_steps)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is none of {self.metadata['render_modes']}")
        self.size, self.colours, self.walls = size, colours, walls
        self.task = parse_task(task, colours)
        self.max_steps, self.render_mode = max_steps, render_mode
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
        counts = {"agent": 1, "colours": self.colours, "walls": self.walls}
        given = {name: np.atleast_1d(options[name]).tolist() for name in counts if name in options}
        if not given:
            return draw_layouts(1, self.size, self.colours, self.walls, generator)
        cells = self.size ** 2
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
            parts = [given.get(name) or [free.pop() for _ in range(count)] for name, count in counts.items()]
            agent, colours, walls = (torch.tensor([part], dtype=torch.long) for part in parts)
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
        return F.one_hot(self.game.observation()[0], self.size ** 2).flatten().numpy().astype(np.int8)

    def _info(self):
        layouts = self.game.layouts
        return {"agent": self.game.agent.item(), "colours": layouts.colours[0].numpy().copy(),
                "walls": layouts.walls[0].numpy().copy(), "visits": self.game.visits.item()}


gymnasium.register("GridworldPinpad-v0", entry_point="gridworld:GridworldPinpad")
