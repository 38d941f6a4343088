"""What all passes know of the nodes and values of a graph, and how they write new ones."""
