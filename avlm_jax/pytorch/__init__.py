"""Files that run with PyTorch and without JAX, the other way round from the rest of this package.

Nothing here is imported by the package: `modeling_savenvideo.py` is copied as it stands into every exported folder, where it
runs the model; the other file runs as a process of its own when a pickled checkpoint is converted.
"""
