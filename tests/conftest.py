"""Settings of the whole suite."""

import os
from pathlib import Path

import pytest

QUICK_COMPILATION = "JAX_DISABLE_MOST_OPTIMIZATIONS"

# Compiled programs are shared between the workers of a run and between runs; XLA's key holds everything that matters.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: without LLVM's optimisations a program starts up to ten times sooner, here and in
# the processes that tests start. What depends on them asks for `fully_optimized`.
os.environ.setdefault(QUICK_COMPILATION, "1")
# Two workers on two cores: more threads of PyTorch's would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def fully_optimized():
    """Compiles as users do, for claims about bits, memory or what a compiler accepts."""
    import jax

    quick = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(QUICK_COMPILATION, "0")
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint of each variant, in the published layout."""
    from tests.tiny_checkpoint import write_tiny_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {variant: write_tiny_checkpoint(root / variant, variant) for variant in ("base", "mid", "distilled")}


@pytest.fixture(scope="module")
def base(folders):
    from helios_jax.pipeline.pipeline import HeliosPipeline

    return HeliosPipeline.from_pretrained(folders["base"])


@pytest.fixture(scope="module")
def distilled(folders):
    from helios_jax.pipeline.pipeline import HeliosPipeline

    return HeliosPipeline.from_pretrained(folders["distilled"])
