"""What the flow-matching objectives of stages 1 and 2 share.

One sample's context, all of it decided per sample (the original decides once per device batch, with the same numbers
on every device):

    section k of a clip, its past, a caption         (drawn by the input pipeline)
    mode: T2V drops anchor and history; I2V keeps the anchor and the newest frame; V2V keeps the anchor and the newest
          18, 9 or 0 frames; else everything stays
    history frames are corrupted (helios_jax.training.corruption)
    the caption may be replaced by the empty prompt

Noise levels, noisy latents and targets belong to the stages. A stage module tells :func:`make_loss` how to turn a
batch into squared errors per sample and entry, an entry being one noisy version of the sample: one in stage 1, one or
more per pyramid level in stage 2. The loss is their unweighted mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.convert.folder import read_component_config, stored_precision
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import abstract_params
from helios_jax.data.buckets import bucketed_dataset, folder_buckets, latent_folders, most_frequent
from helios_jax.data.pipeline import LatentFolder, MakeItem, latent_items
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.models.transformer import HeliosTransformer, TextRows
from helios_jax.training.config import RunConfig, require
from helios_jax.training.corruption import CorruptionConfig, CorruptionRandomness, corrupt
from helios_jax.training.objective import BaseParams, Objective, sample_keys
from helios_jax.training.validation_loss import ValidationConfig, ValidationLoss
from helios_jax.training.weights import LoraConfig, LoraTraining, TrainedWeights, trained_weights
from helios_jax.training.work import Work, forward

PyTree = Any

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
      negative_prompt: what guidance leads away from; the empty prompt by default.
      num_frames: of each.
      steps: of the solver, per section and pyramid level.
      guidance: scale of classifier-free guidance.
      seed: of the noise; the same in every round, so that rounds compare.
      reader_prompts: held-out captions whose videos the rule-based reader judges in each round; 0 switches it off.
      reader_frames: frames of these videos.
    """

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    num_frames: int = 99
    steps: int = 20
    guidance: float = 5.0
    seed: int = 42
    reader_prompts: int = 0
    reader_frames: int = 66

    def __post_init__(self):
        require(self.reader_prompts >= 0,
                f"objective.sample.reader_prompts: must be 0 or more, got {self.reader_prompts}")
        require(self.guidance >= 0, f"objective.sample.guidance: must be 0 or more, got {self.guidance}")
        for field in ("num_frames", "steps", "reader_frames"):
            require(getattr(self, field) > 0, f"objective.sample.{field}: must be positive, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Settings of every objective that trains the transformer.

    Attributes:
      data: folder of records.
      model: model folder with the VAE, the text encoder and the tokenizer that made the records; needed for samples
        and for the exported model; empty for neither.
      transformer: its sizes.
      init_from: model folder whose transformer gives the start values; empty starts from random ones.
      lora: low-rank training; off by default.
      dtype: 'float32' or 'bfloat16', of the computation; trained parameters are float32.
      unroll: layers per iteration of the scan over layers, 0 for all.
      remat: name of a ``jax.checkpoint_policies`` entry, or None.
      threads: of the input pipeline.
      sample: videos during training.
      validation: the loss on fixed examples, measured whenever samples are made.
      export_dtype: of the exported transformer: 'float32', 'float16' or 'bfloat16'.
    """

    HARMLESS_ON_RESUME: ClassVar[tuple[str, ...]] = ("threads", "sample", "validation", "export_dtype")

    data: str
    model: str = ""
    transformer: TransformerConfig = TransformerConfig()
    init_from: str = ""
    lora: LoraConfig = LoraConfig()
    dtype: str = "float32"
    unroll: int = 1
    remat: str | None = None
    threads: int = 1
    sample: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()
    export_dtype: str = "bfloat16"

    def __post_init__(self):
        require(self.dtype in ("float32", "bfloat16"), f"objective.dtype: 'float32' or 'bfloat16', got {self.dtype!r}")
        require(self.export_dtype in ("float32", "float16", "bfloat16"),
                f"objective.export_dtype: 'float32', 'float16' or 'bfloat16', got {self.export_dtype!r}")
        require(self.unroll >= 0, f"objective.unroll: 0 or more, got {self.unroll}")
        require(self.threads > 0, f"objective.threads: must be positive, got {self.threads}")
        require(self.remat is None or hasattr(jax.checkpoint_policies, self.remat),
                f"objective.remat: a name of jax.checkpoint_policies, got {self.remat!r}")
        require(self.model or not (self.sample.prompts or self.sample.reader_prompts),
                "objective.sample: needs objective.model, the folder with VAE and text encoder")
        require(self.lora.rank == 0 or bool(self.init_from),
                "objective.lora: needs objective.init_from, the model that the adapters are trained for")

    @property
    def entries(self) -> tuple[int, ...]:
        """The pyramid level of every noisy version of a sample; stage 1 has one version, at full resolution."""
        return (0,)

    @property
    def has_anchor(self) -> bool:
        """Whether the model sees the first frame of a video, in training and when it is sampled."""
        return True


@dataclasses.dataclass(frozen=True)
class FlowConfig(ModelConfig):
    """Settings that both stages have; ``data`` is written by :mod:`helios_jax.data.build_latents`.

    Attributes:
      task_mix, corruption: see there.
      timesteps: 'logit_normal', or 'uniform' (the original's weighting_scheme 'none').
      caption_dropout: probability of the empty prompt.
      keep_first_frame: the first frame of a video stays visible (the anchor); without, its place is always zero, and
        the model is sampled so, too (``SamplingOptions.keep_first_frame``).
    """

    task_mix: TaskMix = TaskMix()
    corruption: CorruptionConfig = CorruptionConfig()
    timesteps: str = "logit_normal"
    caption_dropout: float = 0.1
    keep_first_frame: bool = True

    def __post_init__(self):
        super().__post_init__()
        require(self.timesteps in ("logit_normal", "uniform"),
                f"objective.timesteps: 'logit_normal' or 'uniform', got {self.timesteps!r}")
        require(0 <= self.caption_dropout <= 1, f"objective.caption_dropout: in [0, 1], got {self.caption_dropout}")

    @property
    def has_anchor(self) -> bool:
        return self.keep_first_frame


# --- One sample ------------------------------------------------------------------------------------------------------


class Randomness(NamedTuple):
    """All random numbers of one sample.

    task: [4] uniforms for the tests t2v, i2v, v2v and the number of windows; caption: [] uniform; corruption: see
    there; timestep: normal (uniform in [0, 1) where timesteps are uniform), [] for a single entry, else [E];
    noise: [9, h, w, C] normal.
    """

    task: jax.Array
    caption: jax.Array
    corruption: CorruptionRandomness
    timestep: jax.Array
    noise: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, config: FlowConfig, layout: HistoryLayout, size: tuple[int, int, int]) -> Randomness:
        """For latents of ``size`` (h, w, C)."""
        task, caption, corruption, timestep, noise = jax.random.split(key, 5)
        draw_timestep = jax.random.normal if config.timesteps == "logit_normal" else jax.random.uniform
        entries = len(config.entries)
        return cls(jax.random.uniform(task, (4,)), jax.random.uniform(caption),
                   CorruptionRandomness.draw(corruption, (1 + layout.frames, *size)),
                   draw_timestep(timestep, (entries,) if entries > 1 else ()),
                   jax.random.normal(noise, (layout.chunk, *size)))


class Context(NamedTuple):
    """What one sample is conditioned on: frames [1 + 19, h, w, C] (anchor, history), text [n, D], text_length []."""

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


def make_context(config: FlowConfig, layout: HistoryLayout, random: Randomness, item: dict[str, jax.Array],
                 empty: dict[str, jax.Array]) -> Context:
    """One sample's context; a deterministic function of its random numbers.

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
    keep = kept_frames(random.task, config.task_mix, layout)
    if not config.keep_first_frame:
        keep = keep.at[0].set(False)
    frames = corrupt(jnp.where(keep[:, None, None, None], frames, 0.0), random.corruption, config.corruption, layout)
    return Context(frames, text, length)


def draw_examples(prepare: Callable[..., Any], config: FlowConfig, layout: HistoryLayout, keys: jax.Array,
                  batch: dict[str, jax.Array], empty: dict[str, jax.Array]) -> Any:
    """The training examples of a batch: a stage's ``prepare`` with the random numbers of every sample's own key [B]."""
    size = batch["target"].shape[2:]

    def example(key: jax.Array, item: dict[str, jax.Array]) -> Any:
        return prepare(config, layout, Randomness.draw(key, config, layout, size), item, empty)

    return jax.vmap(example)(keys, batch)


def timestep_index(number: jax.Array, sampling: str) -> jax.Array:
    """Row 0 ... 999 of a table of noise levels for a normal ('logit_normal') or a uniform number."""
    u = jax.nn.sigmoid(number) if sampling == "logit_normal" else number
    return jnp.clip((TRAIN_TIMESTEPS * u).astype(jnp.int32), 0, TRAIN_TIMESTEPS - 1)


# --- A batch ---------------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """What a network needs besides noisy latents and their timestep, made once for all its calls on a batch.

    variables: its parameters; history: tokens [B, S_history, C]; text: projected prompt rows.
    """

    variables: PyTree
    history: jax.Array
    text: TextRows


def make_conditions(model: HeliosTransformer, variables: PyTree, layout: HistoryLayout, context: Context) -> Conditions:
    """Of the contexts of a batch, [B, ...]."""
    tiers = layout.split(context.frames[:, 1:], context.frames[:, :1])
    history = model.embed_history(variables, jax.tree.map(lambda tier: tier.astype(model.dtype), tiers))
    return Conditions(variables, history, model.text_rows(variables, context.text, context.text_length))


def conditions_repeated(conditions: Conditions, repeats: int) -> Conditions:
    """For so many noisy versions of every sample, [B r, ...], the versions of a sample side by side."""
    repeated = jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=0), (conditions.history, conditions.text))
    return Conditions(conditions.variables, *repeated)


def velocity(model: HeliosTransformer, layout: HistoryLayout, history_size: tuple[int, int], conditions: Conditions,
             noisy: jax.Array, timestep: jax.Array, features: tuple[int, ...] = ()) -> Any:
    """What the model says of noisy latents [B, 9, h_i, w_i, C] at timesteps [B]: velocity, or it and features."""
    return model.apply(conditions.variables, noisy.astype(model.dtype), timestep, conditions.text, conditions.history,
                       history_size=history_size, indices=layout.indices(), features=features)


class Errors(NamedTuple):
    """Mean squared errors of a batch, and what is needed to split them.

    squared: float32 [B, E], one column per entry of ``FlowConfig.entries``; low_noise: bool [B, E], more signal than
    noise; has_history: bool [B].
    """

    squared: jax.Array
    low_noise: jax.Array
    has_history: jax.Array


# errors(params, frozen, batch, keys [B]) -> Errors
ErrorFunction = Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array], Errors]


def checked_level_weights(weights: tuple[float, ...], levels: int) -> tuple[float, ...]:
    """One weight per level; none given means 1 for all.

    Raises:
      UserError: another number of weights, or one that is not positive.
    """
    require(not weights or (len(weights) == levels and min(weights) > 0),
            f"objective.level_weights: one positive number for each of the {levels} levels, or none, "
            f"got {list(weights)}")
    return tuple(weights) or (1.0,) * levels


def has_history(frames: jax.Array) -> jax.Array:
    """Which samples have any anchor or history left: [B, 1 + 19, h, w, C] -> bool [B]."""
    return jnp.any(frames != 0, axis=(1, 2, 3, 4))


def summarise(errors: Errors, levels: Sequence[int]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss, and its means over kinds of entries; a kind that is absent from the batch counts as the loss.

    Args:
      errors: of a batch.
      levels: pyramid level of every entry.
    """
    loss = errors.squared.mean()

    def mean_where(mask: jax.Array) -> jax.Array:
        mask = jnp.broadcast_to(mask, errors.squared.shape)
        return jnp.where(mask.any(), (errors.squared * mask).sum() / jnp.maximum(mask.sum(), 1), loss)

    with_history = errors.has_history[:, None]
    metrics = {"loss_without_history": mean_where(~with_history), "loss_with_history": mean_where(with_history),
               "loss_low_noise": mean_where(errors.low_noise), "loss_high_noise": mean_where(~errors.low_noise)}
    if len(set(levels)) > 1:
        metrics |= {f"loss_level_{level}": mean_where(np.asarray(levels) == level) for level in sorted(set(levels))}
    return loss, metrics


def make_loss(config: ModelConfig, errors: ErrorFunction):
    """The loss function of an objective, see :class:`helios_jax.training.objective.Objective`."""

    def loss(params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], key: jax.Array):
        keys = sample_keys(key, batch["text"].shape[0])
        return summarise(errors(params, frozen, batch, keys), config.entries)

    return loss


# --- The objective ---------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What an objective trains on.

    folder: the records that validation and samples are like; of several sizes, the most frequent one.
    text_rows: of the longest caption of all sizes.
    items: of a folder of such data, what makes a training item of one of its records.
    dataset: the batches.
    frozen: arrays for the loss.
    """

    folder: LatentFolder
    text_rows: int
    items: Callable[[LatentFolder], MakeItem]
    dataset: grain.IterDataset
    frozen: PyTree


def latent_data(run: RunConfig, layout: HistoryLayout) -> Data:
    """Records of encoded clips, and the empty prompt for captions that are dropped.

    Raises:
      UserError: the folder is missing or damaged, or has sections of another length.
    """
    config: FlowConfig = run.objective
    folders = latent_folders(config.data)
    folder, text_rows = most_frequent(folders), max(size.text_rows for size in folders.values())
    rows, length = folder.empty_prompt(text_rows)
    dataset = bucketed_dataset(folder_buckets(config.data), run.batch_size, run.seed, layout, threads=config.threads)
    return Data(folder, text_rows, lambda _: latent_items(layout, text_rows), dataset,
                {"empty": {"text": rows, "text_length": np.int32(length)}})


def transformer(config: ModelConfig) -> HeliosTransformer:
    """The network that a configuration trains."""
    return HeliosTransformer(config.transformer, dtype=jnp.dtype(config.dtype), unroll=config.unroll,
                             remat=config.remat)


def build(run: RunConfig,
          make_errors: Callable[[Any, HistoryLayout, HeliosTransformer, TrainedWeights], ErrorFunction] | None,
          index: ModelIndex, scheduler: SchedulerConfig,
          make_data: Callable[[RunConfig, HistoryLayout], Data] = latent_data) -> Objective:
    """The objective of a run.

    Args:
      run: with a :class:`ModelConfig` as its objective.
      make_errors: of the stage; None leaves the loss to the caller, and there is no validation loss.
      index, scheduler: of the model in training, for samples and for the export; the index' native size is set here.
      make_data: opens the data.

    Raises:
      UserError: the data or a model folder is missing or does not fit the transformer.
    """
    config: ModelConfig = run.objective
    layout = HistoryLayout()
    data = make_data(run, layout)
    folder = data.folder
    require(folder.text_dim == config.transformer.text_dim,
            f"objective.transformer.text_dim: {config.data} holds embeddings of width {folder.text_dim}, got "
            f"{config.transformer.text_dim}")
    require(folder.channels == config.transformer.in_channels == config.transformer.out_channels,
            f"objective.transformer.in_channels, out_channels: {config.data} holds latents of {folder.channels} "
            f"channels, got {config.transformer.in_channels}, {config.transformer.out_channels}")
    model = transformer(config)
    weights = trained_weights(config.lora, model)
    base, load_params = start_values(config.init_from, "objective.init_from", config.lora, weights, config.transformer,
                                     run.seed)
    adapters = weights.num_adapters if isinstance(weights, LoraTraining) else 0

    errors = make_errors and make_errors(config, layout, model, weights)
    loaded_base = (lambda: None) if base is None else base.load
    measures: list[Callable[[PyTree], dict[str, float]]] = []
    if config.validation.items:
        require(errors is not None, "objective.validation.items: this objective has no loss to measure, so 0 is "
                f"allowed, got {config.validation.items}")
        validation_loss = ValidationLoss(config.validation, folder, data.text_rows, data.items, errors, config.entries,
                                         data.frozen)
        measures.append(lambda params: validation_loss(params, loaded_base()))

    sample = export = None
    if config.model:
        from helios_jax.training import validation

        native = dataclasses.replace(index, native_size=(8 * folder.height, 8 * folder.width))
        model_folder = validation.model_folder(config.model, config.transformer, native, scheduler)
        export = validation.make_export(model_folder, config.export_dtype, weights, loaded_base)
        validator, wanted = validation.Validator(model_folder, config.unroll, config.dtype), config.sample
        sampling = validation.Sampling(wanted.num_frames, wanted.steps, wanted.guidance, wanted.seed,
                                       wanted.negative_prompt, config.has_anchor)

        def variables(params: PyTree) -> PyTree:
            return weights.variables(params, {"base": loaded_base()})

        if wanted.prompts:
            def sample(params: PyTree, step: int) -> dict[str, np.ndarray]:
                return validator.named_videos(variables(params), wanted.prompts, sampling)
        if wanted.reader_prompts:
            judged = dataclasses.replace(sampling, num_frames=wanted.reader_frames)
            measures.append(lambda params: validator.reader_scores(variables(params), wanted.reader_prompts, judged))

    def work(batch: dict[str, jax.Array]) -> Work:
        return step_work(config, layout, batch, adapters)

    counted = errors is not None and isinstance(config, FlowConfig)  # of other kinds of steps nobody knows the work

    def evaluate(params: PyTree, step: int) -> dict[str, float]:
        return {name: value for measure in measures for name, value in measure(params).items()}

    return Objective(
        init_params=weights.init, load_params=load_params, loss=errors and make_loss(config, errors),
        per_sample_keys=True, dataset=data.dataset,
        frozen=data.frozen, base=base, sample=sample, fps=folder.fps, evaluate=evaluate if measures else None,
        export=export, work=work if counted else None, on_mesh=True)


def step_work(config: FlowConfig, layout: HistoryLayout, batch: dict[str, jax.Array], adapters: int = 0) -> Work:
    """What a training step computes.

    Args:
      config: the objective's settings.
      layout: of the history.
      batch: with the shapes of a batch.
      adapters: numbers of a LoRA run's adapters; each is counted as if it saw all tokens.
    """
    batch_size, _, height, width, _ = batch["target"].shape
    tokens = flops = 0.0
    for level in config.entries:
        one = forward(config.transformer, layout, (height, width), batch["text"].shape[1],
                      2 ** (max(config.entries) - level))
        tokens += one.tokens
        weights = 2 * one.products + 3 * 2 * one.tokens * adapters if config.lora.rank else 3 * one.products
        flops += weights + 3 * one.attention
    return Work(batch_size * tokens, batch_size * flops)


def start_values(init_from: str, field: str, lora: LoraConfig, weights: TrainedWeights, sizes: TransformerConfig,
                 seed: int) -> tuple[BaseParams | None, Callable[[PyTree], PyTree] | None]:
    """The base of a LoRA run, and the start values of the trained parameters; None where there are none.

    Args:
      init_from: model folder, or empty.
      field: of the configuration that names it.
      lora, weights: what is trained.
      sizes: of the transformer.
      seed: of the run.

    Raises:
      UserError: the folder's transformer is another one.
    """
    if not init_from:
        return None, None
    folder = Path(init_from) / "transformer"
    if folder.is_dir():  # a missing one is reported when it is read: a program can be compiled without the weights
        stored = read_component_config(folder, "transformer")
        require(sizes.restrict_self_attn or not stored.restrict_self_attn, "objective.transformer.restrict_self_attn: "
                f"{init_from} was trained with it, got False")
        stored = dataclasses.replace(stored, restrict_self_attn=sizes.restrict_self_attn)
        other = ", ".join(f"{key} is {value!r} there, got {wanted!r}" for (key, value), wanted in zip(
            dataclasses.asdict(stored).items(), dataclasses.asdict(sizes).values(), strict=True) if value != wanted)
        require(not other, f"{field}: {init_from} holds a transformer of other sizes or options than "
                f"objective.transformer: {other}")
    require(stored_precision(folder) == "none",
            f"{field}: {init_from} is quantised ({stored_precision(folder)}); train from the original model")
    dtype = jnp.dtype(lora.base_dtype if lora.rank else "float32")

    def load(sharding: Any = None, only: Callable[[tuple[str, ...]], bool] | None = None) -> PyTree:
        try:
            return load_component(folder, "transformer", sizes, dtype, sharding, only=only)
        except UserError as error:
            raise UserError(f"{field}: {error}") from None

    if not isinstance(weights, LoraTraining):
        return None, lambda abstract: load(shardings_of(abstract))
    base = BaseParams(abstract_params("transformer", sizes, dtype), load)
    if not lora.full:
        return base, None
    key = start_key(seed)
    return base, lambda abstract: weights.start(key, load(only=weights.is_whole))


def as_stored(config: ModelConfig, folder: str) -> ModelConfig:
    """The configuration with the attention of the history that a model folder's transformer was trained with.

    A run may restrict what its base did not; a network that is only asked must run as it is.
    """
    path = Path(folder) / "transformer"
    restrict = path.is_dir() and read_component_config(path, "transformer").restrict_self_attn
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, restrict_self_attn=restrict))


def start_key(seed: int) -> jax.Array:
    """The key of start values: the loop's keys fold in step numbers, this one the largest number."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))


def shardings_of(abstract: PyTree) -> PyTree:
    """Where parameters shall lie, or None where nobody says so."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return shardings if jax.tree.leaves(shardings) else None
