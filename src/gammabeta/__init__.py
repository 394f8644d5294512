"""gammabeta: batch normalization for PyTorch — layers, instruments, evidence.

Importing this module imports nothing heavy, not even torch: a public name is looked up in
the table below and its module is imported when the name is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_NAMES = {
    "BatchNorm1d": "layers.batch_norm",
    "BatchNorm2d": "layers.batch_norm",
    "BatchNorm3d": "layers.batch_norm",
    "BatchNormAct1d": "layers.batch_norm",
    "BatchNormAct2d": "layers.batch_norm",
    "BatchNormAct3d": "layers.batch_norm",
    "BatchRenorm1d": "layers.renorm",
    "BatchRenorm2d": "layers.renorm",
    "BatchRenorm3d": "layers.renorm",
    "DecorrelatedBatchNorm1d": "layers.whiten",
    "DecorrelatedBatchNorm2d": "layers.whiten",
    "GhostBatchNorm1d": "layers.ghost",
    "GhostBatchNorm2d": "layers.ghost",
    "GhostBatchNorm3d": "layers.ghost",
    "IterNorm1d": "layers.whiten",
    "IterNorm2d": "layers.whiten",
    "LazyBatchNorm1d": "layers.batch_norm",
    "LazyBatchNorm2d": "layers.batch_norm",
    "LazyBatchNorm3d": "layers.batch_norm",
    "Moments": "moments",
    "Recorder": "probes.recorder",
    "StatisticsWarning": "layers._running",
    "Step": "probes.step",
    "accumulate": "models.updates",
    "backends": "ops",
    "batch_norm": "ops",
    "calibrate": "models.calibration",
    "check": "_check",
    "convert": "models.conversion",
    "freeze": "models.freezing",
    "functional_call": "models.updates",
    "gap": "probes.train_eval",
    "measure": "probes",
    "no_update": "models.updates",
    "read_record": "_runs._record",
    "recompute_outputs": "ops._recompute",
    "report_of": "models.conversion",
    "revert": "models.conversion",
    "sites": "_sites",
    "skipped": "models.updates",
    "sync_statistics": "models.synchronization",
    "unfreeze": "models.freezing",
    "unsync_statistics": "models.synchronization",
}

__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from gammabeta._check import check as check
    from gammabeta._runs._record import read_record as read_record
    from gammabeta._sites import sites as sites
    from gammabeta.layers._running import StatisticsWarning as StatisticsWarning
    from gammabeta.layers.batch_norm import BatchNorm1d as BatchNorm1d
    from gammabeta.layers.batch_norm import BatchNorm2d as BatchNorm2d
    from gammabeta.layers.batch_norm import BatchNorm3d as BatchNorm3d
    from gammabeta.layers.batch_norm import BatchNormAct1d as BatchNormAct1d
    from gammabeta.layers.batch_norm import BatchNormAct2d as BatchNormAct2d
    from gammabeta.layers.batch_norm import BatchNormAct3d as BatchNormAct3d
    from gammabeta.layers.batch_norm import LazyBatchNorm1d as LazyBatchNorm1d
    from gammabeta.layers.batch_norm import LazyBatchNorm2d as LazyBatchNorm2d
    from gammabeta.layers.batch_norm import LazyBatchNorm3d as LazyBatchNorm3d
    from gammabeta.layers.ghost import GhostBatchNorm1d as GhostBatchNorm1d
    from gammabeta.layers.ghost import GhostBatchNorm2d as GhostBatchNorm2d
    from gammabeta.layers.ghost import GhostBatchNorm3d as GhostBatchNorm3d
    from gammabeta.layers.renorm import BatchRenorm1d as BatchRenorm1d
    from gammabeta.layers.renorm import BatchRenorm2d as BatchRenorm2d
    from gammabeta.layers.renorm import BatchRenorm3d as BatchRenorm3d
    from gammabeta.layers.whiten import DecorrelatedBatchNorm1d as DecorrelatedBatchNorm1d
    from gammabeta.layers.whiten import DecorrelatedBatchNorm2d as DecorrelatedBatchNorm2d
    from gammabeta.layers.whiten import IterNorm1d as IterNorm1d
    from gammabeta.layers.whiten import IterNorm2d as IterNorm2d
    from gammabeta.models.calibration import calibrate as calibrate
    from gammabeta.models.conversion import convert as convert
    from gammabeta.models.conversion import report_of as report_of
    from gammabeta.models.conversion import revert as revert
    from gammabeta.models.freezing import freeze as freeze
    from gammabeta.models.freezing import unfreeze as unfreeze
    from gammabeta.models.synchronization import sync_statistics as sync_statistics
    from gammabeta.models.synchronization import unsync_statistics as unsync_statistics
    from gammabeta.models.updates import accumulate as accumulate
    from gammabeta.models.updates import functional_call as functional_call
    from gammabeta.models.updates import no_update as no_update
    from gammabeta.models.updates import skipped as skipped
    from gammabeta.moments import Moments as Moments
    from gammabeta.ops import backends as backends
    from gammabeta.ops import batch_norm as batch_norm
    from gammabeta.ops._recompute import recompute_outputs as recompute_outputs
    from gammabeta.probes import measure as measure
    from gammabeta.probes.recorder import Recorder as Recorder
    from gammabeta.probes.step import Step as Step
    from gammabeta.probes.train_eval import gap as gap


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'gammabeta' has no attribute {name!r}")
    value = getattr(import_module(f"gammabeta.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
