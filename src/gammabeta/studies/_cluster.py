"""An existing Dask cluster as the place where cells are measured, through joblib's dask backend.

What a cell gives comes back with its outcome and is stored by the caller, so that the cluster
needs no file system in common with it; it needs the same sources, and the images.
"""

import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from joblib.externals.loky.process_executor import TerminatedWorkerError

_SECONDS = 10  # to be answered in
_PATIENCE = 30  # seconds without any worker
_INSTALL = 'Run: pip install "gammabeta[cluster]"'


class WorkerEnded(RuntimeError):
    """The worker of a cell is gone, and so were those that Dask tried after it."""


class ClusterLost(ConnectionError):
    """The scheduler does not answer any more."""


ENDED = (TerminatedWorkerError, WorkerEnded)
LOST = (ClusterLost,)


class Cluster:
    """A connection to a scheduler that has workers."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            ImportError: Dask is not installed.
            ConnectionError: nobody answers at the address, or there are no workers.
            ValueError: it is no address.
        """
        try:
            import distributed
        except ImportError as error:
            raise ImportError(
                f"--dask needs the package distributed, which is not installed. {_INSTALL}"
            ) from error
        if not isinstance(address, str) or "://" not in address:
            raise ValueError(
                f"The address of a Dask scheduler must read tcp://HOST:PORT, got {address!r}. "
                "`dask scheduler` prints its own when it starts."
            )
        self._closed = threading.Event()
        self._open: dict[Any, Callable[[Any], None]] = {}
        self.address = address
        try:
            connect: Any = distributed.Client  # it has no annotations
            self.client: Any = connect(address, timeout=_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ConnectionError(
                f"A Dask scheduler was expected at {address}, but none answers "
                f"({_one_line(error)}). Start one with `dask scheduler`, or correct the address."
            ) from error
        try:
            with contextlib.suppress(TimeoutError):
                self.client.wait_for_workers(1, timeout=_SECONDS)
            self.threads = dict(self.client.nthreads())
        except BaseException:
            self.close()
            raise
        if not self.threads:
            self.close()
            raise ConnectionError(
                f"The Dask scheduler at {address} must have workers, but has none. "
                f"Start some: dask worker {address} --nthreads 1 --nworkers 2"
            )
        threading.Thread(target=self._watch, name="watch-cluster", daemon=True).start()

    @property
    def jobs(self) -> int:
        """How many cells it works on at a time: one in each worker, whatever its threads."""
        return len(self.threads)

    def backend(self) -> Any:
        """For joblib: its dask backend, which here also tells of what it did not survive.

        joblib 1.6 calls back for results only: it waits for ever for a task whose worker was
        killed or that no worker is left for, and takes the error of a lost scheduler for a result.
        """
        from joblib._dask import DaskDistributedBackend

        backend = DaskDistributedBackend(client=self.client)
        submit, retrieve = backend.submit, backend.retrieve_result_callback

        def submit_and_tell(func: Any, callback: Callable[[Any], None]) -> Any:
            future = submit(func, callback)
            self._open[future] = callback
            future.add_done_callback(told)
            return future

        def told(future: concurrent.futures.Future[Any]) -> None:
            callback = self._open.pop(future, None)
            error = None if future.cancelled() else future.exception()
            if error is not None and callback is not None:
                callback(error)

        def retrieve_or_raise(out: Any) -> Any:
            if isinstance(out, BaseException):
                raise self._meaning(out) from out
            return retrieve(out)

        backend.submit, backend.retrieve_result_callback = submit_and_tell, retrieve_or_raise
        # Where one job is all there is, joblib runs it in this process, whatever the backend.
        backend.effective_n_jobs = lambda n_jobs: max(2, self.jobs)
        return backend

    def _meaning(self, error: BaseException) -> BaseException:
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return WorkerEnded(_one_line(error))
        if isinstance(error, (CancelledError, concurrent.futures.CancelledError)):
            return ClusterLost(f"the scheduler at {self.address} does not answer any more")
        return error

    def _watch(self) -> None:
        """Give up what is open when there is nobody left to do it; Dask itself would wait."""
        alone = 0.0
        while not self._closed.wait(1.0):
            why = f"the scheduler at {self.address} does not answer any more"
            try:
                here = self.client.status == "running" and self.client.nthreads()
                why = f"the scheduler at {self.address} has had no worker for {_PATIENCE} s"
            except Exception:  # whatever it is, nobody answered
                here = False
            alone = 0.0 if here else alone + 1.0
            if alone >= _PATIENCE:
                for future in list(self._open):
                    if callback := self._open.pop(future, None):
                        callback(ClusterLost(why))

    def close(self) -> None:
        """Disconnect; the cluster itself goes on."""
        self._closed.set()
        with contextlib.suppress(Exception):
            self.client.close(timeout=2)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """A connection for the time of a run, None without an address."""
    if address is None:
        yield None
        return
    # What Dask writes about lost connections is told here in one sentence.
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        cluster = Cluster(address)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        log.setLevel(level)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
