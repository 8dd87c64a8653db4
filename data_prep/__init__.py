"""One script per data set: from its public files to parquet rows for verl and HPD. Not part of the wheel."""
