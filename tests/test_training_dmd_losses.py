"""The terms of distribution matching and of the adversarial game against their formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.diffusion import few_step
from helios_jax.errors import UserError
from helios_jax.training import dmd
from helios_jax.training.dmd import RenoiseConfig

SCHEDULER = few_step.student_scheduler()
SIZE = {"frames": 9, "height": 48, "width": 80}
MU = 1.9191667  # section 2.2 of the specification
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def slopes(function, x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Central differences of a float64 function at some elements of x."""
    out = []
    for place in places:
        step = np.zeros(x.size)
        step[place] = 1e-6
        step = step.reshape(x.shape)
        out.append((function(x + step) - function(x - step)) / 2e-6)
    return np.array(out)


def test_the_beta_distribution_decays_to_the_uniform_one():
    for step, expected in ((0, (4, 1.5)), (250, (2.5, 1.25)), (500, (1, 1)), (900, (1, 1))):
        np.testing.assert_allclose(dmd.beta_parameters(RenoiseConfig(), jnp.int32(step)), expected, rtol=1e-6)


@pytest.mark.parametrize(("numbers", "mean", "quantiles"), [
    (np.random.default_rng(1).beta(4, 1.5, 200_000), 823, (557, 856, 978)),
    (0.001 + 0.999 * np.random.default_rng(2).random(200_000), 607, (93, 658, 973)),
])
def test_timesteps_have_the_specified_distribution(numbers, mean, quantiles):
    timesteps = np.asarray(dmd.score_timestep(RenoiseConfig(), MU, jnp.asarray(numbers, jnp.float32)))
    reference = np.clip(1000 * MU * numbers / (1 + (MU - 1) * numbers), 20, 980)
    np.testing.assert_allclose(timesteps, np.rint(reference), atol=1)
    np.testing.assert_array_equal(timesteps, np.rint(timesteps))
    np.testing.assert_allclose(timesteps.mean(), mean, atol=1.5)
    np.testing.assert_allclose(np.quantile(timesteps, [0.05, 0.5, 0.95]), quantiles, atol=4)


def test_the_scores_table_is_the_shifted_line():
    mu = dmd.score_shift(RenoiseConfig(), SCHEDULER, **SIZE)
    np.testing.assert_allclose(mu, MU, atol=5e-8)
    assert dmd.score_shift(RenoiseConfig(shift=3.0), SCHEDULER, **SIZE) == 3.0
    table = dmd.score_table(mu)
    u = np.linspace(1, 0.001, 1000)
    np.testing.assert_allclose(table.sigmas[:-1], MU * u / (1 + (MU - 1) * u), atol=1e-7)
    sigma = np.asarray(few_step.sigma_at(table, jnp.array([20.0, 500.0, 980.0])))
    np.testing.assert_allclose(sigma, [0.02, 0.5, 0.98], atol=1e-3)  # entries are up to 0.0019 apart


