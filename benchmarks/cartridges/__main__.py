"""What cartridges are worth, in parts that may be run alone.

    python -m benchmarks.cartridges [--only training]

``training``: a text of 530 tokens becomes a cartridge of 64 on the packaged model, as a user trains
one; right answers to questions that nobody trained on say how much of the text it holds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping

from benchmarks.cartridges import training

OK, BROKEN = 0, 1
PARTS: Mapping[str, Callable[[], bool]] = {"training": training.measure}


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line names; 1 if a figure could not be taken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cartridges")
    parser.add_argument("--only", choices=PARTS, action="append")
    only = parser.parse_args(argv).only or list(PARTS)
    measured = [PARTS[name]() for name in only]
    return OK if all(measured) else BROKEN


if __name__ == "__main__":
    sys.exit(main())
