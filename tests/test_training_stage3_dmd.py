"""Both players' losses on networks of a few numbers, against the specification in float64; who changes what."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.data.random_latents import write_random_latents
from helios_jax.diffusion import few_step
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.diffusion.schedules import stage_table
from helios_jax.errors import UserError
from helios_jax.models.transformer import TextRows
from helios_jax.training import flow
from helios_jax.training.config import OptimizerConfig, run_config
from helios_jax.training.objective import Objective, Player, Turn
from helios_jax.training.program import Optimizers, initial_state, make_step
from helios_jax.training.stage3_dmd import Config, CriticConfig, Draws, Game, GanConfig, Network, build
from helios_jax.training.weights import LoraConfig

LAYOUT = HistoryLayout()
H, W, C, BATCH = 16, 16, 2, 3
MU = [0.5 + (9 * (H >> i) * (W >> i) / 4 - 256) * 0.65 / 3840 for i in (2, 1, 0)]
TABLE = stage_table(few_step.student_scheduler())
BLOCK_FACTOR = np.linalg.cholesky(4 / 3 * (np.eye(4) - np.ones((4, 4)) / 4) + 1e-8 * np.eye(4))


class ToyNetwork(NamedTuple):
    """The transformer's interface over four numbers {"gain", "past", "text", "time"}, in NumPy's or jax's hands."""

    dtype: type = jnp.float32

    def embed_history(self, variables, history):
        frames = jnp.concatenate([history.short[:, :1], history.long, history.mid, history.short[:, 1:]], axis=1)
        return variables["params"]["past"] * frames.mean((1, 2, 3, 4))[:, None, None]

    def text_rows(self, variables, rows, lengths):
        inside = jnp.arange(rows.shape[1])[None] < lengths[:, None]
        mean = (rows.mean(-1) * inside).sum(1) / lengths
        return TextRows(variables["params"]["text"] * mean[:, None, None], jnp.zeros((len(rows), 1)))

    def apply(self, variables, latents, timestep, text, history, history_size, indices, features=()):
        del history_size, indices
        velocity = toy_velocity(variables["params"], latents, timestep, text.rows[:, 0, 0] + history[:, 0, 0], jnp)
        if not features:
            return velocity
        tokens = [(i + 1) * velocity[:, :, ::2, ::2] * latents[:, :, 1::2, 1::2] for i in features]
        return velocity, jnp.stack(tokens)


def toy_velocity(p, x, timestep, told, xp):
    shift = (p["time"] * timestep / 500 + told)[:, None, None, None, None]
    return p["gain"] * xp.sin(x + shift) + 0.3 * x


class ToyHeads:
    """Two logits of velocity and tokens."""

    def apply(self, params, velocity, tokens):
        return toy_logits(params, velocity, tokens, jnp)


def toy_logits(p, velocity, tokens, xp):
    axes = (1, 2, 3, 4)
    first = (p["w"][0] * velocity**2).mean(axes)
    return xp.stack([first, *[(p["w"][i + 1] * xp.sin(t)).mean(axes) for i, t in enumerate(tokens)]], axis=1)


class ToyWeights:
    """Parameters beside a base: their sum, as adapters; without a base they stand alone."""

    def variables(self, params, frozen):
        base = frozen["base"]
        return {"params": params if base is None else jax.tree.map(jnp.add, base, params)}


def numbers(gain: float, past: float, text: float, time: float) -> dict[str, np.ndarray]:
    return {"gain": np.float32(gain), "past": np.float32(past), "text": np.float32(text), "time": np.float32(time)}


PARAMS = {"student": numbers(0.8, 0.5, 0.7, 0.9), "critic": numbers(0.2, -0.1, 0.1, 0.05),
          "heads": {"w": np.array([0.6, -1.1, 0.4], np.float32)}}  # of the velocity and two blocks
RNG = np.random.default_rng(0)
FROZEN = {"base": {"teacher": numbers(0.6, 0.4, -0.5, 1.1)},
          "empty": {"text": RNG.standard_normal((4, 6)).astype(np.float32), "text_length": np.int32(1)},
          "negative": {"text": RNG.standard_normal((3, 6)).astype(np.float32), "text_length": np.int32(3)}}


