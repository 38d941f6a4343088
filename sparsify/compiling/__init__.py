"""From a recording to the graph that runs."""
