"""Turns the teachers' answers into shards of rows, batch by batch.

Read in this order: `handlers`, `jobs`, `build`, `pipeline`, then one step.
"""
