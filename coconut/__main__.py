"""``python -m coconut``, the same as ``coconut``."""

from coconut.commands.main import run

if __name__ == "__main__":
    run()
