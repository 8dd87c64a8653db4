"""The store of the teacher's features: its records, what identifies it, and where it is kept."""
