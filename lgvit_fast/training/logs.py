"""What a run tells while it goes on: a progress bar, `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lgvit_fast.checkpoints.files import save_text
from lgvit_fast.text import json_line

logger = logging.getLogger(__name__)


class RunLog:
    """The log of one stage.

    Rows of `metrics.jsonl` carry the number of updates done; when a run resumes, the rows after its
    checkpoint are dropped, so that the file reads as if it had never stopped.

    Args:
        folder: where `metrics.jsonl` and `tensorboard/` go.
        name: shown by the progress bar.
        total: updates of the whole stage.
        update: updates already done.
        tensorboard: write TensorBoard logs too, if it is installed.
        progress: show a bar with loss, images per second and time left, if standard error is a
            terminal, and a line for each validation.
    """

    def __init__(
        self, folder: Path, name: str, total: int, update: int, tensorboard: bool, progress: bool
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._keep_rows_until(update)
        self._file = self.path.open("a")
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.info("no TensorBoard logs: the tensorboard package is not installed")
            else:
                self._writer = SummaryWriter(folder / "tensorboard", purge_step=update)
        self._name, self._progress = name, progress
        self._bar = tqdm(
            total=total,
            initial=update,
            desc=name,
            unit="update",
            # None: only on a terminal, a file would get a line for every update
            disable=None if progress else True,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._images, self._since = 0, time.perf_counter()

    def advance(self, images: int) -> None:
        """Count an update and the images that it took."""
        self._images += images
        self._bar.update()

    def train(self, update: int, values: dict[str, float]) -> None:
        """Write a row of training values, with the throughput since the last one."""
        speed = self._images / max(time.perf_counter() - self._since, 1e-9)
        self.restart_clock()
        self._write("train", update, values, {"images_per_second": round(speed, 1)})
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.0f} images/s")

    def validation(self, update: int, values: dict[str, Any]) -> None:
        """Write a row of validation values."""
        self._write("validation", update, values, {})
        agreement = values.get("exit_agreement")
        exits = " ".join(f"{share:.3f}" for share in agreement or values["exit_accuracy"])
        how = "agreement of" if agreement else f"final {values['final_accuracy']:.4f},"
        line = f"epoch {values['epoch']}: {how} exits {exits}"
        if self._progress:
            tqdm.write(f"{self._name} {line}", file=sys.stderr)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure throughput from now on."""
        self._images, self._since = 0, time.perf_counter()

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, update: int, values: dict[str, Any], more: dict[str, Any]) -> None:
        self._file.write(json_line({"kind": kind, "update": update, **values, **more}) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        for name, value in {**values, **more}.items():
            numbers = value if isinstance(value, list) else [value]
            for i, number in enumerate(numbers):
                suffix = f"/{i}" if isinstance(value, list) else ""
                self._writer.add_scalar(f"{kind}/{name}{suffix}", number, update)

    def _keep_rows_until(self, update: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut short by a kill
                continue
            # a run that begins anew has not done what an earlier attempt wrote
            if update and isinstance(row, dict) and row.get("update", update) <= update:
                kept.append(line + "\n")
        save_text(self.path, "".join(kept))
