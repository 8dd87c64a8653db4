"""What main_ppo's driver does around a run with ``algorithm=hpd``."""

import sys
from typing import Any

import ray
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hpd_verl.ppo import messages
from hpd_verl.run.stopping import EXIT_CODE, StopSignals


class HPDDriver(Callback):
    """Hydra callback named by hpd.yaml.

    Refuses bad settings, data and models before Ray starts; passes a signal that ends the run on to the trainer.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from hpd_verl.checks.start import check_main_ppo  # takes seconds to import, which --cfg does not wait for

        self.signals = StopSignals(messages.ask)
        self.signals.install()
        self.ray_init = ray.init
        ray.init = self._init
        try:
            check_main_ppo(config)
        except ValueError as error:
            # Hydra turns a callback's exceptions into warnings; SystemExit ends the run with this one line.
            raise SystemExit(f"Error: {error}") from error

    def _init(self, *args: Any, **kwargs: Any) -> Any:
        context = self.ray_init(*args, **kwargs)
        self.signals.install()  # ray.init has put a handler of SIGTERM in place that ends the driver
        messages.say_checked()
        return context

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """After the trainer has ended without an error: end the process if it did so because it was asked to."""
        if job_return.status is not JobStatus.COMPLETED:
            return
        self.signals.ignore()
        ray.init = self.ray_init
        stopped = messages.stopped()
        if stopped is not None and stopped.error is not None:
            sys.stderr.write(f"Error: {stopped.error}, exit code {EXIT_CODE}\n")
            sys.exit(EXIT_CODE)
        if stopped is not None:
            self.signals.end(stopped.step, stopped.total_steps, stopped.checkpoint)
