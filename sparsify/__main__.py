"""``python -m sparsify`` is the command ``sparsify``."""

from sparsify.command_line.main import main

raise SystemExit(main())
