"""ant-pinpad (arXiv:2512.20605, App. A.2): gridworld-pinpad on a plane, walked by a MuJoCo ant with eight joint torques.

The agent is the cell under the ant's torso. A game also ends, without reward, when the torso enters a wall cell, leaves
the arena, or its height leaves [0.2, 1.0] m. Beside gridworld's names, with the same meaning, there are

    torques = gait(qpos, qvel, heading)           an analytic expert: walks into any direction
    env     = gymnasium.make("AntPinpad-v0")      one ant with the Gymnasium interface
    python ant_tasks.py                           success and speed of the expert, a film

Units: metres, seconds, radians; torques in −1 … 1 of the motors' range. Cells are 1 m wide; row 0 is the northernmost
(largest y), column 0 the westernmost (smallest x), the arena's centre is the origin.
Dims: n ants, B games, T time, G arena size, O colours, N = O + W objects (colours, then walls), D = 31 + 2N.
"""
import argparse
import functools
import json
import math
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mujoco.rollout import Rollout

import gridworld

HEALTHY = (0.2, 1.0)  # torso height, m
# differs from the paper, or makes it precise: the ankles start bent, because the model's zero pose jumps off.
START_HEIGHT, START_JOINTS = 0.55, np.array([0, 0.6, 0, -0.6, 0, -0.6, 0, 0.6])  # m, rad
SUBSTEPS, CONTROL_STEP = 3, 0.05  # simulation steps in a control step, s
QPOS, QVEL = 15, 14  # position 3, quaternion 4, joints 8; velocity 3, angular velocity 3, joint velocities 8
OBSERVATION, ACTION = 31, 8  # numbers of an observation without its 2N for the objects, torques
FEATURES, SHARD = 40, 2000  # numbers of `body_features`; episodes in a file

# differs from the paper: implicitfast with three steps of 1/60 s instead of (probably) the stock RK4: faster.
MODEL = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
MODEL.opt.integrator, MODEL.opt.timestep = mujoco.mjtIntegrator.mjINT_IMPLICITFAST, CONTROL_STEP / SUBSTEPS
mujoco.set_mju_user_warning(lambda message: None)  # a broken simulation is reported as the reason why its game ended

# ------------------------------------------------------------------------------------------------- simulation

class Simulation:
    """n ants side by side. `state` [n, 30] is all that their future depends on: time, qpos 15, qvel 14.
    All share MuJoCo's `Rollout`, a pool of threads; a copy or pickle of a simulation is just its state."""
    model, threads, lock = MODEL, os.cpu_count(), threading.Lock()
    # Properties, because a stored view would not follow the state into a copy.
    qpos = property(lambda self: self.state[:, 1:1 + QPOS])
    qvel = property(lambda self: self.state[:, 1 + QPOS:])

    def __init__(self, n):
        self.state = np.zeros((n, 1 + QPOS + QVEL))

    @staticmethod
    @functools.cache
    def pool(threads, process):
        """The pool and an MjData for each thread. A forked process needs its own: threads are not forked."""
        return Rollout(nthread=threads), [mujoco.MjData(Simulation.model) for _ in range(threads)]

    def put(self, ants, qpos, qvel):
        """Starts the ants (any index) anew from qpos [m, 15], qvel [m, 14]."""
        self.state[ants] = 0
        self.qpos[ants], self.qvel[ants] = qpos, qvel

    def step(self, torques, ants):
        """One control step of the ants with indices `ants` [m] under torques [m, 8]. Returns [m] bool: did the simulation
        break down (NaN, divergence)? Such an ant stays as it was."""
        if len(ants) == 0:
            return np.zeros(0, dtype=bool)  # MuJoCo crashes on an empty batch
        before = self.state[ants]
        with self.lock:  # two Python threads in the pool at once would wait for each other forever
            pool, data = self.pool(self.threads, os.getpid())
            states, _ = pool.rollout(self.model, data, before, torques[:, None], nstep=SUBSTEPS)  # [m, 3, 30]
        after = states[:, -1]
        # After a warning MuJoCo leaves out the remaining substeps or starts again at time 0: the clock tells.
        healthy = (after[:, 0] - before[:, 0] > 0.9 * CONTROL_STEP) & np.isfinite(after).all(1)
        self.state[ants[healthy]] = after[healthy]
        return ~healthy


def rotation(quaternion):
    """Body → world rotation matrices of unit quaternions, numpy or torch: [..., 4] → [..., 3, 3]"""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    stack = torch.stack if isinstance(quaternion, torch.Tensor) else np.stack
    return stack([stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
                  stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
                  stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)], -2)


def centres(cells, size):
    """World coordinates of the centres of cells: [...] → [..., 2] float64 m"""
    cells = np.asarray(cells)
    return np.stack([cells % size - (size - 1) / 2, (size - 1) / 2 - cells // size], -1)


def cells_at(xy, size):
    """xy [..., 2] → (cell [...], inside the arena [...] bool). Outside, the nearest cell."""
    column, row = np.floor(xy[..., 0] + size / 2), np.floor(size / 2 - xy[..., 1])
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    column, row = (np.nan_to_num(x).clip(0, size - 1).astype(np.int64) for x in (column, row))
    return row * size + column, inside


@dataclass
class Layouts(gridworld.Layouts):
    """A grid layout and the ant's pose in it: qpos [B, 15], qvel [B, 14] float64."""
    qpos: torch.Tensor
    qvel: torch.Tensor


def on_cpu(generator):
    """The generator itself, or one on the CPU that is seeded by a draw from it."""
    if generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2 ** 62, (), generator=generator, device=generator.device)))


