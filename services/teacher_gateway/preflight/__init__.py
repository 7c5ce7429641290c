"""A check's preflight: a handful of real questions to each teacher, before there is a pipeline."""
