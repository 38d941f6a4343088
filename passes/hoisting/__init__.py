"""What no recurrence needs leaves the loop, and runs for all steps at once."""
