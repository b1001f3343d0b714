"""Ours against a named peer, side by side in one run; what was learnt is in NOTES.md."""
