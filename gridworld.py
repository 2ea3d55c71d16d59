"""gridworld-pinpad (arXiv:2512.20605, App. A.1): visit coloured cells in a hidden order, without a hint of which order.

A G×G grid holds O uniquely coloured cells, W walls and one agent, all placed at random. A *task* is a sequence of colours.
Moving onto a coloured cell from another cell visits it; visiting anything but the next colour of the task ends the episode
without reward, completing the sequence ends it with reward 1. The observation shows the layout and the agent, never the task.

    layouts = draw_layouts(n, size, colours, walls, generator)      where everything is
    game    = Game(layouts, size, tasks, max_steps)                 n games in a batch; game.step(actions [n])
    paths   = expert_paths(layouts, size, tasks, generator)         stochastic shortest paths, the pretraining data
    env     = gymnasium.make("GridworldPinpad-v0")                  one game with the Gymnasium interface

The rules are written once, in `Game.step`, batched in torch on any device; the Gymnasium environment is a batch of one.
Dims: B games, T time, G grid size, O colours, W walls, K length of a task, M tasks. Cells are numbered row by row: cell = row·G + column.
"""
from dataclasses import dataclass, replace

import gymnasium
import numpy as np
import torch

UP, DOWN, LEFT, RIGHT = range(4)
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (row, column) of each action
FAR = 100  # "no path": larger than any shortest path, small enough that FAR + 1 fits an int8

# Subgoals ("abstract actions") and the pretraining tasks made of them. No task ever contains A→B, B→C, C→D or D→A.
SUBGOALS = {
    "pairs": [(0, 1), (2, 3), (4, 5), (6, 7)],  # A B C D of Table A1
    "singles": [(0,), (1,), (2,), (3,)],  # Table A2
}
PRETRAINING_TASKS = {
    "pairs": ["ACA", "ACB", "ADB", "BAC", "BDB", "BDC", "CAC", "CAD", "CBD", "DBA", "DBD", "DCA", "ADC", "BAD", "CBA", "DCB"],
    "singles": ["ADC", "BAD", "CBA", "DCB", "ACA", "ACB", "ADB", "BAC", "BDB", "BDC", "CAC", "CAD", "CBD", "DBA", "DBD", "DCA"],
}


def pretraining_tasks(kind):
    """The 16 pretraining tasks of `kind` ("pairs": Table A1, "singles": Table A2).

    Returns (tasks [16, K] colours to visit in order, subgoals [16, K] index of the subgoal each visit belongs to).
    """
    tasks, subgoals = [], []
    for letters in PRETRAINING_TASKS[kind]:
        indices = ["ABCD".index(letter) for letter in letters]
        tasks.append([colour for i in indices for colour in SUBGOALS[kind][i]])
        subgoals.append([i for i in indices for _ in SUBGOALS[kind][i]])
    return torch.tensor(tasks), torch.tensor(subgoals)


def parse_task(text, colours):
    """'0-1-2-3' → [0, 1, 2, 3]. Raises ValueError for anything that is not a visitable sequence of known colours."""
    try:
        task = [int(part) for part in text.split("-")]
    except (ValueError, AttributeError):
        raise ValueError(f"task {text!r} is not a sequence of colours such as '0-1-2-3'") from None
    for colour, following in zip(task, task[1:] + [None]):
        if not 0 <= colour < colours:
            raise ValueError(f"task {text!r} names colour {colour}; the colours are 0 to {colours - 1}")
        if colour == following:
            raise ValueError(f"task {text!r} visits colour {colour} twice in a row")
    return task


def check_sizes(size, colours, walls, max_steps):
    """Raises ValueError unless `colours` + `walls` + agent fit on the grid."""
    if not 2 <= size <= 9:
        raise ValueError(f"size {size} is outside 2 … 9")
    if colours < 1 or walls < 0 or colours + walls + 1 > size * size:
        raise ValueError(f"{colours} colours, {walls} walls and an agent do not fit on {size}×{size} cells")
    if max_steps < 1:
        raise ValueError(f"max_steps {max_steps} is not positive")


# ---------------------------------------------------------------------------------------------------------------- layouts

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
        """Cells of everything that stands still, colours first: [B, O+W]."""
        return torch.cat([self.colours, self.walls], dim=1)


