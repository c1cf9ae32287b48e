"""The autoencoder's training: its loss, its start, what it exports, and the trained VAE in the box."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import VAEConfig
from helios_jax.convert.state_dict import params_to_torch_state_dict
from helios_jax.data import reader, shapes
from helios_jax.errors import UserError
from helios_jax.models.vae import normalize_latents
from helios_jax.training import autoencoder
from helios_jax.training.autoencoder import Config
from helios_jax.training.checkpoint import read_params
from helios_jax.training.config import OptimizerConfig, RunConfig, run_config
from helios_jax.training.loop import train

# As few layers as the architecture allows: compiling takes the time.
TINY = VAEConfig(base_dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=0)
SMALL = dict(vae=TINY, frames=5, height=32, width=32, section_frames=5, eval_clips=1, stat_clips=2)
BOX = Path(__file__).resolve().parents[1] / "assets" / "helios-tiny" / "vae"


def small_run(**objective) -> RunConfig:
    return RunConfig(objective=Config(**{**SMALL, **objective}), objective_name="autoencoder", batch_size=2,
                     num_steps=12, log_every=4, sample_every=12, checkpoint_every=100, ema_decay=0.5, tensorboard=False,
                     optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of the real loop, a few steps long: its folder and its progress lines."""
    folder, lines = tmp_path_factory.mktemp("autoencoder"), []
    train(small_run(), folder, print_line=lines.append)
    return folder, lines


def test_training_through_the_loop_lowers_the_loss(trained):
    records = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]


def test_a_run_reports_quality_on_held_out_clips_and_shows_them(trained):
    records = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    evaluation = records[-1]
    config, params = autoencoder.load_vae(trained[0] / "export")
    exported = autoencoder.reconstruct(params, config, clips=1, frames=5)[0].psnr
    assert evaluation["eval/psnr"] == pytest.approx(exported, abs=0.05)  # the export is rounded to 16 bits
    assert 0 <= evaluation["eval/reader"] <= 1 and evaluation["eval/latent_std_smallest"] > 0
    assert [path.name for path in (trained[0] / "samples").iterdir()] == ["00000012_reconstruction.mp4"]


def test_exported_vae_gives_the_same_numbers_in_diffusers(trained):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKLWan

    oracle = AutoencoderKLWan.from_pretrained(trained[0] / "export", torch_dtype=torch.float32)
    config, params = autoencoder.load_vae(trained[0] / "export")
    assert tuple(oracle.config.latents_std) == config.latents_std != VAEConfig().latents_std
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 32, 40, 3)).astype(np.float32)
    mean, logvar = autoencoder._encode(params, video, config)
    with torch.no_grad():
        posterior = oracle.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
        decoded = oracle.decode(posterior.mean).sample
    for ours, theirs in ((mean, posterior.mean), (logvar, posterior.logvar),
                         (autoencoder._decode(params, mean, config), decoded)):
        theirs = theirs.permute(0, 2, 3, 4, 1).numpy()
        assert np.abs(ours - theirs).max() < 1e-5 * (theirs.max() - theirs.min())


def test_exported_weights_are_the_averaged_parameters_in_half_precision(trained):
    average = read_params(trained[0], prefer_ema=True)
    current = read_params(trained[0], prefer_ema=False)
    stored = autoencoder.load_vae(trained[0] / "export", dtype=None)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.float16)}

    def equals(tree):
        return jax.tree.all(jax.tree.map(lambda a, p: (np.float16(a) == p).all(), tree, stored))

    assert equals(average) and not equals(current)


def test_exported_statistics_normalise_sampled_latents(trained):
    config, params = autoencoder.load_vae(trained[0] / "export")
    latents = []
    for number in range(2):  # the clips over which the export measured
        clip = shapes.sample_clip(autoencoder._MEASURE_SEED + number, "train", 5)
        mean, logvar = autoencoder._encode(params, autoencoder.to_video(clip.frames)[None], config)
        noise = np.random.default_rng(number).standard_normal((200, *mean.shape[1:])).astype(np.float32)
        latents.append(normalize_latents(mean + jnp.exp(0.5 * logvar) * noise, config))
    z = np.concatenate(latents).astype(np.float64)
    assert np.abs(z.mean((0, 1, 2, 3))).max() < 0.02
    assert np.abs(z.std((0, 1, 2, 3)) - 1).max() < 0.02


