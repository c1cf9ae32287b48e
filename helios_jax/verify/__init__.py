"""Compares a checkpoint as this library runs it with the same checkpoint in PyTorch (diffusers and transformers).

Run it as ``python -m helios_jax.verify --model FOLDER_OR_ID``; ``docs/verify.md`` explains the output. PyTorch,
diffusers and transformers are imported only inside :mod:`helios_jax.verify.theirs`, when a comparison runs.
"""
