"""Data: procedural clips (:mod:`.shapes`), video corpora (:mod:`.videos`), latents of both, and the input pipelines.

:mod:`.build_latents` and :mod:`.extract` write records, :mod:`.beam_extract` and :mod:`.tfds` are other ways to do so;
:mod:`.pipeline` and :mod:`.buckets` make training batches of them. :mod:`.reader` reads the shapes off frames again.
"""