def with_pose(layouts, size, generator):
    """An ant anywhere in each agent's cell, at any yaw, joints (around START_JOINTS) and velocities in ±0.1 (App. A.2)."""
    n = len(layouts)
    uniform = lambda *shape: torch.rand(n, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    qpos, qvel, yaw = torch.zeros(n, QPOS, dtype=torch.float64), 0.1 * uniform(QVEL), math.pi * uniform()
    qpos[:, :2] = torch.from_numpy(centres(layouts.agent, size)) + uniform(2) / 2
    qpos[:, 2] = START_HEIGHT
    qpos[:, 3], qpos[:, 6] = (yaw / 2).cos(), (yaw / 2).sin()
    qpos[:, 7:] = torch.from_numpy(START_JOINTS) + 0.1 * uniform(8)
    return Layouts(*vars(layouts).values(), qpos, qvel)


def draw_layouts(n, size, colours, walls, generator):
    """n random solvable layouts, each with the pose of its ant, on the CPU, where MuJoCo computes."""
    generator = on_cpu(generator)
    return with_pose(gridworld.draw_layouts(n, size, colours, walls, generator), size, generator)

# ------------------------------------------------------------------------------------------------------ rules

class Game(gridworld.Game):
    """B games of gridworld-pinpad walked by ants. State as in `gridworld.Game`, plus the simulation and `failure` [B],
    an index into FAILURES that says what else ended a game."""
    FAILURES = ["", "wall", "outside", "fallen", "simulation"]

    def __init__(self, layouts, size, tasks, max_steps):
        self.size, self.objects = size, centres(layouts.objects, size)  # [B, N, 2]
        self.simulation, self.failure = Simulation(len(layouts)), torch.zeros_like(layouts.agent)
        super().__init__(layouts, size, tasks, max_steps)

    def reset(self, games=None):
        super().reset(games)
        again = torch.ones_like(self.done) if games is None else games
        self.failure = self.failure.masked_fill(again, 0)
        self.simulation.put(again.numpy(), self.layouts.qpos[again].numpy(), self.layouts.qvel[again].numpy())

    def step(self, torques):
        """torques [B, 8] in −1 … 1 → reward, terminated, truncated, each [B]. Finished games stay as they are."""
        running = (~self.done).numpy().nonzero()[0]
        torques = np.asarray(torques, dtype=np.float64)[running]
        broken = self.simulation.step(torques, running)
        qpos = self.simulation.qpos[running]
        cell, inside = cells_at(qpos[:, :2], self.size)
        standing = (qpos[:, 2] >= HEALTHY[0]) & (qpos[:, 2] <= HEALTHY[1])
        failures = [broken, ~inside, ~standing, self.is_wall.numpy()[running, cell]]
        self.failure[running] = torch.from_numpy(np.select(failures, [4, 2, 3, 1]))
        to = self.agent.clone()
        to[running] = torch.from_numpy(cell)
        return self.enter(to, self.failure > 0)

    def reason(self, game):
        """Why this game ended: "solved", "wrong colour", "time", one of FAILURES, or "" while it runs."""
        ended = "solved" if self.visits[game] == self.goal else "wrong colour" if self.terminated[game] else "time"
        return self.FAILURES[self.failure[game]] or (ended if self.done[game] else "")

    def observation(self, games=slice(None)):
        """What the ant sees (App. A.2), float32 [B, D]: height, quaternion 4, joints 8, symlog velocities 14, position ÷
        half the arena 2, within its cell ÷ half a cell 2, objects relative to the torso ÷ the arena 2N."""
        games = self.rows[games].numpy()  # numpy takes a tensor of one index for a plain number
        qpos, qvel, objects = self.simulation.qpos[games], self.simulation.qvel[games], self.objects[games]
        xy = qpos[:, :2]
        local = xy - centres(cells_at(xy, self.size)[0], self.size)
        relative = ((objects - xy[:, None]) / self.size).reshape(len(xy), 2 * objects.shape[1])
        symlog = np.sign(qvel) * np.log1p(np.abs(qvel))  # squeezes velocities into a small range
        parts = [qpos[:, 2:], symlog, xy / (self.size / 2), local / 0.5, relative]
        return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))

# ----------------------------------------------------------------------------------------------------- expert

# A tuned gait: amplitudes (rad), gains and phases of `gait`.
A, L, R, B = 0.3543833218109272, 0.4346279606689153, 0.3936868640818661, 0.15692298191644066
E0, PUSH, C4 = 0.9956662862012898, -0.022390528330828607, -0.014611636629120493
KPH, KDH, KPA, KDA = 0.8679102000250551, 0.14148226524349455, 1.4343309358236014, 0.14008687066079573  # of the joints
LEAD, HLAG, RLAG, WM = 1.5921951108318073, 1.8195569824356275, 0.5019263060870063, 20.833399417455738  # of the phases
KTILT, KRATE, KYAW = -0.003976309398854643, -0.03140013251866837, 0.051210597376100155  # of tilt and rotation
KVH, KVR, KC = -0.06971521982722066, -0.12835208756254116, 0.31024166258475133  # of the torso's velocity
KZ, KVZ = -0.06800820723360762, 0.01683455319105399  # of its height
AZIMUTH = np.radians([45, 135, 225, 315])  # of legs 1 … 4
DIAGONAL, ANKLE = np.array([1, -1, 1, -1]), np.array([1, -1, -1, 1])  # sign of each diagonal pair; of an ankle's bending
ACTUATORS = [6, 7, 0, 1, 2, 3, 4, 5]  # the joint that each torque drives


