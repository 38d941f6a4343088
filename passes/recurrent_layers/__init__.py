"""torch's own recurrent layers, step by step."""
