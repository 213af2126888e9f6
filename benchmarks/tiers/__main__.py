"""Measures the tiers: all of them, or those named.

    python -m benchmarks.tiers [NAME ...]

What needs files makes them where TMPDIR says.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.tiers import find_parts, print_figures, run_parts
from kvkeep.model.errors import KvkeepError

OK, BROKEN, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 when all could be measured, 1 when one broke, 2 for a name that is none."""
    parser = argparse.ArgumentParser(prog="make bench ONLY=tiers")
    parser.add_argument("names", nargs="*", help="tiers to measure; all without")
    parser.add_argument("--here", action="store_true", help="one tier, in this process")
    parsed = parser.parse_args(argv)
    known = find_parts()
    unknown = [name for name in parsed.names if name not in known]
    if unknown:
        print(f"there is no tier {unknown[0]!r}; take some of: {', '.join(known)}", file=sys.stderr)
        return BAD_INPUT
    if not parsed.here:
        broken = run_parts(parsed.names or known)
        if broken:
            print(f"could not be measured: {', '.join(broken)}", file=sys.stderr)
        return BROKEN if broken else OK
    for name in parsed.names:
        try:
            print_figures(name)
        except KvkeepError as error:
            print(error, file=sys.stderr)
            return BROKEN
    return OK


if __name__ == "__main__":
    sys.exit(main())
