"""One command for every figure in docs/performance.md; ``make bench`` runs them all."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the slidex command does; read when torch is imported
