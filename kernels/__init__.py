"""Device kernels of helios_jax, each with a plain JAX reference and one dispatch that picks a variant per device."""