def test_a_run_continues_from_an_exported_vae(trained):
    export = trained[0] / "export"
    objective = autoencoder.build(small_run(init_from=str(export)))
    abstract = jax.eval_shape(objective.init_params, jax.random.key(0))
    loaded = objective.load_params(abstract)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), loaded) == jax.tree.map(lambda p: (p.shape, p.dtype), abstract)
    stored = params_to_torch_state_dict("vae", TINY, autoencoder.load_vae(export)[1])
    assert all((stored[name] == tensor).all() for name, tensor in
               params_to_torch_state_dict("vae", TINY, loaded).items())


def test_a_vae_of_other_sizes_is_refused_as_start(trained):
    other = small_run(init_from=str(trained[0] / "export"), vae=VAEConfig(base_dim=4))
    objective = autoencoder.build(other)
    with pytest.raises(UserError, match="init_from.*other sizes"):
        objective.load_params(jax.eval_shape(objective.init_params, jax.random.key(0)))


def test_training_the_decoder_alone_keeps_latents_and_statistics(trained, tmp_path):
    export = trained[0] / "export"
    run = dataclasses.replace(small_run(init_from=str(export), trained_part="decoder"), num_steps=2, sample_every=0)
    train(run, tmp_path, print_line=lambda line: None)
    before, after = autoencoder.load_vae(export, dtype=None), autoencoder.load_vae(tmp_path / "export", dtype=None)
    assert before[0] == after[0]  # statistics included
    same = {name: jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before[1][name], after[1][name]))
            for name in before[1]}
    assert same == {"encoder": True, "quant_conv": True, "post_quant_conv": False, "decoder": False}


def test_training_the_decoder_alone_needs_a_vae_to_start_from():
    with pytest.raises(UserError, match="trained_part.*init_from"):
        Config(trained_part="decoder")


def test_training_shows_no_held_out_combination():
    iterator = iter(autoencoder.build(dataclasses.replace(small_run(), batch_size=64)).dataset)
    held_out = {tuple(names.index(value) for names, value in
                      zip(shapes.ATTRIBUTE_VALUES.values(), dataclasses.astuple(combination), strict=True))
                for combination in shapes.held_out_combinations()}
    seen = {tuple(row) for _ in range(8) for row in next(iterator)["attributes"].tolist()}
    assert len(seen) > 300 and not seen & held_out


# --- The loss --------------------------------------------------------------------------------------------------------


def test_kl_equals_the_divergence_of_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = np.random.default_rng(0).standard_normal((2, 8, 3, 4, 5)).astype(np.float32)
    oracle = DiagonalGaussianDistribution(torch.from_numpy(moments)).kl().sum() / (moments.size / 2)
    mean, logvar = np.split(moments, 2, axis=1)
    assert float(autoencoder.kl_divergence(mean, logvar)) == pytest.approx(float(oracle), rel=1e-5)


def test_psnr_is_that_of_pixels_in_0_to_255():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    want = 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())
    error = np.asarray(autoencoder.to_video(a)) - np.asarray(autoencoder.to_video(b))
    assert float(autoencoder.psnr(np.square(error).mean())) == pytest.approx(want, rel=1e-5)
    assert (autoencoder.to_frames(autoencoder.to_video(a)) == a).all()


def test_difference_loss_sees_edges_and_flicker_but_no_constant_error():
    error = np.zeros((1, 5, 8, 8, 3), np.float32)
    assert float(autoencoder.difference_loss(error + 0.3)) == 0
    edge, flicker = error.copy(), error.copy()
    edge[:, :, :, 4:] = 1  # one of 7 column differences is 1
    flicker[:, 2:] = 1  # one of 4 frame differences is 1
    assert float(autoencoder.difference_loss(edge)) == pytest.approx(1 / 7 / 3)
    assert float(autoencoder.difference_loss(flicker)) == pytest.approx(1 / 4 / 3)
    assert float(autoencoder.difference_loss(edge[:, :1])) == pytest.approx(1 / 7 / 2)  # no time axis in an image


def test_loss_is_the_weighted_sum_of_its_parts():
    config = Config(**SMALL, l1_weight=0.7, l2_weight=1.3, gradient_weight=0.2, kl_weight=0.01)
    params = jax.jit(autoencoder.build(small_run()).init_params)(jax.random.key(1))
    video = jax.random.uniform(jax.random.key(2), (2, 1, 32, 32, 3), minval=-1.0)
    loss, parts = jax.jit(autoencoder.vae_loss, static_argnums=3)(params, video, jax.random.key(3), config)
    want = 0.7 * parts["l1"] + 1.3 * parts["l2"] + 0.2 * parts["gradient"] + 0.01 * parts["kl"]
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    assert float(parts["psnr"]) == pytest.approx(10 * np.log10(4 / float(parts["l2"])), rel=1e-5)


