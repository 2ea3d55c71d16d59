"""ant-pinpad (arXiv:2512.20605, App. A.2): gridworld-pinpad on a plane, walked by a MuJoCo ant.

The agent is the cell under the ant's torso. A game also ends, without reward, when the torso enters a wall
cell, leaves the arena, or its height leaves [0.2, 1.0] m. `python ant_tasks.py` shows how well the expert
walks, and films it. Names that gridworld.py has, too, mean the same as there.

qpos and qvel are MuJoCo's names of a pose (position 3, quaternion 4, joints 8) and its velocities (3, angular
3, joints 8). MuJoCo and the expert compute in numpy, on the CPU; games take and return tensors of one device.
Units: metres, seconds, radians; torques in −1 … 1 of the motors' range. Cells are 1 m wide; row 0 is the
northernmost (largest y), column 0 the westernmost (smallest x), the arena's centre is the origin.
Dims: n ants, B games, T time, G arena size, N objects (colours, then walls), D = 31 + 2N, C width.
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

HEALTHY, START_HEIGHT = (0.2, 1.0), 0.55  # height of the torso, m
# differs from the paper: the ankles start bent, because from the model's zero pose the ant jumps off.
START_JOINTS = np.array([0, 0.6, 0, -0.6, 0, -0.6, 0, 0.6])  # rad
SUBSTEPS, CONTROL_STEP = 3, 0.05  # simulation steps in a control step, s
QPOS, QVEL, ACTION = 15, 14, 8  # how many numbers
OBSERVATION, FEATURES = 31, 40  # without 2N for the objects; of `body_features`
# The parts of an observation, see `Game.observation`. Spin is the angular velocity.
HEIGHT, QUATERNION, JOINTS = slice(0, 1), slice(1, 5), slice(5, 13)
VELOCITY, SPIN, JOINT_RATES = slice(13, 16), slice(16, 19), slice(19, 27)
POSITION, WITHIN_CELL, OBJECTS = slice(27, 29), slice(29, 31), slice(31, None)

MODEL = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
# differs from the paper: implicitfast with steps of 1/60 s, probably not its RK4, because it is faster.
MODEL.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
MODEL.opt.timestep = CONTROL_STEP / SUBSTEPS
mujoco.set_mju_user_warning(lambda message: None)  # a game reports a broken simulation as its reason to end

# ------------------------------------------------------------------------------------------------- simulation

class Simulation:
    """n ants side by side. `state` [n, 30] is all that their future depends on: time, qpos 15, qvel 14.
    All share MuJoCo's `Rollout`, a pool of threads; a copy or pickle of a simulation is just its state."""
    model = MODEL
    threads = os.cpu_count()
    lock = threading.Lock()
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
        """One control step of the ants with indices `ants` [m] under torques [m, 8] → [m] bool: did the
        simulation break down (NaN, divergence)? Such an ant stays as it was."""
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

# ---------------------------------------------------------------------------------------------------- layouts

@dataclass
class Layouts(gridworld.Layouts):
    """A grid layout and the ant's pose in it: qpos [B, 15], qvel [B, 14], float64, always on the CPU."""
    qpos: torch.Tensor
    qvel: torch.Tensor

    def __getitem__(self, index):
        cells = (self.agent[index], self.colours[index], self.walls[index])
        index = index.cpu() if isinstance(index, torch.Tensor) else index
        return Layouts(*cells, self.qpos[index], self.qvel[index])


