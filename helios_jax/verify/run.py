"""The order of a comparison: PyTorch first, its results kept as small arrays, then this library on the same inputs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from helios_jax.verify import inputs, ours, theirs
from helios_jax.verify.compare import Check, Results, appeal, compare, compare_ids
from helios_jax.verify.inputs import Settings

Report = Callable[[str], None]
# Results of the sample; the others are of the transformer.
SAMPLE = ("latents", "frames")
# Embeddings of prompt and negative prompt: this library's, and PyTorch's by precision.
Embeddings = tuple[tuple[np.ndarray, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]


def verify(settings: Settings, report: Report = lambda line: None) -> list[Check]:
    """Runs the comparisons that ``settings`` ask for.

    Args:
      report: receives one line per stretch of work.

    Returns: one entry per compared result, in the order of the components.

    Raises:
      UserError: a side cannot load a component, or PyTorch is not there.
    """
    theirs.import_all()
    checks: list[Check] = []
    if "tokenizer" in settings.components:
        checks += _tokenizer(settings, report)
    embeddings = _stand_ins(settings)
    if "text_encoder" in settings.components:
        more, embeddings = _text_encoder(settings, report)
        checks += more
    if "vae" in settings.components:
        checks += _vae(settings, report)
    if {"transformer", "sample"} & set(settings.components):
        checks += _transformer(settings, embeddings, report)
    return checks


def _tokenizer(settings: Settings, report: Report) -> list[Check]:
    texts = inputs.texts(settings.prompt)
    with _stretch("PyTorch: token ids", report):
        want = theirs.token_ids(settings, texts)
    with _stretch("JAX: token ids", report):
        got = ours.token_ids(settings, texts)
    return [compare_ids(got, want, texts)]


def _stand_ins(settings: Settings) -> Embeddings:
    rows = inputs.stand_in_rows(settings)
    return rows, dict.fromkeys(settings.precisions, rows)


def _text_encoder(settings: Settings, report: Report) -> tuple[list[Check], Embeddings]:
    prompts = inputs.prompts(settings.prompt)
    with _stretch("PyTorch: text encoder", report):
        want = theirs.text_encoder(settings, prompts, settings.precisions)
    with _stretch("JAX: text encoder", report):
        got = ours.text_encoder(settings, prompts)
    checks = _judged("text_encoder", got, want["float32"], _half(settings, want), report, lambda _: theirs.text_encoder(
        settings, prompts, ("float64",))["float64"])
    of_sample = tuple(prompts)[:2]
    return checks, (tuple(got[name] for name in of_sample),
                    {precision: tuple(rows[name] for name in of_sample) for precision, rows in want.items()})


def _vae(settings: Settings, report: Report) -> list[Check]:
    video = inputs.video(settings)
    with _stretch("PyTorch: VAE", report):
        want = theirs.vae(settings, video, None, "float32")
    latents = want["encode: mean"]
    with _stretch("JAX: VAE", report):
        got = ours.vae(settings, video, latents)
    return _judged("vae", got, want, None, report, lambda _: theirs.vae(settings, video, latents, "float64"))


def _transformer(settings: Settings, embeddings: Embeddings, report: Report) -> list[Check]:
    """Forward passes take PyTorch's embedding on both sides; the sample takes each side's own, from prompt to frame."""
    own_rows, their_rows = embeddings
    all_cases = inputs.transformer_cases(settings)
    rows = settings.rounded(their_rows["float32"][0])

    def run_theirs(components: Sequence[str], precisions: Sequence[str]) -> Any:
        by_precision = {p: their_rows.get(p, their_rows["float32"]) for p in precisions}
        return theirs.transformer(settings, all_cases if "transformer" in components else [], rows,
                                  by_precision if "sample" in components else None, precisions)

    wanted = [c for c in ("transformer", "sample") if c in settings.components]
    with _stretch(f"PyTorch: {' and '.join(wanted)}", report):
        want = run_theirs(wanted, settings.precisions)
    with _stretch(f"JAX: {' and '.join(wanted)}", report):
        got = ours.transformer(settings, all_cases if "transformer" in wanted else [], rows,
                               own_rows if "sample" in wanted else None)
    checks = []
    for component in wanted:
        parts = [_part(results, component) for results in (got, want["float32"], _half(settings, want))]
        checks += _judged(component, *parts, report, lambda c: run_theirs([c], ("float64",))["float64"])
    return checks


def _part(results: Results | None, component: str) -> Results | None:
    """The results that belong to the transformer or to the sample."""
    if results is None:
        return None
    return {name: value for name, value in results.items() if (name in SAMPLE) == (component == "sample")}


def _judged(component: str, got: Results, want: Results, half: Results | None, report: Report,
            in_float64: Callable[[str], Results]) -> list[Check]:
    """Verdicts; what exceeds a float32 tolerance gets a second one from a float64 run, made only then."""
    checks = compare(component, got, want, half)
    if half is not None or all(check.passed or check.note for check in checks):
        return checks
    with _stretch(f"PyTorch: {component} in float64, since a float32 tolerance is exceeded", report):
        exact = in_float64(component)
    return [check if check.passed or check.note else appeal(check, got[check.name], want[check.name], exact[check.name])
            for check in checks]


def _half(settings: Settings, results: Mapping[str, Results]) -> Results | None:
    return results[settings.dtype] if settings.dtype != "float32" else None


@contextlib.contextmanager
def _stretch(what: str, report: Report) -> Iterator[None]:
    """Times a stretch of work and then gives its memory back to the system."""
    report(f"{what} ...")
    start = time.monotonic()
    yield
    release()
    report(f"{what}: {time.monotonic() - start:.0f} s")


def release() -> None:
    """Frees what nothing refers to any more; the C allocator keeps freed pages otherwise."""
    gc.collect()
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
