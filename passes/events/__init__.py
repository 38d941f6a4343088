"""Which values are events: zero unless a threshold was passed."""
