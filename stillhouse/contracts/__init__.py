"""The promises between the services: pure data, no input or output.

Read in this order: `flow` (who publishes and consumes what), `events`, `spec`, `artifacts`.
"""
