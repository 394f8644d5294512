"""Modules that own parameters and running statistics: one file per method.

To add a method, write one file here: a module that takes :class:`~._running.RunningMoments`
for its buffers, calls :mod:`gammabeta.ops` for its arithmetic and imports no other public file
of this folder; then one line in the table of names in ``gammabeta/__init__.py``.
"""
