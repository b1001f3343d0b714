"""Sparse dictionaries on the activations of `bert6_jax` transformers: one crosscoder core with a head axis.

A sparse autoencoder is a crosscoder with one head. Letters beside those of `bert6_jax`:

    H  heads of a dictionary: places whose activations it reads and writes together (1: an autoencoder)
    D  width of one head's activations
    F  latents
    K  active latents of a row
    G  members of a bank
    S  sites that are harvested: depths, models
    B  rows of a batch, one activation vector a head each
"""