def config_of(**changes) -> Config:
    gan = GanConfig(width=8, groups=4, blocks=(0, 2), start_step=10, crop=2)
    base = Config(data="", init_from="student", teacher="teacher", gan=gan,
                  corruption=flow.CorruptionConfig(mode="random", saturation=True))
    return dataclasses.replace(base, **changes)


def game_of(config: Config) -> Game:
    network = Network(ToyNetwork(), ToyWeights())
    game = Game(config, LAYOUT, network, network, (H, W, C))
    if game.heads:
        game.heads = ToyHeads()
    return game


def batch_of() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    history, anchor = normal(BATCH, 19, H, W, C), normal(BATCH, 1, H, W, C)
    history[0] = anchor[0] = 0
    return {"anchor": anchor, "history": history, "target": normal(BATCH, 9, H, W, C), "text": normal(BATCH, 4, 6),
            "text_length": np.array([2, 4, 1], np.int32)}


# --- The statement ---------------------------------------------------------------------------------------------------


class Statement:
    """The specification for one turn in float64. What is random or tested elsewhere (contexts, numbers) comes from the
    library; networks, rollout, noise levels, scores and losses do not."""

    def __init__(self, config: Config, batch: dict, key: jax.Array, turn: Turn):
        self.config, self.batch, self.turn = config, batch, turn
        self.keys = jax.random.split(key, BATCH)
        draws = jax.vmap(lambda k: Draws.make(k, config, LAYOUT, (H, W, C)))(self.keys)

        def contexts(config):
            return jax.vmap(lambda r, item: flow.make_context(config, LAYOUT, r, item, FROZEN["empty"]))(
                draws.base, batch)

        self.saturated = np.asarray(contexts(config).frames, np.float64)
        plain = config.corruption.__class__(**{**dataclasses.asdict(config.corruption), "saturation": False})
        self.context = np.asarray(contexts(dataclasses.replace(config, corruption=plain)).frames, np.float64)
        self.draws = draws
        self.noise = np.asarray(draws.base.noise, np.float64)
        self.exits = np.asarray(jax.random.uniform(turn.key, (3,)), np.float64)

    def network(self, p, frames, prompt=None):
        text, length = (prompt["text"][None].repeat(BATCH, 0), np.full(BATCH, prompt["text_length"])) if prompt else (
            self.batch["text"], self.batch["text_length"])
        mean = np.array([rows[:n].mean(-1).sum() / n for rows, n in zip(text.astype(np.float64), length, strict=True)])
        told = p["past"] * frames.mean((1, 2, 3, 4)) + p["text"] * mean
        return lambda x, t: toy_velocity(p, x, np.broadcast_to(np.asarray(t, np.float64), (BATCH,)), told, np)

    def rollout(self, student, held):
        """Section 5, sample by sample; gradients see ``student``, constants come from ``held``."""
        chunks = []
        for sample in range(BATCH):
            count = 2 if self.saturated[sample].any() else 4

            def run(p, x, t, sample=sample):
                full = np.zeros((BATCH, *x.shape))
                full[sample] = x
                return self.network(p, self.saturated)(full, t)[sample]

            trained = constant = np.asarray(self.draws.rollout.start[sample], np.float64)
            for stage in range(3):
                times = TABLE[stage].timesteps()
                sigmas = np.append(np.linspace(0.999, 0.000999, count + 1)[:-1], 0)
                sigmas = MU[stage] * sigmas / (1 + (MU[stage] - 1) * sigmas)
                times = times.min() + sigmas[:-1] * (times.max() - times.min())

                def clean(p, x, i, times=times, sigmas=sigmas, run=run):
                    return x - sigmas[i] * run(p, x, times[i])

                if stage:
                    z = np.asarray(self.draws.rollout.blocks[stage - 1][sample], np.float64) @ BLOCK_FACTOR.T
                    t, y, x, c, _ = z.shape
                    block = z.reshape(t, y, x, c, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(t, 2 * y, 2 * x, c)
                    trained, constant = (TABLE[stage].alpha * np.kron(v, np.ones((1, 2, 2, 1)))
                                         + TABLE[stage].beta * block for v in (trained, constant))
                start, leave = constant, int(self.exits[stage] * count)
                for i in range(leave):
                    constant = (1 - sigmas[i + 1]) * clean(held, constant, i) + sigmas[i + 1] * start
                trained = constant if leave else trained
                trained, constant = clean(student, trained, leave), clean(held, constant, leave)
            chunks.append(trained)
        return np.stack(chunks)

    def level(self, r):
        t = np.rint(np.clip(1000 * MU[2] * r / (1 + (MU[2] - 1) * r), 20, 980))
        u = np.linspace(1, 0.001, 1000)
        table = MU[2] * u / (1 + (MU[2] - 1) * u)
        return t, table[np.abs(1000 * table[None] - t[:, None]).argmin(1)][:, None, None, None, None]

    def logits(self, heads, p, frames, x, t):
        velocity = self.network(p, frames)(x, t)
        tokens = velocity[:, :, ::2, ::2] * x[:, :, 1::2, 1::2]
        return toy_logits(heads, velocity, [(i + 1) * tokens for i in self.config.gan.blocks], np)

    def window(self, x, keys):
        """A part of every sample, anywhere: ``keys`` [B] draw its corner."""
        rows, columns = H // self.config.gan.crop, W // self.config.gan.crop
        corners = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys), np.float64)
        places = np.floor(corners * (H - rows + 1, W - columns + 1)).astype(int)
        return np.stack([sample[:, top : top + rows, left : left + columns]
                         for sample, (top, left) in zip(x, places, strict=True)])

    def student(self, params):
        """Loss as a function of the student's parameters, everything that is stopped held at ``PARAMS``."""
        k = 0.5 * (1 + np.cos(np.pi * min(int(self.turn.step) / 500, 1)))
        r = np.asarray(jax.vmap(lambda key: jax.random.beta(key, 1 + 3 * k, 1 + 0.5 * k))(self.draws.level), np.float64)
        t, sigma = self.level(r)
        held = self.rollout(float64(PARAMS["student"]), float64(PARAMS["student"]))
        chunk = self.rollout(params, float64(PARAMS["student"]))
        noisy = (1 - sigma) * held + sigma * self.noise
        teacher = float64(FROZEN["base"]["teacher"])
        critic = {name: teacher[name] + float(PARAMS["critic"][name]) for name in teacher}
        f = noisy - sigma * self.network(critic, self.context)(noisy, t)
        r_c = noisy - sigma * self.network(teacher, self.context)(noisy, t)
        r_u = noisy - sigma * self.network(teacher, self.context, FROZEN["negative"])(noisy, t)
        real = r_c + 3 * (r_c - r_u)
        gradient = (f - real) / np.abs(held - real).mean((1, 2, 3, 4), keepdims=True)
        loss = 0.5 * np.mean((chunk - (held - gradient)) ** 2)
        if not self.config.gan.width or self.turn.step < self.config.gan.start_step:
            return loss
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(self.draws.adversarial)
        extra = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (9, H, W, C)))(keys[:, 0]), np.float64)
        seen = self.window((1 - sigma) * chunk + sigma * extra, keys[:, 1])
        logits = self.logits(float64(PARAMS["heads"]), critic, self.context, seen, t)
        return loss + 0.05 * np.log1p(np.exp(logits)).mean()

    def critic(self, params, heads):
        """Loss as a function of the critic's and the heads' parameters."""
        student = float64(PARAMS["student"])
        chunk = self.rollout(student, student)
        t, sigma = self.level(0.001 + 0.999 * np.asarray(self.draws.base.timestep, np.float64))
        noisy = (1 - sigma) * chunk + sigma * self.noise
        teacher = float64(FROZEN["base"]["teacher"])
        critic = {name: teacher[name] + params[name] for name in teacher}
        loss = np.mean((self.network(critic, self.context)(noisy, t) - (self.noise - chunk)) ** 2)
        if not self.config.gan.width or self.turn.step < self.config.gan.start_step:
            return loss
        keys = jax.vmap(lambda key: jax.random.split(key, 3))(self.draws.adversarial)
        fake = self.window(noisy, keys[:, 0])
        # Section 8.3 with one window for both inputs of R1: the noise is drawn in it.
        real = self.window((1 - sigma) * self.batch["target"].astype(np.float64) + sigma * self.noise, keys[:, 1])
        extra = np.asarray(jax.vmap(lambda key: jax.random.normal(key, real.shape[1:]))(keys[:, 2]), np.float64)
        fake_logits, real_logits, disturbed = (self.logits(heads, critic, self.context, x, t)
                                               for x in (fake, real, real + 0.1 * extra))
        judged = np.log1p(np.exp(-fake_logits)).mean() + np.log1p(np.exp(real_logits)).mean()
        return loss + 0.01 * judged + 100 * np.mean((real_logits - disturbed) ** 2)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def assert_slopes(gradient: dict, statement, params: dict) -> None:
    """Every number's derivative against central differences."""
    for name, value in params.items():
        for place in np.ndindex(np.shape(value)):
            ends = []
            for sign in (1, -1):
                moved = {n: np.array(v, copy=True) for n, v in params.items()}
                moved[name][place] += sign * 1e-6
                ends.append(statement(moved))
            np.testing.assert_allclose(np.asarray(gradient[name])[place], (ends[0] - ends[1]) / 2e-6, rtol=2e-4,
                                       atol=2e-6, err_msg=name)


