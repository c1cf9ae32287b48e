"""What a compile check compiles: the training step of a run, or the programs with which its model makes one chunk."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax import sharding
from helios_jax.config import TextEncoderConfig, VAEConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion import guidance
from helios_jax.models.quantize import as_qarrays
from helios_jax.models.streaming import COPIES_FROM_STACKS, split_layers, streamed_places
from helios_jax.models.transformer import HeliosTransformer, TextContext
from helios_jax.models.vae import WanVAE
from helios_jax.pipeline.pipeline import decode_chunk
from helios_jax.pipeline.sampler import ChunkSampler, SamplingPlan
from helios_jax.sharding import Partition
from helios_jax.tools.roofline import count_flops
from helios_jax.training.config import RunConfig, require
from helios_jax.training.objective import objective_module
from helios_jax.training.program import Program, make_step

PyTree = Any
TEXT_ROWS = 512 + 1  # the longest prompt, and the row that stands for padding


class Workload(NamedTuple):
    """One function to compile.

    name: for the report.
    times: how often its outer loop runs: the solver's steps of a pyramid level; 1 for a training step.
    arguments: bytes of one chip, by kind.
    lower: traces it for the mesh.
    flops: operations of one run of the loop on all chips: as computed, and without what rematerialisation computes
      again. Attention is counted as its CPU variant computes it: like the kernels, it computes its weights again for
      the gradient, and that counts in both numbers.
    host: bytes of arguments in the host's memory.
    beside: bytes of one chip that the pipeline's other models take while this runs.
    """

    name: str
    times: int
    arguments: dict[str, float]
    lower: Callable[[], jax.stages.Lowered]
    flops: Callable[[], tuple[float, float]]
    host: float = 0.0
    beside: float = 0.0


def bytes_per_chip(tree: PyTree) -> float:
    """Bytes that one chip holds of abstract arrays which know their place."""
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) / 8
                     for leaf in jax.tree.leaves(tree)))


# -- training ---------------------------------------------------------------------------------------------------------


def training_workload(run: RunConfig, devices: Sequence[Any], player: str | None = None) -> tuple[Partition, Workload]:
    """The trainer's own step, with the run's mesh, batch and optimizer.

    Args:
      run: to be trained.
      devices: of the mesh.
      player: the one whose turn is compiled alone, with what all of them keep on the chips; None compiles the step.

    Raises:
      UserError: no such player; what :meth:`~helios_jax.training.program.Program.build` raises.
    """
    program = Program.build(run, devices)
    names = [one.name for one in program.objective.players]
    require(player is None or player in names,
            f"--player: {'one of ' + ', '.join(names) if names else 'this objective has none'}, got {player!r}")
    batch, state = _abstract_batch(program), program.abstract_state
    arguments = {"parameters": state.params, "average": state.ema, "optimizer": state.optimizer,
                 "frozen": program.abstract_frozen, "batch": batch}
    return program.partition, Workload("training step" if player is None else f"turn of the {player}", 1,
                                       {name: bytes_per_chip(tree) for name, tree in arguments.items()},
                                       lambda: program.lower(batch, player),
                                       lambda: _step_flops(program, batch, player))


def _abstract_batch(program: Program) -> PyTree:
    """Shapes and places of the run's batch, from one real sample."""
    run = program.run
    sample = next(iter(objective_module(run.objective_name).build(dataclasses.replace(run, batch_size=1)).dataset))

    def leaf(array: Any) -> jax.ShapeDtypeStruct:
        shape = (run.batch_size, *array.shape[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype),
                                    sharding=program.partition.batch(shape))

    return jax.tree.map(leaf, sample)


def _step_flops(program: Program, batch: PyTree, player: str | None) -> tuple[float, float]:
    def count(run: RunConfig, objective: Any) -> float:
        step = make_step(run, objective, program.optimizer, program.trainable, only=player)
        return count_flops(jax.make_jaxpr(step)(program.abstract_state, program.abstract_frozen, batch))

    run = program.run
    computed = count(run, program.objective)
    if getattr(run.objective, "remat", None) is None:
        return computed, computed
    plain = dataclasses.replace(run, objective=dataclasses.replace(run.objective, remat=None))
    return computed, count(plain, objective_module(run.objective_name).build(plain))


# -- sampling ---------------------------------------------------------------------------------------------------------


