"""`ddm islands check`: test an island before a run depends on it."""