def neighbours(size, device="cpu"):
    """[G², 4] cell reached by each action; the own cell where the move would leave the grid."""
    row, column = torch.arange(size * size) // size, torch.arange(size * size) % size
    to = torch.stack([row, column], -1)[:, None] + MOVES  # [G², 4, 2]
    inside = ((to >= 0) & (to < size)).all(-1)
    return torch.where(inside, to[..., 0] * size + to[..., 1], torch.arange(size * size)[:, None]).to(device)


def distances(layouts, size):
    """Steps to each colour, walls and all *other* colours being obstacles (App. C.1.1): [B, O, G²] int8, FAR if there is no path.

    A cell that is itself an obstacle holds the steps of an agent that stands there and walks off (it may have just visited it).
    """
    batch, colours = layouts.colours.shape
    cells = size * size
    blocked = torch.zeros(batch, cells, dtype=torch.bool, device=layouts.agent.device).scatter_(1, layouts.objects, True)
    blocked = blocked[:, None].repeat(1, colours, 1).scatter_(2, layouts.colours[:, :, None], False)  # the target itself is free
    distance = torch.full((batch, colours, size + 2, size + 2), FAR, dtype=torch.int8, device=layouts.agent.device)
    inner = distance[:, :, 1:-1, 1:-1]  # a view; the rim stays FAR
    start = torch.full((batch, colours, cells), FAR, dtype=torch.int8, device=layouts.agent.device)
    inner.copy_(start.scatter_(2, layouts.colours[:, :, None], 0).view_as(inner))
    blocked = blocked.view_as(inner)

    def one_step_further():
        up, down = distance[:, :, :-2, 1:-1], distance[:, :, 2:, 1:-1]
        left, right = distance[:, :, 1:-1, :-2], distance[:, :, 1:-1, 2:]
        nearest = torch.minimum(torch.minimum(up, down), torch.minimum(left, right))
        return torch.minimum(inner, (nearest + 1).clamp(max=FAR))

    while True:
        nearer = one_step_further().masked_fill(blocked, FAR)
        if torch.equal(nearer, inner):
            break
        inner.copy_(nearer)
    return one_step_further().reshape(batch, colours, cells)


