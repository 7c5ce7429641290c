"""The routes to a teacher, one a module; all give the same outcomes."""
