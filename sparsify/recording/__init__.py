"""Model to graph: one real run of the model, recorded op by op, and what the record depends on."""
