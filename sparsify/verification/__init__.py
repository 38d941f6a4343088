"""``sparsify.verify``: the whole of a sparsified module against its original."""
