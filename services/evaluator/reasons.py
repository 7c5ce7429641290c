"""Why an evaluation can never succeed: the reasons that `stage.failed` carries.

Those of folders of weights stand in `chassis.model_folder`.
"""

from __future__ import annotations

NO_SUCH_PART = "no_such_part"
HELDOUT_ROW_MALFORMED = "heldout_row_malformed"
VOCABULARY_MISMATCH = "vocabulary_mismatch"
REPORT_PARTS_DISAGREE = "report_parts_disagree"
CHECKPOINT_INCOMPLETE = "checkpoint_incomplete"
LINEAGE_BROKEN = "lineage_broken"
STUDENT_CONFLICT = "student_conflict"
