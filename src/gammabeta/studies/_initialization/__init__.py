"""The measurements of the claims about initialization: one function per claim."""

from gammabeta.studies._initialization import depth, statistics
from gammabeta.studies._initialization._common import Measure

MEASURES: dict[str, Measure] = {**depth.MEASURES, **statistics.MEASURES}