@pytest.mark.parametrize(("step", "gan"), [(0, False), (250, False), (9, True), (10, True)])
def test_both_losses_and_their_gradients_equal_the_specification_in_float64(step, gan):
    config = config_of() if gan else config_of(gan=GanConfig())
    game, batch = game_of(config), batch_of()
    turn, key = Turn(jnp.int32(step), jax.random.key(step + 1)), jax.random.key(7)
    statement = Statement(config, batch, key, turn)
    inputs = (FROZEN, batch, statement.keys, turn)

    def own(loss, *parts):
        differentiated = jax.jit(jax.value_and_grad(lambda mine: loss({**PARAMS, **mine}, *inputs), has_aux=True))
        return differentiated({part: PARAMS[part] for part in parts})

    (loss, metrics), gradient = own(game.student_loss, "student")
    np.testing.assert_allclose(loss, statement.student(float64(PARAMS["student"])), rtol=2e-5)
    assert_slopes(gradient["student"], statement.student, float64(PARAMS["student"]))
    assert gan == ("adversarial" in metrics)

    (loss, _), gradient = own(game.critic_loss, "critic", "heads")
    critic, heads = float64(PARAMS["critic"]), float64(PARAMS["heads"])
    np.testing.assert_allclose(loss, statement.critic(critic, heads), rtol=2e-5)
    assert_slopes(gradient["critic"], lambda p: statement.critic(p, heads), critic)
    assert_slopes(gradient["heads"], lambda p: statement.critic(critic, p), heads)


