"""Worlds with known truth, so that the instruments can be scored and not only looked at."""
