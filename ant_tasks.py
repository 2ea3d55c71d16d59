"""ant-pinpad (arXiv:2512.20605, App. A.2): gridworld-pinpad on a plane, walked by a MuJoCo ant with eight joint torques.

The rules are gridworld-pinpad's: visit coloured cells in a hidden order. The agent is the cell under the ant's torso. A game also ends,
without reward, when the torso enters a wall cell, leaves the arena, or its height leaves [0.2, 1.0] m.

    layouts = draw_layouts(n, size, colours, walls, generator)              where everything is, and each ant's pose
    game    = Game(layouts, size, tasks, max_steps)                         n ants; game.step(torques [n, 8]), game.observation()
    torques = gait(qpos, qvel, heading)                                     an analytic expert: walks into any direction of the world
    paths   = expert_paths(layouts, size, tasks, max_steps, generator, …)   it solves tasks: the pretraining data
    shards  = expert_data(folder, shards, settings, make)                   tens of thousands of its episodes, kept on disk
    env     = gymnasium.make("AntPinpad-v0")                                one ant with the Gymnasium interface
    python ant_tasks.py                                                     success of the expert, speed, a picture and an animation

The ant is gymnasium's ant.xml. Units: metres, seconds, radians; torques in −1 … 1 of the motors' range. Cells are 1 m wide; row 0 is the
northernmost (largest y), column 0 the westernmost (smallest x), the arena's centre is the origin.
Dims: n ants, O colours, W walls, N = O + W objects.
"""
import argparse
import functools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch

import gridworld

CELL = 1.0  # m
HEALTHY = (0.2, 1.0)  # torso height, m
# differs from the paper, or makes it precise: the ankles start bent, because the model's zero pose is beyond their limits and jumps off.
START_HEIGHT, START_JOINTS = 0.55, np.array([0, 0.6, 0, -0.6, 0, -0.6, 0, 0.6])  # m, rad
SUBSTEPS, CONTROL_STEP = 3, 0.05  # simulation steps in a control step, s
QPOS, QVEL = 15, 14  # position (3), quaternion (4), joints (8); velocity (3), angular velocity (3), joint velocities (8)
OBSERVATION, ACTION = 31, 8  # numbers of an observation without its 2·N for the objects, torques


mujoco.set_mju_user_warning(lambda message: None)  # a broken simulation is reported as the reason why its game ended


def load_model():
    """gymnasium's ant.xml with a faster integrator."""
    # differs from the paper: implicitfast with three steps of 1/60 s instead of (probably) the stock RK4, several times as fast.
    model = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
    model.opt.integrator, model.opt.timestep = mujoco.mjtIntegrator.mjINT_IMPLICITFAST, CONTROL_STEP / SUBSTEPS
    return model


# ------------------------------------------------------------------------------------------------------------- simulation

class Simulation:
    """n ants side by side. Each ant's whole simulation state is a row of `state`; a few MjData, one a thread, step all of them
    (`mj_step` releases the interpreter lock, so threads really run at the same time)."""
    SPEC = (mujoco.mjtState.mjSTATE_TIME | mujoco.mjtState.mjSTATE_QPOS | mujoco.mjtState.mjSTATE_QVEL
            | mujoco.mjtState.mjSTATE_WARMSTART | mujoco.mjtState.mjSTATE_CTRL)
    model, threads = load_model(), os.cpu_count()

    def __init__(self, n):
        self.state = np.zeros((n, mujoco.mj_stateSize(self.model, self.SPEC)))
        self.qpos, self.qvel = self.state[:, 1:1 + QPOS], self.state[:, 1 + QPOS:1 + QPOS + QVEL]  # views
        self.ctrl = self.state[:, -ACTION:]
        self.data = [mujoco.MjData(self.model) for _ in range(min(self.threads, n))]
        self.workers = ThreadPoolExecutor(len(self.data))

    def put(self, ants, qpos, qvel):
        """Starts the ants (any index) anew from qpos [m, 15], qvel [m, 14]."""
        self.state[ants] = 0
        self.qpos[ants], self.qvel[ants] = qpos, qvel

    def step(self, torques, ants):
        """Steps the ants with the indices `ants` [m] under torques [m, 8]. Returns [m] bool: did MuJoCo complain (NaN, divergence)?"""
        self.ctrl[ants] = torques
        broken = np.zeros(len(self.state), dtype=bool)

        def work(data, part):
            for i in part:
                mujoco.mj_setState(self.model, data, self.state[i], self.SPEC)
                mujoco.mj_step(self.model, data, SUBSTEPS)
                mujoco.mj_getState(self.model, data, self.state[i], self.SPEC)
                if data.warning.number.any():
                    broken[i] = True
                    mujoco.mj_resetData(self.model, data)

        many = len(self.data)
        at_once = self.workers.map if many > 1 else map
        list(at_once(work, self.data, [ants[k::many] for k in range(many)]))
        return broken[ants]


