"""Self-attention of one layer, from the projections' output to the attention's output: our variants against libraries.

    python benchmarks/attention.py --json attention.json --plot attention.png     # on a GPU, production sizes
    python benchmarks/attention.py --small                                        # any machine, seconds

Every variant starts from q, k, v [B, S, C] as the projections leave them and includes RMS norm over all heads and
rotary positions. Forward, and forward with the gradients of q, k, v and both norm weights. All variants run in one
process, in turns that each begin with another variant; a figure is the median over the turns. Variants that the machine
cannot run are listed with the reason. "ours" is the dispatch's choice, which is printed.

TFLOP/s count the two products of attention alone (4 B N S^2 D forward, 3.5 times that with the gradients); norm and
rotary positions take time and count nothing. The share is that of the rate which the same machine reaches on a plain
square matrix product in the same run. "difference" is the root mean square deviation of the output from plain
attention's, relative to its size: it should be rounding.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LIBRARIES = ("cudnn", "tokamax", "xla", "torch")
FORWARD, GRADIENTS = "forward", "forward + backward"


class Problem:
    """Inputs of one length as NumPy arrays, and what they cost."""

    def __init__(self, length: int, arguments: argparse.Namespace):
        rng = np.random.default_rng(length)
        self.length, self.batch, self.heads, self.size = length, arguments.batch, arguments.heads, arguments.size
        shape = (self.batch, length, self.heads * self.size)
        self.q, self.k, self.v, self.dout = (rng.standard_normal(shape, np.float32) for _ in range(4))
        self.norm_q, self.norm_k = (rng.uniform(0.5, 1.5, shape[-1]).astype(np.float32) for _ in range(2))
        angles = rng.uniform(0, 2 * np.pi, (length, self.size // 2)).astype(np.float32)
        self.cos, self.sin = np.cos(angles), np.sin(angles)

    def flops(self, work: str) -> float:
        return (1 if work == FORWARD else 3.5) * 4 * self.batch * self.heads * self.length**2 * self.size


def jax_cores() -> dict[str, Callable | None]:
    """Name -> core attention for ``compacted_attention``; None is the dispatch."""
    from kernels.attention import cudnn, gpu, reference

    cores = {"ours": None, "ours, Pallas kernel": gpu.attention, "cudnn": cudnn.attention, "xla": reference.attention}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        def tokamax_core(q, k, v, bias=None, *, return_lse=False):
            return tokamax.dot_product_attention(q, k, v, implementation="mosaic")

        cores["tokamax"] = tokamax_core
    return cores


def choice(problem: Problem) -> str | None:
    """The variant that the dispatch takes, forward."""
    import jax
    import jax.numpy as jnp

    from kernels.attention.dispatch import explain

    shape = (problem.batch, problem.length, problem.heads, problem.size)
    return explain(*[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3).chosen


def jax_runs(problem: Problem, core: Callable | None) -> dict[str, Callable[[int], object]]:
    """Work -> function that does it n times and returns the last output, all of it on the device."""
    import jax
    import jax.numpy as jnp

    from kernels.attention import compacted_attention

    tensors = [jnp.asarray(x, jnp.bfloat16) for x in (problem.q, problem.k, problem.v)]
    weights = [jnp.asarray(x) for x in (problem.norm_q, problem.norm_k)]
    tables = {"cos": jnp.asarray(problem.cos), "sin": jnp.asarray(problem.sin)}
    dout = jnp.asarray(problem.dout, jnp.bfloat16)

    def attend(q, k, v, norm_q, norm_k, tables):
        return compacted_attention(q, k, v, norm_q=norm_q, norm_k=norm_k, num_heads=problem.heads, implementation=core,
                                   **tables)

    def gradients(*operands):
        *operands, tables, dout = operands
        out, pull = jax.vjp(lambda *x: attend(*x, tables), *operands)
        return out, pull(dout)

    def repeated(function, *operands):
        compiled = jax.jit(function).lower(*operands).compile()

        def run(times: int):
            for _ in range(times):
                out = compiled(*operands)
            jax.block_until_ready(out)
            return out[0] if isinstance(out, tuple) else out

        return run

    return {FORWARD: repeated(attend, *tensors, *weights, tables),
            GRADIENTS: repeated(gradients, *tensors, *weights, tables, dout)}


def torch_runs(problem: Problem) -> dict[str, Callable[[int], object]]:
    """PyTorch's scaled_dot_product_attention: its flash kernel on a GPU, norm and rotary through torch.compile."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def tensor(x, dtype=torch.float32):
        return torch.from_numpy(x).to(device, dtype)

    def prepare(x, weight, cos, sin):
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)
        pairs = y.float().unflatten(-1, (problem.heads, problem.size // 2, 2))  # [B, S, C] -> [B, S, N, D/2, 2]
        even, odd = pairs.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return rotated.flatten(-2).to(x.dtype).transpose(1, 2)  # [B, N, S, D]

    prepare = torch.compile(prepare) if cuda else prepare
    operands = [tensor(x, torch.bfloat16) for x in (problem.q, problem.k, problem.v)]
    operands += [tensor(x) for x in (problem.norm_q, problem.norm_k)]
    cos, sin = (tensor(x)[None, :, None] for x in (problem.cos, problem.sin))
    dout = tensor(problem.dout, torch.bfloat16)
    kernel = [SDPBackend.FLASH_ATTENTION] if cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def attend(q, k, v, norm_q, norm_k):
        values = v.unflatten(-1, (problem.heads, problem.size)).transpose(1, 2)
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(prepare(q, norm_q, cos, sin), prepare(k, norm_k, cos, sin), values)
        return out.transpose(1, 2).flatten(2)

    def forward(times: int):
        with torch.no_grad():
            for _ in range(times):
                out = attend(*operands)
            if cuda:
                torch.cuda.synchronize()
            return out

    def gradients(times: int):
        leaves = [x.detach().requires_grad_() for x in operands]
        for _ in range(times):
            out = attend(*leaves)
            torch.autograd.grad(out, leaves, dout)
        if cuda:
            torch.cuda.synchronize()
        return out.detach()

    return {FORWARD: forward, GRADIENTS: gradients}


def as_numpy(x) -> np.ndarray:
    x = x.float().cpu().numpy() if hasattr(x, "cpu") else x
    return np.asarray(x, np.float32)


def matmul_rate(width: int, repeats: int) -> float:
    """TFLOP/s of a bfloat16 product of two square matrices on JAX's default device."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16)).lower(x, x).compile()
    times = []
    for _ in range(repeats + 1):  # the first is the warm-up
        start = time.perf_counter()
        for _ in range(10):
            y = product(x, x)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - start) / 10)
    return 2 * width**3 / statistics.median(times[1:]) / 1e12


def measure(arguments: argparse.Namespace) -> dict:
    import jax

    rate = matmul_rate(512 if arguments.small else 8192, arguments.repeats)
    machine = describe_machine()
    print(f"{machine['device']}, jax {jax.__version__}, {arguments.heads} heads of {arguments.size}, bfloat16, "
          f"plain matrix product {rate:.3g} TFLOP/s")
    rows, refused, chosen = [], {}, {}
    for length in arguments.lengths:
        problem = Problem(length, arguments)
        chosen[length] = choice(problem)
        print(f"{length} tokens: the dispatch takes {chosen[length]}")
        makers = {name: functools.partial(jax_runs, problem, core) for name, core in jax_cores().items()}
        if importlib.util.find_spec("torch"):
            makers["torch"] = functools.partial(torch_runs, problem)
        prepared = {}
        for name, make in makers.items():
            try:
                runs = make()
                prepared[name] = {work: (run, as_numpy(run(1))) for work, run in runs.items()}
            # A library that is too old or out of memory must not cost the others their figures.
            except Exception as error:
                refused.setdefault(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        exact = prepared["xla"][FORWARD][1] if "xla" in prepared else None
        for work in (FORWARD, GRADIENTS):
            rows += compare(problem, work, prepared, exact, rate, arguments)
    for name, reason in refused.items():
        print(f"{name}: not run: {reason}")
    return {"machine": machine, "arguments": vars(arguments), "matmul_tflops": rate, "rows": rows, "not_run": refused,
            "dispatch": chosen}


def compare(problem: Problem, work: str, prepared: dict, exact: np.ndarray | None, rate: float,
            arguments: argparse.Namespace) -> list[dict]:
    """Times the variants in turns and prints their rows, fastest first."""
    inner = {}
    for name, runs in prepared.items():
        start = time.perf_counter()
        runs[work][0](1)
        inner[name] = max(1, round(arguments.turn / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in prepared}
    names = list(prepared)
    for turn in range(arguments.repeats):
        # Another one begins every turn: on an H200 the one after the slowest was 4 to 8 % faster than itself elsewhere.
        for name in names[turn % len(names):] + names[: turn % len(names)]:
            start = time.perf_counter()
            prepared[name][work][0](inner[name])
            times[name].append((time.perf_counter() - start) / inner[name])
    medians = {name: statistics.median(values) for name, values in times.items()}
    libraries = [seconds for name, seconds in medians.items() if name in LIBRARIES]
    rows = []
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        tflops = problem.flops(work) / seconds / 1e12
        out = prepared[name][work][1]
        difference = None if exact is None else float(np.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2)))
        against = min(libraries) / seconds if libraries else None
        rows.append({"length": problem.length, "work": work, "variant": name, "seconds": seconds, "tflops": tflops,
                     "share_of_matmul": tflops / rate, "against_best_library": against, "difference": difference})
        print(f"{problem.length:>6} {work:<19} {name:<20} {seconds * 1e3:9.3f} ms {tflops:9.4g} TFLOP/s "
              f"{100 * tflops / rate:5.1f} % of matmul"
              + (f" {against:6.2f}x best library" if against else "")
              + (f"   difference {difference:.1e}" if difference is not None else ""), flush=True)
    return rows


def describe_machine() -> dict:
    import jax

    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    for package in ("torch", "tokamax"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.import_module(package).__version__
    return {"device": device.device_kind, "platform": device.platform, "backend": device.client.platform_version,
            "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}


def plot(report: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    variants = list(dict.fromkeys(row["variant"] for row in report["rows"]))
    lengths = list(dict.fromkeys(row["length"] for row in report["rows"]))
    for panel, work in zip(panels, (FORWARD, GRADIENTS), strict=True):
        for position, name in enumerate(variants):
            rates = {row["length"]: row["tflops"] for row in report["rows"]
                     if row["variant"] == name and row["work"] == work}
            offsets = np.arange(len(lengths)) + (position - (len(variants) - 1) / 2) * 0.8 / len(variants)
            panel.bar(offsets, [rates.get(length, 0) for length in lengths], 0.8 / len(variants), label=name)
        panel.axhline(report["matmul_tflops"], color="grey", linestyle=":", label="plain matrix product")
        panel.set_xticks(range(len(lengths)), [f"{length} tokens" for length in lengths])
        panel.set_title(work)
    panels[0].set_ylabel("TFLOP/s of attention, norm and rotary included")
    panels[1].legend(fontsize="small")
    figure.suptitle(report["machine"]["device"])
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[11040, 4560, 2940])
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=40)
    p.add_argument("--size", type=int, default=128, help="head size")
    p.add_argument("--repeats", type=int, default=10, help="turns per variant")
    p.add_argument("--turn", type=float, default=0.1, help="seconds of work in one turn")
    p.add_argument("--small", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    p.add_argument("--plot", metavar="FILE", help="where to draw them (needs matplotlib)")
    arguments = p.parse_args(argv)
    if arguments.small:
        arguments.lengths, arguments.heads, arguments.size = [61, 40], 2, 64
        arguments.repeats, arguments.turn = 2, 0.0
    # PyTorch shares the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = measure(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)
    return report


if __name__ == "__main__":
    main()