def gait(qpos, qvel, heading):
    """Torques that walk into the world direction `heading`: qpos [n, 15], qvel [n, 14], heading [n] → [n, 8]. A trot
    without a clock: its phase is read from the ankles, so it has no memory."""
    # differs from the paper: an analytic expert instead of one trained by PPO: it is free and succeeds more often.
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
    ankle_goal = (E0 - L * lift.clip(0) + PUSH * (-lift).clip(0) + R * along(aim) * np.cos(phase + RLAG)
                  - KTILT * along(up) - KRATE * rate - KVR * along(forward)
                  + (KZ * (qpos[:, 2] - 0.6) + KVZ * qvel[:, 2])[:, None])
    torque = np.empty((len(qpos), ACTION))
    torque[:, 0::2] = KPH * (hip_goal.clip(-0.6, 0.6) - hip) - KDH * hip_rate
    torque[:, 1::2] = ANKLE * (KPA * (ankle_goal.clip(0.45, 1.3) - ankle) - KDA * ankle_rate)
    return torque[:, ACTUATORS].clip(-1, 1)


def headings(xy, moves, size):
    """Towards the nearest next cell on a shortest path: xy [n, 2], moves [n, G², 4] that start one → [n] rad"""
    cell, rows = cells_at(xy, size)[0], np.arange(len(xy))
    offset = centres(gridworld.neighbours(size), size)[cell] - xy[:, None]  # [n, 4, 2]
    distance = np.where(moves[rows, cell], np.linalg.norm(offset, axis=-1), np.inf)
    best = offset[rows, distance.argmin(1)]
    return np.arctan2(best[:, 1], best[:, 0])


