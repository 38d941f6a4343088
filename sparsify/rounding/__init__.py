"""How far arithmetic may land from exact results: bounds for values and operations."""
