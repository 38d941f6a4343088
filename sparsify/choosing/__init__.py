"""Which kernel a region gets: what is worth compiling, what it takes, what is chosen."""
