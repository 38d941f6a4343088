"""Networks and cells that tests run."""
