"""Sparse dictionaries on the activations of `bert6_jax` transformers."""