def test_without_guidance_an_untrained_critic_gives_the_student_nothing_to_do():
    """Section 16.5: f = r where the adapters are zero and w = 0."""
    config = config_of(gan=GanConfig(), guidance=0.0)
    params = {**PARAMS, "critic": jax.tree.map(np.zeros_like, PARAMS["critic"])}
    turn = Turn(jnp.int32(0), jax.random.key(0))
    loss, gradient = jax.jit(jax.value_and_grad(
        lambda own: game_of(config).student_loss({**params, "student": own}, FROZEN, batch_of(), jax.random.key(1),
                                                 turn)[0]))(params["student"])
    assert float(loss) == 0.0 and all(float(g) == 0.0 for g in gradient.values())


# --- Who changes what ------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    """States before and after every step, and its metrics; who plays in which step."""

    states: list
    metrics: list
    turns: list


@pytest.fixture(scope="module")
def played() -> Played:
    """Six steps in which the student plays every second and the critic every third time; its average is a
    copy up to the student's turn in step 2."""
    game = game_of(config_of(gan=GanConfig(width=8, groups=4, blocks=(0, 2), start_step=0, crop=2)))
    optimizer = OptimizerConfig(learning_rate=1e-2)
    players = (Player("student", ("student",), game.student_loss, optimizer, 2, averaged=True),
               Player("critic", ("critic", "heads"), game.critic_loss, optimizer, 3))
    run = run_config({"objective": {"name": "stage1", "data": ""}, "batch_size": BATCH, "ema_decay": 0.9,
                      "ema_start_step": 2, "num_steps": 5})
    optimizers = Optimizers(run, players, None)
    state = initial_state(jax.tree.map(jnp.asarray, PARAMS), optimizers, True, players)
    objective = Objective(lambda key: PARAMS, None, None, players=players)
    step = jax.jit(make_step(run, objective, optimizers))
    states, metrics = [state], []
    for _ in range(6):
        state, values = step(state, FROZEN, batch_of())
        states.append(state)
        metrics.append(values)
    turns = [{name for name, every in (("student", 2), ("critic", 3)) if step % every == 0} for step in range(6)]
    return Played(states, metrics, turns)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("name", "parts"), [("student", ("student",)), ("critic", ("critic", "heads"))])