def on_cpu(generator):
    """The generator itself, or one on the CPU that is seeded by a draw from it."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2 ** 62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def with_pose(layouts, size, generator):
    """An ant anywhere in each agent's cell, at any yaw, joints (around START_JOINTS) and velocities in ±0.1
    (App. A.2). Layouts and generator are on the CPU."""
    def uniform(*shape):
        return torch.rand(len(layouts), *shape, generator=generator, dtype=torch.float64) * 2 - 1
    qvel, yaw = 0.1 * uniform(QVEL), math.pi * uniform()
    qpos = torch.zeros(len(layouts), QPOS, dtype=torch.float64)
    qpos[:, :2] = torch.from_numpy(centres(layouts.agent, size)) + uniform(2) / 2
    qpos[:, 2] = START_HEIGHT
    qpos[:, 3], qpos[:, 6] = (yaw / 2).cos(), (yaw / 2).sin()
    qpos[:, 7:] = torch.from_numpy(START_JOINTS) + 0.1 * uniform(8)
    return Layouts(layouts.agent, layouts.colours, layouts.walls, qpos, qvel)


def draw_layouts(n, size, colours, walls, generator):
    """n random solvable layouts, each with an ant's pose; all but the pose is on the generator's device."""
    source = on_cpu(generator)
    posed = with_pose(gridworld.draw_layouts(n, size, colours, walls, source), size, source)
    cells = (part.to(generator.device) for part in (posed.agent, posed.colours, posed.walls))
    return Layouts(*cells, posed.qpos, posed.qvel)

# ------------------------------------------------------------------------------------------------------ rules

class Game(gridworld.Game):
    """B games of gridworld-pinpad walked by ants. State as in `gridworld.Game`, on the device of the layouts,
    plus `failure` [B], an index into FAILURES: what else ended a game; and the simulation, on the CPU."""
    FAILURES = ["", "wall", "outside", "fallen", "simulation"]

    def __init__(self, layouts, size, tasks, max_steps):
        self.size = size
        self.objects = centres(layouts.objects.cpu(), size)  # [B, N, 2]
        self.simulation = Simulation(len(layouts))
        self.failure = torch.zeros_like(layouts.agent)
        super().__init__(layouts, size, tasks, max_steps)
        self.walls = self.is_wall.cpu().numpy()  # [B, G²]

    def reset(self, games):
        super().reset(games)
        self.failure = self.failure.masked_fill(games, 0)
        start = self.layouts[games]
        self.simulation.put(games.cpu().numpy(), start.qpos.numpy(), start.qvel.numpy())

    def step(self, torques):
        """torques [B, 8] in −1 … 1 → reward, terminated, truncated, each [B]"""
        running = (~self.done).cpu().numpy().nonzero()[0]
        torques = torch.as_tensor(torques).cpu().double().numpy()
        broken = np.zeros(len(torques), dtype=bool)
        broken[running] = self.simulation.step(torques[running], running)

        xy, height = self.simulation.qpos[:, :2], self.simulation.qpos[:, 2]
        cell, inside = cells_at(xy, self.size)
        standing = (height >= HEALTHY[0]) & (height <= HEALTHY[1])
        in_wall = self.walls[np.arange(len(cell)), cell]
        failure = np.select([broken, ~inside, ~standing, in_wall], [4, 2, 3, 1])
        cell, failure = (torch.from_numpy(x).to(self.agent.device) for x in (cell, failure))
        self.failure = torch.where(self.done, self.failure, failure)
        return self.enter(cell, self.failure > 0)

    def reason(self, game):
        """Why this game ended: "solved", "wrong colour", "time", one of FAILURES, or "" while it runs."""
        if self.failure[game] or not self.done[game]:
            return self.FAILURES[self.failure[game]]
        if self.visits[game] == self.goal:
            return "solved"
        return "wrong colour" if self.terminated[game] else "time"

    def observation(self):
        """What the ant sees (App. A.2), float32 [B, D]: height, quaternion 4, joints 8, symlog velocities 14,
        position ÷ half the arena 2, within its cell ÷ half a cell 2, objects from torso ÷ the arena 2N."""
        qpos, qvel = self.simulation.qpos, self.simulation.qvel
        xy = qpos[:, :2]
        symlog = np.sign(qvel) * np.log1p(np.abs(qvel))  # squeezes velocities into a small range
        within = xy - centres(cells_at(xy, self.size)[0], self.size)
        relative = ((self.objects - xy[:, None]) / self.size).reshape(len(xy), -1)
        parts = [qpos[:, 2:], symlog, xy / (self.size / 2), within / 0.5, relative]
        return torch.from_numpy(np.concatenate(parts, 1)).float().to(self.agent.device)

# ------------------------------------------------------------------------------------------------- the expert

# A tuned gait, angles and phases in rad.
SWING, SWING_LAG = 0.3543833218109272, 1.8195569824356275  # of the hips: amplitude, phase
LIFT, LIFT_BIAS = 0.4346279606689153, 0.15692298191644066  # of the ankles of legs in the air
REACH, REACH_LAG = 0.3936868640818661, 0.5019263060870063  # of the ankles, along the course
BEND, PUSH = 0.9956662862012898, -0.022390528330828607  # of the ankles: at rest; of legs on the ground
LEAD, TROT_RATE = 1.5921951108318073, 20.833399417455738  # phase; 1/s, of the whole trot
COURSE_BIAS, COURSE_GAIN = -0.014611636629120493, 0.31024166258475133  # corrections of the course
HIP_STIFFNESS, HIP_DAMPING = 0.8679102000250551, 0.14148226524349455
ANKLE_STIFFNESS, ANKLE_DAMPING = 1.4343309358236014, 0.14008687066079573
TILT_GAIN, TILT_RATE_GAIN, YAW_RATE_GAIN = -0.003976309398854643, -0.03140013251866837, 0.051210597376100155
ACROSS_GAIN, ALONG_GAIN = -0.06971521982722066, -0.12835208756254116  # of the torso's velocity
HEIGHT_GAIN, RISE_GAIN = -0.06800820723360762, 0.01683455319105399  # of the torso's height and its change
AZIMUTH = np.radians([45, 135, 225, 315])  # of legs 1 … 4
DIAGONAL = np.array([1, -1, 1, -1])  # legs 1 and 3 swing together, 2 and 4 against them
ANKLE = np.array([1, -1, -1, 1])  # the sign of an ankle's bending
ACTUATORS = [6, 7, 0, 1, 2, 3, 4, 5]  # the joint that each torque drives


def gait(qpos, qvel, heading):
    """Torques that walk into the world direction `heading`: qpos [n, 15], qvel [n, 14], heading [n] → [n, 8].
    A trot without a clock: its phase is read from the ankles, so it has no memory."""
    # differs from the paper: an analytic expert, not one trained by PPO, because it is free and fails less.
    matrix = rotation(qpos[:, 3:7])
    forward = np.einsum("nij,ni->nj", matrix, qvel[:, :3])  # velocity in the body's frame
    spin = qvel[:, 3:6]
    hip, hip_rate = qpos[:, 7::2], qvel[:, 6::2]
    ankle, ankle_rate = ANKLE * qpos[:, 8::2], ANKLE * qvel[:, 7::2]

    # Where to: a vector in the body's frame, longer while the torso is too slow.
    course = heading - np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])  # less the ant's yaw
    course = course - COURSE_BIAS * np.sin(4 * course)
    aim = np.stack([np.cos(course), np.sin(course)], -1)
    aim = aim + COURSE_GAIN * (1.5 * aim - forward[:, :2])
    aim = aim * np.minimum(1, 1.6 / np.linalg.norm(aim, axis=1))[:, None]

    # When: the phase of each leg [n, 4]
    swing, swing_rate = (ankle * DIAGONAL).mean(1), (ankle_rate * DIAGONAL).mean(1)
    phase = np.arctan2(-swing, -swing_rate / TROT_RATE)[:, None] + LEAD + np.where(DIAGONAL > 0, 0, np.pi)

    # How: where each hip and ankle should be, and torques like springs with dampers that draw them there.
    cos, sin = np.cos(AZIMUTH), np.sin(AZIMUTH)
    along = lambda x: x[:, :1] * cos + x[:, 1:2] * sin  # the part of a vector along each leg [n, 4]
    across = lambda x: -x[:, :1] * sin + x[:, 1:2] * cos
    hip_goal = (-SWING * across(aim) * np.cos(phase + SWING_LAG)
                - YAW_RATE_GAIN * spin[:, 2:] + ACROSS_GAIN * across(forward))
    lift = np.sin(phase) + LIFT_BIAS
    tilt_rate = spin[:, :1] * sin - spin[:, 1:2] * cos
    rise = HEIGHT_GAIN * (qpos[:, 2] - 0.6) + RISE_GAIN * qvel[:, 2]
    ankle_goal = (BEND - LIFT * lift.clip(0) + PUSH * (-lift).clip(0)
                  + REACH * along(aim) * np.cos(phase + REACH_LAG) - TILT_GAIN * along(matrix[:, 2])
                  - TILT_RATE_GAIN * tilt_rate - ALONG_GAIN * along(forward) + rise[:, None])
    torque = np.empty((len(qpos), ACTION))
    torque[:, 0::2] = HIP_STIFFNESS * (hip_goal.clip(-0.6, 0.6) - hip) - HIP_DAMPING * hip_rate
    torque[:, 1::2] = ANKLE_STIFFNESS * (ankle_goal.clip(0.45, 1.3) - ankle) - ANKLE_DAMPING * ankle_rate
    torque[:, 1::2] *= ANKLE
    return torque[:, ACTUATORS].clip(-1, 1)


def headings(xy, moves, size):
    """Towards the nearest next cell of a shortest path: xy [n, 2], moves [n, G², 4] that start one → [n]"""
    ants = np.arange(len(xy))
    cell, _ = cells_at(xy, size)
    offset = centres(gridworld.neighbours(size), size)[cell] - xy[:, None]  # [n, 4, 2]
    distance = np.where(moves[ants, cell], np.linalg.norm(offset, axis=-1), np.inf)
    best = offset[ants, distance.argmin(1)]
    return np.arctan2(best[:, 1], best[:, 0])


def expert_paths(layouts, size, tasks, max_steps, generator, sigma=0.0, bursts=0.0, subgoal_size=1):
    """The expert solves tasks [B, K] in B layouts, with Gaussian noise of deviation sigma on its torques.
    Some fail. With probability `bursts` a step it is pushed into a random direction for 8 steps. Returned
    are then still the actions that it would have taken, so they show how to come back."""
    # differs from the paper: bursts, because without them motion alone tells too well what comes next.
    game, generator = Game(layouts, size, tasks, max_steps), on_cpu(generator)
    moves = gridworld.shortest_moves(layouts, size).cpu().numpy()  # [B, O, G², 4]
    action, taken = np.zeros((2, len(layouts), ACTION), dtype=np.float32)
    burst_left, burst_heading = np.zeros(len(layouts), dtype=int), np.zeros(len(layouts))
    observations, actions, subgoals = [game.observation()], [], []
    while not game.done.all():
        running = (~game.done).cpu().numpy().nonzero()[0]
        target = game.target()
        qpos, qvel = game.simulation.qpos[running], game.simulation.qvel[running]
        heading = headings(qpos[:, :2], moves[running, target.cpu().numpy()[running]], size)
        noise = sigma * torch.randn(len(running), ACTION, generator=generator, dtype=torch.float64).numpy()
        torques = (gait(qpos, qvel, heading) + noise).clip(-1, 1)
        action[running] = torques
        if bursts > 0:
            chance, direction = torch.rand(2, len(running), generator=generator, dtype=torch.float64).numpy()
            starts = (chance < bursts) & (burst_left[running] == 0)
            burst_left[running[starts]], burst_heading[running[starts]] = 8, 2 * np.pi * direction[starts]
            pushed = burst_left[running] > 0
            push = gait(qpos[pushed], qvel[pushed], burst_heading[running[pushed]])
            torques[pushed] = (push + noise[pushed]).clip(-1, 1)
            burst_left[running[pushed]] -= 1
        taken[running] = torques
        game.step(taken)
        actions.append(torch.from_numpy(action.copy()))
        subgoals.append(target // subgoal_size)
        observations.append(game.observation())
    action = torch.stack(actions, 1).to(layouts.agent.device)
    observation, subgoal = torch.stack(observations, 1), torch.stack(subgoals, 1)
    return gridworld.Trajectories(observation, action, game.steps, game.success(), subgoal)

# ------------------------------------------------------------------------------------------------- symmetries

def symmetry(objects, quaternion, spin, pair, joints):
    """The matrix [D+8, D+8] of an observation and the torques after it, made of those of the quaternion
    (w, x, y, z), the spin (x, y, z), every pair (x, y) of world coordinates and the joints."""
    blocks = [[[1]], quaternion, joints, pair, [[1]], spin, joints, *[pair] * (2 + objects)]
    blocks.append(joints[ACTUATORS][:, ACTUATORS])  # torques
    return torch.block_diag(*(torch.as_tensor(block, dtype=torch.float64) for block in blocks))


@functools.cache
def symmetries(objects):
    """The 8 rotations and reflections of the arena, legs counted from any of the four, as linear maps of
    observations [32, D, D] and torques [32, 8, 8]: image = map @ original. MuJoCo has them, too."""
    half = math.sqrt(0.5)  # cos and sin of half a quarter turn
    # In a mirror, x → −x, left legs become right legs, and turns change their sense.
    reflected = symmetry(objects, quaternion=np.diag([1, 1, -1, -1]), spin=np.diag([1, -1, -1]),
                         pair=np.diag([-1, 1]), joints=-np.eye(8)[[2, 3, 0, 1, 6, 7, 4, 5]])
    # The world turned by a quarter, x → y, y → −x. The ant itself, its joints and torques, is the same.
    quaternion = half * np.array([[1, 0, 0, -1], [0, 1, -1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    turned = symmetry(objects, quaternion, spin=np.eye(3), pair=[[0, -1], [1, 0]], joints=np.eye(8))
    # The same world and ant, its legs counted from the next one on: the body's frame is turned by a quarter.
    quaternion = half * np.array([[1, 0, 0, -1], [0, 1, 1, 0], [0, -1, 1, 0], [1, 0, 0, 1]])
    signs = np.stack([np.ones(4), ANKLE * np.roll(ANKLE, -1)], 1).reshape(8, 1)
    renumbered = symmetry(objects, quaternion, spin=[[0, 1, 0], [-1, 0, 0], [0, 0, 1]], pair=np.eye(2),
                          joints=signs * np.roll(np.eye(8), -2, 0))
    maps = []
    for world in (torch.eye(len(turned), dtype=torch.float64), reflected):
        for _ in range(4):
            for _ in range(4):
                maps.append(world)
                world = renumbered @ world
            world = turned @ maps[-4]
    maps = torch.stack(maps).round(decimals=9).float()  # no 1e-17 in place of 0
    return maps[:, :-ACTION, :-ACTION], maps[:, -ACTION:, -ACTION:]


def mirror(observation, action, k, size):
    """Each episode in the image k [B] of its world: observation [B, T+1, D], action [B, T, 8] → the same"""
    objects = (observation.shape[-1] - OBSERVATION) // 2
    observations, actions = (maps.to(observation.device) for maps in symmetries(objects))
    return observation @ observations[k].transpose(1, 2), action @ actions[k].transpose(1, 2)

# ---------------------------------------------------------------- the base model: what it sees, and its parts

def places(observation, size):
    """Cells of the objects and of the agent, read off observations: [..., D] → [..., N+1]"""
    within = observation[..., WITHIN_CELL] / 2  # in cells, from the centre of the ant's
    # From here on cells are (column, row from below).
    agent = observation[..., POSITION] * (size / 2) + (size - 1) / 2 - within
    agent = agent.round().clamp(0, size - 1)[..., None, :]  # [..., 1, 2]
    offset = observation[..., OBJECTS].unflatten(-1, (-1, 2)) * size + within[..., None, :]  # [..., N, 2]
    cells = torch.cat([agent + offset.round(), agent], -2).clamp(0, size - 1)  # [..., N+1, 2]
    return ((size - 1 - cells[..., 1]) * size + cells[..., 0]).long()


def entries(batch, size):
    """At which steps has the torso just entered its cell? [B, T] bool"""
    cell = places(batch.observation, size)[..., -1]  # [B, T+1]
    return F.pad(cell[:, 1:-1] != cell[:, :-2], (1, 0), value=True) & batch.valid


def body_features(observation, size):
    """The ant's body in its own frame: height 1, rotation 9, joints 8, symlog velocities 14, direction to
    the centre of each neighbouring cell 8: [..., D] → [..., 40]"""
    matrix = rotation(observation[..., QUATERNION])  # [..., 3, 3]
    symlog = observation[..., VELOCITY]
    world = symlog.sign() * symlog.abs().expm1()
    forward = (matrix.transpose(-1, -2) @ world[..., None])[..., 0]
    # Up, down, left, right.
    centre = torch.tensor([[0., 1], [0, -1], [-1, 0], [1, 0]], device=observation.device)
    offset = centre - observation[..., None, WITHIN_CELL] / 2  # [..., 4, 2]
    yaw = F.normalize(matrix[..., None, :2, 0], dim=-1)  # [..., 1, 2] (cos, sin)
    across = torch.stack([-yaw[..., 1], yaw[..., 0]], -1)
    direction = F.normalize(torch.stack([(offset * yaw).sum(-1), (offset * across).sum(-1)], -1), dim=-1)
    return torch.cat([observation[..., HEIGHT], matrix.flatten(-2), observation[..., JOINTS],
                      forward.sign() * forward.abs().log1p(), observation[..., SPIN],
                      observation[..., JOINT_RATES], direction.flatten(-2)], -1)


def parallel_scan(a, b, chunk=16):
    """h_t = a_t h_{t−1} + b_t, h_0 = 0: a, b [B, T, C] → h [B, T, C]. Step by step within all chunks at once,
    then chunk by chunk, because few large operations are faster than many small ones."""
    batch, time, width = b.shape
    padding = (0, 0, 0, -time % chunk)
    reach, h = (F.pad(x, padding).view(batch, -1, chunk, width) for x in (a, b))  # copies [B, T/16, 16, C]
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
    """Hawk, the recurrent block of the ant's base model (App. D.1, Table A15): a short causal convolution, a
    gated linear recurrence (`parallel_scan`), multiplied by a gated branch; then an MLP."""
    WINDOW = 4  # of the convolution

    def __init__(self, config):
        super().__init__()
        width, heads = config.width, config.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.branches = nn.Linear(width, 2 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
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
        branch, inner = self.branches(self.norm_1(x)).chunk(2, -1)
        window, state = past or (inner.new_zeros(batch, self.WINDOW - 1, width), None)
        inner = torch.cat([window, inner], 1)  # [B, 3+T, C]
        window = inner[:, -(self.WINDOW - 1):]
        inner = self.convolution(inner.transpose(1, 2)).transpose(1, 2)  # [B, T, C]
        by_head = inner.unflatten(-1, (len(self.gates), -1))  # [B, T, heads, C/heads]
        gates = torch.einsum("bthi,hij->bthj", by_head, self.gates) + self.gate_bias
        forget, use = (gate.flatten(2).float().sigmoid() for gate in gates.chunk(2, -1))  # each [B, T, C]
        log_a = -8 * F.softplus(self.decay) * forget
        a = log_a.exp()
        b = (-torch.expm1(2 * log_a) + 1e-6).sqrt() * use * inner.float()
        if state is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * state[:, None], b[:, 1:]], 1)
        h = LinearRecurrence.apply(a, b) if time > 1 else b
        x = x + self.mix(F.gelu(branch, approximate="tanh") * h.to(branch.dtype))
        x = x + self.down(F.relu(self.up(self.norm_2(x))))
        return x, (window, h[:, -1])


class Embedding(nn.Module):
    """Observation → e_{t,0}: where things lie, as on the grid, and a linear map of the body."""
    # differs from the paper: cells, because a map in absolute numbers is hard to read (labels .18, not .53).
    def __init__(self, config):
        super().__init__()
        self.size = config.size
        self.cells = gridworld.Embedding(config)
        self.body = nn.Linear(FEATURES, config.width)

    def forward(self, observation):
        """[B, T, D] → [B, T, C]"""
        return self.cells(places(observation, self.size)) + self.body(body_features(observation, self.size))


class Head(nn.Module):
    """Last residual [..., C] → mean and ln σ of the torques [..., 16]; and what comes next, for Eq. 4."""
    def __init__(self, config):
        super().__init__()
        self.mean = nn.Linear(config.width, ACTION)
        # differs from the paper: one σ for all states, because controllers gain on D* by shrinking it.
        self.log_sigma = nn.Parameter(torch.full((ACTION,), -1.5))
        self.observation = nn.Linear(config.width, OBSERVATION + 2 * (config.colours + config.walls))

    def forward(self, last):
        mean = self.mean(last)
        return torch.cat([mean, self.log_sigma.to(mean.dtype).expand_as(mean)], -1)

    def next_observation_loss(self, last, batch):
        """−ln p(o_{t+1} | o_{1:t}), σ = 1, mean over steps, up to a constant: last [B, T, C] → scalar"""
        error = self.observation(last)[batch.valid].float() - batch.observation[:, 1:][batch.valid]
        return 0.5 * (error ** 2).sum(-1).mean()


def log_prob(out, torques):
    """ln p(torques): mean and ln σ [..., 16], torques [..., 8] → [...]"""
    mean, log_sigma = out.float().chunk(2, -1)
    squared = ((torques - mean) / log_sigma.exp()) ** 2
    return (-0.5 * squared - log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)


def sample(out, generator):
    """Torques from each distribution: [n, 16] → [n, 8]"""
    mean, log_sigma = out.chunk(2, -1)
    return mean + log_sigma.exp() * torch.randn(mean.shape, generator=generator, device=mean.device)

# ------------------------------------------------------------------- what else internal_rl.py asks of a world

QUICK = dict(
    size=4, max_steps=500, noise=0.1, post_task="0-1-2-3", next_obs=10.0, rl_batch=512,
    pretrain_steps=16_000, steer_steps=2400, gate_steps=2400, code_steps=3200, rl_episodes=25_600, rl_lr=1e-3)
TINY = dict(
    trajectories=64, max_steps=100, pretrain_steps=48, pretrain_batch=8, probe_steps=8, steer_steps=16,
    gate_steps=16, code_steps=8, discover_batch=8, rl_episodes=64, rl_batch=32, evaluation=32)
PRESETS = {"quick": QUICK, "tiny": {**QUICK, **gridworld.PRESETS["tiny"], **TINY}}
SYMMETRIES = 32  # images of a world, see `mirror`
RAW = "raw-action"  # what RL on the model's own actions is called
HELD_OUT = 256  # held-out trajectories that are measured
EVALUATIONS_A_LAYOUT = 64  # a code is tried in one layout for each 64 on which success is measured
TOLERANCE = 3  # how many steps a gate may be off
FILM = (4, 10)  # a picture every so many steps, pictures a second
EXPECT = dict(  # medians of seeds 316 to 320 by an earlier version, see the README
    gap="2.1", base_success="0", steer_success="0.65", gate_precision="1", gate_recall="0.98",
    goal_accuracy="0.99", withheld="0.86", internal_success="0.55", raw_success="0")
BURSTS = 0.01  # the probability a step that a push of the expert begins, in training data
THIN = 1 / 256  # the share of steps within a cell to train on, see `thinned`
FILE = 2000  # episodes in a data file


def check(config):
    """Raises ValueError for settings that cannot work together in this world."""
    gridworld.check(config)
    many = config.trajectories  # without noise, a quarter as many are stored
    if many < 1 or many % (4 if many <= FILE else 4 * FILE):
        raise ValueError(f"trajectories {many} is no multiple of {4 * FILE} (up to {FILE}: of 4)")
    if config.window:
        raise ValueError(f"window {config.window} is for attention; this world's base model is recurrent")


def expert_batch(config, n, generator, noise=0.0):
    """Those of n fresh trajectories of the expert that are solved (pushed, it fails in one of seven)."""
    pushed = functools.partial(expert_paths, bursts=BURSTS)
    return gridworld.expert_batch(config, n, generator, noise, draw_layouts, pushed)


def expert_data(folder, files, settings, make):
    """Expert episodes kept in a folder, in so many files: [{name: array}]. make(i) makes a missing one.
    Damaged files and those of other `settings` (a dictionary) raise Unusable."""
    parts, started = [], time.time()
    for i in range(files):
        path = Path(folder) / f"{i:03}.npz"
        settings = {**settings, "shard": i}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(unfinished, settings=json.dumps(settings, sort_keys=True), **make(i))
            os.replace(unfinished, path)
            print(f"data: {path} written, {i + 1} of {files}, {time.time() - started:.0f} s", flush=True)
        try:
            with np.load(path, allow_pickle=False) as file:
                part = dict(file)
            found = json.loads(str(part.pop("settings")))
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            why = f"{path} cannot be read ({type(error).__name__}); delete it to make it again"
            raise gridworld.Unusable(why) from None
        for name in sorted({*found, *settings}):
            was, wanted = found.get(name), settings.get(name)
            if was != wanted:
                raise gridworld.Unusable(f"{path} was made with {name}={was}, not {wanted}; delete it")
        parts.append(part)
    return parts


class StoredEpisodes:
    """Expert trajectories kept on disk, in memory end to end: observation, action, subgoal; and their length.
    Each has a row more than steps, for its last observation."""
    def __init__(self, config, noise, folder):
        count = config.trajectories if noise else config.trajectories // 4
        names = ("task", "seed", "size", "colours", "walls", "max_steps", "subgoals")
        settings = {name: getattr(config, name) for name in names}
        settings.update(bursts=BURSTS, noise=noise, episodes=min(FILE, count))

        def make(i):
            seed = 10_000 * (config.seed + 1) + (1000 if noise else 2000) + i
            batch = expert_batch(config, settings["episodes"], torch.Generator().manual_seed(seed), noise)
            kept = F.pad(batch.valid, (1, 0), value=True)  # [B, T+1]
            action, subgoal = F.pad(batch.action, (0, 0, 0, 1))[kept], F.pad(batch.subgoal, (0, 1))[kept]
            return dict(observation=batch.observation[kept].half().numpy(), action=action.half().numpy(),
                        subgoal=subgoal.byte().numpy(), length=batch.length.numpy())

        folder = Path(folder) / f"{config.task}-s{config.seed}-noise{noise:g}"
        parts = expert_data(folder, max(1, count // FILE), settings, make)
        names = ("observation", "action", "subgoal", "length")
        self.observation, self.action, self.subgoal, self.length = (
            torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in names)
        self.start = F.pad((self.length + 1).cumsum(0), (1, -1))  # the first row of each

    def pick(self, episodes):
        """The Trajectories of `episodes` [B]; beyond the end of one its last row is repeated."""
        length = self.length[episodes]
        step = torch.arange(int(length.max()) + 1)
        row = torch.minimum(step, length[:, None]) + self.start[episodes, None]  # [B, T+1]
        return gridworld.Trajectories(self.observation[row].float(), self.action[row[:, :-1]].float(), length,
                                      torch.ones(len(length)), self.subgoal[row[:, :-1]].long())

    def draw(self, n, generator):
        """n of them: their length [n], and pick(rows) → Trajectories, each in a random one of 32 images."""
        # differs from the paper: images of stored episodes, because they are as good as fresh ones.
        random = functools.partial(torch.randint, generator=generator, device=generator.device)
        drawn = random(len(self.length), (n,)).cpu()

        def pick(rows):
            batch = self.pick(drawn[rows]).to(generator.device)
            k = random(SYMMETRIES, (len(rows),))
            observation, action = mirror(batch.observation, batch.action, k, size=None)
            return replace(batch, observation=observation, action=action)
        return SimpleNamespace(length=self.length[drawn], pick=pick)


def source(config, noise, folder):
    """A function (n, generator) → n training trajectories, with length [n] and pick(rows): from files in a
    folder, which are made when they are first needed, or fresh ones without a folder."""
    if folder is None:
        return lambda n, generator: expert_batch(config, n, generator, noise)
    stored = functools.cache(lambda: StoredEpisodes(config, noise, folder))
    return lambda n, generator: stored().draw(n, generator)


def thinned(config, batch, stage, progress, generator):
    """The steps to train on, at progress 0 … 1 of a stage: those that enter a cell, a share of the others.
    What follows a step is then the next one kept. The more are kept, the fewer episodes, down to 1/8."""
    # differs from the paper: thinned, because a model of all steps learns to go on as before, not to choose.
    # At the end of "pretrain" episodes are whole, as they are when the model acts.
    share = THIN ** {"pretrain": 1 - progress ** 2, "gates": (1 - progress ** 3) / 2}.get(stage, 1)
    batch = batch.pick(torch.arange(0, len(batch.length), 1 + 7 * share, device=generator.device).long())
    chosen = torch.rand(batch.valid.shape, generator=generator, device=generator.device) < share
    chosen = (chosen | entries(batch, config.size)) & batch.valid
    length, chosen = chosen.sum(1), F.pad(chosen, (0, 1))  # [B], [B, T+1]
    step = torch.arange(chosen.shape[1], device=chosen.device)
    kept = torch.where(chosen, step, batch.length[:, None]).sort(1).values  # steps, then the last observation
    kept = kept[:, :int(length.max()) + 1]
    row = torch.arange(len(kept), device=kept.device)[:, None]
    before = kept[:, :-1].clamp(max=batch.action.shape[1] - 1)
    return replace(batch, observation=batch.observation[row, kept], action=batch.action[row, before],
                   length=length, subgoal=batch.subgoal[row, before])


def action_floor(config, n, generator):
    """NLL of who knows the task, nats per action: the entropy of the noise; and None, for unknown."""
    return ACTION * (math.log(max(config.noise, 1e-3)) + 0.5 * math.log(2 * math.pi * math.e)), None


def random_success(config, layouts):
    """Not known for torques."""

# --------------------------------------------------------------------------------------------------- pictures

def picture(observation, size, colours, pixels=64):
    """The arena from above, drawn from one observation [D] alone: RGB [G·pixels, G·pixels, 3] uint8, the ant
    black with a white rim. Works without a screen or OpenGL."""
    observation = np.asarray(observation, dtype=np.float64)
    xy = observation[POSITION] * size / 2
    objects, _ = cells_at(xy + observation[OBJECTS].reshape(-1, 2) * size, size)
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
        share = (offset @ axis / max(axis @ axis, 1e-9)).clip(0, 1)[..., None]  # where the line is nearest
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
    """One ant with the Gymnasium interface (a batch of one `Game`). Observation: Box [D] float32, as Game's.
    Action: Box [8], torques in −1 … 1. Info: visits, cell (under the torso), colours, walls (cells), reason
    (why the game ended, or ""). Options of reset: also qpos, which sets the agent, too, and qvel."""
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
                raise ValueError("qpos needs a position inside the arena, a quaternion (3 to 6) of length 1")
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
    """Prints how the expert does in n episodes of each kind, and the simulation's speed; films an episode."""
    def episodes(tasks, sigma, n, seed):
        generator = torch.Generator().manual_seed(seed)
        layouts = draw_layouts(n, 4, 4, 1, generator)
        return layouts, expert_paths(layouts, 4, tasks[torch.arange(n) % len(tasks)], 500, generator, sigma)
    print(f"{n} expert episodes each{'success':>24}{'mean steps':>14}")
    pretraining, withheld = gridworld.pretraining_tasks("singles"), torch.tensor([[0, 1, 2, 3]])
    for name, tasks in (("16 pretraining tasks", pretraining), ("0-1-2-3", withheld)):
        for sigma in (0, 0.1):
            _, paths = episodes(tasks, sigma, n, seed)
            steps = paths.length.float().mean()
            print(f"{f'{name}, σ = {sigma}':32}{paths.success.mean():15.3f}{steps:14.1f}", flush=True)

    layouts, paths = episodes(withheld, 0, 256, seed)
    game, started = Game(layouts, 4, withheld[0], 50), time.perf_counter()
    for t in range(50):
        game.step(paths.action[:, t])
        game.observation()
    speed = game.steps.sum() / (time.perf_counter() - started)
    print(f"simulation, observations, 256 ants, {Simulation.threads} threads: {speed:,.0f} control steps/s")
    _, paths = episodes(withheld, 0, 32, seed + 1)
    chosen = int(paths.success.argmax())  # the first that is solved
    pursued = paths.subgoal[chosen, :paths.length[chosen]].tolist()
    titles = [f"{t * CONTROL_STEP:.1f} s: to {colour}" for t, colour in enumerate(pursued)]
    marked = [colour != before for colour, before in zip(pursued, [None, *pursued])]
    frame = lambda t: picture(paths.observation[chosen, t], 4, 4)
    gridworld.film(frame, [*titles, "end"], [*marked, False], folder / "ant", *FILM)
    print(f"written: {folder / 'ant.png'}, {folder / 'ant.gif'} (twice the real speed)")


def main(arguments=None):
    parser = argparse.ArgumentParser("ant_tasks.py", allow_abbrev=False, description="success, speed, a film")
    parser.error = lambda message: parser.exit(2, f"ant_tasks.py: {message}\n")
    parser.add_argument("--episodes", type=int, default=1000, help="episodes of each kind, 1 … 5000 (1000)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--out", type=Path, default="runs", metavar="FOLDER", help="for ant.png, .gif (runs)")
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
