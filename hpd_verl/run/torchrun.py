"""torchrun, for jobs that a scheduler may end: ``python -m hpd_verl.run.torchrun ... -m hpd_verl.sft.trainer ...``.

torchrun itself kills its workers 30 seconds after SIGTERM, dies of SIGUSR1, and exits with its own code. This forwards
both signals to the workers, waits for them, and exits with ``stopping.EXIT_CODE`` if they stopped as asked.
"""

import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from hpd_verl.run.stopping import EXIT_CODE

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)


def _pass_on(number: int, frame: FrameType | None) -> None:
    for worker in psutil.Process().children():
        worker.send_signal(number)  # psutil checks that it is still the process that it was


def main() -> None:
    """Run torchrun with this process's arguments."""
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")  # not SIGTERM, which is passed on
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    try:
        torchrun()
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # A signal kills a worker that has just started, and workers that torchrun ends after the first.
        if codes <= {EXIT_CODE, *(-number for number in PASSED_ON)}:
            sys.exit(EXIT_CODE)
        raise


if __name__ == "__main__":
    main()
