"""Around any run: which checkpoint is complete, stopping by signal, torchrun, functions that wait for an
import, processes that end with their parent."""
