"""Command line of slidex."""


def main() -> None:
    """Entry point."""
