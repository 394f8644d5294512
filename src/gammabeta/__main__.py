"""``python -m gammabeta``: the command line."""

from gammabeta.cli import main

if __name__ == "__main__":
    main()
