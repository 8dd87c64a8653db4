"""A teacher's answers become demonstrations: ``hpd-verl generate``."""
