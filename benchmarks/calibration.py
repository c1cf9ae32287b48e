"""Whether activation ranges or smoothing that are known beforehand would help the int8 mode.

    python benchmarks/calibration.py                    # the model in the box, and made-up outlier channels

Relative error of single products x W against float64. int8 weights have one scale per output; int8 inputs have
  token    a scale of every token's own largest value, what ``--precision int8`` does
  tensor   one scale for all tokens, the best that a range known beforehand can do
  smooth   a scale per token after channels were divided by sqrt(max |x| / max |W|) and W multiplied by it (SmoothQuant)
and fp8 inputs and weights a scale per token and output. The ranges come from the very inputs they are used on, which
flatters "tensor" and "smooth". The inputs of the box are those of one forward pass on noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def rounded(values: np.ndarray, axis: int | None, bound: float) -> np.ndarray:
    """Values after quantisation with one scale per slice along ``axis`` (None: one for all).

    ``bound`` is what the largest becomes: 448 in fp8, 127 in int8 inputs, 127.5 in int8 weights.
    """
    scale = np.maximum(np.abs(values).max(axis, keepdims=True), 1e-30) / bound
    quotient = values / scale
    few_bits = quotient.astype(ml_dtypes.float8_e4m3fn) if bound == 448 else np.clip(np.round(quotient), -128, 127)
    return few_bits.astype(np.float64) * scale


def errors(x: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """x [S, in], weights [in, out] -> relative error of the product by method."""
    exact = x @ weights
    factors = np.sqrt(np.maximum(np.abs(x).max(0), 1e-9) / np.maximum(np.abs(weights).max(1), 1e-9))
    products = {
        "token": rounded(x, 1, 127) @ rounded(weights, 0, 127.5),
        "tensor": rounded(x, None, 127) @ rounded(weights, 0, 127.5),
        "smooth": rounded(x / factors, 1, 127) @ rounded(weights * factors[:, None], 0, 127.5),
        "fp8": rounded(x, 1, 448) @ rounded(weights, 0, 448)}
    return {name: float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for name, y in products.items()}


def products_of(model: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and weights of every product in the transformer's blocks, in one forward pass on noise."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from helios_jax.convert.folder import read_model_folder
    from helios_jax.convert.load import load_component
    from helios_jax.models.layers import Linear
    from helios_jax.models.transformer import Block, HeliosTransformer

    config = read_model_folder(model).transformer
    variables = {"params": load_component(model / "transformer", "transformer", dtype=jnp.float32)}
    transformer, rng = HeliosTransformer(config), np.random.default_rng(0)
    latents = rng.standard_normal((1, 9, 8, 16, config.in_channels)).astype(np.float32)
    rows = rng.standard_normal((1, 12, config.text_dim)).astype(np.float32)
    text = jax.jit(transformer.text_context)(variables, rows, jnp.array([12]))
    found, inside = [], []

    def watch(call, arguments, options, context):
        module = context.module
        if isinstance(module, Block):
            inside.append(module)
        elif isinstance(module, Linear) and inside:
            found.append((np.asarray(arguments[0], np.float64).reshape(-1, arguments[0].shape[-1]),
                          np.asarray(module.get_variable("params", "kernel"), np.float64)))
        result = call(*arguments, **options)
        if isinstance(module, Block):
            inside.pop()
        return result

    with jax.disable_jit(), nn.intercept_methods(watch):
        transformer.apply(variables, latents, jnp.array([900.0]), text)
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, default=ROOT / "assets" / "helios-tiny", metavar="FOLDER")
    arguments = p.parse_args()
    each = [errors(x, weights) for x, weights in products_of(arguments.model)]
    for name in each[0]:
        values = np.array([e[name] for e in each])
        print(f"{len(each)} products of {arguments.model.name}: {name:<7} root mean square "
              f"{np.sqrt(np.square(values).mean()):.4f}, worst {values.max():.4f}")
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1024, 1024)) / 32
    for factor in (1, 10, 100):
        x = rng.standard_normal((512, 1024))
        x[:, :8] *= factor
        print(f"8 of 1024 channels {factor} times larger: "
              + ", ".join(f"{name} {value:.4f}" for name, value in errors(x, weights).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
