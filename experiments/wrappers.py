"""Fine-tuning as a thin wrapper around old capabilities (arXiv 2311.12786).

    python -m experiments.wrappers tracr        RASP programs compiled into a transformer, then fine-tuned
    python -m experiments.wrappers pcfg         small GPTs pre-trained on a probabilistic grammar, then fine-tuned
    python -m experiments.wrappers compile      compile a RASP program, run it, check it, save it

Each word has its own `--help`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.harness import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to the half that the first word names; exit code 2 and one line if it names none."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["tracr"]:
        from experiments import wrappers_tracr

        return wrappers_tracr.main(argv[1:])
    if argv[:1] == ["pcfg"]:
        from experiments import wrappers_pcfg

        return wrappers_pcfg.main(argv[1:])
    if argv[:1] == ["compile"]:
        from experiments import wrappers_compile

        return wrappers_compile.main(argv[1:])
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    given = f"{argv[0]!r} is none of" if argv else "say which part:"
    return cli.fail(f"{given} tracr, pcfg, compile; python -m experiments.wrappers --help explains them")


if __name__ == "__main__":
    sys.exit(main())
