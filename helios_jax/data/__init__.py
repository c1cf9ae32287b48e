"""Data: procedural clips of moving shapes (:mod:`.shapes`) and the rule-based reader of frames (:mod:`.reader`)."""
