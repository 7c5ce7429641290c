"""May this teacher's answers train this student? Answered before anything is asked or paid."""
