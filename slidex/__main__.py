"""`python -m slidex`."""

from slidex.cli import main

if __name__ == "__main__":
    main()
