"""Stage 3, second part: the student matches a teacher's distribution; optionally heads judge it, too.

Three networks of one architecture: the student, whose chunk comes from :mod:`helios_jax.training.rollout`; the teacher,
a frozen Base model; the critic, which is the teacher with adapters and follows the student's distribution. Every step
the critic plays, in every ``student_every``-th the student before it:

    student   X = rollout; t of a Beta distribution that decays to the uniform one, noise eps, x_t
              f = critic's clean latent, r = teacher's with guidance, r_c + w (r_c - r_u)
              distribution matching of X, f, r [+ student_weight mean softplus(D(x_t'))]
    critic    X = rollout without gradient, uniform t; mean (v_critic(x_t) - (eps - X))^2
              [+ head_weight (mean softplus(-D(x_t)) + mean softplus(D(real_t))) + r1_weight R1]

D reads the critic's velocity and its tokens behind some blocks, on a window of the latents; its loss trains heads and
critic. The terms in brackets begin at ``gan.start_step``. Formulas: :mod:`helios_jax.training.dmd`.

The context of a sample is that of :mod:`helios_jax.training.flow`, drawn anew for each player. All networks see the
same damaged history, but only the student's rollout sees it with changed saturation.

Differences from the original, whose adversarial part stops with an error as published: real and made chunks share the
history that the real one continues (there: of another section); both inputs of R1 have one window (there: two
places); one update per step (there: two with DeepSpeed); noise differs from device to device; student and critic see
the same section of a clip in one step (there: two sections); the heads' optimizer begins with their first gradient.
docs/training.md lists the smaller ones. Source: specification of training stage 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig
from helios_jax.convert.folder import read_index
from helios_jax.data.buckets import latent_folders
from helios_jax.data.encoders import text_encoder
from helios_jax.diffusion.few_step import renoise, sigma_at, student_scheduler, x0
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.schedules import stage_table
from helios_jax.models.discriminator import Discriminator
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import dmd, flow
from helios_jax.training.config import OptimizerConfig, RunConfig, require
from helios_jax.training.dmd import RenoiseConfig
from helios_jax.training.flow import Conditions, FlowConfig, SampleConfig, TaskMix
from helios_jax.training.objective import BaseParams, Objective, Player, Turn, sample_keys
from helios_jax.training.rollout import RolloutConfig, RolloutNoise, level_grids, rollout
from helios_jax.training.stage2 import check_size
from helios_jax.training.validation_loss import ValidationConfig
from helios_jax.training.weights import LoraConfig, TrainedWeights, trained_weights

PyTree = Any
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The critic: adapters on the teacher's base, and how they are trained."""

    lora: LoraConfig = LoraConfig(rank=256)
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        require(self.lora.rank > 0, "objective.critic.lora.rank: positive, as the critic is the teacher with adapters; "
                f"got {self.lora.rank}")


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """The adversarial part.

    Attributes:
      width: channels of the heads; 0 leaves the whole part out.
      groups: of their norms; divides the width.
      blocks: behind which blocks of the critic heads stand, besides the one that reads its velocity.
      start_step: from which step on.
      crop: rows and columns of the latents are divided by it to give the window that the heads judge.
      student_weight, head_weight, r1_weight: of the three terms.
      r1_sigma: noise on real latents in the approximate R1.
    """

    width: int = 0
    groups: int = 32
    blocks: tuple[int, ...] = (5, 15, 25, 35)
    start_step: int = 1000
    crop: int = 2
    student_weight: float = 0.05
    head_weight: float = 0.01
    r1_weight: float = 100.0
    r1_sigma: float = 0.1

    def __post_init__(self):
        require(self.width >= 0, f"objective.gan.width: 0 or more, got {self.width}")
        require(self.groups > 0 and self.width % self.groups == 0,
                f"objective.gan.groups: must divide the width {self.width}, got {self.groups}")
        require(bool(self.blocks) and len(set(self.blocks)) == len(self.blocks) and min(self.blocks) >= 0,
                f"objective.gan.blocks: different numbers of blocks, counted from 0, got {list(self.blocks)}")
        require(self.crop > 0, f"objective.gan.crop: must be positive, got {self.crop}")
        for field in ("start_step", "student_weight", "head_weight", "r1_weight", "r1_sigma"):
            require(getattr(self, field) >= 0, f"objective.gan.{field}: 0 or more, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class Config(FlowConfig):
    """Settings of the objective; the others are those of :class:`helios_jax.training.flow.FlowConfig`.

    ``init_from`` and ``lora`` are the student's; its optimizer is the run's. A changed saturation (``corruption``)
    concerns only the student's rollout.

    Attributes:
      teacher: model folder of the frozen Base model that teacher and critic share.
      critic: see there.
      student_every: the student plays in the steps 0, n, 2n, ...
      rollout, renoise, gan: see there.
      guidance: w in r_c + w (r_c - r_u); w + 1 is the usual scale of classifier-free guidance.
      negative_prompt: of r_u; the empty prompt is taken from the data, any other is encoded with ``model``.
      stage_range, gamma: of the student's pyramid.
    """

    timesteps: str = "uniform"
    caption_dropout: float = 0.0
    task_mix: TaskMix = TaskMix(t2v=0.4, i2v=0.0, v2v=0.5)
    validation: ValidationConfig = ValidationConfig()
    sample: SampleConfig = SampleConfig(steps=2, guidance=1.0)
    teacher: str = ""
    critic: CriticConfig = CriticConfig()
    student_every: int = 5
    rollout: RolloutConfig = RolloutConfig()
    renoise: RenoiseConfig = RenoiseConfig()
    gan: GanConfig = GanConfig()
    guidance: float = 3.0
    negative_prompt: str = ""
    stage_range: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    gamma: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.init_from), "objective.init_from: required, the model folder that the student starts from")
        require(bool(self.teacher), "objective.teacher: required, the model folder of the Base model")
        require(self.timesteps == "uniform", f"objective.timesteps: the critic's are 'uniform', got {self.timesteps!r}")
        require(self.student_every > 0, f"objective.student_every: must be positive, got {self.student_every}")
        require(self.guidance >= 0, f"objective.guidance: must be 0 or more, got {self.guidance}")
        require(self.sample.guidance <= 1, "objective.sample.guidance: 1, as the student is not guided; "
                f"got {self.sample.guidance}")
        require(not self.negative_prompt or bool(self.model),
                "objective.negative_prompt: needs objective.model, the folder with the text encoder")
        require(len(self.stage_range) == len(self.rollout.steps) + 1,
                f"objective.stage_range: {len(self.rollout.steps) + 1} borders for {len(self.rollout.steps)} levels, "
                f"got {len(self.stage_range)}")
        require(not self.gan.width or max(self.gan.blocks) < self.transformer.num_layers,
                f"objective.gan.blocks: below the {self.transformer.num_layers} layers, got {list(self.gan.blocks)}")
        stage_table(self.scheduler)  # checks the borders and gamma

    @property
    def scheduler(self) -> SchedulerConfig:
        """What the student is sampled with."""
        return student_scheduler(len(self.rollout.steps), self.stage_range, self.gamma)

    @property
    def unsaturated(self) -> Config:
        """The same with the history as critic and teacher see it."""
        return dataclasses.replace(self, corruption=dataclasses.replace(self.corruption, saturation=False))