def test_a_players_turn_changes_its_own_parts_and_no_bit_of_the_others(played, name, parts):
    assert played.turns == [{"student", "critic"}, set(), {"student"}, {"critic"}, {"student"}, set()]
    for step, turns in enumerate(played.turns):
        before, after = played.states[step], played.states[step + 1]
        for part in parts:
            assert same(before.params[part], after.params[part]) == (name not in turns)
        assert same(before.optimizer[name], after.optimizer[name]) == (name not in turns)
        assert (float(played.metrics[step][f"{name}/loss"]) == 0) == (name not in turns)


def test_the_average_follows_the_student_alone_and_only_in_its_turns(played):
    for step, turns in enumerate(played.turns):
        before, after = played.states[step].ema, played.states[step + 1].ema
        assert set(after) == {"student"}
        assert same(before, after) == ("student" not in turns)


def test_average_and_learning_rates_count_the_turns_of_their_player(played):
    """A step of the run is not a turn: the student has 3 turns in 5 steps, the critic 2."""
    averages = [state.ema["student"] for state in played.states]
    own = [state.params["student"] for state in played.states]
    assert same(averages[1], own[1]) and same(averages[3], own[3])  # turns 0 and 1
    for name, average in averages[5].items():  # turn 2, one after the start: (1 + 1) / (10 + 1)
        np.testing.assert_allclose(average, 2 / 11 * averages[4][name] + 9 / 11 * own[5][name], rtol=1e-6)
    for name, every, turns in (("student", 2, 3), ("critic", 3, 2)):
        for turn in range(turns):  # a cosine from 1e-2 to 0 over the player's turns
            rate = 1e-2 * (1 + np.cos(np.pi * turn / turns)) / 2
            np.testing.assert_allclose(played.metrics[every * turn][f"{name}/learning_rate"], rate, rtol=1e-6)


