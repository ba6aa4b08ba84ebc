"""The thread that answers: everybody hands images in, it alone runs the model."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lgvit_fast.deploy import Deployed
from lgvit_fast.runtimes.continuous import ContinuousBatcher, Finished
from lgvit_fast.serve.levels import Levels

__all__ = ["Job", "Worker"]

_logger = logging.getLogger(__name__)
_RUN = 5.0  # seconds that are left to a run in progress when the worker must end


@dataclass(slots=True, eq=False)
class Job:
    """An image that was accepted, and who wants to know.

    Attributes:
        image: `[channels, H, W]` float32; None once the worker has it.
        deliver: called once, unless the job was given up, with the answer, or with None if there will
            be none: the worker died, or was told to end first.
    """

    image: NDArray[np.float32] | None
    deliver: Callable[[Finished | None], object]


class Worker:
    """Owns the model while a server runs.

    Args:
        deployed: the model.
        batcher: over its graphs; the worker's thread alone uses it.
        levels: the policies of the batcher, and which of them is next.
        queue: images that may be accepted and not answered.
        count: called with the places that are taken, whenever that changes.
        died: called once if the thread ends by an exception, when all who waited have been told.

    Attributes:
        failure: the exception that ended the thread.
    """

    def __init__(
        self,
        deployed: Deployed,
        batcher: ContinuousBatcher,
        levels: Levels,
        queue: int,
        count: Callable[[int], object] = lambda places: None,
        died: Callable[[], object] = lambda: None,
    ) -> None:
        self._deployed, self._batcher, self.levels, self._most = deployed, batcher, levels, queue
        self._count, self._died = count, died
        self._changed = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._jobs: set[Job] = set()  # handed in, without an answer
        self._given_up: set[Job] = set()
        self._places = 0  # taken: accepted, or held for an image that is being read
        self._unshared = 0.0  # seconds of runs after which nobody has left yet
        self._stopping = self._ended = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lgvit-serve", daemon=True)

    def start(self) -> None:
        """Warm the model up, then begin."""
        shape = (1, self._deployed.manifest.preprocessing.channels)
        size = self._deployed.manifest.preprocessing.size
        self._deployed.forward_exits(np.zeros((*shape, *size), np.float32))
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether images are being answered."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Images that have a place and no answer."""
        return self._places

    @property
    def retry_after(self) -> float:
        """Seconds until half of those have been answered, as far as is known."""
        return self.levels.expected(self._places) / 2

    def reserve(self, images: int) -> bool:
        """Hold places for images that are still to be read; False if there are not enough."""
        with self._changed:
            if self._stopping or self._places + images > self._most:
                return False
            self._take(images)
            return True

    def release(self, places: int = 1) -> None:
        """Give places back."""
        with self._changed:
            self._take(-places)

    def submit(self, job: Job) -> None:
        """Hand in an image that has a place, which its answer gives back."""
        with self._changed:
            self._jobs.add(job)
            if not self._ended:
                self._inbox.append(job)
                self._changed.notify()
                return
        self._tell_all()

    def give_up(self, jobs: set[Job]) -> None:
        """Nobody wants to know any more: jobs without an answer are dropped before the next run."""
        with self._changed:
            self._given_up |= jobs
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Answer what was accepted, then end; after so many seconds, end without."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        self.end()
        if self._thread.ident is not None:
            self._thread.join(_RUN)

    def end(self) -> None:
        """End after the run in progress, and tell all who wait that there will be no answer."""
        with self._changed:
            self._stopping = self._ended = True
            self._changed.notify()
        self._tell_all()

    def _work(self) -> None:
        try:
            while self._take_in():
                began = time.perf_counter()
                done = self._batcher.step()
                self._tell(done, time.perf_counter() - began)
        except BaseException as error:
            _logger.critical("the thread that runs the model died", exc_info=error)
            self.failure = error
            self.end()
            self._died()

    def _take_in(self) -> bool:
        """Wait until there is something to run, and take in what has come; False at the end."""
        with self._changed:
            while not self._ended:
                self._drop()
                while self._inbox:
                    job = self._inbox.popleft()
                    assert job.image is not None
                    level = self.levels.choose(len(self._batcher))
                    self._batcher.add(job.image, job, level)
                    job.image = None
                wait = self._batcher.wait()
                if wait == 0 or (wait is not None and self._stopping):
                    if self._stopping:
                        self._batcher.max_wait = 0.0
                    return True
                if wait is None and self._stopping:
                    return False
                self._changed.wait(wait)
            return False

    def _take(self, places: int) -> None:
        """Places more are taken. Called with the lock."""
        self._places += places
        self._count(self._places)

    def _drop(self) -> None:
        """Forget what was given up. Called with the lock."""
        if self._given_up:
            self._inbox = deque(job for job in self._inbox if job not in self._given_up)
            self._batcher.drop(set(self._given_up))
            self._take(-len(self._jobs & self._given_up))
            self._jobs -= self._given_up
            self._given_up.clear()

    def _tell(self, done: list[Finished], seconds: float) -> None:
        self._unshared += seconds
        if not done:
            return
        for finished in done:
            self.levels.answered(self._unshared / len(done))
            job = finished.key
            assert isinstance(job, Job)
            self._deliver(job, finished)
        self._unshared = 0.0

    def _tell_all(self) -> None:
        """That there will be no answer."""
        with self._changed:
            jobs = tuple(self._jobs)
        for job in jobs:
            self._deliver(job, None)

    def _deliver(self, job: Job, finished: Finished | None) -> None:
        with self._changed:
            if job not in self._jobs:  # told by another thread
                return
            self._jobs.remove(job)
            self._take(-1)
        with contextlib.suppress(RuntimeError):  # the loop of who asked has been closed
            job.deliver(finished)
