"""The student's rollout against a NumPy statement in float64: values, and what gradients reach for every exit."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import few_step
from helios_jax.diffusion.schedules import stage_table
from helios_jax.errors import UserError
from helios_jax.training.rollout import RolloutConfig, RolloutNoise, level_grids, rollout

SCHEDULER = few_step.student_scheduler()
TABLE = stage_table(SCHEDULER)
SIZE = (8, 16, 3)
FRAMES = 9
# Section 2.3 of the specification depends on the size; these are its formulas for 8 x 16 latents, in float64.
BLOCK_FACTOR = np.linalg.cholesky(4 / 3 * (np.eye(4) - np.ones((4, 4)) / 4) + 1e-8 * np.eye(4))
MU = [0.5 + (FRAMES * (8 >> i) * (16 >> i) / 4 - 256) * 0.65 / 3840 for i in (2, 1, 0)]


def reference_grid(stage: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [N] and sigmas [N + 1] of section 2.3."""
    times = TABLE[stage].timesteps()
    sigmas = np.append(np.linspace(0.999, 0.000999, count + 1)[:-1], 0)
    sigmas = MU[stage] * sigmas / (1 + (MU[stage] - 1) * sigmas)
    return times.min() + sigmas[:-1] * (times.max() - times.min()), sigmas


def velocity(gains: jax.Array, x: jax.Array, timestep: jax.Array) -> jax.Array:
    """A network with one parameter per level, which it tells by the size."""
    level = {2: 0, 4: 1, 8: 2}[x.shape[2]]
    return gains[level] * jnp.sin(x + (timestep / 500)[:, None, None, None, None])


