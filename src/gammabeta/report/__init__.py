"""Run folders in, one self-contained HTML page out; reads files only, runs no experiment."""
