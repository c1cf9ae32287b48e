"""Two hundred strings for comparing tokenisers: ordinary, multilingual, broken, hostile, empty and over-long."""

from __future__ import annotations

import numpy as np

from helios_jax.data import phrases, shapes

_FIXED = (
    "", " ", "\t\n", "a", "</s>", "<pad>", "<unk>", "a red circle</s> moves", "<pad> a <pad>", "<extra_id_0>",
    "<s>", "▁", "▁red circle", "a▁red", "red  circle", "  A  cat\n\tsits&amp;amp;stays &lt;b&gt; ",
    "cafÃ© ﬁne “quotes” — dash", "&nbsp;lead", "&amp;amp;amp;", "<i> &amp;lt; &amp;amp;amp;",
    "&#x1F600; &eacute;t&eacute;",
    "full ｗｉｄｔｈ　Latin", "zero\u200bwidth", "soft\u00adhyphen", "\u2003em space\u00a0nbsp",
    "\x1b[31mred\x1b[0m", "a\x00b", "line\u2028separator", "Ünïcödé Straße ÆØÅ", "一个红色的圆圈向右移动",
    "赤い円が右に動く", "빨간 원이 오른쪽으로 움직인다", "красный круг движется вправо",
    "دائرة حمراء تتحرك إلى اليمين", "लाल वृत्त दाईं ओर चलता है", "วงกลมสีแดง", "עיגול אדום",
    "🔴➡️ 🎬 red 🙂‍↔️ circle", "e\u0301 e\u0308", "A RED CIRCLE MOVES TO THE RIGHT",
    "A Red Circle Moves To The Right Over A Dark Background.", "red-circle/blue_square",
    "0123456789 3.14 1,000", "!?.,;:'\"()[]{}<>@#$%^&*-_=+\\|~`",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Pneumonoultramicroscopicsilicovolcanoconiosis",
    "http://example.com/?a=b&c=d", "{\"json\": [1, 2]}", "ａ\u0300", "red circle " * 400, "x" * 3000,
    "&amp;" * 900, "a " * 511, "a " * 512, "a " * 510, "漢" * 700,
)


def two_hundred() -> list[str]:
    """The same 200 strings on every machine."""
    rng = np.random.RandomState(7)
    combinations = shapes.train_combinations() + shapes.held_out_combinations()
    texts = list(_FIXED)
    while len(texts) < 150:
        attributes = combinations[rng.randint(len(combinations))]
        texts.append((phrases.free_caption if rng.randint(2) else shapes.caption)(attributes, rng))
    while len(texts) < 200:  # random characters of several scripts, with white space
        codes = rng.choice([*range(0x20, 0x7F), *range(0xA0, 0x180), *range(0x370, 0x500), 0x2014, 0x3042, 0x4E00,
                            0x1F600, 0x0A, 0x2003], size=rng.randint(1, 60))
        texts.append("".join(map(chr, codes)))
    return texts