def rotation(quaternion):
    """Body → world rotation matrices of unit quaternions, numpy or torch: [..., 4] → [..., 3, 3]"""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    stack = torch.stack if isinstance(quaternion, torch.Tensor) else np.stack
    return stack([stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
                  stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
                  stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)], -2)


# ---------------------------------------------------------------------------------------------------------- cells, layouts

def centres(cells, size):
    """World coordinates of the centres of cells: [...] → [..., 2] float64 m"""
    cells = np.asarray(cells)
    return np.stack([cells % size - (size - 1) / 2, (size - 1) / 2 - cells // size], -1) * CELL


def cells_at(xy, size):
    """xy [..., 2] → (cell [...], inside the arena [...] bool). Outside, the nearest cell."""
    column, row = np.floor(xy[..., 0] / CELL + size / 2), np.floor(size / 2 - xy[..., 1] / CELL)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    return np.nan_to_num(row).clip(0, size - 1).astype(np.int64) * size + np.nan_to_num(column).clip(0, size - 1).astype(np.int64), inside


@dataclass
class Layouts(gridworld.Layouts):
    """A grid layout and the ant's pose in it: qpos [B, 15], qvel [B, 14] float64."""
    qpos: torch.Tensor
    qvel: torch.Tensor

    def __getitem__(self, index):
        return Layouts(self.agent[index], self.colours[index], self.walls[index], self.qpos[index], self.qvel[index])


def on_cpu(generator):
    """The generator itself, or one on the CPU that is seeded by a draw from it."""
    if generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2 ** 62, (), generator=generator, device=generator.device)))


