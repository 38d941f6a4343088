"""``python -m sparsify`` is the command ``sparsify``."""

from sparsify.cli import main

raise SystemExit(main())
