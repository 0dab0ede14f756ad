"""``python -m megadpo …`` is the command ``megadpo …``."""

from megadpo.cli import console

if __name__ == "__main__":
    console()
