"""Time beside PyTorch's own layers: ``python -m benchmarks [NAME...]``.

A benchmark is one module of this folder whose name does not begin with an underscore, with

    def measure() -> dict[str, Any]      asserts that the results agree, then times; JSON-able
    def show(result) -> str              the result as a few lines of text

Its result goes to ``benchmarks/results/NAME.json``, together with the command, device, threads,
versions and commit it was made with.
"""
