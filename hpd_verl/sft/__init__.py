"""The lean trainer: distillation on demonstrations without Ray; and the command that fills the teacher's store."""
