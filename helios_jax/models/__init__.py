"""The three networks of Helios and the heads that training adds to one of them, in functional Flax Linen.

Glossary of shape letters used in every shape comment:
  B batch, T latent frames, F RGB frames, h w latent rows and columns, H W pixel rows and columns,
  C channels or model width, S sequence length, N heads, D head size, L layers, r LoRA rank.
Latents are channel-last: [B, T, h, w, C]. Videos are [B, F, H, W, 3] in [-1, 1].

Only this package imports flax. Parameters are plain nested dicts of arrays whose names follow the PyTorch checkpoint:
``a.b.weight`` of a Linear is ``a/b/kernel`` (transposed to [in, out]), of a convolution ``kernel`` ([..., in, out]);
a list index joins its name with an underscore (``to_out.0`` is ``to_out_0``); layers of a stack share one array with
the layer as leading axis (``blocks.3.attn1.to_q.weight`` is ``blocks/attn1/to_q/kernel[3]``).
"""
