"""What is compared on: the settings of a run and its deterministic inputs, the same numbers for both sides.

Arrays are NumPy, float32, channel-last. In a bfloat16 run the inputs are rounded to bfloat16 first, so that no error is
counted that neither side made.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from helios_jax.convert.folder import ModelFolder
from helios_jax.models.inputs import History
from helios_jax.pipeline.request import Size

COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "sample")
PROMPT = "A cat walks along a sunlit garden wall, stops, and looks back over its shoulder; shallow depth of field."
# One more than the diffusers default, so that Mid gets past its two zero steps and UniPC past its first-order ones.
STEPS_PER_STAGE = 3
CHUNK_FRAMES = 33
CHUNK_LATENTS = 9
# Frames of the history tiers short (anchor and newest), mid, long.
TIERS = (2, 2, 16)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A comparison.

    Attributes:
      folder: the model as this library reads it.
      against: the model as PyTorch reads it; usually the same folder.
      dtype: 'float32' or 'bfloat16', of transformer and text encoder. The VAE runs in float32, as the original's does.
      size: pixels.
      frames: of the short sample.
      steps: of the short sample, per pyramid stage.
      prompt: of text encoder and sample.
      seed: of the sample's noise.
      components: what to compare, in the order of ``COMPONENTS``.
    """

    folder: ModelFolder
    against: ModelFolder
    dtype: str
    size: Size
    frames: int
    steps: tuple[int, ...]
    prompt: str
    seed: int
    components: tuple[str, ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        """In which dtypes PyTorch runs; float32, the reference, is always the last."""
        return ("float32",) if self.dtype == "float32" else (self.dtype, "float32")

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.size.height // 8, self.size.width // 8

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """float32 values that the run's dtype holds exactly."""
        array = np.asarray(array, np.float32)
        return array if self.dtype == "float32" else array.astype(ml_dtypes.bfloat16).astype(np.float32)


def texts(prompt: str) -> tuple[str, ...]:
    """Strings for the tokenizer: ordinary and awkward ones."""
    long = "a very long walk through the old town at night, "
    return (
        prompt, "", " ", "\n\t ", "a", "A", "0123456789", "3.14159 x 2 = ?", "  spaces   in\tbetween \n lines  ",
        "UPPER lower MiXeD", "don't, won't; \"quoted\" — dashes–and…dots", "e-mail@example.com https://example.com/a?b=c",
        "&lt;b&gt;bold&lt;/b&gt; &amp; &amp;amp; &quot;x&quot; &nbsp;", "&eacute;t&eacute; &#8364; &#x1F600;",
        "</s> <pad> <unk> <extra_id_0>", "cafÃ© dâ€™Ã©tÃ©", "caf\u00e9 cafe\u0301", "ﬁﬂ ①② Ⅳ ｗｉｄｅ", "ß ẞ İ ı ǆ",
        "一只猫走过花园的墙。", "猫が庭の塀を歩く、振り返る。", "고양이가 정원 담을 걷는다", "Кошка идёт по стене сада",
        "Η γάτα περπατά στον τοίχο", "القطة تمشي على الجدار", "החתול הולך על הקיר", "बिल्ली बगीचे की दीवार पर चलती है",
        "แมวเดินบนกำแพงสวน", "Con mèo đi trên tường", "Kedi bahçe duvarında yürüyor", "😀 👩‍👩‍👧 🏳️‍🌈 ❤️",
        "zero\u200bwidth\u200djoin\ufeffmark", "nul\x00bell\x07esc\x1b[31m", "\u2028line\u2029paragraph\u00a0nbsp",
        "ŵëïřđ ďïàçřïťïçš", "∀x∈ℝ: x² ≥ 0", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "word " * 511, "word " * 512, "word " * 600, long * 30,
        "x" * 3000,
    )


def prompts(prompt: str) -> dict[str, str]:
    """Prompts for the text encoder by the name of their check; the first two are those of the sample."""
    return {"prompt": prompt, "empty prompt": "", "long prompt": (prompt + " ") * 12}


def stand_in_rows(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [rows, text_dim] of a prompt and a negative prompt for a run without the text encoder."""
    rng = np.random.default_rng(1)
    width = settings.folder.transformer.text_dim
    return tuple(settings.rounded(0.3 * rng.standard_normal((rows, width))) for rows in (20, 1))


def video(settings: Settings) -> np.ndarray:
    """A chunk of moving waves with a little noise: [1, 33, H, W, 3] in [-1, 1]."""
    rng = np.random.default_rng(2)
    t, y, x = np.meshgrid(np.arange(CHUNK_FRAMES) / 8, np.linspace(0, 3, settings.size.height),
                          np.linspace(0, 5, settings.size.width), indexing="ij")
    waves = np.stack([np.sin(2 * x + t), np.cos(3 * y - t + x), np.sin(x * y - 2 * t)], axis=-1)  # [F, H, W, 3]
    return np.clip(0.8 * waves + 0.1 * rng.standard_normal(waves.shape), -1, 1).astype(np.float32)[None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One forward pass of the transformer.

    Attributes:
      name: of its check.
      latents: [1, 9, h, w, C].
      timestep: 0...1000.
      history: three tiers of arrays [1, n, H', W', C], or None.
    """

    name: str
    latents: np.ndarray
    timestep: float
    history: History | None


def transformer_cases(settings: Settings) -> list[Case]:
    """Every pyramid stage with all history tiers (the full resolution first), an empty history, and no history."""
    rng = np.random.default_rng(3)
    height, width = settings.latent_size
    config = settings.folder.transformer
    stages = len(settings.steps)

    def latents(frames: int, factor: int = 1) -> np.ndarray:
        shape = (1, frames, height // factor, width // factor, config.in_channels)
        return settings.rounded(rng.standard_normal(shape))

    full = latents(CHUNK_LATENTS)
    plain = Case("without history", full, 400.0, None)
    if not config.has_multi_term_memory_patch:
        return [plain]
    history = History(*(latents(n) for n in TIERS))
    cases = []
    for stage in reversed(range(stages)):
        factor = 2 ** (stages - 1 - stage)
        current = latents(CHUNK_LATENTS, factor) if factor > 1 else full
        cases.append(Case(f"stage {stage + 1} of {stages}, {height // factor}x{width // factor} latents, all tiers",
                          current, 1000 * (stages - stage - 0.35) / stages, history))
    return [*cases, Case("empty history (first chunk)", full, 999.0, History(*(np.zeros_like(h) for h in history))),
            plain]
