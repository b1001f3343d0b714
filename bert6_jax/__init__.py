"""Transformers as pure functions over nested dicts: models, training, readout, metrics, checkpoints.

Shapes live in names. An array's name ends in one letter an axis (`ids_BT`, `resid_MBTD`), everywhere:

    B  rows of a batch              T  positions of a row        K  prediction slots of a row
    D  width of the residual stream N  attention heads           H  width of one head
    F  hidden units of the MLP      V  vocabulary                L  blocks
    M  depths, L + 1: the embedding output (0) and the output of every block
    S  steps of one dispatch        C  corruption modes (mask, random, kept)
"""

__version__ = "0.1.0"
