"""UniPC, Euler and DMD as tables of linear coefficients, and one jittable step that serves them all.

A step takes the sample x_i and the velocity v_i the transformer predicted for it. With sigma_i the schedule's sigmas,
every solver is a linear map with coefficients that depend on the schedule alone:

    m_i     = x_i - sigma_i v_i                                                                clean prediction
    c_i     = a_x x_i + a_c c_{i-1} + a_m (m_{i-1} - c_{i-1}) + a_n (m_i - m_{i-1})            corrected sample
              + sum_{k=2..K} a_k (m_{i-k} - m_{i-1})
    x_{i+1} = b_c c_i + b_m (m_i - c_i) + b_v v_i + b_s (s - m_i)                              next sample
              + sum_{k=1..K-1} b_k (m_{i-k} - m_i)

K is the number of earlier predictions that are kept (the UniPC order; 1 otherwise) and s the sample at the beginning
of the stage. The differences keep rounding errors in proportion to the length of the step. The coefficients are
solved for in float64 on the host and stored as float32; the step itself is float32 whatever the velocity's dtype.

**Euler**: c_i = x_i; x_{i+1} = c_i + (sigma_{i+1} - sigma_i) v_i.

**DMD**: c_i = x_i; x_{i+1} = m_i + sigma_{i+1} (s - m_i): the clean prediction is mixed with the start point of the
stage, which is no fresh noise (from the second stage on it contains signal).

**UniPC** of order K in clean prediction. With alpha = 1 - sigma, sigma+ = max(sigma, 1e-8), lambda = ln(alpha/sigma+)
and, for a step from s to t, h = lambda_t - lambda_s, g = -h, phi = e^g - 1, B = phi ("bh2") or g ("bh1"):

    x_t = (sigma+_t / sigma+_s) x_s - alpha_t phi m_s - alpha_t B sum_j rho_j (m_j - m_s) / r_j

where m_j are predictions at other points, r_j = (lambda_j - lambda_s) / h, and rho solves, for the n terms of the sum,

    sum_j r_j^(q-1) rho_j = q! psi_q / B,  q = 1...n;      psi_1 = phi/g - 1,  psi_{q+1} = psi_q/g - 1/(q+1)!

The predictor of order p from i to i+1 uses the p - 1 predictions before m_i (rho = 1/2 for p = 2, as in the
original). The corrector of order p goes once more from i-1 to i, from c_{i-1}, with the p - 1 predictions before
m_{i-1} and the new m_i itself (r = 1; rho = 1/2 for p = 1); p is the order the predictor had there. m_i comes from
the uncorrected x_i. Where the corrector is off, and in the first step, c_i = x_i. Orders rise from 1, and fall to 1
at the end with ``lower_order_final``. The step to sigma = 0 has lambda = ln(1e8), a finite number; a first sigma of 1
has lambda = -inf, which IEEE arithmetic carries through.

Sources: diffusers ``HeliosScheduler.step_unipc``, ``.step_euler`` and ``HeliosDMDScheduler.step``. Under bfloat16 the
original rounds sigma * v (and Euler and DMD the sample itself) to bfloat16; here these stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import SchedulerConfig
from helios_jax.diffusion.schedules import Schedule
from helios_jax.errors import UserError

_SMALLEST_SIGMA = 1e-8


class Coefficients(NamedTuple):
    """The coefficients of every step, float32, with the step as leading axis n (letters as in the module's formulas).

    A pytree: scan over it, or take one row with :func:`row`.
    """

    sigma: np.ndarray  # [n] sigma_i
    correct_sample: np.ndarray  # [n] a_x
    correct_last: np.ndarray  # [n] a_c
    correct_toward: np.ndarray  # [n] a_m
    correct_newest: np.ndarray  # [n] a_n
    correct_older: np.ndarray  # [n, K - 1] a_k, k = 2...K
    predict_sample: np.ndarray  # [n] b_c
    predict_toward: np.ndarray  # [n] b_m
    predict_velocity: np.ndarray  # [n] b_v
    predict_start: np.ndarray  # [n] b_s
    predict_older: np.ndarray  # [n, K - 1] b_k, k = 1...K-1

    @property
    def memory(self) -> int:
        """K, the number of earlier predictions that the state holds."""
        return self.correct_older.shape[-1] + 1


class SolverState(NamedTuple):
    """What a step needs of the steps before it; all float32.

    Attributes:
      sample: x_i, [B, T, h, w, C].
      last: c_{i-1}, [B, T, h, w, C].
      predictions: m_{i-1}...m_{i-K}, newest first, [K, B, T, h, w, C].
      start: s, the sample at the beginning of the stage, [B, T, h, w, C].
    """

    sample: jax.Array
    last: jax.Array
    predictions: jax.Array
    start: jax.Array


def init_state(sample: jax.Array, memory: int) -> SolverState:
    """The state at the beginning of a stage; nothing is carried over from another stage or chunk.

    Args:
      sample: [B, T, h, w, C], any float dtype.
      memory: :attr:`Coefficients.memory`.
    """
    sample = sample.astype(jnp.float32)
    return SolverState(sample, jnp.zeros_like(sample), jnp.zeros((memory, *sample.shape), jnp.float32), sample)


def row(coefficients: Coefficients, step: int | jax.Array) -> Coefficients:
    """The coefficients of one step; the index may be traced."""
    return jax.tree.map(lambda c: jnp.asarray(c)[step], coefficients)


def step(coefficients: Coefficients, state: SolverState, velocity: jax.Array) -> SolverState:
    """One solver step.

    Args:
      coefficients: one row (no leading axis).
      velocity: [B, T, h, w, C], the guided prediction for ``state.sample``; any float dtype.
    Returns: the state of the next step.
    """
    co, x, last, velocity = coefficients, state.sample, state.last, velocity.astype(jnp.float32)
    newest, (previous, *older) = x - co.sigma * velocity, state.predictions
    # Sums are written out: a matrix product would be at the mercy of the backend's default precision.
    corrected = co.correct_sample * x + co.correct_last * last + co.correct_toward * (previous - last)
    corrected = corrected + co.correct_newest * (newest - previous)
    for k, m in enumerate(older):
        corrected = corrected + co.correct_older[k] * (m - previous)
    sample = co.predict_sample * corrected + co.predict_toward * (newest - corrected)
    sample = sample + co.predict_velocity * velocity + co.predict_start * (state.start - newest)
    for k, m in enumerate([previous, *older][: len(older)]):
        sample = sample + co.predict_older[k] * (m - newest)
    predictions = jnp.concatenate([newest[None], state.predictions[:-1]])  # [K, B, T, h, w, C]
    return SolverState(sample, corrected, predictions, state.start)


def solver_coefficients(config: SchedulerConfig, schedule: Schedule) -> Coefficients:
    """The coefficients of the scheduler's solver for one stage.

    Raises:
      UserError: ``solver_order`` is less than 1.
    """
    if config.is_dmd:
        return _dmd(schedule)
    return _euler(schedule) if config.scheduler_type == "euler" else _unipc(config, schedule)


def _plain(steps: int, memory: int = 1) -> dict[str, np.ndarray]:
    """Float64 columns of a solver that neither corrects nor moves: every step leaves the sample alone."""
    columns = {name: np.zeros(steps) for name in Coefficients._fields}
    return columns | {"correct_sample": np.ones(steps), "predict_sample": np.ones(steps),
                      "correct_older": np.zeros((steps, memory - 1)), "predict_older": np.zeros((steps, memory - 1))}


def _table(columns: dict[str, np.ndarray]) -> Coefficients:
    return Coefficients(**{name: column.astype(np.float32) for name, column in columns.items()})


def _euler(schedule: Schedule) -> Coefficients:
    return _table(_plain(schedule.num_steps) | {"sigma": schedule.sigmas[:-1],
                                                "predict_velocity": np.diff(schedule.sigmas)})


def _dmd(schedule: Schedule) -> Coefficients:
    n = schedule.num_steps
    # The original finds a step's sigma by searching the truncated timestep. With dozens of steps, or a very strong
    # shift, that can hit a neighbour; it is reproduced.
    found = np.abs(schedule.timesteps[None] - np.trunc(schedule.timesteps)[:, None]).argmin(axis=1)  # [n, n] -> [n]
    sigma = schedule.sigmas[found]
    return _table(_plain(n) | {"sigma": sigma, "predict_toward": np.ones(n),
                               "predict_start": np.append(sigma[1:], 0.0)})


def _unipc(config: SchedulerConfig, schedule: Schedule) -> Coefficients:
    n, highest = schedule.num_steps, config.solver_order
    if highest < 1:
        raise UserError(f"solver_order: must be at least 1, got {highest}")
    update = _UniPCUpdate(config, schedule.sigmas)
    columns = _plain(n, memory=highest) | {"sigma": schedule.sigmas[:-1]}
    order = 0
    for i in range(n):
        if i > 0 and i - 1 not in config.disable_corrector:
            # ``order`` is still the one of the predictor that led here.
            older, newest = range(i - 2, i - 1 - order, -1), [i]
            columns["correct_sample"][i] = 0
            columns["correct_last"][i], columns["correct_toward"][i], weights = update(
                i - 1, i, [*older, *newest], simple=order == 1)
            columns["correct_older"][i, : order - 1], columns["correct_newest"][i] = weights[:-1], weights[-1]
        order = min(highest, n - i, i + 1) if config.lower_order_final else min(highest, i + 1)
        columns["predict_sample"][i], columns["predict_toward"][i], weights = update(
            i, i + 1, range(i - 1, i - order, -1), simple=order == 2)
        columns["predict_older"][i, : order - 1] = weights
    return _table(columns)


class _UniPCUpdate:
    """The weights of one UniPC update between two points of a schedule."""

    def __init__(self, config: SchedulerConfig, sigmas: np.ndarray):
        with np.errstate(divide="ignore"):  # a first sigma of 1 has lambda = -inf
            if config.use_flow_sigmas:
                self.alpha, self.sigma = 1 - sigmas, np.maximum(sigmas, _SMALLEST_SIGMA)
            else:
                self.alpha = 1 / np.sqrt(sigmas**2 + 1)
                self.sigma = sigmas * self.alpha
            self.lambdas = np.log(self.alpha) - np.log(self.sigma)
        self.bh1 = config.solver_type == "bh1"

    def __call__(self, s: int, t: int, others: Sequence[int], simple: bool) -> tuple[float, float, np.ndarray]:
        """Weights of x_s, of (m_s - x_s) and of (m_j - m_s) for every j of ``others`` in the step from s to t.

        ``simple``: rho is 1/2 instead of the solution of the equations (one point in ``others``).
        """
        h = self.lambdas[t] - self.lambdas[s]
        g, phi = -h, np.expm1(-h)
        scale = g if self.bh1 else phi
        ratios = np.array([1.0 if j == t else (self.lambdas[j] - self.lambdas[s]) / h for j in others])
        rhos = np.array([0.5]) if simple else _solve_rhos(g, phi, scale, ratios)
        toward = -self.alpha[t] * phi
        return self.sigma[t] / self.sigma[s] + toward, toward, -self.alpha[t] * scale * rhos / ratios


def _solve_rhos(g: float, phi: float, scale: float, ratios: np.ndarray) -> np.ndarray:
    if not len(ratios):
        return np.zeros(0)
    psi, right = phi / g - 1, []
    for q in range(1, len(ratios) + 1):
        right.append(psi * math.factorial(q) / scale)
        psi = psi / g - 1 / math.factorial(q + 1)
    powers = ratios[None, :] ** np.arange(len(ratios))[:, None]  # row q - 1 holds r_j^(q-1)
    return np.linalg.solve(powers, np.array(right))
