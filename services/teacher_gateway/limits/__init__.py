"""How often a teacher is asked, and by whom: what all who share its endpoint may do together.

- endpoints: which calls a provider counts together, and the row in SQL that they share
- shared: that row for one attempt: shares, permits, pauses, circuit; reports: what both sides tell
- shares: equal parts of the calls at once; strain: how many of those; rates: how many in a minute
- turns: one attempt's calls, which keep to all that
- question: is the teacher away, or is it these items?
"""
