"""The definition of each op in plain torch. It has no other purpose: it is the truth in float64."""
