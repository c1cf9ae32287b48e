"""The heads against PyTorch, their sizes, and the features that the transformer gives them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.models.discriminator import _CONVOLUTIONS, Discriminator, Head, convolve
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import dmd

TINY = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, text_dim=6,
                         freq_dim=8, ffn_dim=16, num_layers=4, rope_dim=(4, 2, 2))


def size_of(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_heads_have_the_specified_number_of_parameters():
    heads = Discriminator(768, 32, (5, 15, 25, 35))
    params = jax.eval_shape(lambda key: heads.init(key, 16, 5120), jax.random.key(0))
    assert size_of(params["velocity"]) == 113_002_753
    assert size_of(params["blocks"]) == 4 * 218_839_297


def test_features_keep_the_specified_shapes():
    """Section 8.2: the grid of a 24 x 40 crop on its way through the heads."""
    for grid, expected in (((9, 12, 20), [(9, 12, 20), (4, 6, 10), (2, 3, 5), (1, 3, 5), (1, 3, 5), (1, 3, 5)]),
                           ((9, 24, 40), [(9, 24, 40), (4, 12, 20), (2, 6, 10), (1, 6, 10), (1, 6, 10), (1, 6, 10)])):
        head = Head(8, 4, jnp.float32)
        x = jax.ShapeDtypeStruct((2, *grid, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: head.init(jax.random.key(0), x), x)  # noqa: B023
        _, state = jax.eval_shape(lambda v, x: head.apply(v, x, capture_intermediates=True), variables, x)  # noqa: B023
        shapes = [state["intermediates"][f"conv_{i}"]["__call__"][0].shape[1:4] for i in range(6)]
        assert shapes == expected


def test_a_head_equals_pytorch():
    torch = pytest.importorskip("torch")
    width, groups, channels = 8, 4, 3
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 8, 12, channels)).astype(np.float32)
    head = Head(width, groups, jnp.float32)
    params = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32),
                          jax.eval_shape(head.init, jax.random.key(0), x)["params"])
    y = torch.from_numpy(x).double().movedim(-1, 1)
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 1, 1), (2, 1, 1), (1, 1, 1))
    for i, stride in enumerate(strides):
        conv, norm = params[f"conv_{i}"], params[f"norm_{i}"]
        weight = torch.from_numpy(conv["kernel"]).double().permute(4, 3, 0, 1, 2)
        y = torch.nn.functional.conv3d(y, weight, torch.from_numpy(conv["bias"]).double(), stride,
                                       (0 if i == 5 else 1, 1, 1))
        y = torch.nn.functional.group_norm(y, groups, *(torch.from_numpy(norm[n]).double() for n in ("scale", "bias")))
        y = torch.nn.functional.silu(y)
    expected = y.mean((2, 3, 4)).numpy() @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(head.apply({"params": params}, x), expected[:, 0], atol=2e-5)


@pytest.mark.parametrize(("kernel", "strides", "padding"), _CONVOLUTIONS)
def test_both_forms_of_a_convolution_agree_with_their_gradients(kernel, strides, padding):
    x, weights, out = (jax.random.normal(jax.random.key(i), shape)
                       for i, shape in enumerate(((2, 5, 7, 6, 3), (*kernel, 3, 4), (4,))))

    def loss(x, weights, form):
        y = convolve(x, weights, strides, padding, form)
        return (jnp.sin(y) * out).sum(), y

    (_, got), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weights, "windows")
    (_, want), expected = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weights, "3d")
    for a, b in zip((got, *gradients), (want, *expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_heads_for_a_tpu_or_a_gpu_keep_the_convolution():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), (), abstract_device=device)
    head, x = Head(8, 4, jnp.float32), jnp.zeros((1, 9, 8, 8, 3))
    params = head.init(jax.random.key(0), x)

    def primitives():
        return str(jax.make_jaxpr(lambda x: head.apply(params, x))(x)).count("conv_general_dilated")

    assert primitives() == 0
    with jax.sharding.use_abstract_mesh(mesh):
        assert primitives() == 6


def test_start_values_lie_where_pytorch_puts_them():
    head, x = Head(16, 4, jnp.float32), jnp.zeros((1, 9, 8, 8, 16))
    params = jax.jit(lambda key: head.init(key, x)["params"]["conv_1"])(jax.random.key(0))
    bound = 1 / np.sqrt(64 * 16)
    for leaf in params.values():
        assert np.abs(leaf).max() <= bound
    np.testing.assert_allclose(np.std(params["kernel"]), bound / np.sqrt(3), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("r1_weight", "lowest", "highest"), [(0.1, 0.0, 1.1), (100.0, 1.3, 1.5)])
def test_heads_learn_plain_differences_unless_the_penalty_holds_them(r1_weight, lowest, highest):
    """Noisy latents of mean 1 and spread 0.3 against mean 0 and spread 1. Chance is 2 log 2 = 1.386. The penalty's
    weight of 100, beside the heads' of 0.01, is the original's."""
    heads = Discriminator(16, 4, (0, 1))
    params = heads.init(jax.random.key(0), 2, 2)
    optimizer = optax.adam(5e-4, b1=0.0)

    def logits(params, x):
        return heads.apply(params, x, jnp.stack([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]]))

    @jax.jit
    def step(params, state, key):
        noise, clean, extra = jax.random.normal(key, (3, 4, 9, 8, 8, 2))
        sigma = jax.random.uniform(jax.random.fold_in(key, 1), (4, 1, 1, 1, 1), minval=0.3, maxval=0.9)
        fake, real = ((1 - sigma) * x + sigma * noise for x in (clean, 1 + 0.3 * clean))

        def loss(params):
            of_real = logits(params, real)
            judged = dmd.head_loss(logits(params, fake), of_real)
            penalty = dmd.r1_penalty(of_real, logits(params, real + 0.1 * extra))
            return 0.01 * judged + r1_weight * penalty, judged

        (_, judged), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, judged

    state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 40):
        params, state, judged = step(params, state, key)
        losses.append(float(judged))
    assert lowest < np.mean(losses[-20:]) < highest


def test_grids_that_vanish_in_the_heads_are_refused():
    heads = Discriminator(8, 4, (0,))
    heads.check_grid(9, 12, 20)
    with pytest.raises(UserError, match="objective.gan.crop: 9x2x4 tokens are too few"):
        heads.check_grid(9, 2, 4)


# --- The transformer's features --------------------------------------------------------------------------------------

LAYOUT = HistoryLayout()


def inputs(rng: np.random.Generator, size=(4, 8), history_size=(8, 16)):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    history = LAYOUT.split(normal(2, 19, *history_size, 3), normal(2, 1, *history_size, 3))
    return normal(2, 9, *size, 3), jnp.array([300.0, 700.0]), normal(2, 5, 6), history


def params_of(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32),
                        abstract_params("transformer", config))


@pytest.mark.parametrize("options", [{}, {"unroll": 0}, {"remat": "nothing_saveable"}], ids=str)
def test_features_are_the_tokens_behind_their_blocks_and_leave_the_velocity_alone(options):
    """The tokens behind block n are the last ones of a model that ends there."""
    latents, timestep, rows, history = inputs(np.random.default_rng(0))
    params = params_of(TINY)

    def run(model, params, **extra):
        def forward(params):
            variables = {"params": params}
            text = model.text_rows(variables, rows, jnp.array([5, 3]))
            return model.apply(variables, latents, timestep, text, history, **extra)

        return jax.jit(forward)(params)

    model = HeliosTransformer(TINY, **options)
    velocity, tokens = run(model, params, features=(2, 0))
    np.testing.assert_array_equal(velocity, run(model, params))
    assert tokens.shape == (2, 2, 9, 2, 4, 16)
    for got, last in zip(tokens, (2, 0), strict=True):
        config = dataclasses.replace(TINY, num_layers=last + 1)
        cut = params | {"blocks": jax.tree.map(lambda leaf: leaf[:last + 1], params["blocks"])}  # noqa: B023
        _, expected = run(HeliosTransformer(config), cut, features=(last,))
        np.testing.assert_allclose(got, expected[0], atol=2e-5)


def test_rematerialised_features_keep_no_copy_per_layer():
    """The gradient through features of a scanned, rematerialised model stores them once, not once per layer."""
    config = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, text_dim=6,
                               freq_dim=8, ffn_dim=16, num_layers=7, rope_dim=(4, 2, 2))
    latents, timestep, rows, history = inputs(np.random.default_rng(0))
    model = HeliosTransformer(config, remat="nothing_saveable")

    def loss(params):
        variables = {"params": params}
        text = model.text_rows(variables, rows, jnp.array([5, 3]))
        velocity, tokens = model.apply(variables, latents, timestep, text, history, features=(1, 3))
        return jnp.mean(velocity**2) + jnp.mean(jnp.sin(tokens))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(abstract_params("transformer", config)))
    assert "f32[7,2,152,16]" in jaxpr  # the inputs of the blocks: 80 tokens of history and 72 current ones
    assert "f32[7,3,2,72,16]" not in jaxpr
