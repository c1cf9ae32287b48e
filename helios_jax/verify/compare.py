"""Errors, tolerances and verdicts, and the table that shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Results = Mapping[str, np.ndarray]

# Largest error in float32 as a share of the output's range: the project's promise for components and for final latents.
COMPONENT_TOLERANCE = 1e-5
LATENTS_TOLERANCE = 1e-4
# Largest error of a frame in [0, 1]: less than one of 255 levels.
FRAMES_TOLERANCE = 1 / 255
# Two roundings of the same quality differ by chance; this is how much worse ours may look in bfloat16, and in float32
# where a few ill-conditioned values make the whole error.
HALF_MARGIN = 1.05
EXACT_MARGIN = 2.0

ORIGINS = {
    "equal": "ids must be equal",
    "of range": "float32 rounding in another order of summation: largest error over (maximum - minimum) of PyTorch's "
                "output; 1e-05 for a component, 1e-04 for the latents of a sample",
    "level": "less than one of 255 levels of brightness",
    "of PyTorch's": f"at most {HALF_MARGIN:g} times the relative RMS error that PyTorch itself makes in bfloat16; both "
                    "are measured against PyTorch's float32 arithmetic on the same weights and inputs",
    "float64": "the float32 tolerance was exceeded, which happens where an output is sensitive to rounding; so both "
               f"programs are measured against PyTorch in float64: at most {EXACT_MARGIN:g} times the relative RMS "
               "error of PyTorch's own float32",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      component, name: what was compared.
      largest: largest absolute error; for token ids the number of texts that differ.
      of_range: ``largest`` over the range of the wanted values, None where that means nothing.
      relative_rms: root mean square of the error over that of the wanted values.
      tolerance: its limit, of the quantity that ``origin`` tells.
      origin: a key of ``ORIGINS``.
      passed: the verdict; a value that is not a number never passes.
      note: why a comparison was not possible, or empty.
    """

    component: str
    name: str
    largest: float
    of_range: float | None
    relative_rms: float | None
    tolerance: float
    origin: str
    passed: bool
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite becomes text."""
        return {k: v if not isinstance(v, float) or np.isfinite(v) else str(v)
                for k, v in dataclasses.asdict(self).items()}


def compare_ids(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], texts: Sequence[str]) -> Check:
    """Token ids, text by text."""
    wrong = [text for a, b, text in zip(ours, theirs, texts, strict=True) if list(a) != list(b)]
    note = f"first: {wrong[0][:40]!r}" if wrong else ""
    name = f"ids of {len(texts)} texts"
    return Check("tokenizer", name, float(len(wrong)), None, None, 0.0, "equal", not wrong, note)


def compare(component: str, ours: Results, reference: Results, half: Results | None = None) -> list[Check]:
    """Checks of one component, one per result.

    Args:
      ours, reference, half: this library's results, PyTorch's in float32, and PyTorch's in bfloat16 where ours are of
        a bfloat16 run; arrays of equal shapes under equal names.
    """
    if set(ours) != set(reference):
        raise ValueError(f"{component}: results {sorted(ours)} and {sorted(reference)} cannot be compared")
    return [_compare(component, name, ours[name], want, None if half is None else half[name])
            for name, want in reference.items()]


def _compare(component: str, name: str, got: np.ndarray, want: np.ndarray, half: np.ndarray | None) -> Check:
    if got.shape != want.shape:
        return Check(component, name, float("nan"), None, None, 0.0, "of range", False,
                     f"shapes {list(got.shape)} and {list(want.shape)}")
    largest, of_range, rms = errors(got, want)
    if half is not None:
        origin, measured, tolerance = "of PyTorch's", rms, HALF_MARGIN * errors(half, want)[2]
    elif name == "frames":
        origin, measured, tolerance = "level", largest, FRAMES_TOLERANCE
    else:
        origin, measured = "of range", of_range
        tolerance = LATENTS_TOLERANCE if component == "sample" else COMPONENT_TOLERANCE
    return Check(component, name, largest, of_range, rms, tolerance, origin, bool(measured <= tolerance))


def appeal(check: Check, got: np.ndarray, float32: np.ndarray, float64: np.ndarray) -> Check:
    """A second verdict on a float32 check that failed, with PyTorch in float64 as the judge of both programs.

    A defect leaves ours far from float64 and PyTorch's float32 near it; mere sensitivity to rounding takes both equally
    far from it.

    Args:
      got, float32, float64: the result of this library and those of PyTorch.
    """
    largest, of_range, rms = errors(got, float64)
    tolerance = EXACT_MARGIN * errors(float32, float64)[2]
    return dataclasses.replace(check, largest=largest, of_range=of_range, relative_rms=rms, tolerance=tolerance,
                               origin="float64", passed=bool(rms <= tolerance))


def errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float, float]:
    """Largest absolute error, the same over the range of ``want``, and the relative root mean square, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    difference = got - want
    largest = float(np.abs(difference).max())
    return (largest, _ratio(largest, float(want.max() - want.min())),
            _ratio(float(np.sqrt(np.mean(difference**2))), float(np.sqrt(np.mean(want**2)))))


def _ratio(error: float, scale: float) -> float:
    """error / scale; no error of nothing is none, any error of nothing is infinite."""
    if scale > 0 or np.isnan(scale):
        return error / scale
    return 0.0 if error == 0 else float("inf")


def table(checks: Sequence[Check]) -> str:
    """The checks as aligned text, then where each kind of tolerance comes from."""
    head = ("component", "check", "largest error", "of range", "rel. RMS", "tolerance", "verdict")
    rows = [head, *(_row(check) for check in checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    used = dict.fromkeys(check.origin for check in checks)
    return "\n".join([*lines, "", "tolerances:", *(f"  {_LABELS[origin]}: {ORIGINS[origin]}" for origin in used)])


_LABELS = {"equal": "equal", "of range": "of range", "level": "error", "of PyTorch's": "rel. RMS",
           "float64": "rel. RMS*"}


def _row(check: Check) -> tuple[str, ...]:
    verdict = ("PASS" if check.passed else "FAIL") + (f" ({check.note})" if check.note else "")
    if check.origin == "equal":
        return (check.component, check.name, f"{check.largest:.0f} differ", "-", "-", "equal", verdict)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    return (check.component, check.name, number(check.largest), number(check.of_range), number(check.relative_rms),
            f"{_LABELS[check.origin]} {check.tolerance:.1e}", verdict)


def summary(checks: Sequence[Check]) -> str:
    """One line: how many passed, or which components failed."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return f"PASS: all {len(checks)} checks"
    components = ", ".join(dict.fromkeys(check.component for check in failed))
    return f"FAIL: {len(failed)} of {len(checks)} checks, in {components}"
