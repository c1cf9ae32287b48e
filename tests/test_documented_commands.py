"""Every command of the documentation is one that its program accepts."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import sample
import train

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py")))


def commands(page: Path) -> list[str]:
    """Commands of fenced or indented blocks, continued lines joined, optional parts as if they were given."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^\s*(?:srun \S+ )?(python (?:-m )?[\w./-]+(?: .*)?)$", text, re.M)
    return [re.sub(r"[\[\]]", "", line) for line in lines if "--config ..." not in line]


WITH_SUBCOMMANDS = ("helios_jax.data.tfds",)
CASES = [pytest.param(command, id=f"{page.name}-{i}") for page in PAGES for i, command in enumerate(commands(page))]


@functools.cache
def usage(program: str, *subcommand: str) -> str:
    """What a program prints for --help."""
    monkeypatch, printed = pytest.MonkeyPatch(), io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [program, *subcommand, "--help"])
        patch.chdir(ROOT)
        patch.syspath_prepend(str((ROOT / program).parent))  # where a script finds the modules beside it
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert end.value.code in (0, None)
    return printed.getvalue()


@pytest.mark.parametrize("command", CASES)
def test_a_documented_command_is_accepted_by_its_program(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    program, *arguments = words[1:] if words[0] == "-m" else words
    if program == "sample.py":
        assert sample.options(arguments)
    elif program == "train.py":
        run, _, _ = train.parse_arguments([program, *arguments])
        sizes = {axis: max(1, getattr(run.mesh, axis)) for axis in ("data", "fsdp", "context", "tensor")}
        parts = sizes["data"] * sizes["fsdp"] * run.accumulate
        assert run.batch_size % parts == 0, f"batch {run.batch_size} over {parts}"
        heads = getattr(getattr(run.objective, "transformer", None), "num_attention_heads", 0)
        assert heads % sizes["tensor"] == 0
        assert heads // sizes["tensor"] * (run.batch_size // parts) % sizes["context"] == 0
    elif program not in ("pytest", "pip"):
        assert (ROOT / program).is_file() or not program.endswith(".py")
        listed = usage(program, *arguments[: program in WITH_SUBCOMMANDS])
        flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        if program == "helios_jax.data.beam_extract":  # what it does not know is Beam's
            flags = [flag for flag in flags if flag in ("--model", "--metadata", "--videos", "--output")]
        assert all(re.search(rf"{re.escape(flag)}\b", listed) for flag in flags), (flags, listed)


def test_the_commands_are_found():
    found = [case.values[0] for case in CASES]
    assert len(found) > 60 and sum(command.startswith("python train.py") for command in found) > 15
    assert any("--config.mesh.fsdp=16" in command for command in found)
