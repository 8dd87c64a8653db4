"""Run by torchrun: the lean trainer, killed when it is about to open the file whose path ends as KILLED_AT says."""

import os
import signal
import sys
from typing import Any

from hpd_verl.sft.trainer import main


def kill(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(os.environ["KILLED_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(kill)
    main()
