"""The last word on a recording: it gives the model's results and gradients."""
