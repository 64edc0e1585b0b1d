"""The network: it knows tensors, not the product.

Nothing in this package imports the rest of `step1x_edit`; mistakes of a caller are `ValueError`s.
The modules carry the names of the official checkpoint, so that its tensors load without renaming.
"""