def test_a_network_at_its_start_treats_frames_alone():
    objective = autoencoder.build(small_run())
    params = jax.jit(objective.init_params)(jax.random.key(0))
    video = jax.random.uniform(jax.random.key(1), (1, 5, 32, 32, 3), minval=-1.0)

    def encode(video):
        return autoencoder._encode(params, video, TINY)[0]

    # The temporal downsamplers keep the newest frame but are convolutions with noise: alone means no 3x3x3 past.
    changed = video.at[:, 0].add(0.5)
    assert float(jnp.abs(encode(video)[:, 0] - encode(changed)[:, 0]).max()) > 1e-3
    kernel = params["decoder"]["up_blocks_3"]["resnets_0"]["conv1"]["kernel"]
    assert (kernel[:2] == 0).all() and float(kernel[2].std()) > 0
    single = encode(video[:, :1])
    np.testing.assert_allclose(encode(video)[:, :1], single, atol=1e-5)


@pytest.mark.parametrize("field, value", [
    ("frames", 6), ("frames", 0), ("section_frames", 32), ("height", 60), ("width", 24), ("kl_weight", -1.0),
    ("latent_noise", -0.1), ("invert_channels", 1.5), ("eval_clips", 0), ("stat_clips", 0), ("export_dtype", "int8"),
    ("trained_part", "encoder")])
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"objective.{field}.*{value}"):
        run_config({"objective": {"name": "autoencoder", field: value}})


# --- The VAE in the box ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def box():
    return autoencoder.load_vae(BOX)


def test_the_box_holds_sixteen_bit_weights_of_the_stated_size():
    config, params = autoencoder.load_vae(BOX, dtype=None)
    assert (config.base_dim, config.z_dim, config.scale_factor_spatial, config.scale_factor_temporal) == (8, 16, 8, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert (BOX / "diffusion_pytorch_model.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_box_reconstructs_held_out_clips_so_that_every_attribute_can_be_read(box, noise):
    config, params = box
    results = autoencoder.reconstruct(params, config, clips=6, noise=noise)
    score = reader.score([reader.read(r.frames) for r in results], [r.clip.attributes for r in results])
    assert score.all_fields == 1.0, score
    assert np.mean([r.psnr for r in results]) > (32 if noise == 0 else 30)


@pytest.mark.slow
def test_latent_statistics_of_the_box_are_those_of_its_latents(box):
    config, params = box
    mean, std = autoencoder.latent_statistics(params, config, clips=32)  # as measured at its export
    spread = np.array(config.latents_std)
    assert np.abs((np.array(mean) - config.latents_mean) / spread).max() < 1e-3
    assert np.abs(np.array(std) / spread - 1).max() < 1e-3


def test_posterior_of_the_box_is_narrow(box):
    # The pipelines sample the posterior, so its spread is noise in what the transformer learns and remembers.
    config, params = box
    clip = shapes.sample_clip(1000, "train", 33)
    logvar = autoencoder._encode(params, autoencoder.to_video(clip.frames)[None], config)[1]
    assert float((jnp.exp(0.5 * logvar) / jnp.asarray(config.latents_std)).mean()) < 0.03


def test_the_box_gives_the_same_numbers_in_diffusers(box):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKLWan

    config, params = box
    oracle = AutoencoderKLWan.from_pretrained(BOX, torch_dtype=torch.float32)
    assert (tuple(oracle.config.latents_mean), tuple(oracle.config.latents_std)) == (config.latents_mean,
                                                                                     config.latents_std)
    video = autoencoder.to_video(shapes.sample_clip(3, "held_out", 9).frames)[None]
    mean = autoencoder._encode(params, video, config)[0]
    decoded = autoencoder._decode(params, mean, config)
    with torch.no_grad():
        posterior = oracle.encode(torch.from_numpy(np.array(video)).permute(0, 4, 1, 2, 3)).latent_dist
        wanted = oracle.decode(posterior.mean).sample
    for ours, theirs in ((mean, posterior.mean), (decoded, wanted)):
        theirs = theirs.permute(0, 2, 3, 4, 1).numpy()
        assert np.abs(ours - theirs).max() < 1e-5 * (theirs.max() - theirs.min())
