"""An update of a story's context: each change is validated separately, all are stored together.

A change that breaks a rule is refused with one warning, and the others are stored. Fields that a
payload lacks stay unchanged; no values are invented. An UPDATE of a plan, subtask or decision that
does not exist creates it, and a subtask creates the plan that it names. Only CREATE brings back a
deleted entity, without any field of the deleted one. Unknown fields are kept as properties with
the prefix `x_`. An older change never replaces newer values: every text and status carries the
order key of `changes`, and the story's lock is held from before the first comparison until the
commit.
"""
