"""Functions of a whole model: convert, freeze, synchronize, calibrate, control the updates.

Each takes any model, finds its normalization layers and either changes them in place, saying so
in its first line, or returns a new model; on an error the model is as it was before. To add one,
write a file here that finds its layers with :mod:`._find`, and list its name in
``gammabeta/__init__.py``.
"""