def test_the_optimizer_of_the_heads_begins_with_their_first_gradient():
    """Adam's first update has the size of the learning rate, however many steps have gone by."""
    rate, start = 1e-2, 3
    game = game_of(config_of(gan=GanConfig(width=8, groups=4, blocks=(0, 2), start_step=start, crop=2)))
    optimizer = OptimizerConfig(learning_rate=rate, schedule="constant", b1=0.0, weight_decay=0.0)
    players = (Player("critic", ("critic", "heads"), game.critic_loss, optimizer, starts={"heads": start}),)
    run = run_config({"objective": {"name": "stage1", "data": ""}, "batch_size": BATCH, "ema_decay": 0.0})
    optimizers = Optimizers(run, players, None)
    state = initial_state(jax.tree.map(jnp.asarray, PARAMS), optimizers, False, players)
    step = jax.jit(make_step(run, Objective(lambda key: PARAMS, None, None, players=players), optimizers))
    for number in range(start + 1):
        before, (state, _) = state, step(state, FROZEN, batch_of())
        assert same(before.params["heads"], state.params["heads"]) == (number < start)
        assert not same(before.params["critic"], state.params["critic"])
    moved = np.abs(state.params["heads"]["w"] - before.params["heads"]["w"])
    np.testing.assert_allclose(moved, rate, rtol=1e-3)


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    """One key per sample, and exits that the whole batch shares: accumulation changes rounding only."""
    game = game_of(config_of(gan=GanConfig(width=8, groups=4, blocks=(0, 2), start_step=0, crop=2)))
    players = (Player("student", ("student",), game.student_loss, OptimizerConfig()),
               Player("critic", ("critic", "heads"), game.critic_loss, OptimizerConfig()))
    found = []
    for parts in (1, 3):
        run = run_config({"objective": {"name": "stage1", "data": ""}, "batch_size": BATCH, "accumulate": parts})
        optimizer = Optimizers(run, players, None)
        state = initial_state(jax.tree.map(jnp.asarray, PARAMS), optimizer, False, players)
        step = jax.jit(make_step(run, Objective(lambda key: PARAMS, None, None, players=players), optimizer))
        _, metrics = step(state, FROZEN, batch_of())
        assert metrics["critic/heads"] > 0 and metrics["student/adversarial"] > 0
        found.append([float(metrics[name]) for name in sorted(metrics)])
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("change", "message"), [
    ({"teacher": ""}, "objective.teacher: required"), ({"init_from": ""}, "objective.init_from: required"),
    ({"student_every": 0}, "objective.student_every"),
    ({"timesteps": "logit_normal"}, "objective.timesteps: the critic's are 'uniform'"),
    ({"sample": flow.SampleConfig(guidance=2.0)}, "objective.sample.guidance: 1, as the student is not guided; got 2"),
    ({"negative_prompt": "blurred"}, "objective.negative_prompt: needs objective.model"),
    ({"stage_range": (0.0, 0.5, 1.0)}, "objective.stage_range: 4 borders for 3 levels, got 3"),
    ({"gan": GanConfig(width=8, groups=8, blocks=(99,))}, "objective.gan.blocks: below the"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config_of(), **change)


def test_wrong_settings_of_critic_and_heads_are_named():
    with pytest.raises(UserError, match="objective.critic.lora.rank: positive"):
        CriticConfig(lora=LoraConfig())
    with pytest.raises(UserError, match="objective.gan.groups: must divide the width 10, got 4"):
        GanConfig(width=10, groups=4)
    with pytest.raises(UserError, match="objective.gan.crop: must divide the 8x8 tokens of a frame, got 3"):
        game_of(config_of(gan=GanConfig(width=8, groups=4, blocks=(0,), crop=3)))


def test_data_of_several_sizes_are_refused_in_one_line(tmp_path):
    for height in (8, 16):
        write_random_latents(tmp_path / f"{height}x8", clips=1, sections=3, height=height, width=8, channels=2,
                             text_rows=3, text_dim=6)
    (tmp_path / "buckets.json").write_text(json.dumps({"buckets": {"8x8": 1, "16x8": 1}}))
    transformer = {"num_attention_heads": 1, "attention_head_dim": 8, "rope_dim": (4, 2, 2), "in_channels": 2,
                   "out_channels": 2, "text_dim": 6, "freq_dim": 8, "ffn_dim": 8, "num_layers": 1}
    run = run_config({"objective": {"name": "stage3_dmd", "data": str(tmp_path), "teacher": "teacher",
                                    "init_from": "student", "transformer": transformer}, "batch_size": 1})
    with pytest.raises(UserError, match="objective.data: this objective takes latents of one size, but .* holds 2"):
        build(run)
