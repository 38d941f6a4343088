"""What the model returns, and who else may write to it."""
