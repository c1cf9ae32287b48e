"""Stage 1: flow matching at full resolution on a chunk that continues a history.

One sample of a step, all of it decided per sample (the original decides once per device batch, with the same numbers
on every device):

    section k of a clip, its past, a caption         (drawn by the input pipeline)
    mode: T2V drops anchor and history; I2V keeps the anchor and the newest frame; V2V keeps the anchor and the newest
          18, 9 or 0 frames; else everything stays
    history frames are corrupted (helios_jax.training.corruption)
    u = sigmoid(N(0, 1)); sigma = 1 - floor(1000 u) / 1000, shifted; eps ~ N(0, I)
    loss = mean((model((1 - sigma) x + sigma eps, 1000 sigma, history, caption) - (eps - x))^2)

Training from scratch differs from the original, which starts from Wan 2.1, in three ways: all parameters are trained,
an average of them is kept, and a tenth of the captions is replaced by the encoded empty prompt, so that guidance has
an unconditional model to lean on. (The original's option for the latter, off in all its runs, sets the embedding to
zeros, which is no prompt that sampling could ever encode.)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import TransformerConfig
from helios_jax.convert.folder import read_component_config
from helios_jax.convert.load import load_component
from helios_jax.data.pipeline import LatentFolder, latent_dataset
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.partition import unbox
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training.config import RunConfig, require
from helios_jax.training.corruption import CorruptionConfig, CorruptionRandomness, corrupt
from helios_jax.training.objective import Objective, sample_keys

TRAIN_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class TaskMix:
    """Probabilities of the tests that drop history, each made only if those before it failed."""

    t2v: float = 0.4
    i2v: float = 0.1
    v2v: float = 0.4

    def __post_init__(self):
        for field in ("t2v", "i2v", "v2v"):
            require(0 <= getattr(self, field) <= 1, f"task_mix.{field}: in [0, 1], got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Videos made during training.

    Attributes:
      prompts: what they show; none switches them off.
      num_frames: of each.
      steps: of the solver, per section.
      guidance: scale of classifier-free guidance against the empty prompt.
      seed: of the noise; the same in every round, so that rounds compare.
      reader_prompts: held-out captions whose videos the rule-based reader judges in each round; 0 switches it off.
      reader_frames: frames of these videos.
    """

    prompts: tuple[str, ...] = ()
    num_frames: int = 99
    steps: int = 20
    guidance: float = 5.0
    seed: int = 42
    reader_prompts: int = 0
    reader_frames: int = 66

    def __post_init__(self):
        require(self.reader_prompts >= 0,
                f"objective.sample.reader_prompts: must be 0 or more, got {self.reader_prompts}")
        for field in ("num_frames", "steps", "reader_frames"):
            require(getattr(self, field) > 0, f"objective.sample.{field}: must be positive, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
      data: folder of latent records, see :mod:`helios_jax.data.build_latents`.
      model: model folder with the VAE, the text encoder and the tokenizer that made the records; needed for samples
        and for the exported model; empty for neither.
      transformer: its sizes.
      dtype: 'float32' or 'bfloat16', of the computation; parameters are float32.
      unroll: layers per iteration of the scan over layers, 0 for all.
      remat: name of a ``jax.checkpoint_policies`` entry, or None.
      task_mix, corruption: see there.
      init_from: model folder whose transformer gives the start values; empty starts from random ones.
      timesteps: 'logit_normal', or 'uniform' (the original's weighting_scheme 'none').
      timestep_shift: a in sigma' = a sigma / (1 + (a - 1) sigma). The original's runs have 1. Above 1 there is more
        training where noise is strong, which is where background, place and motion are decided.
      caption_dropout: probability of the empty prompt.
      threads: of the input pipeline.
      sample: videos during training.
      export_dtype: of the exported transformer: 'float32', 'float16' or 'bfloat16'.
    """

    HARMLESS_ON_RESUME: ClassVar[tuple[str, ...]] = ("threads", "sample", "export_dtype")

    data: str
    model: str = ""
    transformer: TransformerConfig = TransformerConfig()
    init_from: str = ""
    dtype: str = "float32"
    unroll: int = 1
    remat: str | None = None
    task_mix: TaskMix = TaskMix()
    corruption: CorruptionConfig = CorruptionConfig()
    timesteps: str = "logit_normal"
    timestep_shift: float = 1.0
    caption_dropout: float = 0.1
    threads: int = 1
    sample: SampleConfig = SampleConfig()
    export_dtype: str = "bfloat16"

    def __post_init__(self):
        require(self.dtype in ("float32", "bfloat16"), f"objective.dtype: 'float32' or 'bfloat16', got {self.dtype!r}")
        require(self.export_dtype in ("float32", "float16", "bfloat16"),
                f"objective.export_dtype: 'float32', 'float16' or 'bfloat16', got {self.export_dtype!r}")
        require(self.timesteps in ("logit_normal", "uniform"),
                f"objective.timesteps: 'logit_normal' or 'uniform', got {self.timesteps!r}")
        require(self.timestep_shift > 0, f"objective.timestep_shift: must be positive, got {self.timestep_shift}")
        require(0 <= self.caption_dropout <= 1, f"objective.caption_dropout: in [0, 1], got {self.caption_dropout}")
        require(self.unroll >= 0, f"objective.unroll: 0 or more, got {self.unroll}")
        require(self.threads > 0, f"objective.threads: must be positive, got {self.threads}")
        require(self.remat is None or hasattr(jax.checkpoint_policies, self.remat),
                f"objective.remat: a name of jax.checkpoint_policies, got {self.remat!r}")
        require(self.model or not (self.sample.prompts or self.sample.reader_prompts),
                "objective.sample: needs objective.model, the folder with VAE and text encoder")


class Randomness(NamedTuple):
    """All random numbers of one sample.

    task: [4] uniforms for the tests t2v, i2v, v2v and the number of windows; caption: [] uniform; corruption: see
    there; timestep: [] normal (uniform in [0, 1) where timesteps are uniform); noise: [9, h, w, C] normal.
    """

    task: jax.Array
    caption: jax.Array
    corruption: CorruptionRandomness
    timestep: jax.Array
    noise: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, config: Config, layout: HistoryLayout, size: tuple[int, int, int]) -> Randomness:
        """For latents of ``size`` (h, w, C)."""
        task, caption, corruption, timestep, noise = jax.random.split(key, 5)
        draw_timestep = jax.random.normal if config.timesteps == "logit_normal" else jax.random.uniform
        return cls(jax.random.uniform(task, (4,)), jax.random.uniform(caption),
                   CorruptionRandomness.draw(corruption, (1 + layout.frames, *size)), draw_timestep(timestep),
                   jax.random.normal(noise, (layout.chunk, *size)))


class Example(NamedTuple):
    """What the model sees of one sample, and what it shall say.

    noisy, velocity: [9, h, w, C]; timestep: [] in (0, 1000]; frames: [1 + 19, h, w, C], anchor and history;
    text: [n, D]; text_length: [].
    """

    noisy: jax.Array
    velocity: jax.Array
    timestep: jax.Array
    frames: jax.Array
    text: jax.Array
    text_length: jax.Array


def kept_frames(uniforms: jax.Array, mix: TaskMix, layout: HistoryLayout) -> jax.Array:
    """Which of the frames [anchor, history 0 ... 18] stay: bool [1 + 19].

    Args:
      uniforms: [4], see :class:`Randomness`.
      mix: probabilities of the tests.
      layout: of the history.
    """
    total, chunk = layout.frames, layout.chunk
    position = jnp.arange(-1, total)  # the anchor has -1
    is_anchor = position < 0
    largest = total // chunk  # 2 for 19 frames
    windows = jnp.minimum((uniforms[3] * (largest + 1)).astype(jnp.int32), largest)
    v2v = is_anchor | (position >= total % chunk + chunk * windows)
    i2v = is_anchor | (position == total - 1)
    tests = [uniforms[0] < mix.t2v, uniforms[1] < mix.i2v, uniforms[2] < mix.v2v]
    return jnp.select(tests, [jnp.zeros_like(is_anchor), i2v, v2v], jnp.ones_like(is_anchor))


def timestep_index(number: jax.Array, sampling: str) -> jax.Array:
    """Row 0 ... 999 of the noise table for a normal ('logit_normal') or a uniform number; sigma = 1 - row / 1000."""
    u = jax.nn.sigmoid(number) if sampling == "logit_normal" else number
    return jnp.clip((TRAIN_TIMESTEPS * u).astype(jnp.int32), 0, TRAIN_TIMESTEPS - 1)


def shifted(sigma: jax.Array, shift: float) -> jax.Array:
    """The time shift of the schedulers, a sigma / (1 + (a - 1) sigma): 0 and 1 stay, what lies between rises with a."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def prepare(config: Config, layout: HistoryLayout, random: Randomness, item: dict[str, jax.Array],
            empty: dict[str, jax.Array]) -> Example:
    """One sample's training example; a deterministic function of its random numbers.

    Args:
      config: the objective's settings.
      layout: of the history.
      random: numbers for this sample.
      item: one item of the input pipeline, without batch axis.
      empty: "text" [n, D] and "text_length" [] of the empty prompt.
    """
    drop = random.caption < config.caption_dropout
    text, length = (jnp.where(drop, empty[name], item[name]) for name in ("text", "text_length"))

    frames = jnp.concatenate([item["anchor"], item["history"]]).astype(jnp.float32)  # [1, ...], [19, ...] -> [20, ...]
    keep = kept_frames(random.task, config.task_mix, layout)[:, None, None, None]
    frames = corrupt(jnp.where(keep, frames, 0.0), random.corruption, config.corruption, layout)

    index = timestep_index(random.timestep, config.timesteps).astype(jnp.float32)
    sigma = shifted((TRAIN_TIMESTEPS - index) / TRAIN_TIMESTEPS, config.timestep_shift)
    timestep = TRAIN_TIMESTEPS * sigma
    target = item["target"].astype(jnp.float32)
    noisy = (1 - sigma) * target + sigma * random.noise
    return Example(noisy, random.noise - target, timestep, frames, text, length)


def make_loss(config: Config, layout: HistoryLayout, model: HeliosTransformer):
    """The loss function of the objective, see :class:`helios_jax.training.objective.Objective`."""

    def loss(params, frozen, batch: dict[str, jax.Array], key: jax.Array):
        batch_size, *_, h, w, channels = batch["target"].shape

        def example(key: jax.Array, item: dict[str, jax.Array]) -> Example:
            random = Randomness.draw(key, config, layout, (h, w, channels))
            return prepare(config, layout, random, item, frozen["empty"])

        examples = jax.vmap(example)(sample_keys(key, batch_size), batch)
        variables = {"params": params}
        history = layout.split(examples.frames[:, 1:], examples.frames[:, :1])
        text = model.text_rows(variables, examples.text, examples.text_length)
        predicted = model.apply(variables, examples.noisy.astype(model.dtype), examples.timestep, text,
                                jax.tree.map(lambda tier: tier.astype(model.dtype), history), indices=layout.indices())
        errors = jnp.square(predicted.astype(jnp.float32) - examples.velocity).mean((1, 2, 3, 4))  # [B]
        return errors.mean(), _split_by(errors, examples, batch)

    return loss


def _split_by(errors: jax.Array, examples: Example, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means of the error over kinds of samples; a kind that is absent from the batch counts as its overall mean."""

    def mean_where(mask: jax.Array) -> jax.Array:
        return jnp.where(mask.any(), (errors * mask).sum() / jnp.maximum(mask.sum(), 1), errors.mean())

    has_history = jnp.any(examples.frames != 0, axis=(1, 2, 3, 4))
    low_noise = examples.timestep < TRAIN_TIMESTEPS / 2
    return {"loss_without_history": mean_where(~has_history), "loss_with_history": mean_where(has_history),
            "loss_low_noise": mean_where(low_noise), "loss_high_noise": mean_where(~low_noise)}


def build(run: RunConfig) -> Objective:
    """The objective of a run.

    Raises:
      UserError: the data or the model folder is missing or does not fit the transformer.
    """
    config: Config = run.objective
    layout = HistoryLayout()
    folder = LatentFolder.open(config.data)
    require(folder.text_dim == config.transformer.text_dim,
            f"objective.transformer.text_dim: {config.data} holds embeddings of width {folder.text_dim}, got "
            f"{config.transformer.text_dim}")
    require(folder.channels == config.transformer.in_channels == config.transformer.out_channels,
            f"objective.transformer.in_channels, out_channels: {config.data} holds latents of {folder.channels} "
            f"channels, got {config.transformer.in_channels}, {config.transformer.out_channels}")
    model = HeliosTransformer(config.transformer, dtype=jnp.dtype(config.dtype), unroll=config.unroll,
                              remat=config.remat)
    rows, length = folder.empty_prompt()
    if config.init_from:
        start = read_component_config(Path(config.init_from) / "transformer", "transformer")
        require(start == config.transformer,
                f"objective.init_from: {config.init_from} holds a transformer of other sizes or options than "
                "objective.transformer")

    def load_params(abstract_params):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
        return load_component(Path(config.init_from) / "transformer", "transformer", config.transformer,
                              dtype=jnp.float32, sharding=shardings)

    sample = evaluate = export = None
    if config.model:
        from helios_jax.training import validation

        base = validation.base_folder(config.model, config.transformer, (8 * folder.height, 8 * folder.width))
        export = validation.make_export(base, config.export_dtype)
        validator, wanted = validation.Validator(base, config.unroll), config.sample
        sampling = validation.Sampling(wanted.num_frames, wanted.steps, wanted.guidance, wanted.seed)
        if wanted.prompts:
            sample = lambda params, step: validator.named_videos(params, wanted.prompts, sampling)  # noqa: E731
        if wanted.reader_prompts:
            judged = dataclasses.replace(sampling, num_frames=wanted.reader_frames)
            evaluate = lambda params, step: validator.reader_scores(params, wanted.reader_prompts, judged)  # noqa: E731
    return Objective(
        init_params=lambda key: unbox(model.init(key)),
        load_params=load_params if config.init_from else None,
        loss=make_loss(config, layout, model), per_sample_keys=True,
        dataset=latent_dataset(config.data, run.batch_size, run.seed, layout, config.threads),
        frozen={"empty": {"text": rows, "text_length": np.int32(length)}},
        sample=sample, fps=folder.fps, evaluate=evaluate, export=export)