def reference(gains: np.ndarray, held: np.ndarray, exits: tuple[int, ...], count: int, noise: RolloutNoise
              ) -> np.ndarray:
    """Section 5 for one sample: the chunk as a function of the gains, all that gradients do not reach being made with
    ``held``."""
    trained = constant = np.asarray(noise.start, np.float64)
    for stage in range(3):
        times, sigmas = reference_grid(stage, count)

        def clean(x, gain, i, times=times, sigmas=sigmas):
            return x - sigmas[i] * gain * np.sin(x + times[i] / 500)

        if stage:
            z = np.asarray(noise.blocks[stage - 1], np.float64) @ BLOCK_FACTOR.T
            t, y, x, c, _ = z.shape
            block = z.reshape(t, y, x, c, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(t, 2 * y, 2 * x, c)
            trained, constant = (TABLE[stage].alpha * np.kron(v, np.ones((1, 2, 2, 1))) + TABLE[stage].beta * block
                                 for v in (trained, constant))
        start = constant
        for i in range(exits[stage]):
            constant = (1 - sigmas[i + 1]) * clean(constant, held[stage], i) + sigmas[i + 1] * start
        if exits[stage]:
            trained = constant
        trained, constant = (clean(trained, gains[stage], exits[stage]), clean(constant, held[stage], exits[stage]))
    return trained


GAINS = np.array([0.7, -0.4, 0.9])


@functools.cache
def draw(batch: int) -> RolloutNoise:
    keys = jax.random.split(jax.random.key(0), batch)
    return jax.vmap(lambda key: RolloutNoise.draw(key, 3, FRAMES, SIZE))(keys)


@functools.cache
def compiled(config: RolloutConfig):
    grids = level_grids(config, SCHEDULER, frames=FRAMES, height=SIZE[0], width=SIZE[1])
    weights = np.random.default_rng(1).standard_normal((2, FRAMES, *SIZE)).astype(np.float32)

    def score(gains, noise, is_first, exits):
        chunk = rollout(velocity, gains, grids, TABLE, noise, is_first, exits)
        return jnp.mean(chunk * weights, axis=(1, 2, 3, 4)), chunk

    values = jax.jit(lambda *a: score(*a)[1])
    return weights, values, jax.jit(jax.jacrev(lambda *a: score(*a)[0]))


def check(config: RolloutConfig, is_first: list[bool], uniforms: tuple[float, ...], expected: list[tuple[int, ...]]):
    """Values and gradients of every sample; returns which levels' gradients are not zero, [B, 3]."""
    weights, values, gradients = compiled(config)
    noise, counts = draw(2), [4 if first and config.amplify_first_chunk else 2 for first in is_first]
    gains, first, exits = (jnp.asarray(a, d) for a, d in ((GAINS, jnp.float32), (is_first, bool),
                                                           (uniforms, jnp.float32)))
    ours, gradient = values(gains, noise, first, exits), np.asarray(gradients(gains, noise, first, exits))
    for sample in range(2):
        own = jax.tree.map(lambda leaf, sample=sample: leaf[sample], noise)

        def score(gains, own=own, sample=sample):
            chunk = reference(gains, GAINS, expected[sample], counts[sample], own)
            return chunk, np.mean(chunk * weights[sample])

        np.testing.assert_allclose(ours[sample], score(GAINS)[0], atol=1e-5)
        for level, direction in enumerate(1e-6 * np.eye(3)):
            slope = (score(GAINS + direction)[1] - score(GAINS - direction)[1]) / 2e-6
            np.testing.assert_allclose(gradient[sample, level], slope, atol=3e-7)
    return gradient != 0


@pytest.mark.parametrize("exits", itertools.product((0, 1), repeat=3))
def test_gradients_reach_a_level_where_every_exit_above_it_is_the_first(exits):
    """Section 5's table over all exits of [2, 2, 2]; both samples have history."""
    reached = check(RolloutConfig(), [False, False], tuple((e + 0.5) / 2 for e in exits), [exits, exits])
    expected = [exits[1] == exits[2] == 0, exits[2] == 0, True]
    assert (reached == np.array(expected)).all()


@pytest.mark.parametrize(("uniforms", "long", "short"), [
    ((0.1, 0.1, 0.1), (0, 0, 0), (0, 0, 0)), ((0.1, 0.3, 0.1), (0, 1, 0), (0, 0, 0)),
    ((0.1, 0.1, 0.3), (0, 0, 1), (0, 0, 0)), ((0.9, 0.6, 0.3), (3, 2, 1), (1, 1, 0)),
    ((0.6, 0.9, 0.7), (2, 3, 2), (1, 1, 1)),
])
def test_a_sample_without_history_takes_four_steps_beside_one_that_takes_two(uniforms, long, short):
    reached = check(RolloutConfig(), [True, False], uniforms, [long, short])
    for sample, exits in enumerate((long, short)):
        assert list(reached[sample]) == [exits[1] == exits[2] == 0, exits[2] == 0, True]


def test_without_amplification_all_samples_take_the_same_steps():
    check(RolloutConfig(amplify_first_chunk=False), [True, False], (0.6, 0.1, 0.6), [(1, 0, 1)] * 2)


def test_grids_at_the_published_size_are_the_specified_ones():
    first, second, third = level_grids(RolloutConfig(), SCHEDULER, frames=9, height=48, width=80)
    np.testing.assert_allclose(first.timesteps, [[998.5342, 833.9636, 0, 0], [998.5342, 902.2183, 833.9636, 783.066]],
                               atol=1e-4)
    np.testing.assert_allclose(second.sigmas, [[0.998784, 0.451240, 0, 0, 0],
                                               [0.998784, 0.711008, 0.451240, 0.215580, 0]], atol=1e-6)
    np.testing.assert_array_equal(third.counts, [2, 4])
    sampled = level_grids(RolloutConfig(shift_from="previous"), SCHEDULER, frames=9, height=48, width=80)
    np.testing.assert_array_equal(sampled[2].timesteps[0], [385, 174, 0, 0])  # whole numbers, as sampling has them


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="objective.rollout.steps: two or more"):
        RolloutConfig(steps=(2,))
    with pytest.raises(UserError, match="objective.rollout.shift_from: 'own' or 'previous', got 'next'"):
        RolloutConfig(shift_from="next")
