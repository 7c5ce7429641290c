"""Measures checkpoints against the teacher and writes the student folder."""
