"""A teacher that runs in servers of its own: its hidden states come over HTTP."""
