"""Time loops as values: one step as a graph, its gradient, and its form as a kernel."""