def with_pose(layouts, size, generator):
    """Puts an ant anywhere into each layout's agent cell, at any yaw, joints within ±0.1 of START_JOINTS and velocities within ±0.1 (App. A.2)."""
    n = len(layouts)
    uniform = lambda *shape: torch.rand(n, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    qpos, qvel, yaw = torch.zeros(n, QPOS, dtype=torch.float64), 0.1 * uniform(QVEL), math.pi * uniform()
    qpos[:, :2] = torch.from_numpy(centres(layouts.agent, size)) + uniform(2) * CELL / 2
    qpos[:, 2] = START_HEIGHT
    qpos[:, 3], qpos[:, 6] = (yaw / 2).cos(), (yaw / 2).sin()
    qpos[:, 7:] = torch.from_numpy(START_JOINTS) + 0.1 * uniform(8)
    return Layouts(layouts.agent, layouts.colours, layouts.walls, qpos, qvel)


def draw_layouts(n, size, colours, walls, generator):
    """n random solvable layouts, each with the pose of its ant, on the CPU, where MuJoCo computes."""
    generator = on_cpu(generator)
    return with_pose(gridworld.draw_layouts(n, size, colours, walls, generator), size, generator)


# ------------------------------------------------------------------------------------------------------------------ rules

def symlog(x):
    """sign(x) · ln(1 + |x|): squeezes velocities into a small range."""
    return np.sign(x) * np.log1p(np.abs(x))


class Game(gridworld.Game):
    """B games of gridworld-pinpad walked by ants. State as in `gridworld.Game`, plus the simulation and `failure` [B], an index
    into FAILURES that says what else ended a game."""
    FAILURES = ["", "wall", "outside", "fallen", "simulation"]

    def __init__(self, layouts, size, tasks, max_steps):
        self.size = size
        self.objects = centres(layouts.objects, size)  # [B, N, 2]
        self.is_wall = np.zeros((len(layouts), size * size), dtype=bool)
        np.put_along_axis(self.is_wall, layouts.walls.numpy(), True, 1)
        self.simulation, self.failure = Simulation(len(layouts)), torch.zeros_like(layouts.agent)
        super().__init__(layouts, size, tasks, max_steps)

    def reset(self, games=None):
        super().reset(games)
        again = torch.ones_like(self.done) if games is None else games
        self.failure = self.failure.masked_fill(again, 0)
        self.simulation.put(again.numpy(), self.layouts.qpos[again].numpy(), self.layouts.qvel[again].numpy())

    def step(self, torques):
        """torques [B, 8] in −1 … 1, tensor or array → reward, terminated, truncated, each [B]. Finished games stay as they are."""
        running = (~self.done).numpy().nonzero()[0]
        torques = np.asarray(torques, dtype=np.float64)[running]
        broken = self.simulation.step(torques, running)
        qpos = self.simulation.qpos[running]
        broken |= ~np.isfinite(qpos).all(1)
        cell, inside = cells_at(qpos[:, :2], self.size)
        standing = (qpos[:, 2] >= HEALTHY[0]) & (qpos[:, 2] <= HEALTHY[1])
        failure = np.select([broken, ~inside, ~standing, self.is_wall[running, cell]], [4, 2, 3, 1])
        self.failure[running] = torch.from_numpy(failure)
        to = self.agent.clone()
        to[running] = torch.from_numpy(cell)
        return self.enter(to, self.failure > 0)

    def reason(self, game):
        """Why this game ended: "solved", "wrong colour", "time", one of FAILURES, or "" while it runs."""
        if self.failure[game]:
            return self.FAILURES[self.failure[game]]
        if self.stage[game] == self.goal:
            return "solved"
        return "" if not self.done[game] else "wrong colour" if self.terminated[game] else "time"

    def observation(self, games=slice(None)):
        """What the ant sees (App. A.2), float32 [B, 31 + 2N]: height, quaternion 4, joints 8, symlog velocities 14, position ÷ half
        the arena 2, position within its cell ÷ half a cell 2, centres of the objects relative to the torso ÷ the arena 2N."""
        qpos, qvel = self.simulation.qpos[games], self.simulation.qvel[games]
        return observe(qpos, qvel, self.objects[games], self.size)


def observe(qpos, qvel, objects, size):
    """qpos [..., 15], qvel [..., 14], objects' centres [..., N, 2] → observation [..., 31 + 2N] float32"""
    xy = qpos[..., :2]
    local = xy - centres(cells_at(xy, size)[0], size)
    relative = (objects - xy[..., None, :]) / (size * CELL)
    parts = [qpos[..., 2:], symlog(qvel), xy / (size * CELL / 2), local / (CELL / 2), relative.reshape(*relative.shape[:-2], -1)]
    return torch.from_numpy(np.concatenate(parts, -1).astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------- expert

# A tuned gait: amplitudes (rad), gains and phases of `gait`.
A, L, R, E0, PUSH, B = 0.3543833218109272, 0.4346279606689153, 0.3936868640818661, 0.9956662862012898, -0.022390528330828607, 0.15692298191644066
KPH, KDH, KPA, KDA = 0.8679102000250551, 0.14148226524349455, 1.4343309358236014, 0.14008687066079573  # of the joints' controllers
LEAD, HLAG, RLAG, WM = 1.5921951108318073, 1.8195569824356275, 0.5019263060870063, 20.833399417455738  # of the phases
KTILT, KRATE, KYAW = -0.003976309398854643, -0.03140013251866837, 0.051210597376100155  # of the torso's tilt and rotation
KVH, KVR, KC, KZ, KVZ = -0.06971521982722066, -0.12835208756254116, 0.31024166258475133, -0.06800820723360762, 0.01683455319105399  # its velocity, height
C4 = -0.014611636629120493
AZIMUTH = np.radians([45, 135, 225, 315])  # of legs 1 … 4
DIAGONAL, ANKLE = np.array([1, -1, 1, -1]), np.array([1, -1, -1, 1])  # sign of each diagonal pair; of an ankle's bending
ACTUATORS = [6, 7, 0, 1, 2, 3, 4, 5]  # the joint that each torque drives


def gait(qpos, qvel, heading):
    """Torques that walk into the world direction `heading`, whatever the yaw: qpos [n, 15], qvel [n, 14], heading [n] → [n, 8].

    A trot without a clock: its phase is read from the ankles, so it has no memory.
    """
    # differs from the paper: an analytic expert instead of one trained by PPO, because it is free and succeeds more often.
    matrix = rotation(qpos[:, 3:7])
    forward, spin = np.einsum("nij,ni->nj", matrix, qvel[:, :3]), qvel[:, 3:6]  # velocities in the body's frame
    up = matrix[:, 2]
    hip, ankle = qpos[:, 7::2], ANKLE * qpos[:, 8::2]
    hip_rate, ankle_rate = qvel[:, 6::2], ANKLE * qvel[:, 7::2]

    course = heading - np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    course = course - C4 * np.sin(4 * course)
    swing, swing_rate = (ankle * DIAGONAL).mean(1), (ankle_rate * DIAGONAL).mean(1)
    phase = np.arctan2(-swing, -swing_rate / WM)[:, None] + LEAD + np.where(DIAGONAL > 0, 0, np.pi)  # of each leg [n, 4]
    aim = np.stack([np.cos(course), np.sin(course)], -1)
    aim = aim + KC * (1.5 * aim - forward[:, :2])
    aim = aim * np.minimum(1, 1.6 / np.linalg.norm(aim, axis=1))[:, None]

    cos, sin = np.cos(AZIMUTH), np.sin(AZIMUTH)
    across = lambda x: -x[:, :1] * sin + x[:, 1:2] * cos  # of each leg [n, 4]
    along = lambda x: x[:, :1] * cos + x[:, 1:2] * sin
    rate = spin[:, :1] * sin - spin[:, 1:2] * cos
    hip_goal = -A * across(aim) * np.cos(phase + HLAG) - KYAW * spin[:, 2:] + KVH * across(forward)
    lift = np.sin(phase) + B
    ankle_goal = (E0 - L * lift.clip(0) + PUSH * (-lift).clip(0) + R * along(aim) * np.cos(phase + RLAG) - KTILT * along(up)
                  - KRATE * rate - KVR * along(forward) + (KZ * (qpos[:, 2] - 0.6) + KVZ * qvel[:, 2])[:, None])
    torque = np.empty((len(qpos), ACTION))
    torque[:, 0::2] = KPH * (hip_goal.clip(-0.6, 0.6) - hip) - KDH * hip_rate
    torque[:, 1::2] = ANKLE * (KPA * (ankle_goal.clip(0.45, 1.3) - ankle) - KDA * ankle_rate)
    return torque[:, ACTUATORS].clip(-1, 1)


class Headings:
    """The direction to walk to reach a colour: towards the centre of the next cell of a shortest path, the nearest if there are several."""

    def __init__(self, layouts, size):
        self.size = size
        self.moves = gridworld.shortest_moves(layouts, size).numpy()  # [B, O, G², 4]
        self.next = centres(gridworld.neighbours(size), size)  # [G², 4, 2]

    def __call__(self, xy, target, rows):
        """xy [n, 2], target colour [n], rows [n] of the layouts → [n] rad"""
        cell, _ = cells_at(xy, self.size)
        offset = self.next[cell] - xy[:, None]  # [n, 4, 2]
        distance = np.where(self.moves[rows, target, cell], np.linalg.norm(offset, axis=-1), np.inf)
        best = offset[np.arange(len(xy)), distance.argmin(1)]
        return np.arctan2(best[:, 1], best[:, 0])


BURST = 8  # steps


def expert_paths(layouts, size, tasks, max_steps, generator, sigma=0.0, bursts=0.0):
    """The expert solves tasks [B, K] in B layouts, with Gaussian noise of standard deviation sigma on its torques. Some episodes fail.

    With probability `bursts` a step it is made to walk into a random direction for the next 8 steps. The actions that are
    returned are then still those that it would have taken, so they show how to come back.
    """
    # differs from the paper: bursts, because without them its motion tells so well what the expert does next that nothing else is learned.
    game, headings, generator = Game(layouts, size, tasks, max_steps), Headings(layouts, size), on_cpu(generator)
    simulation, target_of = game.simulation, game.tasks.view(len(layouts), -1).numpy()
    action, observation = torch.zeros(len(layouts), ACTION), game.observation()
    burst_left, burst_heading = np.zeros(len(layouts), dtype=int), np.zeros(len(layouts))
    actions, observations, stages = [], [observation], []
    while not game.done.all():
        rows = (~game.done).numpy().nonzero()[0]
        qpos, qvel = simulation.qpos[rows], simulation.qvel[rows]
        torques = gait(qpos, qvel, headings(qpos[:, :2], target_of[rows, game.stage[rows]], rows))
        noise = torch.randn(len(rows), ACTION, generator=generator, dtype=torch.float64).numpy()
        action, observation = action.clone(), observation.clone()
        action[rows] = torch.from_numpy((torques + sigma * noise).clip(-1, 1)).float()
        stages.append(game.stage)
        actions.append(action)
        done = action.numpy().copy()
        if bursts > 0:
            chance, direction = torch.rand(2, len(rows), generator=generator, dtype=torch.float64).numpy()
            starts = (chance < bursts) & (burst_left[rows] == 0)
            burst_left[rows[starts]], burst_heading[rows[starts]] = BURST, 2 * np.pi * direction[starts]
            pushed = burst_left[rows] > 0
            torques = gait(qpos[pushed], qvel[pushed], burst_heading[rows[pushed]])
            done[rows[pushed]] = (torques + sigma * noise[pushed]).clip(-1, 1)
            burst_left[rows[pushed]] -= 1
        game.step(done)
        observation[rows] = game.observation(rows)
        observations.append(observation)
    return gridworld.Paths(torch.stack(observations, 1), torch.stack(actions, 1), torch.stack(stages, 1), game.steps, game.stage == game.goal)


# --------------------------------------------------------------------------------------------------------------- symmetry

LEGS = [2, 3, 0, 1, 6, 7, 4, 5]  # joints of the leg that a reflection x → −x puts in a joint's place


def reflected(observation, action):
    """The world seen in a mirror, x → −x: left legs become right legs, and turns change their sense. [..., 31 + 2N], [..., 8]"""
    joints = lambda x: -x[..., LEGS]
    signs = lambda *s: torch.tensor(s, dtype=observation.dtype, device=observation.device)
    flip = signs(-1, 1)
    parts = [observation[..., :1], observation[..., 1:5] * signs(1, 1, -1, -1), joints(observation[..., 5:13]),
             observation[..., 13:19] * signs(-1, 1, 1, 1, -1, -1), joints(observation[..., 19:27]),
             observation[..., 27:] * flip.repeat((observation.shape[-1] - 27) // 2)]
    return torch.cat(parts, -1), joints(action[..., np.argsort(ACTUATORS)])[..., ACTUATORS]


def turned(observation, action):
    """The world turned by a quarter, x → y, y → −x. The ant itself, its joints and torques, is the same. [..., 31 + 2N], [..., 8]"""
    quarter = lambda v: torch.stack([-v[..., 1::2], v[..., 0::2]], -1).flatten(-2)  # (x, y) → (−y, x) for each pair
    w, x, y, z = (observation[..., i] for i in range(1, 5))
    quaternion = torch.stack([w - z, x - y, y + x, z + w], -1) / math.sqrt(2)
    parts = [observation[..., :1], quaternion, observation[..., 5:13], quarter(observation[..., 13:15]), observation[..., 15:27],
             quarter(observation[..., 27:])]
    return torch.cat(parts, -1), action


def renumbered(observation, action):
    """The same world and ant with its legs counted from the next one on, so that the body's frame is turned by a quarter. [..., 31 + 2N], [..., 8]"""
    sign = torch.tensor(np.stack([np.ones(4), ANKLE * np.roll(ANKLE, -1)], 1).ravel(), dtype=observation.dtype, device=observation.device)
    joints = lambda x: sign * x.roll(-2, -1)  # hip and ankle of each leg
    w, x, y, z = (observation[..., i] for i in range(1, 5))
    quaternion = torch.stack([w - z, x + y, y - x, z + w], -1) / math.sqrt(2)
    spin = torch.stack([observation[..., 17], -observation[..., 16], observation[..., 18]], -1)
    parts = [observation[..., :1], quaternion, joints(observation[..., 5:13]), observation[..., 13:16], spin, joints(observation[..., 19:27]),
             observation[..., 27:]]
    return torch.cat(parts, -1), joints(action[..., np.argsort(ACTUATORS)])[..., ACTUATORS]


SYMMETRIES = 32


@functools.cache
def symmetries(objects):
    """The 8 rotations and reflections of the arena, each with the ant's legs counted from any of the four, as linear maps of
    observations [32, 31 + 2N, 31 + 2N] and torques [32, 8, 8]: image = map @ original. The simulation itself has these symmetries (a test checks that)."""
    maps = []
    for reflect in (False, True):
        world = torch.eye(OBSERVATION + 2 * objects), torch.eye(ACTION)
        if reflect:
            world = reflected(*world)
        for _ in range(4):
            image = world
            for _ in range(4):
                maps.append(image)
                image = renumbered(*image)
            world = turned(*world)
    return tuple(torch.stack(each).transpose(1, 2) for each in zip(*maps))


def mirror(observation, action, k, size):
    """Each episode in the image k [B] in 0 … 31 of its world: observation [B, T, D], action [B, T, 8] → the same shapes"""
    observations, actions = (x.to(observation.device) for x in symmetries((observation.shape[-1] - OBSERVATION) // 2))
    return observation @ observations[k].transpose(1, 2), action @ actions[k].transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ data on disk

SHARD = 2000  # episodes in a file


def expert_data(folder, shards, settings, make):
    """Expert episodes kept in `folder`, a file for each of `shards` sets of them; those that are missing are made first.

    make(i) → {name: array} of shard i. A list with one such dictionary a shard is returned. Files of other `settings` (a
    dictionary) or damaged ones raise ValueError.
    """
    wanted, parts, started = json.dumps(settings, sort_keys=True), [], time.time()
    for i in range(shards):
        path = Path(folder) / f"{i:03}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.savez(file, settings=wanted, **make(i))
            os.replace(temporary, path)
            print(f"data: {path} written, {i + 1} of {shards}, {time.time() - started:.0f} s", flush=True)
        try:
            with np.load(path, allow_pickle=False) as file:
                found, part = str(file["settings"]), {name: file[name] for name in file.files if name != "settings"}
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            raise ValueError(f"{path} cannot be read ({type(error).__name__}); delete it to make it again") from None
        if found != wanted:
            theirs = json.loads(found)
            name = next(name for name in sorted({*theirs, *settings}) if theirs.get(name) != settings.get(name))
            raise ValueError(f"{path} was made with {name}={theirs.get(name)}, not {settings.get(name)}; delete it or choose another folder")
        parts.append(part)
    return parts


# ----------------------------------------------------------------------------------------------------------- model inputs

FEATURES = 40  # numbers of `body_features`


def places(observation, size):
    """Cells of the objects and of the agent, read off observations: [..., 31 + 2N] → [..., N + 1]"""
    half = size / 2
    own = (observation[..., 27:29] * half).div(CELL).add(half).floor().clamp(0, size - 1)  # (column, row from below)
    offset = (observation[..., 31:].unflatten(-1, (-1, 2)) * size + observation[..., None, 29:31] / 2).round()  # in cells
    column_row = torch.cat([own[..., None, :] + offset, own[..., None, :]], -2).clamp(0, size - 1)  # [..., N+1, 2]
    return ((size - 1 - column_row[..., 1]) * size + column_row[..., 0]).long()


def body_features(observation, size):
    """The ant's body in its own frame: height 1, rotation 9, joints 8, symlog velocities 14, and the directions from the torso to
    the centres of the four neighbouring cells 8: [..., 31 + 2N] → [..., 40]"""
    matrix = rotation(observation[..., 1:5])  # [..., 3, 3]
    world = observation[..., 13:16].sign() * observation[..., 13:16].abs().expm1()
    forward = (matrix.transpose(-1, -2) @ world[..., None])[..., 0]
    neighbours = torch.tensor([[0., 1], [0, -1], [-1, 0], [1, 0]], device=observation.device) - observation[..., None, 29:31] / 2  # up, down, left, right
    yaw = torch.nn.functional.normalize(matrix[..., :2, 0], dim=-1)  # (cos, sin)
    across = torch.stack([-yaw[..., 1], yaw[..., 0]], -1)
    seen = torch.nn.functional.normalize(torch.stack([(neighbours * yaw[..., None, :]).sum(-1), (neighbours * across[..., None, :]).sum(-1)], -1), dim=-1)
    return torch.cat([observation[..., :1], matrix.flatten(-2), observation[..., 5:13], forward.sign() * forward.abs().log1p(),
                      observation[..., 16:27], seen.flatten(-2)], -1)


# ---------------------------------------------------------------------------------------------------------------- drawing

def picture(observation, size, colours, pixels=64):
    """The arena from above, drawn from one observation [31 + 2N] alone: RGB [size·pixels, size·pixels, 3] uint8, y upwards. The first
    `colours` objects are coloured cells, the others walls; the ant is black with a white rim. Works without a screen or OpenGL."""
    observation, arena = np.asarray(observation, dtype=np.float64), size * CELL
    xy = observation[27:29] * arena / 2
    objects = cells_at(xy + observation[31:].reshape(-1, 2) * arena, size)[0]
    image = gridworld.draw_cells(objects[:colours], objects[colours:], size, pixels)

    model = Simulation.model
    data = mujoco.MjData(model)
    data.qpos[:] = np.concatenate([xy, observation[:QPOS - 2]])
    mujoco.mj_kinematics(model, data)
    x = (np.arange(size * pixels) + 0.5) / pixels * CELL - arena / 2
    points = np.stack(np.meshgrid(x, -x), -1)  # [size·pixels, size·pixels, 2] m
    outside = np.inf  # distance of each point from the ant, m; negative inside
    for geom in np.flatnonzero(model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE):
        # Seen from above a capsule is a line with round ends; the torso, a sphere, is one without length.
        radius, half = model.geom_size[geom, :2]
        axis = 2 * half * data.geom_xmat[geom].reshape(3, 3)[:2, 2]
        offset = points - (data.geom_xpos[geom, :2] - axis / 2)
        share = (offset @ axis / max(axis @ axis, 1e-9)).clip(0, 1)[..., None]  # of the nearest point along the line
        outside = np.minimum(outside, np.linalg.norm(offset - share * axis, axis=-1) - radius)
    for rim, shade in ((0.03, 255), (0, 0)):  # m
        cover = ((rim - outside) * pixels / CELL + 0.5).clip(0, 1)[..., None]  # soft over one pixel
        image = image + cover * (shade - image)
    return image.round().astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- Gymnasium

def vector(values, count):
    """values as float64 [count], or None if they are something else or not finite."""
    try:
        values = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


class AntPinpad(gridworld.GridworldPinpad):
    """One ant with the Gymnasium interface (a batch of one `Game`).

    Observation: Box [31 + 2N] float32, see `Game.observation`. Action: Box [8], torques in −1 … 1. Info: stage, cell (under the
    torso), colours, walls (cells), reason (why the game ended, "" before). `reset(options={"agent": …, "colours": …, "walls": …,
    "task": …, "qpos": …, "qvel": …})` sets up a layout and a pose; what is left out is drawn. The agent's cell follows from qpos.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_STEP)}
    options = (*gridworld.GridworldPinpad.options, "qpos", "qvel")

    def __init__(self, size=4, colours=4, walls=1, max_steps=500, task="0-1-2-3", render_mode=None):
        super().__init__(size, colours, walls, max_steps, task, render_mode)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION + 2 * (colours + walls),), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)

    def reset(self, *, seed=None, options=None):
        options = dict(options or {})
        for name, count in (("qpos", QPOS), ("qvel", QVEL)):
            if name in options:
                options[name] = vector(options[name], count)
                if options[name] is None:
                    raise ValueError(f"{name} is not {count} finite numbers")
        if "qpos" in options:
            cell, inside = cells_at(options["qpos"][:2], self.size)
            if not inside or abs(np.linalg.norm(options["qpos"][3:7]) - 1) > 1e-4:
                raise ValueError("qpos needs a position inside the arena and a quaternion (its numbers 3 to 6) of length 1")
            if "agent" in options:
                raise ValueError("agent and qpos are both given; the agent's cell follows from qpos")
            options["agent"] = int(cell)
        return super().reset(seed=seed, options=options)

    def _new_game(self, layouts, task, options, generator):
        layouts = with_pose(layouts, self.size, generator)
        pose = {name: torch.from_numpy(options[name])[None] for name in ("qpos", "qvel") if name in options}
        return Game(replace(layouts, **pose), self.size, task, self.max_steps)

    def _batched(self, action):
        torques = vector(action, ACTION)
        if torques is None or abs(torques).max() > 1:
            raise ValueError(f"action {action!r} is not {ACTION} torques in −1 … 1")
        return torques[None]

    def render(self):
        if self.render_mode is None or self.game is None:
            return None
        return picture(self._observation(), self.size, self.colours)

    def _observation(self):
        return self.game.observation()[0].numpy()

    def _info(self):
        info = super()._info()
        return {"cell": info.pop("agent"), **info, "reason": self.game.reason(0)}


gymnasium.register("AntPinpad-v0", entry_point=AntPinpad)


# ------------------------------------------------------------------------------------------------------------------- demo

def demo(folder, n, seed):
    """Prints the success of n expert episodes of each kind and the speed of the simulation; writes one episode as ant.png and ant.gif."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # comes with matplotlib

    size, colours, walls, max_steps = 4, 4, 1, 500
    withheld = torch.tensor([[0, 1, 2, 3]])

    def episodes(tasks, sigma, n, max_steps, seed):
        generator = torch.Generator().manual_seed(seed)
        layouts, own = draw_layouts(n, size, colours, walls, generator), tasks[torch.arange(n) % len(tasks)]
        return layouts, own, expert_paths(layouts, size, own, max_steps, generator, sigma)

    print(f"{n} expert episodes each{'success':>24}{'mean steps':>14}")
    for name, tasks in (("16 pretraining tasks", gridworld.pretraining_tasks("singles")[0]), ("0-1-2-3", withheld)):
        for sigma in (0, 0.1):
            paths = episodes(tasks, sigma, n, max_steps, seed)[2]
            print(f"{f'{name}, σ = {sigma}':32}{paths.solved.float().mean():15.3f}{paths.length.float().mean():14.1f}", flush=True)

    ants, steps = 256, 50
    layouts, own, paths = episodes(withheld, 0, ants, steps, seed)
    game, start = Game(layouts, size, own, steps), time.perf_counter()
    for t in range(paths.action.shape[1]):
        game.step(paths.action[:, t])
        game.observation()
    rate = paths.length.sum().item() / (time.perf_counter() - start)
    print(f"simulation with observations, {ants} ants, {Simulation.threads} threads: {rate:,.0f} control steps/s")

    layouts, _, paths = episodes(withheld, 0, 32, max_steps, seed + 1)
    chosen = int(paths.solved.int().argmax())  # the first that is solved
    length, stage, seen = int(paths.length[chosen]), paths.stage[chosen], paths.observation[chosen]
    edge = size * CELL / 2
    xy = seen[:, 27:29].numpy() * edge
    figure, axis = plt.subplots(figsize=(4.4, 4.6))
    axis.imshow(picture(seen[0], size, colours, 128), extent=(-edge, edge, -edge, edge))
    for k, colour in enumerate(withheld[0].tolist()):
        part = (stage[:length] == k).nonzero()[:, 0]
        line = xy[part[0]:part[-1] + 2].T
        axis.plot(*line, color="white", linewidth=5)
        axis.plot(*line, color=gridworld.PALETTE[colour] / 255, linewidth=3)
        axis.text(*centres(layouts.colours[chosen, colour], size), colour, color="white", fontsize=18, ha="center", va="center")
    axis.set(xticks=[], yticks=[], title=f"0-1-2-3 solved in {length} steps, {length * CONTROL_STEP:.1f} s")
    frames = []
    for t in [*range(0, length, 4), length]:
        frame = np.empty((size * 64 + 16,) * 2 + (3,), dtype=np.uint8)
        frame[:] = gridworld.PALETTE[withheld[0, stage[min(t, length - 1)]]]  # the frame shows the colour pursued
        frame[8:-8, 8:-8] = picture(seen[t], size, colours)
        frames.append(Image.fromarray(frame))
    figure.tight_layout()
    figure.savefig(folder / "ant.png", dpi=110)
    plt.close(figure)
    frames[0].save(folder / "ant.gif", save_all=True, append_images=frames[1:], duration=[100] * (len(frames) - 1) + [1500], loop=0)
    print(f"written: {folder / 'ant.png'}, {folder / 'ant.gif'} (the frame's colour is the one pursued; twice the real speed)")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"ant_tasks.py: {message}\n")


def main(arguments=None):
    parser = Parser(prog="ant_tasks.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
                    description="ant-pinpad: success of the expert, speed of the simulation, a picture and an animation.")
    parser.add_argument("--episodes", type=int, default=1000, help="expert episodes of each kind, 1 … 5000")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--out", type=Path, default=Path("assets"), metavar="FOLDER", help="where ant.png and ant.gif go")
    options = parser.parse_args(arguments)
    if not 1 <= options.episodes <= 5000:
        parser.error(f"--episodes {options.episodes} is outside 1 … 5000")
    if not 0 <= options.seed < 2 ** 40:
        parser.error(f"--seed {options.seed} is outside 0 … 2^40 − 1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    demo(options.out, options.episodes, options.seed)


if __name__ == "__main__":
    main()
