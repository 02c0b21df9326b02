"""``python -m reprise``: the same as the command ``reprise``."""

from reprise.cli import main

if __name__ == "__main__":
    main()
