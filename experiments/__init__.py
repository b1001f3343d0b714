"""One file a paper, each readable from top to bottom; `python -m experiments.NAME --help`."""