def draw_layouts(n, size, colours, walls, generator):
    """n random layouts in which every colour can be reached from the agent and from every other colour. Device: the generator's."""
    device, kept, count, tries = generator.device, [], 0, 0
    while count < n:
        tries += 1
        if tries > 100 + 100 * count:
            raise ValueError(f"no solvable layout of {colours} colours and {walls} walls on {size}×{size} cells was found")
        order = torch.rand(n + n // 4 + 8, size * size, generator=generator, device=device).topk(colours + walls + 1).indices
        drawn = Layouts(order[:, 0], order[:, 1:1 + colours], order[:, 1 + colours:])
        starts = torch.cat([drawn.agent[:, None], drawn.colours], 1)[:, None].expand(-1, colours, -1)  # [B, O, 1+O]
        solvable = (distances(drawn, size).gather(2, starts) < FAR).all(-1).all(-1)
        kept.append(drawn[solvable])
        count += len(kept[-1])
    return Layouts(*(torch.cat([getattr(part, name) for part in kept])[:n] for name in ("agent", "colours", "walls")))


# ------------------------------------------------------------------------------------------------------------------ rules

class Game:
    """B games played in step. `tasks` is one sequence of colours for all ([K]) or one for each ([B, K]).

    State: agent [B] cell, stage [B] colours visited so far, first [B] the first colour visited (−1: none yet), steps [B], done [B].
    Finished games ignore further actions.
    """

    def __init__(self, layouts, size, tasks, max_steps):
        device, batch = layouts.agent.device, len(layouts)
        self.layouts, self.max_steps, self.cells = layouts, max_steps, size * size
        tasks = torch.as_tensor(tasks, device=device).expand(batch, -1)
        self.goal = tasks.shape[1]  # visits needed
        self.tasks = torch.nn.functional.pad(tasks, (0, 1), value=-2).reshape(-1)  # [B·(K+1)]; after the last visit nothing is right
        self.rows = torch.arange(batch, device=device)
        self.colour_at = torch.full((batch, self.cells), -1, device=device)
        self.colour_at.scatter_(1, layouts.colours, torch.arange(layouts.colours.shape[1], device=device).expand(batch, -1))
        self.colour_at = self.colour_at.view(-1)  # [B·G²], −1 for no colour
        to = neighbours(size, device).expand(batch, -1, -1)  # [B, G², 4]
        is_wall = torch.zeros(batch, self.cells, dtype=torch.bool, device=device).scatter_(1, layouts.walls, True)
        hits_wall = is_wall.gather(1, to.reshape(batch, -1)).view_as(to)
        stay = torch.arange(self.cells, device=device)[:, None]
        self.next_cell = torch.where(hits_wall, stay, to).reshape(-1)  # [B·G²·4]
        self.reset()

    def reset(self, games=None):
        """Puts all games, or those where `games` [B] is true, back to their start."""
        if games is None:
            self.agent = self.layouts.agent.clone()
            self.stage = torch.zeros_like(self.agent)
            self.steps = torch.zeros_like(self.agent)
            self.first = torch.full_like(self.agent, -1)
            self.terminated = torch.zeros_like(self.agent, dtype=torch.bool)
            self.done = self.terminated
        else:
            self.agent = torch.where(games, self.layouts.agent, self.agent)
            self.stage, self.steps = self.stage.masked_fill(games, 0), self.steps.masked_fill(games, 0)
            self.first = self.first.masked_fill(games, -1)
            self.terminated, self.done = self.terminated & ~games, self.done & ~games

    def step(self, action):
        """action [B] → reward [B] float, terminated [B], truncated [B] (both stay true once a game is over)."""
        return self.enter(self.next_cell[(self.rows * self.cells + self.agent) * 4 + action])

    def enter(self, to, failed=False):
        """The agents arrive in the cells `to` [B]. Games in which something else `failed` [B] end there, without a visit. Returns as `step`."""
        to = torch.where(self.done | failed, self.agent, to)
        colour = self.colour_at[self.rows * self.cells + to]
        visit = (to != self.agent) & (colour >= 0)  # standing still never counts
        right = visit & (colour == self.tasks[self.rows * (self.goal + 1) + self.stage])
        self.agent, self.stage, self.steps = to, self.stage + right, self.steps + ~self.done
        self.first = torch.where((self.first < 0) & visit, colour, self.first)
        solved, wrong = self.stage == self.goal, visit & ~right
        self.terminated = self.terminated | solved | wrong | failed
        truncated = (self.steps >= self.max_steps) & ~self.terminated
        self.done = self.terminated | truncated
        return (solved & right).float(), self.terminated, truncated

    def observation(self, games=slice(None)):
        """Cells of the objects and of the agent, the ones of `one_hot_observation`: [B, N+1]"""
        return torch.cat([self.layouts.objects[games], self.agent[games, None]], 1)


# ------------------------------------------------------------------------------------------------------------ observations

def one_hot_observation(places, size):
    """The paper's observation: the one-hot cell of every object and of the agent: places [..., N+1] → [..., (N+1)·G²] float."""
    return torch.nn.functional.one_hot(places, size * size).flatten(-2).float()


def absolute_inputs(places, size, colours):
    """Positions of the ones in `one_hot_observation`: cells of the objects and the agent [..., N+1] → [..., N+1] in 0 … (N+1)·G²."""
    return places + torch.arange(places.shape[-1], device=places.device) * size * size


def egocentric_inputs(places, size, colours):
    """The same observation seen from the agent: the offset of every object (all walls alike) and the agent's cell.

    Cells of the objects and the agent [..., N+1] → [..., N+1] in 0 … (O+1)·(2G−1)² + G².
    """
    objects, agent = places[..., :-1], places[..., -1:]
    span = 2 * size - 1
    row = objects // size - agent // size + size - 1  # [..., N], 0 … 2G−2
    column = objects % size - agent % size + size - 1
    channel = torch.arange(objects.shape[-1], device=objects.device).clamp(max=colours)
    offset = channel * span * span + row * span + column
    return torch.cat([offset, (colours + 1) * span * span + agent], -1)


def places(observation, size):
    """Cells of the objects and of the agent: the grid's observation is just that. [..., N+1] → [..., N+1]"""
    return observation


INPUTS = {"absolute": absolute_inputs, "egocentric": egocentric_inputs}


def input_count(view, size, colours, walls):
    """How many different numbers the inputs of `view` take: the width of the one-hot vector they stand for."""
    return (colours + walls + 1) * size ** 2 if view == "absolute" else (colours + 1) * (2 * size - 1) ** 2 + size ** 2


# ----------------------------------------------------------------------------------------------------------------- expert

def shortest_moves(layouts, size):
    """[B, O, G², 4] bool: does this action, from this cell, start a shortest path to this colour?"""
    distance = distances(layouts, size)
    to = neighbours(size, distance.device).view(-1)
    after = distance[..., to].view(*distance.shape, 4)
    # A blocked cell must not be walked through, even where standing on it would be near.
    batch, colours = layouts.colours.shape
    blocked = torch.zeros(batch, size * size, dtype=torch.bool, device=distance.device).scatter_(1, layouts.objects, True)
    blocked = blocked[:, None].repeat(1, colours, 1).scatter_(2, layouts.colours[:, :, None], False)
    return (after == distance[..., None] - 1) & ~blocked[..., to].view(after.shape) & (distance < FAR)[..., None]


def expert_probabilities(game, moves, target, agent, epsilon):
    """The expert's action distribution: target [B, M], agent [B] → [B, M, 4].

    Uniform over shortest moves; with probability epsilon uniform over the actions that visit no wrong colour (Sec. C.1.1, Fig. A2).
    """
    best = moves[game.rows[:, None], target, agent[:, None]].float()  # [B, M, 4]
    best = best / best.sum(-1, keepdim=True).clamp(min=1)
    if epsilon == 0:
        return best
    cell = game.rows * game.cells + agent
    to = game.next_cell.view(-1, 4)[cell]  # [B, 4]
    colour = game.colour_at.view(-1, game.cells).gather(1, to)[:, None]
    safe = ((colour < 0) | (colour == target[..., None]) | (to == agent[:, None])[:, None]).float()
    return (1 - epsilon) * best + epsilon * safe / safe.sum(-1, keepdim=True)


@dataclass
class Paths:
    """B expert episodes, padded to the longest: observation [B, T+1, D] (the last one included), action [B, T] (an ant: [B, T, 8]),
    stage [B, T] visits made before each action, length [B] actions taken, solved [B] bool."""
    observation: torch.Tensor
    action: torch.Tensor
    stage: torch.Tensor
    length: torch.Tensor
    solved: torch.Tensor


def expert_paths(layouts, size, tasks, max_steps, generator, epsilon=0.0):
    """The expert solves tasks [B, K] in B layouts. Episodes that run out of time (only with epsilon > 0) stay, cut at max_steps."""
    game, moves = Game(layouts, size, tasks, max_steps), shortest_moves(layouts, size)
    target_of = game.tasks.view(len(layouts), -1)
    observations, actions, stages = [game.observation()], [], []
    while not game.done.all():
        target = target_of.gather(1, game.stage.clamp(max=game.goal - 1)[:, None])
        probability = expert_probabilities(game, moves, target, game.agent, epsilon)[:, 0]
        noise = torch.rand(probability.shape, generator=generator, device=probability.device)
        action = (probability / -noise.log()).argmax(-1)  # a draw from `probability` (the exponential race)
        stages.append(game.stage)
        actions.append(action)
        game.step(action)
        observations.append(game.observation())
    return Paths(torch.stack(observations, 1), torch.stack(actions, 1), torch.stack(stages, 1), game.steps, game.stage == game.goal)


def bayes_floor(layouts, size, paths, tasks, own_task, max_steps, epsilon=0.0):
    """Exact mean NLL per action, in nats, of the best possible predictors of these expert paths: (task-blind, task-aware).

    The task-blind predictor keeps the exact posterior over all pretraining tasks [M, K] given the actions so far; the
    task-aware one is told the path's own task (own_task [B] index into tasks).
    """
    game, moves = Game(layouts, size, tasks[0], max_steps), shortest_moves(layouts, size)
    batch, (many, visits) = len(layouts), tasks.shape
    tasks = torch.nn.functional.pad(tasks, (0, 1)).expand(batch, -1, -1)  # [B, M, K+1]
    stage = torch.zeros(batch, many, dtype=torch.long, device=tasks.device)
    posterior = torch.full((batch, many), 1 / many, device=tasks.device)
    blind, aware = 0.0, 0.0
    for t in range(paths.action.shape[1]):
        agent, following = paths.observation[:, t, -1], paths.observation[:, t + 1, -1]
        target = tasks.gather(2, stage[..., None])[..., 0]  # [B, M]
        probability = expert_probabilities(game, moves, target, agent, epsilon)
        probability = probability.gather(2, paths.action[:, t, None, None].expand(-1, many, 1))[..., 0]
        probability = probability.masked_fill(stage == visits, 0)
        valid = t < paths.length
        predictive = (posterior * probability).sum(1)
        blind -= predictive[valid].log().sum().item()
        aware -= probability.gather(1, own_task[:, None])[:, 0][valid].log().sum().item()
        posterior = torch.where(valid[:, None], posterior * probability / predictive[:, None].clamp(min=1e-30), posterior)
        colour = game.colour_at.view(batch, -1).gather(1, following[:, None])
        stage = stage + ((colour == target) & (following != agent)[:, None] & (stage < visits) & valid[:, None])
    return blind / paths.length.sum().item(), aware / paths.length.sum().item()


# --------------------------------------------------------------------------------------------------------------- symmetry

SYMMETRIES = 8


def symmetries(size):
    """The 8 rotations and reflections of the square: (cells [8, G²] new cell of each cell, actions [8, 4] new action of each)."""
    row, column = torch.arange(size * size) // size, torch.arange(size * size) % size
    flip = lambda x: size - 1 - x
    images = [(row, column), (row, flip(column)), (flip(row), column), (flip(row), flip(column)),
              (column, row), (column, flip(row)), (flip(column), row), (flip(column), flip(row))]
    cells = torch.stack([r * size + c for r, c in images])
    # An action's image is the move between the images of a cell and of its neighbour.
    to = neighbours(size)
    actions = torch.zeros(8, 4, dtype=torch.long)
    for k in range(8):
        for a in range(4):
            source = next(c for c in range(size * size) if to[c, a] != c)
            actions[k, a] = (to[cells[k, source]] == cells[k, to[source, a]]).nonzero()[0, 0]
    return cells, actions


def mirror(observation, action, k, size):
    """Each episode in the image k [B] in 0 … 7 of its world: observation [B, T+1, N+1] cells, action [B, T] → the same shapes"""
    cells, actions = (x.to(observation.device) for x in symmetries(size))
    return cells[k[:, None, None], observation], actions[k[:, None], action]


# ------------------------------------------------------------------------------------------------------------- drawing

PALETTE = np.array([[228, 26, 28], [55, 126, 184], [77, 175, 74], [255, 170, 0], [152, 78, 163], [0, 190, 190], [166, 86, 40],
                    [247, 129, 191], [120, 120, 0], [90, 90, 160]], dtype=np.uint8)


def draw_cells(colours, walls, size, pixels):
    """One RGB picture [G·pixels, G·pixels, 3] uint8: coloured cells, dark walls, grid lines."""
    picture = np.full((size, size, 3), 245, dtype=np.uint8)
    for i, cell in enumerate(colours):
        picture[cell // size, cell % size] = PALETTE[i % len(PALETTE)]
    for cell in walls:
        picture[cell // size, cell % size] = 70
    picture = picture.repeat(pixels, 0).repeat(pixels, 1)
    picture[::pixels] = picture[:, ::pixels] = 200
    return picture


def draw(agent, colours, walls, size, pixels=32):
    """The cells, with the agent a black dot with a white rim: [G·pixels, G·pixels, 3] uint8."""
    picture = draw_cells(colours, walls, size, pixels)
    y, x = np.mgrid[:pixels, :pixels] - (pixels - 1) / 2
    radius = np.hypot(x, y) / pixels
    square = picture[agent // size * pixels:, agent % size * pixels:][:pixels, :pixels]
    square[radius < 0.36], square[radius < 0.28] = 255, 0
    return picture


def picture(observation, size, colours):
    """An observation [N+1] as a picture, see `draw`."""
    *objects, agent = observation.tolist()
    return draw(agent, objects[:colours], objects[colours:], size)


class GridworldPinpad(gymnasium.Env):
    """One game with the Gymnasium interface (a batch of one `Game`).

    Observation: MultiBinary(G²·(O+W+1)), the paper's one-hot. Action: Discrete(4). Info: agent, colours, walls (cells), stage.
    `reset(options={"agent": …, "colours": …, "walls": …, "task": …})` sets up a layout; what is left out is drawn.
    """
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}
    options = ("agent", "colours", "walls", "task")  # of `reset`

    def __init__(self, size=7, colours=8, walls=4, max_steps=100, task="0-1-2-3-4-5-6-7-0-1-2-3", render_mode=None):
        check_sizes(size, colours, walls, max_steps)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is none of {self.metadata['render_modes']}")
        self.size, self.colours, self.walls, self.max_steps, self.render_mode = size, colours, walls, max_steps, render_mode
        self.task = parse_task(task, colours)
        self.observation_space = gymnasium.spaces.MultiBinary(size ** 2 * (colours + walls + 1))
        self.action_space = gymnasium.spaces.Discrete(4)
        self.game = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2 ** 62)))
        options = dict(options or {})
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known are {', '.join(self.options)}")
        task = parse_task(options["task"], self.colours) if "task" in options else self.task
        if {"agent", "colours", "walls"} & set(options):
            layouts = self._given_layout(options, generator)
        else:
            layouts = draw_layouts(1, self.size, self.colours, self.walls, generator)
        self.game = self._new_game(layouts, task, options, generator)
        return self._observation(), self._info()

    def _new_game(self, layouts, task, options, generator):
        return Game(layouts, self.size, task, self.max_steps)

    def _given_layout(self, options, generator):
        cells, counts = self.size ** 2, {"agent": 1, "colours": self.colours, "walls": self.walls}
        given = {name: np.atleast_1d(options[name]).tolist() for name in counts if name in options}
        taken = [cell for part in given.values() for cell in part]
        for name, part in given.items():
            if len(part) != counts[name]:
                raise ValueError(f"{name}: {len(part)} cells given, {counts[name]} needed")
        if not all(isinstance(cell, int) and 0 <= cell < cells for cell in taken):
            raise ValueError(f"cells are whole numbers from 0 to {cells - 1}")
        if len(set(taken)) != len(taken):
            raise ValueError("two things stand on the same cell")
        for _ in range(1000):  # fill in what was left out until the layout can be solved
            free = [cell for cell in torch.randperm(cells, generator=generator).tolist() if cell not in taken]
            whole = {name: given.get(name) or [free.pop() for _ in range(count)] for name, count in counts.items()}
            layouts = Layouts(*(torch.tensor(whole[name], dtype=torch.long).view(1, -1) for name in ("agent", "colours", "walls")))
            layouts = replace(layouts, agent=layouts.agent[:, 0])
            starts = torch.cat([layouts.agent[:, None], layouts.colours], 1)[:, None].expand(-1, self.colours, -1)
            if (distances(layouts, self.size).gather(2, starts) < FAR).all():
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
        info = self._info()
        if self.render_mode == "rgb_array":
            return draw(info["agent"], info["colours"], info["walls"], self.size)
        text = np.full(self.size ** 2, ".")
        text[info["colours"]] = list("0123456789"[:self.colours]) if self.colours <= 10 else "c"
        text[info["walls"]] = "#"
        text[info["agent"]] = "@"
        return "\n".join(" ".join(row) for row in text.reshape(self.size, self.size))

    def _observation(self):
        return one_hot_observation(self.game.observation(), self.size)[0].numpy().astype(np.int8)

    def _info(self):
        layouts = self.game.layouts
        return {"agent": self.game.agent.item(), "colours": layouts.colours[0].numpy().copy(), "walls": layouts.walls[0].numpy().copy(),
                "stage": self.game.stage.item()}


gymnasium.register("GridworldPinpad-v0", entry_point=GridworldPinpad)