def expert_paths(layouts, size, tasks, max_steps, generator, sigma=0.0, bursts=0.0, subgoal_size=1):
    """The expert solves tasks [B, K] in B layouts, with Gaussian noise of deviation sigma on its torques. Some episodes
    fail. With probability `bursts` a step it is pushed into a random direction for 8 steps. The actions that are returned
    are then still those that it would have taken, so they show how to come back."""
    # differs from the paper: bursts. Without, motion tells too well what comes next (labelled controllers .46, not .53).
    game, generator = Game(layouts, size, tasks, max_steps), on_cpu(generator)
    moves = gridworld.shortest_moves(layouts, size).numpy()  # [B, O, G², 4]
    action, observation = torch.zeros(len(layouts), ACTION), game.observation()
    burst_left, burst_heading = np.zeros(len(layouts), dtype=int), np.zeros(len(layouts))
    actions, observations, subgoals = [], [observation], []
    while not game.done.all():
        rows, target = (~game.done).numpy().nonzero()[0], game.target()
        qpos, qvel = game.simulation.qpos[rows], game.simulation.qvel[rows]
        noise = sigma * torch.randn(len(rows), ACTION, generator=generator, dtype=torch.float64).numpy()
        heading = headings(qpos[:, :2], moves[rows, target[rows].numpy()], size)
        torques = (gait(qpos, qvel, heading) + noise).clip(-1, 1)
        action, observation = action.clone(), observation.clone()
        action[rows] = torch.from_numpy(torques).float()
        subgoals.append(target // subgoal_size)
        actions.append(action)
        if bursts > 0:
            chance, direction = torch.rand(2, len(rows), generator=generator, dtype=torch.float64).numpy()
            starts = (chance < bursts) & (burst_left[rows] == 0)
            burst_left[rows[starts]], burst_heading[rows[starts]] = 8, 2 * np.pi * direction[starts]
            pushed = burst_left[rows] > 0
            push = gait(qpos[pushed], qvel[pushed], burst_heading[rows[pushed]])
            torques[pushed] = (push + noise[pushed]).clip(-1, 1)
            burst_left[rows[pushed]] -= 1
        game.step(action.index_copy(0, torch.from_numpy(rows), torch.from_numpy(torques).float()))
        observation[rows] = game.observation(rows)
        observations.append(observation)
    observation, action, subgoal = (torch.stack(steps, 1) for steps in (observations, actions, subgoals))
    return gridworld.Trajectories(observation, action, game.steps, game.success(), subgoal)

# --------------------------------------------------------------------------------------------------- symmetry

def symmetry(quaternion, spin, pair, joints):
    """A map of observations [..., D] and torques [..., 8], from what becomes of the quaternion (w, x, y, z), the angular
    velocity (x, y, z), every pair (x, y) of world coordinates and the joints [..., 8]."""
    each = lambda change, x: torch.stack(change(*x.unbind(-1)), -1)

    def image(observation, action):
        body, places = observation[..., :27], observation[..., 27:].unflatten(-1, (-1, 2))
        parts = [body[..., :1], each(quaternion, body[..., 1:5]), joints(body[..., 5:13]), each(pair, body[..., 13:15]),
                 body[..., 15:16], each(spin, body[..., 16:19]), joints(body[..., 19:]), each(pair, places).flatten(-2)]
        return torch.cat(parts, -1), joints(action[..., np.argsort(ACTUATORS)])[..., ACTUATORS]

    return image


# The world seen in a mirror, x → −x: left legs become right legs, and turns change their sense.
LEGS = [2, 3, 0, 1, 6, 7, 4, 5]  # joints of the leg that this puts in a joint's place
reflected = symmetry(lambda w, x, y, z: (w, x, -y, -z), lambda x, y, z: (x, -y, -z), lambda x, y: (-x, y),
                     lambda joints: -joints[..., LEGS])
# The world turned by a quarter, x → y, y → −x. The ant itself, its joints and torques, is the same.
turned = symmetry(lambda w, x, y, z: [q / math.sqrt(2) for q in (w - z, x - y, y + x, z + w)],
                  lambda x, y, z: (x, y, z), lambda x, y: (-y, x), lambda joints: joints)
# The same world and ant, its legs counted from the next one on: the body's frame is turned by a quarter.
SIGNS = torch.from_numpy(np.stack([np.ones(4), ANKLE * np.roll(ANKLE, -1)], 1).ravel()).float()
renumbered = symmetry(lambda w, x, y, z: [q / math.sqrt(2) for q in (w - z, x + y, y - x, z + w)],
                      lambda x, y, z: (y, -x, z), lambda x, y: (x, y), lambda joints: SIGNS * joints.roll(-2, -1))


@functools.cache
def symmetries(objects):
    """The 8 rotations and reflections of the arena, each with the legs counted from any of the four, as linear maps of
    observations [32, D, D] and torques [32, 8, 8]: image = map @ original. MuJoCo has these symmetries, too."""
    start, maps = (torch.eye(OBSERVATION + 2 * objects), torch.eye(ACTION)), []
    for world in (start, reflected(*start)):
        for _ in range(4):
            for _ in range(4):
                maps.append(world)
                world = renumbered(*world)
            world = turned(*maps[-4])
    return tuple(torch.stack(each).transpose(1, 2) for each in zip(*maps))


def mirror(observation, action, k, size):
    """Each episode in the image k [B] of its world: observation [B, T+1, D], action [B, T, 8] → same shapes"""
    observations, actions = (x.to(observation.device) for x in symmetries((observation.shape[-1] - OBSERVATION) // 2))
    return observation @ observations[k].transpose(1, 2), action @ actions[k].transpose(1, 2)


def places(observation, size):
    """Cells of the objects and of the agent, read off observations: [..., D] → [..., N+1]"""
    local = observation[..., 29:31] / 2  # in cells, from the centre of the ant's
    own = (observation[..., 27:29] * (size / 2) + (size - 1) / 2 - local).round().clamp(0, size - 1)  # (column, row from below)
    offset = observation[..., 31:].unflatten(-1, (-1, 2)) * size + local[..., None, :]
    column_row = torch.cat([own[..., None, :] + offset.round(), own[..., None, :]], -2).clamp(0, size - 1)  # [..., N+1, 2]
    return ((size - 1 - column_row[..., 1]) * size + column_row[..., 0]).long()


def body_features(observation, size):
    """The ant's body in its own frame: height 1, rotation 9, joints 8, symlog velocities 14, and the directions to the
    centres of the four neighbouring cells 8: [..., D] → [..., 40]"""
    matrix = rotation(observation[..., 1:5])  # [..., 3, 3]
    world = observation[..., 13:16].sign() * observation[..., 13:16].abs().expm1()
    forward = (matrix.transpose(-1, -2) @ world[..., None])[..., 0]
    centre = torch.tensor([[0., 1], [0, -1], [-1, 0], [1, 0]], device=observation.device)  # up, down, left, right
    offset = centre - observation[..., None, 29:31] / 2  # [..., 4, 2]
    yaw = F.normalize(matrix[..., None, :2, 0], dim=-1)  # [..., 1, 2] (cos, sin)
    across = torch.stack([-yaw[..., 1], yaw[..., 0]], -1)
    seen = F.normalize(torch.stack([(offset * yaw).sum(-1), (offset * across).sum(-1)], -1), dim=-1)
    return torch.cat([observation[..., :1], matrix.flatten(-2), observation[..., 5:13],
                      forward.sign() * forward.abs().log1p(), observation[..., 16:27], seen.flatten(-2)], -1)

# ------------------------------------------------------------------------- the world that internal_rl.py sees

def parallel_scan(a, b, chunk=16):
    """h_t = a_t h_{t−1} + b_t, h_0 = 0: a, b [B, T, C] → h [B, T, C]. Within all chunks at once, then chunk by chunk."""
    batch, time, width = b.shape
    extra = -time % chunk
    reach, h = (F.pad(x, (0, 0, 0, extra)).view(batch, -1, chunk, width) for x in (a, b))  # copies [B, T/16, 16, C]
    for t in range(1, chunk):
        h[:, :, t].addcmul_(reach[:, :, t], h[:, :, t - 1])
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


class Block(nn.Module):
    """Hawk: the pre-norm recurrent block of the ant's base model (App. D.1, Table A15), a short causal convolution and a
    real-gated linear recurrent unit, multiplied by a gated branch, then an MLP."""
    WINDOW = 4  # of the convolution

    def __init__(self, config):
        super().__init__()
        width, heads = config.width, config.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.branches, self.mix = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)
        self.convolution = nn.Conv1d(width, width, self.WINDOW, groups=width)
        gates = torch.randn(heads, width // heads, 2 * width // heads) * (heads / width) ** 0.5
        self.gates = nn.Parameter(gates)  # block-diagonal
        self.gate_bias = nn.Parameter(torch.zeros(heads, 2 * width // heads))
        decay = torch.linspace(0.9, 0.999, width)  # of a full gate in a step, exp(−8 softplus(Λ))
        self.decay = nn.Parameter((-decay.log() / 8).expm1().log())  # Λ
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, past=None):
        """x [B, T, C] → ([B, T, C], (window, h)). `past`: last inputs [B, 3, C], state h [B, C]"""
        batch, time, width = x.shape
        gate, inner = self.branches(self.norm_1(x)).chunk(2, -1)
        past = past or (inner.new_zeros(batch, self.WINDOW - 1, width), None)
        inner = torch.cat([past[0], inner], 1)  # [B, 3+T, C]
        window = inner[:, -(self.WINDOW - 1):]
        inner = self.convolution(inner.transpose(1, 2)).transpose(1, 2)  # [B, T, C]
        gates = torch.einsum("bthi,hij->bthj", inner.unflatten(-1, (len(self.gates), -1)), self.gates) + self.gate_bias
        forget, use = (g.flatten(2).float().sigmoid() for g in gates.chunk(2, -1))  # each [B, T, C]
        log_a = -8 * F.softplus(self.decay) * forget
        a, b = log_a.exp(), (-torch.expm1(2 * log_a) + 1e-6).sqrt() * use * inner.float()
        if past[1] is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * past[1][:, None], b[:, 1:]], 1)
        h = LinearRecurrence.apply(a, b) if time > 1 else b
        x = x + self.mix(F.gelu(gate, approximate="tanh") * h.to(gate.dtype))
        return x + self.down(F.relu(self.up(self.norm_2(x)))), (window, h[:, -1])


SETTINGS = {  # of this world alone: name → (default, help, lowest, highest value); of the base model's stage
    "trajectories": (40_000, "expert episodes tried, the solved ones are kept (of D* a quarter); 0: fresh ones", 0, 10 ** 7),
    "bursts": (0.01, "probability a step that the expert is pushed into a random direction for 8 steps", 0, 1),
    "thin": (1 / 256, "share of steps within a cell to train on; in pretrain it rises to 1, in gates from its root", 1e-6, 1),
}
ANT = dict(size=4, max_steps=500, noise=0.1, tolerance=3, post_task="0-1-2-3")
# differs from the paper: control of rank 64 (a full matrix), after block 1 of 4 (the middle one: labels .52, not .71).
QUICK = dict(ANT, next_obs=10.0, pretrain_steps=16_000, steer_steps=2400, read_embedding=False, gate_steps=2400,
             code_steps=3200, rl_episodes=25_600, rl_batch=512, rl_lr=1e-3)
PRESETS = {
    "quick": QUICK,
    "tiny": {**QUICK, **gridworld.PRESETS["tiny"], **dict(
        trajectories=64, max_steps=100, pretrain_steps=48, pretrain_batch=8, probe_steps=8, steer_steps=16,
        gate_steps=16, code_steps=8, discover_batch=8, rl_episodes=64, rl_batch=32, evaluation=32)},
    # Tables A2, A5, A8, A10, A14, A15; ours: the number of trajectories, and A10's batch of 128 for A8, too.
    "paper": dict(
        ANT, next_obs=10.0, thin=1.0, bursts=0.0, view="absolute", trajectories=104_000, width=256,
        layers=8, heads=8, pretrain_steps=204_800, pretrain_batch=512, pretrain_lr=3e-4, cosine=False, probe_steps=8000,
        probe_lr=1e-3, steer_steps=3200, steer_lr=3e-4, rank=0, control_layer=0, gate_steps=32_000, code_steps=0,
        discover_batch=128, discover_lr=3e-4, read_embedding=False, alpha=0.1, rate=0.0,
        n_z=8, code_std=0.0, rl_episodes=13_107_200, rl_batch=256, rl_lr=3e-5, raw_lr=3e-5, std_end=1.0),
}
SYMMETRIES = 32  # images of a world, see `mirror`
RAW = "raw-action"  # what RL on the model's own actions is called
LOOK = dict(trajectories=256, layouts=16, film=(4, 10))  # how much is looked at; see internal_rl.py
EXPECT = dict(  # medians of declared seeds 316 to 320 by `33bf520`
    gap="2.1", expert_success="0.97", base_success="0", steer_success="0.65", gate_precision="1.00", gate_recall="0.98",
    goal_accuracy="0.99", withheld="0.86", internal_success="0.55", raw_success="0")


def check(config):
    """Raises ValueError for settings that cannot work together in this world."""
    gridworld.check(config)
    if config.trajectories % (4 if config.trajectories <= SHARD else 4 * SHARD):
        raise ValueError(f"trajectories {config.trajectories} is no multiple of {4 * SHARD} (up to {SHARD}: of 4)")
    if config.window:
        raise ValueError(f"window {config.window} is for attention; this world's base model is recurrent")


def expert_batch(config, n, generator, noise=0.0):
    """Those of n fresh expert trajectories that are solved (pushed, it fails in one of seven): D, or D* (noise = 0)."""
    expert = functools.partial(expert_paths, bursts=config.bursts)
    return gridworld.expert_batch(config, n, generator, noise, draw_layouts=draw_layouts, expert_paths=expert)


def expert_data(folder, shards, settings, make):
    """Expert episodes kept in `folder`, in as many files as shards: [{name: array}]. make(i) makes a missing one. Damaged
    files and those of other `settings` (a dictionary) raise ValueError."""
    parts, started = {}, time.time()
    first = shards * int(os.environ.get("RANK", 0)) // int(os.environ.get("WORLD_SIZE", 1))
    for i in (*range(first, shards), *range(first)):  # processes of torchrun begin at different files
        path, settings = Path(folder) / f"{i:03}.npz", {**settings, "shard": i}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}-{first}.part.npz")
            np.savez(temporary, settings=json.dumps(settings, sort_keys=True), **make(i))
            os.replace(temporary, path)
            print(f"data: {path} written, {i + 1} of {shards}, {time.time() - started:.0f} s", flush=True)
        try:
            with np.load(path, allow_pickle=False) as file:
                part = dict(file)
            found = json.loads(str(part.pop("settings")))
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            raise ValueError(f"{path} cannot be read ({type(error).__name__}); delete it to make it again") from None
        for name in sorted({*found, *settings}):
            if found.get(name) != settings.get(name):
                raise ValueError(f"{path} was made with {name}={found.get(name)}, not {settings.get(name)}; delete it")
        parts[i] = part
    return [parts[i] for i in range(shards)]


class StoredEpisodes:
    """Expert trajectories kept on disk, in memory end to end: observation, action, subgoal, each [M, …], and length."""

    def __init__(self, config, noise, folder):
        count = config.trajectories if noise else config.trajectories // 4
        names = ("world", "seed", "size", "colours", "walls", "max_steps", "subgoals", "bursts")
        settings = dict(((name, getattr(config, name)) for name in names), noise=noise, episodes=min(SHARD, count))

        def make(i):
            generator = torch.Generator().manual_seed(10_000 * (config.seed + 1) + (1000 if noise else 2000) + i)
            batch = expert_batch(config, settings["episodes"], generator, noise)
            kept = F.pad(batch.valid, (1, 0), value=True)  # [B, T+1]: as many rows of everything as observations
            action, subgoal = F.pad(batch.action, (0, 0, 0, 1)), F.pad(batch.subgoal, (0, 1))
            return dict(observation=batch.observation[kept].half().numpy(), action=action[kept].half().numpy(),
                        subgoal=subgoal[kept].byte().numpy(), length=batch.length.numpy())

        folder = Path(folder) / f"{config.world}-s{config.seed}-noise{noise:g}"
        shards = expert_data(folder, max(1, count // SHARD), settings, make)
        vars(self).update({name: torch.from_numpy(np.concatenate([shard[name] for shard in shards])) for name in shards[0]})
        self.start = F.pad((self.length + 1).cumsum(0), (1, -1))

    def draw(self, n, generator):
        """n of them: their length [n], and pick(rows) → Trajectories, each in a random one of its 32 images."""
        drawn = torch.randint(len(self.length), (n,), generator=generator, device=generator.device).cpu()

        def pick(rows):
            # differs from the paper: an image is as good as a fresh one, for simulation and expert are symmetric.
            batch = self.pick(drawn[rows]).to(generator.device)
            k = torch.randint(SYMMETRIES, (len(rows),), generator=generator, device=generator.device)
            observation, action = mirror(batch.observation, batch.action, k, size=None)
            return replace(batch, observation=observation, action=action)

        return SimpleNamespace(length=self.length[drawn], pick=pick)

    def pick(self, rows):
        """The trajectories `rows` [B]; beyond the end of a trajectory its last row is repeated."""
        length = self.length[rows]
        at = torch.minimum(torch.arange(int(length.max()) + 1), length[:, None]) + self.start[rows, None]  # [B, T+1]
        return gridworld.Trajectories(self.observation[at].float(), self.action[at[:, :-1]].float(), length,
                                      torch.ones(len(rows)), self.subgoal[at[:, :-1]].long())


def source(config, noise, folder):
    """A function (n, generator) → n training trajectories, with length [n] and pick(rows); fresh ones without a folder."""
    if config.trajectories == 0 or folder is None:
        return lambda n, generator: expert_batch(config, n, generator, noise)
    stored = functools.cache(lambda: StoredEpisodes(config, noise, folder))  # made when they are first needed
    return lambda n, generator: stored().draw(n, generator)


def entries(batch, size):
    """At which steps has the torso just entered its cell? [B, T] bool"""
    cell = places(batch.observation, size)[..., -1]  # [B, T+1]
    return F.pad(cell[:, 1:-1] != cell[:, :-2], (1, 0), value=True) & batch.valid


def thinned(config, batch, thinning, generator):
    """The steps to train on: those that enter a cell, and a random share of the others, config.thin to the power of `thinning`
    (0 … 1). What follows a step is then the next that was kept. The more are kept, the fewer episodes, down to one in eight."""
    # differs from the paper: within a cell the motion gives the action away, and the next observation seldom shows another
    # cell; a model learns to continue, not to choose. Fewer episodes where they are whole: faster.
    if config.thin == 1:
        return batch
    share = config.thin ** thinning
    batch = batch.pick(torch.arange(0, len(batch.length), 1 + 7 * share, device=generator.device).long())
    some = torch.rand(batch.valid.shape, generator=generator, device=generator.device) < share
    kept = F.pad((entries(batch, config.size) | some) & batch.valid, (0, 1))  # [B, T+1]
    count, steps = kept.sum(1), torch.arange(kept.shape[1], device=kept.device)
    at = torch.where(kept, steps, batch.length[:, None]).sort(1).values  # kept steps, then the last observation
    at, row = at[:, :int(count.max()) + 1], torch.arange(len(at), device=at.device)[:, None]
    before = at[:, :-1].clamp(max=batch.action.shape[1] - 1)
    return replace(batch, observation=batch.observation[row, at], action=batch.action[row, before], length=count,
                   subgoal=batch.subgoal[row, before])


def action_floor(config, n, generator):
    """NLL of the best predictor that knows the task, nats per action: the entropy of the noise on the torques; None."""
    return ACTION * (math.log(max(config.noise, 1e-3)) + 0.5 * math.log(2 * math.pi * math.e)), None


def random_success(config, layouts):
    """Not known for torques."""
    return None


class Embedding(nn.Module):
    """Observation → e_{t,0}: where things lie, as on the grid, and a linear map of the body; or one of everything."""
    # differs from the paper: cells, for reading a map in absolute numbers is hard (labelled controllers .18, not .53).

    def __init__(self, config):
        super().__init__()
        self.size, egocentric = config.size, config.view == "egocentric"
        self.cells = gridworld.Embedding(config) if egocentric else None
        inputs = FEATURES if egocentric else OBSERVATION + 2 * (config.colours + config.walls)
        self.body = nn.Linear(inputs, config.width)

    def forward(self, observation):
        """[B, T, D] → [B, T, C]"""
        if self.cells is None:
            return self.body(observation)
        return self.cells(places(observation, self.size)) + self.body(body_features(observation, self.size))


class Head(nn.Module):
    """Last residual [..., C] → mean and ln σ of the torques [..., 16]; and what comes next, for Eq. 4."""
    # differs from the paper: one learned spread for all states; else controllers gain on the noiseless D* by shrinking it,
    # without steering.

    def __init__(self, config):
        super().__init__()
        self.mean = nn.Linear(config.width, ACTION)
        self.log_sigma = nn.Parameter(torch.full((ACTION,), -1.5))
        self.observation = nn.Linear(config.width, OBSERVATION + 2 * (config.colours + config.walls))

    def forward(self, last):
        mean = self.mean(last)
        return torch.cat([mean, self.log_sigma.to(mean.dtype).expand_as(mean)], -1)

    def heat(self, temperature):
        """Multiplies the spread of torques by this, once."""
        self.log_sigma.data += math.log(temperature)

    def next_observation_loss(self, last, batch):
        """−ln p(o_{t+1} | o_{1:t}) of unit variance, mean over steps, up to a constant: last [B, T, C] → scalar"""
        error = self.observation(last)[batch.valid].float() - batch.observation[:, 1:][batch.valid]
        return 0.5 * (error ** 2).sum(-1).mean()


def log_prob(out, torques):
    """ln p(torques): mean and ln σ [..., 16], torques [..., 8] → [...]"""
    mean, log_sigma = out.float().chunk(2, -1)
    return (-0.5 * ((torques - mean) / log_sigma.exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample(out, generator):
    """Torques from each distribution: [n, 16] → [n, 8]"""
    mean, log_sigma = out.chunk(2, -1)
    return mean + log_sigma.exp() * torch.randn(mean.shape, generator=generator, device=mean.device)

# ---------------------------------------------------------------------------------------------------- drawing

def picture(observation, size, colours, pixels=64):
    """The arena from above, drawn from one observation [D] alone: RGB [size·pixels, size·pixels, 3] uint8, y upwards, the
    ant black with a white rim. Works without a screen or OpenGL."""
    observation = np.asarray(observation, dtype=np.float64)
    xy = observation[27:29] * size / 2
    objects = cells_at(xy + observation[31:].reshape(-1, 2) * size, size)[0]
    image = gridworld.draw_cells(objects[:colours], objects[colours:], size, pixels)
    data = mujoco.MjData(MODEL)
    data.qpos[:] = np.concatenate([xy, observation[:QPOS - 2]])
    mujoco.mj_kinematics(MODEL, data)
    x = (np.arange(size * pixels) + 0.5) / pixels - size / 2
    points = np.stack(np.meshgrid(x, -x), -1)  # [size·pixels, size·pixels, 2] m
    outside = np.inf  # distance of each point from the ant, m; negative inside
    for geom in np.flatnonzero(MODEL.geom_type != mujoco.mjtGeom.mjGEOM_PLANE):
        # Seen from above a capsule is a line with round ends; the torso, a sphere, is one without length.
        radius, half = MODEL.geom_size[geom, :2]
        axis = 2 * half * data.geom_xmat[geom].reshape(3, 3)[:2, 2]
        offset = points - (data.geom_xpos[geom, :2] - axis / 2)
        share = (offset @ axis / max(axis @ axis, 1e-9)).clip(0, 1)[..., None]  # of the nearest point along the line
        outside = np.minimum(outside, np.linalg.norm(offset - share * axis, axis=-1) - radius)
    for rim, shade in ((0.03, 255), (0, 0)):  # m
        cover = ((rim - outside) * pixels + 0.5).clip(0, 1)[..., None]  # soft over one pixel
        image = image + cover * (shade - image)
    return image.round().astype(np.uint8)

# -------------------------------------------------------------------------------------------------- Gymnasium

def vector(values, count):
    """values as float64 [count], or None if they are not that many finite real numbers."""
    try:
        values = np.array(values).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


class AntPinpad(gridworld.GridworldPinpad):
    """One ant with the Gymnasium interface (a batch of one `Game`).
    Observation: Box [D] float32, see `Game.observation`. Action: Box [8], torques in −1 … 1. Info: visits, cell (under
    the torso), colours, walls (cells), reason (why the game ended, "" before). `reset(options={"agent": …, "colours": …,
    "walls": …, "task": …, "qpos": …, "qvel": …})` sets up a layout and a pose, the rest is drawn; qpos sets the agent."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_STEP)}
    options = (*gridworld.GridworldPinpad.options, "qpos", "qvel")
    picture = staticmethod(picture)

    def __init__(self, size=4, colours=4, walls=1, max_steps=500, task="0-1-2-3", render_mode=None):
        super().__init__(size, colours, walls, max_steps, task, render_mode)
        inputs = OBSERVATION + 2 * (colours + walls)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (inputs,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)

    def _checked(self, options):
        options = dict(super()._checked(options))
        for name, count in (("qpos", QPOS), ("qvel", QVEL)):
            if name in options:
                options[name] = vector(options[name], count)
                if options[name] is None:
                    raise ValueError(f"{name} is not {count} finite numbers")
        if "qpos" in options:
            cell, inside = cells_at(options["qpos"][:2], self.size)
            if not inside or abs(np.linalg.norm(options["qpos"][3:7]) - 1) > 1e-4:
                raise ValueError("qpos needs a position inside the arena and a quaternion (numbers 3 to 6) of length 1")
            if "agent" in options:
                raise ValueError("agent and qpos are both given; the agent's cell follows from qpos")
            options["agent"] = int(cell)
        return options

    def _new_game(self, layouts, task, options, generator):
        layouts = with_pose(layouts, self.size, generator)
        pose = {name: torch.from_numpy(options[name])[None] for name in ("qpos", "qvel") if name in options}
        return Game(replace(layouts, **pose), self.size, task, self.max_steps)

    def _batched(self, action):
        torques = vector(action, ACTION)
        if torques is None or abs(torques).max() > 1:
            raise ValueError(f"action {action!r} is not {ACTION} torques in −1 … 1")
        return torques[None]

    def _observation(self):
        return self.game.observation()[0].numpy()

    def _info(self):
        info = super()._info()
        return {"cell": info.pop("agent"), **info, "reason": self.game.reason(0)}


gymnasium.register("AntPinpad-v0", entry_point="ant_tasks:AntPinpad")

# ------------------------------------------------------------------------------------------------------- demo

def demo(folder, n, seed):
    """Prints success of the expert in n episodes of each kind, speed of the simulation; films ant.png and ant.gif."""
    def episodes(tasks, sigma, n, seed):
        generator, own = torch.Generator().manual_seed(seed), tasks[torch.arange(n) % len(tasks)]
        layouts = draw_layouts(n, 4, 4, 1, generator)
        return layouts, expert_paths(layouts, 4, own, 500, generator, sigma)

    print(f"{n} expert episodes each{'success':>24}{'mean steps':>14}")
    withheld = torch.tensor([[0, 1, 2, 3]])
    for name, tasks in (("16 pretraining tasks", gridworld.pretraining_tasks("singles")), ("0-1-2-3", withheld)):
        for sigma in (0, 0.1):
            _, paths = episodes(tasks, sigma, n, seed)
            print(f"{f'{name}, σ = {sigma}':32}{paths.success.mean():15.3f}{paths.length.float().mean():14.1f}", flush=True)

    layouts, paths = episodes(withheld, 0, 256, seed)
    game, started = Game(layouts, 4, withheld[0], 50), time.perf_counter()
    for t in range(50):
        game.step(paths.action[:, t])
        game.observation()
    speed = game.steps.sum() / (time.perf_counter() - started)
    print(f"simulation with observations, 256 ants, {Simulation.threads} threads: {speed:,.0f} control steps/s")

    _, paths = episodes(withheld, 0, 32, seed + 1)
    chosen = int(paths.success.argmax())  # the first that is solved
    pursued = paths.subgoal[chosen, :paths.length[chosen]].tolist()
    titles = [f"{t * CONTROL_STEP:.1f} s: to {colour}" for t, colour in enumerate(pursued)]
    marked = [colour != before for colour, before in zip(pursued, [None, *pursued])]
    frame = lambda t: picture(paths.observation[chosen, t], 4, 4)
    gridworld.film(frame, [*titles, "end"], [*marked, False], folder / "ant", *LOOK["film"])
    print(f"written: {folder / 'ant.png'}, {folder / 'ant.gif'} (twice the real speed)")


def main(arguments=None):
    parser = argparse.ArgumentParser("ant_tasks.py", description="success and speed of ants, a film", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"ant_tasks.py: {message}\n")
    parser.add_argument("--episodes", type=int, default=1000, help="expert episodes of each kind, 1 … 5000 (1000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--out", type=Path, default="runs", metavar="FOLDER", help="where ant.png and ant.gif go (runs)")
    options = parser.parse_args(arguments)
    if not (1 <= options.episodes <= 5000 and 0 <= options.seed < 2 ** 40):
        parser.error("--episodes must be in 1 … 5000 and --seed in 0 … 2^40 − 1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    demo(options.out, options.episodes, options.seed)


if __name__ == "__main__":
    main()
