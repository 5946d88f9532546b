"""Progress, status, costs, wandb, and the HTML report: one file that opens from disk and needs no other.

`facts.py` and `results.py` read the run folder, `summary.py` and `charts.py` condense it, and `page.py` fills the
templates in `templates/`, whose sections `ddm ui` shows too.
"""
