"""The one error for bad input: a single line that names the file, line or field and the remedy.

The command line prints it as `error: ...` and exits with code 2; library users catch it as a `ValueError`.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input (a path, a file, a setting, a checkpoint) that cannot be used; the message says what to do."""