class Draws(NamedTuple):
    """All random numbers of one sample in one player's turn; several of them stand as keys.

    base: context, the scores' noise and a uniform number for the critic's timestep; rollout: of the chunk; level: key
    of the student's timestep; adversarial: key of whatever the adversarial part needs.
    """

    base: flow.Randomness
    rollout: RolloutNoise
    level: jax.Array
    adversarial: jax.Array

    @classmethod
    def make(cls, key: jax.Array, config: Config, layout: HistoryLayout, size: tuple[int, int, int]) -> Draws:
        base, chunk, level, adversarial = jax.random.split(key, 4)
        return cls(flow.Randomness.draw(base, config, layout, size),
                   RolloutNoise.draw(chunk, len(config.rollout.steps), layout.chunk, size), level, adversarial)


class Network(NamedTuple):
    """An architecture, and how the parameters of the training loop become its own."""

    model: HeliosTransformer
    weights: TrainedWeights


class Game:
    """Both players' losses on latents of one size.

    Args:
      config: of the objective.
      layout: of the history.
      student, critic: the critic's architecture is the teacher's, too.
      size: of the latents (h, w, C).

    Raises:
      UserError: the size cannot be halved for the levels, or its window is too small for the heads.
    """

    def __init__(self, config: Config, layout: HistoryLayout, student: Network, critic: Network,
                 size: tuple[int, int, int]):
        self.config, self.layout, self.size = config, layout, size
        self._student, self._critic = student, critic
        height, width, _ = size
        check_size(len(config.rollout.steps), height, width)
        shape = {"frames": layout.chunk, "height": height, "width": width}
        self._table = stage_table(config.scheduler)
        self._grids = level_grids(config.rollout, config.scheduler, **shape)
        self._shift = dmd.score_shift(config.renoise, config.scheduler, **shape)
        self._scores = dmd.score_table(self._shift)
        gan = config.gan
        self.heads = Discriminator(gan.width, gan.groups, gan.blocks, critic.model.dtype) if gan.width else None
        if self.heads:
            self._window = (height // gan.crop, width // gan.crop)
            require(height % (2 * gan.crop) == 0 and width % (2 * gan.crop) == 0,
                    f"objective.gan.crop: must divide the {height // 2}x{width // 2} tokens of a frame, got {gan.crop}")
            self.heads.check_grid(layout.chunk, self._window[0] // 2, self._window[1] // 2)

    # -- the players ------------------------------------------------------------------------------------------------

    def student_loss(self, params: PyTree, frozen: PyTree, batch: Batch, keys: jax.Array, turn: Turn):
        """See :attr:`helios_jax.training.objective.Player.loss`; the parameters' parts are student, critic, heads."""
        gan = self.config.gan
        draws, context, chunk = self._begin(params, frozen, batch, keys, turn)
        alpha, beta = dmd.beta_parameters(self.config.renoise, turn.step)
        numbers = jax.vmap(lambda key: jax.random.beta(key, alpha, beta))(draws.level)  # [B]
        timestep, sigma = self._level(numbers)
        noisy = jax.lax.stop_gradient(renoise(chunk, draws.base.noise, sigma))
        critic = self._critic_conditions(params, frozen, context)
        fake = x0(self._score(critic, noisy, timestep), noisy, sigma)
        real = self._guided(frozen, context, noisy, timestep, sigma)
        loss, gap = dmd.matching_loss(chunk, fake, real)
        metrics = {"matching": loss, "score_gap": gap, "timestep": timestep.mean()}
        if self.heads is None:
            return loss, metrics

        def adversarial(chunk: jax.Array) -> jax.Array:
            noise_key, corner_key = self._keys(draws.adversarial, 2)
            noise = jax.vmap(lambda key: jax.random.normal(key, chunk.shape[1:]))(noise_key)
            window = dmd.crop(renoise(chunk, noise, sigma), self._corner(corner_key), self._window)
            return dmd.adversarial_loss(self._judge(params["heads"], critic, window, timestep))

        term = jax.lax.cond(turn.step >= gan.start_step, adversarial, lambda chunk: jnp.float32(0), chunk)
        return loss + gan.student_weight * term, metrics | {"adversarial": term}

    def critic_loss(self, params: PyTree, frozen: PyTree, batch: Batch, keys: jax.Array, turn: Turn):
        """As :meth:`student_loss`."""
        gan = self.config.gan
        draws, context, chunk = self._begin(params, frozen, batch, keys, turn)
        chunk, noise = jax.lax.stop_gradient(chunk), draws.base.noise
        timestep, sigma = self._level(0.001 + 0.999 * draws.base.timestep)
        noisy = renoise(chunk, noise, sigma)
        critic = self._critic_conditions(params, frozen, context)
        loss = dmd.flow_loss(self._score(critic, noisy, timestep), chunk, noise)
        metrics = {"flow": loss, "timestep": timestep.mean()}
        if self.heads is None:
            return loss, metrics

        def adversarial(heads: PyTree, critic: Conditions) -> tuple[jax.Array, jax.Array]:
            fake_key, real_key, noise_key = self._keys(draws.adversarial, 3)
            real = dmd.crop(renoise(batch["target"], noise, sigma), self._corner(real_key), self._window)
            extra = jax.vmap(lambda key: jax.random.normal(key, real.shape[1:]))(noise_key)
            windows = jnp.stack([dmd.crop(noisy, self._corner(fake_key), self._window), real,
                                 real + gan.r1_sigma * extra], axis=1)  # [B, 3, 9, h', w', C]
            logits = self._judge(heads, flow.conditions_repeated(critic, 3), windows.reshape(-1, *windows.shape[2:]),
                                 jnp.repeat(timestep, 3)).reshape(len(timestep), 3, -1)
            return dmd.head_loss(logits[:, 0], logits[:, 1]), dmd.r1_penalty(logits[:, 1], logits[:, 2])

        nothing = lambda *_: (jnp.float32(0), jnp.float32(0))  # noqa: E731
        judged, r1 = jax.lax.cond(turn.step >= gan.start_step, adversarial, nothing, params["heads"], critic)
        return loss + gan.head_weight * judged + gan.r1_weight * r1, metrics | {"heads": judged, "r1": r1}

    # -- what they share --------------------------------------------------------------------------------------------

    def _begin(self, params: PyTree, frozen: PyTree, batch: Batch, keys: jax.Array, turn: Turn
               ) -> tuple[Draws, flow.Context, jax.Array]:
        """Random numbers, the scores' context and the student's chunk."""
        keys = sample_keys(keys, batch["target"].shape[0])
        draws = jax.vmap(lambda key: Draws.make(key, self.config, self.layout, self.size))(keys)

        def contexts(config: Config) -> flow.Context:
            return jax.vmap(lambda random, item: flow.make_context(config, self.layout, random, item, frozen["empty"])
                            )(draws.base, batch)

        own = contexts(self.config)
        model, weights = self._student
        variables = weights.variables(params["student"], {"base": frozen["base"].get("student")})
        velocity = functools.partial(flow.velocity, model, self.layout, self.size[:2])
        chunk = rollout(velocity, flow.make_conditions(model, variables, self.layout, own), self._grids, self._table,
                        draws.rollout, ~flow.has_history(own.frames),
                        jax.random.uniform(turn.key, (len(self._grids),)))
        return draws, contexts(self.config.unsaturated), chunk

    def _critic_conditions(self, params: PyTree, frozen: PyTree, context: flow.Context) -> Conditions:
        model, weights = self._critic
        variables = weights.variables(params["critic"], {"base": frozen["base"]["teacher"]})
        return flow.make_conditions(model, variables, self.layout, context)

    def _guided(self, frozen: PyTree, context: flow.Context, noisy: jax.Array, timestep: jax.Array, sigma: jax.Array
                ) -> jax.Array:
        """The teacher's clean latents, led away from the negative prompt."""
        teacher = {"params": frozen["base"]["teacher"]}
        negative = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(noisy), *np.shape(x))), frozen["negative"])
        without = flow.Context(context.frames, negative["text"], negative["text_length"])
        conditions = (flow.make_conditions(self._critic.model, teacher, self.layout, one) for one in (context, without))
        r_c, r_u = (x0(self._score(one, noisy, timestep), noisy, sigma) for one in conditions)
        return r_c + self.config.guidance * (r_c - r_u)

    def _score(self, conditions: Conditions, noisy: jax.Array, timestep: jax.Array, features: tuple[int, ...] = ()):
        """What critic or teacher say."""
        return flow.velocity(self._critic.model, self.layout, self.size[:2], conditions, noisy, timestep, features)

    def _judge(self, heads: PyTree, critic: Conditions, window: jax.Array, timestep: jax.Array) -> jax.Array:
        """Logits [B, 1 + F] of noisy latents."""
        velocity, tokens = self._score(critic, window, timestep, self.config.gan.blocks)
        return self.heads.apply(heads, velocity, tokens)

    def _level(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Timesteps and sigmas of the scores for numbers in (0, 1)."""
        timestep = dmd.score_timestep(self.config.renoise, self._shift, numbers)
        return timestep, sigma_at(self._scores, timestep)

    @staticmethod
    def _keys(keys: jax.Array, count: int) -> tuple[jax.Array, ...]:
        split = jax.vmap(lambda key: jax.random.split(key, count))(keys)
        return tuple(split[:, i] for i in range(count))

    @staticmethod
    def _corner(keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)


def sampled_as(config: Config) -> tuple[ModelIndex, SchedulerConfig]:
    """What the student is sampled as: Distilled."""
    return ModelIndex("HeliosPyramidPipeline", "HeliosDMDScheduler", is_distilled=True), config.scheduler


def build(run: RunConfig) -> Objective:
    """The objective of a run.

    Raises:
      UserError: the data or a model folder is missing or does not fit the transformer, the levels or the heads.
    """
    config: Config = run.objective
    student = flow.build(run, None, *sampled_as(config))
    folders = latent_folders(config.data)
    require(len(folders) == 1, f"objective.data: this objective takes latents of one size, but {config.data} holds "
            f"{len(folders)}; name the folder of one of them")
    folder = folders.popitem()[1]
    _check_teacher(config.teacher)
    own = _network(config, config.lora, "objective.lora")
    critic = _network(flow.as_stored(config, config.teacher), config.critic.lora, "objective.critic.lora")
    game = Game(config, HistoryLayout(), own, critic, (folder.height, folder.width, folder.channels))
    teacher, load_critic = flow.start_values(config.teacher, "objective.teacher", config.critic.lora, critic.weights,
                                             critic.model.config, run.seed)
    makers = {"student": own.weights.init, "critic": critic.weights.init}
    players = [Player("student", ("student",), game.student_loss, run.optimizer, config.student_every, averaged=True)]
    if game.heads:
        makers["heads"] = lambda key: game.heads.init(key, config.transformer.out_channels, config.transformer.dim)
    players.append(Player("critic", tuple(makers)[1:], game.critic_loss, config.critic.optimizer,
                          starts={"heads": config.gan.start_step} if game.heads else {}))

    def init_params(key: jax.Array) -> PyTree:
        return {name: make(own) for (name, make), own in zip(makers.items(), jax.random.split(key, len(makers)),
                                                             strict=True)}

    def of_student(function: Callable | None) -> Callable | None:
        return function and (lambda params, where: function(params["student"], where))

    loaders = {"student": student.load_params, "critic": load_critic}
    return dataclasses.replace(
        student, init_params=init_params, load_params=_load_params(makers, loaders, run.seed), loss=None,
        base=_bases({"student": student.base, "teacher": teacher}),
        frozen={**student.frozen, "negative": _negative(config, student.frozen["empty"])}, players=tuple(players),
        sample=of_student(student.sample), evaluate=of_student(student.evaluate), export=of_student(student.export))


def _check_teacher(folder: str) -> None:
    """A model of a pyramid has learned other noise levels than the scores ask for, in the same architecture."""
    if (Path(folder) / "model_index.json").is_file():  # a missing folder is reported when its weights are read
        variant = read_index(folder).variant
        require(variant == "base", f"objective.teacher: a Base model expected, {folder} is {variant}")


def _network(config: Config, lora: LoraConfig, field: str) -> Network:
    model = flow.transformer(config)
    return Network(model, trained_weights(lora, model, field))


def _load_params(makers: dict[str, Callable], loaders: dict[str, Callable | None], seed: int
                 ) -> Callable[[PyTree], PyTree] | None:
    """Start values of which some are read; None where all are made."""
    if not any(loaders.values()):
        return None

    def load(abstract: PyTree) -> PyTree:
        keys = dict(zip(makers, jax.random.split(flow.start_key(seed), len(makers)), strict=True))

        def part(name: str) -> PyTree:
            if loaders.get(name):
                return loaders[name](abstract[name])
            return jax.jit(makers[name], out_shardings=flow.shardings_of(abstract[name]))(keys[name])

        return {name: part(name) for name in makers}

    return load


def _bases(bases: dict[str, BaseParams | None]) -> BaseParams:
    """Several frozen networks as one."""
    bases = {name: base for name, base in bases.items() if base is not None}

    def load(sharding: Any) -> PyTree:
        return {name: base.load(sharding if sharding is None else sharding[name]) for name, base in bases.items()}

    return BaseParams({name: base.abstract for name, base in bases.items()}, load)


def _negative(config: Config, empty: dict[str, Any]) -> dict[str, Any]:
    """Embedding of the negative prompt, "text" [n, D] and "text_length" []."""
    if not config.negative_prompt:
        return empty
    encode, _ = text_encoder(config.model)
    rows = encode([config.negative_prompt])[0]
    return {"text": np.asarray(rows, np.float32), "text_length": np.int32(len(rows))}