def test_matching_gradient_is_the_normalised_difference_and_reaches_the_chunk_only():
    chunk, fake, real = normal(3, 2, 4, 4, 2), normal(3, 2, 4, 4, 2), normal(3, 2, 4, 4, 2)
    scale = np.abs(chunk - real).mean((1, 2, 3, 4), keepdims=True)
    target = chunk - (fake - real) / scale

    def statement(x):
        return 0.5 * np.mean((x - target) ** 2)

    inputs = [jnp.asarray(x, jnp.float32) for x in (chunk, fake, real)]
    (loss, size), gradients = jax.value_and_grad(dmd.matching_loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
    np.testing.assert_allclose(loss, statement(chunk), rtol=1e-6)
    np.testing.assert_allclose(size, np.abs((fake - real) / scale).mean(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], (fake - real) / scale / chunk.size, rtol=2e-5, atol=1e-9)
    places = np.arange(0, chunk.size, 17)
    np.testing.assert_allclose(np.ravel(gradients[0])[places], slopes(statement, chunk, places), rtol=1e-4, atol=1e-8)
    assert not np.any(gradients[1]) and not np.any(gradients[2])


def test_equal_scores_give_no_gradient_and_a_perfect_chunk_a_finite_one():
    chunk, score = (jnp.asarray(normal(1, 1, 2, 2, 2), jnp.float32) for _ in range(2))
    assert not np.any(jax.grad(lambda x: dmd.matching_loss(x, score, score)[0])(chunk))
    gradient = jax.grad(lambda x: dmd.matching_loss(x, score, chunk)[0])(chunk)  # mean |X - r| is 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["fake", "real"])
def test_a_score_that_is_not_finite_reaches_the_loss(which, bad):
    chunk, fake, real = (jnp.asarray(normal(1, 1, 2, 2, 2), jnp.float32) for _ in range(3))
    scores = {"fake": fake, "real": real}
    scores[which] = scores[which].at[0, 0, 0, 0, 0].set(bad)
    assert not np.isfinite(dmd.matching_loss(chunk, **scores)[0])


def test_flow_loss_and_its_gradient_equal_the_formulas_in_float64():
    velocity, chunk, noise = normal(2, 3, 2, 2, 2), normal(2, 3, 2, 2, 2), normal(2, 3, 2, 2, 2)
    inputs = [jnp.asarray(x, jnp.float32) for x in (velocity, chunk, noise)]
    loss, gradients = jax.value_and_grad(dmd.flow_loss, argnums=(0, 1, 2))(*inputs)
    np.testing.assert_allclose(loss, np.mean((velocity - (noise - chunk)) ** 2), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], 2 * (velocity - (noise - chunk)) / chunk.size, rtol=2e-5, atol=1e-8)
    assert not np.any(gradients[1]) and not np.any(gradients[2])


@pytest.mark.parametrize(("ours", "statement", "count"), [
    (dmd.head_loss, lambda fake, real: np.log1p(np.exp(-fake)).mean() + np.log1p(np.exp(real)).mean(), 2),
    (dmd.adversarial_loss, lambda fake: np.log1p(np.exp(fake)).mean(), 1),
    (dmd.r1_penalty, lambda real, disturbed: np.mean((real - disturbed) ** 2), 2),
])
def test_adversarial_terms_and_their_gradients_equal_the_formulas_in_float64(ours, statement, count):
    logits = [normal(4, 5) for _ in range(count)]
    inputs = [jnp.asarray(x, jnp.float32) for x in logits]
    np.testing.assert_allclose(ours(*inputs), statement(*logits), rtol=1e-6)
    for i in range(count):
        gradient = jax.grad(ours, argnums=i)(*inputs)

        def along(x, i=i):
            return statement(*[x if j == i else logits[j] for j in range(count)])

        np.testing.assert_allclose(np.ravel(gradient), slopes(along, logits[i], np.arange(20)), rtol=2e-4, atol=1e-8)


def test_losses_of_undecided_heads_are_logarithms_of_two():
    zeros = jnp.zeros((2, 5))
    np.testing.assert_allclose([dmd.head_loss(zeros, zeros), dmd.adversarial_loss(zeros)], [2 * np.log(2), np.log(2)],
                               rtol=1e-6)


def test_crops_lie_anywhere_inside_and_the_same_corner_gives_the_same_window():
    latents = jnp.arange(2 * 3 * 4 * 6 * 1, dtype=jnp.float32).reshape(2, 3, 4, 6, 1)
    for corner, (y, x) in ((0.0, (0, 0)), (0.999, (2, 3)), (0.5, (1, 2))):
        window = dmd.crop(latents, jnp.full((2, 2), corner), (2, 3))
        np.testing.assert_array_equal(window, latents[:, :, y:y + 2, x:x + 3])
    np.testing.assert_array_equal(dmd.crop(latents, jnp.full((2, 2), 0.7), (4, 6)), latents)


@pytest.mark.parametrize(("values", "message"), [
    ({"alpha": 0.5}, "objective.renoise.alpha"), ({"decay_steps": 0}, "objective.renoise.decay_steps"),
    ({"lowest": 990}, "objective.renoise.lowest"),
])
def test_wrong_settings_are_named(values, message):
    with pytest.raises(UserError, match=message):
        RenoiseConfig(**values)
