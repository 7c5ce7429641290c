"""One module for each revision, in the order that their `down_revision` tells."""
