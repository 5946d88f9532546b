"""The report for people: one HTML file that opens from disk and needs nothing else.

`facts.py` reads the run folder, `charts.py` draws, `page.py` puts both into `page.html`.
"""