def sampling_workloads(run: RunConfig, devices: Sequence[Any], size: tuple[int, int], videos: int,
                       streamed: bool = False, precision: str = "none") -> tuple[Partition, list[Workload]]:
    """The pipeline's own programs for one chunk of the run's model, in the run's dtype: a pyramid level each, decoding.

    The parameters are in that dtype, too; steps and guidance are those of the run's sample videos. A level's program
    holds all its steps. VAE and text encoder are the published ones; the latter runs once per prompt and is not
    compiled, but its weights are counted as lying on the chips (where its width is the model's).

    Args:
      run: of an objective that trains a transformer.
      devices: of the mesh.
      size: height and width in pixels.
      videos: made at once; with guidance the model sees twice as many.
      streamed: the blocks' weights lie in the host's memory.
      precision: of the kernels, a mode of ``helios_jax.models.quantize``.

    Raises:
      UserError: the objective trains no transformer; the mesh does not fit the devices; streaming on several of them.
    """
    module, objective = objective_module(run.objective_name), run.objective
    require(hasattr(module, "sampled_as"), f"--sample: objective {run.objective_name!r} trains no video model")
    index, scheduler = module.sampled_as(objective)
    dtype, partition = jnp.dtype(objective.dtype), Partition.create(run.mesh, devices)
    require(not streamed or partition.mesh.size == 1, "--stream_weights: goes with a mesh of one device, got "
            f"{partition.mesh.size}")
    plan = SamplingPlan.for_model(index, steps=(objective.sample.steps,) * scheduler.stages,
                                  guidance_scale=objective.sample.guidance)
    config = objective.transformer
    model = HeliosTransformer(config, dtype, objective.unroll, for_sampling=True, streamed=streamed)
    # Operations are counted for all chips together, so on a sampler that knows of no mesh.
    sampler, whole = (ChunkSampler(model, scheduler, plan, *size, config.in_channels, partition=where)
                      for where in (partition, None))

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partition.replicated)  # as the pipeline holds them

    def parameters(component: str, config: Any) -> tuple[PyTree, float, float]:
        """The tree, its bytes on a chip, and those in the host's memory."""
        params = abstract_params(component, config, dtype, precision)
        places = sharding.param_shardings(partition, params)
        params = sharding.with_shardings(params, streamed_places(component, params, places) if streamed else places)
        in_host = [leaf for leaf in jax.tree.leaves(params) if leaf.sharding.memory_kind == "pinned_host"]
        host = bytes_per_chip(in_host)
        return as_qarrays(params), bytes_per_chip(params) - host, host

    params, on_chip, in_host = parameters("transformer", config)
    if partition.mesh.devices.flat[0].platform in COPIES_FROM_STACKS and not streamed:  # as the pipeline does
        params = {**params, "blocks": split_layers(params["blocks"])}
    text_encoder = TextEncoderConfig()
    encoding = parameters("text_encoder", text_encoder)[1] if text_encoder.d_model == config.text_dim else 0.0
    frames = array((videos, plan.layout.chunk, *sampler.size, sampler.channels))
    decoding = _decoding(partition, dtype, frames, on_chip + encoding)

    rows = videos * (2 if plan.guided else 1)
    heads = (config.num_layers, rows, TEXT_ROWS, config.num_attention_heads, config.attention_head_dim)
    text = TextContext(array(heads, dtype), array(heads, dtype), array((rows, TEXT_ROWS)))

    def workload(stage: int) -> Workload:
        inputs = [None if shape is None else array(shape) for shape in sampler.input_shapes(stage, videos)]
        arguments = {"text": text, "latents": inputs}

        def lower() -> jax.stages.Lowered:
            return sampler.trace(stage, {"params": params}, text, inputs).lower()

        def flops() -> tuple[float, float]:  # the loop over steps has no known length: it counts once
            count = count_flops(whole.trace(stage, {"params": params}, text, inputs).jaxpr)
            return count, count

        skipped = 0 if plan.zero_steps is None else sum(guidance.is_zero_init_step(stage, i, plan.zero_steps)
                                                        for i in range(plan.steps[stage]))
        return Workload(f"sampling, level {stage}", plan.steps[stage] - skipped,
                        {"parameters": on_chip} | {name: bytes_per_chip(tree) for name, tree in arguments.items()},
                        lower, flops, in_host, encoding + decoding.arguments["parameters"])

    return partition, [*(workload(stage) for stage in range(scheduler.stages)), decoding]


def _decoding(partition: Partition, dtype: Any, latents: jax.ShapeDtypeStruct, beside: float) -> Workload:
    """From a chunk's latents to its frames."""
    vae = WanVAE(VAEConfig(), dtype, "3d")
    params = abstract_params("vae", vae.config, dtype)
    params = sharding.with_shardings(params, jax.tree.map(lambda _: partition.replicated, params))
    function = functools.partial(decode_chunk, vae)

    def flops() -> tuple[float, float]:
        count = count_flops(jax.make_jaxpr(function)(params, latents))
        return count, count

    return Workload("decoding", 1, {"parameters": bytes_per_chip(params), "latents": bytes_per_chip(latents)},
                    lambda: sharding.jit(partition, function).lower(params, latents), flops, beside=beside)
