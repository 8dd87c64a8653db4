"""From files to the token sequences of a batch: rows, chat templates, demonstrations, the choice of rollouts."""
