"""``hpd-verl COMMAND``: the commands around a run, by one name.

The trainers are started by Ray or torchrun: ``python -m verl.trainer.main_ppo algorithm=hpd ...`` and
``torchrun -m hpd_verl.sft.trainer ...``.
"""

import importlib
import sys

COMMANDS = {
    "export": ("hpd_verl.tools.export", "export a checkpoint as a folder that transformers and vLLM load"),
    "fill-store": (
        "hpd_verl.sft.fill_store",
        "fill the teacher's store ahead of training (several ranks: torchrun)",
    ),
    "generate": ("hpd_verl.tools.demonstrations.__main__", "a teacher's answers to the prompts of a file become rows"),
    "plan": ("hpd_verl.tools.plan.__main__", "memory, time and disk that a run takes, from the models' config.json"),
    "report": ("hpd_verl.tools.report", "curves of one or several runs in one picture, from their logs"),
}
"""Name of each command: its module, whose ``main`` reads ``sys.argv``, and what it does."""


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: hpd-verl COMMAND ...", "", *lines, "", "hpd-verl COMMAND --help: its arguments"])


def main() -> None:
    """Run the command that the first argument names; exit code 2 if there is no such command."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in COMMANDS:
        sys.argv = [f"hpd-verl {name}", *sys.argv[2:]]
        importlib.import_module(COMMANDS[name][0]).main()
    else:
        found = f"Error: hpd-verl {name}: no such command" if name else "Error: hpd-verl: no command"
        print(f"{found}; choose {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
