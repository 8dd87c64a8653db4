"""verl's FSDP engine, and the causal language model as seen from it."""
