"""Claims about batch normalization, and the experiments that decide them.

``claims.toml`` is the registry: what is claimed, by whom, and the rule by which a run will decide
it. To add a claim, copy one ``[[claim]]`` table there; the comment on top of the file explains
every field, and a wrong one is refused by name.

An experiment is one module of this folder whose name does not begin with an underscore. To add
one, write the file; nothing else lists it. It holds the protocol in plain words as its docstring,
the claims that it decides, and four functions:

    CLAIMS = ("some-claim", "another-claim")

    def cells(budget, data, seeds, rows):    what to run next, given the rows so far
    def measure(arm, seed, budget, data):    one run: yields rows
    def judge(rows):                         verdicts by the rules of the registry; pure
    def figures(rows):                       what the page draws; pure

Then give each of its claims the line ``experiment = "<module>"`` in ``claims.toml``, so that the
registry can be read without importing any experiment. A claim has at most one experiment.
"""
