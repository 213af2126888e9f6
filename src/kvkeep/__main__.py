"""``python -m kvkeep``: the same as the command ``kvkeep``."""

from kvkeep.cli.main import main

if __name__ == "__main__":
    main()
